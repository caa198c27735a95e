//! Errors of the native API (RFC 9457): one table of codes, one conversion per service error.
//!
//! A 4xx explains itself to the client; a 5xx never does: its source goes to the log once, under the
//! request id, from `observe`. What is transient says so (`retryable`, `Retry-After`).

mod tokens;

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::ResponseError;
use actix_web::error::QueryPayloadError;
use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderMap, HeaderValue};
use serde_json::{Value, json};

use crate::audit::{AuditCode, AuditError};
use crate::identity::MissingScope;
use crate::ids::RequestId;
use crate::issuer::{BearerError, IssuerError, NotSigned};
use crate::keys::{KeysError, Refusal};
use crate::vault::VaultError;

/// What went wrong: the `code` member, stable over versions. Documented in `docs/api.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    Malformed,
    Unauthenticated,
    InvalidToken,
    InsufficientScope,
    NotFound,
    MethodNotAllowed,
    NameTaken,
    IdempotencyInFlight,
    JobEnded,
    NextPending,
    KeyRequired,
    OnlyPrevious,
    RotationInProgress,
    TooManyKeys,
    Quarantined,
    KeyNotCurrent,
    SigningRefused,
    NeedsReauthorization,
    Expired,
    VersionConflict,
    TooLarge,
    UnsupportedMediaType,
    Invalid,
    IdempotencyMismatch,
    DoesNotOpen,
    PreconditionRequired,
    RateLimited,
    Integrity,
    Internal,
    DeviceUnavailable,
    KeyUnavailable,
    Busy,
    ClockSuspect,
    AuditUnavailable,
    StorageUnavailable,
    ProviderFailed,
    ProviderUnavailable,
}

impl Code {
    #[cfg(test)]
    pub(super) const ALL: [Self; 37] = [
        Self::Malformed,
        Self::Unauthenticated,
        Self::InvalidToken,
        Self::InsufficientScope,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::NameTaken,
        Self::IdempotencyInFlight,
        Self::JobEnded,
        Self::NextPending,
        Self::KeyRequired,
        Self::OnlyPrevious,
        Self::RotationInProgress,
        Self::TooManyKeys,
        Self::Quarantined,
        Self::KeyNotCurrent,
        Self::SigningRefused,
        Self::NeedsReauthorization,
        Self::Expired,
        Self::VersionConflict,
        Self::TooLarge,
        Self::UnsupportedMediaType,
        Self::Invalid,
        Self::IdempotencyMismatch,
        Self::DoesNotOpen,
        Self::PreconditionRequired,
        Self::RateLimited,
        Self::Integrity,
        Self::Internal,
        Self::DeviceUnavailable,
        Self::KeyUnavailable,
        Self::Busy,
        Self::ClockSuspect,
        Self::AuditUnavailable,
        Self::StorageUnavailable,
        Self::ProviderFailed,
        Self::ProviderUnavailable,
    ];

