//! What a provider's refusal means for whoever asked.
//!
//! Only [`classify`] decides it, from the status and the error code. A provider's words go nowhere: a code is kept
//! if it looks like one, a description never.

use std::time::Duration;

use super::exchange::{Answer, Failure};
use super::strict::{Members, Unreadable};

/// Sorted by who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The operator: client credentials, an address, a registration. Every user of the connector is affected.
    Config,
    /// The user: this grant is over, and only a new authorisation helps.
    GrantDead,
    /// Nobody: it may work later.
    Transient,
    /// The provider, or this program: they do not speak the same protocol.
    Protocol,
    /// Whoever rules at the provider: it knows the client and the grant and still refuses.
    Policy,
}

/// Why the provider gave no token (or no answer to another question).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", match self.was_sent {
    // The text of `Failure`: what is forbidden reads like what is not there.
    false => "the provider cannot be reached",
    true => "the provider refused, or its answer cannot be used",
})]
pub struct TokenFailure {
    /// Who has to act.
    pub class: Class,
    /// The provider's error code, if it sent one that looks like one.
    pub code: Option<String>,
    /// The status, if there was an answer.
    pub status: Option<u16>,
    /// How long the provider wants to be left alone.
    pub retry_after: Option<Duration>,
    /// One word for the audit log.
    pub reason: &'static str,
    /// Whether the provider may have received the request.
    pub was_sent: bool,
}

impl TokenFailure {
    /// Found out here, before anything was sent.
    pub(super) fn before(class: Class, reason: &'static str) -> Self {
        Self { class, code: None, status: None, retry_after: None, reason, was_sent: false }
    }

    /// An answer that came and is not accepted.
    pub(super) fn after(class: Class, reason: &'static str) -> Self {
        Self { was_sent: true, ..Self::before(class, reason) }
    }

    /// A refusal.
    pub(super) fn refused(answer: &Answer, code: Option<String>) -> Self {
        let (class, reason) = classify(answer.status, code.as_deref());
        let (status, retry_after) = (Some(answer.status), answer.retry_after);
        Self { class, code, status, retry_after, reason, was_sent: true }
    }
}

impl From<Failure> for TokenFailure {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Blocked => Self::before(Class::Config, "blocked"),
            Failure::NotSent(reason @ "header") => Self::before(Class::Protocol, reason),
            Failure::NotSent(reason) => Self::before(Class::Transient, reason),
            Failure::Lost(reason) => Self::after(Class::Transient, reason),
            Failure::BadAnswer(reason) => Self::after(Class::Protocol, reason),
        }
    }
}

impl From<Unreadable> for TokenFailure {
    fn from(Unreadable(reason): Unreadable) -> Self {
        Self::after(Class::Protocol, reason)
    }
}

/// The class of a refusal and a word for it. A server that says of itself that it is not well is not believed
/// anything else it says.
fn classify(status: u16, code: Option<&str>) -> (Class, &'static str) {
    match status {
        429 => return (Class::Transient, "rate-limit"),
        408 | 425 | 500..=599 => return (Class::Transient, "server"),
        300..=399 => return (Class::Config, "redirect"),
        _ => {}
    }
    code.and_then(classify_code).unwrap_or(match status {
        401 => (Class::Config, "client"),
        403 => (Class::Policy, "policy"),
        404 | 405 | 410 => (Class::Config, "endpoint"),
        _ => (Class::Protocol, "status"),
    })
}

/// The codes of RFC 6749, RFC 6750, RFC 8628, OpenID Connect Core, and GitHub's.
fn classify_code(code: &str) -> Option<(Class, &'static str)> {
    Some(match code {
        "invalid_grant"
        | "bad_refresh_token"
        | "expired_token"
        | "token_expired"
        | "bad_verification_code"
        | "unverified_user_email" => (Class::GrantDead, "grant"),
        "invalid_client"
        | "unauthorized_client"
        | "incorrect_client_credentials"
        | "redirect_uri_mismatch" => (Class::Config, "client"),
        "access_denied" | "interaction_required" | "consent_required" | "login_required" => {
            (Class::Policy, "policy")
        }
        "temporarily_unavailable" | "server_error" | "slow_down" => (Class::Transient, "server"),
        "invalid_request" | "unsupported_grant_type" | "invalid_scope" => (Class::Protocol, "request"),
        _ => return None,
    })
}

