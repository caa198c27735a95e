//! Two daemons on one database: rotations in a row at both (RO-2), a revocation that both know at once (RO-4), and
//! cookies over rotations (RO-7).

use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, TestDaemon};
use crate::live::Place;
use crate::{answer, hurry, rotate};

const PATIENCE: Duration = Duration::from_secs(10);

struct Pair {
    place: Place,
    apis: Vec<Api>,
}

impl Pair {
    async fn start() -> Self {
        let place = Place::on_postgresql().await;
        let admin = place.daemon.api().await;
        hurry(&admin, 0).await;
        let quick = json!({ "skew": 1, "propagation": 2 });
        answer(&admin, Method::PATCH, "/v1/signing-keys/cookie/policy", &quick, StatusCode::OK).await;
        let apis = place.urls().iter().map(|url| admin.at(url)).collect();
        Self { place, apis }
    }

    async fn finish(self) {
        let Self { place: Place { daemon, peer, .. }, apis } = self;
        drop((peer, apis));
        daemon.finish().await;
    }

    /// A token of the management application from one of the daemons.
    async fn token(&self, at: usize) -> String {
        let dev = self.place.daemon.dev_json();
        let app = &dev["management"];
        let text = |name: &str| app[name].as_str().unwrap().to_owned();
        let url = &self.place.urls()[at];
        self.place.daemon.token_at(url, &text("client_id"), &text("client_secret"), "all").await
    }
}

