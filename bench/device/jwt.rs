//! An ES256 JWT over HTTP against the bare device: a server with one route, and `wrk` as its clients.

use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use actix_web::{App, HttpServer, web};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lacre::seal::Alg;

use super::{Bare, Stage, raw_rate, support};
use support::Flags;

const HEADER: &str = r#"{"alg":"ES256","typ":"at+jwt","kid":"bench"}"#;

/// A signed token for `sub`, with the claims that an access token has.
async fn token(sub: web::Path<String>, stage: web::Data<Stage>) -> String {
    let claims = serde_json::json!({
        "iss": "http://127.0.0.1/oidc", "sub": sub.as_str(), "aud": "https://bench.lacre.local/api",
        "client_id": sub.as_str(), "iat": 1_790_000_000, "exp": 1_790_003_600, "scope": "all",
        "jti": uuid::Uuid::now_v7().to_string(),
    });
    let mut token = URL_SAFE_NO_PAD.encode(HEADER);
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(claims.to_string(), &mut token);
    let signature = stage.device.sealer.sign(&stage.ec, Alg::Es256, token.as_bytes()).await.unwrap();
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature.as_bytes(), &mut token);
    token
}

/// Alternates between the bare device and the server, and prints both.
pub async fn run(flags: &Flags, stage: Arc<Stage>, bare: Bare) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/jwt/alice", listener.local_addr().unwrap());
    let data = web::Data::from(stage);
    let server =
        HttpServer::new(move || App::new().app_data(data.clone()).route("/jwt/{sub}", web::get().to(token)))
            .workers(1)
            .disable_signals()
            .listen(listener)
            .unwrap()
            .run();
    let handle = server.handle();
    // actix wants a runtime of its own.
    let serving = std::thread::spawn(move || actix_web::rt::System::new().block_on(server));
    let seconds = flags.number("--wrk-seconds", 5);
    let (mut raws, mut https, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..flags.number("--rounds", 3) {
        let raw = raw_rate(Duration::from_secs(flags.number("--seconds", 2)), || bare.sign());
        let Some(http) = wrk(&url, seconds) else {
            println!("\nno JWTs over HTTP: wrk is not installed");
            break;
        };
        raws.push(raw);
        https.push(http);
        ratios.push(http / raw);
    }
    handle.stop(false).await;
    serving.join().unwrap().unwrap();
    if !ratios.is_empty() {
        let [raw, http] = [raws, https].map(|values| support::rate(support::median(values)));
        let row = vec![
            "ES256 JWT".into(),
            raw,
            http,
            support::percent(support::median(ratios), 1.0),
            "90 %".into(),
        ];
        let head = ["operation", "raw C_Sign, 1 thread", "HTTP, 64 connections", "ratio", "target"];
        support::print_table("Tokens per second over HTTP (wrk shares the cores)", &head, &[row]);
    }
}

/// Requests per second, as `wrk` counts them; `None` if there is no `wrk`.
fn wrk(url: &str, seconds: u64) -> Option<f64> {
    let output = Command::new("wrk").args(["-t1", "-c64", &format!("-d{seconds}s"), url]).output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("Non-2xx"), "the server refused requests:\n{text}");
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    Some(line.unwrap_or_else(|| panic!("wrk said:\n{text}")).trim().parse().unwrap())
}
