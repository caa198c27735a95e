//! Checks an access token. Pure: token, keys, expectations and time in, a verdict out.
//!
//! Only what this issuer makes is accepted: three parts, a header of exactly `alg`, `typ` and `kid`
//! (so no `crit`, `jku`, `jwk`, `x5u` or `b64`), one of the tenant's published keys with the one algorithm that
//! it signs with, and claims of the right JSON type. The key is found before the signature is checked, the
//! claims are read after.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::signing::json;
use crate::clock::Timestamp;
use crate::identity::{Scope, ScopeSet};
use crate::ids::ClientId;
use crate::keys::SigningKey;

/// Far above any token of this issuer; the signature of a 4096 bit RSA key is 683 characters of it.
pub(super) const TOKEN_MAX: usize = 4096;

/// RFC 9068, section 2.1.
pub(super) const TYP: &str = "at+jwt";

/// A token's `scope` that stands for all that its application has.
pub(super) const ALL_SCOPES: &str = "all";

/// What a token must be for.
pub(super) struct Expected<'a> {
    pub(super) issuer: &'a str,
    pub(super) audience: &'a str,
    pub(super) now: Timestamp,
}

/// What a good token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) client: ClientId,
    pub(super) scopes: ScopeSet,
    /// Seconds since the epoch.
    pub(super) expires: i64,
    /// The key that signed it: once that is published no more, the token is worth nothing.
    pub(super) kid: String,
}

impl Verified {
    pub(super) const fn is_expired(&self, now: Timestamp) -> bool {
        self.expires <= now.as_secs()
    }
}

/// Serde refuses every member it does not know.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UnverifiedHeader {
    alg: String,
    typ: String,
    kid: String,
}

/// Types are checked (a text is no `exp`); more claims may come in later versions.
#[derive(Deserialize)]
#[expect(dead_code, reason = "claims that only have to be there, once and of the right type")]
struct Claims {
    iss: String,
    sub: String,
    aud: String,
    client_id: ClientId,
    scope: String,
    iat: i64,
    exp: i64,
    #[serde(default, deserialize_with = "present")]
    nbf: Option<i64>,
    jti: String,
}

/// A member that may be absent, and is no `null` if it is there.
fn present<'de, D: Deserializer<'de>>(input: D) -> Result<Option<i64>, D::Error> {
    i64::deserialize(input).map(Some)
}

/// Says what the token grants, or why it is not accepted.
pub(super) fn verify(
    token: &str,
    keys: &[SigningKey],
    expected: &Expected<'_>,
) -> Result<Verified, &'static str> {
    let (key, algorithm, kid) = find_key(token, keys)?;
    let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation(algorithm, expected));
    let claims = claims.map_err(|error| reason(error.kind()))?.claims;
    if claims.sub != claims.client_id.as_str() {
        return Err("subject is not the client");
    }
    if claims.nbf.is_some_and(|nbf| nbf > expected.now.as_secs()) {
        return Err("not valid yet");
    }
    let scopes = scopes(&claims.scope);
    let verified = Verified { client: claims.client_id, scopes, expires: claims.exp, kid: kid.to_owned() };
    if verified.is_expired(expected.now) { Err("expired") } else { Ok(verified) }
}

/// What the claim names; the application's own scopes bound it at every use.
fn scopes(claim: &str) -> ScopeSet {
    let names = claim.split_ascii_whitespace();
    match names.clone().any(|name| name == ALL_SCOPES) {
        true => ScopeSet::all(),
        false => names.filter_map(Scope::parse).collect(),
    }
}

