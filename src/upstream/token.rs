//! The token endpoint (RFC 6749) and the revocation endpoint (RFC 7009).
//!
//! A token is taken from an answer only if nothing in the answer contradicts it. How long it lives counts from
//! before the request, and that is the caller's to do: [`ExpiresIn`] is what the provider said, no more.

use std::time::Duration;

use secrecy::SecretString;
use url::Url;

use crate::clock::Timestamp;

use super::classify::{TokenFailure, error_code};
use super::client_auth::{ClientAuth, Credentials};
use super::exchange::{Answer, Request};
use super::strict::{Members, Unreadable};

/// Ten years, in seconds: no token lives longer, whatever its provider says.
const LONGEST: u64 = 10 * 366 * 86_400;

/// How a provider writes its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFormat {
    /// JSON, as the standard has it.
    Json,
    /// A form.
    QueryString,
    /// By the content type, else by the first character.
    Either,
}

/// A question to a token endpoint.
pub struct TokenRequest {
    /// The endpoint.
    pub endpoint: Url,
    /// The client's id.
    pub client_id: String,
    /// Its secret; `None` for a public client.
    pub client_secret: Option<SecretString>,
    /// How the client proves who it is.
    pub auth: ClientAuth,
    /// The grant's own parameters, sent first and in this order.
    pub params: Vec<(String, SecretString)>,
    /// Parameters that a connector's configuration adds, sent last.
    pub extra: Vec<(String, String)>,
    /// How the answer is written.
    pub format: AnswerFormat,
    /// Another limit than the configured one; see [`Request::timeout`].
    pub timeout: Option<Duration>,
    /// The present moment, for a client assertion.
    pub now: Timestamp,
}

/// A token that is not wanted any more.
pub struct RevokeRequest {
    /// The endpoint.
    pub endpoint: Url,
    /// The client's id.
    pub client_id: String,
    /// Its secret; `None` for a public client.
    pub client_secret: Option<SecretString>,
    /// How the client proves who it is.
    pub auth: ClientAuth,
    /// The token.
    pub token: SecretString,
    /// `access_token` or `refresh_token`.
    pub token_type_hint: &'static str,
    /// The present moment, for a client assertion.
    pub now: Timestamp,
}

/// What a token endpoint gave.
pub struct TokenAnswer {
    /// The access token; not empty.
    pub access_token: SecretString,
    /// A refresh token. `None`: the one that was sent stays valid (RFC 6749, section 6).
    pub refresh_token: Option<SecretString>,
    /// An ID token, not verified.
    pub id_token: Option<SecretString>,
    /// `bearer` in some spelling, if it was said.
    pub token_type: Option<String>,
    /// The scopes, if they were said.
    pub scope: Option<String>,
    /// How long the access token lives.
    pub expires_in: ExpiresIn,
}

/// How long a token lives, as the provider said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpiresIn {
    /// It did not say.
    Absent,
    /// So many seconds, at most ten years.
    Seconds(u64),
    /// It said something that is no number of seconds.
    Unreadable,
}

impl ExpiresIn {
    /// From a member's JSON text: digits, or digits in quotes.
    fn read(raw: Option<&str>) -> Self {
        let Some(raw) = raw else { return Self::Absent };
        let digits = raw.strip_prefix('"').and_then(|raw| raw.strip_suffix('"')).unwrap_or(raw);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Self::Unreadable;
        }
        // Only a number that is too large is no number here.
        Self::Seconds(digits.parse().unwrap_or(LONGEST).min(LONGEST))
    }
}

impl TokenRequest {
    pub(super) fn into_request(self) -> Result<(Request, AnswerFormat), TokenFailure> {
        let credentials = Credentials {
            endpoint: &self.endpoint,
            client_id: &self.client_id,
            client_secret: self.client_secret.as_ref(),
            now: self.now,
        };
        let extra = self.extra.into_iter().map(|(name, value)| (name, SecretString::from(value))).collect();
        let mut request = credentials.request(self.auth, self.params, extra)?.accept(match self.format {
            AnswerFormat::Json => "application/json",
            AnswerFormat::QueryString => "application/x-www-form-urlencoded",
            AnswerFormat::Either => "application/json, application/x-www-form-urlencoded;q=0.9",
        });
        if let Some(timeout) = self.timeout {
            request = request.timeout(timeout);
        }
        Ok((request, self.format))
    }
}

impl RevokeRequest {
    pub(super) fn into_request(self) -> Result<Request, TokenFailure> {
        let credentials = Credentials {
            endpoint: &self.endpoint,
            client_id: &self.client_id,
            client_secret: self.client_secret.as_ref(),
            now: self.now,
        };
        let hint = ("token_type_hint".to_owned(), SecretString::from(self.token_type_hint));
        let params = vec![("token".to_owned(), self.token), hint];
        credentials.request(self.auth, params, Vec::new()).map(|request| request.accept("application/json"))
    }
}

/// The tokens of an answer, or what its refusal means.
pub(super) fn read(answer: &Answer, format: AnswerFormat) -> Result<TokenAnswer, TokenFailure> {
    if !(200..300).contains(&answer.status) {
        return Err(refusal(answer));
    }
    let status = |failure| TokenFailure { status: Some(answer.status), ..failure };
    let members = parse(answer, format).map_err(|unreadable| status(unreadable.into()))?;
    if members.raw("error").is_some() {
        return Err(TokenFailure::refused(answer, error_code(&members)));
    }
    tokens(&members).map_err(|unreadable| status(unreadable.into()))
}

/// What an answer that is no success means.
pub(super) fn refusal(answer: &Answer) -> TokenFailure {
    let members = parse(answer, AnswerFormat::Either);
    TokenFailure::refused(answer, members.ok().and_then(|members| error_code(&members)))
}

fn parse(answer: &Answer, format: AnswerFormat) -> Result<Members, Unreadable> {
    let is_json = match format {
        AnswerFormat::Json => true,
        AnswerFormat::QueryString => false,
        AnswerFormat::Either => {
            let media_type = answer.content_type.as_deref().unwrap_or_default().to_ascii_lowercase();
            match media_type.split(';').next().unwrap_or_default().trim() {
                "application/json" => true,
                "application/x-www-form-urlencoded" => false,
                _ => answer.body.trim_ascii_start().starts_with(b"{"),
            }
        }
    };
    if answer.body.trim_ascii().is_empty() {
        return Err(Unreadable("empty"));
    }
    if is_json { Members::from_json(&answer.body) } else { Members::from_form(&answer.body) }
}

fn tokens(members: &Members) -> Result<TokenAnswer, Unreadable> {
    let token_type: Option<String> = members.read("token_type")?;
    // Another type is used in another way (RFC 6749, section 7.1): sent as a bearer token it would give away
    // what it should protect.
    if token_type.as_ref().is_some_and(|name| !name.eq_ignore_ascii_case("bearer")) {
        return Err(Unreadable("token_type"));
    }
    Ok(TokenAnswer {
        access_token: members.secret("access_token")?.ok_or(Unreadable("access_token"))?,
        refresh_token: members.secret("refresh_token")?,
        id_token: members.secret("id_token")?,
        token_type,
        scope: members.read("scope")?,
        expires_in: ExpiresIn::read(members.raw("expires_in")),
    })
}

#[cfg(test)]
mod tests;
