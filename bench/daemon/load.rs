//! A small HTTP/1.1 client that keeps connections busy and notes how long answers take.
//!
//! It knows what the daemon sends: a status line, headers, a body with a length or in chunks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// When a run ends.
#[derive(Clone, Copy)]
pub enum End {
    /// After a time.
    After(Duration),
    /// After so many requests.
    Count(u64),
}

/// An answer.
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

/// What a run has seen.
#[derive(Default)]
pub struct Load {
    elapsed: Duration,
    latencies: Vec<Duration>,
    // By status; 0 for a connection that broke.
    refused: BTreeMap<u16, u64>,
    bodies: Vec<Vec<u8>>,
}

impl Load {
    /// Good answers per second.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 answers")]
    pub fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// Good answers.
    #[allow(dead_code, reason = "each bench uses a part of it")]
    pub fn done(&self) -> usize {
        self.latencies.len()
    }

    /// A percentile of the time to the end of a good answer.
    pub fn percentile(&self, percent: usize) -> Duration {
        let at = self.latencies.len() * percent / 100;
        self.latencies.get(at).or(self.latencies.last()).copied().unwrap_or_default()
    }

    /// Answers that were no success, by status.
    pub fn refusals(&self) -> String {
        let texts: Vec<_> =
            self.refused.iter().map(|(status, count)| format!("{count} x {status}")).collect();
        if texts.is_empty() { "0".to_owned() } else { texts.join(", ") }
    }

    /// The `id` of every created thing.
    #[allow(dead_code, reason = "each bench uses a part of it")]
    pub fn ids(&self) -> Vec<String> {
        let id = |body: &Vec<u8>| {
            let value: serde_json::Value = serde_json::from_slice(body).unwrap();
            value["id"].as_str().expect("a created thing has an id").to_owned()
        };
        self.bodies.iter().map(id).collect()
    }
}

/// The bytes of a request.
pub fn request(method: &str, path: &str, authorization: &str, body: Option<(&str, &str)>) -> Vec<u8> {
    let (kind, text) =
        body.map_or((String::new(), ""), |(kind, text)| (format!("Content-Type: {kind}\r\n"), text));
    let len = text.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: {authorization}\r\n{kind}Content-Length: {len}\r\n\r\n{text}"
    )
    .into_bytes()
}

/// Keeps `connections` busy with what `make` gives for 0, 1, 2, ... Keeps the bodies of a counted run.
pub async fn run(
    address: SocketAddr,
    connections: usize,
    end: End,
    make: impl Fn(u64) -> Vec<u8> + 'static,
) -> Load {
    let (load, next, make) = (Rc::new(RefCell::new(Load::default())), Rc::new(Cell::new(0)), Rc::new(make));
    let start = Instant::now();
    let tasks: Vec<_> = (0..connections)
        .map(|_| {
            let (load, next, make) = (load.clone(), next.clone(), make.clone());
            tokio::task::spawn_local(async move {
                let mut connection = None;
                loop {
                    let n = next.get();
                    let over = match end {
                        End::After(time) => start.elapsed() >= time,
                        End::Count(count) => n >= count,
                    };
                    if over {
                        break;
                    }
                    next.set(n + 1);
                    one(address, &mut connection, &make(n), end, &load).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let mut load = load.take();
    load.elapsed = start.elapsed();
    load.latencies.sort_unstable();
    load
}

/// One request, on the kept connection or a new one.
async fn one(
    address: SocketAddr,
    kept: &mut Option<Connection>,
    request: &[u8],
    end: End,
    load: &RefCell<Load>,
) {
    let begun = Instant::now();
    let answer = async {
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => Connection::open(address).await?,
        };
        let reply = connection.ask(request).await?;
        *kept = Some(connection);
        io::Result::Ok(reply)
    };
    let answer = answer.await;
    let mut load = load.borrow_mut();
    match answer {
        Ok(reply) if (200..300).contains(&reply.status) => {
            load.latencies.push(begun.elapsed());
            if matches!(end, End::Count(_)) {
                load.bodies.push(reply.body);
            }
        }
        Ok(reply) => *load.refused.entry(reply.status).or_default() += 1,
        Err(_) => *load.refused.entry(0).or_default() += 1,
    }
}

/// One request on a connection of its own.
pub async fn ask(address: SocketAddr, request: &[u8]) -> io::Result<Reply> {
    Connection::open(address).await?.ask(request).await
}

/// A connection that is kept.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    async fn ask(&mut self, request: &[u8]) -> io::Result<Reply> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(reply) = parse(&self.buffer)? {
                return Ok(reply);
            }
        }
    }
}

/// A whole answer, or `None` if there is more to come.
fn parse(bytes: &[u8]) -> io::Result<Option<Reply>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| io::ErrorKind::InvalidData)?;
    let body = &bytes[end + 4..];
    let status = head.get(9..12).and_then(|text| text.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    let header = |wanted: &str| {
        let headers = head.lines().filter_map(|line| line.split_once(':'));
        headers.filter(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim()).next()
    };
    let body = if header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        dechunk(body)
    } else {
        let len = header("content-length")
            .map_or(Some(0), |text| text.parse().ok())
            .ok_or(io::ErrorKind::InvalidData)?;
        body.get(..len).map(<[u8]>::to_vec)
    };
    Ok(body.map(|body| Reply { status, body }))
}

/// The body of a chunked answer, if its last chunk is there.
fn dechunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|two| two == b"\r\n")?;
        let len = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).ok()?, 16).ok()?;
        let chunk = bytes.get(line + 2..line + 2 + len)?;
        bytes = bytes.get(line + 2 + len..)?.strip_prefix(b"\r\n")?;
        if len == 0 {
            return Some(body);
        }
        body.extend_from_slice(chunk);
    }
}
