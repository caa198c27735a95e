//! kill -9 in the middle of a rewrap (KL-4): it goes on at the next start and converges.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::{Api, Options, TestDaemon};
use crate::model::{config, integrity};
use crate::postgres::Postgres;
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;

const SECRETS: usize = 300;
const KILLS: usize = 5;

/// Over the shim, which makes each wrap take 4 ms: long enough to be met in the middle.
fn options(control: &ShimControl, more: &str) -> Options {
    let env = control.env().map(|(name, path)| (name.to_owned(), path.to_str().unwrap().to_owned()));
    let text = config(more).replace("{module}", shim_path().to_str().unwrap());
    Options { env: env.to_vec(), config: Some(text), ..Options::default() }
}

async fn fill(daemon: &TestDaemon) {
    let api = daemon.api().await;
    let mut creates = JoinSet::new();
    for number in 0..SECRETS {
        let value = daemon.secret(&number.to_string());
        let body = json!({ "name": format!("n/{number}"), "kind": "opaque", "value": value });
        let request = api.request(Method::POST, "/v1/secrets").json(&body);
        creates.spawn(async move { request.send().await.unwrap().status() });
        if creates.len() >= 16 {
            assert_eq!(creates.join_next().await.unwrap().unwrap(), 201);
        }
    }
    assert!(creates.join_all().await.into_iter().all(|status| status == 201));
}

async fn job(api: &Api, id: &str) -> Value {
    api.get(&format!("/v1/jobs/{id}")).await.json().await.unwrap()
}

async fn rewrap_survives(mut daemon: TestDaemon, control: ShimControl) -> TestDaemon {
    fill(&daemon).await;
    let api = daemon.api().await;
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    control.set_rules("C_Encrypt * sleep:4");
    let started: Value = api.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
    let id = started["id"].as_str().unwrap().to_owned();
    assert_eq!(started["total"], SECRETS);

    let mut interrupted = 0;
    let mut before = 0;
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(150 + 70 * kill as u64)).await;
        daemon.kill();
        daemon.run().await;
        let now = job(&daemon.api().await, &id).await;
        let done = now["done"].as_u64().unwrap();
        assert!(done >= before, "went back from {before} to {done}");
        before = done;
        interrupted += usize::from(now["state"] == "running");
    }
    assert!(interrupted >= 2, "the job was hardly met in the middle: {interrupted} of {KILLS}");
    control.set_rules("");
    let ended = daemon.api().await.job(&id).await;
    assert_eq!((&ended["state"], &ended["failed"]), (&json!("succeeded"), &json!(0)), "{ended}");
    everything_is_moved(&daemon).await;
    daemon
}

async fn everything_is_moved(daemon: &TestDaemon) {
    let api = daemon.api().await;
    let keks: Value = api.get("/v1/keks").await.json().await.unwrap();
    let records: Vec<_> =
        keks["items"].as_array().unwrap().iter().map(|kek| kek["records"].clone()).collect();
    assert_eq!(records, [json!(SECRETS), json!(0)], "records by version, the newest first");
    for number in (0..SECRETS).step_by(17) {
        let list: Value = api.get(&format!("/v1/secrets?name=n/{number}")).await.json().await.unwrap();
        let id = list["items"][0]["id"].as_str().unwrap().to_owned();
        assert_eq!(api.value(&id).await, daemon.secret(&number.to_string()));
    }
}

#[tokio::test]
async fn a_rewrap_killed_again_and_again_converges_on_sqlite() {
    let control = ShimControl::new(&softhsm::module());
    let daemon = TestDaemon::start(options(&control, "")).await;
    let began = Instant::now();
    let daemon = rewrap_survives(daemon, control).await;
    // With a lease of 30 s: nobody waited for its end.
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    integrity(&daemon);
    daemon.finish().await;
}

#[tokio::test]
async fn a_rewrap_killed_again_and_again_converges_on_postgresql() {
    let control = ShimControl::new(&softhsm::module());
    let database =
        format!("[database]\nurl = \"{}\"\n[vault]\njob_lease = \"1s\"", Postgres::shared().database());
    let daemon = TestDaemon::start(options(&control, &database)).await;
    rewrap_survives(daemon, control).await.finish().await;
}
