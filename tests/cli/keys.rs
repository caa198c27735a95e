//! `lacre keys`, against a stub.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::{code, lacre, ok, run, stderr, stdout, stub};

const PEM: &str = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";

/// A ring in which the newest key waits for verifiers.
fn ring(dead: Option<u64>, dry_run: bool) -> String {
    let key = |id: &str, status: &str, signs: bool| {
        json!({
            "id": id, "use": "jwt", "status": status, "algorithm": "EC", "kid": format!("kid-{id}"),
            "alg": "ES256", "origin": "generated", "device": "default", "created_at": "2026-11-24T08:00:00Z",
            "effective_at": "2026-11-24T08:00:00Z", "is_signing": signs, "signs_from": "2026-11-24T08:01:30Z",
            "signs_until": null, "published_until": null,
            "waits_for": (!signs).then_some("every verifier can know it"),
        })
    };
    let items = [key("new", "Current", false), key("old", "Previous", true)];
    let mut body = json!({ "items": items, "dry_run": dry_run });
    if let Some(dead) = dead {
        body["dead_tokens"] = json!(dead);
    }
    ok(&body.to_string())
}

/// The JSON body of a request.
fn body(request: &str) -> Value {
    serde_json::from_str(request.split("\r\n\r\n").nth(1).expect("a body")).expect("JSON")
}

#[test]
fn a_dry_run_of_a_rotation_shows_its_timeline() {
    let (addr, requests) = stub(vec![ring(None, true)]);

    let args = ["keys", "rotate", "--alg", "ES384", "--grace", "60", "--dry-run", "--addr", &addr];
    let output = run(&args);

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let request = requests.recv().expect("a request");
    assert!(request.starts_with("POST /v1/signing-keys/jwt/rotate?dry_run=true "), "{request}");
    assert_eq!(body(&request), json!({ "algorithm": "ES384", "grace": 60 }));
    let shown = stdout(&output);
    let mut lines = shown.lines().map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()));
    let title: Vec<_> = lines.next().expect("a title").collect();
    assert_eq!(title, ["KEY", "PHASE", "SIGNS FROM", "SIGNS UNTIL", "PUBLISHED UNTIL"]);
    let first: Vec<_> = lines.next().expect("a key").collect();
    assert_eq!(first, ["new", "Current, waits", "2026-11-24T08:01:30Z", "-", "-"]);
    assert!(shown.contains("Previous, signs"), "{shown}");
    let talk = stderr(&output);
    assert!(talk.contains("new signs from 2026-11-24T08:01:30Z: every verifier can know it"), "{talk}");
    assert!(talk.contains("nothing was changed"), "{talk}");
}

#[test]
fn programs_get_the_whole_answer_and_the_ids() {
    let (addr, _requests) = stub(vec![ring(Some(7), false), ring(None, false)]);

    let args = ["keys", "revoke", "old", "--yes", "-o", "json", "--addr", &addr];
    let output = run(&args);
    let answer: Value = serde_json::from_str(&stdout(&output)).expect("JSON alone on stdout");
    assert_eq!((&answer["dead_tokens"], &answer["items"][0]["status"]), (&json!(7), &json!("Current")));
    assert!(stderr(&output).contains("at least 7 live tokens died"), "{}", stderr(&output));

    assert_eq!(stdout(&run(&["keys", "cancel", "-o", "name", "--addr", &addr])), "new\nold\n");
}

#[test]
fn nothing_is_revoked_or_deleted_without_a_yes() {
    for verb in ["revoke", "delete"] {
        let output = run(&["keys", verb, "old", "--addr", "http://127.0.0.1:9"]);
        assert_eq!(code(&output), 1);
        assert!(stderr(&output).contains("--yes"), "{}", stderr(&output));
    }
    let (addr, requests) = stub(vec![ring(Some(7), true)]);
    let output = run(&["keys", "revoke", "old", "--dry-run", "--addr", &addr]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).contains("at least 7 live tokens would die"), "{}", stderr(&output));
    let request = requests.recv().expect("a request");
    assert!(request.starts_with("POST /v1/signing-keys/jwt/old/revoke?dry_run=true "), "{request}");
}

