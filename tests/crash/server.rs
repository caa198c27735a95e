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

/// The kernel goes on to acknowledge what is sent, so that nothing but a clock tells that nobody is there.
#[tokio::test]
async fn a_database_server_that_stops_without_a_word_holds_nothing_for_ever() {
    let server = Postgres::start();
    let text = config(&format!("[database]\nurl = \"{}\"\nconnections = 2", server.database()));
    let mut daemon = TestDaemon::start(Options { config: Some(text), ..Options::default() }).await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = api.create("kept", &value).await["id"].as_str().unwrap().to_owned();

    server.signal("STOP");
    let began = Instant::now();
    let path = format!("/v1/secrets/{id}");
    let asked = (0..6).map(|_| {
        let request = api.request(Method::GET, &path).timeout(Duration::from_secs(60));
        async move { request.send().await.unwrap().status() }
    });
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(|status| *status == 503), "{answers:?}");
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
    assert!(daemon.failing().await.contains(&"database".to_owned()), "readiness does not know");
    assert_eq!(daemon.anonymous(Method::GET, "/livez").send().await.unwrap().status(), 200);

    server.signal("CONT");
    let began = Instant::now();
    while !daemon.failing().await.is_empty() || api.get(&path).await.status() != 200 {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", daemon.failing().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(api.value(&id).await, value);

    server.signal("STOP");
    let began = Instant::now();
    daemon.stop().await;
    assert!(began.elapsed() < Duration::from_secs(40), "the end takes {:?}", began.elapsed());
    server.signal("CONT");
    daemon.run().await;
    daemon.finish().await;
}
