//! The way out against a server on this host: what is fetched, and how often.

use std::net::SocketAddr;
use std::sync::Mutex;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// A server that answers every request with the first body whose path fits, and remembers the paths.
struct Server {
    at: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start(answers: impl Fn(&str, SocketAddr) -> String + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let log = seen.clone();
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                    if socket.read_buf(&mut request).await.unwrap_or(0) == 0 {
                        break;
                    }
                }
                let request = String::from_utf8_lossy(&request).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let body = answers(&path, at);
                log.lock().unwrap().push(path);
                let length = body.len();
                let head =
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                let _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
            }
        });
        Self { at, seen }
    }

    fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    fn url(&self, path: &str) -> Url {
        format!("http://{}{path}", self.at).parse().unwrap()
    }
}

fn dev() -> Upstream {
    Upstream::new(&Config { loopback_http: true, ..Config::default() }).unwrap()
}

#[tokio::test]
async fn metadata_are_fetched_once_by_many_and_kept() {
    let server = Server::start(|_, at| {
        let url = |path: &str| format!("http://{at}{path}");
        json!({
            "issuer": url("/t"), "authorization_endpoint": url("/a"), "token_endpoint": url("/t"),
            "jwks_uri": url("/jwks"),
        })
        .to_string()
    })
    .await;
    let (upstream, issuer) = (dev(), server.url("/t").to_string());

    let (one, two) = tokio::join!(upstream.discover(&issuer, &[]), upstream.discover(&issuer, &[]));
    assert!(Arc::ptr_eq(&one.unwrap(), &two.unwrap()));
    assert!(upstream.discover(&issuer, &[]).await.is_ok());

    assert_eq!(*server.seen.lock().unwrap(), ["/t/.well-known/openid-configuration"]);
}

#[tokio::test]
async fn a_failure_is_told_and_not_kept() {
    let server = Server::start(|_, _| json!({"issuer": "https://evil.example.com"}).to_string()).await;
    let (upstream, issuer) = (dev(), server.url("").to_string());

    for count in 1..=2 {
        let failure = upstream.discover(&issuer, &[]).await.unwrap_err();
        assert_eq!((failure.class, failure.reason), (Class::Config, "issuer-mismatch"));
        assert_eq!(server.requests(), count);
    }
}

#[tokio::test]
async fn keys_are_fetched_again_for_an_unknown_one_but_not_at_will() {
    let server = Server::start(|_, _| json!({"keys": []}).to_string()).await;
    let (upstream, uri) = (dev(), server.url("/jwks"));
    // {"alg":"ES256","kid":"k1"}, {} and no signature
    let forged = SecretString::from("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIn0.e30.AA");
    let now = crate::clock::Timestamp::from_micros(0);
    let expected =
        ExpectedIdToken { issuer: None, audience: "a", nonce: None, now, skew: Duration::from_secs(60) };

    for _ in 0..3 {
        let failure = upstream.verify_id_token(&forged, &uri, &expected).await.unwrap_err();
        assert_eq!((failure.class, failure.reason), (Class::Protocol, "id-token"));
    }
    assert_eq!(server.requests(), 1, "the set is younger than ten seconds");

    let kept = upstream.key_sets.get(&uri).await.unwrap();
    assert!(upstream.key_set(&uri, kept.fetched.elapsed()).await.is_ok());
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn a_set_with_a_symmetric_key_verifies_nothing() {
    let server = Server::start(|_, _| json!({"keys": [{"kty": "oct", "k": "AA"}]}).to_string()).await;
    let failure = dev().key_set(&server.url("/jwks"), FRESH).await.map(|_| ()).unwrap_err();
    assert_eq!((failure.class, failure.reason), (Class::Protocol, "jwks"));
}

/// The first answer of the DNS is allowed, the second is not: each exchange asks once, connects to what it was told
/// and no further.
#[tokio::test]
async fn a_name_that_is_rebound_is_connected_to_as_it_was_checked() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let answers = Mutex::new(["127.0.0.1:0", "127.0.0.2:0"].into_iter());
    let lookup: Lookup = Arc::new(move |_| {
        let next = answers.lock().unwrap().next();
        Box::pin(async move {
            let next = next.ok_or_else(|| std::io::Error::other("asked too often"))?;
            next.parse().map(|at| vec![at]).map_err(std::io::Error::other)
        })
    });
    // A network stands for the public one.
    let config = Config { allow: vec!["127.0.0.1".to_owned()], ports: vec![port], ..Config::default() };
    let upstream = Upstream::with_lookup(&config, lookup).unwrap();
    let url: Url = format!("https://rebound.example.com:{port}/").parse().unwrap();

    let (first, accepted) = tokio::join!(upstream.send(Request::get(&url)), async {
        // No TLS is spoken here.
        listener.accept().await.map(drop)
    });
    assert!(matches!(first.err(), Some(Failure::NotSent(_))) && accepted.is_ok());
    assert_eq!(upstream.send(Request::get(&url)).await.err(), Some(Failure::Blocked));
    assert_eq!(upstream.send(Request::get(&url)).await.err(), Some(Failure::NotSent("dns")));
}

#[tokio::test]
async fn every_way_out_asks_the_rules() {
    let upstream = Upstream::new(&Config::default()).unwrap();
    for url in
        ["http://127.0.0.1:1/", "https://10.0.0.1/", "https://user@a.example/", "https://a.example:22/"]
    {
        let url: Url = url.parse().unwrap();
        assert_eq!(upstream.send(Request::post(&url)).await.err(), Some(Failure::Blocked), "{url}");
        let failure = upstream.get_json(&url, None).await.unwrap_err();
        assert_eq!(
            (failure.class, failure.reason, failure.was_sent),
            (Class::Config, "blocked", false),
            "{url}"
        );
    }
}

#[test]
fn what_cannot_work_is_refused_at_start() {
    let start = |change: fn(&mut Config)| {
        let mut config = Config::default();
        change(&mut config);
        Upstream::new(&config).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(start(|_| ()), "");
    assert!(start(|config| config.allow.push("a b".to_owned())).contains("upstream.allow"));
    assert!(start(|config| config.ca = Some("/nowhere".into())).contains("upstream.ca"));
    assert!(start(|config| config.ca = Some("/dev/null".into())).contains("upstream.ca"));
    assert!(start(|config| config.proxy = Some("socks5://a.example".to_owned())).contains("upstream.proxy"));
    let error = start(|config| config.proxy = Some("http://u:s3cr3t@a.example".to_owned()));
    assert!(error.contains("upstream.proxy") && !error.contains("s3cr3t"));
}
