//! A server that reads a request and then follows a script, whatever HTTP says about it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use url::Url;

/// One step of an answer.
#[derive(Clone)]
pub(crate) enum Step {
    /// Sends it.
    Bytes(Vec<u8>),
    /// Sends it again and again, with a pause between, until nobody reads it any more.
    Endless(Vec<u8>, Duration),
    /// Keeps the connection open and silent.
    Silence,
}

/// A whole answer with a body of some type.
pub(crate) fn answer(status: u16, headers: &str, body: impl AsRef<[u8]>) -> Step {
    let body = body.as_ref();
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
    Step::Bytes([head.as_bytes(), body].concat())
}

pub(crate) struct Server {
    pub(crate) at: SocketAddr,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    connections: usize,
    requests: Vec<String>,
    sent: usize,
}

impl Server {
    /// Every connection gets the same script.
    pub(crate) async fn plain(script: Vec<Step>) -> Self {
        Self::start(None, script).await
    }

    pub(crate) async fn start(tls: Option<TlsAcceptor>, script: Vec<Step>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Seen::default())));
        let shared = seen.clone();
        tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let (seen, script, tls) = (shared.clone(), script.clone(), tls.clone());
                seen.lock().unwrap().connections += 1;
                tokio::spawn(async move {
                    match tls {
                        None => talk(socket, &script, &seen).await,
                        Some(tls) => match tls.accept(socket).await {
                            Ok(socket) => talk(socket, &script, &seen).await,
                            Err(_) => None,
                        },
                    }
                });
            }
        });
        Self { at, seen }
    }

    pub(crate) fn url(&self, path: &str) -> Url {
        format!("http://{}{path}", self.at).parse().unwrap()
    }

    pub(crate) fn connections(&self) -> usize {
        self.seen.lock().unwrap().connections
    }

    /// The requests, head and body.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().requests.clone()
    }

    /// How much could be sent.
    pub(crate) fn sent(&self) -> usize {
        self.seen.lock().unwrap().sent
    }
}

/// `None` when the other side has gone.
async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: S,
    script: &[Step],
    seen: &Mutex<Seen>,
) -> Option<()> {
    let request = read_request(&mut socket).await?;
    seen.lock().unwrap().requests.push(request);
    for step in script {
        match step {
            Step::Bytes(bytes) => send(&mut socket, bytes, seen).await?,
            Step::Endless(bytes, pause) => loop {
                send(&mut socket, bytes, seen).await?;
                tokio::time::sleep(*pause).await;
            },
            Step::Silence => std::future::pending().await,
        }
    }
    // Says goodbye at the end of a TLS stream, where one is there.
    socket.shutdown().await.ok()
}

async fn send<S: AsyncWrite + Unpin>(socket: &mut S, bytes: &[u8], seen: &Mutex<Seen>) -> Option<()> {
    socket.write_all(bytes).await.ok()?;
    socket.flush().await.ok()?;
    seen.lock().unwrap().sent += bytes.len();
    Some(())
}

async fn read_request<S: AsyncRead + Unpin>(socket: &mut S) -> Option<String> {
    let mut request = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                return Some(text);
            }
        }
        if socket.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
    }
}
