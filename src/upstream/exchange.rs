//! One request and its answer, within limits of time and size, and nothing twice.
//!
//! A failure says whether the provider may have received the request: a refresh token that may be used up must
//! not be sent again as if nothing had happened. Redirects are answers like others; nothing follows them.

use std::borrow::Borrow;
use std::error::Error;
use std::io;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue,
    RETRY_AFTER,
};
use reqwest::{Method, Response};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use url::{Url, form_urlencoded};
use zeroize::Zeroizing;

use super::Http;
use super::egress::{Forbidden, NoAddress};

const MAX_BODY: usize = 256 * 1024;
/// Enough for nearly every answer.
const FIRST_BODY: usize = 16 * 1024;
/// Names and values together. The client itself stops at 100 headers.
const MAX_HEADERS: usize = 32 * 1024;
/// What every request has at least once it is connected.
const AFTER_CONNECT: Duration = Duration::from_secs(1);
const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);

/// One request. It is sent once.
pub struct Request {
    method: Method,
    pub(super) url: Url,
    headers: HeaderMap,
    body: Option<Bytes>,
    timeout: Option<Duration>,
    /// A header was given that no HTTP request can carry.
    malformed: bool,
}

impl Request {
    /// A GET request.
    pub fn get(url: impl Borrow<Url>) -> Self {
        Self::new(Method::GET, url.borrow())
    }

    /// A POST request.
    pub fn post(url: impl Borrow<Url>) -> Self {
        Self::new(Method::POST, url.borrow())
    }

    fn new(method: Method, url: &Url) -> Self {
        let headers = HeaderMap::new();
        Self { method, url: url.clone(), headers, body: None, timeout: None, malformed: false }
    }

    /// A form as body, in this order.
    #[must_use]
    pub fn form(self, members: Vec<(String, SecretString)>) -> Self {
        let mut form = form_urlencoded::Serializer::new(String::new());
        for (name, value) in &members {
            form.append_pair(name, value.expose_secret());
        }
        self.body("application/x-www-form-urlencoded", form.finish().into_bytes())
    }

    /// A JSON body.
    #[must_use]
    pub fn json(self, value: Value) -> Self {
        self.body("application/json", value.to_string().into_bytes())
    }

    fn body(mut self, content_type: &'static str, body: Vec<u8>) -> Self {
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        // Wiped when the client lets go of it.
        self.body = Some(Bytes::from_owner(Zeroizing::new(body)));
        self
    }

    /// An access token.
    #[must_use]
    pub fn bearer(self, token: &SecretString) -> Self {
        self.header(AUTHORIZATION, Zeroizing::new(format!("Bearer {}", token.expose_secret())))
    }

    /// A client's id and secret as they are. RFC 6749, section 2.3.1 wants both form-encoded first; that is the
    /// caller's to do.
    #[must_use]
    pub fn basic(self, id: &str, secret: &SecretString) -> Self {
        let pair = Zeroizing::new(format!("{id}:{}", secret.expose_secret()));
        self.header(AUTHORIZATION, Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes()))))
    }

    /// The media types that are understood.
    #[must_use]
    pub fn accept(self, types: &str) -> Self {
        self.header(ACCEPT, Zeroizing::new(types.to_owned()))
    }

    fn header(mut self, name: HeaderName, value: Zeroizing<String>) -> Self {
        match HeaderValue::from_str(&value) {
            Ok(mut value) => {
                value.set_sensitive(name == AUTHORIZATION);
                self.headers.insert(name, value);
            }
            Err(_) => self.malformed = true,
        }
        self
    }

    /// Another limit for the whole exchange than the configured one. It is never shorter than connecting may take:
    /// a provider that is not there would count as one that may have received the request.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

/// What a provider answered, whatever its status.
pub struct Answer {
    /// The status.
    pub status: u16,
    /// How long to wait before the next request, at most an hour.
    pub retry_after: Option<Duration>,
    /// The `Content-Type` header.
    pub content_type: Option<String>,
    /// The body; wiped when dropped.
    pub body: Zeroizing<Vec<u8>>,
}