    /// Status, name, title.
    #[expect(clippy::too_many_lines, reason = "a table: one row for each code")]
    const fn entry(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::Malformed => (StatusCode::BAD_REQUEST, "malformed", "The request cannot be read"),
            Self::Unauthenticated => (StatusCode::UNAUTHORIZED, "unauthenticated", "A credential is needed"),
            Self::InvalidToken => (StatusCode::UNAUTHORIZED, "invalid-token", "The token is not accepted"),
            Self::InsufficientScope => (StatusCode::FORBIDDEN, "insufficient-scope", "A right is missing"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "The method is not offered here")
            }
            Self::NameTaken => (StatusCode::CONFLICT, "name-taken", "The name is taken"),
            Self::IdempotencyInFlight => {
                (StatusCode::CONFLICT, "idempotency-in-flight", "The first request is not done yet")
            }
            Self::JobEnded => (StatusCode::CONFLICT, "job-ended", "The job has ended"),
            Self::NextPending => (StatusCode::CONFLICT, "next-pending", "A next key is pending"),
            Self::KeyRequired => (StatusCode::CONFLICT, "key-required", "It is the only key"),
            Self::OnlyPrevious => {
                (StatusCode::CONFLICT, "only-previous", "Only a previous key can be deleted")
            }
            Self::RotationInProgress => {
                (StatusCode::CONFLICT, "rotation-in-progress", "A key is being made already")
            }
            Self::TooManyKeys => (StatusCode::CONFLICT, "too-many-keys", "No more keys can be published"),
            Self::Quarantined => (StatusCode::CONFLICT, "quarantined", "Not before the restore is released"),
            Self::KeyNotCurrent => {
                (StatusCode::CONFLICT, "key-not-current", "The token names another key than the one in use")
            }
            Self::SigningRefused => {
                (StatusCode::FORBIDDEN, "signing-refused", "The signing policy does not allow this")
            }
            Self::NeedsReauthorization => {
                (StatusCode::CONFLICT, "needs-reauthorization", "The person has to authorise again")
            }
            Self::Expired => (StatusCode::GONE, "expired", "The secret has expired"),
            Self::VersionConflict => {
                (StatusCode::PRECONDITION_FAILED, "version-conflict", "The secret has changed")
            }
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "Too large"),
            Self::UnsupportedMediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "The content type is not accepted",
            ),
            Self::Invalid => (StatusCode::UNPROCESSABLE_ENTITY, "invalid", "A member is not valid"),
            Self::IdempotencyMismatch => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-mismatch",
                "The idempotency key belongs to another request",
            ),
            Self::PreconditionRequired => {
                (StatusCode::PRECONDITION_REQUIRED, "precondition-required", "If-Match is needed")
            }
            Self::DoesNotOpen => {
                (StatusCode::UNPROCESSABLE_ENTITY, "does-not-open", "The sealed value does not open here")
            }
            Self::RateLimited => (StatusCode::TOO_MANY_REQUESTS, "rate-limited", "Too many requests"),
            Self::Integrity => {
                (StatusCode::INTERNAL_SERVER_ERROR, "integrity", "A stored value failed its integrity check")
            }
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
            Self::DeviceUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "device-unavailable", "The security module does not answer")
            }
            Self::KeyUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "key-unavailable", "The key is missing or must not be used")
            }
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "Too much work is queued"),
            Self::ClockSuspect => {
                (StatusCode::SERVICE_UNAVAILABLE, "clock-suspect", "The clock has jumped; nothing is signed")
            }
            Self::AuditUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "audit-unavailable", "The audit log does not take records")
            }
            Self::StorageUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "storage-unavailable", "The database does not answer")
            }
            Self::ProviderFailed => {
                (StatusCode::BAD_GATEWAY, "provider-failed", "The identity provider refuses the connector")
            }
            Self::ProviderUnavailable => (
                StatusCode::SERVICE_UNAVAILABLE,
                "provider-unavailable",
                "The identity provider does not answer",
            ),
        }
    }

    pub(super) const fn status(self) -> StatusCode {
        self.entry().0
    }

    pub(super) const fn name(self) -> &'static str {
        self.entry().1
    }

    fn is_retryable(self) -> bool {
        matches!(self.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
            || matches!(self, Self::IdempotencyInFlight | Self::RotationInProgress)
    }
}

