//! Keys and tokens that are not what they were: a key deleted behind the daemon (HS-9), another one of
//! the same id (KL-2), another token of the same label (KL-8).

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::daemon::{Api, TestDaemon, free_port};
use crate::served::{config, over, refused_for_now, stored, value_path};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm::{self, SoftHsm};
use crate::stage::{objects_in, pkcs11_tool};

/// Runs pkcs11-tool on the token of `lacre dev`.
pub fn tool(daemon: &TestDaemon, args: &[&str]) -> String {
    let pin = fs::read_to_string(daemon.dir().join("pin")).unwrap();
    pkcs11_tool(&softhsm::module(), &daemon.dir().join("softhsm2.conf"), "lacre-dev", pin.trim(), args)
}

/// A member of a KEK version.
async fn kek(api: &Api, version: u64, member: &str) -> String {
    let list: Value = api.get("/v1/keks").await.json().await.unwrap();
    let found = list["items"].as_array().unwrap().iter().find(|kek| kek["version"] == version);
    found.unwrap()[member].as_str().unwrap().to_owned()
}

async fn key_incidents(api: &Api) -> Vec<Value> {
    let records = api.audit_lines().await.into_iter().map(|line| serde_json::from_str(&line).unwrap());
    records.filter(|record: &Value| record["action"] == "incident.key").collect()
}

#[tokio::test]
async fn a_key_deleted_behind_the_daemon_fails_its_own_users_and_is_not_made_again() {
    let mut daemon = TestDaemon::dev().await;
    let api = daemon.api().await;
    let (old_value, new_value) = (daemon.secret("old"), daemon.secret("new"));
    let old = stored(&api, "old", &old_value).await;
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    let new = stored(&api, "new", &new_value).await;
    let key = kek(&api, 1, "key_id").await;

    tool(&daemon, &["--delete-object", "--type", "secrkey", "--id", &key]);
    refused_for_now(api.get(&value_path(&old)).await, "key-unavailable").await;

    assert_eq!(api.value(&new).await, new_value, "another key's user");
    daemon.token("all").await;
    missed(&api, &key).await;
    assert_eq!(daemon.failing().await, Vec::<String>::new(), "the rest goes on");
    assert_eq!(kek(&api, 1, "state").await, "missing");
    // The incident is queued; the record of a token stands behind it and is waited for.
    daemon.token("all").await;
    let incidents = key_incidents(&api).await;
    assert_eq!(incidents.len(), 1, "{incidents:?}");
    assert_eq!(incidents[0]["details"]["device_id"], key);
    assert_eq!(incidents[0]["object"]["kind"], "key");
    assert_eq!(incidents[0]["outcome"], json!({ "result": "failure", "code": "key-missing" }));

    // Not by going on, and not by a new start of what makes keys where there are none.
    daemon.stop().await;
    let before = daemon.log().len();
    daemon.run().await;
    assert!(daemon.log()[before..].contains(&key), "does not name the key");
    let api = daemon.api().await;
    assert_eq!(kek(&api, 1, "state").await, "missing");
    assert_eq!(api.value(&new).await, new_value);
    refused_for_now(api.get(&value_path(&old)).await, "key-unavailable").await;
    assert!(objects_in(&tool(&daemon, &["--list-objects"]), &key).is_empty(), "the key was made again");
    daemon.finish().await;
}

