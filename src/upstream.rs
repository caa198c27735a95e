//! The daemon's only way out: requests to identity providers.
//!
//! An [`Upstream`] asks token endpoints, reads metadata, verifies ID tokens. Every destination passes the egress
//! rules (`egress`), whoever named it; every exchange has limits of time and size (`exchange`); an answer is
//! read strictly (`strict`) and a refusal has one of five meanings ([`Class`]).
//!
//! Promises: nothing is followed, retried or sent twice. A failure says whether the provider may have received
//! the request. No text of a provider's leaves this module, except claims of a verified ID token, of metadata and
//! of userinfo. Environment variables name no proxy.
//!
//! Not here: when to refresh, what is kept, what a user sees. Start reading at [`Upstream::token`].

mod classify;
mod client_auth;
mod discovery;
mod egress;
mod exchange;
mod id_token;
mod strict;
mod token;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::future::Cache;
use moka::ops::compute::Op;
use reqwest::{Certificate, ClientBuilder, NoProxy, Proxy, redirect, retry, tls};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Map, Value};
use url::Url;

use egress::{Lookup, Resolver, Rules};
use exchange::Limits;
use id_token::{Fault, KeySet};
use strict::Members;

pub use classify::{Class, TokenFailure};
pub use client_auth::{ClientAuth, HmacAlg};
pub use discovery::Metadata;
pub use egress::BadUrl;
pub use exchange::{Answer, Failure, Request};
pub use id_token::ExpectedIdToken;
pub use token::{AnswerFormat, ExpiresIn, RevokeRequest, TokenAnswer, TokenRequest};

/// For name, TCP and TLS together; less where the whole exchange has little time.
const CONNECT: Duration = Duration::from_secs(5);
/// How long metadata and key sets are believed.
const FRESH: Duration = Duration::from_mins(5);
/// A token with an unknown key may be forged: its key set is fetched again at most this often.
const REFETCH: Duration = Duration::from_secs(10);
/// Providers whose metadata or keys are kept.
const CACHED: u64 = 1024;

/// `[upstream]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Providers in private networks: networks (`10.1.0.0/16`), addresses, and names (`idp.corp`, `idp.corp:9443`). A
    /// name allows private addresses for that name only, and its port beside `ports`.
    pub allow: Vec<String>,
    /// The ports that may be connected to.
    pub ports: Vec<u16>,
    /// Further root certificates, PEM.
    pub ca: Option<PathBuf>,
    /// An HTTP proxy, `http://` or `https://` without credentials. It resolves the names, so it has to keep private
    /// addresses away from tenants itself.
    pub proxy: Option<String>,
    /// For a whole exchange.
    #[serde(with = "crate::config::seconds")]
    pub timeout: Duration,
    /// Between two pieces of an answer's body.
    #[serde(with = "crate::config::seconds")]
    pub idle: Duration,
    /// Whether this host may be asked, by http too and on any port. For `lacre dev`.
    pub loopback_http: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            ports: vec![443, 8443],
            ca: None,
            proxy: None,
            timeout: Duration::from_secs(10),
            idle: Duration::from_secs(5),
            loopback_http: false,
        }
    }
}

/// Why the way out cannot be set up; all of it is configuration.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Neither a network nor an address nor a name.
    #[error("upstream.allow: `{0}` is no network, address, name or name:port")]
    Allow(String),
    /// Not a proxy's URL. The text is not shown: it may hold a password.
    #[error("upstream.proxy: not http:// or https:// with a host and without a user name")]
    Proxy,
    /// The file of root certificates cannot be read.
    #[error("upstream.ca: cannot read {}", path.display())]
    ReadCa {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file has no usable certificate.
    #[error("upstream.ca: no usable certificate in {}", path.display())]
    BadCa {
        /// The file.
        path: PathBuf,
        /// Why; `None` if there is none in it.
        source: Option<reqwest::Error>,
    },
    /// The TLS library refuses what it was given.
    #[error("cannot set up TLS for upstream")]
    Tls(#[source] reqwest::Error),
}

/// The library's client, named once.
#[expect(clippy::disallowed_types, reason = "this is the place where the daemon calls out")]
type Http = reqwest::Client;

/// The way out. Cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    http: Http,
    rules: Arc<Rules>,
    limits: Limits,
    metadata: Cache<String, Arc<Metadata>>,
    key_sets: Cache<Url, Arc<KeySet>>,
}

