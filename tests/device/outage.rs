//! The device goes away and comes back under a daemon that serves (HS-5, HS-6, F3, F4).

use std::fs;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::{Api, TestDaemon};
use crate::served::{refused_for_now, served, stored, value_path};

/// Moves the token's directory away, or back.
fn move_token(daemon: &TestDaemon, from: &str, to: &str) {
    fs::rename(daemon.dir().join(from), daemon.dir().join(to)).unwrap();
}

/// Asks until the answer has that status; how long it took.
async fn until(api: &Api, path: &str, status: StatusCode, patience: Duration) -> Duration {
    let began = Instant::now();
    loop {
        let now = api.get(path).await.status();
        if now == status {
            return began.elapsed();
        }
        assert!(began.elapsed() < patience, "still {now} after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_token_that_went_away_and_came_back_needs_no_restart() {
    let daemon = TestDaemon::dev().await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;

    move_token(&daemon, "tokens", "away");
    until(&api, &value_path(&id), StatusCode::SERVICE_UNAVAILABLE, Duration::from_secs(5)).await;
    what_needs_the_device_is_refused_at_once(&daemon, &api, &id).await;
    // Half a minute: recovery has long been at its last step and its longest pause.
    for _ in 0..15 {
        everything_else_goes_on(&daemon, &api, &id).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    move_token(&daemon, "away", "tokens");
    until(&api, &value_path(&id), StatusCode::OK, Duration::from_secs(5)).await;

    assert_eq!(api.value(&id).await, value);
    api.create("after", &daemon.secret("after")).await;
    daemon.token("all").await;
    let patience = Instant::now();
    while !daemon.failing().await.is_empty() {
        assert!(patience.elapsed() < Duration::from_secs(10), "{:?}", daemon.failing().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    daemon.finish().await;
}

async fn what_needs_the_device_is_refused_at_once(daemon: &TestDaemon, api: &Api, id: &str) {
    let began = Instant::now();
    for _ in 0..10 {
        refused_for_now(api.get(&value_path(id)).await, "device-unavailable").await;
        let body = json!({ "name": "lost", "kind": "opaque", "value": daemon.secret("lost") });
        refused_for_now(api.post("/v1/secrets", &body).await, "device-unavailable").await;
    }
    // Not one by one into a dead device: the breaker answers.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());

    let dev = daemon.dev_json();
    let id = dev["management"]["client_id"].as_str().unwrap().to_owned();
    let secret = dev["management"]["client_secret"].as_str().unwrap().to_owned();
    let request = daemon.anonymous(Method::POST, "/oidc/token").basic_auth(id, Some(secret));
    let answer = request.form(&[("grant_type", "client_credentials")]).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key("Retry-After"));
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body, json!({ "error": "temporarily_unavailable" }));
}

async fn everything_else_goes_on(daemon: &TestDaemon, api: &Api, id: &str) {
    for path in ["/livez", "/oidc/jwks", "/metrics"] {
        let answer = daemon.anonymous(Method::GET, path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
    }
    let metadata = format!("/v1/secrets/{id}");
    for path in [metadata.as_str(), "/v1/secrets", "/v1/keks", "/v1/audit/events", "/v1/status"] {
        assert_eq!(api.get(path).await.status(), StatusCode::OK, "{path}");
    }
    assert_eq!(api.get("/v1/secrets?name=lost").await.json::<Value>().await.unwrap()["items"], json!([]));
    assert!(daemon.failing().await.contains(&"device".to_owned()));
}

#[tokio::test]
async fn sessions_that_vanish_under_load_cost_one_login() {
    let (daemon, control) = served("deadline = \"5s\"").await;
    let api = daemon.api().await;
    let value = daemon.secret("busy");
    let id = stored(&api, "busy", &value).await;
    let logins = control.count("C_Login");

    control.set_rules("C_Decrypt 20 close-all-sessions");
    let mut reads = JoinSet::new();
    for _ in 0..64 {
        let request = api.request(Method::GET, &value_path(&id));
        reads.spawn(async move { request.send().await.unwrap() });
    }
    let mut served = 0;
    while let Some(answer) = reads.join_next().await {
        let answer = answer.unwrap();
        if answer.status() == StatusCode::OK {
            assert_eq!(answer.json::<Value>().await.unwrap()["value"], value.as_str());
            served += 1;
        } else {
            refused_for_now(answer, "device-unavailable").await;
        }
    }

    assert_eq!(control.count("rules_fired"), 1, "the sessions were not closed");
    assert!(served >= 19, "{served} of 64 served");
    until(&api, &value_path(&id), StatusCode::OK, Duration::from_secs(5)).await;
    daemon.token("all").await;
    assert_eq!(control.count("C_Login"), logins + 1);
    daemon.finish().await;
}