/// Waits until the daemon has noticed that the key is gone.
async fn missed(api: &Api, key: &str) {
    let began = Instant::now();
    loop {
        let status: Value = api.get("/v1/status").await.json().await.unwrap();
        if status["missing_keys"] == json!([key]) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "the key is not missed: {status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_lost_key_that_sealed_is_followed_by_a_new_one_also_after_a_restart() {
    let mut daemon = TestDaemon::dev().await;
    let api = daemon.api().await;
    let lost = stored(&api, "lost", &daemon.secret("lost")).await;
    let key = kek(&api, 1, "key_id").await;
    tool(&daemon, &["--delete-object", "--type", "secrkey", "--id", &key]);

    daemon.restart().await;
    let api = daemon.api().await;
    missed(&api, &key).await;
    let body = json!({ "name": "more", "value": daemon.secret("more") });
    refused_for_now(api.post("/v1/secrets", &body).await, "key-unavailable").await;
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    let more = stored(&api, "more", &daemon.secret("more")).await;
    assert_eq!(api.value(&more).await, daemon.secret("more"));
    refused_for_now(api.get(&value_path(&lost)).await, "key-unavailable").await;
    daemon.finish().await;
}

#[tokio::test]
async fn a_planned_version_that_cannot_be_made_takes_nothing_from_what_is_there() {
    let control = ShimControl::new(&softhsm::module());
    let mut daemon = TestDaemon::start(over(&control, "")).await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;

    // The token is full.
    control.set_rules("C_GenerateKey * return:0x31");
    assert!(api.post("/v1/keks/rotate", &json!({})).await.status().is_server_error());
    assert_eq!(kek(&api, 2, "state").await, "planned");
    daemon.restart().await;
    let api = daemon.api().await;
    assert_eq!(api.value(&id).await, value);
    stored(&api, "more", &daemon.secret("more")).await;
    assert_eq!(daemon.failing().await, Vec::<String>::new());

    control.set_rules("");
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    assert_eq!(kek(&api, 2, "state").await, "active");
    daemon.finish().await;
}

/// The device's id of the one private key.
fn signing_key(daemon: &TestDaemon) -> String {
    let listing = tool(daemon, &["--list-objects", "--type", "privkey"]);
    let line = listing.lines().find_map(|line| line.trim().strip_prefix("ID:"));
    line.expect("a private key").trim().to_owned()
}

#[tokio::test]
async fn without_its_signing_key_it_issues_no_tokens_and_releases_values_still() {
    let mut daemon = TestDaemon::dev().await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    let key = signing_key(&daemon);

    tool(&daemon, &["--delete-object", "--type", "privkey", "--id", &key]);
    let dev = daemon.dev_json();
    let (client, secret) = (&dev["management"]["client_id"], &dev["management"]["client_secret"]);
    let request = daemon
        .anonymous(Method::POST, "/oidc/token")
        .basic_auth(client.as_str().unwrap(), secret.as_str())
        .form(&[("grant_type", "client_credentials")]);
    let answer = request.send().await.unwrap();

    assert_eq!(answer.status(), 503);
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({ "error": "temporarily_unavailable" }));
    assert_eq!(api.value(&id).await, value, "verification needs the public half only");
    let jwks = daemon.anonymous(Method::GET, "/oidc/jwks").send().await.unwrap();
    assert_eq!(jwks.status(), 200);
    // After a restart nothing vouches for the stored public half, so no token is believed.
    daemon.stop().await;
    let before = daemon.log().len();
    let started = tokio::time::timeout(Duration::from_secs(8), daemon.try_run()).await;
    assert!(started.is_err(), "it ended, or is ready without the key of all tokens");
    assert!(daemon.log()[before..].contains(&key), "does not name the key");
}

#[tokio::test]
async fn a_second_key_of_the_same_id_is_not_chosen_from() {
    let mut daemon = TestDaemon::dev().await;
    let api = daemon.api().await;
    let id = stored(&api, "one", &daemon.secret("one")).await;
    let key = kek(&api, 1, "key_id").await;

    // Same class, id and label: only the bytes of the key differ.
    let file = daemon.dir().join("planted.key");
    fs::write(&file, [7; 32]).unwrap();
    let write = ["--write-object", file.to_str().unwrap(), "--type", "secrkey", "--key-type", "AES:32"];
    tool(&daemon, &[&write[..], &["--id", &key, "--label", "lacre kek", "--usage-decrypt"]].concat());
    assert_eq!(objects_in(&tool(&daemon, &["--list-objects"]), &key).len(), 2, "nothing was planted");

    daemon.stop().await;
    assert!(!daemon.try_run().await, "started with an ambiguous key");
    assert_eq!(daemon.ended(Duration::from_secs(20)).await, Some(1));
    let log = daemon.log();
    assert!(log.contains(&key) && log.contains("2 objects"), "{log}");
    drop((api, id));
}

/// Moves the token's files away and puts others with the same label and PIN in their place.
fn exchange_token(daemon: &TestDaemon) {
    let other = SoftHsm::new("lacre-dev");
    fs::rename(daemon.dir().join("tokens"), daemon.dir().join("tokens.before")).unwrap();
    copy_tree(&other.dir.join("tokens"), &daemon.dir().join("tokens"));
    let mut command = Command::new("softhsm2-util");
    command.env("SOFTHSM2_CONF", daemon.dir().join("softhsm2.conf")).args(["--show-slots"]);
    let shown = String::from_utf8(command.output().unwrap().stdout).unwrap();
    assert!(shown.contains(&other.serial), "{shown}");
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, Permissions::from_mode(0o700)).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target: PathBuf = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_tree(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

#[tokio::test]
async fn another_token_of_the_same_label_gets_no_pin() {
    let control = ShimControl::new(&softhsm::module());
    let listen = format!("127.0.0.1:{}", free_port());
    let mut options = over(&control, "");
    options.config = Some(config(&shim_path(), "").replace("127.0.0.1:0", &listen));
    let mut daemon = TestDaemon::start(options).await;
    let api = daemon.api().await;
    let value = daemon.secret("mine");
    let id = stored(&api, "mine", &value).await;
    daemon.stop().await;
    exchange_token(&daemon);
    let logins = control.count("C_Login");

    let dir = daemon.dir().to_owned();
    let asked = async {
        let client = reqwest::Client::new();
        let began = Instant::now();
        while client.request(Method::GET, format!("http://{listen}/livez")).send().await.is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not serve");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(control.count("C_Login"), logins, "a PIN was sent to another token");
        // Its own token again, and it goes on by itself.
        fs::remove_dir_all(dir.join("tokens")).unwrap();
        fs::rename(dir.join("tokens.before"), dir.join("tokens")).unwrap();
    };
    let (became_ready, ()) = tokio::join!(daemon.try_run(), asked);

    assert!(became_ready, "{}", daemon.log());
    assert_eq!(daemon.api().await.value(&id).await, value);
    daemon.finish().await;
}
