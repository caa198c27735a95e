//! A device that is slow, and one that does not return (HS-8).

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::daemon::Api;
use crate::served::{refused_for_now, served, stored, value_path};

/// Reads at the same time; the statuses.
async fn reads(api: &Api, id: &str, count: usize) -> Vec<StatusCode> {
    let mut running = JoinSet::new();
    for _ in 0..count {
        let request = api.request(Method::GET, &value_path(id));
        running.spawn(async move { request.send().await.unwrap().status() });
    }
    running.join_all().await
}

/// What does not need the device answers as if nothing were: most of the time within 100 ms, on a machine
/// that does other things too.
pub async fn the_rest_is_quick(api: &Api, id: &str) {
    const TIMES: usize = 15;
    let metadata = format!("/v1/secrets/{id}");
    for path in ["/livez", "/readyz", "/oidc/jwks", "/metrics", &metadata] {
        let mut took = Vec::new();
        for _ in 0..TIMES {
            let began = Instant::now();
            let answer = api.get(path).await;
            took.push(began.elapsed());
            assert_ne!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR, "{path}");
            assert!(path != metadata || answer.status() == StatusCode::OK, "{path}: {}", answer.status());
        }
        took.sort();
        assert!(took[TIMES / 2] < Duration::from_millis(100), "{path}: {took:?}");
        assert!(took[TIMES - 1] < Duration::from_secs(1), "{path}: {took:?}");
    }
}

async fn stuck_threads(api: &Api) -> u64 {
    api.get("/v1/status").await.json::<Value>().await.unwrap()["device"]["stuck_threads"].as_u64().unwrap()
}

#[tokio::test]
async fn a_slow_device_serves_what_fits_into_the_deadline_and_refuses_the_rest() {
    let (daemon, control) = served("deadline = \"2s\"").await;
    let api = daemon.api().await;
    let id = stored(&api, "slow", &daemon.secret("slow")).await;

    control.set_rules("C_Decrypt * sleep:200");
    let (statuses, ()) = tokio::join!(reads(&api, &id, 16), the_rest_is_quick(&api, &id));

    // One thread, 200 ms each, 2 s for everybody: ten at the most, less what the machine takes.
    let served = statuses.iter().filter(|status| **status == StatusCode::OK).count();
    assert!((4..=10).contains(&served), "{served} of 16 served: {statuses:?}");
    let refused = statuses.iter().filter(|status| **status == StatusCode::SERVICE_UNAVAILABLE).count();
    assert_eq!(served + refused, 16, "{statuses:?}");
    control.set_rules("");
    recovered(&api, &id).await;
    daemon.finish().await;
}

#[tokio::test]
async fn a_call_that_never_returns_is_given_up_at_the_deadline_and_healed_without_a_restart() {
    let (daemon, control) = served("deadline = \"1s\"").await;
    let api = daemon.api().await;
    let id = stored(&api, "hung", &daemon.secret("hung")).await;

    control.set_rules("C_Decrypt * hang");
    let began = Instant::now();
    let first = api.get(&value_path(&id)).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(first.status(), StatusCode::SERVICE_UNAVAILABLE);
    let (more, ()) = tokio::join!(reads(&api, &id, 32), the_rest_is_quick(&api, &id));
    assert!(more.iter().all(|status| *status == StatusCode::SERVICE_UNAVAILABLE), "{more:?}");
    refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;

    // One lane of one thread hangs: given up and replaced as often as the lane is wide, and no more.
    let (hanging, calls) = (stuck_threads(&api).await, control.count("C_Decrypt"));
    assert!((1..=3).contains(&hanging), "{hanging} threads hang");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(control.count("C_Decrypt") - calls <= 3, "the dead device is hammered");
    assert!(stuck_threads(&api).await <= 3);

    control.set_rules("");
    recovered(&api, &id).await;
    daemon.finish().await;
}

async fn recovered(api: &Api, id: &str) {
    let began = Instant::now();
    while api.get(&value_path(id)).await.status() != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(10), "the device is back and not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
