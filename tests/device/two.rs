//! Daemons with two devices: keys placed on each, one of them away, and the move of KEKs and records
//! from one to the other while requests run and daemons are killed (KL-1, KL-4, KL-8).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::child::signal;
use crate::daemon::{Api, Options, TestDaemon};
use crate::postgres::Postgres;
use crate::served::{refused_for_now, stored, value_path};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;

/// `[seal]` over the shim, and `[devices.b]` over a module of its own, on a token of its own.
pub fn config(direct: &Path, more: &str) -> String {
    format!(
        "data_dir = \"{{dir}}\"\n[server]\nlisten = \"127.0.0.1:{{port}}\"\n{more}\n\
         [seal.pkcs11]\nmodule = \"{}\"\ntoken = \"lacre-dev\"\npin_source = \"file:{{pin}}\"\n\
         [devices.b.pkcs11]\nmodule = \"{}\"\ntoken = \"second\"\npin_source = \"file:{{pin}}\"\n",
        shim_path().display(),
        direct.display()
    )
}

/// A daemon that is not running yet, with a token `second` beside its own, and the module for that.
pub async fn prepared() -> (TestDaemon, PathBuf, ShimControl) {
    let mut daemon = TestDaemon::dev().await;
    daemon.stop().await;
    add_token(daemon.dir(), "second");
    let control = ShimControl::new(&softhsm::module());
    // The shim loads SoftHSM itself: a copy is another library to the loader.
    let direct = daemon.dir().canonicalize().unwrap().join("direct.so");
    std::fs::copy(softhsm::module(), &direct).unwrap();
    (daemon, direct, control)
}