/// The error code of an answer, if it has one that looks like a code.
pub(super) fn error_code(members: &Members) -> Option<String> {
    let code = members.read::<String>("error").ok()??.to_ascii_lowercase();
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_.-".contains(&byte);
    ((1..=64).contains(&code.len()) && code.bytes().all(allowed)).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::Class::*;
    use super::*;

    #[test]
    fn a_refusal_has_one_meaning() {
        for (status, code, expected) in [
            (400, "invalid_grant", GrantDead),
            (401, "invalid_grant", GrantDead),
            (403, "invalid_grant", GrantDead),
            (200, "bad_refresh_token", GrantDead),
            (200, "bad_verification_code", GrantDead),
            (200, "unverified_user_email", GrantDead),
            (400, "expired_token", GrantDead),
            (400, "invalid_client", Config),
            (401, "invalid_client", Config),
            (400, "unauthorized_client", Config),
            (200, "incorrect_client_credentials", Config),
            (200, "redirect_uri_mismatch", Config),
            (401, "", Config),
            (401, "who_knows", Config),
            (404, "", Config),
            (405, "", Config),
            (410, "", Config),
            (301, "", Config),
            (302, "invalid_grant", Config),
            (307, "", Config),
            (308, "", Config),
            (400, "invalid_request", Protocol),
            (400, "unsupported_grant_type", Protocol),
            (400, "invalid_scope", Protocol),
            (400, "", Protocol),
            (400, "who_knows", Protocol),
            (200, "who_knows", Protocol),
            (415, "", Protocol),
            (403, "", Policy),
            (400, "access_denied", Policy),
            (400, "interaction_required", Policy),
            (400, "consent_required", Policy),
            (400, "login_required", Policy),
            (408, "", Transient),
            (425, "", Transient),
            (429, "", Transient),
            (429, "invalid_grant", Transient),
            (500, "", Transient),
            (500, "invalid_grant", Transient),
            (502, "", Transient),
            (503, "invalid_client", Transient),
            (504, "", Transient),
            (400, "temporarily_unavailable", Transient),
            (400, "server_error", Transient),
            (200, "slow_down", Transient),
        ] {
            let found = classify(status, Some(code).filter(|code| !code.is_empty()));
            assert_eq!(found.0, expected, "{status} {code}");
        }
    }

    #[test]
    fn no_answer_says_whether_the_request_was_sent() {
        for (failure, class, was_sent) in [
            (Failure::Blocked, Config, false),
            (Failure::NotSent("tls-name"), Transient, false),
            (Failure::NotSent("header"), Protocol, false),
            (Failure::Lost("timeout"), Transient, true),
            (Failure::BadAnswer("too-large"), Protocol, true),
        ] {
            let found = TokenFailure::from(failure);
            assert_eq!((found.class, found.was_sent), (class, was_sent), "{failure:?}");
        }
        let text = |failure| TokenFailure::from(failure).to_string();
        assert_eq!(text(Failure::Blocked), text(Failure::NotSent("connect")));
        assert_eq!(text(Failure::Blocked), Failure::Blocked.to_string());
    }

    #[test]
    fn a_code_is_kept_only_if_it_looks_like_one() {
        let long = format!("{{\"error\":\"{}\"}}", "a".repeat(65));
        for (body, expected) in [
            (r#"{"error":"Invalid_Grant"}"#, Some("invalid_grant")),
            (r#"{"error":"AADSTS50173.x-1"}"#, Some("aadsts50173.x-1")),
            (r#"{"error":"the token s3cr3t is bad"}"#, None),
            (r#"{"error":"<script>"}"#, None),
            (r#"{"error":""}"#, None),
            (r#"{"error":{"code":190}}"#, None),
            (r#"{"error":null}"#, None),
            ("{}", None),
            (&long, None),
        ] {
            let members = Members::from_json(body.as_bytes()).unwrap();
            assert_eq!(error_code(&members).as_deref(), expected, "{body}");
        }
    }
}
