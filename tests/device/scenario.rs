//! Everything the daemon does with its device, once: the scenario of the fault loops, with a client's
//! memory of what was acknowledged, and the closing assertions of reliability.md (C1 to C5).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use p256::ecdsa::signature::Verifier;
use p256::ecdsa::{Signature, VerifyingKey};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, TestDaemon, verify_chain};
use crate::lost_key::tool;
use crate::served::value_path;
use crate::shim::ShimControl;

/// The daemon's deadline for one call of the device (2 s), the audit log's, and a busy machine.
const LONGEST: Duration = Duration::from_secs(8);
/// Rotation goes through the lane that may take fifteen deadlines, when others wait in it.
const LONGEST_ROTATION: Duration = Duration::from_secs(40);
/// How long a start takes that meets no fault, on a busy machine.
const STARTING: Duration = Duration::from_secs(5);
/// C5.
const HEALED: Duration = Duration::from_secs(5);

/// A client that remembers everything it was told.
pub struct Client {
    pub daemon: TestDaemon,
    pub control: ShimControl,
    api: Api,
    jwks: Value,
    /// Acknowledged secrets and their values.
    kept: BTreeMap<String, String>,
    /// 2xx answers by the audit action that stands behind them.
    answered: BTreeMap<&'static str, u64>,
    /// Answers that were no success, by route and code.
    pub refused: BTreeMap<String, u64>,
    passes: u64,
    /// The shim's counts when the rules of the last pass were taken away.
    pub counted: BTreeMap<String, u64>,
}

impl Client {
    /// Over a daemon that is ready, with two secrets that stay.
    pub async fn new(daemon: TestDaemon, control: ShimControl) -> Self {
        let api = daemon.api().await;
        let jwks = daemon.anonymous(Method::GET, "/oidc/jwks").send().await.unwrap().json().await.unwrap();
        let (kept, answered, refused) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut this =
            Self { daemon, control, api, jwks, kept, answered, refused, passes: 0, counted: BTreeMap::new() };
        *this.answered.entry("token.issue").or_default() += 1;
        for name in ["kept-1", "kept-2"] {
            let value = this.daemon.secret(name);
            let made = this.api.create(name, &value).await;
            this.kept.insert(made["id"].as_str().unwrap().to_owned(), value);
        }
        this
    }

    /// Starts the daemon again after it ended by itself.
    pub async fn restarted(&mut self) {
        self.daemon.run().await;
        self.renew().await;
    }

    /// Takes a token of the daemon that runs now.
    async fn renew(&mut self) {
        self.api = self.daemon.api().await;
        *self.answered.entry("token.issue").or_default() += 1;
    }

    /// Makes a KEK version, or finishes one that a pass has left planned.
    pub async fn rotate(&mut self) {
        self.post("kek.rotate", "/v1/keks/rotate", &json!({})).await;
    }

    /// Ends the daemon in order and starts it again, under whatever rules the shim has: it becomes ready by
    /// itself, and everything is there.
    pub async fn start_again(&mut self, rules: &str) {
        let logins = self.control.count("C_Login");
        self.control.set_rules(rules);
        assert_eq!(self.daemon.stop().await, Some(0), "an orderly end");
        let began = Instant::now();
        self.daemon.run().await;
        assert!(began.elapsed() < HEALED + STARTING, "ready after {:?}", began.elapsed());
        self.rules_end();
        self.healthy(HEALED).await;
        self.renew().await;
        let ids: Vec<_> = self.kept.keys().cloned().collect();
        for id in ids {
            assert!(self.read(&id).await, "an acknowledged value is not readable after the start");
        }
        let logins = self.control.count("C_Login") - logins;
        assert!(logins <= 6, "{logins} logins in one start");
    }

    fn rules_end(&mut self) {
        self.counted = self.control.counts();
        self.control.set_rules("");
    }

