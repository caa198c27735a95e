//! The way out against servers that misbehave, on the wire.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and may read its environment"
)]

mod answers;
mod namespace;
mod redirects;
mod requests;
mod server;
mod tls;

use std::time::Duration;

use lacre::clock::Timestamp;
use lacre::upstream::{AnswerFormat, ClientAuth, Config, TokenRequest, Upstream};
use secrecy::SecretString;
use url::Url;

/// The usual limits, and this host as the provider's.
fn config() -> Config {
    Config { loopback_http: true, ..Config::default() }
}

/// Limits for tests that wait until they are reached.
fn hasty() -> Config {
    Config { timeout: Duration::from_secs(2), idle: Duration::from_millis(500), ..config() }
}

fn upstream() -> Upstream {
    Upstream::new(&config()).unwrap()
}

/// A refresh of a confidential client.
fn refresh(endpoint: Url) -> TokenRequest {
    TokenRequest {
        endpoint,
        client_id: "the client".to_owned(),
        client_secret: Some(SecretString::from("s&cr:t")),
        auth: ClientAuth::Post,
        params: vec![
            ("grant_type".to_owned(), SecretString::from("refresh_token")),
            ("refresh_token".to_owned(), SecretString::from("old token")),
        ],
        extra: vec![("tenant_hint".to_owned(), "a b".to_owned())],
        format: AnswerFormat::Json,
        timeout: None,
        now: Timestamp::from_micros(1_800_000_000_000_000),
    }
}
