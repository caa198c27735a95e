//! Who reaches the daemon, and how: TLS with client certificates, the Unix socket, limits, and what is
//! not listened on.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use reqwest::{Certificate, Client, Identity, Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::{Options, TestDaemon, signal};
use crate::stage::{config, problem};

/// A certificate authority of one test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test authority");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate and its key, PEM.
    fn issue(&self, name: &str, serial: u8) -> (String, String) {
        let mut params =
            CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(vec![serial].into());
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }
}

fn write_pair(dir: &Path, (certificate, key): &(String, String)) {
    fs::write(dir.join("tls.crt"), certificate).unwrap();
    fs::write(dir.join("tls.key"), key).unwrap();
    fs::set_permissions(dir.join("tls.key"), fs::Permissions::from_mode(0o600)).unwrap();
}

/// The serial number of the certificate that the daemon shows now.
async fn shown(daemon: &TestDaemon, authority: &Authority) -> u8 {
    let client = Client::builder().tls_info(true);
    let client =
        client.tls_certs_only([Certificate::from_pem(authority.pem().as_bytes()).unwrap()]).build().unwrap();
    let answer = client.get(format!("{}/livez", daemon.url)).send().await.unwrap();
    let info = answer.extensions().get::<reqwest::tls::TlsInfo>().unwrap();
    let (_, certificate) = x509_parser::parse_x509_certificate(info.peer_certificate().unwrap()).unwrap();
    *certificate.raw_serial().last().unwrap()
}

#[tokio::test]
async fn tls_knows_its_clients_by_certificate_and_reads_its_own_again() {
    let mut daemon = TestDaemon::dev().await;
    daemon.stop().await;
    let (authority, stranger) = (Authority::new(), Authority::new());
    write_pair(daemon.dir(), &authority.issue("server", 1));
    fs::write(daemon.dir().join("clients.crt"), authority.pem()).unwrap();
    let tls = "[server.tls]\ncert = \"{dir}/tls.crt\"\nkey = \"{dir}/tls.key\"\nclient_ca = \"{dir}/clients.crt\"\n\
               [[server.tls.client_rules]]\ncommon_name = \"reader\"\nname = \"reader\"\nscopes = [\"secrets:metadata\"]\n";
    let text = config("", tls);
    daemon.set_options(Options { config: Some(text), ..Options::default() });
    daemon.run().await;
    assert!(daemon.url.starts_with("https://"), "{}", daemon.url);

    let with = |pair: Option<(String, String)>| {
        let roots = [Certificate::from_pem(authority.pem().as_bytes()).unwrap()];
        let builder = Client::builder().tls_certs_only(roots);
        match pair {
            None => builder.build().unwrap(),
            Some((certificate, key)) => {
                let identity = Identity::from_pem(format!("{certificate}{key}").as_bytes()).unwrap();
                builder.identity(identity).build().unwrap()
            }
        }
    };
    let get = |client: Client, path: &str| client.get(format!("{}{path}", daemon.url)).send();
    let reader = with(Some(authority.issue("reader", 2)));
    assert_eq!(get(reader.clone(), "/v1/secrets").await.unwrap().status(), StatusCode::OK);
    problem(get(reader.clone(), "/v1/keks").await.unwrap(), 403, "insufficient-scope").await;
    let nobody = with(Some(authority.issue("nobody", 3)));
    problem(get(nobody.clone(), "/v1/secrets").await.unwrap(), 401, "unauthenticated").await;
    for (client, status, code) in
        [(reader, 403, "auth.forbidden"), (nobody, 401, "auth.authorization_header_missing")]
    {
        let answer = get(client, "/api/configs/oidc/session").await.unwrap();
        assert_eq!(answer.status().as_u16(), status);
        assert_eq!(answer.json::<Value>().await.unwrap()["code"], code);
    }
    problem(get(with(None), "/v1/secrets").await.unwrap(), 401, "unauthenticated").await;
    assert!(
        get(with(Some(stranger.issue("reader", 4))), "/v1/secrets").await.is_err(),
        "a foreign authority"
    );

    assert_eq!(shown(&daemon, &authority).await, 1);
    write_pair(daemon.dir(), &authority.issue("server", 9));
    signal(daemon.pid(), "HUP");
    let began = Instant::now();
    while shown(&daemon, &authority).await != 9 {
        assert!(began.elapsed() < Duration::from_secs(10), "the new certificate is not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // One that cannot be used is not taken, and the daemon goes on with what it has.
    fs::write(daemon.dir().join("tls.crt"), "nonsense").unwrap();
    signal(daemon.pid(), "HUP");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(shown(&daemon, &authority).await, 9);
    assert_eq!(daemon.stop().await, Some(0));
    fs::remove_file(daemon.dir().join("tls.key")).unwrap();
    daemon.set_options(Options::default());
    daemon.finish().await;
}

/// A request on the Unix socket, without a token.
fn ask(socket: &Path, head: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .write_all(format!("{head} HTTP/1.1\r\nHost: local\r\nConnection: close\r\n\r\n").as_bytes())
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test]
async fn the_unix_socket_knows_its_peers_by_their_user_id() {
    let uid = rustix::process::getuid().as_raw();
    let more = format!("[[server.local_users]]\nuid = {uid}\nscopes = [\"secrets:metadata\"]\n");
    let text = config("", &more)
        .replace("[server]\n", "[server]\nunix_socket = \"{dir}/s\"\nunix_socket_mode = \"0600\"\n");
    let daemon = TestDaemon::start(Options { config: Some(text), ..Options::default() }).await;
    let socket = daemon.dir().join("s");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    assert!(ask(&socket, "GET /v1/secrets").starts_with("HTTP/1.1 200"));
    let value = "GET /v1/secrets/01a21768-4101-75eb-a9af-db33cf966f25/value";
    assert!(ask(&socket, value).starts_with("HTTP/1.1 403"));
    problem(daemon.anonymous(Method::GET, "/v1/secrets").send().await.unwrap(), 401, "unauthenticated").await;
    let lines = daemon.api().await.audit_lines().await;
    assert!(lines.iter().any(|line| line.contains(&format!("\"uid:{uid}\""))), "the peer is not on record");
    daemon.finish().await;
}

#[tokio::test]
async fn a_principal_that_asks_too_much_is_told_when_to_come_back() {
    let more = "[server.rate_limit]\nper_second = 5\nburst = 20\n";
    let daemon = TestDaemon::start(Options { config: Some(config("", more)), ..Options::default() }).await;
    let (hasty, calm) = (daemon.api_with("secrets:metadata").await, daemon.anonymous(Method::GET, "/livez"));
    let mut asks = JoinSet::new();
    for _ in 0..60 {
        let request = hasty.request(Method::GET, "/v1/secrets");
        asks.spawn(async move { request.send().await.unwrap() });
    }
    let answers = asks.join_all().await;
    let (served, mut limited) =
        answers.into_iter().partition::<Vec<_>, _>(|answer| answer.status() == StatusCode::OK);
    assert!((15..50).contains(&served.len()), "{} of 60 served", served.len());
    let wait: u64 = limited[0].headers()["Retry-After"].to_str().unwrap().parse().unwrap();
    assert!((1..=10).contains(&wait), "{wait}");
    problem(limited.pop().unwrap(), 429, "rate-limited").await;
    assert_eq!(calm.send().await.unwrap().status(), StatusCode::OK);
    // Long enough for what finish() asks.
    tokio::time::sleep(Duration::from_secs(4)).await;
    daemon.finish().await;
}

#[tokio::test]
async fn what_must_not_be_served_is_refused_at_the_start() {
    let mut daemon = TestDaemon::dev().await;
    let second = daemon.command_with(&config("", "")).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("another daemon is using"), "{said}");
    daemon.api().await.create("still", &daemon.secret("still served")).await;
    daemon.stop().await;

    let cases = [
        (config("", "").replace("127.0.0.1:{port}", "0.0.0.0:{port}"), "plain HTTP"),
        (config("surprise = 1", ""), "surprise"),
        (config("", "[audit]\ndeadlin = \"1s\""), "deadlin"),
        (config("", "[vault]\nmax_value_bytes = 99999999"), "max_value_bytes"),
    ];
    for (text, reason) in cases {
        let output = daemon.command_with(&text).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(reason), "{reason}: {said}");
    }
    daemon.finish().await;
}