    /// One request: its status and body, within the deadline, counted.
    async fn ask(&mut self, what: &'static str, request: RequestBuilder) -> (StatusCode, Value) {
        let began = Instant::now();
        let answer = request.send().await.unwrap();
        let (status, retry_after) = (answer.status(), answer.headers().contains_key("Retry-After"));
        let body: Value = answer.json().await.unwrap_or_default();
        let longest = if what == "kek.rotate" { LONGEST_ROTATION } else { LONGEST };
        assert!(began.elapsed() < longest, "{what} took {:?}", began.elapsed());
        if status.is_success() {
            *self.answered.entry(what).or_default() += 1;
            return (status, body);
        }
        let code = body["code"].as_str().or(body["error"].as_str()).unwrap_or_default().to_owned();
        *self.refused.entry(format!("{what} {status} {code}")).or_default() += 1;
        match status {
            StatusCode::SERVICE_UNAVAILABLE => {
                assert!(retry_after, "{what}: 503 without Retry-After");
                let known = ["device-unavailable", "temporarily_unavailable", "busy"];
                // A passing fault is no verdict on a key.
                assert!(known.contains(&code.as_str()), "{what}: 503 {code}");
            }
            // A device that refuses what it should take, or an outcome that nobody knows.
            StatusCode::INTERNAL_SERVER_ERROR => {
                assert!(["internal", "server_error"].contains(&code.as_str()), "{what}: 500 {code}");
            }
            _ => panic!("{what}: {status} {body}"),
        }
        (status, body)
    }

    async fn post(&mut self, what: &'static str, path: &str, body: &Value) -> (StatusCode, Value) {
        let request = self.api.request(Method::POST, path).json(body);
        self.ask(what, request).await
    }

    /// Reads a value that was acknowledged; whatever is released is the right one.
    async fn read(&mut self, id: &str) -> bool {
        let request = self.api.request(Method::GET, &value_path(id));
        let (status, body) = self.ask("secret.reveal", request).await;
        assert!(!status.is_success() || body["value"] == self.kept[id].as_str(), "another value");
        status.is_success()
    }

    /// The scenario once, under whatever rules the shim has; its closing assertions.
    pub async fn pass(&mut self) {
        self.passes += 1;
        let logins = self.control.count("C_Login");
        let kept: Vec<_> = self.kept.keys().cloned().collect();
        self.read(&kept[0]).await;
        let fate = self.write_one().await;
        self.external().await;
        self.token().await;
        self.public_parts().await;
        self.post("kek.rotate", "/v1/keks/rotate", &json!({})).await;
        let (status, job) = self.post("rewrap.start", "/v1/keks/rewrap", &json!({})).await;
        assert!(status.is_success(), "a rewrap is only queued: {job}");
        self.token().await;
        let job = self.api.job(job["id"].as_str().unwrap()).await;
        // C2: a record that cannot be moved now is moved later, never counted as altered.
        assert!(job["state"] == "succeeded" && job["failed"] == 0, "{job}");
        self.rules_end();
        self.closing(fate).await;
        let logins = self.control.count("C_Login") - logins;
        assert!(logins <= 6, "{logins} logins in one pass");
    }

    /// Creates, reads and replaces a secret; what of it was not acknowledged.
    async fn write_one(&mut self) -> Fate {
        let name = format!("pass-{}", self.passes);
        let values = [self.daemon.secret(&name), self.daemon.secret(&format!("{name}-replaced"))];
        let body = json!({ "name": name, "value": values[0] });
        let request = self.api.request(Method::POST, "/v1/secrets").json(&body);
        let request = request.header("Idempotency-Key", name.as_str());
        let (status, made) = self.ask("secret.create", request).await;
        if !status.is_success() {
            return Fate { name, values, id: None, replaced: None };
        }
        let id = made["id"].as_str().unwrap().to_owned();
        self.kept.insert(id.clone(), values[0].clone());
        self.read(&id).await;
        let request = self.api.request(Method::PUT, &value_path(&id)).header("If-Match", "*");
        let (status, _) = self.ask("secret.replace", request.json(&json!({ "value": values[1] }))).await;
        if status.is_success() {
            self.kept.insert(id.clone(), values[1].clone());
        }
        Fate { name, values, id: Some(id), replaced: Some(status.is_success()) }
    }

