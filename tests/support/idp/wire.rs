//! HTTP/1.1, as much as it takes, and the faults on the way.

use std::collections::HashMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use url::form_urlencoded;

use super::grants::{Grant, Refused};
use super::{Fault, Hold, Point, Shared};

pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) async fn read(stream: &mut TcpStream) -> Option<Self> {
        let mut bytes = Vec::new();
        let head = loop {
            if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break at;
            }
            (stream.read_buf(&mut bytes).await.ok()? > 0).then_some(())?;
        };
        let text = String::from_utf8(bytes[..head].to_vec()).ok()?;
        let mut lines = text.split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?);
        let path = target.split('?').next()?.to_owned();
        let pairs = lines.filter_map(|line| line.split_once(':'));
        let headers =
            pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
        let mut request = Self { method, path, headers, body: bytes[head + 4..].to_vec() };
        let length = request.header("content-length").map_or(0, |text| text.parse().unwrap());
        while request.body.len() < length {
            (stream.read_buf(&mut request.body).await.ok()? > 0).then_some(())?;
        }
        Some(request)
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn form(&self) -> HashMap<String, String> {
        form_urlencoded::parse(&self.body).into_owned().collect()
    }
}

pub(super) fn answer(status: u16, headers: &[(&'static str, String)], kind: &str, body: &[u8]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status} It\r\nContent-Type: {kind}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.extend([*name, ": ", value, "\r\n"]);
    }
    if status != 204 {
        head.extend(["Content-Length: ", &body.len().to_string(), "\r\n"]);
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

pub(super) fn answer_json(status: u16, body: &Value) -> Vec<u8> {
    answer(
        status,
        &[("Cache-Control", "no-store".to_owned())],
        "application/json",
        body.to_string().as_bytes(),
    )
}

/// One connection, one request. `None` when the other side is gone, or was to be left alone.
pub(super) async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> Option<()> {
    let request = Request::read(&mut stream).await?;
    if request.method == "GET" {
        *shared.state().fetched.entry(request.path.clone()).or_default() += 1;
    }
    let bytes = match request.path.as_str() {
        "/token" => return token(stream, request, &shared).await,
        "/.well-known/openid-configuration" => answer_json(200, &shared.state().metadata()),
        "/jwks" => answer_json(200, &shared.state().jwks()),
        "/revoke" => {
            shared.state().revoke(request.form().remove("token").unwrap_or_default());
            answer(200, &[], "text/plain", b"")
        }
        "/userinfo" => {
            let state = shared.state();
            let bearer = request.header("authorization").and_then(|header| header.split_once(' '));
            match bearer.and_then(|(_, token)| state.live_grant(token)) {
                Some(Grant { subject, .. }) => answer_json(
                    200,
                    &json!({ "sub": subject, "id": subject, "name": "Ana Teste", "email": "ana@example.test" }),
                ),
                None => answer_json(401, &json!({ "error": "invalid_token" })),
            }
        }
        _ => answer(404, &[], "text/plain", b"Not Found"),
    };
    stream.write_all(&bytes).await.ok()
}

pub(super) async fn token(mut stream: TcpStream, request: Request, shared: &Shared) -> Option<()> {
    let (fault, hold, pace) = {
        let mut state = shared.state();
        state.count(&request);
        let is_held = std::mem::take(&mut state.hold_next);
        let hold = is_held.then(|| shared.hold.lock().unwrap().clone()).flatten();
        (state.faults.pop_front(), hold, state.pace)
    };
    let _open = Open(shared);
    let hold = hold.as_ref();
    tokio::time::sleep(pace).await;
    Hold::at(hold, Point::Received).await?;
    let fault = match fault {
        Some(Fault::Status(status, headers, body)) => {
            let bytes = answer(status, &headers, "application/json", body.as_bytes());
            return stream.write_all(&bytes).await.ok();
        }
        Some(Fault::Raw(bytes)) => return stream.write_all(&bytes).await.ok(),
        Some(Fault::Hang) => pending().await,
        Some(Fault::CloseBeforeAnswer) => return None,
        Some(Fault::Endless) => return endless(stream).await,
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            None
        }
        other => other,
    };
    let keep = if let Some(Fault::Keep { told }) = fault { Some(told) } else { None };
    let made = shared.state().grant(&request, keep);
    Hold::at(hold, Point::Decided).await?;
    let (bytes, cut, pace) = rendered(made, fault);
    let half = if hold.is_some() { bytes.len() / 2 } else { 0 };
    stream.write_all(&bytes[..half.min(cut)]).await.ok()?;
    Hold::at(hold, Point::HalfSent).await?;
    match pace {
        Pace::AtOnce => stream.write_all(&bytes[half.min(cut)..cut.min(bytes.len())]).await.ok()?,
        Pace::Each(time) => {
            for byte in &bytes {
                stream.write_all(&[*byte]).await.ok()?;
                tokio::time::sleep(time).await;
            }
        }
        Pace::Head => {
            let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
            stream.write_all(&bytes[..end]).await.ok()?;
            return pending().await;
        }
    }
    Hold::at(hold, Point::Sent).await
}

/// Counts a request until it ends.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.state().open -= 1;
    }
}

pub(super) enum Pace {
    AtOnce,
    Each(Duration),
    Head,
}

/// The bytes of an answer, how many of them are sent, and how.
pub(super) fn rendered(made: Result<Value, Refused>, fault: Option<Fault>) -> (Vec<u8>, usize, Pace) {
    let mut made = match made {
        Ok(made) => made,
        Err(Refused(status, error)) => {
            return (answer_json(status, &json!({ "error": error })), usize::MAX, Pace::AtOnce);
        }
    };
    match fault {
        Some(Fault::Edit(edit)) => edit(&mut made),
        Some(Fault::Text(text)) => {
            let bytes = answer(200, &[], "application/json", &text(&made));
            return (bytes, usize::MAX, Pace::AtOnce);
        }
        Some(Fault::QueryString) => {
            let pairs = made.as_object().unwrap().iter();
            let pairs =
                pairs.map(|(name, value)| (name, value.as_str().map_or(value.to_string(), str::to_owned)));
            let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
            let kind = "application/x-www-form-urlencoded";
            return (answer(200, &[], kind, body.as_bytes()), usize::MAX, Pace::AtOnce);
        }
        Some(Fault::CloseAfter(bytes)) => return (answer_json(200, &made), bytes, Pace::AtOnce),
        Some(Fault::HangAfterHeaders) => return (answer_json(200, &made), usize::MAX, Pace::Head),
        Some(Fault::Drip(time)) => return (answer_json(200, &made), usize::MAX, Pace::Each(time)),
        _ => {}
    }
    (answer_json(200, &made), usize::MAX, Pace::AtOnce)
}

pub(super) async fn endless(mut stream: TcpStream) -> Option<()> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.ok()?;
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    loop {
        stream.write_all(chunk.as_bytes()).await.ok()?;
    }
}