/// An error on its way to a client of the native API.
#[derive(Debug)]
pub(super) struct Problem {
    code: Code,
    detail: Option<String>,
    retry_after: Option<Duration>,
    scope: Option<&'static str>,
    /// What a program needs to do better next time.
    members: Vec<(&'static str, Value)>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Problem {
    pub(super) fn new(code: Code) -> Self {
        // Where nobody knows better, a second: shorter only makes a herd.
        // A key comes back by an operator's hand, everything else by itself.
        let wait = if code == Code::KeyUnavailable { 60 } else { 1 };
        let retry_after = code.is_retryable().then_some(Duration::from_secs(wait));
        Self { code, detail: None, retry_after, scope: None, members: Vec::new(), source: None }
    }

    /// A member of the request breaks a rule. `reason` never holds a value.
    pub(super) fn invalid(field: &str, reason: impl fmt::Display) -> Self {
        Self::new(Code::Invalid).detail(format!("{field}: {reason}"))
    }

    /// What actix itself answered with a bare status.
    pub(super) fn of_status(status: StatusCode) -> Self {
        Self::new(match status.as_u16() {
            404 => Code::NotFound,
            405 => Code::MethodNotAllowed,
            413 => Code::TooLarge,
            415 => Code::UnsupportedMediaType,
            400..=499 => Code::Malformed,
            _ => Code::Internal,
        })
    }

    pub(super) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub(super) fn member(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.members.push((name, value.into()));
        self
    }

    pub(super) fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    pub(super) fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    pub(super) fn code(&self) -> Code {
        self.code
    }

    /// When the same request may succeed.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The cause and its causes, for the log; never for the client.
    pub(super) fn cause_chain(&self) -> Option<String> {
        self.source.as_deref().map(|source| chain(source))
    }

    /// The body for one item of a batch: no request id, it is the batch's.
    pub(super) fn item(&self) -> Value {
        let (status, code, title) = self.code.entry();
        let mut body = json!({ "status": status.as_u16(), "code": code, "title": title });
        self.add_detail(&mut body);
        body["retryable"] = json!(self.code.is_retryable());
        body
    }

    pub(super) fn body(&self, request: &RequestId, path: &str) -> Value {
        let (status, code, title) = self.code.entry();
        let mut body =
            json!({ "type": format!("urn:lacre:problem:{code}"), "title": title, "status": status.as_u16() });
        self.add_detail(&mut body);
        body["instance"] = json!(path);
        body["code"] = json!(code);
        body["request_id"] = json!(request);
        body["retryable"] = json!(self.code.is_retryable());
        body
    }

    pub(super) fn put_headers(&self, headers: &mut HeaderMap) {
        if let Some(wait) = self.retry_after {
            let whole = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(whole.max(1)));
        }
        let challenge = match (self.code, self.scope) {
            (Code::Unauthenticated, _) => "Bearer realm=\"lacre\"".to_owned(),
            (Code::InvalidToken, _) => "Bearer realm=\"lacre\", error=\"invalid_token\"".to_owned(),
            (Code::InsufficientScope, Some(scope)) => {
                format!("Bearer realm=\"lacre\", error=\"insufficient_scope\", scope=\"{scope}\"")
            }
            _ => return,
        };
        if let Ok(value) = HeaderValue::try_from(challenge) {
            headers.insert(header::WWW_AUTHENTICATE, value);
        }
    }

    fn add_detail(&self, body: &mut Value) {
        if let Some(detail) = self.detail.as_deref().filter(|_| self.code.status().is_client_error()) {
            body["detail"] = json!(detail);
        }
        for (name, value) in &self.members {
            body[*name] = value.clone();
        }
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.name())
    }
}

impl StdError for Problem {}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.code.status()
    }

    // The body needs the request id and the path, which only `observe` knows: it writes it.
    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::new(self.status_code());
        self.put_headers(response.headers_mut());
        response
    }
}

/// A query string that does not parse.
pub(super) fn bad_query(error: &QueryPayloadError) -> Problem {
    match error {
        // The text names members and their expected types; values stay out of it.
        QueryPayloadError::Deserialize(inner) if inner.to_string().starts_with("unknown field") => {
            Problem::new(Code::Invalid).detail("query: a parameter is not known here")
        }
        _ => Problem::new(Code::Invalid).detail("query: a parameter has a wrong form"),
    }
}

impl From<MissingScope> for Problem {
    fn from(missing: MissingScope) -> Self {
        let mut problem = Self::new(Code::InsufficientScope).detail(missing.to_string());
        problem.scope = Some(missing.0.name());
        problem
    }
}

