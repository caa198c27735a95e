//! `POST /v1/cookies/sign` and `/verify`: which cookies, for how long. Pure.

use std::time::Duration;

use super::claims::{NotSigned, beyond, malformed};
use super::policy::CookieRules;

/// RFC 6265, section 6.1: what every browser keeps of name and value together.
const COOKIE_MAX: usize = 4096;

/// A cookie to be signed.
#[derive(Clone, Debug)]
pub struct CookieRequest {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Seconds; absent: as long as the policy allows.
    pub max_age: Option<u64>,
}

/// A cookie that came back.
#[derive(Clone, Debug)]
pub struct CookieProof {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// What came as its signature.
    pub signature: String,
}

/// How long a cookie may be signed for.
pub(super) fn age(rules: &CookieRules, request: &CookieRequest) -> Result<Duration, NotSigned> {
    check(rules, &request.name, &request.value)?;
    match request.max_age {
        Some(0) => Err(malformed("max_age", "must be at least 1 second")),
        Some(age) if age > rules.max_age => Err(beyond("max_age", "is longer than the policy allows")),
        age => Ok(Duration::from_secs(age.unwrap_or(rules.max_age))),
    }
}

/// A name has no `=`, so what is signed (`name=value`) can be read in one way only.
pub(super) fn check(rules: &CookieRules, name: &str, value: &str) -> Result<(), NotSigned> {
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err(malformed("name", "is not a token (RFC 6265, section 4.1.1)"));
    }
    if name.len() + value.len() > COOKIE_MAX {
        return Err(malformed("value", "is longer than 4096 bytes together with the name"));
    }
    if !value.bytes().all(is_cookie_octet) {
        return Err(malformed("value", "has characters that a cookie cannot have (RFC 6265, section 4.1.1)"));
    }
    let is_allowed = rules.names.iter().any(|pattern| pattern.fits(name));
    is_allowed.then_some(()).ok_or(beyond("name", "is not in the policy"))
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_cookie_octet(byte: u8) -> bool {
    matches!(byte, 0x21 | 0x23..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn decide(name: &str, value: &str, max_age: Option<u64>) -> Result<Duration, NotSigned> {
        let rules = json!({ "names": ["_session", "_interaction*"], "max_age": 100 });
        let rules: CookieRules = serde_json::from_value(rules).unwrap();
        age(&rules, &CookieRequest { name: name.to_owned(), value: value.to_owned(), max_age })
    }

    #[test]
    fn a_cookie_has_a_name_of_the_policy_and_a_value_that_travels() {
        for (name, value, max_age, wanted) in [
            ("_session", "abc-_.~=", None, Ok(100)),
            ("_session", "", Some(1), Ok(1)),
            ("_interaction_resume", "x", Some(100), Ok(100)),
            ("_session", "x", Some(101), Err("max_age")),
            ("_session", "x", Some(0), Err("max_age")),
            ("_session.sig", "x", None, Err("name")),
            ("_Session", "x", None, Err("name")),
            ("", "x", None, Err("name")),
            ("_interaction=a", "x", None, Err("name")),
            ("_interaction a", "x", None, Err("name")),
            ("_interaction;", "x", None, Err("name")),
            ("_interactioné", "x", None, Err("name")),
            ("_session", "a;b", None, Err("value")),
            ("_session", "a b", None, Err("value")),
            ("_session", "a\"b", None, Err("value")),
            ("_session", "a,b", None, Err("value")),
            ("_session", "a\\b", None, Err("value")),
            ("_session", "a\r\nb", None, Err("value")),
            ("_session", "é", None, Err("value")),
        ] {
            let found = decide(name, value, max_age).map(|age| age.as_secs()).map_err(|error| match error {
                NotSigned::Beyond { field, .. } | NotSigned::Malformed { field, .. } => field,
                NotSigned::NoPolicy(_) => "policy",
            });
            assert_eq!(found, wanted, "{name} {value:?} {max_age:?}");
        }
        assert!(decide("_session", &"x".repeat(4089), None).is_err());
        assert!(decide("_session", &"x".repeat(4088), None).is_ok());
    }
}
