//! What the daemon's memory holds after values went through it (ME-5).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::daemon::{TestDaemon, contains, encodings};

/// Every readable page of a process that holds one of `needles`; needs ptrace rights, as root has.
fn places(pid: u32, needles: &[Vec<u8>]) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory =
        File::open(format!("/proc/{pid}/mem")).expect("tests run as root, or as the daemon's own user");
    let (mut found, mut read) = (Vec::new(), 0_u64);
    for line in maps.lines().filter(|line| line.contains(" r") && !line.ends_with("[vvar]")) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // Guard pages and memfd_secret cannot be read, which is the point of them.
        if memory.read_exact_at(&mut bytes, from).is_err() {
            continue;
        }
        read += to - from;
        if needles.iter().any(|needle| contains(&bytes, needle)) {
            found.push(line.to_owned());
        }
    }
    assert!(read > 4 << 20, "only {read} bytes of the process could be read");
    found
}

async fn pass_through(daemon: &TestDaemon, token: &str, value: &str) {
    let client = reqwest::Client::new();
    let secrets = format!("{}/v1/secrets", daemon.url);
    let body = json!({ "name": "passing", "kind": "opaque", "value": value });
    let made: Value =
        client.post(&secrets).bearer_auth(token).json(&body).send().await.unwrap().json().await.unwrap();
    let path = format!("{secrets}/{}/value", made["id"].as_str().unwrap());
    for _ in 0..200 {
        let body: Value = client.get(&path).bearer_auth(token).send().await.unwrap().json().await.unwrap();
        assert_eq!(body["value"], value);
    }
}

#[tokio::test]
async fn released_values_leave_nothing_in_the_daemons_memory() {
    let daemon = TestDaemon::dev().await;
    let token = daemon.token("all").await;
    let value = daemon.secret("passes-through");
    pass_through(&daemon, &token, &value).await;
    // The client and its connections are gone. A connection's buffers hold the last answer until they
    // are used again, or freed and wiped with it.
    tokio::time::sleep(Duration::from_secs(1)).await;

    let status: Value = daemon.api().await.get("/v1/status").await.json().await.unwrap();
    let process = &status["process"];
    assert_eq!((&process["dumpable"], &process["core_limit"]), (&json!(false), &json!(0)), "{process}");

    let pid = daemon.dev_json()["pid"].as_u64().unwrap();
    let token = "lacre".to_owned();
    assert!(
        !places(u32::try_from(pid).unwrap(), &[token.into_bytes()]).is_empty(),
        "the search finds nothing"
    );
    let found = places(u32::try_from(pid).unwrap(), &encodings(&daemon.canary));

    assert!(found.is_empty(), "the value is in {found:?}");
    daemon.finish().await;
}
