//! What an application may have signed, as data. Pure.
//!
//! A [`SigningPolicy`] has been checked, whatever it was read from: a request, the database, the
//! configuration file. What it does not name is not allowed, and so is a whole section that is not there.

use serde::{Deserialize, Serialize};

use super::claims;

/// Names of one list.
const ENTRIES_MAX: usize = 64;
/// An issuer, an audience, a pattern.
const TEXT_MAX: usize = 512;
/// A claim's or a media type's name.
const NAME_MAX: usize = 64;
/// Keys stay published for as long as what they signed lives.
const LIFETIME_MAX: u64 = 365 * 24 * 3600;

/// A policy as it was written, before anybody has looked at it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SigningForm {
    /// Tokens that Lacre makes and signs in its own name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt: Option<JwtRules>,
    /// Tokens that the application has made in the name of an issuer of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jws: Option<JwsRules>,
    /// Cookies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cookies: Option<CookieRules>,
}

/// See [`SigningForm::jwt`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtRules {
    /// What `typ` may be.
    pub types: Vec<String>,
    /// Seconds.
    pub max_lifetime: u64,
    /// What `aud` may hold; it is never absent.
    pub audiences: Vec<String>,
    /// What `sub` may be.
    pub subjects: Subjects,
    /// Names that may be there beside `sub`, `aud` and `nbf`; absent: all but Lacre's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claims: Option<Vec<String>>,
}

/// See [`SigningForm::jws`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwsRules {
    /// What `iss` may be; never Lacre's own.
    pub issuers: Vec<String>,
    /// What `typ` may be; the empty text stands for none.
    pub types: Vec<String>,
    /// Seconds.
    pub max_lifetime: u64,
    /// What `aud` may hold; absent: anything, and nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audiences: Option<Vec<String>>,
}

/// See [`SigningForm::cookies`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CookieRules {
    /// Names; a `*` at the end stands for any end.
    pub names: Vec<Pattern>,
    /// Seconds.
    pub max_age: u64,
}

/// Which subjects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Subjects {
    /// All, and none.
    Any(AnySubject),
    /// These; a `*` at the end stands for any end.
    These(Vec<Pattern>),
}

/// The word `any`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnySubject {
    /// `any`.
    #[serde(rename = "any")]
    Any,
}

impl Subjects {
    pub(super) fn allow(&self, subject: Option<&str>) -> bool {
        match (self, subject) {
            (Self::Any(_), _) => true,
            (Self::These(patterns), Some(subject)) => patterns.iter().any(|pattern| pattern.fits(subject)),
            (Self::These(_), None) => false,
        }
    }
}

/// A text, or the beginning of one with `*` behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pattern(String);

impl Pattern {
    pub(super) fn fits(&self, text: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => text.starts_with(beginning),
            None => self.0 == text,
        }
    }

    fn is_well_formed(&self) -> bool {
        let beginning = self.0.strip_suffix('*').unwrap_or(&self.0);
        is_text(beginning) && !beginning.contains('*')
    }
}

/// A policy that follows the rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "SigningForm", into = "SigningForm")]
pub struct SigningPolicy(SigningForm);

/// Which member of a policy breaks which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct BadPolicy {
    /// The member's path.
    pub field: &'static str,
    /// The rule.
    pub reason: &'static str,
}

impl SigningPolicy {
    pub(super) const fn jwt(&self) -> Option<&JwtRules> {
        self.0.jwt.as_ref()
    }

    pub(super) const fn jws(&self) -> Option<&JwsRules> {
        self.0.jws.as_ref()
    }

    pub(super) const fn cookies(&self) -> Option<&CookieRules> {
        self.0.cookies.as_ref()
    }

    /// Whether tokens are spoken of.
    pub(crate) const fn has_tokens(&self) -> bool {
        self.0.jwt.is_some() || self.0.jws.is_some()
    }

    /// Whether cookies are spoken of.
    pub(crate) const fn has_cookies(&self) -> bool {
        self.0.cookies.is_some()
    }

    /// Whether nothing may be signed.
    pub const fn is_empty(&self) -> bool {
        !self.has_tokens() && !self.has_cookies()
    }

    /// The sections that are there, for the record.
    pub(crate) fn sections(&self) -> String {
        let sections =
            [("jwt", self.0.jwt.is_some()), ("jws", self.0.jws.is_some()), ("cookies", self.has_cookies())];
        let present: Vec<_> = sections.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
        present.join(" ")
    }