    /// Seals and opens what the client keeps itself, and takes a data key.
    async fn external(&mut self) {
        let value = self.daemon.secret("external");
        let body = json!({ "context": "c", "value": value });
        let (status, sealed) = self.post("external.seal", "/v1/seal", &body).await;
        if status.is_success() {
            let body = json!({ "context": "c", "sealed": sealed["sealed"] });
            let (status, opened) = self.post("external.open", "/v1/open", &body).await;
            let expected = base64::engine::general_purpose::STANDARD.encode(&value);
            assert!(!status.is_success() || opened["value"] == expected, "another value");
        }
        self.post("datakey.create", "/v1/datakeys", &json!({ "context": "c" })).await;
    }

    /// A token; its signature is that of the published key.
    async fn token(&mut self) {
        let dev = self.daemon.dev_json();
        let app = &dev["management"];
        let request = self
            .daemon
            .anonymous(Method::POST, "/oidc/token")
            .basic_auth(app["client_id"].as_str().unwrap(), app["client_secret"].as_str())
            .form(&[("grant_type", "client_credentials")]);
        let (status, body) = self.ask("token.issue", request).await;
        if status.is_success() {
            assert!(verifies(&self.jwks, body["access_token"].as_str().unwrap()), "a token that is false");
        }
    }

