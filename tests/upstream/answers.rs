//! Answers without measure and without sense end soon, in little memory, with a word for why (ID-8).

use std::time::{Duration, Instant};

use lacre::upstream::{Class, Config, Failure, Request, Upstream};

use crate::server::{Server, Step, answer};
use crate::{config, hasty, refresh, upstream};

const NOW: Duration = Duration::ZERO;
const JSON: &str = "content-type: application/json\r\n";

fn bytes(text: impl Into<String>) -> Step {
    Step::Bytes(text.into().into_bytes())
}

/// The failure, and how much the server got rid of.
async fn failure_by(config: &Config, script: Vec<Step>) -> (Option<Failure>, usize) {
    let server = Server::plain(script).await;
    let upstream = Upstream::new(config).unwrap();
    let began = Instant::now();
    let failure = upstream.send(Request::get(server.url("/"))).await.err();
    assert!(began.elapsed() < config.timeout + Duration::from_secs(4), "{:?}", began.elapsed());
    (failure, server.sent())
}

async fn failure(script: Vec<Step>) -> (Option<Failure>, usize) {
    failure_by(&config(), script).await
}

#[tokio::test]
async fn a_body_without_end_is_cut_off() {
    let block = vec![b'a'; 64 * 1024];
    let chunk = [b"10000\r\n", block.as_slice(), b"\r\n"].concat();
    for (name, head, piece) in [
        ("1 GiB", "HTTP/1.1 200 X\r\ncontent-length: 1073741824\r\n\r\n", &block),
        ("no length", "HTTP/1.1 200 X\r\n\r\n", &block),
        ("chunked", "HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n", &chunk),
        ("an error's", "HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n", &chunk),
    ] {
        let (failure, sent) = failure(vec![bytes(head), Step::Endless(piece.clone(), NOW)]).await;
        assert_eq!(failure, Some(Failure::BadAnswer("too-large")), "{name}");
        // What fits into the buffers of two sockets.
        assert!(sent < 32 * 1024 * 1024, "{name}: {sent} bytes were taken");
    }
    let whole = answer(200, "", vec![b'a'; 256 * 1024]);
    let server = Server::plain(vec![whole]).await;
    assert_eq!(upstream().send(Request::get(server.url("/"))).await.ok().unwrap().body.len(), 256 * 1024);
}

#[tokio::test]
async fn nothing_is_decompressed() {
    for coding in ["gzip", "br", "deflate", "identity, gzip"] {
        let header = format!("content-encoding: {coding}\r\n");
        let found = failure(vec![answer(200, &header, [0x1f, 0x8b, 8, 0])]).await;
        assert_eq!(found.0, Some(Failure::BadAnswer("content-encoding")), "{coding}");
    }
    assert_eq!(failure(vec![answer(200, "content-encoding: identity\r\n", "{}")]).await.0, None);
}

#[tokio::test]
async fn headers_without_measure_are_refused() {
    let many = "x: a\r\n".repeat(10_000);
    let long = format!("x: {}\r\n", "a".repeat(64 * 1024));
    let several = format!("x: {}\r\n", "a".repeat(400)).repeat(90);
    for (name, script) in [
        ("10 000", vec![answer(200, &many, "{}")]),
        ("64 KiB line", vec![answer(200, &long, "{}")]),
        ("36 KiB in all", vec![answer(200, &several, "{}")]),
        ("no end", vec![bytes("HTTP/1.1 200 X\r\nx: "), Step::Endless(vec![b'a'; 65_536], NOW)]),
        ("another protocol", vec![bytes("SSH-2.0-OpenSSH_9.2\r\n")]),
        ("two lengths", vec![bytes("HTTP/1.1 200 X\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}")]),
    ] {
        assert_eq!(failure(script).await.0, Some(Failure::BadAnswer("headers")), "{name}");
    }
}