    /// Whether the policy would allow what `issuer` alone may say: tokens in its name, or for its API. They
    /// would be accepted as its own.
    pub(crate) fn impersonates(&self, issuer: &str, api: &str) -> Option<BadPolicy> {
        let bad = |field, reason| Some(BadPolicy { field, reason });
        if self.0.jws.as_ref().is_some_and(|rules| rules.issuers.iter().any(|one| one == issuer)) {
            return bad("signing.jws.issuers", "must not have Lacre's own issuer");
        }
        let is_api = |audiences: &[String]| audiences.iter().any(|one| one == api);
        if self.0.jwt.as_ref().is_some_and(|rules| is_api(&rules.audiences)) {
            return bad("signing.jwt.audiences", "must not have Lacre's own API");
        }
        if self.0.jws.as_ref().is_some_and(|rules| rules.audiences.as_deref().is_some_and(is_api)) {
            return bad("signing.jws.audiences", "must not have Lacre's own API");
        }
        None
    }
}

impl From<SigningPolicy> for SigningForm {
    fn from(policy: SigningPolicy) -> Self {
        policy.0
    }
}

impl TryFrom<SigningForm> for SigningPolicy {
    type Error = BadPolicy;

    fn try_from(form: SigningForm) -> Result<Self, BadPolicy> {
        if let Some(jwt) = &form.jwt {
            check_jwt(jwt)?;
        }
        if let Some(jws) = &form.jws {
            check_jws(jws)?;
        }
        if let Some(cookies) = &form.cookies {
            check_cookies(cookies)?;
        }
        Ok(Self(form))
    }
}

fn check_jwt(rules: &JwtRules) -> Result<(), BadPolicy> {
    list("signing.jwt.types", &rules.types, "needs 1 to 64 types of 1 to 64 characters", |typ| is_type(typ))?;
    seconds("signing.jwt.max_lifetime", rules.max_lifetime)?;
    list("signing.jwt.audiences", &rules.audiences, TEXTS, |text| is_text(text))?;
    if let Subjects::These(patterns) = &rules.subjects {
        list("signing.jwt.subjects", patterns, PATTERNS, Pattern::is_well_formed)?;
    }
    let Some(names) = rules.claims.as_deref().filter(|names| !names.is_empty()) else { return Ok(()) };
    let reason = "needs at most 64 names of 1 to 64 characters, none of them iss, iat, exp or jti";
    let is_claim =
        |name: &String| is_text(name) && name.len() <= NAME_MAX && !claims::RESERVED.contains(&name.as_str());
    list("signing.jwt.claims", names, reason, is_claim)
}

fn check_jws(rules: &JwsRules) -> Result<(), BadPolicy> {
    list("signing.jws.issuers", &rules.issuers, TEXTS, |text| is_text(text))?;
    let reason = "needs 1 to 64 types of at most 64 characters";
    list("signing.jws.types", &rules.types, reason, |typ| typ.is_empty() || is_type(typ))?;
    seconds("signing.jws.max_lifetime", rules.max_lifetime)?;
    match &rules.audiences {
        Some(audiences) => list("signing.jws.audiences", audiences, TEXTS, |text| is_text(text)),
        None => Ok(()),
    }
}

fn check_cookies(rules: &CookieRules) -> Result<(), BadPolicy> {
    list("signing.cookies.names", &rules.names, PATTERNS, Pattern::is_well_formed)?;
    seconds("signing.cookies.max_age", rules.max_age)
}

const TEXTS: &str = "needs 1 to 64 texts of 1 to 512 characters";
const PATTERNS: &str = "needs 1 to 64 texts of 1 to 512 characters; * may stand behind one, not alone";

fn list<T>(
    field: &'static str,
    entries: &[T],
    reason: &'static str,
    is_good: impl Fn(&T) -> bool,
) -> Result<(), BadPolicy> {
    let fits = (1..=ENTRIES_MAX).contains(&entries.len()) && entries.iter().all(is_good);
    fits.then_some(()).ok_or(BadPolicy { field, reason })
}

fn seconds(field: &'static str, value: u64) -> Result<(), BadPolicy> {
    let fits = (1..=LIFETIME_MAX).contains(&value);
    fits.then_some(()).ok_or(BadPolicy { field, reason: "must be 1 to 31536000 seconds" })
}