/// Reads the header strictly and finds the key it names among the tenant's own. The algorithm is the key's; that
/// the header names it too decides nothing.
fn find_key<'a>(
    token: &str,
    keys: &'a [SigningKey],
) -> Result<(DecodingKey, Algorithm, &'a str), &'static str> {
    let mut parts = token.split('.');
    let (Some(header), Some(_), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("not a compact JWS");
    };
    let header = URL_SAFE_NO_PAD.decode(header).map_err(|_| "header is not base64url")?;
    let header = json::object(&header).map_err(|_| "header refused")?;
    let header: UnverifiedHeader =
        serde_json::from_value(Value::Object(header)).map_err(|_| "header refused")?;
    if header.typ != TYP {
        return Err("not an access token");
    }
    let key = keys.iter().find(|key| key.kid == header.kid).ok_or("unknown key")?;
    if header.alg != key.alg {
        return Err("algorithm refused");
    }
    let (decoding, algorithm) = decoding_key(key)?;
    Ok((decoding, algorithm, &key.kid))
}

/// The key in the form that its own algorithm needs; one that is no public key, or of another kind, is refused.
fn decoding_key(key: &SigningKey) -> Result<(DecodingKey, Algorithm), &'static str> {
    let member = |name| key.jwk.get(name).and_then(Value::as_str).unwrap_or_default();
    let (algorithm, kty, crv) = match key.alg {
        "ES256" => (Algorithm::ES256, "EC", "P-256"),
        "ES384" => (Algorithm::ES384, "EC", "P-384"),
        "RS256" => (Algorithm::RS256, "RSA", ""),
        "PS256" => (Algorithm::PS256, "RSA", ""),
        "EdDSA" => (Algorithm::EdDSA, "OKP", "Ed25519"),
        _ => return Err("algorithm refused"),
    };
    if (member("kty"), member("crv")) != (kty, crv) {
        return Err("unusable key");
    }
    let decoding = match kty {
        "EC" => DecodingKey::from_ec_components(member("x"), member("y")),
        "RSA" => DecodingKey::from_rsa_components(member("n"), member("e")),
        _ => DecodingKey::from_ed_components(member("x")),
    };
    Ok((decoding.map_err(|_| "unusable key")?, algorithm))
}

fn validation(algorithm: Algorithm, expected: &Expected<'_>) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.set_audience(&[expected.audience]);
    validation.set_issuer(&[expected.issuer]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    // The library has a clock of its own; `exp` and `nbf` are compared with ours, after their type was checked.
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.leeway = 0;
    validation
}

fn reason(kind: &jsonwebtoken::errors::ErrorKind) -> &'static str {
    use jsonwebtoken::errors::ErrorKind;
    match kind {
        ErrorKind::InvalidSignature => "wrong signature",
        ErrorKind::InvalidIssuer => "another issuer",
        ErrorKind::InvalidAudience => "another audience",
        ErrorKind::MissingRequiredClaim(_) => "a claim is missing",
        ErrorKind::InvalidAlgorithm => "algorithm refused",
        _ => "malformed",
    }
}

#[cfg(test)]
mod tests {
    mod algorithms;

    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use hmac::{Hmac, KeyInit, Mac};
    use p256::ecdsa::signature::Signer;
    use p256::ecdsa::{Signature, SigningKey as EcKey};
    use p256::pkcs8::EncodePublicKey;
    use serde_json::{Value, json};

    use super::{Expected, Verified, verify};
    use crate::clock::Timestamp;
    use crate::identity::{Scope, ScopeSet};
    use crate::keys::SigningKey;

    const NOW: i64 = 1_800_000_000;
    const EXPECTED: Expected<'static> =
        Expected { issuer: "i", audience: "a", now: Timestamp::from_micros(NOW * 1_000_000) };

    struct Fixture {
        secret: EcKey,
        keys: Vec<SigningKey>,
    }

    impl Fixture {
        fn new() -> Self {
            let secret = EcKey::from_slice(&[7; 32]).unwrap();
            let point = secret.verifying_key().to_sec1_point(false);
            let [x, y] = [point.x(), point.y()].map(|n| URL_SAFE_NO_PAD.encode(n.unwrap()));
            let jwk = json!({ "kty": "EC", "crv": "P-256", "x": x, "y": y });
            Self { secret, keys: vec![SigningKey { kid: "k".to_owned(), alg: "ES256", jwk }] }
        }

        fn token(&self, header: &str, claims: &str) -> String {
            let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
            let signature: Signature = self.secret.sign(input.as_bytes());
            format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
        }

        fn check(&self, header: &str, claims: &str) -> Result<Verified, &'static str> {
            verify(&self.token(header, claims), &self.keys, &EXPECTED)
        }

