//! RO-6: the host's clock is set forward by a day, back by a day, stopped, and made to run a hundred times too
//! fast while keys rotate (libfaketime). No key signs before it was published for as long as it has to be, none
//! that has stopped signs again, and beyond a day nothing is signed and the reason is told.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};

use crate::daemon::{Api, Options, TestDaemon};

/// Propagation 2 s, skew 2 s, no cache: what a key has to be published for, by the policy that is set here.
const LEAD: Duration = Duration::from_secs(4);

struct Stage {
    daemon: TestDaemon,
    api: Api,
    time: tempfile::TempDir,
}

fn library() -> String {
    let found =
        ["x86_64", "aarch64"].map(|arch| format!("/usr/lib/{arch}-linux-gnu/faketime/libfaketimeMT.so.1"));
    found.into_iter().find(|path| Path::new(path).exists()).expect("libfaketime is installed (make deps)")
}

impl Stage {
    async fn start() -> Self {
        let time = tempfile::tempdir().unwrap();
        let file = time.path().join("time");
        fs::write(&file, "+0").unwrap();
        let env = [
            ("LD_PRELOAD", library()),
            ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap().to_owned()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            // The steady clock is what a daemon has left when the wall clock goes wrong.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).to_vec();
        let daemon = TestDaemon::start(Options { env, ..Options::default() }).await;
        let api = daemon.api().await;
        let quick = json!({ "skew": 2, "propagation": 2 });
        let set =
            api.request(Method::PATCH, "/v1/signing-keys/jwt/policy").json(&quick).send().await.unwrap();
        assert_eq!(set.status(), 200);
        Self { daemon, api, time }
    }

    /// As `faketime` writes it: `+1d`, `-1d`, `+0 x100`, or a date at which it stands.
    fn set_clock(&self, text: &str) {
        let fresh = self.time.path().join("fresh");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, self.time.path().join("time")).unwrap();
    }

    /// The session of an application lives an hour: a clock that jumps ends it.
    async fn renew(&mut self) {
        self.api = self.daemon.api().await;
    }

    async fn rotate(&self) -> Instant {
        let rotate = self.api.request(Method::POST, "/v1/signing-keys/jwt/rotate");
        let answer = rotate.json(&json!({})).send().await.unwrap();
        let (status, body) = (answer.status(), answer.text().await.unwrap());
        assert_eq!(status, 200, "{body}");
        Instant::now()
    }

    /// The `kid` of a token that is issued now, if one is.
    async fn signs(&self) -> Option<String> {
        let dev = self.daemon.dev_json();
        let app = &dev["management"];
        let form = [("grant_type", "client_credentials"), ("scope", "audit:read")];
        let id = app["client_id"].as_str().unwrap();
        let request = self.daemon.anonymous(Method::POST, "/oidc/token");
        let answer = request.basic_auth(id, app["client_secret"].as_str()).form(&form).send().await.unwrap();
        if !answer.status().is_success() {
            return None;
        }
        let body: Value = answer.json().await.unwrap();
        let header = body["access_token"].as_str().unwrap().split('.').next().unwrap().to_owned();
        let header: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
        Some(header["kid"].as_str().unwrap().to_owned())
    }

    async fn jwks(&self) -> Vec<String> {
        let document: Value =
            self.daemon.anonymous(Method::GET, "/oidc/jwks").send().await.unwrap().json().await.unwrap();
        let kids = document["keys"].as_array().unwrap().iter();
        kids.map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
    }

    /// Watches who signs until the new key does, or for so long; how long after the rotation that was.
    async fn watch(&self, old: &str, since: Instant, patience: Duration) -> Option<Duration> {
        while since.elapsed() < patience {
            let kid = self.signs().await.expect("something signs");
            assert!(self.jwks().await.contains(&kid), "signed with a key that is not published");
            if kid != old {
                return Some(since.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        None
    }
}

#[tokio::test]
async fn a_clock_that_jumps_makes_no_key_sign_early_and_none_sign_again() {
    let mut stage = Stage::start().await;
    // (what the clock does right after a rotation, and whether the new key may come late)
    for (number, change) in ["+1d", "-1d", "+0 x100", "freeze", "+0"].into_iter().enumerate() {
        let old = stage.signs().await.unwrap();
        let text = match change {
            "freeze" => jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string(),
            other => other.to_owned(),
        };
        let since = stage.rotate().await;
        stage.set_clock(&text);
        let taken = stage.watch(&old, since, LEAD * 6).await;
        let taken = taken.unwrap_or_else(|| panic!("{change}: the new key never signs"));
        assert!(taken >= LEAD, "{change}: it signed after {taken:?}");
        // Back to the right time: what has stopped does not sign again, and is still published.
        stage.set_clock("+0");
        for _ in 0..10 {
            assert_ne!(stage.signs().await.as_deref(), Some(old.as_str()), "{change}: it signs again");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(stage.jwks().await.contains(&old), "{change} ({number}): a key with live tokens is gone");
        stage.renew().await;
    }
    // Keys that have stopped, and what they signed lives for an hour: a clock that says tomorrow changes nothing.
    let all = stage.jwks().await;
    for change in ["+1d", "+0", "+20h", "+0"] {
        stage.set_clock(change);
        for _ in 0..15 {
            let now = stage.jwks().await;
            assert!(all.iter().all(|kid| now.contains(kid)), "{change}: a key with live tokens is gone");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    stage.renew().await;
    stage.daemon.finish().await;
}

#[tokio::test]
async fn beyond_a_day_nothing_is_signed_and_the_reason_is_told() {
    let mut stage = Stage::start().await;
    let old = stage.signs().await.unwrap();
    let since = stage.rotate().await;
    assert!(stage.watch(&old, since, LEAD * 6).await.is_some());
    let all = stage.jwks().await;
    stage.set_clock("+3d");
    for _ in 0..15 {
        assert!(stage.signs().await.is_none(), "signed although the clock went three days ahead");
        assert_eq!(stage.jwks().await, all, "a key with live tokens is gone");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let ready = stage.daemon.anonymous(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let text = ready.text().await.unwrap();
    assert!(text.contains("clock"), "{text}");
    // It heals when the clock does.
    stage.set_clock("+0");
    assert!(stage.signs().await.is_some());
    stage.renew().await;
    let lines = stage.api.audit_lines().await.join("\n");
    assert!(lines.contains("clock-suspect"), "no record says why");
    stage.daemon.finish().await;
}