#[tokio::test]
async fn a_slow_or_broken_answer_is_lost() {
    let head = "HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n";
    let slow = |pause| Step::Endless(b"a".to_vec(), Duration::from_millis(pause));
    for (name, script, reason) in [
        ("silent", vec![Step::Silence], "timeout"),
        ("slow head", vec![bytes("HTTP/1.1 200 X\r\nx: "), slow(100)], "timeout"),
        ("silent body", vec![bytes(head), Step::Silence], "timeout"),
        ("slow body", vec![bytes(head), slow(100)], "timeout"),
        ("body slower than idle", vec![bytes(head), slow(700)], "timeout"),
        ("closed", vec![], "broken"),
        ("half a head", vec![bytes("HTTP/1.1 200 X\r\nx: a")], "broken"),
        ("half a body", vec![bytes(head), bytes("{}")], "broken"),
        (
            "half a chunk",
            vec![bytes("HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nff\r\na")],
            "broken",
        ),
    ] {
        assert_eq!(failure_by(&hasty(), script).await.0, Some(Failure::Lost(reason)), "{name}");
    }
}

#[tokio::test]
async fn a_silent_body_ends_with_its_own_limit() {
    let config = Config { timeout: Duration::from_mins(1), ..hasty() };
    let script = vec![bytes("HTTP/1.1 200 X\r\ncontent-length: 9\r\n\r\n{"), Step::Silence];
    let began = Instant::now();

    assert_eq!(failure_by(&config, script).await.0, Some(Failure::Lost("timeout")));

    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_request_may_have_a_limit_of_its_own() {
    let server = Server::plain(vec![Step::Silence]).await;
    let upstream = Upstream::new(&Config { timeout: Duration::from_mins(1), ..config() }).unwrap();
    let began = Instant::now();

    let request = Request::get(server.url("/")).timeout(Duration::from_millis(1));
    assert_eq!(upstream.send(request).await.err(), Some(Failure::Lost("timeout")));

    // Connecting may take 5 seconds, and an answer has one more.
    let taken = began.elapsed();
    assert!((Duration::from_secs(6)..Duration::from_secs(20)).contains(&taken), "{taken:?}");
}

#[tokio::test]
async fn a_token_is_taken_from_strict_json_only() {
    const GOOD: &str = r#"{"access_token":"a"}"#;
    let utf16: Vec<u8> = GOOD.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let deep = format!(r#"{{"access_token":"a","x":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let short = format!("HTTP/1.1 200 X\r\ncontent-length: {}\r\n\r\n{GOOD}", GOOD.len() - 1);
    for (name, script, reason) in [
        ("html", answer(200, "content-type: text/html\r\n", "<html>Sign in</html>"), "not-json"),
        ("utf-16", answer(200, JSON, utf16), "not-json"),
        ("bom", answer(200, JSON, format!("\u{feff}{GOOD}")), "not-json"),
        ("duplicate", answer(200, JSON, r#"{"access_token":"a","access_token":"b"}"#), "not-json"),
        ("deep", answer(200, JSON, deep), "too-deep"),
        ("not utf-8", answer(200, JSON, b"{\"access_token\":\"\xff\"}"), "not-utf8"),
        ("short length", bytes(short), "not-json"),
        ("empty", answer(200, JSON, ""), "empty"),
    ] {
        let server = Server::plain(vec![script]).await;
        let failure = upstream().token(refresh(server.url("/token"))).await.err().unwrap();
        assert_eq!((failure.class, failure.reason), (Class::Protocol, reason), "{name}");
        assert!(failure.was_sent && failure.status == Some(200), "{name}");
    }
}

#[tokio::test]
async fn a_busy_provider_says_for_how_long() {
    let server = Server::plain(vec![answer(503, "retry-after: 120\r\n", "")]).await;
    let failure = upstream().token(refresh(server.url("/token"))).await.err().unwrap();
    assert_eq!((failure.class, failure.status), (Class::Transient, Some(503)));
    assert_eq!(failure.retry_after, Some(Duration::from_secs(120)));
}