#[tokio::test]
async fn metrics_and_readiness_tell_what_operators_need_and_nobodys_names() {
    let daemon = TestDaemon::dev().await;
    let api = daemon.api().await;
    let id = api.create("metrics/name", &daemon.secret("metrics")).await["id"].as_str().unwrap().to_owned();
    api.value(&id).await;
    let metrics = daemon.anonymous(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    for name in [
        "lacre_http_requests_total",
        "lacre_http_request_duration_seconds",
        "lacre_ready 1",
        "lacre_hsm_up{device=\"default\"} 1",
        "lacre_guard_slots",
        "lacre_build_info",
        // Said as long as there is no anchor.
        "lacre_rollback_detection 0",
    ] {
        assert!(metrics.contains(name), "{name} is missing:\n{metrics}");
    }
    let client = daemon.dev_json()["management"]["client_id"].as_str().unwrap().to_owned();
    for secret in [id.as_str(), "metrics/name", &client, &daemon.canary] {
        assert!(!metrics.contains(secret), "{secret} is in the metrics");
    }
    let ready: Value = daemon.anonymous(Method::GET, "/readyz").send().await.unwrap().json().await.unwrap();
    let names: Vec<_> =
        ready["checks"].as_array().unwrap().iter().map(|check| check["name"].clone()).collect();
    assert_eq!(
        names,
        ["database", "migrations", "audit", "device", "keys", "serving", "clock"].map(|name| json!(name))
    );
    let answer =
        api.request(Method::GET, "/v1/status").header("X-Request-Id", "mine-1").send().await.unwrap();
    assert_eq!(answer.headers()["X-Request-Id"], "mine-1");
    let answer =
        api.request(Method::GET, "/v1/status").header("X-Request-Id", "not/mine").send().await.unwrap();
    assert_ne!(answer.headers()["X-Request-Id"], "not/mine");
    daemon.finish().await;
}
