//! A disk that fails a call (DB-2) and one that is full (DB-4).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Options, TestDaemon};
use crate::kill::strace;
use crate::model::{Model, config, integrity, serve};

#[tokio::test]
async fn a_call_that_fails_is_refused_and_not_half_applied() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let mut model = Model::default();
    daemon.stop().await;
    let faults =
        ["pwrite64:error=ENOSPC:when=70", "pwrite64:error=EIO:when=131", "pwrite64:error=EDQUOT:when=200"];
    for (round, fault) in faults.into_iter().enumerate() {
        daemon.set_options(serve(&strace(&daemon, &format!("inject={fault}"))));
        daemon.run().await;
        let log = daemon.dir().join("strace.log");
        // A refused token ends the scenario early, which is as good; an answer that never came is not.
        let _ = model.run(&daemon, round as u64).await;
        assert_eq!(daemon.anonymous(Method::GET, "/livez").send().await.unwrap().status(), StatusCode::OK);
        assert!(fs::read_to_string(log).unwrap().contains("(INJECTED)"), "{fault} did not happen");
        daemon.kill();
        model.check_restarted(&mut daemon).await;
    }
    daemon.finish().await;
}

#[tokio::test]
async fn after_an_fsync_that_failed_nothing_is_written_until_a_restart() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let mut model = Model::default();
    daemon.stop().await;
    daemon.set_options(serve(&strace(&daemon, "inject=fsync:error=EIO:when=25")));
    daemon.run().await;
    let _ = model.run(&daemon, 1).await;

    let until = Instant::now() + Duration::from_secs(10);
    while !daemon.failing().await.contains(&"database".to_owned()) {
        assert!(Instant::now() < until, "the daemon trusts a disk that lost its pages");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // strace failed one call only: it is the daemon that does not try again.
    for _ in 0..3 {
        let request = daemon.anonymous(Method::POST, "/oidc/token").basic_auth(
            daemon.dev_json()["management"]["client_id"].as_str().unwrap(),
            daemon.dev_json()["management"]["client_secret"].as_str(),
        );
        let answer = request.form(&[("grant_type", "client_credentials")]).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
    daemon.kill();

    daemon.set_options(serve(&[]));
    daemon.run().await;
    model.check(&daemon).await;
    integrity(&daemon);
    daemon.finish().await;
}

/// A small file system on a directory; needs root or sudo, as the setup of these tests does.
struct Small(PathBuf);

impl Small {
    fn on(dir: &Path) -> Self {
        run(&["mount", "-t", "tmpfs", "-o", "size=5m,mode=0700", "tmpfs", dir.to_str().unwrap()]);
        Self(dir.to_owned())
    }

    /// Uses up what is free.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("ballast");
        let mut file = File::create(&path).unwrap();
        for size in [64 << 10, 4 << 10, 512, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn run(words: &[&str]) {
    let output = match Command::new(words[0]).args(&words[1..]).output() {
        Ok(output) if output.status.success() => return,
        _ => Command::new("sudo").arg("-n").args(words).output().unwrap(),
    };
    assert!(output.status.success(), "{words:?} (as root or with sudo): {output:?}");
}

#[tokio::test]
async fn a_full_disk_refuses_what_it_cannot_keep_and_goes_on_when_there_is_room() {
    let mut daemon = TestDaemon::prepare(Options::default());
    let small = Small::on(daemon.dir());
    daemon.run().await;
    daemon.stop().await;
    daemon.set_options(Options { config: Some(config("")), ..Options::default() });
    daemon.run().await;
    let mut model = Model::default();
    let api = daemon.api().await;
    let value = daemon.secret("before");
    let id = api.create("before", &value).await["id"].as_str().unwrap().to_owned();

    let ballast = small.fill();
    let (mut kept, mut refused) = (Vec::new(), 0);
    for number in 0..40 {
        let name = format!("full/{number}");
        let text = format!("{}{}", daemon.secret(&name), "x".repeat(30_000));
        let body = json!({ "name": name, "kind": "opaque", "value": text });
        let answer = api.post("/v1/secrets", &body).await;
        match answer.status() {
            StatusCode::CREATED => kept.push((name, text)),
            StatusCode::SERVICE_UNAVAILABLE => {
                assert!(answer.headers().contains_key("Retry-After"));
                refused += 1;
            }
            other => panic!("{other}: {}", answer.text().await.unwrap()),
        }
    }
    assert!(refused > 20, "the disk was not full: {refused} of 40 refused");
    assert_eq!(api.get(&format!("/v1/secrets/{id}")).await.status(), StatusCode::OK, "metadata");
    assert_eq!(daemon.anonymous(Method::GET, "/livez").send().await.unwrap().status(), StatusCode::OK);
    fs::remove_file(ballast).unwrap();

    let began = Instant::now();
    while api
        .post("/v1/secrets", &json!({ "name": "after", "kind": "opaque", "value": value }))
        .await
        .status()
        != StatusCode::CREATED
    {
        assert!(began.elapsed() < Duration::from_secs(15), "there is room and it is not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(api.value(&id).await, value);
    let list: Value = api.get("/v1/secrets?limit=200").await.json().await.unwrap();
    assert_eq!(list["items"].as_array().unwrap().len(), kept.len() + 2, "refused secrets are there");
    for (name, text) in kept {
        let list: Value = api.get(&format!("/v1/secrets?name={name}")).await.json().await.unwrap();
        assert_eq!(api.value(list["items"][0]["id"].as_str().unwrap()).await, text);
    }
    drop(model.run(&daemon, 9).await);
    daemon.stop().await;
    integrity(&daemon);
    daemon.finish().await;
    drop(small);
}