/// Makes a token with the PIN of `lacre dev`.
pub fn add_token(dir: &Path, label: &str) {
    let pin = std::fs::read_to_string(dir.join("pin")).unwrap();
    let mut command = Command::new("softhsm2-util");
    command.env("SOFTHSM2_CONF", dir.join("softhsm2.conf"));
    command.args(["--init-token", "--free", "--label", label, "--pin", pin.trim(), "--so-pin", "00112233"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

pub fn options(control: &ShimControl, config: String) -> Options {
    let env = control.env().map(|(name, path)| (name.to_owned(), path.to_str().unwrap().to_owned()));
    Options { env: env.to_vec(), config: Some(config), ..Options::default() }
}

async fn keks(api: &Api) -> Vec<Value> {
    let list: Value = api.get("/v1/keks").await.json().await.unwrap();
    list["items"].as_array().unwrap().clone()
}

#[tokio::test]
async fn keys_are_made_where_they_are_placed_and_a_device_that_is_away_fails_its_users_only() {
    let (mut daemon, direct, control) = prepared().await;
    let more = "[database]\nurl = \"sqlite:{dir}/two.db\"\n[placement]\nsigning_keys = \"b\"\n";
    daemon.set_options(options(&control, config(&direct, more)));
    daemon.initialise();
    daemon.run().await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    assert_eq!(keks(&api).await[0]["device"], "default");
    let status: Value = api.get("/v1/status").await.json().await.unwrap();
    let names: Vec<_> = status["devices"].as_array().unwrap().iter().map(|d| d["name"].clone()).collect();
    assert_eq!((names, &status["device"]["name"]), (vec![json!("b"), json!("default")], &json!("default")));

    // The device of the KEK is away: values are refused, tokens are made.
    control.set_rules("C_Decrypt * return:0x30\nC_Encrypt * return:0x30\nC_OpenSession * return:0x30");
    refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        daemon.token("all").await;
    }
    refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
    let failing = daemon.failing().await;
    assert!(
        failing.contains(&"device".to_owned()) && !failing.contains(&"device/b".to_owned()),
        "{failing:?}"
    );
    let metrics = daemon.anonymous(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    for line in ["lacre_hsm_up{device=\"default\"} 0", "lacre_hsm_up{device=\"b\"} 1"] {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
    control.set_rules("");
    let began = Instant::now();
    while api.get(&value_path(&id)).await.status() != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(api.value(&id).await, value);
    daemon.finish().await;
}

/// The processes of `b` and of the default device.
async fn sealers(api: &Api) -> [u64; 2] {
    let status: Value = api.get("/v1/status").await.json().await.unwrap();
    let pid = |device: &Value| device["sealer"]["pid"].as_u64().unwrap();
    let pids: Vec<_> = status["devices"].as_array().unwrap().iter().map(pid).collect();
    pids.try_into().unwrap()
}

/// Each device has a sealer process of its own.
#[tokio::test]
async fn a_sealer_process_that_is_killed_or_stopped_leaves_the_other_devices_calls_alone() {
    let (mut daemon, direct, control) = prepared().await;
    let more = "[database]\nurl = \"sqlite:{dir}/two.db\"\n[placement]\nsigning_keys = \"b\"\n";
    daemon.set_options(options(&control, config(&direct, more)));
    daemon.initialise();
    daemon.run().await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    let served = async || {
        let began = Instant::now();
        while api.get(&value_path(&id)).await.status() != StatusCode::OK {
            // Signed on the other device meanwhile.
            daemon.token("all").await;
            assert!(began.elapsed() < Duration::from_secs(10));
        }
        assert_eq!(api.value(&id).await, value);
    };
    let [b, default] = sealers(&api).await;
    assert_ne!(b, default);

    signal(default, "KILL");
    daemon.token("all").await;
    served().await;
    let [same, other] = sealers(&api).await;
    assert!(same == b && other != default, "{b} {default}, then {same} {other}");

    signal(other, "STOP");
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        daemon.token("all").await;
    }
    refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
    signal(other, "CONT");
    served().await;
    daemon.finish().await;
}

/// Reads and writes until told to stop; every read must succeed.
fn load(
    api: &Api,
    daemon: &TestDaemon,
    ids: &[String],
    value: &str,
) -> (JoinSet<()>, Arc<AtomicBool>, Arc<AtomicU64>) {
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for client in 0..4_usize {
        let (api, ids, value) = (daemon.api_of(&api.token), ids.to_vec(), value.to_owned());
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        clients.spawn(async move {
            for round in 0_usize.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                assert_eq!(api.value(&ids[(client * 5 + round) % ids.len()]).await, value);
                if round % 5 == 0 {
                    let answer = api.replace(&ids[(client + 4 * round) % ids.len()], &value).await.status();
                    assert!([StatusCode::OK, StatusCode::PRECONDITION_FAILED].contains(&answer), "{answer}");
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    (clients, stop, done)
}

async fn moves_to_the_other_device(database: &str) {
    let (mut daemon, direct, control) = prepared().await;
    daemon.set_options(options(&control, config(&direct, database)));
    daemon.initialise();
    daemon.run().await;
    let api = daemon.api().await;
    let value = daemon.secret("moved");
    let mut ids = Vec::new();
    for number in 0..150 {
        ids.push(stored(&api, &format!("moved/{number}"), &value).await);
    }
    let refused = api.post("/v1/keks/rotate", &json!({ "device": "c" })).await;
    assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY);
    let rotated: Value = api.post("/v1/keks/rotate", &json!({ "device": "b" })).await.json().await.unwrap();
    assert_eq!(
        (&rotated["version"], &rotated["device"], &rotated["role"]),
        (&json!(2), &json!("b"), &json!("main"))
    );

    // The old device opens slowly, so that the job is met in the middle.
    control.set_rules("C_Decrypt * sleep:8");
    let job: Value = api.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
    let id = job["id"].as_str().unwrap().to_owned();
    let (mut before, mut interrupted) = (0, 0);
    for kill in 0..3 {
        tokio::time::sleep(Duration::from_millis(200 + 60 * kill)).await;
        daemon.kill();
        daemon.run().await;
        let now: Value = daemon.api().await.get(&format!("/v1/jobs/{id}")).await.json().await.unwrap();
        let done = now["done"].as_u64().unwrap();
        assert!(done >= before, "went back from {before} to {done}");
        before = done;
        interrupted += usize::from(now["state"] == "running");
    }
    assert!(interrupted >= 1, "the job was not met in the middle");
    let api = daemon.api().await;
    // The receiving device's process: what was encrypted for it opens in no other.
    let [b, _] = sealers(&api).await;
    signal(b, "KILL");
    let began = Instant::now();
    for id in &ids {
        while api.get(&value_path(id)).await.status() != StatusCode::OK {
            assert!(began.elapsed() < Duration::from_secs(15));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let (mut clients, stop, done) = load(&api, &daemon, &ids, &value);
    let ended = api.job(&id).await;
    assert_eq!((&ended["state"], &ended["failed"]), (&json!("succeeded"), &json!(0)), "{ended}");
    stop.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        client.expect("no read failed");
    }
    assert!(done.load(Ordering::Relaxed) > 0);
    let records: Vec<_> = keks(&api).await.iter().map(|kek| kek["records"].as_u64().unwrap()).collect();
    assert_eq!(records[1], 0, "left on the old device: {records:?}");

    // Nothing needs the old device's KEK any more: its AES may fail for good.
    control.set_rules("C_Decrypt * return:0x30\nC_Encrypt * return:0x30");
    for id in ids.iter().step_by(10) {
        assert_eq!(api.value(id).await, value);
    }
    control.set_rules("");
    let incidents = api.audit_lines().await.iter().filter(|line| line.contains("\"incident.")).count();
    assert_eq!(incidents, 0, "no kill speaks against a record or a key");
    daemon.finish().await;
}

#[tokio::test]
async fn records_move_to_the_other_device_under_load_and_kills_on_sqlite() {
    moves_to_the_other_device("[database]\nurl = \"sqlite:{dir}/two.db\"").await;
}

#[tokio::test]
async fn records_move_to_the_other_device_under_load_and_kills_on_postgresql() {
    let url = Postgres::shared().database();
    moves_to_the_other_device(&format!("[database]\nurl = \"{url}\"\n[vault]\njob_lease = \"1s\"")).await;
}

#[tokio::test]
async fn the_command_line_knows_every_device() {
    let (mut daemon, direct, control) = prepared().await;
    daemon.set_options(options(&control, config(&direct, "")));
    let doctor = daemon.command_of(&["doctor", "-o", "json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let found = |start: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().any(|c| {
            c["check"] == "token" && c["level"] == "ok" && c["found"].as_str().unwrap().starts_with(start)
        })
    };
    assert!(found("lacre-dev (") && found("b: second ("), "{report}");
    assert!(report["capabilities_by_device"]["b"].is_object() && report["capabilities"].is_object());

    let unlatched = daemon.command_of(&["hsm", "unlatch", "--device", "b", "-o", "json"]).output().unwrap();
    let serial: Value = serde_json::from_slice(&unlatched.stdout).unwrap();
    assert!(serial["unlatched"].is_string(), "{}", String::from_utf8_lossy(&unlatched.stderr));
    let unknown = daemon.command_of(&["hsm", "unlatch", "--device", "c"]).output().unwrap();
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("`c`"));
}