impl Upstream {
    /// Reads the certificates and checks the rules. Connects to nobody.
    pub fn new(config: &Config) -> Result<Self, StartError> {
        Self::with_lookup(config, egress::host_lookup())
    }

    fn with_lookup(config: &Config, lookup: Lookup) -> Result<Self, StartError> {
        let proxy = config.proxy.as_deref().map(proxy_url).transpose()?;
        let rules = Arc::new(Rules::new(config, proxy.as_ref())?);
        let resolver = Arc::new(Resolver { rules: rules.clone(), lookup });
        let extra = extra_roots(config)?;
        let limits = Limits { connect: CONNECT.min(config.timeout / 2), idle: config.idle };
        let base = || {
            let mut builder = client(config.timeout, limits.connect).dns_resolver(resolver.clone());
            if let Some(proxy) = &proxy {
                let proxy = Proxy::all(proxy.clone()).map_err(|_| StartError::Proxy)?;
                let here = NoProxy::from_string("localhost,127.0.0.0/8,::1");
                builder = builder.proxy(proxy.no_proxy(here));
            }
            Ok(builder)
        };
        // Without a provider of its own the library asks for the process's; a second install is harmless.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = match base()?.tls_certs_merge(extra).build() {
            Ok(http) => http,
            // A minimal container has no root certificates, and a daemon without providers needs none.
            Err(error) if config.ca.is_none() => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "No root certificates on this host, so no provider will be trusted; set upstream.ca"
                );
                base()?.tls_certs_only([]).build().map_err(StartError::Tls)?
            }
            Err(error) => return Err(StartError::Tls(error)),
        };
        let (metadata, key_sets) = (cache(), cache());
        Ok(Self { http, rules, limits, metadata, key_sets })
    }

    /// Reads a URL that somebody wants to be asked, as far as it can be judged without the DNS: syntax, scheme, user
    /// info, port, literal address.
    pub fn check_url(&self, text: &str) -> Result<Url, BadUrl> {
        self.rules.parse(text)
    }

    /// Sends a request, once.
    pub async fn send(&self, request: Request) -> Result<Answer, Failure> {
        self.rules.url(&request.url).map_err(|_| Failure::Blocked)?;
        exchange::send(&self.http, self.limits, request).await
    }

    /// Asks a token endpoint.
    pub async fn token(&self, request: TokenRequest) -> Result<TokenAnswer, TokenFailure> {
        let (request, format) = request.into_request()?;
        token::read(&self.send(request).await?, format)
    }

    /// Revokes a token. A token that the provider does not know is a success (RFC 7009, section 2.2).
    pub async fn revoke(&self, request: RevokeRequest) -> Result<(), TokenFailure> {
        let answer = self.send(request.into_request()?).await?;
        if (200..300).contains(&answer.status) { Ok(()) } else { Err(token::refusal(&answer)) }
    }

    /// Gets a JSON object, with an access token for instance from userinfo. A 401 is then the token's end, not a
    /// fault of the client.
    pub async fn get_json(&self, url: &Url, bearer: Option<&SecretString>) -> Result<Value, TokenFailure> {
        let members = self.get(url, bearer).await.map_err(|failure| match failure.status {
            Some(401) if bearer.is_some() => {
                TokenFailure { class: Class::GrantDead, reason: "access-token", ..failure }
            }
            _ => failure,
        })?;
        Ok(Value::Object(members.into_map()?))
    }

    async fn get(&self, url: &Url, bearer: Option<&SecretString>) -> Result<Members, TokenFailure> {
        let mut request = Request::get(url).accept("application/json");
        if let Some(token) = bearer {
            request = request.bearer(token);
        }
        let answer = self.send(request).await?;
        if answer.status != 200 {
            return Err(token::refusal(&answer));
        }
        Ok(Members::from_json(&answer.body)?)
    }

    /// The metadata of an issuer, at most five minutes old. Its endpoints are on the issuer's host, or on one of the
    /// trusted hosts or below it.
    pub async fn discover(
        &self,
        issuer: &str,
        trusted_hosts: &[&str],
    ) -> Result<Arc<Metadata>, TokenFailure> {
        let fetch = async {
            let members = self.get(&discovery::location(&self.rules, issuer)?, None).await?;
            Metadata::read(&self.rules, issuer, &members).map(Arc::new)
        };
        let metadata = self.metadata.try_get_with_by_ref(issuer, fetch).await;
        let metadata = metadata.map_err(|failure: Arc<TokenFailure>| (*failure).clone())?;
        metadata.check_hosts(trusted_hosts)?;
        Ok(metadata)
    }

    /// The claims of an ID token that is genuine and says what is expected. The keys are at most five minutes old;
    /// they are fetched again if the token names another one.
    pub async fn verify_id_token(
        &self,
        token: &SecretString,
        jwks_uri: &Url,
        expected: &ExpectedIdToken<'_>,
    ) -> Result<Map<String, Value>, TokenFailure> {
        let mut verified = self.key_set(jwks_uri, FRESH).await?.verify(token.expose_secret(), expected);
        if verified == Err(Fault::UnknownKey) {
            verified = self.key_set(jwks_uri, REFETCH).await?.verify(token.expose_secret(), expected);
        }
        verified.map_err(|fault| {
            tracing::debug!(?fault, "ID token refused");
            TokenFailure::after(Class::Protocol, "id-token")
        })
    }

    /// A key set that is not older than `age`. Who waits for one that is being fetched shares it.
    async fn key_set(&self, uri: &Url, age: Duration) -> Result<Arc<KeySet>, TokenFailure> {
        if let Some(kept) = self.key_sets.get(uri).await.filter(|kept| kept.fetched.elapsed() < age) {
            return Ok(kept);
        }
        let entry = self.key_sets.entry_by_ref(uri).and_try_compute_with(async |kept| {
            // Somebody else may have fetched it while this call waited for its turn.
            if kept.is_some_and(|kept| kept.value().fetched.elapsed() < age) {
                return Ok(Op::Nop);
            }
            let fetched = Instant::now();
            let keys = KeySet::read(&self.get(uri, None).await?, fetched);
            keys.map(|keys| Op::Put(Arc::new(keys))).ok_or(TokenFailure::after(Class::Protocol, "jwks"))
        });
        let entry = entry.await?.into_entry();
        entry.map(|entry| entry.into_value()).ok_or(TokenFailure::after(Class::Protocol, "jwks"))
    }
}