async fn kids(api: &Api) -> Vec<String> {
    let document: Value = api.get("/oidc/jwks").await.json().await.unwrap();
    let keys = document["keys"].as_array().unwrap().iter();
    keys.map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

async fn ring(api: &Api, used: &str) -> Vec<Value> {
    let path = format!("/v1/signing-keys/{used}");
    answer(api, Method::GET, &path, &json!({}), StatusCode::OK).await["items"].as_array().unwrap().clone()
}

fn command_line(daemon: &TestDaemon, url: &str, args: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
    command.arg("keys").args(args).args(["--addr", url, "--dev-json"]);
    let output = command.arg(daemon.dir().join("dev.json")).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn until<F: Future<Output = bool>>(what: &str, look: impl Fn() -> F) {
    let begun = Instant::now();
    while !look().await {
        assert!(begun.elapsed() < PATIENCE, "{what} does not come to be");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn ten_rotations_in_ten_seconds_at_two_daemons_kill_no_token() {
    let pair = Pair::start().await;
    let mut tokens = vec![pair.token(0).await, pair.token(1).await];
    for number in 0..10 {
        let at = number % 2;
        let (algorithm, begun) = (["EC", "ES384"][number / 2 % 2], Instant::now());
        // At both at once, now and then; and by the command line.
        match number % 3 {
            0 => {
                let both = pair.apis.iter().map(|api| rotate(api, Some(algorithm)));
                futures_util::future::join_all(both).await;
            }
            1 => rotate(&pair.apis[at], Some(algorithm)).await,
            _ => command_line(&pair.place.daemon, &pair.place.urls()[at], &["rotate", "--alg", algorithm]),
        }
        tokens.extend([pair.token(0).await, pair.token(1).await]);
        let listed = ring(&pair.apis[at], "jwt").await;
        assert!(listed.iter().filter(|key| key["status"] == "Next").count() <= 1, "{listed:?}");
        assert_eq!(listed.iter().filter(|key| key["is_signing"] == true).count(), 1, "{listed:?}");
        tokio::time::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed())).await;
    }
    // Until the line is empty, and beyond.
    for _ in 0..8 {
        tokens.push(pair.token(0).await);
        for token in &tokens {
            for url in pair.place.urls() {
                let status = pair.place.daemon.api_of(token).at(&url).get("/v1/status").await.status();
                assert_eq!(status, StatusCode::OK, "a token is not taken any more at {url}");
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(kids(&pair.apis[0]).await, kids(&pair.apis[1]).await, "one document, in one order");
    let newest = ring(&pair.apis[0], "jwt").await;
    assert_eq!((&newest[0]["status"], &newest[0]["is_signing"]), (&json!("Current"), &json!(true)));
    pair.finish().await;
}

#[tokio::test]
async fn a_revoked_key_is_gone_from_all_daemons_within_seconds() {
    let pair = Pair::start().await;
    let old = ring(&pair.apis[0], "jwt").await[0].clone();
    let (id, kid) = (old["id"].as_str().unwrap(), old["kid"].as_str().unwrap().to_owned());
    let there = pair.place.daemon.api_of(&pair.token(1).await).at(&pair.place.urls()[1]);
    assert_eq!(there.get("/v1/status").await.status(), StatusCode::OK);

    let path = format!("/v1/signing-keys/jwt/{id}/revoke");
    let revoked = answer(&pair.apis[0], Method::POST, &path, &json!({}), StatusCode::OK).await;
    // At least: what the other daemon has signed within the last second may not be counted yet.
    assert!(revoked["dead_tokens"].as_u64().unwrap() >= 1, "{revoked}");
    assert_eq!(revoked["items"][0]["is_signing"], true);
    assert!(!kids(&pair.apis[0]).await.contains(&kid), "at once where it was revoked");
    until("the revocation at the other daemon", || async { !kids(&pair.apis[1]).await.contains(&kid) }).await;
    assert_eq!(
        there.get("/v1/status").await.status(),
        StatusCode::UNAUTHORIZED,
        "a token of the revoked key"
    );
    // Both sign with the new key, and take each other's tokens.
    for at in 0..2 {
        let token = pair.token(at).await;
        for url in pair.place.urls() {
            let status = pair.place.daemon.api_of(&token).at(&url).get("/v1/status").await.status();
            assert_eq!(status, StatusCode::OK, "{url}");
        }
    }
    // It is gone from the device too, which the log says.
    let admin = pair.place.daemon.api().await;
    until("the destruction", || async {
        let lines = admin.audit_lines().await;
        lines.iter().any(|line| line.contains("\"key.destroy\"") && line.contains(id))
    })
    .await;
    pair.finish().await;
}

#[tokio::test]
async fn cookies_outlive_rotations_and_are_signed_by_the_newest_key_that_all_know() {
    let pair = Pair::start().await;
    let admin = &pair.apis[0];
    let policy = json!({ "cookies": { "names": ["sid"], "max_age": 3600 } });
    let body = json!({ "name": "web", "scopes": ["cookies:sign"], "signing": policy });
    let made = answer(admin, Method::POST, "/v1/apps", &body, StatusCode::CREATED).await;
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    let token = pair.place.daemon.token_of(&text("client_id"), &text("client_secret"), "all").await;
    let web: Vec<_> = pair.place.urls().iter().map(|url| pair.place.daemon.api_of(&token).at(url)).collect();

    let mut cookies = Vec::new();
    for round in 0..4 {
        for (at, api) in web.iter().enumerate() {
            let cookie = json!({ "name": "sid", "value": format!("session-{round}-{at}"), "max_age": 3600 });
            let signed = answer(api, Method::POST, "/v1/cookies/sign", &cookie, StatusCode::OK).await;
            cookies.push((cookie["value"].clone(), signed["signature"].clone()));
        }
        for (value, signature) in &cookies {
            let asked = json!({ "name": "sid", "value": value, "signature": signature });
            for api in &web {
                let found = answer(api, Method::POST, "/v1/cookies/verify", &asked, StatusCode::OK).await;
                assert_eq!(found["valid"], true, "round {round}: {value}");
            }
        }
        if round < 3 {
            answer(admin, Method::POST, "/v1/signing-keys/cookie/rotate", &json!({}), StatusCode::OK).await;
            // Not with the new one while a daemon may not know it.
            let listed = ring(admin, "cookie").await;
            assert_eq!((&listed[0]["is_signing"], &listed[1]["is_signing"]), (&json!(false), &json!(true)));
            until("the takeover", || async { ring(admin, "cookie").await[0]["is_signing"] == true }).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
    // The first are good and should be signed again; the last are as they should be; others are not good.
    let verify = async |value: &Value, signature: &Value| {
        let asked = json!({ "name": "sid", "value": value, "signature": signature });
        answer(&web[0], Method::POST, "/v1/cookies/verify", &asked, StatusCode::OK).await
    };
    let (first, last) = (cookies[0].clone(), cookies[7].clone());
    assert_eq!(verify(&first.0, &first.1).await, json!({ "valid": true, "renew": true }));
    assert_eq!(verify(&last.0, &last.1).await, json!({ "valid": true, "renew": false }));
    assert_eq!(verify(&first.0, &last.1).await["valid"], false);
    pair.finish().await;
}
