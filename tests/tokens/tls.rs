//! ID-9: a provider whose name nobody vouches for is not spoken to, and there is no way around it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::idp::Mode;
use crate::stage::{Stage, refused};

/// How a server takes the connections that it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// With a certificate of its own making.
    SelfSigned,
    /// It reads, and says nothing.
    Silent,
    /// It answers in plain HTTP.
    Plain,
}

fn acceptor() -> TlsAcceptor {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let config = ServerConfig::builder().with_no_client_auth();
    TlsAcceptor::from(Arc::new(config.with_single_cert(vec![made.cert.der().clone()], key).unwrap()))
}

/// Takes one connection; whatever was said to it in confidence.
async fn serve(mut stream: TcpStream, manner: Manner) -> Vec<u8> {
    let mut heard = Vec::new();
    match manner {
        Manner::SelfSigned => {
            if let Ok(mut stream) = acceptor().accept(stream).await {
                let _ = stream.read_buf(&mut heard).await;
            }
        }
        Manner::Silent => {
            let _ = stream.read_to_end(&mut heard).await;
        }
        Manner::Plain => {
            let _ = stream.read_buf(&mut heard).await;
            let body = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
            let _ = stream.write_all(body).await;
        }
    }
    heard
}

async fn server(manner: Manner) -> (String, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let heard = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(stream, manner).await
    });
    (url, heard)
}

#[tokio::test]
async fn a_provider_that_is_not_vouched_for_is_told_nothing() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.user("ana").await;
    for manner in [Manner::SelfSigned, Manner::Silent, Manner::Plain] {
        let (url, heard) = server(manner).await;
        let mut config = stage.config();
        config["tokenEndpoint"] = json!(format!("{url}/token"));
        let connector = stage.connect_with("oauth2", &format!("{manner:?}").to_lowercase(), config).await;
        let (record, _) = stage.begin(&ana, &connector, None).await;
        let begun = Instant::now();
        refused(stage.verify(&ana, &record, "a-code").await, 400, "connector.general").await;
        assert!(begun.elapsed() < Duration::from_secs(20), "{manner:?}: {:?}", begun.elapsed());
        let heard = tokio::time::timeout(Duration::from_secs(20), heard).await;
        let heard = heard.expect("a connection").unwrap();
        // A ClientHello begins with 22; nothing else may have been said.
        assert!(heard.first().is_none_or(|byte| *byte == 22), "{manner:?}");
        let said = String::from_utf8_lossy(&heard).into_owned();
        assert!(!said.contains("a-code") && !said.contains(&stage.daemon().canary), "{manner:?}");
    }
    assert_eq!((stage.sets(), stage.idp.connections()), (0, 0));
    stage.finish().await;
}