/// Without pool and redirects: a connection that the provider is about to close must not make it doubtful whether a
/// refresh token was used, and each exchange asks the rules anew where it may go.
fn client(timeout: Duration, connect: Duration) -> ClientBuilder {
    Http::builder()
        .user_agent(concat!("lacre/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .referer(false)
        .no_proxy()
        .pool_max_idle_per_host(0)
        .tls_version_min(tls::Version::TLS_1_2)
        .connect_timeout(connect)
        .timeout(timeout)
}

fn proxy_url(text: &str) -> Result<Url, StartError> {
    let url = Url::parse(text).map_err(|_| StartError::Proxy)?;
    let fits = matches!(url.scheme(), "http" | "https") && url.has_host() && url.username().is_empty();
    if fits && url.password().is_none() { Ok(url) } else { Err(StartError::Proxy) }
}

fn extra_roots(config: &Config) -> Result<Vec<Certificate>, StartError> {
    let Some(path) = &config.ca else { return Ok(Vec::new()) };
    let pem = std::fs::read(path).map_err(|source| StartError::ReadCa { path: path.clone(), source })?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(roots) if !roots.is_empty() => Ok(roots),
        Ok(_) => Err(StartError::BadCa { path: path.clone(), source: None }),
        Err(error) => Err(StartError::BadCa { path: path.clone(), source: Some(error) }),
    }
}

fn cache<K, V>() -> Cache<K, V>
where
    K: Eq + std::hash::Hash + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    Cache::builder().max_capacity(CACHED).time_to_live(FRESH).build()
}

#[cfg(test)]
mod tests;
