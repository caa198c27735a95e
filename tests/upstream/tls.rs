//! A server that cannot prove who it is gets no request (ID-9).

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use lacre::upstream::{Config, Failure, Request, Upstream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use url::Url;

use crate::server::{Server, answer};
use crate::{config, hasty};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, params: &CertificateParams) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        acceptor(params.signed_by(&key, &self.0).unwrap().der(), &key)
    }
}

fn acceptor(certificate: &CertificateDer<'static>, key: &KeyPair) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = builder.with_no_client_auth().with_single_cert(vec![certificate.clone()], key).unwrap();
    TlsAcceptor::from(Arc::new(config))
}

fn server_params(name: &str) -> CertificateParams {
    CertificateParams::new(vec![name.to_owned()]).unwrap()
}

/// An upstream that trusts one authority beside the host's.
fn trusting(authority: &Authority) -> (Upstream, NamedTempFile) {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(authority.0.pem().as_bytes()).unwrap();
    let config = Config { ca: Some(file.path().to_owned()), ..config() };
    (Upstream::new(&config).unwrap(), file)
}

#[tokio::test]
async fn only_a_valid_certificate_for_the_name_by_a_known_authority_gets_a_request() {
    let authority = Authority::new("ours");
    let (upstream, _file) = trusting(&authority);
    let mut expired = server_params("localhost");
    expired.not_after = date_time_ymd(2020, 1, 1);
    let mut future = server_params("localhost");
    future.not_before = date_time_ymd(4000, 1, 1);
    let own_key = KeyPair::generate().unwrap();
    let own = server_params("localhost").self_signed(&own_key).unwrap();
    for (name, tls, expected) in [
        ("good", authority.issue(&server_params("localhost")), None),
        ("expired", authority.issue(&expired), Some("tls-expired")),
        ("not yet valid", authority.issue(&future), Some("tls")),
        ("wrong name", authority.issue(&server_params("other.example")), Some("tls-name")),
        ("self-signed", acceptor(own.der(), &own_key), Some("tls-unknown-ca")),
        ("unknown", Authority::new("theirs").issue(&server_params("localhost")), Some("tls-unknown-ca")),
    ] {
        let server = Server::start(Some(tls), vec![answer(200, "", "{}")]).await;
        let url: Url = format!("https://localhost:{}/", server.at.port()).parse().unwrap();

        let failure = upstream.send(Request::get(&url)).await.err();

        assert_eq!(failure, expected.map(Failure::NotSent), "{name}");
        assert_eq!(server.requests().len(), usize::from(expected.is_none()), "{name}");
    }
}

/// What a server answers to a `ClientHello`.
#[derive(Clone)]
enum Hello {
    Bytes(Vec<u8>),
    Silence,
    Goodbye,
}

/// The failure of a request to a server that greets so, and how many bytes came after its greeting that are no alert.
async fn greeted(hello: Hello) -> (Option<Failure>, usize) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url: Url = format!("https://{}/", listener.local_addr().unwrap()).parse().unwrap();
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut seen = vec![0; 16 * 1024];
        let length = socket.read(&mut seen).await.unwrap();
        assert_eq!(seen[..length][0], 0x16, "a handshake, in TLS");
        match hello {
            Hello::Bytes(bytes) => socket.write_all(&bytes).await.unwrap(),
            Hello::Silence => {}
            Hello::Goodbye => return 0,
        }
        let length = socket.read(&mut seen).await.unwrap_or(0);
        let is_alert = length == 0 || seen[0] == 0x15;
        // Nobody tries again in another way.
        let again = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
        assert!(again.is_err(), "a second connection");
        if is_alert { 0 } else { length }
    });
    let failure = Upstream::new(&hasty()).unwrap().send(Request::get(&url)).await.err();
    (failure, server.await.unwrap())
}

/// A `ServerHello` of TLS 1.0 or 1.2 with a suite of that time.
fn server_hello(minor: u8, suite: [u8; 2]) -> Vec<u8> {
    let body = [&[3, minor][..], &[7; 32], &[0], &suite, &[0]].concat();
    let length = u8::try_from(body.len()).unwrap();
    [&[0x16, 3, 1, 0, length + 4, 2, 0, 0, length][..], &body].concat()
}

#[tokio::test]
async fn an_old_or_broken_handshake_gets_no_request_and_no_second_try() {
    for (name, hello, reason) in [
        ("TLS 1.0", Hello::Bytes(server_hello(1, [0, 0x2f])), "tls"),
        ("RC4", Hello::Bytes(server_hello(3, [0, 0x05])), "tls"),
        ("refused version", Hello::Bytes(vec![0x15, 3, 1, 0, 2, 2, 70]), "tls"),
        ("plain HTTP", Hello::Bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), "tls"),
        ("half-open", Hello::Silence, "timeout-connect"),
        ("closed", Hello::Goodbye, "connect"),
    ] {
        assert_eq!(greeted(hello).await, (Some(Failure::NotSent(reason)), 0), "{name}");
    }
}

#[tokio::test]
async fn nobody_listens() {
    let at = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let url: Url = format!("https://{at}/").parse().unwrap();
    let failure = Upstream::new(&config()).unwrap().send(Request::get(&url)).await.err();
    assert_eq!(failure, Some(Failure::NotSent("connect")));
}
