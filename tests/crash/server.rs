//! PostgreSQL goes away under the daemon and comes back.

use std::time::{Duration, Instant};

use reqwest::Method;

use crate::daemon::{Options, TestDaemon};
use crate::model::{Model, config};
use crate::postgres::Postgres;

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
    while !daemon.failing().await.contains(&"database".to_owned()) {
        assert!(began.elapsed() < Duration::from_secs(15), "readiness does not know");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!daemon.failing().await.contains(&"device".to_owned()), "the device is blamed for the database");
    server.restart();

    let began = Instant::now();
    while api.get(&format!("/v1/secrets/{id}/value")).await.status() != 200 {
        assert!(began.elapsed() < Duration::from_secs(15), "the server is back and not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(api.value(&id).await, value);
    while !daemon.failing().await.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", daemon.failing().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    daemon.finish().await;
}