    /// What needs no device is served whatever the device does.
    async fn public_parts(&mut self) {
        for path in ["/livez", "/oidc/jwks"] {
            let answer = self.daemon.anonymous(Method::GET, path).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK, "{path}");
        }
        for path in ["/v1/secrets", "/v1/keks", "/v1/status"] {
            assert_eq!(self.api.get(path).await.status(), StatusCode::OK, "{path}");
        }
    }

    /// C5, then C1 and C2.
    async fn closing(&mut self, fate: Fate) {
        self.healthy(HEALED).await;
        if fate.id.is_none() {
            self.not_half_made(&fate).await;
        }
        let ids: Vec<_> = self.kept.keys().cloned().collect();
        for id in ids {
            if fate.replaced == Some(false) && fate.id.as_deref() == Some(id.as_str()) {
                self.old_or_new(&id, &fate).await;
            }
            assert!(self.read(&id).await, "an acknowledged value is not readable after the fault");
        }
        if let Some(id) = fate.id {
            self.delete(&id).await;
        }
    }

    /// Waits until all readiness checks pass.
    pub async fn healthy(&self, patience: Duration) {
        let began = Instant::now();
        while !self.daemon.failing().await.is_empty() {
            let failing = async {
                let answer = self.daemon.anonymous(Method::GET, "/readyz?verbose").send().await.unwrap();
                answer.text().await.unwrap()
            };
            assert!(began.elapsed() < patience, "not healthy after {patience:?}: {}", failing.await);
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// A creation that was not acknowledged has left nothing or the whole; repeated under its key, it is there once.
    async fn not_half_made(&mut self, fate: &Fate) {
        let body = json!({ "name": fate.name, "value": fate.values[0] });
        let request = self.api.request(Method::POST, "/v1/secrets").json(&body);
        let request = request.header("Idempotency-Key", fate.name.as_str());
        let (status, made) = self.ask("secret.create", request).await;
        assert!(status.is_success(), "{made}");
        let id = made["id"].as_str().unwrap().to_owned();
        self.kept.insert(id.clone(), fate.values[0].clone());
        assert!(self.read(&id).await);
        let listed: Value =
            self.api.get(&format!("/v1/secrets?name={}", fate.name)).await.json().await.unwrap();
        assert_eq!(listed["items"].as_array().unwrap().len(), 1, "{listed}");
        self.delete(&id).await;
    }

    /// A replacement that was not acknowledged has happened or has not.
    async fn old_or_new(&mut self, id: &str, fate: &Fate) {
        let request = self.api.request(Method::GET, &value_path(id));
        let (status, body) = self.ask("secret.reveal", request).await;
        assert!(status.is_success(), "{body}");
        let value = body["value"].as_str().unwrap().to_owned();
        assert!(fate.values.contains(&value), "neither the old value nor the new one");
        self.kept.insert(id.to_owned(), value);
    }

    async fn delete(&mut self, id: &str) {
        let request = self.api.request(Method::DELETE, &format!("/v1/secrets/{id}"));
        assert!(self.ask("secret.delete", request).await.0.is_success());
        self.kept.remove(id);
    }

    /// C3, and one object for each key: the log is whole and has one release for each that the client saw.
    pub async fn account(&mut self) {
        self.rotate().await;
        let keks: Value = self.api.get("/v1/keks").await.json().await.unwrap();
        let planned = keks["items"].as_array().unwrap().iter().filter(|kek| kek["state"] == "planned");
        assert_eq!(planned.count(), 0, "a version that was begun is never finished: {keks}");
        // Outcomes are queued; the record of a last token stands behind them and is waited for.
        self.token().await;
        let lines = self.api.audit_lines().await;
        verify_chain(&lines);
        let mut recorded = BTreeMap::<String, u64>::new();
        for line in &lines {
            let record: Value = serde_json::from_str(line).unwrap();
            let action = record["action"].as_str().unwrap();
            assert!(!action.starts_with("incident."), "a passing fault became an incident: {line}");
            if record["type"] == "outcome" && record["outcome"]["result"] == "success" {
                *recorded.entry(action.to_owned()).or_default() += 1;
            }
        }
        for action in ["secret.reveal", "external.open", "datakey.create"] {
            let seen = self.answered.get(action).copied().unwrap_or(0);
            assert_eq!(recorded.get(action).copied().unwrap_or(0), seen, "{action}: recorded, seen");
        }
        // The last token's outcome may still be queued.
        let (tokens, seen) = (recorded["token.issue"], self.answered["token.issue"]);
        assert!(tokens == seen || tokens + 1 == seen, "token.issue: {tokens} recorded, {seen} seen");
        every_key_is_there_once(&self.daemon);
        assert_eq!(self.control.count("bad_gcm_params"), 0);
    }

    /// The end: C3, an orderly stop, C4 over log, database and everything else, no panic.
    pub async fn finish(mut self) {
        self.account().await;
        let log = self.daemon.log();
        assert!(!log.contains("panicked"), "{log}");
        self.daemon.finish().await;
    }
}

/// What became of the secret that a pass writes.
struct Fate {
    name: String,
    values: [String; 2],
    /// `None`: its creation was not acknowledged.
    id: Option<String>,
    /// Whether its replacement was acknowledged, where it was tried.
    replaced: Option<bool>,
}

/// Whether the one key of a JWKS made this token's signature.
fn verifies(jwks: &Value, token: &str) -> bool {
    let part = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let member = |name: &str| part(jwks["keys"][0][name].as_str().unwrap());
    let point = [&[4][..], &member("x"), &member("y")].concat();
    let (input, signature) = token.rsplit_once('.').unwrap();
    let signature = Signature::from_slice(&part(signature)).unwrap();
    VerifyingKey::from_sec1_bytes(&point).unwrap().verify(input.as_bytes(), &signature).is_ok()
}

/// Every key that the token lists is there once for each of its classes.
pub fn every_key_is_there_once(daemon: &TestDaemon) {
    let listing = tool(daemon, &["--list-objects"]);
    let (mut kind, mut seen) = ("", std::collections::BTreeSet::new());
    for line in listing.lines() {
        match (line.split_once(" Object;"), line.trim().strip_prefix("ID:")) {
            (Some((object, _)), _) => kind = object,
            (None, Some(id)) => assert!(seen.insert((kind, id.trim())), "twice: {kind}{id}\n{listing}"),
            (None, None) => {}
        }
    }
    assert!(seen.len() >= 5, "{listing}");
}
