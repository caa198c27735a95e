//! The command line's HTTP client: one request function, errors with exit codes.
//!
//! TLS by rustls, or a Unix socket, or plain HTTP to this machine only: a token must not cross a
//! network in the clear. Redirects and proxies from the environment are not followed. Every wait
//! ends at Ctrl-C.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, AUTHORIZATION, ETAG, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, ClientBuilder, Identity, Method, StatusCode, redirect};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use url::{Host, Url};

use super::error::{CliError, Problem};
use super::global::{Connection, Context};
use super::input;

const DEFAULT_ADDR: &str = "http://127.0.0.1:8280";
const CONNECT: Duration = Duration::from_secs(5);
/// Longer than the daemon's own deadline for any request, so that its answer is seen.
const TOTAL: Duration = Duration::from_mins(1);

/// One request.
pub(crate) struct Request<'a> {
    /// The method.
    pub(crate) method: Method,
    /// The path, already percent-encoded, and `?query`.
    pub(crate) path: &'a str,
    /// A JSON body.
    pub(crate) body: Option<Value>,
    /// One more header.
    pub(crate) header: Option<(HeaderName, String)>,
}

impl<'a> Request<'a> {
    /// A request without body.
    pub(crate) fn new(method: Method, path: &'a str) -> Self {
        Self { method, path, body: None, header: None }
    }

    /// Adds a JSON body.
    #[must_use]
    pub(crate) fn json(mut self, body: Value) -> Self {
        self.body = Some(body);
        self
    }

    /// Adds a header.
    #[must_use]
    pub(crate) fn header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.header = Some((name, value.into()));
        self
    }
}

/// A successful answer.
pub(crate) struct Reply {
    /// The body.
    pub(crate) body: Bytes,
    /// The `ETag` header.
    pub(crate) etag: Option<String>,
}

/// The library's client, named once: the one place of the program that calls out.
#[expect(clippy::disallowed_types, reason = "this is the place that may call out")]
type Http = reqwest::Client;

/// A daemon and who asks it.
pub(crate) struct Client {
    http: Http,
    base: String,
    /// The address as the user knows it.
    addr: String,
    token: Option<SecretString>,
    interrupted: watch::Receiver<bool>,
}

impl Client {
    /// Finds address and credentials, and fetches a token where credentials were given.
    pub(crate) async fn connect(context: &Context) -> Result<Self, CliError> {
        let options = &context.global.connection;
        let dev = options.dev_json.as_deref().map(DevFile::read).transpose()?;
        let addr = options.addr.clone().or_else(|| dev.as_ref().map(|dev| dev.url.clone()));
        let mut client = Self::to(options, addr.as_deref().unwrap_or(DEFAULT_ADDR))?;
        client.token = client.find_token(context, dev).await?;
        Ok(client)
    }

    /// The same daemon without credentials.
    pub(crate) fn anonymous(context: &Context) -> Result<Self, CliError> {
        let options = &context.global.connection;
        let dev = options.dev_json.as_deref().map(DevFile::read).transpose()?;
        let addr = options.addr.clone().or_else(|| dev.map(|dev| dev.url));
        Self::to(options, addr.as_deref().unwrap_or(DEFAULT_ADDR))
    }

