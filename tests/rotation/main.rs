//! Keys rotate while tokens are alive, and nobody who verifies them notices (reliability.md, RO-3).
//!
//! `live`: tokens of `POST /v1/jwt`, each verified once a second by `PyJWT` and jose for as long as it lives.
//! `clock`: RO-6, with a host whose clock goes wrong.
//! `provider`: a real OpenID provider that has its tokens signed by `POST /v1/jws`, and a relying party.
//! `together`: RO-2, RO-4, RO-7, with two daemons on one database.
//! What a minute cannot show takes five in `make soak`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "../support/daemon.rs"]
mod daemon;
#[allow(dead_code, reason = "another test program uses the rest")]
#[path = "../main_job/idp.rs"]
mod idp;
#[path = "../support/postgres.rs"]
mod postgres;

mod clock;
mod live;
mod provider;
mod together;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

use daemon::{Api, TestDaemon};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// A script that works until its standard input ends, and then prints a report.
struct Script {
    child: Child,
    input: Option<ChildStdin>,
}

impl Script {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        Self { child, input }
    }

    /// Waits until it has written a line to standard error, which only who is ready does.
    fn ready(mut command: Command) -> Self {
        command.stderr(Stdio::piped());
        let mut script = Self::start(command);
        let mut errors = BufReader::new(script.child.stderr.take().unwrap());
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the script did not start");
        std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::stderr()));
        script
    }

    fn line(&mut self, text: &str) {
        writeln!(self.input.as_mut().unwrap(), "{text}").unwrap();
    }

    fn report(mut self) -> Value {
        drop(self.input.take());
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(self.child.wait().unwrap().success(), "the script failed");
        serde_json::from_str(&text).unwrap()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A JSON answer of status `wanted`.
async fn answer(api: &Api, method: Method, path: &str, body: &Value, wanted: StatusCode) -> Value {
    let answer = api.request(method, path).json(body).send().await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert_eq!(status, wanted, "{path}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// An application with a signing policy: its id and secret.
async fn app(api: &Api, signing: Value) -> (String, String) {
    let body = json!({ "name": "signer", "scopes": ["tokens:sign"], "signing": signing });
    let made = answer(api, Method::POST, "/v1/apps", &body, StatusCode::CREATED).await;
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("client_id"), text("client_secret"))
}

/// Waits that take minutes by default take seconds.
async fn hurry(api: &Api, jwks_max_age: u64) {
    let patch = json!({ "skew": 1, "propagation": 2, "jwks_max_age": jwks_max_age });
    answer(api, Method::PATCH, "/v1/signing-keys/jwt/policy", &patch, StatusCode::OK).await;
}

/// A rotation; whose key signs when is the daemon's to say.
async fn rotate(api: &Api, algorithm: Option<&str>) {
    let body = algorithm.map_or(json!({}), |name| json!({ "algorithm": name }));
    answer(api, Method::POST, "/v1/signing-keys/jwt/rotate", &body, StatusCode::OK).await;
}

/// The report of a script that must have found nothing wrong.
fn nothing_failed(name: &str, report: &Value) {
    println!("{name}: {report}");
    assert_eq!(report["failures"], json!([]), "{name}");
}

fn count(report: &Value, member: &str) -> usize {
    let value = &report[member];
    value.as_array().map_or_else(|| usize::try_from(value.as_u64().unwrap()).unwrap(), Vec::len)
}

/// The last lines of the daemon, for whoever looks at a failure.
fn is_well(daemon: &TestDaemon) {
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}
