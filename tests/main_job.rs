//! The main job on real input: a token set of a real OpenID provider is stored, survives a restart,
//! is read back byte for byte and still works; its release is in the audit trail; and the token that
//! allowed all this is verified by two foreign libraries.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "main_job/idp.rs"]
mod idp;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use daemon::{Api, TestDaemon, contains, encodings};
use idp::{IdentityProvider, run};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

const REQUEST: &str = "main-job-1";

#[tokio::test]
async fn a_real_token_set_is_kept_released_on_the_record_and_still_works() {
    let provider = IdentityProvider::start();
    let tokens = provider.obtain();
    let mut daemon = TestDaemon::dev().await;

    let stored = store(&daemon.api().await, &tokens).await;
    daemon.restart().await;
    let api = daemon.api().await;
    let released = release(&api, &stored).await;

    assert!(released == tokens, "what came back is not what was stored");
    let refreshed = provider.refresh(&part(&released, "refresh_token"));
    assert_ne!(part(&refreshed, "access_token"), part(&tokens, "access_token"));
    assert!(idp::is_refused(provider.try_refresh("no-such-token")), "the provider accepts anything");
    find_release(&api.audit_lines().await, &stored);
    assert_eq!(verified_by_the_command_line(&daemon), Some(0));
    foreign_libraries_agree(&daemon, &api.token);

    daemon.stop().await;
    for name in ["refresh_token", "access_token", "id_token"] {
        nothing_on_disk(daemon.dir(), &part(&tokens, name), name);
    }
    nothing_on_disk(daemon.dir(), &api.token, "Lacre's own token");
    daemon.finish().await;
}

/// The id of the new secret.
async fn store(api: &Api, tokens: &str) -> String {
    let body = json!({ "name": "idp/ana", "kind": "json", "value": tokens, "labels": { "for": "main job" } });
    let answer = api.post("/v1/secrets", &body).await;
    let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
    assert_eq!(status, StatusCode::CREATED, "{body}");
    body["id"].as_str().unwrap().to_owned()
}

async fn release(api: &Api, id: &str) -> String {
    let request = api.request(Method::GET, &format!("/v1/secrets/{id}/value"));
    let answer = request.header("X-Request-Id", REQUEST).send().await.unwrap();
    assert_eq!(answer.headers()["X-Request-Id"], REQUEST);
    assert_eq!(answer.headers()["Cache-Control"], "no-store");
    answer.json::<Value>().await.unwrap()["value"].as_str().unwrap().to_owned()
}

fn part(tokens: &str, name: &str) -> String {
    let tokens: Value = serde_json::from_str(tokens).unwrap();
    tokens[name].as_str().unwrap_or_else(|| panic!("the provider gave no {name}")).to_owned()
}

/// An intent before the value left, and its outcome, both under the request's own id.
fn find_release(lines: &[String], secret: &str) {
    let records = lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let ours: Vec<_> = records.filter(|record| record["request_id"] == REQUEST).collect();
    let [intent, outcome] = &ours[..] else { panic!("not an intent and an outcome: {ours:?}") };
    for (record, kind) in [(intent, "intent"), (outcome, "outcome")] {
        assert_eq!(record["type"], kind);
        assert_eq!(record["action"], "secret.reveal");
        assert_eq!(record["object"], json!({ "kind": "secret", "id": secret }));
        assert_eq!(record["id"], intent["id"]);
    }
    assert_eq!(outcome["outcome"]["result"], "success");
}

fn verified_by_the_command_line(daemon: &TestDaemon) -> Option<i32> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
    command.args(["audit", "verify", "--dev-json"]).arg(daemon.dir().join("dev.json"));
    command.arg("--checkpoint").arg(daemon.dir().join("checkpoint"));
    let output = command.output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    output.status.code()
}

/// `PyJWT` and jose accept the token as it is, and nothing else.
fn foreign_libraries_agree(daemon: &TestDaemon, token: &str) {
    let claims = claims_of(token);
    let issuer = format!("{}/oidc", daemon.url);
    let audience = daemon.dev_json()["management"]["resource"].as_str().unwrap().to_owned();
    let jwks = format!("{}/oidc/jwks", daemon.url);
    let (head, signature) = token.rsplit_once('.').unwrap();
    let (header, payload) = head.split_once('.').unwrap();
    let altered = [
        ("signature", format!("{head}.{}", swap_one(signature))),
        ("payload", format!("{header}.{}.{signature}", swap_one(payload))),
        ("no signature", format!("{head}.")),
    ];
    for library in [idp::py_jwt, idp::jose] {
        let verify = |token: &str, audience: &str| {
            let arguments = ["--jwks", &jwks, "--issuer", &issuer, "--audience", audience, "--typ", "at+jwt"];
            run(&mut library(&arguments), token)
        };
        assert_eq!(printed(&verify(token, &audience)), claims);
        for (what, altered) in &altered {
            assert!(idp::is_refused(verify(altered, &audience)), "accepted with another {what}");
        }
        assert!(idp::is_refused(verify(token, "https://elsewhere.test")), "accepted for another audience");
    }
}

fn printed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn claims_of(token: &str) -> Value {
    use base64::Engine;
    let payload = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap())
        .unwrap()
}

/// One character in the middle is another one; the last may hold bits that nobody reads.
fn swap_one(text: &str) -> String {
    let middle = text.len() / 2;
    let instead = if text.as_bytes()[middle] == b'A' { "B" } else { "A" };
    format!("{}{instead}{}", &text[..middle], &text[middle + 1..])
}

fn nothing_on_disk(dir: &Path, secret: &str, what: &str) {
    let needles = encodings(secret);
    for path in files(dir) {
        let bytes = fs::read(&path).unwrap();
        let found = needles.iter().any(|needle| contains(&bytes, needle));
        assert!(!found, "{what} is in {}", path.display());
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}