impl From<AuditError> for Problem {
    fn from(error: AuditError) -> Self {
        match error {
            AuditError::Forbidden(missing) => missing.into(),
            AuditError::NotLocal => Self::new(Code::InsufficientScope).detail(error.to_string()),
            AuditError::Unavailable => Self::new(Code::AuditUnavailable).caused_by(error),
            AuditError::Read(_) => Self::new(Code::StorageUnavailable).caused_by(error),
        }
    }
}

impl From<VaultError> for Problem {
    fn from(error: VaultError) -> Self {
        let code = match error {
            VaultError::Forbidden(missing) => return missing.into(),
            VaultError::Audit(error) => return error.into(),
            VaultError::Seal(_) => return sealing(error),
            // Only what was not done and may work later is an outage: who repeats the rest may do it twice.
            VaultError::Db(_) => outage_of(error.audit_code()),
            VaultError::Integrity => Code::Integrity,
            VaultError::NotFound(_) => Code::NotFound,
            VaultError::NameTaken => Code::NameTaken,
            VaultError::VersionConflict { .. } => Code::VersionConflict,
            VaultError::Invalid { .. } => Code::Invalid,
            VaultError::TooLarge { .. } => Code::TooLarge,
            VaultError::Expired => Code::Expired,
            VaultError::IdempotencyMismatch => Code::IdempotencyMismatch,
            VaultError::DoesNotOpen => Code::DoesNotOpen,
            VaultError::IdempotencyInFlight => Code::IdempotencyInFlight,
            VaultError::JobEnded => Code::JobEnded,
            VaultError::Quarantined => Code::Quarantined,
        };
        let text = error.to_string();
        if code.status().is_server_error() {
            Self::new(code).caused_by(error)
        } else {
            Self::new(code).detail(text)
        }
    }
}

fn sealing(error: VaultError) -> Problem {
    let VaultError::Seal(cause) = &error else { return Problem::new(Code::Internal).caused_by(error) };
    let wait = cause.retry_after();
    let code = outage_of(error.audit_code());
    let problem = Problem::new(code).caused_by(error);
    match wait {
        Some(wait) => problem.retry_after(wait),
        None => problem,
    }
}

impl From<IssuerError> for Problem {
    fn from(error: IssuerError) -> Self {
        let code = match error {
            IssuerError::Forbidden(missing) => return missing.into(),
            IssuerError::Audit(error) => return error.into(),
            IssuerError::Tokens(error) => return error.into(),
            IssuerError::Refused(NotSigned::NoPolicy(_) | NotSigned::Beyond { .. }) => Code::SigningRefused,
            IssuerError::Keys(KeysError::NotCurrent { ref kid, alg }) => {
                let problem = Self::new(Code::KeyNotCurrent).member("kid", kid.as_str()).member("alg", alg);
                return problem.detail(error.to_string());
            }
            IssuerError::NotFound | IssuerError::NoSuchUser => Code::NotFound,
            IssuerError::InvalidClient => Code::Unauthenticated,
            IssuerError::Invalid { .. }
            | IssuerError::Refused(NotSigned::Malformed { .. })
            | IssuerError::InvalidScope
            | IssuerError::InvalidTarget
            | IssuerError::InvalidGrant(_)
            | IssuerError::UnauthorizedClient
            | IssuerError::UnsupportedGrantType => Code::Invalid,
            IssuerError::Keys(_) | IssuerError::Db(_) => outage_of(error.audit_code()),
        };
        let text = error.to_string();
        if code.status().is_server_error() {
            Self::new(code).caused_by(error)
        } else {
            Self::new(code).detail(text)
        }
    }
}

