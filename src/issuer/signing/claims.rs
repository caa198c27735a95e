//! Why something is not signed, and what the decisions about tokens share. Pure.

use serde_json::{Map, Value};

use crate::clock::Timestamp;

/// Claims that only Lacre sets in a token of its own (RFC 7519, section 4.1).
pub(super) const RESERVED: [&str; 4] = ["iss", "iat", "exp", "jti"];

/// How far a client's clock may be away.
pub(super) const SKEW: i64 = 60;

/// Audiences of one token.
const AUDIENCES_MAX: usize = 16;

/// Longest text of a claim that a record has; the log's own limit is higher.
const RECORDED_MAX: usize = 128;

/// Why something is not signed. Names rules and members, never what stands in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSigned {
    /// Nobody has said that this caller may have such things signed.
    #[error("there is no signing policy for this: {0}")]
    NoPolicy(&'static str),
    /// The policy does not allow it.
    #[error("{field}: {reason}")]
    Beyond {
        /// Which member.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It is not what the route signs.
    #[error("{field}: {reason}")]
    Malformed {
        /// Which member.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl NotSigned {
    /// The name in the audit log.
    pub(crate) const fn code(self) -> &'static str {
        match self {
            Self::NoPolicy(_) => "no-signing-policy",
            Self::Beyond { .. } => "beyond-signing-policy",
            Self::Malformed { .. } => "malformed-token",
        }
    }
}

pub(super) const fn beyond(field: &'static str, reason: &'static str) -> NotSigned {
    NotSigned::Beyond { field, reason }
}

pub(super) const fn malformed(field: &'static str, reason: &'static str) -> NotSigned {
    NotSigned::Malformed { field, reason }
}

/// Who Lacre is: what no application may say in its place.
#[derive(Clone, Copy)]
pub(super) struct Own<'a> {
    pub(super) issuer: &'a str,
    pub(super) api: &'a str,
}

/// A whole number of seconds: a text is none, nor is `1e9`. CVE-2026-25537 was a reader that took a claim of
/// another type for an absent one.
pub(super) fn integer(claims: &Map<String, Value>, name: &'static str) -> Result<Option<i64>, NotSigned> {
    match claims.get(name) {
        None => Ok(None),
        Some(value) => value.as_i64().map(Some).ok_or(malformed(name, "must be a whole number of seconds")),
    }
}

pub(super) fn text<'a>(
    claims: &'a Map<String, Value>,
    name: &'static str,
) -> Result<Option<&'a str>, NotSigned> {
    match claims.get(name) {
        None => Ok(None),
        Some(value) => value.as_str().map(Some).ok_or(malformed(name, "must be a text")),
    }
}

/// The audiences of a token, which are `allowed` (absent: all), and never Lacre's own API: such a token would be
/// an access token for it.
pub(super) fn check_audience(
    claims: &Map<String, Value>,
    allowed: Option<&[String]>,
    own: Own<'_>,
) -> Result<(), NotSigned> {
    const FORM: NotSigned = malformed("aud", "must be a text or a list of 1 to 16 texts");
    let audiences = match claims.get("aud") {
        None if allowed.is_none() => return Ok(()),
        None => return Err(beyond("aud", "is needed")),
        Some(Value::Array(list)) => {
            let texts: Option<Vec<_>> = list.iter().map(Value::as_str).collect();
            texts.filter(|texts| (1..=AUDIENCES_MAX).contains(&texts.len())).ok_or(FORM)?
        }
        Some(one) => vec![one.as_str().ok_or(FORM)?],
    };
    if audiences.contains(&own.api) {
        return Err(beyond("aud", "is Lacre's own API"));
    }
    match allowed {
        Some(allowed) if !audiences.iter().all(|one| allowed.iter().any(|known| known == one)) => {
            Err(beyond("aud", "is not in the policy"))
        }
        _ => Ok(()),
    }
}

/// `nbf`, which is no reason to keep a token for later (a key may be gone by then) and ends before the token.
pub(super) fn check_not_before(
    claims: &Map<String, Value>,
    exp: i64,
    now: Timestamp,
) -> Result<(), NotSigned> {
    match integer(claims, "nbf")? {
        Some(nbf) if nbf < now.as_secs() - SKEW => Err(malformed("nbf", "lies in the past")),
        Some(nbf) if nbf >= exp => Err(malformed("nbf", "must be before exp")),
        _ => Ok(()),
    }
}

/// As much of a text as a record has.
pub(super) fn recorded(text: &str) -> &str {
    &text[..text.floor_char_boundary(RECORDED_MAX)]
}
