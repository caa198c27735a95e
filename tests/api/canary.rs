//! Secrets in every place that a request has, the log at its most talkative, and nothing of them in what
//! comes out (AU-9). [`crate::daemon::TestDaemon::finish`] looks through files, log and audit records.

use std::fs;
use std::process::Command;

use aho_corasick::AhoCorasick;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, TestDaemon};
use crate::postgres::Postgres;
use crate::stage::{Engine, Stage, on_both, stored};

const TALKATIVE: &str = "[log]\nlevel = \"trace\"\n";

const LOGTO_ROTATE: &str = "/api/configs/oidc/private-keys/rotate";
const LOGTO_IMPORT: &str = "/api/configs/oidc/private-keys/import";

type Misplaced = (&'static str, RequestBuilder);

/// Bodies that must be refused and have a secret where it does not belong, or in a form that is wrong.
fn in_bodies(api: &Api, secret: &str) -> Vec<Misplaced> {
    let line_end = format!("{secret}\n");
    let bodies = [
        ("a value that is a list", "/v1/secrets", json!({ "name": "n", "value": [secret] })),
        ("an unknown member", "/v1/secrets", json!({ "name": "n", "value": "v", secret: 1 })),
        ("a name with an end", "/v1/secrets", json!({ "name": line_end, "value": "v" })),
        ("a kind", "/v1/secrets", json!({ "name": "n", "kind": secret, "value": "v" })),
        ("an encoding", "/v1/secrets", json!({ "name": "n", "value": "v", "encoding": secret })),
        ("not base64", "/v1/seal", json!({ "context": "c", "value": secret, "encoding": "base64" })),
        ("a context with an end", "/v1/seal", json!({ "context": line_end, "value": "v" })),
        ("not sealed", "/v1/open", json!({ "context": "c", "sealed": hex::encode(secret) })),
        ("a batch", "/v1/open", json!({ "items": [{ "context": "c", "sealed": secret, "x": secret }] })),
        ("a scope", "/v1/apps", json!({ "name": "n", "kind": "machine", "scopes": [secret] })),
        ("an algorithm", "/v1/signing-keys/jwt/rotate", json!({ "algorithm": secret })),
        ("a private key", "/v1/signing-keys/jwt/import", json!({ "pem": secret, "as": "current" })),
        ("a private key's end", "/v1/signing-keys/jwt/import", json!({ "pem": secret, "as": secret })),
        ("Logto's algorithm", LOGTO_ROTATE, json!({ "signingKeyAlgorithm": secret })),
        ("Logto's grace", LOGTO_ROTATE, json!({ "rotationGracePeriod": secret })),
        ("Logto's import", LOGTO_IMPORT, json!({ "pem": secret, "as": "Current" })),
        ("Logto's import as", LOGTO_IMPORT, json!({ "pem": secret, "as": secret, "lifetime": secret })),
    ];
    let texts = [
        ("cut JSON", format!("{{\"name\": \"n\", \"value\": \"{secret}")),
        ("a value twice", format!("{{\"value\":\"{secret}\",\"value\":\"{secret}\"}}")),
        ("no JSON", secret.to_owned()),
    ];
    let bodies = bodies.into_iter().map(|(what, path, body)| (what, path, body.to_string()));
    // Logto's routes ignore a member that they do not know, also one that comes twice.
    let logto = texts.clone().into_iter().filter(|(what, _)| *what != "a value twice");
    let logto = logto.map(|(what, text)| (what, LOGTO_ROTATE, text));
    let texts = texts.map(|(what, text)| (what, "/v1/secrets", text));
    let all = bodies.chain(texts).chain(logto);
    all.map(|(what, path, body)| {
        (what, api.request(Method::POST, path).header("Content-Type", "application/json").body(body))
    })
    .collect()
}

/// The same for headers.
fn in_headers(daemon: &TestDaemon, api: &Api, id: &str, secret: &str) -> Vec<Misplaced> {
    let plain = || api.request(Method::PUT, &format!("/v1/secrets/{id}/value"));
    let put = || plain().json(&json!({ "value": secret }));
    let rotate = api.request(Method::POST, "/v1/keks/rotate").json(&json!({}));
    let bearer = |token: &str| daemon.api_of(token).request(Method::GET, "/v1/secrets");
    let get = || daemon.anonymous(Method::GET, "/v1/secrets");
    vec![
        ("If-Match", put().header("If-Match", secret)),
        ("a stale If-Match", put().header("If-Match", "\"99\"")),
        ("a type", plain().header("If-Match", "*").header("Content-Type", format!("text/{secret}"))),
        ("an idempotency key", rotate.header("Idempotency-Key", secret.repeat(4))),
        ("a bearer token", bearer(secret)),
        ("a bearer token with dots", bearer(&format!("{secret}.{secret}.{secret}"))),
        ("another scheme", get().header("Authorization", format!("Token {secret}"))),
        ("a request id", get().header("X-Request-Id", format!("{secret} {secret}"))),
    ]
}

/// The same for the token endpoint.
fn in_forms(daemon: &TestDaemon, secret: &str) -> Vec<Misplaced> {
    const NOBODY: &str = "app-000000000000";
    const GRANT: (&str, &str) = ("grant_type", "client_credentials");
    let post = || daemon.anonymous(Method::POST, "/oidc/token");
    let given = ("client_secret", secret);
    vec![
        ("a client's secret", post().basic_auth(NOBODY, Some(secret)).form(&[GRANT])),
        ("a client's id", post().basic_auth(secret, Some("s")).form(&[GRANT])),
        ("a form's secret", post().form(&[("client_id", NOBODY), given, GRANT])),
        ("a form's secret twice", post().form(&[given, given])),
        ("a grant type", post().form(&[("client_id", NOBODY), given, ("grant_type", secret)])),
        ("no form", post().body(secret.to_owned())),
    ]
}

fn is_clean(what: &str, text: &[u8], finder: &AhoCorasick) {
    let shown = text.split(|byte| [b'\n', b'{'].contains(byte)).find(|part| finder.is_match(part));
    assert_eq!(shown.map(String::from_utf8_lossy), None, "{what} shows a secret");
}

async fn talkative(engine: Engine) {
    let stage = Stage::on(engine, TALKATIVE).await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    assert_eq!(api.value(&id).await, value);
    api.replace(&id, &daemon.secret("kept-too")).await.error_for_status().unwrap();
    let batch = json!({ "items": [{ "context": "c", "value": value }] });
    let sealed: Value = api.post("/v1/seal", &batch).await.json().await.unwrap();
    let batch = json!({ "items": [{ "context": "c", "sealed": sealed["items"][0]["sealed"] }] });
    api.post("/v1/open", &batch).await.error_for_status().unwrap();
    let finder = daemon.finder();

    let secret = daemon.secret("misplaced");
    let mut misplaced = in_bodies(&api, &secret);
    misplaced.extend(in_headers(daemon, &api, &id, &secret));
    misplaced.extend(in_forms(daemon, &secret));
    for (what, request) in misplaced {
        let answer = request.send().await.unwrap();
        let status = answer.status();
        assert!(status.is_client_error(), "{what}: {status}");
        let head = format!("{:?}", answer.headers());
        is_clean(what, head.as_bytes(), &finder);
        is_clean(what, &answer.bytes().await.unwrap(), &finder);
    }
    let open = ["/metrics", "/readyz", "/livez", "/oidc/jwks", "/oidc/.well-known/openid-configuration"];
    let closed = ["/v1/status", "/v1/secrets", "/v1/keks", "/v1/apps", "/v1/audit/events?limit=1000"];
    for path in open.into_iter().chain(closed) {
        let answer = api.get(path).await;
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        is_clean(path, &answer.bytes().await.unwrap(), &finder);
    }
    for file in ["cmdline", "environ"] {
        is_clean(file, &fs::read(format!("/proc/{}/{file}", daemon.pid())).unwrap(), &finder);
    }
    assert!(daemon.log().contains("\"level\":\"TRACE\""), "the log is as talkative as it can be");
    if engine == Engine::Postgres {
        not_in_the_cluster(&daemon.needles());
    }
    stage.daemon.finish().await;
}
on_both!(misplaced_secrets_show_nowhere, talkative);

/// Tables, write-ahead log and the server's own log, with `grep`: there are many megabytes of them.
fn not_in_the_cluster(needles: &[Vec<u8>]) {
    let texts: Vec<_> = needles.iter().filter_map(|needle| std::str::from_utf8(needle).ok()).collect();
    let texts: Vec<_> = texts.into_iter().filter(|text| !text.contains('\0')).collect();
    let list = tempfile::NamedTempFile::new().unwrap();
    fs::write(list.path(), texts.join("\n")).unwrap();
    let directory = Postgres::shared().directory();
    let grep = |more: &[&str]| {
        let mut grep = Command::new("grep");
        let output = grep.args(["-rlaF"]).args(more).arg(directory).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!grep(&["-e", "secret.create"]).is_empty(), "the search finds nothing");
    let found = grep(&["-f", list.path().to_str().unwrap()]);
    assert_eq!(found, "", "files of the cluster that have a secret");
}