impl From<KeysError> for Problem {
    fn from(error: KeysError) -> Self {
        let (code, text) = (outage_of(error.audit_code()), error.to_string());
        match error {
            KeysError::Forbidden(missing) => missing.into(),
            KeysError::Audit(error) => error.into(),
            KeysError::Refused(refusal) => refusal.into(),
            KeysError::Invalid { .. } => Self::new(Code::Invalid).detail(text),
            KeysError::Quarantined => Self::new(Code::Quarantined).detail(text),
            error => match &error {
                KeysError::Seal(cause) if cause.retry_after().is_some() => {
                    let wait = cause.retry_after().unwrap_or_default();
                    Self::new(code).retry_after(wait).caused_by(error)
                }
                _ => Self::new(code).caused_by(error),
            },
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NextPending => Self::new(Code::NextPending).detail("cancel it first, or give a grace"),
            Refusal::NoNext => Self::new(Code::NotFound).detail("no next key is pending"),
            Refusal::NoPrevious => Self::new(Code::NotFound).detail("there is no previous key"),
            Refusal::KeyRequired => Self::new(Code::KeyRequired),
            Refusal::NotFound => Self::new(Code::NotFound),
            Refusal::OnlyPrevious => Self::new(Code::OnlyPrevious),
            Refusal::Busy => Self::new(Code::RotationInProgress),
            Refusal::NotYet { retry_at } => Self::new(Code::RotationInProgress)
                .detail(format!("verifiers know the previous key at {retry_at}")),
            Refusal::TooMany { retry_at } => {
                Self::new(Code::TooManyKeys).detail(format!("the first of them may go at {retry_at}"))
            }
        }
    }
}

/// The code for an error of a lower layer, by the name it has in the audit log.
pub(super) fn outage_of(audit_code: &str) -> Code {
    match audit_code {
        "device-unavailable" => Code::DeviceUnavailable,
        "key-missing" | "key-unfit" => Code::KeyUnavailable,
        "busy" => Code::Busy,
        "clock-suspect" => Code::ClockSuspect,
        "audit-unavailable" => Code::AuditUnavailable,
        "storage-failed" => Code::StorageUnavailable,
        _ => Code::Internal,
    }
}

impl From<BearerError> for Problem {
    fn from(error: BearerError) -> Self {
        match error {
            BearerError::Invalid(_) => Self::new(Code::InvalidToken),
            BearerError::Unavailable(cause) => match cause {
                // Not the client's doing, so never a 401: its token may be good.
                IssuerError::NotFound | IssuerError::InvalidClient => Self::new(Code::InvalidToken),
                cause => Self::new(outage_of(cause.audit_code())).caused_by(cause),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Scope;

    #[test]
    fn a_5xx_never_explains_itself() {
        let problem = Problem::new(Code::Internal).detail("table secrets").caused_by(fmt::Error);
        let body = problem.body(&RequestId::generate(), "/v1/secrets");

        assert!(!body.to_string().contains("table"), "{body}");
        assert!(problem.cause_chain().is_some());
    }

    #[test]
    fn every_body_has_the_members_of_the_documentation() {
        for code in Code::ALL {
            let body = Problem::new(code).body(&RequestId::generate(), "/v1/x");
            for member in ["type", "title", "status", "instance", "code", "request_id", "retryable"] {
                assert!(!body[member].is_null(), "{code:?} lacks {member}");
            }
        }
    }

    #[test]
    fn a_missing_scope_is_named_in_the_challenge() {
        let problem = Problem::from(MissingScope(Scope::SecretsRead));
        let response = problem.error_response();

        let challenge = response.headers().get(header::WWW_AUTHENTICATE).unwrap().to_str().unwrap();
        assert!(challenge.contains("error=\"insufficient_scope\", scope=\"secrets:read\""), "{challenge}");
    }

    #[test]
    fn waiting_is_told_in_whole_seconds_and_never_as_zero() {
        for (wait, told) in [(Duration::from_millis(20), "1"), (Duration::from_millis(2500), "3")] {
            let response = Problem::new(Code::Busy).retry_after(wait).error_response();
            assert_eq!(response.headers().get(header::RETRY_AFTER).unwrap(), told);
        }
    }

    #[test]
    fn every_code_is_documented() {
        let api = include_str!("../../docs/api.md");
        for code in Code::ALL {
            let row = format!("| `{}` | {} |", code.name(), code.status().as_u16());
            assert!(api.contains(&row), "docs/api.md lacks {row}");
        }
    }
}
