//! `POST /v1/jws`: a token that an application has built in the name of an issuer of its own; only the
//! signature is missing. Pure.
//!
//! Everything is checked that makes it a token and nothing else: the bytes that are signed are the ones that
//! were read here. Whether `kid` and `alg` are the ones in use is the key service's to say.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::claims::{self, NotSigned, Own, SKEW, beyond, malformed};
use super::json;
use super::policy::JwsRules;
use crate::clock::Timestamp;

/// Far above what fits into a request's header.
const INPUT_MAX: usize = 24 << 10;
const HEADER_MAX: usize = 1024;

/// A token that may be signed, if it names the key in use.
#[derive(Debug, PartialEq)]
pub(super) struct JwsOrder<'a> {
    pub(super) signing_input: &'a str,
    pub(super) kid: String,
    pub(super) alg: String,
    pub(super) typ: String,
    pub(super) jti: Option<String>,
    pub(super) subject: Option<String>,
    /// From now on, in whole seconds.
    pub(super) lifetime: Duration,
    /// Seconds since the epoch.
    pub(super) expires: i64,
}

/// Decides whether a token may be signed.
pub(super) fn order<'a>(
    rules: &JwsRules,
    signing_input: &'a str,
    own: Own<'_>,
    now: Timestamp,
) -> Result<JwsOrder<'a>, NotSigned> {
    if signing_input.len() > INPUT_MAX {
        return Err(malformed("signing_input", "must be at most 24 KiB"));
    }
    let (header, payload) = signing_input
        .split_once('.')
        .filter(|(header, payload)| !header.is_empty() && !payload.is_empty())
        .ok_or(malformed("signing_input", "must be a header and a payload with a dot between them"))?;
    if header.len() > HEADER_MAX {
        return Err(malformed("header", "must be at most 1 KiB"));
    }
    let Header { alg, kid, typ } = read_header(&part("header", header)?)?;
    let typ = typ.unwrap_or_default();
    if !rules.types.contains(&typ) {
        return Err(beyond("typ", "is not in the policy"));
    }
    let payload = part("payload", payload)?;
    let payload = json::object(&payload).map_err(|reason| malformed("payload", reason))?;
    let expires = check_payload(rules, &payload, own, now)?;
    // Rounded up, and so the same for all tokens of one kind: each longer life is made durable once.
    let lifetime = Duration::from_secs(u64::try_from(expires - now.as_secs()).unwrap_or(0));
    let (jti, subject) = (claims::text(&payload, "jti")?, claims::text(&payload, "sub")?);
    let (jti, subject) = (jti.map(str::to_owned), subject.map(str::to_owned));
    Ok(JwsOrder { signing_input, kid, alg, typ, jti, subject, lifetime, expires })
}

/// The padding and the bits that nobody reads must be as in RFC 7515, section 2: one token, one spelling.
fn part(name: &'static str, text: &str) -> Result<Vec<u8>, NotSigned> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| malformed(name, "is not base64url without padding"))
}

struct Header {
    alg: String,
    kid: String,
    typ: Option<String>,
}

/// No `crit`, `b64`, `jku`, `jwk`, `x5u`, `x5c`, `cty`, `enc`, `zip`: they would tell a verifier to take another
/// key or to read the payload in another way.
fn read_header(bytes: &[u8]) -> Result<Header, NotSigned> {
    let mut members = json::object(bytes).map_err(|reason| malformed("header", reason))?;
    let mut take = |name| match members.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(malformed("header", "its members must be texts")),
    };
    let (alg, kid, typ) = (take("alg")?, take("kid")?, take("typ")?);
    if !members.is_empty() {
        return Err(malformed("header", "may have alg, kid and typ only"));
    }
    match (alg, kid) {
        (Some(alg), Some(kid)) => Ok(Header { alg, kid, typ }),
        _ => Err(malformed("header", "needs alg and kid")),
    }
}