/// Why there is no answer, sorted by what the caller can do. The texts are for tenants too: they do not tell a
/// destination that is forbidden from one that is not there. The static words are for the audit log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The egress rules forbid the destination. Nothing was sent.
    #[error("the provider cannot be reached")]
    Blocked,
    /// Surely nothing was sent: `dns`, `connect`, `timeout-connect`, `tls-expired`, `tls-unknown-ca`,
    /// `tls-name`, `tls`, or `header` for a request that HTTP cannot carry.
    #[error("the provider cannot be reached")]
    NotSent(&'static str),
    /// The provider may have received it: `timeout`, or `broken` for no or half an answer.
    #[error("the provider did not answer")]
    Lost(&'static str),
    /// The provider received it and the answer is refused: `too-large`, `content-encoding`, `headers`.
    #[error("the provider's answer cannot be used")]
    BadAnswer(&'static str),
}

/// How long parts of an exchange may take. The whole is the client's own limit.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// For name, TCP and TLS together.
    pub(super) connect: Duration,
    /// Between two pieces of a body.
    pub(super) idle: Duration,
}

/// Sends a request whose destination is allowed.
pub(super) async fn send(http: &Http, limits: Limits, request: Request) -> Result<Answer, Failure> {
    if request.malformed {
        return Err(Failure::NotSent("header"));
    }
    let mut out = http.request(request.method, request.url).headers(request.headers);
    if let Some(body) = request.body {
        out = out.body(body);
    }
    if let Some(timeout) = request.timeout {
        out = out.timeout(timeout.max(limits.connect + AFTER_CONNECT));
    }
    let response = out.send().await.map_err(|error| failure(&error))?;
    let headers = response.headers();
    let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if size > MAX_HEADERS {
        return Err(Failure::BadAnswer("headers"));
    }
    // None was asked for; what a few bytes may become is not to be found out.
    if headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .any(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return Err(Failure::BadAnswer("content-encoding"));
    }
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    Ok(Answer {
        status: response.status().as_u16(),
        retry_after: text(RETRY_AFTER).and_then(|wait| retry_after(wait, text(DATE))),
        content_type: text(CONTENT_TYPE).map(str::to_owned),
        body: read(response, limits.idle).await?,
    })
}

async fn read(mut response: Response, idle: Duration) -> Result<Zeroizing<Vec<u8>>, Failure> {
    if response.content_length().is_some_and(|length| length > MAX_BODY as u64) {
        return Err(Failure::BadAnswer("too-large"));
    }
    let mut body = Zeroizing::new(Vec::with_capacity(FIRST_BODY));
    loop {
        let chunk =
            tokio::time::timeout(idle, response.chunk()).await.map_err(|_| Failure::Lost("timeout"))?;
        let Some(chunk) = chunk.map_err(|error| failure(&error))? else { return Ok(body) };
        let length = body.len() + chunk.len();
        if length > MAX_BODY {
            return Err(Failure::BadAnswer("too-large"));
        }
        if length > body.capacity() {
            // A vector that grows by itself leaves the old bytes behind, unwiped.
            let mut larger = Zeroizing::new(Vec::with_capacity((2 * length).min(MAX_BODY)));
            larger.extend_from_slice(&body);
            body = larger;
        }
        body.extend_from_slice(&chunk);
    }
}

/// Seconds, or a date that is compared with the same answer's own: the two clocks need not agree.
fn retry_after(text: &str, date: Option<&str>) -> Option<Duration> {
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let moment = |text| jiff::fmt::rfc2822::parse(text).ok().map(|at| at.timestamp());
            let wait = moment(text)?.duration_since(moment(date?)?);
            Duration::try_from(wait).unwrap_or_default()
        }
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

fn failure(error: &reqwest::Error) -> Failure {
    if caused_by::<Forbidden>(error).is_some() {
        Failure::Blocked
    } else if error.is_connect() {
        Failure::NotSent(connect_reason(error))
    } else if error.is_timeout() {
        Failure::Lost("timeout")
    } else if caused_by::<hyper::Error>(error).is_some_and(|error| error.is_parse()) {
        Failure::BadAnswer("headers")
    } else {
        Failure::Lost("broken")
    }
}

fn connect_reason(error: &reqwest::Error) -> &'static str {
    use rustls::CertificateError as Certificate;
    if caused_by::<NoAddress>(error).is_some() {
        return "dns";
    }
    if error.is_timeout() {
        return "timeout-connect";
    }
    match caused_by::<rustls::Error>(error) {
        None => "connect",
        Some(rustls::Error::InvalidCertificate(certificate)) => match certificate {
            Certificate::Expired | Certificate::ExpiredContext { .. } => "tls-expired",
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => "tls-name",
            Certificate::UnknownIssuer => "tls-unknown-ca",
            _ => "tls",
        },
        Some(_) => "tls",
    }
}

/// The first error of a type in the chain. An [`io::Error`] hides the one it carries from `source`.
fn caused_by<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = carried.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_at_most_an_hour() {
        let date = Some("Sun, 06 Nov 1994 08:49:37 GMT");
        for (text, date, expected) in [
            ("0", None, Some(0)),
            ("120", None, Some(120)),
            ("86400", None, Some(3600)),
            ("18446744073709551616", None, None),
            ("-1", None, None),
            ("soon", date, None),
            ("Sun, 06 Nov 1994 08:51:37 GMT", date, Some(120)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", date, Some(0)),
            ("Mon, 07 Nov 1994 08:49:37 GMT", date, Some(3600)),
            ("Sun, 06 Nov 1994 08:51:37 GMT", None, None),
        ] {
            assert_eq!(retry_after(text, date), expected.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn a_forbidden_destination_reads_like_one_that_is_not_there() {
        assert_eq!(Failure::Blocked.to_string(), Failure::NotSent("connect").to_string());
    }
}