fn is_text(text: &str) -> bool {
    (1..=TEXT_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

/// RFC 6838, section 4.2, with the slash of a whole media type.
fn is_type(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&-^_.+/".contains(&byte);
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn whole() -> Value {
        json!({
            "jwt": { "types": ["JWT", "at+jwt"], "max_lifetime": 3600, "audiences": ["https://api.example"],
                     "subjects": ["user-*", "root"], "claims": ["email"] },
            "jws": { "issuers": ["https://idp.example"], "types": ["JWT", "at+jwt", "logout+jwt", ""],
                     "max_lifetime": 86400, "audiences": ["a"] },
            "cookies": { "names": ["_session", "_interaction*"], "max_age": 1_209_600 },
        })
    }

    fn read(value: &Value) -> Result<SigningPolicy, String> {
        serde_json::from_value(value.clone()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_policy_comes_back_as_it_was_written() {
        for value in [whole(), json!({}), json!({ "cookies": whole()["cookies"] })] {
            assert_eq!(serde_json::to_value(read(&value).unwrap()).unwrap(), value);
        }
        let mut any = whole();
        any["jwt"]["subjects"] = json!("any");
        assert_eq!(serde_json::to_value(read(&any).unwrap()).unwrap(), any);
        assert!(read(&json!({})).unwrap().is_empty());
        assert_eq!(read(&whole()).unwrap().sections(), "jwt jws cookies");
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        let long = "x".repeat(513);
        for (pointer, value, wanted) in [
            ("/jwt/types", json!([]), "signing.jwt.types"),
            ("/jwt/types", json!([""]), "signing.jwt.types"),
            ("/jwt/types", json!(["a b"]), "signing.jwt.types"),
            ("/jwt/types", json!(vec!["a"; 65]), "signing.jwt.types"),
            ("/jwt/max_lifetime", json!(0), "signing.jwt.max_lifetime"),
            ("/jwt/max_lifetime", json!(31_536_001), "signing.jwt.max_lifetime"),
            ("/jwt/audiences", json!([]), "signing.jwt.audiences"),
            ("/jwt/audiences", json!([long]), "signing.jwt.audiences"),
            ("/jwt/audiences", json!(["a\nb"]), "signing.jwt.audiences"),
            ("/jwt/subjects", json!([]), "signing.jwt.subjects"),
            ("/jwt/subjects", json!(["*"]), "signing.jwt.subjects"),
            ("/jwt/subjects", json!(["a*b"]), "signing.jwt.subjects"),
            ("/jwt/subjects", json!("all"), "data did not match"),
            ("/jwt/claims", json!(["exp"]), "signing.jwt.claims"),
            ("/jwt/claims", json!([""]), "signing.jwt.claims"),
            ("/jws/issuers", json!([]), "signing.jws.issuers"),
            ("/jws/types", json!([]), "signing.jws.types"),
            ("/jws/max_lifetime", json!("1"), "invalid type"),
            ("/jws/max_lifetime", json!(1.5), "invalid type"),
            ("/jws/audiences", json!([]), "signing.jws.audiences"),
            ("/cookies/names", json!(["*"]), "signing.cookies.names"),
            ("/cookies/max_age", json!(0), "signing.cookies.max_age"),
            ("/cookies/max_age", json!(-1), "invalid value"),
        ] {
            let mut changed = whole();
            *changed.pointer_mut(pointer).unwrap() = value.clone();
            let error = read(&changed).unwrap_err();
            assert!(error.starts_with(wanted), "{pointer} = {value}: {error}");
        }
        for unknown in ["/jwt", "/jws", "/cookies", ""] {
            let mut changed = whole();
            changed.pointer_mut(unknown).unwrap()["more"] = json!(1);
            assert!(read(&changed).unwrap_err().contains("unknown field"), "{unknown}");
        }
    }

    #[test]
    fn no_policy_speaks_in_the_issuers_own_name() {
        let policy = read(&whole()).unwrap();
        assert_eq!(policy.impersonates("https://lacre", "https://lacre/api"), None);
        assert!(policy.impersonates("https://idp.example", "x").is_some());
        assert!(policy.impersonates("x", "https://api.example").is_some());
        assert!(policy.impersonates("x", "a").is_some());
    }

    #[test]
    fn a_pattern_is_a_text_or_a_beginning() {
        let fits = |pattern: &str, text| Pattern(pattern.to_owned()).fits(text);
        assert!(fits("user-*", "user-1") && fits("user-*", "user-") && fits("root", "root"));
        assert!(
            !fits("user-*", "user") && !fits("root", "root2") && !fits("root", "") && !fits("Root", "root")
        );
    }
}
