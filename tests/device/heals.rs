//! Single faults under a daemon that serves: what a device may do besides failing a call (HS-4, HS-7,
//! HS-10 to HS-14), and a count of what it was used for.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::{Api, Options, TestDaemon, free_port};
use crate::scenario::{Client, every_key_is_there_once};
use crate::served::{config, over, served, served_in_threads, stored, value_path};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;

async fn token_request(daemon: &TestDaemon) -> Result<StatusCode, reqwest::Error> {
    let dev = daemon.dev_json();
    let app = &dev["management"];
    let request = daemon.anonymous(Method::POST, "/oidc/token");
    let request = request.basic_auth(app["client_id"].as_str().unwrap(), app["client_secret"].as_str());
    Ok(request.form(&[("grant_type", "client_credentials")]).send().await?.status())
}

#[tokio::test]
async fn a_crash_inside_the_module_ends_the_daemon_and_its_restart_is_ready_at_once() {
    let (daemon, control) = served_in_threads().await;
    let mut client = Client::new(daemon, control).await;
    for crash in ["abort", "segv"] {
        client.control.set_rules(&format!("C_Sign 1 {crash}"));
        let logins = client.control.count("C_Login");
        assert!(token_request(&client.daemon).await.is_err(), "{crash}: an answer from a dead daemon");
        client.control.set_rules("");
        // Ended by a signal: no exit code.
        assert_eq!(client.daemon.ended(Duration::from_secs(10)).await, None);

        let began = Instant::now();
        client.restarted().await;
        println!("{crash}: ready again after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        assert_eq!(client.control.count("C_Login"), logins + 1);
        client.pass().await;
    }
    client.finish().await;
}

#[tokio::test]
async fn crashes_inside_a_login_stop_being_repeated() {
    let (mut daemon, control) = served_in_threads().await;
    daemon.stop().await;
    let before = control.count("C_Login");
    control.set_rules("C_Login * abort");
    for _ in 0..2 {
        assert!(!tokio::time::timeout(Duration::from_secs(20), daemon.try_run()).await.unwrap());
        daemon.kill();
    }
    // The third start tries nothing, and stays up to say so.
    let started = tokio::time::timeout(Duration::from_secs(3), daemon.try_run()).await;
    assert!(started.is_err(), "it ended, or is ready");
    assert_eq!(control.count("C_Login"), before + 2);
    assert!(daemon.log().contains("died inside the last logins"), "{}", daemon.log());
    daemon.kill();
}

#[tokio::test]
async fn a_failover_to_another_member_of_an_ha_group_is_followed() {
    let (daemon, control) = served("").await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    for offset in [1000, 2000, 0] {
        // Sessions, login and handles are gone at once, and the slot has another number.
        control.set_rules(&format!("C_DecryptInit 1 close-all-sessions\nC_GetSlotList * slots:{offset}"));
        let began = Instant::now();
        while api.get(&value_path(&id)).await.status() != StatusCode::OK {
            assert!(began.elapsed() < Duration::from_secs(5), "not followed: {}", daemon.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!("slot + {offset}: followed after {:?}", began.elapsed());
        assert_eq!(api.value(&id).await, value);
        daemon.token("all").await;
    }
    // The first rule is spent, the last numbers are the module's own again.
    control.set_rules("");
    daemon.finish().await;
}

#[tokio::test]
async fn two_tokens_of_one_label_are_not_chosen_from() {
    let control = ShimControl::new(&softhsm::module());
    let listen = format!("127.0.0.1:{}", free_port());
    let text = config(&shim_path(), "").replace("127.0.0.1:0", &listen);
    let mut daemon = TestDaemon::start(Options { config: Some(text), ..over(&control, "") }).await;
    daemon.stop().await;
    let logins = control.count("C_Login");
    // SoftHSM shows a token that is not initialised beside the one that is.
    control.set_rules("C_GetTokenInfo * label:lacre-dev");
    let watched = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(control.count("C_Login"), logins, "a PIN was sent to one of two");
        control.set_rules("");
    };
    let (became_ready, ()) = tokio::join!(daemon.try_run(), watched);
    assert!(became_ready, "{}", daemon.log());
    assert!(daemon.log().contains("more than one token is `lacre-dev`; choose by serial"));
    daemon.finish().await;
}

#[tokio::test]
async fn a_key_that_is_weakened_under_the_daemon_is_found_within_a_minute() {
    let (daemon, control) = served("").await;
    let api = daemon.api().await;
    let id = stored(&api, "kept", &daemon.secret("kept")).await;
    // CKA_EXTRACTABLE, of every key.
    control.set_rules("C_GetAttributeValue * turn:0x162");
    let began = Instant::now();
    while !daemon.failing().await.contains(&"keys".to_owned()) {
        assert!(began.elapsed() < Duration::from_secs(65), "not found");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("found after {:?}", began.elapsed());
    let answer = api.get(&value_path(&id)).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json::<Value>().await.unwrap()["code"], "key-unavailable");
    assert!(daemon.log().contains("CKA_EXTRACTABLE is true"), "{}", daemon.log());
    tokio::time::sleep(Duration::from_millis(200)).await;
    let lines = api.audit_lines().await.join("\n");
    assert!(lines.contains("\"action\":\"incident.key\"") && lines.contains("key-unfit"), "{lines}");
    control.set_rules("");
    daemon.finish().await;
}

/// One of the load's requests, by number.
async fn one_of_the_load(api: &Api, daemon: &TestDaemon, id: &str, sealed: &Value, number: usize) {
    let name = format!("load-{number}");
    let status = match number % 6 {
        0 | 1 => api.get(&value_path(id)).await.status(),
        2 => api.post("/v1/secrets", &json!({ "name": name, "value": "v" })).await.status(),
        3 => api.post("/v1/open", &json!({ "context": "c", "sealed": sealed })).await.status(),
        4 => api.post("/v1/datakeys", &json!({ "context": "c" })).await.status(),
        _ => token_request(daemon).await.unwrap(),
    };
    assert!(status.is_success(), "{number}: {status}");
}

/// PKCS#11 has no count of operations that a program could read from its device, so "the HSM was used outside
/// the daemon" cannot be an alarm of the daemon. What can be had is the comparison: of a device's own count,
/// here the shim's, with the audit log's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_device_was_used_exactly_as_often_as_the_audit_log_says() {
    const LOAD: Duration = Duration::from_secs(30);
    let control = ShimControl::new(&softhsm::module());
    let options = over(&control, "deadline = \"10s\"");
    let text = format!("{}[server.rate_limit]\nper_second = 0\nburst = 1\n", options.config.unwrap());
    let daemon = TestDaemon::start(Options { config: Some(text), ..options }).await;
    let api = daemon.api().await;
    let id = stored(&api, "kept", "v").await;
    let sealed = api.post("/v1/seal", &json!({ "context": "c", "value": "v" })).await;
    let sealed = sealed.json::<Value>().await.unwrap()["sealed"].clone();
    one_of_the_load(&api, &daemon, &id, &sealed, 0).await;
    // All keys have been found and looked at; the next look is a minute away.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let (counts, lines) = (control.counts(), api.audit_lines().await.len());
    let (daemon, began) = (std::sync::Arc::new(daemon), Instant::now());
    let mut running = JoinSet::new();
    for worker in 0..4 {
        let (daemon, id, sealed) = (std::sync::Arc::clone(&daemon), id.clone(), sealed.clone());
        let api = daemon.api_of(&api.token);
        running.spawn(async move {
            let mut number = worker;
            while began.elapsed() < LOAD {
                one_of_the_load(&api, &daemon, &id, &sealed, number).await;
                number += 5;
            }
        });
    }
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = control.counts();
    let recorded = api.audit_lines().await.split_off(lines);
    let recorded: Vec<Value> = recorded.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let done = |actions: &[&str]| {
        let is_done = |record: &&Value| {
            record["type"] == "outcome"
                && record["outcome"]["result"] == "success"
                && actions.contains(&record["action"].as_str().unwrap())
        };
        u64::try_from(recorded.iter().filter(is_done).count()).unwrap()
    };
    let used = |function: &str| after[function] - counts[function];
    let opened = done(&["secret.reveal", "external.open"]);
    let sealed_count = done(&["secret.create", "datakey.create"]);
    let signed = done(&["token.issue"]);
    println!("in {LOAD:?}: {opened} opened, {sealed_count} sealed, {signed} signed");
    assert!(opened > 50 && sealed_count > 50 && signed > 20);
    assert_eq!((used("C_Decrypt"), used("C_Encrypt"), used("C_Sign")), (opened, sealed_count, signed));

    // Somebody else signs with the daemon's key: the count has one more than the log.
    outsider_signs(&daemon, &control);
    assert_eq!(control.count("C_Sign") - counts["C_Sign"], signed + 1, "the surplus is not seen");
    std::sync::Arc::into_inner(daemon).unwrap().finish().await;
}

/// Signs with `pkcs11-tool` through the shim, as whoever knows the PIN can.
fn outsider_signs(daemon: &TestDaemon, control: &ShimControl) {
    let pin = std::fs::read_to_string(daemon.dir().join("pin")).unwrap();
    let (message, out) = (daemon.dir().join("outside"), daemon.dir().join("outside.sig"));
    std::fs::write(&message, [7; 32]).unwrap();
    let mut command = std::process::Command::new("pkcs11-tool");
    command.env("SOFTHSM2_CONF", daemon.dir().join("softhsm2.conf")).envs(control.env());
    command.arg("--module").arg(shim_path()).args([
        "--token-label",
        "lacre-dev",
        "--login",
        "--pin",
        pin.trim(),
    ]);
    command.args(["--sign", "-m", "ECDSA", "--input-file"]).arg(&message).arg("--output-file").arg(&out);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let _ = (std::fs::remove_file(message), std::fs::remove_file(out));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_clients_share_the_sessions_that_are_configured() {
    let control = ShimControl::new(&softhsm::module());
    let options = over(&control, "deadline = \"5s\"\nfast_threads = 4\nslow_threads = 1");
    let text = format!("{}[server.rate_limit]\nper_second = 0\nburst = 1\n", options.config.unwrap());
    let daemon = TestDaemon::start(Options { config: Some(text), ..options }).await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    let open = || control.count("C_OpenSession") - control.count("C_CloseSession");
    let (mut served, mut refused) = (0, 0);
    for _ in 0..3 {
        let mut reads = JoinSet::new();
        for _ in 0..500 {
            let request = api.request(Method::GET, &value_path(&id));
            reads.spawn(async move { request.send().await.unwrap().status() });
        }
        while let Some(status) = reads.join_next().await {
            match status.unwrap() {
                StatusCode::OK => served += 1,
                StatusCode::SERVICE_UNAVAILABLE => refused += 1,
                other => panic!("{other}"),
            }
        }
        // Four fast, one slow, one that makes keys, and the one that holds the login.
        assert!(open() <= 7, "{} sessions are open", open());
    }
    println!("{served} served, {refused} refused, {} sessions open", open());
    assert!(served >= 1000);

    // No session is to be had for a while: refused, and then served again.
    control.set_rules("C_DecryptInit 1 close-all-sessions\nC_OpenSession * return:0xB1");
    while api.get(&value_path(&id)).await.status() != StatusCode::SERVICE_UNAVAILABLE {}
    tokio::time::sleep(Duration::from_secs(1)).await;
    control.set_rules("");
    let began = Instant::now();
    while api.get(&value_path(&id)).await.status() != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(5), "not healed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(api.value(&id).await, value);
    every_key_is_there_once(&daemon);
    daemon.finish().await;
}
