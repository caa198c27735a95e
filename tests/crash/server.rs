//! PostgreSQL goes away under the daemon and comes back.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;

use crate::daemon::{Options, TestDaemon};
use crate::model::{Model, config};
use crate::postgres::Postgres;

async fn failing(daemon: &TestDaemon) -> Vec<String> {
    let answer = daemon.anonymous(Method::GET, "/readyz").send().await.unwrap();
    let body: Value = answer.json().await.unwrap();
    let checks = body["checks"].as_array().unwrap().iter().filter(|check| check["ok"] == false);
    checks.map(|check| check["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_database_server_that_crashes_costs_refusals_and_nothing_else() {
    let mut server = Postgres::start();
    let text = config(&format!("[database]\nurl = \"{}\"", server.database()));
    let daemon = TestDaemon::start(Options { config: Some(text), ..Options::default() }).await;
    let mut model = Model::default();
    assert!(model.run(&daemon, 0).await.is_ok());
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = api.create("kept", &value).await["id"].as_str().unwrap().to_owned();

    server.crash();
    let began = Instant::now();
    let answer = api.get(&format!("/v1/secrets/{id}/value")).await;
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("Retry-After"));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(daemon.anonymous(Method::GET, "/livez").send().await.unwrap().status(), 200);
    while !failing(&daemon).await.contains(&"database".to_owned()) {
        assert!(began.elapsed() < Duration::from_secs(15), "readiness does not know");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!failing(&daemon).await.contains(&"device".to_owned()), "the device is blamed for the database");
    server.restart();

    let began = Instant::now();
    while api.get(&format!("/v1/secrets/{id}/value")).await.status() != 200 {
        assert!(began.elapsed() < Duration::from_secs(15), "the server is back and not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(api.value(&id).await, value);
    while !failing(&daemon).await.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", failing(&daemon).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    daemon.finish().await;
}
