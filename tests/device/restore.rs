//! The device is lost and the backup KEK is there (UP-7, O4, O5, F10, KL-6): second wraps, the restore and
//! its quarantine, and the drill that operators rehearse.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::daemon::{Api, Options, TestDaemon};
use crate::postgres::Postgres;
use crate::served::{stored, value_path};
use crate::shim::ShimControl;
use crate::swtpm::Swtpm;
use crate::two::{add_token, config, options, prepared};

const BACKUP: &str = "[backup]\ndevice = \"b\"\n";

/// Waits until that many records lack their second wrap.
async fn without_backup(api: &Api, wanted: u64) {
    let began = Instant::now();
    loop {
        let status: Value = api.get("/v1/status").await.json().await.unwrap();
        let now = status["vault"]["without_backup"].as_u64();
        if now == Some(wanted) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{now:?}, not {wanted}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn util(dir: &Path, args: &[&str]) {
    let mut command = Command::new("softhsm2-util");
    let output = command.env("SOFTHSM2_CONF", dir.join("softhsm2.conf")).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A running daemon with backups, and what its configuration says beside `more`.
async fn with_backups(more: &str) -> (TestDaemon, String, ShimControl) {
    let (mut daemon, direct, control) = prepared().await;
    let text = config(&direct, &format!("{more}\n{BACKUP}"));
    daemon.set_options(options(&control, text.clone()));
    daemon.initialise();
    daemon.run().await;
    (daemon, text, control)
}

#[tokio::test]
async fn every_record_gets_a_second_wrap_and_its_device_may_be_away_meanwhile() {
    let (daemon, _, control) = with_backups("[database]\nurl = \"sqlite:{dir}/two.db\"").await;
    let api = daemon.api().await;
    let (first, second) = (daemon.secret("first"), daemon.secret("second"));
    let id = stored(&api, "first", &first).await;
    without_backup(&api, 0).await;
    let list: Value = api.get("/v1/keks").await.json().await.unwrap();
    let shown = |kek: &Value| (kek["role"].clone(), kek["device"].clone(), kek["records"].clone());
    let backup = (json!("backup"), json!("b"), json!(1));
    assert_eq!(shown(&list["items"][0]), backup, "{list}");
    assert_eq!(shown(&list["items"][1]), (json!("main"), json!("default"), json!(1)), "{list}");
    // It is no place for KEKs in use.
    let refused = api.post("/v1/keks/rotate", &json!({ "device": "b" })).await;
    assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY);

    // The backup token goes away: nothing else notices, and the lag shows.
    let tokens = daemon.dir().join("tokens");
    let away = token_dir(&daemon, "second");
    std::fs::rename(tokens.join(&away), daemon.dir().join("away")).unwrap();
    for number in 0..5 {
        stored(&api, &format!("more/{number}"), &second).await;
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    without_backup(&api, 5).await;
    assert_eq!(api.value(&id).await, first);
    let began = Instant::now();
    while !daemon.failing().await.iter().any(|name| name == "device/b") {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", daemon.failing().await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let ready = daemon.anonymous(reqwest::Method::GET, "/readyz").send().await.unwrap();
    assert_eq!(ready.status(), StatusCode::OK, "readiness does not depend on it");
    // Other jobs do not wait for it.
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    let job: Value = api.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
    assert_eq!(api.job(job["id"].as_str().unwrap()).await["state"], "succeeded");
    std::fs::rename(daemon.dir().join("away"), tokens.join(&away)).unwrap();
    without_backup(&api, 0).await;

    // A deleted record takes both wraps with it.
    let wraps = wraps_of(&daemon, &id);
    let answer = api.delete(&format!("/v1/secrets/{id}")).await;
    assert_eq!(answer.status(), StatusCode::NO_CONTENT);
    control.set_rules("");
    let file = daemon.dir().join("two.db");
    // The write-ahead log is truncated when writing pauses, after half a minute at the latest.
    let began = Instant::now();
    let is_left = |path: &Path| {
        let bytes = std::fs::read(path).unwrap_or_default();
        wraps.iter().any(|wrap| crate::daemon::contains(&bytes, wrap))
    };
    while let Some(path) = [file.clone(), file.with_extension("db-wal")].iter().find(|path| is_left(path)) {
        assert!(began.elapsed() < Duration::from_secs(40), "a wrap is still in {}", path.display());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    daemon.finish().await;
}

/// The directory of the token with that label.
fn token_dir(daemon: &TestDaemon, label: &str) -> String {
    let tokens = daemon.dir().join("tokens");
    for entry in std::fs::read_dir(&tokens).unwrap().flatten() {
        let bytes = std::fs::read(entry.path().join("token.object")).unwrap_or_default();
        if crate::daemon::contains(&bytes, label.as_bytes()) {
            return entry.file_name().into_string().unwrap();
        }
    }
    panic!("no token {label}");
}

/// Both wraps of a record, as the file has them.
fn wraps_of(daemon: &TestDaemon, id: &str) -> Vec<Vec<u8>> {
    let script = "import sqlite3, sys\n\
        db = sqlite3.connect('file:' + sys.argv[1] + '?mode=ro', uri=True)\n\
        for row in db.execute('SELECT wrapped_dek, backup_dek FROM secret_versions WHERE secret_id = ?', sys.argv[2:]):\n\
        \x20   print(row[0].hex()); print(row[1].hex())\n";
    let output = Command::new("python3")
        .args(["-c", script])
        .arg(daemon.dir().join("two.db"))
        .arg(id)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let wraps: Vec<_> = text.lines().map(|line| hex::decode(line).unwrap()).collect();
    assert_eq!(wraps.len(), 2, "{}", String::from_utf8_lossy(&output.stderr));
    wraps
}

/// Runs `lacre restore run`, killed again and again until it comes to its end; its report and the kills.
fn restored(daemon: &TestDaemon, dir: &Path) -> (Value, usize) {
    let dir = dir.to_str().unwrap();
    let args =
        ["restore", "run", "--lost", "default", "--secrets-dir", dir, "-o", "json", "--progress", "json"];
    for kills in 0..60_u64 {
        let mut command = daemon.command_of(&args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let until = Instant::now() + Duration::from_millis(150 + 90 * kills);
        while Instant::now() < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            continue;
        }
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        return (serde_json::from_slice(&output.stdout).unwrap(), kills.try_into().unwrap());
    }
    panic!("the restore comes to no end");
}

async fn comes_back(database: &str) {
    let (mut daemon, text, control) = with_backups(database).await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let mut ids = Vec::new();
    for number in 0..120 {
        ids.push(stored(&api, &format!("kept/{number}"), &value).await);
    }
    without_backup(&api, 0).await;
    let old_token = api.token.clone();
    daemon.stop().await;

    // The HSM is gone, and another one is in its place.
    util(daemon.dir(), &["--delete-token", "--token", "lacre-dev"]);
    add_token(daemon.dir(), "fresh");
    let text = text.replace("\"lacre-dev\"", "\"fresh\"");
    daemon.set_options(options(&control, text));
    control.set_rules("C_Encrypt * sleep:10");
    let secrets = tempfile::tempdir().unwrap();
    let (report, kills) = restored(&daemon, secrets.path());
    control.set_rules("");
    assert!(kills >= 3, "killed {kills} times only");
    assert_eq!(report["failed"], 0, "{report}");
    let (again, _) = restored(&daemon, secrets.path());
    assert_eq!(
        (&again["restored"], &again["reissued"], &again["replaced_keys"], &again["quarantined_at"]),
        (&json!(0), &json!(0), &json!(0), &report["quarantined_at"]),
        "nothing is left to do"
    );

    // What was issued before is worth nothing; every application has a new secret.
    daemon.run().await;
    let stale = daemon.api_of(&old_token).get("/v1/keks").await;
    assert_eq!(stale.status(), StatusCode::UNAUTHORIZED);
    let mut dev = daemon.dev_json();
    let client = dev["management"]["client_id"].as_str().unwrap().to_owned();
    let fresh = std::fs::read_to_string(secrets.path().join(format!("{client}.secret"))).unwrap();
    dev["management"]["client_secret"] = json!(fresh);
    std::fs::write(daemon.dir().join("dev.json"), dev.to_string()).unwrap();
    let api = daemon.api().await;
    for id in &ids {
        assert_eq!(api.value(id).await, value);
    }
    quarantine_holds_until_released(&daemon, &api).await;
    let records = api.audit_lines().await;
    for action in ["restore.begin", "key.retire", "restore.end", "app.reissue", "restore.release"] {
        assert!(records.iter().any(|line| line.contains(&format!("\"action\":\"{action}\""))), "{action}");
    }
    daemon.finish().await;
}

async fn quarantine_holds_until_released(daemon: &TestDaemon, api: &Api) {
    for path in ["/v1/keks/rotate", "/v1/keks/rewrap"] {
        let answer = api.post(path, &json!({})).await;
        assert_eq!(answer.status(), StatusCode::CONFLICT, "{path}");
        assert_eq!(answer.json::<Value>().await.unwrap()["code"], "quarantined");
    }
    assert!(daemon.failing().await.contains(&"quarantine".to_owned()));
    let metrics =
        daemon.anonymous(reqwest::Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("lacre_quarantine 1\n"));
    // Nothing scheduled: a new record waits for its second wrap.
    stored(api, "in-quarantine", &daemon.secret("new")).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    without_backup(api, 1).await;

    let released: Value = api.post("/v1/restore/release", &json!({})).await.json().await.unwrap();
    assert_eq!(released, json!({ "released": true }));
    let again: Value = api.post("/v1/restore/release", &json!({})).await.json().await.unwrap();
    assert_eq!(again, json!({ "released": false }));
    without_backup(api, 0).await;
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
}

#[tokio::test]
async fn a_restore_killed_again_and_again_brings_everything_back_on_sqlite() {
    comes_back("[database]\nurl = \"sqlite:{dir}/two.db\"").await;
}

#[tokio::test]
async fn a_restore_killed_again_and_again_brings_everything_back_on_postgresql() {
    let url = Postgres::shared().database();
    comes_back(&format!("[database]\nurl = \"{url}\"\n[vault]\njob_lease = \"1s\"")).await;
}

#[tokio::test]
async fn records_without_a_second_wrap_are_counted_and_the_rest_comes_back() {
    let (mut daemon, text, control) = with_backups("[database]\nurl = \"sqlite:{dir}/two.db\"").await;
    let api = daemon.api().await;
    let (kept, gone) = (daemon.secret("kept"), daemon.secret("gone"));
    let kept_id = stored(&api, "kept", &kept).await;
    without_backup(&api, 0).await;
    let away = token_dir(&daemon, "second");
    std::fs::rename(daemon.dir().join("tokens").join(&away), daemon.dir().join("away")).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let gone_id = stored(&api, "gone", &gone).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    without_backup(&api, 1).await;
    daemon.stop().await;
    std::fs::rename(daemon.dir().join("away"), daemon.dir().join("tokens").join(&away)).unwrap();

    util(daemon.dir(), &["--delete-token", "--token", "lacre-dev"]);
    add_token(daemon.dir(), "fresh");
    daemon.set_options(options(&control, text.replace("\"lacre-dev\"", "\"fresh\"")));
    let secrets = tempfile::tempdir().unwrap();
    let dir = secrets.path().to_str().unwrap();
    let run = daemon
        .command_of(&["restore", "run", "--lost", "default", "--secrets-dir", dir, "-o", "json"])
        .output();
    let run = run.unwrap();
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((&report["restored"], &report["failed"]), (&json!(1), &json!(1)));
    assert!(!run.status.success(), "a part that is lost is no success");

    daemon.run().await;
    let mut dev = daemon.dev_json();
    let client = dev["management"]["client_id"].as_str().unwrap().to_owned();
    let fresh = std::fs::read_to_string(secrets.path().join(format!("{client}.secret"))).unwrap();
    dev["management"]["client_secret"] = json!(fresh);
    std::fs::write(daemon.dir().join("dev.json"), dev.to_string()).unwrap();
    let api = daemon.api().await;
    assert_eq!(api.value(&kept_id).await, kept);
    let answer = api.get(&value_path(&gone_id)).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json::<Value>().await.unwrap()["code"], "key-unavailable");
    daemon.finish().await;
}

#[tokio::test]
async fn a_restore_that_names_no_loss_only_sets_the_quarantine() {
    let (mut daemon, _, _control) = with_backups("[database]\nurl = \"sqlite:{dir}/two.db\"").await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    daemon.stop().await;
    let run = daemon.command_of(&["restore", "run", "-o", "json"]).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));

    daemon.run().await;
    let api = daemon.api().await;
    assert_eq!(api.value(&id).await, value);
    assert_eq!(api.post("/v1/keks/rotate", &json!({})).await.status(), StatusCode::CONFLICT);
    let status: Value = api.get("/v1/status").await.json().await.unwrap();
    assert!(status["quarantined_at"].is_string(), "{status}");
    // A device that answers is not lost, whatever is said.
    daemon.stop().await;
    let secrets = tempfile::tempdir().unwrap();
    let dir = secrets.path().to_str().unwrap();
    let args = ["restore", "run", "--lost", "default", "--secrets-dir", dir, "-o", "json"];
    let run = daemon.command_of(&args).output().unwrap();
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((&report["replaced_keys"], &report["reissued"]), (&json!(0), &json!(0)), "{report}");
    daemon.finish().await;
}

/// A daemon with the token of `lacre dev` and a TPM, one of them in use and the other one for the backups.
async fn beside_a_tpm(tpm: &Swtpm, is_backup: bool) -> (TestDaemon, String) {
    let mut daemon = TestDaemon::dev().await;
    daemon.stop().await;
    let (of_token, of_tpm) = if is_backup { ("seal", "devices.b") } else { ("devices.b", "seal") };
    let text = format!(
        "data_dir = \"{{dir}}\"\n[server]\nlisten = \"127.0.0.1:{{port}}\"\n\
         [database]\nurl = \"sqlite:{{dir}}/two.db\"\n\
         [{of_token}.pkcs11]\nmodule = \"{{module}}\"\ntoken = \"lacre-dev\"\npin_source = \"file:{{pin}}\"\n\
         [{of_tpm}.tpm]\ntcti = \"{}\"\nauth_source = \"file:{}\"\n{BACKUP}",
        tpm.tcti(),
        tpm.auth_file.display()
    );
    daemon.set_options(Options { config: Some(text.clone()), ..Options::default() });
    daemon.initialise();
    daemon.run().await;
    (daemon, text)
}

/// Runs `lacre restore run` to its end and takes up the new client secret; what it says if it refuses.
fn restored_once(daemon: &TestDaemon, records: usize) -> Result<(), String> {
    let secrets = tempfile::tempdir().unwrap();
    let dir = secrets.path().to_str().unwrap();
    let args = ["restore", "run", "--lost", "default", "--secrets-dir", dir, "-o", "json"];
    let run = daemon.command_of(&args).output().unwrap();
    if !run.status.success() {
        return Err(String::from_utf8_lossy(&run.stderr).into_owned());
    }
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((&report["restored"], &report["failed"]), (&json!(records), &json!(0)), "{report}");
    let mut dev = daemon.dev_json();
    let client = dev["management"]["client_id"].as_str().unwrap().to_owned();
    let fresh = std::fs::read_to_string(secrets.path().join(format!("{client}.secret"))).unwrap();
    dev["management"]["client_secret"] = json!(fresh);
    std::fs::write(daemon.dir().join("dev.json"), dev.to_string()).unwrap();
    Ok(())
}

async fn all_stored(daemon: &TestDaemon, value: &str) -> Vec<String> {
    let api = daemon.api().await;
    let mut ids = Vec::new();
    for number in 0..10 {
        ids.push(stored(&api, &format!("kept/{number}"), value).await);
    }
    without_backup(&api, 0).await;
    ids
}

#[tokio::test]
async fn what_a_cleared_tpm_had_comes_back_from_a_backup_token() {
    let tpm = Swtpm::new();
    let (mut daemon, _) = beside_a_tpm(&tpm, false).await;
    let value = daemon.secret("kept");
    let ids = all_stored(&daemon, &value).await;
    daemon.stop().await;
    tpm.tool(&["tpm2_clear", "-c", "p"]);

    // Not before somebody has said that this TPM is the one to go on with.
    let refused = restored_once(&daemon, 0).unwrap_err();
    assert!(refused.contains("tpm_cleared"), "{refused}");
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-nv-index"]).trim(), "");
    let unlatched = daemon.command_of(&["hsm", "unlatch", "--force"]).output().unwrap();
    assert!(unlatched.status.success(), "{}", String::from_utf8_lossy(&unlatched.stderr));
    restored_once(&daemon, ids.len()).unwrap();

    daemon.run().await;
    let api = daemon.api().await;
    for id in &ids {
        assert_eq!(api.value(id).await, value);
    }
    quarantine_holds_until_released(&daemon, &api).await;
    daemon.finish().await;
}

#[tokio::test]
async fn what_a_token_had_comes_back_from_a_backup_tpm() {
    let tpm = Swtpm::new();
    let (mut daemon, text) = beside_a_tpm(&tpm, true).await;
    let value = daemon.secret("kept");
    let ids = all_stored(&daemon, &value).await;
    daemon.stop().await;
    util(daemon.dir(), &["--delete-token", "--token", "lacre-dev"]);
    add_token(daemon.dir(), "fresh");
    let text = text.replace("\"lacre-dev\"", "\"fresh\"");
    daemon.set_options(Options { config: Some(text), ..Options::default() });
    restored_once(&daemon, ids.len()).unwrap();

    daemon.run().await;
    let api = daemon.api().await;
    for id in &ids {
        assert_eq!(api.value(id).await, value);
    }
    quarantine_holds_until_released(&daemon, &api).await;
    daemon.finish().await;
}

#[test]
fn the_restore_drill_of_the_documentation_passes_and_prints_its_time() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(root.join("scripts/restore-drill.sh"))
        .env("LACRE", env!("CARGO_BIN_EXE_lacre"))
        .env("SECRETS", "8")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    for line in [
        "a wrong backup token is refused",
        "a wrong PIN is refused",
        "restored 8 records, 1 application(s)",
        "every value is readable again",
        "the audit log is whole",
    ] {
        assert!(said.contains(line), "{line} is not in\n{said}");
    }
    let rto = said.lines().last().unwrap();
    println!("{rto}");
    assert!(rto.starts_with("RTO ") && rto.ends_with(" s for 8 records"), "{rto}");
}