/// The claims that decide; gives `exp`.
fn check_payload(
    rules: &JwsRules,
    payload: &Map<String, Value>,
    own: Own<'_>,
    now: Timestamp,
) -> Result<i64, NotSigned> {
    let iss = claims::text(payload, "iss")?.ok_or(malformed("iss", "is needed"))?;
    if iss == own.issuer {
        return Err(beyond("iss", "is Lacre's own issuer"));
    }
    if !rules.issuers.iter().any(|known| known == iss) {
        return Err(beyond("iss", "is not in the policy"));
    }
    let exp = claims::integer(payload, "exp")?.ok_or(malformed("exp", "is needed"))?;
    let iat = claims::integer(payload, "iat")?.ok_or(malformed("iat", "is needed"))?;
    let left = exp.saturating_sub(now.as_secs());
    if left <= 0 {
        return Err(malformed("exp", "has passed"));
    }
    if u64::try_from(left).is_ok_and(|left| left > rules.max_lifetime) {
        return Err(beyond("exp", "is later than the policy allows"));
    }
    if iat.saturating_sub(now.as_secs()).saturating_abs() > SKEW {
        return Err(malformed("iat", "is not the present time"));
    }
    claims::check_not_before(payload, exp, now)?;
    claims::check_audience(payload, rules.audiences.as_deref(), own)?;
    Ok(exp)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::issuer::signing::policy::SigningPolicy;

    const NOW: i64 = 1_800_000_000;
    const OWN: Own<'static> = Own { issuer: "https://lacre/oidc", api: "https://default.lacre.local/api" };
    const HEADER: &str = r#"{"alg":"ES256","typ":"JWT","kid":"k"}"#;

    fn policy() -> Value {
        json!({ "issuers": ["https://idp"], "types": ["JWT", ""], "max_lifetime": 3600 })
    }

    fn payload() -> Value {
        json!({ "iss": "https://idp", "sub": "ana", "aud": "client", "iat": NOW, "exp": NOW + 300, "jti": "j" })
    }

    fn encode(text: &str) -> String {
        URL_SAFE_NO_PAD.encode(text)
    }

    fn under(policy: &Value, input: &str) -> Result<JwsOrder<'static>, NotSigned> {
        let policy: SigningPolicy = serde_json::from_value(json!({ "jws": policy })).unwrap();
        let now = Timestamp::from_micros(NOW * 1_000_000 + 500_000);
        order(policy.jws().unwrap(), input.to_owned().leak(), OWN, now)
    }

    fn decide(header: &str, payload: &str) -> Result<JwsOrder<'static>, NotSigned> {
        under(&policy(), &format!("{}.{}", encode(header), encode(payload)))
    }

    fn field(found: &Result<JwsOrder<'static>, NotSigned>) -> &'static str {
        match found {
            Ok(_) => "none",
            Err(NotSigned::Beyond { field, .. } | NotSigned::Malformed { field, .. }) => field,
            Err(NotSigned::NoPolicy(_)) => "policy",
        }
    }

    #[test]
    fn a_token_of_the_policys_issuer_may_be_signed() {
        let order = decide(HEADER, &payload().to_string()).unwrap();
        assert_eq!((order.kid.as_str(), order.alg.as_str(), order.typ.as_str()), ("k", "ES256", "JWT"));
        assert_eq!((order.jti.as_deref(), order.subject.as_deref()), (Some("j"), Some("ana")));
        assert_eq!((order.expires, order.lifetime), (NOW + 300, Duration::from_secs(300)));

        let without_typ = decide(r#"{"kid":"k","alg":"ES256"}"#, &payload().to_string()).unwrap();
        assert_eq!(without_typ.typ, "");
    }

    #[test]
    fn a_header_has_alg_kid_and_typ_and_nothing_else() {
        for header in [
            r#"{"alg":"ES256","typ":"JWT"}"#,
            r#"{"kid":"k","typ":"JWT"}"#,
            r#"{"alg":"ES256","typ":"JWT","kid":"k","kid":"k"}"#,
            r#"{"alg":"ES256","typ":"JWT","kid":"k","\u006bid":"k"}"#,
            r#"{"alg":["ES256"],"typ":"JWT","kid":"k"}"#,
            r#"{"alg":"ES256","typ":null,"kid":"k"}"#,
            r#"{"alg":"ES256","typ":"JWT","kid":1}"#,
            r#"["ES256","k","JWT"]"#,
            r#""ES256""#,
            "",
            "{",
        ] {
            assert!(decide(header, &payload().to_string()).is_err(), "{header}");
        }
        for more in [
            r#""crit":["b64"]"#,
            r#""b64":false"#,
            r#""jku":"https://e""#,
            r#""jwk":{}"#,
            r#""x5u":"https://e""#,
            r#""x5c":[]"#,
            r#""x5t":"x""#,
            r#""cty":"JWT""#,
            r#""enc":"A256GCM""#,
            r#""zip":"DEF""#,
            r#""KID":"k""#,
        ] {
            let header = HEADER.replace('}', &format!(",{more}}}"));
            assert_eq!(field(&decide(&header, &payload().to_string())), "header", "{header}");
        }
        for typ in ["at+jwt", "jwt", "JWT ", "application/JWT"] {
            let header = HEADER.replace("JWT", typ);
            assert_eq!(field(&decide(&header, &payload().to_string())), "typ", "{typ}");
        }
    }

    #[test]
    fn the_signing_input_has_one_spelling() {
        let (header, payload) = (encode(HEADER), encode(&payload().to_string()));
        assert!(under(&policy(), &format!("{header}.{payload}")).is_ok());
        for wrong in [
            String::new(),
            ".".to_owned(),
            header.clone(),
            format!("{header}."),
            format!(".{payload}"),
            format!("{header}.{payload}."),
            format!("{header}.{payload}.{payload}"),
            format!("{header}..{payload}"),
            format!("{header}=.{payload}"),
            format!("{header}.{payload}="),
            format!("{header}.{payload}\n"),
            format!(" {header}.{payload}"),
            format!("{header}.{}+", &payload[..payload.len() - 1]),
            format!("{header}.{}", "A".repeat(INPUT_MAX)),
            format!("{}.{payload}", encode(&HEADER.replace("\"k\"", &format!("\"{}\"", "k".repeat(2000))))),
        ] {
            assert!(under(&policy(), &wrong).is_err(), "{wrong:.100}");
        }
    }

    #[test]
    fn claims_have_the_right_type_and_fit_the_policy() {
        for (member, value, wanted) in [
            ("iss", json!("https://other"), "iss"),
            ("iss", json!("https://idp/"), "iss"),
            ("iss", json!(["https://idp"]), "iss"),
            ("iss", Value::Null, "iss"),
            ("exp", json!("1800000300"), "exp"),
            ("exp", json!(1_800_000_300.5), "exp"),
            ("exp", json!(1.8e9), "exp"),
            ("exp", json!(u64::MAX), "exp"),
            ("exp", json!(true), "exp"),
            ("exp", Value::Null, "exp"),
            ("exp", json!(NOW), "exp"),
            ("exp", json!(i64::MIN), "exp"),
            ("exp", json!(i64::MAX), "exp"),
            ("exp", json!(NOW + 3601), "exp"),
            ("exp", json!(NOW + 3600), "none"),
            ("iat", json!("1800000000"), "iat"),
            ("iat", json!(NOW - 61), "iat"),
            ("iat", json!(NOW + 61), "iat"),
            ("iat", json!(i64::MIN), "iat"),
            ("iat", json!(NOW - 60), "none"),
            ("nbf", json!("999"), "nbf"),
            ("nbf", json!(NOW + 300), "nbf"),
            ("nbf", json!(NOW), "none"),
            ("aud", json!(1), "aud"),
            ("aud", json!([]), "aud"),
            ("aud", json!(vec!["a"; 17]), "aud"),
            ("aud", json!(OWN.api), "aud"),
            ("aud", json!(["client", OWN.api]), "aud"),
            ("sub", json!(1), "sub"),
            ("jti", json!(1), "jti"),
            ("more", json!({ "deep": [1, 2] }), "none"),
        ] {
            let mut claims = payload();
            claims[member] = value.clone();
            assert_eq!(field(&decide(HEADER, &claims.to_string())), wanted, "{member} {value}");
        }
        for member in ["iss", "exp", "iat"] {
            let mut fewer = payload();
            fewer.as_object_mut().unwrap().remove(member);
            assert_eq!(field(&decide(HEADER, &fewer.to_string())), member);
            let twice =
                payload().to_string().replacen('{', &format!(r#"{{"{member}":{},"#, payload()[member]), 1);
            assert_eq!(field(&decide(HEADER, &twice)), "payload");
        }
        for payload in ["[]", "1", "\"\"", "{} {}", "\u{feff}{}"] {
            assert_eq!(field(&decide(HEADER, payload)), "payload");
        }
    }

    #[test]
    fn audiences_count_only_where_the_policy_has_them() {
        let mut narrow = policy();
        narrow["audiences"] = json!(["client"]);
        let with = |aud: Option<Value>| {
            let mut claims = payload();
            match aud {
                Some(aud) => claims["aud"] = aud,
                None => drop(claims.as_object_mut().unwrap().remove("aud")),
            }
            format!("{}.{}", encode(HEADER), encode(&claims.to_string()))
        };
        assert!(under(&narrow, &with(Some(json!("client")))).is_ok());
        assert_eq!(field(&under(&narrow, &with(Some(json!(["client", "x"]))))), "aud");
        assert_eq!(field(&under(&narrow, &with(None))), "aud");
        assert!(under(&policy(), &with(None)).is_ok());
    }

    #[test]
    fn a_policy_that_names_lacres_issuer_gives_nothing() {
        let mut policy = policy();
        policy["issuers"] = json!([OWN.issuer]);
        let mut claims = payload();
        claims["iss"] = json!(OWN.issuer);
        let input = format!("{}.{}", encode(HEADER), encode(&claims.to_string()));
        assert_eq!(under(&policy, &input), Err(beyond("iss", "is Lacre's own issuer")));
    }
}