    fn to(options: &Connection, addr: &str) -> Result<Self, CliError> {
        let target = Target::parse(addr)?;
        // Without a provider of its own reqwest asks for the process's; a second install is harmless.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut builder = Http::builder()
            .user_agent(concat!("lacre/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT)
            .timeout(TOTAL);
        let base = match target {
            Target::Socket(path) => {
                builder = builder.unix_socket(path).tls_certs_only([]);
                "http://localhost".to_owned()
            }
            // No TLS, so no certificate store either: a minimal container has none.
            Target::Http(base) => {
                builder = builder.tls_certs_only([]);
                base
            }
            Target::Https(base) => {
                builder = trust(builder.https_only(true), options)?;
                base
            }
        };
        let http = builder.build().map_err(|e| CliError::local("cannot set up TLS", e))?;
        Ok(Self { http, base, addr: addr.to_owned(), token: None, interrupted: watch_interrupts()? })
    }

    async fn find_token(
        &self,
        context: &Context,
        dev: Option<DevFile>,
    ) -> Result<Option<SecretString>, CliError> {
        let options = &context.global.connection;
        if let Some(path) = &options.token_file {
            return input::secret_file(path).map(Some);
        }
        if let (Some(id), Some(path)) = (&options.client_id, &options.client_secret_file) {
            let secret = input::secret_file(path)?;
            return self.fetch_token(id, &secret, &[]).await.map(Some);
        }
        match dev {
            Some(dev) => {
                let extra = [("resource", dev.resource.as_str()), ("scope", dev.scope.as_str())];
                self.fetch_token(&dev.client_id, &dev.client_secret, &extra).await.map(Some)
            }
            None => Ok(context.env.token.clone()),
        }
    }

    /// The client credentials grant (RFC 6749, section 4.4) with HTTP Basic.
    async fn fetch_token(
        &self,
        id: &str,
        secret: &SecretString,
        extra: &[(&str, &str)],
    ) -> Result<SecretString, CliError> {
        let mut form = vec![("grant_type", "client_credentials")];
        form.extend_from_slice(extra);
        let request = self
            .http
            .post(format!("{}/oidc/token", self.base))
            .basic_auth(id, Some(secret.expose_secret()))
            .form(&form);
        let (_, _, body) = self.exchange(request).await?;
        match self.parse(&body)?["access_token"].as_str() {
            Some(token) => Ok(SecretString::from(token.to_owned())),
            None => Err(self.strange("the token endpoint gave no access_token")),
        }
    }

    /// Sends a request; an answer other than 2xx is an error.
    pub(crate) async fn send(&self, request: Request<'_>) -> Result<Reply, CliError> {
        let mut out = self.http.request(request.method, format!("{}{}", self.base, request.path));
        if let Some(token) = &self.token {
            let bearer = HeaderValue::try_from(format!("Bearer {}", token.expose_secret()));
            let mut bearer = bearer.map_err(|_| {
                CliError::usage("the access token has characters no token has", "check LACRE_TOKEN")
            })?;
            bearer.set_sensitive(true);
            out = out.header(AUTHORIZATION, bearer);
        }
        if let Some((name, value)) = request.header {
            out = out.header(name, value);
        } else {
            out = out.header(ACCEPT, "application/json");
        }
        if let Some(body) = &request.body {
            out = out.json(body);
        }
        let (_, headers, body) = self.exchange(out).await?;
        let etag = headers.get(ETAG).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Reply { body, etag })
    }

    /// Sends a request whose answer is JSON.
    pub(crate) async fn json(&self, request: Request<'_>) -> Result<Value, CliError> {
        let reply = self.send(request).await?;
        self.parse(&reply.body)
    }

    /// All items of a list, page by page, at most `limit`.
    pub(crate) async fn items(&self, path: &str, limit: Option<usize>) -> Result<Vec<Value>, CliError> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let page = match &cursor {
                Some(cursor) => format!("{path}{}cursor={}", join(path), encode(cursor)),
                None => path.to_owned(),
            };
            let answer = self.json(Request::new(Method::GET, &page)).await?;
            let more = answer["items"].as_array().ok_or_else(|| self.strange("a list without items"))?;
            items.extend(more.iter().cloned());
            let next = answer["next_cursor"].as_str().map(str::to_owned);
            if next.is_none() || next == cursor || limit.is_some_and(|limit| items.len() >= limit) {
                items.truncate(limit.unwrap_or(usize::MAX));
                return Ok(items);
            }
            cursor = next;
        }
    }

    /// Whether the daemon says that it is ready, and its words; any status is an answer here.
    pub(crate) async fn ready(&self) -> Result<(bool, Value), CliError> {
        let request =
            self.http.get(format!("{}/readyz?verbose", self.base)).header(ACCEPT, "application/json");
        let (status, _, body) = self.receive(request).await?;
        let words = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).trim().to_owned()));
        match status {
            StatusCode::OK => Ok((true, words)),
            StatusCode::SERVICE_UNAVAILABLE => Ok((false, words)),
            other => Err(self.strange(&format!("/readyz answered {other}"))),
        }
    }

    /// Waits for `work` or Ctrl-C, whichever is first; a Ctrl-C that came before counts.
    pub(crate) async fn interruptible<T>(&self, work: impl Future<Output = T>) -> Result<T, CliError> {
        let mut interrupted = self.interrupted.clone();
        tokio::select! {
            biased;
            Ok(_) = interrupted.wait_for(|interrupted| *interrupted) => Err(CliError::Interrupted { hint: None }),
            done = work => Ok(done),
        }
    }

    /// The address as the user gave it.
    pub(crate) fn addr(&self) -> &str {
        &self.addr
    }

    /// An answer that no Lacre daemon gives.
    pub(crate) fn strange(&self, reason: &str) -> CliError {
        CliError::Strange { addr: self.addr.clone(), reason: reason.to_owned() }
    }

    fn parse(&self, body: &[u8]) -> Result<Value, CliError> {
        serde_json::from_slice(body).map_err(|_| self.strange("the answer is not JSON"))
    }

    async fn exchange(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<(StatusCode, HeaderMap, Bytes), CliError> {
        let (status, headers, body) = self.receive(request).await?;
        if status.is_success() {
            Ok((status, headers, body))
        } else {
            Err(CliError::Refused(problem(status, &headers, &body)))
        }
    }

    async fn receive(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<(StatusCode, HeaderMap, Bytes), CliError> {
        let call = async {
            let reply = request.send().await?;
            let (status, headers) = (reply.status(), reply.headers().clone());
            Ok((status, headers, reply.bytes().await?))
        };
        let answer: Result<_, reqwest::Error> = self.interruptible(call).await?;
        answer.map_err(|error| CliError::Unreachable { addr: self.addr.clone(), reason: root_cause(&error) })
    }
}

/// Remembers Ctrl-C from now on. One listener for all waits: a signal between two waits is not lost.
fn watch_interrupts() -> Result<watch::Receiver<bool>, CliError> {
    let mut signals =
        signal(SignalKind::interrupt()).map_err(|e| CliError::local("cannot listen for Ctrl-C", e))?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move { while signals.recv().await.is_some() && sender.send(true).is_ok() {} });
    Ok(receiver)
}