#[test]
fn cookie_keys_are_another_ring() {
    for (verb, line) in [
        ("rotate", "POST /v1/signing-keys/cookie/rotate "),
        ("revert", "POST /v1/signing-keys/cookie/revert "),
        ("list", "GET /v1/signing-keys/cookie "),
        ("policy", "GET /v1/signing-keys/cookie/policy "),
    ] {
        let (addr, requests) = stub(vec![ring(None, false)]);
        let output = run(&["keys", verb, "--use", "cookie", "--addr", &addr]);
        assert_eq!(code(&output), 0, "{verb}: {}", stderr(&output));
        let request = requests.recv().expect("a request");
        assert!(request.starts_with(line), "{request}");
    }
}

#[test]
fn a_policy_is_changed_member_by_member() {
    let (addr, requests) = stub(vec![ok(r#"{"algorithm":"ES256","rotate_every":7776000}"#)]);

    let args = ["keys", "policy", "--set", "rotate_every=90d", "--set", "algorithm=ES256", "--addr", &addr];
    let output = run(&args);

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let request = requests.recv().expect("a request");
    assert!(request.starts_with("PATCH /v1/signing-keys/jwt/policy "), "{request}");
    assert_eq!(body(&request), json!({ "rotate_every": 7_776_000, "algorithm": "ES256" }));
}

#[test]
fn the_public_keys_are_printed_as_they_are_served() {
    let document = r#"{"keys":[{"kty":"EC","use":"sig","kid":"k-1","alg":"ES256","crv":"P-256"}]}"#;
    let (addr, requests) = stub(vec![ok(document), ok(document)]);

    let output = run(&["keys", "jwks", "--addr", &addr]);
    let shown: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(shown, serde_json::from_str::<Value>(document).expect("JSON"));
    assert!(requests.recv().expect("a request").starts_with("GET /oidc/jwks "));
    assert_eq!(stdout(&run(&["keys", "jwks", "-o", "name", "--addr", &addr])), "k-1\n");
}

#[test]
fn a_private_key_comes_from_stdin_or_a_file() {
    let (addr, requests) = stub(vec![ring(None, false), ring(None, false)]);
    let mut child = lacre()
        .args(["keys", "import", "--addr", &addr])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    child.stdin.take().expect("a pipe").write_all(PEM.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let request = requests.recv().expect("a request");
    assert!(request.starts_with("POST /v1/signing-keys/jwt/import "), "{request}");
    assert_eq!(body(&request), json!({ "pem": PEM, "as": "current" }));

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("key.pem");
    fs::write(&file, PEM).expect("a file");
    let path = file.to_str().expect("text");
    assert_eq!(code(&run(&["keys", "import", "--file", path, "--as", "previous"])), 1, "without a lifetime");
    let args = ["keys", "import", "--file", path, "--as", "previous", "--lifetime", "3600", "--addr", &addr];
    assert_eq!(code(&run(&args)), 0);
    let request = requests.recv().expect("a request");
    assert_eq!(body(&request), json!({ "pem": PEM, "as": "previous", "lifetime": 3600 }));
}

#[test]
fn logtos_first_key_becomes_current_and_comes_last() {
    let (addr, requests) = stub(vec![ring(None, false), ring(None, false), ring(None, false)]);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("logto.env");
    let keys = ["AAAA", "BBBB", "CCCC"].map(|middle| PEM.replace("AAAA", middle));
    let list = keys.each_ref().map(|pem| STANDARD.encode(pem)).join(",");
    fs::write(&file, format!("DB_URL=x\nOIDC_PRIVATE_KEYS={list}\n")).expect("a file");

    let path = file.to_str().expect("text");
    assert_eq!(code(&run(&["keys", "import", "--logto-env", path, "--addr", &addr])), 1, "no lifetime");
    let args = ["keys", "import", "--logto-env", path, "--lifetime", "60", "--addr", &addr];
    let output = run(&args);

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let sent: Vec<_> = (0..3).map(|_| body(&requests.recv().expect("a request"))).collect();
    for (sent, (key, status)) in sent.iter().zip([(1, "previous"), (2, "previous"), (0, "current")]) {
        assert_eq!((sent["pem"].as_str(), sent["as"].as_str()), (Some(keys[key].trim()), Some(status)));
    }
    assert_eq!(sent[2]["lifetime"], 60, "what it signed elsewhere lives on");
}
