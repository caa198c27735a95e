//! Requests whose answer was lost, repeated; and an orderly end under load.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::{Api, TestDaemon, signal, verify_chain};
use crate::model::serve;

async fn count(api: &Api, name: &str) -> usize {
    let list: Value = api.get(&format!("/v1/secrets?name={name}")).await.json().await.unwrap();
    list["items"].as_array().unwrap().len()
}

#[tokio::test]
async fn a_request_repeated_after_a_crash_has_one_effect() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let (mut cut, mut ids) = (0, Vec::new());
    for round in 0..12_u64 {
        let (api, name) = (daemon.api().await, format!("once/{round}"));
        let body = json!({ "name": name, "kind": "opaque", "value": daemon.secret(&name) });
        let request =
            || api.request(Method::POST, "/v1/secrets").header("Idempotency-Key", &name).json(&body);
        let first = tokio::spawn(request().send());
        tokio::time::sleep(Duration::from_micros(700 * round)).await;
        daemon.kill();
        let first = first.await.unwrap().ok().filter(|answer| answer.status() == StatusCode::CREATED);
        cut += usize::from(first.is_none());

        daemon.run().await;
        let again = request().send().await.unwrap();
        assert_eq!(again.status(), StatusCode::CREATED);
        let again: Value = again.json().await.unwrap();
        if let Some(first) = first {
            assert_eq!(first.json::<Value>().await.unwrap()["id"], again["id"], "another secret");
        }
        assert_eq!(count(&api, &name).await, 1);
        assert_eq!(api.value(again["id"].as_str().unwrap()).await, daemon.secret(&name));
        ids.push(again["id"].clone());
    }
    println!("{cut} of {} answers were lost", ids.len());
    assert!(cut >= 3, "the daemon was killed too late");
    daemon.finish().await;
}

#[tokio::test]
async fn an_intent_that_a_crash_left_open_is_closed_as_unknown() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let api = daemon.api().await;
    let mut open = 0;
    for round in 0..6_u64 {
        let mut creates = JoinSet::new();
        for number in 0..16 {
            let name = format!("open/{round}/{number}");
            let body = json!({ "name": name, "kind": "opaque", "value": daemon.secret(&name) });
            creates.spawn(api_of(&daemon, &api).request(Method::POST, "/v1/secrets").json(&body).send());
        }
        tokio::time::sleep(Duration::from_millis(4 + 3 * round)).await;
        daemon.kill();
        creates.join_all().await;
        daemon.run().await;
        let lines = api_of(&daemon, &api).audit_lines().await;
        verify_chain(&lines);
        open = lines.iter().filter(|line| line.contains("\"closed_by\":\"restart\"")).count();
    }
    println!("{open} intents were closed by a restart");
    assert!(open > 0, "no intent was left open");
    let records: Vec<Value> = api_of(&daemon, &api)
        .audit_lines()
        .await
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |kind: &str| {
        let mut ids: Vec<_> = records
            .iter()
            .filter(|record| record["type"] == kind)
            .map(|record| record["id"].to_string())
            .collect();
        ids.sort();
        ids
    };
    assert_eq!(of("intent"), of("outcome"), "an intent without its one outcome");
    for record in records.iter().filter(|record| record["details"]["closed_by"] == "restart") {
        assert_eq!(record["outcome"]["result"], "unknown");
    }
    daemon.finish().await;
}

/// The token goes on to be good: the daemon keeps its address.
fn api_of(daemon: &TestDaemon, api: &Api) -> Api {
    daemon.api_of(&api.token)
}

#[tokio::test]
async fn an_orderly_end_under_load_keeps_every_answered_request() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let api = daemon.api().await;
    let mut creates = JoinSet::new();
    for number in 0..200 {
        let name = format!("load/{number}");
        let body = json!({ "name": name, "kind": "opaque", "value": daemon.secret(&name) });
        let request = api.request(Method::POST, "/v1/secrets").json(&body);
        creates.spawn(async move { (name, request.send().await.map(|answer| answer.status()).ok()) });
    }
    tokio::time::sleep(Duration::from_millis(30)).await;
    signal(daemon.pid(), "TERM");
    assert_eq!(daemon.ended(Duration::from_secs(30)).await, Some(0));

    let answers = creates.join_all().await;
    daemon.run().await;
    let api = daemon.api().await;
    let mut kept = 0;
    for (name, status) in answers {
        if status == Some(StatusCode::CREATED) {
            assert_eq!(count(&api, &name).await, 1, "{name} was acknowledged");
            kept += 1;
        }
    }
    println!("{kept} of 200 were answered before the end");
    assert!(kept > 0);
    let lines = api.audit_lines().await;
    let stops = lines.iter().filter(|line| line.contains("\"daemon.stop\"")).count();
    assert_eq!(stops, 2, "the end of lacre dev and of this one");
    daemon.finish().await;
}
