//! KEK versions under load (KL-4) and the budget of wraps (CB-8, lowered).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::Api;
use crate::stage::{Engine, Stage, on_both, problem, stored};

async fn versions(api: &Api) -> Vec<Value> {
    let list: Value = api.get("/v1/keks").await.json().await.unwrap();
    list["items"].as_array().unwrap().clone()
}

async fn under_load(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let value = daemon.secret("steady");
    let mut ids = Vec::new();
    for number in 0..60 {
        ids.push(stored(&api, &format!("steady/{number}"), &value).await);
    }
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for client in 0..8_usize {
        let (api, ids, value) = (daemon.api_of(&api.token), ids.clone(), value.clone());
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        clients.spawn(async move {
            for round in 0_usize.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                // Its own secrets are replaced, everybody's are read.
                let id = &ids[(client + 8 * (round % 7)) % ids.len()];
                if round % 3 == 0 {
                    let answer = api.replace(id, &value).await.status();
                    assert!([StatusCode::OK, StatusCode::PRECONDITION_FAILED].contains(&answer), "{answer}");
                }
                assert_eq!(api.value(&ids[(client * 5 + round) % ids.len()]).await, value);
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for target in 2..=4_u64 {
        let rotated = api.post("/v1/keks/rotate", &json!({})).await;
        assert_eq!(rotated.status(), StatusCode::CREATED);
        assert_eq!(rotated.json::<Value>().await.unwrap()["version"], target);
        let job: Value = api.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
        let ended = api.job(job["id"].as_str().unwrap()).await;
        assert_eq!((&ended["state"], &ended["failed"]), (&json!("succeeded"), &json!(0)), "{ended}");
        let records: u64 =
            versions(&api).await.iter().skip(1).map(|kek| kek["records"].as_u64().unwrap()).sum();
        assert_eq!(records, 0, "records left under an older version than {target}");
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        client.expect("no read failed");
    }
    println!("{} reads meanwhile", done.load(Ordering::Relaxed));
    assert!(done.load(Ordering::Relaxed) > 50);
    let states: Vec<_> = versions(&api).await.iter().map(|kek| kek["state"].clone()).collect();
    assert_eq!(states, [json!("active"), json!("retired"), json!("retired"), json!("retired")]);
    stage.daemon.finish().await;
}
on_both!(rotation_and_rewrap_fail_no_read, under_load);

async fn jobs_are_found_and_ended(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    stored(&api, "one", &daemon.secret("one")).await;
    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    let request = || {
        api.request(Method::POST, "/v1/keks/rewrap").header("Idempotency-Key", "r-1").json(&json!({})).send()
    };
    let first = request().await.unwrap();
    assert_eq!(first.status(), StatusCode::ACCEPTED);
    let place = first.headers()["Location"].to_str().unwrap().to_owned();
    let first: Value = first.json().await.unwrap();
    assert_eq!(place, format!("/v1/jobs/{}", first["id"].as_str().unwrap()));
    assert_eq!(request().await.unwrap().json::<Value>().await.unwrap()["id"], first["id"], "another job");
    api.job(first["id"].as_str().unwrap()).await;
    problem(api.post(&format!("{place}/cancel"), &json!({})).await, 409, "job-ended").await;
    stage.daemon.finish().await;
}
on_both!(a_job_is_repeated_found_and_not_cancelled_after_its_end, jobs_are_found_and_ended);

async fn within_the_budget(engine: Engine) {
    const BUDGET: u64 = 40;
    let mut stage = Stage::on(engine, &format!("[vault]\nwrap_budget = {BUDGET}")).await;
    let api = stage.daemon.api().await;
    let mut kept = Vec::new();
    for number in 0..90 {
        let value = stage.daemon.secret(&number.to_string());
        let id = stored(&stage.daemon.api_of(&api.token), &format!("b/{number}"), &value).await;
        kept.push((id, value));
        // What a crash takes with it is counted as used, never as free.
        if number == 30 || number == 55 {
            stage.daemon.kill();
            stage.daemon.run().await;
        }
    }
    let api = stage.daemon.api_of(&api.token);
    let keks = versions(&api).await;
    assert!(keks.len() >= 3, "90 wraps under {} versions of {BUDGET}", keks.len());
    let mut records = 0;
    for kek in &keks {
        let (wraps, used) = (kek["wraps"].as_u64().unwrap(), kek["records"].as_u64().unwrap());
        assert!(wraps <= BUDGET, "{kek}");
        assert!(used <= wraps, "more records than wraps: {kek}");
        records += used;
    }
    assert_eq!(records, 90);
    for (id, value) in kept {
        assert_eq!(api.value(&id).await, value);
    }
    stage.daemon.finish().await;
}
on_both!(a_version_ends_before_its_budget_also_over_crashes, within_the_budget);
