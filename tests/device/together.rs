//! Several daemons on one PostgreSQL database and one token: keys are made once, whoever comes first,
//! and what one leaves behind another finishes.

use std::process::Stdio;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::daemon::{Options, Peer, TestDaemon};
use crate::postgres::Postgres;
use crate::scenario::every_key_is_there_once;
use crate::served::{config, over, stored};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;

/// Long enough for the other one to look for the key that is being made.
const SLOW_TO_MAKE: &str = "C_GenerateKey * sleep:400\nC_GenerateKeyPair * sleep:400";

/// Options over the shim with a database of its own; whoever issued a token, all accept it.
fn shared(control: &ShimControl, seal: &str) -> Options {
    let text = config(&shim_path(), seal).replace("127.0.0.1:0", "127.0.0.1:{port}");
    let more = format!(
        "{text}[issuer]\nurl = \"http://127.0.0.1:{{port}}\"\n[vault]\njob_lease = \"3s\"\n\
         [database]\nurl = \"{}\"\n",
        Postgres::shared().database()
    );
    Options { config: Some(more), ..over(control, "") }
}

#[tokio::test]
async fn two_installations_at_the_same_time_make_each_key_once() {
    let control = ShimControl::new(&softhsm::module());
    let mut daemon = TestDaemon::dev().await;
    daemon.stop().await;
    daemon.set_options(shared(&control, ""));
    assert!(daemon.command_of(&["db", "migrate"]).output().unwrap().status.success());

    control.set_rules(SLOW_TO_MAKE);
    let init = |name: &str| {
        let secret = daemon.dir().join(name);
        let mut command =
            daemon.command_of(&["init", "-o", "json", "--secret-out", secret.to_str().unwrap()]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let made: Vec<Value> = [init("first"), init("second")]
        .map(|child| child.wait_with_output().unwrap())
        .map(|output| {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            serde_json::from_slice(&output.stdout).unwrap()
        })
        .into();

    assert_eq!(made.iter().filter(|made| made["created"] == true).count(), 1, "{made:?}");
    every_key_is_there_once(&daemon);
    control.set_rules("");
    daemon.run().await;
}

#[tokio::test]
async fn two_daemons_rotate_together_and_serve_each_other_s_values() {
    let control = ShimControl::new(&softhsm::module());
    let options = shared(&control, "");
    let daemon = TestDaemon::start(options.clone()).await;
    let peer = Peer::start(&daemon, options.config.as_ref().unwrap());
    let here = daemon.api().await;
    let there = here.at(&peer.url);

    control.set_rules(SLOW_TO_MAKE);
    let none = json!({});
    let rotated = tokio::join!(here.post("/v1/keks/rotate", &none), there.post("/v1/keks/rotate", &none));
    for answer in [rotated.0, rotated.1] {
        assert_eq!(answer.status(), StatusCode::CREATED, "{:?}", answer.text().await);
    }
    control.set_rules("");

    every_key_is_there_once(&daemon);
    let keks: Value = here.get("/v1/keks").await.json().await.unwrap();
    let states: Vec<_> = keks["items"].as_array().unwrap().iter().map(|kek| &kek["state"]).collect();
    assert_eq!(states, ["active", "retired", "retired"], "{keks}");
    for (name, from, to) in [("here", &here, &there), ("there", &there, &here)] {
        let value = daemon.secret(name);
        let id = stored(from, name, &value).await;
        assert_eq!(to.value(&id).await, value);
    }
    drop(peer);
    daemon.finish().await;
}

/// The device goes on with a call that the daemon has given up on, and whose thread it has replaced.
#[tokio::test]
async fn a_key_whose_making_was_given_up_is_not_made_a_second_time_while_the_device_still_makes_it() {
    const MAKING: Duration = Duration::from_secs(14);
    let control = ShimControl::new(&softhsm::module());
    // Given up after 4.5 s, and the thread replaced after 9 s.
    let options = shared(&control, "deadline = \"300ms\"");
    let daemon = TestDaemon::start(options.clone()).await;
    let peer = Peer::start(&daemon, options.config.as_ref().unwrap());
    let here = daemon.api().await;
    let there = here.at(&peer.url);

    let (began, none) = (Instant::now(), json!({}));
    control.set_rules(&format!("C_GenerateKey 1 sleep:{}", MAKING.as_millis()));
    let given_up = here.post("/v1/keks/rotate", &none).await;
    assert_eq!(given_up.status(), StatusCode::SERVICE_UNAVAILABLE, "{:?}", given_up.text().await);
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    // For other calls than the one that sleeps.
    control.set_rules("");
    let rotated = tokio::join!(here.post("/v1/keks/rotate", &none), there.post("/v1/keks/rotate", &none));

    assert!(began.elapsed() > MAKING, "a key was made beside the one that was being made");
    for answer in [rotated.0, rotated.1] {
        assert_eq!(answer.status(), StatusCode::CREATED, "{:?}", answer.text().await);
    }
    every_key_is_there_once(&daemon);
    let keks: Value = there.get("/v1/keks").await.json().await.unwrap();
    assert_eq!(keks["items"].as_array().unwrap().len(), 3, "the key that was given up is in use: {keks}");
    let value = daemon.secret("after");
    assert_eq!(there.value(&stored(&here, "after", &value).await).await, value);
    drop(peer);
    daemon.finish().await;
}

#[tokio::test]
async fn the_job_of_a_daemon_that_died_is_finished_by_the_other() {
    const RECORDS: usize = 200;
    let control = ShimControl::new(&softhsm::module());
    let options = shared(&control, "");
    let mut daemon = TestDaemon::start(options.clone()).await;
    let peer = Peer::start(&daemon, options.config.as_ref().unwrap());
    let here = daemon.api().await;
    let there = here.at(&peer.url);
    let mut ids = Vec::new();
    for number in 0..RECORDS {
        ids.push(stored(&here, &format!("record-{number}"), &daemon.secret(&number.to_string())).await);
    }
    here.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();

    control.set_rules("C_Decrypt * sleep:20");
    let job: Value = here.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    daemon.kill();
    control.set_rules("");
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    let left: Value = there.get(&path).await.json().await.unwrap();
    assert_eq!(left["state"], "running", "it was killed in the middle: {left}");

    let ended = there.job(job["id"].as_str().unwrap()).await;
    assert_eq!((&ended["state"], &ended["failed"]), (&json!("succeeded"), &json!(0)), "{ended}");
    assert!(ended["done"].as_u64() >= left["done"].as_u64(), "{ended}");
    let keks: Value = there.get("/v1/keks").await.json().await.unwrap();
    assert_eq!((&keks["items"][0]["records"], &keks["items"][1]["records"]), (&json!(RECORDS), &json!(0)));
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(there.value(id).await, daemon.secret(&number.to_string()));
    }
    drop(peer);
    daemon.finish().await;
}