/// Percent-encodes a path segment or a query value.
pub(crate) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

fn join(path: &str) -> char {
    if path.contains('?') { '&' } else { '?' }
}

enum Target {
    Socket(PathBuf),
    Http(String),
    Https(String),
}

impl Target {
    fn parse(addr: &str) -> Result<Self, CliError> {
        const HINT: &str = "use https://HOST:PORT, http://127.0.0.1:PORT or unix:///PATH";
        if let Some(path) = addr.strip_prefix("unix://") {
            if !path.starts_with('/') {
                return Err(CliError::usage(format!("{addr}: the socket's path must be absolute"), HINT));
            }
            return Ok(Self::Socket(PathBuf::from(path)));
        }
        let url = Url::parse(addr).map_err(|e| CliError::usage(format!("{addr}: {e}"), HINT))?;
        let base = addr.trim_end_matches('/').to_owned();
        match url.scheme() {
            "https" => Ok(Self::Https(base)),
            "http" if is_loopback(&url) => Ok(Self::Http(base)),
            "http" => Err(CliError::usage(format!("{addr}: plain HTTP is for this machine only"), HINT)),
            _ => Err(CliError::usage(format!("{addr}: not an address of a daemon"), HINT)),
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

fn trust(mut builder: ClientBuilder, options: &Connection) -> Result<ClientBuilder, CliError> {
    if let Some(path) = &options.cacert {
        let pem = read(path)?;
        let certificates = Certificate::from_pem_bundle(&pem)
            .map_err(|e| CliError::local(format!("{} has no usable certificate", path.display()), e))?;
        builder = builder.tls_certs_only(certificates);
    }
    if let (Some(certificate), Some(key)) = (&options.client_cert, &options.client_key) {
        let mut pem = zeroize::Zeroizing::new(read(certificate)?);
        pem.push(b'\n');
        pem.extend_from_slice(&zeroize::Zeroizing::new(read(key)?));
        let identity = Identity::from_pem(&pem)
            .map_err(|e| CliError::local("client certificate and key are not usable", e))?;
        builder = builder.identity(identity);
    }
    Ok(builder)
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    std::fs::read(path).map_err(|e| CliError::local(format!("cannot read {}", path.display()), e))
}

/// What is used of `dev.json`.
struct DevFile {
    url: String,
    client_id: String,
    client_secret: SecretString,
    resource: String,
    scope: String,
}

impl DevFile {
    fn read(path: &Path) -> Result<Self, CliError> {
        let value: Value = serde_json::from_slice(&read(path)?)
            .map_err(|e| CliError::local(format!("{} is not JSON", path.display()), e))?;
        let management = &value["management"];
        let member = |value: &Value| value.as_str().map(str::to_owned);
        let file = || {
            Some(Self {
                url: member(&value["url"])?,
                client_id: member(&management["client_id"])?,
                client_secret: SecretString::from(member(&management["client_secret"])?),
                resource: member(&management["resource"])?,
                scope: member(&management["scope"]).unwrap_or_else(|| "all".to_owned()),
            })
        };
        let missing = || format!("{} lacks url or management credentials", path.display());
        file().ok_or_else(|| CliError::usage(missing(), "give the dev.json that `lacre dev` wrote"))
    }
}

/// Reads problem+json (RFC 9457) or an OAuth error; a body of neither kind leaves the status.
fn problem(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Problem {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let member = |name: &str| value[name].as_str().map(str::to_owned);
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let words = member("detail").or_else(|| member("error_description")).or_else(|| member("title"));
    Problem {
        status: status.as_u16(),
        code: member("code").or_else(|| member("error")),
        message: words
            .or_else(|| member("error"))
            .unwrap_or_else(|| format!("the server answered {}", status.as_u16())),
        request_id: member("request_id").or_else(|| header("x-request-id")),
        retry_after: header(RETRY_AFTER.as_str()).and_then(|text| text.parse().ok()),
    }
}

fn root_cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "timed out".to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
