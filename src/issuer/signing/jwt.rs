//! `POST /v1/jwt`: a token in Lacre's own name, for an application that says what is in it. Pure.

use std::time::Duration;

use serde_json::{Map, Value};

use super::claims::{self, NotSigned, Own, RESERVED, beyond, malformed};
use super::json;
use super::policy::JwtRules;
use crate::clock::Timestamp;

/// Far above what fits into a request's header.
const CLAIMS_MAX: usize = 16 << 10;

/// What an application asks for.
#[derive(Clone, Copy, Debug)]
pub struct JwtRequest<'a> {
    /// The claims as JSON text.
    pub claims: &'a str,
    /// `typ`.
    pub typ: &'a str,
    /// Seconds.
    pub lifetime: u64,
}

/// A token that may be signed.
#[derive(Debug, PartialEq)]
pub(super) struct JwtOrder {
    pub(super) typ: String,
    pub(super) claims: Value,
    pub(super) jti: String,
    pub(super) subject: Option<String>,
    pub(super) lifetime: Duration,
    /// Seconds since the epoch.
    pub(super) expires: i64,
}

/// Decides whether a token is made, and makes all of it but the signature. The client's members keep their
/// order, between `iss` and Lacre's others.
pub(super) fn order(
    rules: &JwtRules,
    request: JwtRequest<'_>,
    own: Own<'_>,
    (jti, now): (String, Timestamp),
) -> Result<JwtOrder, NotSigned> {
    if !rules.types.iter().any(|typ| typ == request.typ) {
        return Err(beyond("type", "is not in the policy"));
    }
    if request.lifetime == 0 {
        return Err(malformed("lifetime", "must be at least 1 second"));
    }
    if request.lifetime > rules.max_lifetime {
        return Err(beyond("lifetime", "is longer than the policy allows"));
    }
    if request.claims.len() > CLAIMS_MAX {
        return Err(malformed("claims", "must be at most 16 KiB"));
    }
    let given = json::object(request.claims.as_bytes()).map_err(|reason| malformed("claims", reason))?;
    let lifetime = Duration::from_secs(request.lifetime);
    let expires = now.plus(lifetime).as_secs();
    check_claims(rules, &given, own)?;
    claims::check_not_before(&given, expires, now)?;

    let subject = given.get("sub").and_then(Value::as_str).map(str::to_owned);
    let mut all = Map::with_capacity(given.len() + 4);
    all.insert("iss".to_owned(), own.issuer.into());
    all.extend(given);
    all.insert("iat".to_owned(), now.as_secs().into());
    all.insert("exp".to_owned(), expires.into());
    all.insert("jti".to_owned(), jti.as_str().into());
    Ok(JwtOrder { typ: request.typ.to_owned(), claims: Value::Object(all), jti, subject, lifetime, expires })
}

