//! What is not HTTP as it should be gets one refusal and no second answer (AP-4).

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use reqwest::Method;

use crate::daemon::TestDaemon;

/// Sends bytes and reads until the daemon closes, or is silent for a while.
fn exchange(daemon: &TestDaemon, bytes: &[u8]) -> String {
    let address = daemon.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
    // A daemon that has seen enough may close while the rest is sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_request_that_two_parsers_could_read_differently_is_refused_once() {
    let daemon = TestDaemon::dev().await;
    let smuggled = "GET /livez HTTP/1.1\r\nHost: a\r\n\r\n";
    let cases = [
        (
            "both lengths",
            format!(
                "POST /v1/secrets HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"
            ),
        ),
        (
            "two lengths",
            format!(
                "POST /v1/secrets HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 35\r\n\r\n{smuggled}"
            ),
        ),
        (
            "a signed length",
            format!("POST /v1/secrets HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n{smuggled}"),
        ),
        (
            "a length with a blank",
            format!("POST /v1/secrets HTTP/1.1\r\nHost: a\r\nContent-Length: 0 0\r\n\r\n{smuggled}"),
        ),
        (
            "an unknown coding",
            format!("POST /v1/secrets HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n{smuggled}"),
        ),
        (
            "a folded header",
            format!(
                "GET /v1/secrets HTTP/1.1\r\nHost: a\r\nX: 1\r\n Transfer-Encoding: chunked\r\n\r\n{smuggled}"
            ),
        ),
        (
            "a blank before the colon",
            format!("POST /v1/secrets HTTP/1.1\r\nHost: a\r\nContent-Length : 0\r\n\r\n{smuggled}"),
        ),
        ("no HTTP", "hello\r\n\r\n".to_owned()),
        ("another protocol", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ("NUL in the path", format!("GET /v1/se\0crets HTTP/1.1\r\nHost: a\r\n\r\n{smuggled}")),
        (
            "headers without end",
            format!("GET /livez HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n{smuggled}", "x".repeat(300_000)),
        ),
    ];
    for (what, bytes) in cases {
        let answer = exchange(&daemon, bytes.as_bytes());
        let answers = answer.matches("HTTP/1.1 ").count();
        assert!(answers <= 1, "{what}: {answers} answers\n{answer}");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{what}: {answer}");
        assert!(!answer.contains("200 OK"), "{what}: {answer}");
    }
    // Two whole requests in one go are two requests.
    let answer = exchange(
        &daemon,
        format!("{smuggled}GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes(),
    );
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 2, "{answer}");
    assert_eq!(daemon.anonymous(Method::GET, "/livez").send().await.unwrap().status(), 200);
    daemon.finish().await;
}