        fn claim(&self, member: &str, value: Value) -> Result<Verified, &'static str> {
            let mut claims = claims();
            claims[member] = value;
            self.check(HEADER, &claims.to_string())
        }
    }

    const HEADER: &str = r#"{"alg":"ES256","typ":"at+jwt","kid":"k"}"#;

    fn claims() -> Value {
        json!({ "iss": "i", "sub": "app", "client_id": "app", "aud": "a", "scope": "audit:read future:scope",
                "iat": NOW, "exp": NOW + 10, "jti": "j" })
    }

    #[test]
    fn a_good_token_says_who_and_what() {
        let verified = Fixture::new().check(HEADER, &claims().to_string()).unwrap();

        assert_eq!(verified.client.as_str(), "app");
        assert_eq!(verified.scopes, [Scope::AuditRead].into_iter().collect::<ScopeSet>());
        assert_eq!((verified.expires, verified.kid.as_str()), (NOW + 10, "k"));
    }

    #[test]
    fn all_stands_for_every_scope() {
        let fixture = Fixture::new();
        for (claim, wanted) in [
            ("all", ScopeSet::all()),
            ("audit:read all", ScopeSet::all()),
            ("ALL", ScopeSet::NONE),
            ("", ScopeSet::NONE),
        ] {
            assert_eq!(fixture.claim("scope", json!(claim)).unwrap().scopes, wanted, "{claim}");
        }
    }

    #[test]
    fn only_the_issuers_own_header_is_accepted() {
        let fixture = Fixture::new();
        for (header, wanted) in [
            (r#"{"alg":"none","typ":"at+jwt","kid":"k"}"#, "algorithm refused"),
            (r#"{"alg":"ES384","typ":"at+jwt","kid":"k"}"#, "algorithm refused"),
            (r#"{"alg":"es256","typ":"at+jwt","kid":"k"}"#, "algorithm refused"),
            (r#"{"alg":"ES256","typ":"JWT","kid":"k"}"#, "not an access token"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"other"}"#, "unknown key"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"../k"}"#, "unknown key"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k' OR '1'='1"}"#, "unknown key"),
            (r#"{"alg":"ES256","typ":"at+jwt"}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","kid":"k"}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","crit":["b64"],"b64":false}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","jku":"https://e"}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","jwk":{}}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","x5u":"https://e"}"#, "header refused"),
            (r#"{"alg":["ES256"],"typ":"at+jwt","kid":"k"}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","x5c":["AA=="]}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","b64":false}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","cty":"JWT"}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k","zip":"DEF"}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":null}"#, "header refused"),
            (r#"{"alg":"ES256","typ":"application/at+jwt","kid":"k"}"#, "not an access token"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":""}"#, "unknown key"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k\u0000"}"#, "unknown key"),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"/dev/null"}"#, "unknown key"),
            (r#"["ES256","at+jwt","k"]"#, "header refused"),
            ("[]", "header refused"),
        ] {
            assert_eq!(fixture.check(header, &claims().to_string()), Err(wanted), "{header}");
        }
    }

    #[test]
    fn an_unsigned_token_is_refused() {
        let fixture = Fixture::new();
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"at+jwt","kid":"k"}"#);
        let token = format!("{header}.{}.", URL_SAFE_NO_PAD.encode(claims().to_string()));
        assert_eq!(verify(&token, &fixture.keys, &EXPECTED), Err("algorithm refused"));

        let header = URL_SAFE_NO_PAD.encode(HEADER);
        let token = format!("{header}.{}.", URL_SAFE_NO_PAD.encode(claims().to_string()));
        assert!(verify(&token, &fixture.keys, &EXPECTED).is_err());
    }

    #[test]
    fn the_public_key_is_no_hmac_secret() {
        let fixture = Fixture::new();
        let public = fixture.secret.verifying_key();
        let secrets = [
            public.to_public_key_pem(p256::pkcs8::LineEnding::LF).unwrap().into_bytes(),
            public.to_sec1_point(false).as_bytes().to_vec(),
            fixture.keys[0].jwk.to_string().into_bytes(),
        ];
        for alg in ["HS256", "ES256"] {
            for secret in &secrets {
                let header = HEADER.replace("ES256", alg);
                let input = [header, claims().to_string()].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
                let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret).unwrap();
                mac.update(input.as_bytes());
                let token = format!("{input}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
                assert!(verify(&token, &fixture.keys, &EXPECTED).is_err(), "{alg}");
            }
        }
    }

    #[test]
    fn wrong_claims_are_refused() {
        let fixture = Fixture::new();
        for (member, value, wanted) in [
            ("exp", json!(NOW), "expired"),
            ("exp", json!(0), "expired"),
            ("exp", json!("1900000000"), "malformed"),
            ("exp", json!(1.9e9), "malformed"),
            ("exp", json!(u64::MAX), "malformed"),
            ("exp", json!([NOW + 10]), "malformed"),
            ("exp", Value::Null, "malformed"),
            ("iat", json!("1"), "malformed"),
            ("nbf", json!("999"), "malformed"),
            ("nbf", json!(999.5), "malformed"),
            ("nbf", Value::Null, "malformed"),
            ("nbf", json!(NOW + 1), "not valid yet"),
            ("exp", json!(true), "malformed"),
            ("jti", json!(1), "malformed"),
            ("iss", json!("j"), "another issuer"),
            ("iss", json!(["i"]), "malformed"),
            ("aud", json!("b"), "another audience"),
            ("aud", json!(["a", "b"]), "malformed"),
            ("sub", json!("other"), "subject is not the client"),
            ("sub", json!(1), "malformed"),
            ("client_id", json!("a b"), "malformed"),
            ("scope", json!(["audit:read"]), "malformed"),
        ] {
            let found = fixture.claim(member, value.clone());
            let malformed = ["malformed", "a claim is missing"];
            let same = found == Err(wanted)
                || (malformed.contains(&wanted) && found.as_ref().is_err_and(|f| malformed.contains(f)));
            assert!(same, "{member} {value}: {found:?}");
        }
    }

    #[test]
    fn a_missing_or_repeated_claim_is_refused() {
        let fixture = Fixture::new();
        for member in ["iss", "sub", "client_id", "aud", "scope", "iat", "exp", "jti"] {
            let mut fewer = claims();
            fewer.as_object_mut().unwrap().remove(member);
            assert!(fixture.check(HEADER, &fewer.to_string()).is_err(), "without {member}");

            let twice =
                claims().to_string().replacen('{', &format!(r#"{{"{member}":{},"#, claims()[member]), 1);
            assert!(fixture.check(HEADER, &twice).is_err(), "{member} twice");
        }
    }

    #[test]
    fn every_changed_byte_and_every_extra_part_is_refused() {
        let fixture = Fixture::new();
        let token = fixture.token(HEADER, &claims().to_string());
        assert!(verify(&token, &fixture.keys, &EXPECTED).is_ok());

        for at in 0..token.len() {
            let other = if token.as_bytes()[at] == b'A' { "B" } else { "A" };
            let mut changed = token.clone();
            changed.replace_range(at..=at, other);
            assert!(verify(&changed, &fixture.keys, &EXPECTED).is_err(), "byte {at}");
        }
        let signature = token.rsplit('.').next().unwrap();
        let cut = &token[..token.len() - signature.len() - 1];
        for wrong in [
            format!("{token}.{signature}"),
            format!("{token}."),
            format!("{token}="),
            format!("{token} "),
            format!(" {token}"),
            cut.to_owned(),
            String::new(),
            "..".to_owned(),
        ] {
            assert!(verify(&wrong, &fixture.keys, &EXPECTED).is_err(), "{wrong}");
        }
    }

    #[test]
    fn another_key_under_the_same_name_is_refused() {
        let fixture = Fixture::new();
        let forger = Fixture { secret: EcKey::from_slice(&[8; 32]).unwrap(), keys: Vec::new() };
        let token = forger.token(HEADER, &claims().to_string());

        assert_eq!(verify(&token, &fixture.keys, &EXPECTED), Err("wrong signature"));
    }
}
