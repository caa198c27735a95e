//! ID tokens, signed here with keys made here (ID-12).

use p256::ecdsa::signature::Signer;
use p256::ecdsa::{Signature, SigningKey};
use serde_json::json;

use super::*;

const NOW: i64 = 1_800_000_000;

fn key() -> SigningKey {
    SigningKey::from_slice(&[7; 32]).unwrap()
}

fn jwk(kid: &str) -> Value {
    let point = key().verifying_key().to_sec1_point(false);
    let member = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let (x, y) = (member(&point.as_bytes()[1..33]), member(&point.as_bytes()[33..]));
    json!({"kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "alg": "ES256", "x": x, "y": y})
}

fn set(keys: &[Value]) -> Option<KeySet> {
    let members = Members::from_json(json!({"keys": keys}).to_string().as_bytes()).unwrap();
    KeySet::read(&members, Instant::now())
}

fn sign(header: &str, claims: &str) -> String {
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature: Signature = key().sign(message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
}

fn claims() -> Value {
    json!({
        "iss": "https://idp.example.com", "sub": "u1", "aud": "client", "nonce": "n",
        "iat": NOW - 10, "exp": NOW + 300,
    })
}

const EXPECTED: ExpectedIdToken<'static> = ExpectedIdToken {
    issuer: Some("https://idp.example.com"),
    audience: "client",
    nonce: Some("n"),
    now: Timestamp::from_micros(NOW * 1_000_000),
    skew: Duration::from_secs(60),
};

const HEADER: &str = r#"{"alg":"ES256","kid":"k1"}"#;

#[test]
fn a_genuine_token_gives_its_claims() {
    let found = set(&[jwk("k0"), jwk("k1")]).unwrap().verify(&sign(HEADER, &claims().to_string()), &EXPECTED);
    assert_eq!(found.unwrap()["sub"], "u1");
}

#[test]
fn every_claim_is_checked() {
    for (name, value, expected) in [
        ("iss", json!("https://idp.example.com/"), Some("iss")),
        ("iss", Value::Null, Some("iss")),
        ("aud", json!("other"), Some("aud")),
        ("aud", json!([]), Some("aud")),
        ("aud", json!(["client"]), None),
        ("aud", json!(["client", "other"]), Some("azp")),
        ("aud", Value::Null, Some("aud")),
        ("sub", json!(""), Some("sub")),
        ("sub", json!(1), Some("sub")),
        ("exp", json!(NOW - 59), None),
        ("exp", json!(NOW - 60), Some("exp")),
        ("exp", json!((NOW + 1).to_string()), Some("exp")),
        ("exp", json!(-1e300), Some("exp")),
        ("exp", Value::Null, Some("exp")),
        ("iat", json!(NOW + 60), None),
        ("iat", json!(NOW + 61), Some("not yet valid")),
        ("iat", Value::Null, Some("iat")),
        ("nbf", json!(NOW + 61), Some("not yet valid")),
        ("nbf", json!("x"), Some("nbf")),
        ("nonce", json!("m"), Some("nonce")),
        ("nonce", Value::Null, Some("nonce")),
    ] {
        let mut claims = claims();
        claims[name] = value.clone();
        let found = set(&[jwk("k1")]).unwrap().verify(&sign(HEADER, &claims.to_string()), &EXPECTED);
        assert_eq!(found.err(), expected.map(Refused), "{name} {value}");
    }
    let mut several = claims();
    several["aud"] = json!(["client", "other"]);
    several["azp"] = json!("client");
    assert!(set(&[jwk("k1")]).unwrap().verify(&sign(HEADER, &several.to_string()), &EXPECTED).is_ok());
}

#[test]
fn what_was_not_asked_for_is_not_compared() {
    let expected = ExpectedIdToken { issuer: None, nonce: None, ..EXPECTED };
    let mut claims = claims();
    claims["iss"] = json!("https://another.example.com");
    assert!(set(&[jwk("k1")]).unwrap().verify(&sign(HEADER, &claims.to_string()), &expected).is_ok());
}

#[test]
fn a_header_names_one_asymmetric_key_and_no_extension() {
    let (one, two) = (set(&[jwk("k1")]).unwrap(), set(&[jwk("k1"), jwk("k2")]).unwrap());
    let twice = set(&[jwk("k1"), jwk("k1")]).unwrap();
    for (keys, header, expected) in [
        (&one, r#"{"alg":"ES256"}"#, None),
        (&two, r#"{"alg":"ES256"}"#, Some(Refused("several keys"))),
        (&twice, HEADER, Some(Refused("several keys"))),
        (&one, r#"{"alg":"ES256","kid":"k3"}"#, Some(Fault::UnknownKey)),
        (&one, r#"{"alg":"RS256","kid":"k1"}"#, Some(Fault::UnknownKey)),
        (&one, r#"{"alg":"none","kid":"k1"}"#, Some(Refused("algorithm"))),
        (&one, r#"{"alg":"HS256","kid":"k1"}"#, Some(Refused("algorithm"))),
        (&one, r#"{"kid":"k1"}"#, Some(Refused("algorithm"))),
        (&one, r#"{"alg":"ES256","kid":1}"#, Some(Refused("malformed"))),
        (&one, r#"{"alg":"ES256","alg":"ES256","kid":"k1"}"#, Some(Refused("malformed"))),
        (
            &one,
            r#"{"alg":"ES256","kid":"k1","crit":["b64"],"b64":false}"#,
            Some(Refused("critical extension")),
        ),
        (&one, r#"{"alg":"ES256","kid":"k1","crit":null}"#, Some(Refused("critical extension"))),
    ] {
        let found = keys.verify(&sign(header, &claims().to_string()), &EXPECTED);
        assert_eq!(found.err(), expected, "{header}");
    }
}

#[test]
fn an_altered_token_is_refused() {
    let keys = set(&[jwk("k1")]).unwrap();
    let token = sign(HEADER, &claims().to_string());
    let (message, signature) = token.rsplit_once('.').unwrap();
    let other = sign(HEADER, &json!({"sub": "u2"}).to_string());
    let (other, _) = other.rsplit_once('.').unwrap();
    for altered in [
        format!("{other}.{signature}"),
        format!("{message}."),
        format!("{message}.{signature}A"),
        message.to_owned(),
        format!("{token}.{signature}"),
        String::new(),
        sign(HEADER, r#"{"sub":"u1","sub":"u1"}"#),
    ] {
        assert!(matches!(keys.verify(&altered, &EXPECTED), Err(Refused(_))), "{altered}");
    }
}

#[test]
fn a_set_with_a_symmetric_key_is_refused_and_keys_for_other_uses_are_passed_over() {
    let symmetric = json!({"kty": "oct", "kid": "k2", "k": "c2VjcmV0"});
    assert!(set(&[jwk("k1"), symmetric]).is_none());
    assert!(set(&[jwk("k1"), json!({"kid": "k2"})]).is_none());

    let mut for_encryption = jwk("k2");
    for_encryption["use"] = json!("enc");
    let strange = json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"});
    let keys = set(&[for_encryption, strange, jwk("k1")]).unwrap();
    assert!(keys.verify(&sign(r#"{"alg":"ES256"}"#, &claims().to_string()), &EXPECTED).is_ok());
}