fn check_claims(rules: &JwtRules, given: &Map<String, Value>, own: Own<'_>) -> Result<(), NotSigned> {
    if RESERVED.iter().any(|name| given.contains_key(*name)) {
        return Err(malformed("claims", "iss, iat, exp and jti are set by Lacre"));
    }
    if let Some(names) = &rules.claims {
        let is_allowed =
            |name: &String| ["sub", "aud", "nbf"].contains(&name.as_str()) || names.contains(name);
        if !given.keys().all(is_allowed) {
            return Err(beyond("claims", "one of them is not in the policy"));
        }
    }
    if !rules.subjects.allow(claims::text(given, "sub")?) {
        return Err(beyond("sub", "is not in the policy"));
    }
    claims::check_audience(given, Some(&rules.audiences), own)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::issuer::signing::policy::SigningPolicy;

    const NOW: i64 = 1_800_000_000;
    const OWN: Own<'static> = Own { issuer: "https://lacre/oidc", api: "https://default.lacre.local/api" };

    fn decide(policy: &Value, claims: &str, typ: &str, lifetime: u64) -> Result<JwtOrder, NotSigned> {
        let policy: SigningPolicy = serde_json::from_value(json!({ "jwt": policy })).unwrap();
        let at = ("the-jti".to_owned(), Timestamp::from_micros(NOW * 1_000_000 + 900_000));
        order(policy.jwt().unwrap(), JwtRequest { claims, typ, lifetime }, OWN, at)
    }

    fn policy() -> Value {
        json!({ "types": ["JWT", "at+jwt"], "max_lifetime": 3600, "audiences": ["a", "b"],
                "subjects": ["user-*"], "claims": ["email", "nested"] })
    }

    #[test]
    fn a_token_has_the_clients_claims_in_their_order_among_lacres_own() {
        let claims = r#"{"sub":"user-1","email":"a@b","aud":["a"],"nbf":1800000000}"#;
        let order = decide(&policy(), claims, "at+jwt", 300).unwrap();

        assert_eq!(
            order.claims.to_string(),
            r#"{"iss":"https://lacre/oidc","sub":"user-1","email":"a@b","aud":["a"],"nbf":1800000000,"iat":1800000000,"exp":1800000300,"jti":"the-jti"}"#
        );
        assert_eq!((order.expires, order.lifetime), (NOW + 300, Duration::from_secs(300)));
        assert_eq!((order.typ.as_str(), order.subject.as_deref()), ("at+jwt", Some("user-1")));
    }

    #[test]
    fn what_the_policy_does_not_name_is_refused() {
        for (claims, typ, lifetime, field) in [
            (r#"{"sub":"user-1","aud":"a"}"#, "logout+jwt", 300, "type"),
            (r#"{"sub":"user-1","aud":"a"}"#, "AT+JWT", 300, "type"),
            (r#"{"sub":"user-1","aud":"a"}"#, "", 300, "type"),
            (r#"{"sub":"user-1","aud":"a"}"#, "JWT", 3601, "lifetime"),
            (r#"{"sub":"user-1","aud":"a"}"#, "JWT", u64::MAX, "lifetime"),
            (r#"{"sub":"root","aud":"a"}"#, "JWT", 300, "sub"),
            (r#"{"aud":"a"}"#, "JWT", 300, "sub"),
            (r#"{"sub":"user-1"}"#, "JWT", 300, "aud"),
            (r#"{"sub":"user-1","aud":"c"}"#, "JWT", 300, "aud"),
            (r#"{"sub":"user-1","aud":["a","c"]}"#, "JWT", 300, "aud"),
            (r#"{"sub":"user-1","aud":"a","scope":"x"}"#, "JWT", 300, "claims"),
        ] {
            let found = decide(&policy(), claims, typ, lifetime);
            assert!(
                matches!(found, Err(NotSigned::Beyond { field: f, .. }) if f == field),
                "{claims}: {found:?}"
            );
        }
    }

    #[test]
    fn what_is_no_set_of_claims_is_refused() {
        let deep = format!(r#"{{"sub":"user-1","aud":"a","nested":"{}"}}"#, "x".repeat(CLAIMS_MAX));
        for (claims, field) in [
            ("[]", "claims"),
            (r#"{"sub":"user-1","aud":"a"} "#, "none"),
            (r#"{"sub":"user-1","sub":"user-2","aud":"a"}"#, "claims"),
            (r#"{"sub":"user-1","aud":"a","nested":{"a":1,"a":2}}"#, "claims"),
            (r#"{"sub":"user-1","aud":"a","iss":"https://lacre/oidc"}"#, "claims"),
            (r#"{"sub":"user-1","aud":"a","iat":1}"#, "claims"),
            (r#"{"sub":"user-1","aud":"a","exp":1900000000}"#, "claims"),
            (r#"{"sub":"user-1","aud":"a","jti":"x"}"#, "claims"),
            (r#"{"sub":"user-1","aud":"a","\u006ati":"x"}"#, "claims"),
            (r#"{"sub":1,"aud":"a"}"#, "sub"),
            (r#"{"sub":null,"aud":"a"}"#, "sub"),
            (r#"{"sub":"user-1","aud":[]}"#, "aud"),
            (r#"{"sub":"user-1","aud":[1]}"#, "aud"),
            (r#"{"sub":"user-1","aud":null}"#, "aud"),
            (r#"{"sub":"user-1","aud":{"a":1}}"#, "aud"),
            (r#"{"sub":"user-1","aud":"a","nbf":"1800000000"}"#, "nbf"),
            (r#"{"sub":"user-1","aud":"a","nbf":1800000000.5}"#, "nbf"),
            (r#"{"sub":"user-1","aud":"a","nbf":1799999939}"#, "nbf"),
            (r#"{"sub":"user-1","aud":"a","nbf":1800000300}"#, "nbf"),
            (r#"{"sub":"user-1","aud":"a","nbf":null}"#, "nbf"),
            (deep.as_str(), "claims"),
        ] {
            let found = decide(&policy(), claims, "JWT", 300);
            let named = match found {
                Err(NotSigned::Malformed { field, .. }) => field,
                Ok(_) => "none",
                Err(_) => "other",
            };
            assert_eq!(named, field, "{claims:.80}");
        }
        assert!(decide(&policy(), r#"{"sub":"user-1","aud":"a"}"#, "JWT", 0).is_err());
    }

    #[test]
    fn nobody_gets_an_access_token_for_lacre_itself() {
        let mut policy = policy();
        policy["audiences"] = json!(["a", OWN.api]);
        policy.as_object_mut().unwrap().remove("claims");
        policy["subjects"] = json!("any");
        for aud in [json!(OWN.api), json!(["a", OWN.api])] {
            for typ in ["at+jwt", "JWT"] {
                let claims = json!({ "sub": "app", "client_id": "app", "aud": aud, "scope": "apps:admin" });
                let found = decide(&policy, &claims.to_string(), typ, 60);
                assert_eq!(found, Err(beyond("aud", "is Lacre's own API")));
            }
        }
    }

    #[test]
    fn an_open_policy_leaves_claims_and_subject_to_the_client() {
        let policy = json!({ "types": ["JWT"], "max_lifetime": 60, "audiences": ["a"], "subjects": "any" });
        for claims in [r#"{"aud":"a"}"#, r#"{"aud":"a","sub":"x","anything":[1,{"b":null}]}"#] {
            assert!(decide(&policy, claims, "JWT", 60).is_ok(), "{claims}");
        }
        assert!(decide(&policy, r#"{"aud":"a","exp":1}"#, "JWT", 60).is_err());
    }
}
