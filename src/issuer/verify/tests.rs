//! AP-9 of reliability.md: only what the issuer makes is accepted, for every algorithm it may have.

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

        let twice = claims().to_string().replacen('{', &format!(r#"{{"{member}":{},"#, claims()[member]), 1);
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

/// A key of every algorithm, and what it signs.
fn signers() -> Vec<(SigningKey, Box<dyn Fn(&[u8]) -> Vec<u8>>)> {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
    use aws_lc_rs::signature::{self, Ed25519KeyPair, KeyPair};

    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let key = |kid: &str, alg, jwk| SigningKey { kid: kid.to_owned(), alg, jwk };
    let p256 = EcKey::from_slice(&[7; 32]).unwrap();
    let p384 = p384::ecdsa::SigningKey::from_slice(&[7; 48]).unwrap();
    let ed = Ed25519KeyPair::generate().unwrap();
    let rsa = std::sync::Arc::new(RsaKeyPair::generate(KeySize::Rsa2048).unwrap());
    let point = p256.verifying_key().to_sec1_point(false);
    let es256 =
        json!({ "kty": "EC", "crv": "P-256", "x": text(point.x().unwrap()), "y": text(point.y().unwrap()) });
    let point = p384.verifying_key().to_sec1_point(false);
    let es384 =
        json!({ "kty": "EC", "crv": "P-384", "x": text(point.x().unwrap()), "y": text(point.y().unwrap()) });
    let numbers = rsa.public_key();
    let modulus: Vec<u8> = numbers.modulus().big_endian_without_leading_zero().to_vec();
    let rs = json!({ "kty": "RSA", "n": text(&modulus), "e": "AQAB" });
    let okp = json!({ "kty": "OKP", "crv": "Ed25519", "x": text(ed.public_key().as_ref()) });
    let with_rsa = |padding: &'static dyn signature::RsaEncoding| {
        let rsa = std::sync::Arc::clone(&rsa);
        move |input: &[u8]| {
            let mut made = vec![0; rsa.public_modulus_len()];
            rsa.sign(padding, &SystemRandom::new(), input, &mut made).unwrap();
            made
        }
    };
    vec![
        (
            key("es256", "ES256", es256),
            Box::new(move |input| {
                let made: Signature = p256.sign(input);
                made.to_bytes().to_vec()
            }),
        ),
        (
            key("es384", "ES384", es384),
            Box::new(move |input| {
                let made: p384::ecdsa::Signature = p384.sign(input);
                made.to_bytes().to_vec()
            }),
        ),
        (key("rs256", "RS256", rs.clone()), Box::new(with_rsa(&signature::RSA_PKCS1_SHA256))),
        (key("ps256", "PS256", rs), Box::new(with_rsa(&signature::RSA_PSS_SHA256))),
        (key("eddsa", "EdDSA", okp), Box::new(move |input| ed.sign(input).as_ref().to_vec())),
    ]
}

fn compact(header: &Value, claims: &Value, sign: &dyn Fn(&[u8]) -> Vec<u8>) -> String {
    let input = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
    let signature = URL_SAFE_NO_PAD.encode(sign(input.as_bytes()));
    format!("{input}.{signature}")
}

#[test]
fn each_published_key_verifies_with_its_own_algorithm_and_no_other() {
    let signers = signers();
    let keys: Vec<_> = signers.iter().map(|(key, _)| key.clone()).collect();
    for (key, sign) in &signers {
        for (named, _) in &signers {
            for kid in &keys {
                let header = json!({ "alg": named.alg, "typ": "at+jwt", "kid": kid.kid });
                let found = verify(&compact(&header, &claims(), sign), &keys, &EXPECTED);
                if key.kid == named.kid && key.kid == kid.kid {
                    assert_eq!(found.unwrap().kid, key.kid);
                } else {
                    assert!(found.is_err(), "signed by {}, says {} and {}", key.kid, named.alg, kid.kid);
                }
            }
        }
        for alg in ["none", "HS256", "HS384", "RS384", "RS512", "ES512", "ES256K", "PS384", "Ed25519", ""] {
            let header = json!({ "alg": alg, "typ": "at+jwt", "kid": key.kid });
            let found = verify(&compact(&header, &claims(), sign), &keys, &EXPECTED);
            assert_eq!(found, Err("algorithm refused"), "{alg} with {}", key.kid);
        }
    }
}

#[test]
fn no_public_key_is_an_hmac_secret_and_no_key_is_taken_for_another_kind() {
    let signers = signers();
    let keys: Vec<_> = signers.iter().map(|(key, _)| key.clone()).collect();
    for key in &keys {
        for secret in [key.jwk.to_string(), key.jwk["n"].to_string(), key.jwk["x"].to_string()] {
            let sign = |input: &[u8]| {
                let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).unwrap();
                mac.update(input);
                mac.finalize().into_bytes().to_vec()
            };
            for alg in ["HS256", key.alg] {
                let header = json!({ "alg": alg, "typ": "at+jwt", "kid": key.kid });
                assert!(verify(&compact(&header, &claims(), &sign), &keys, &EXPECTED).is_err());
            }
        }
    }
    // A row that was tampered with: another kind of key under the same algorithm.
    for (key, sign) in &signers {
        for other in keys.iter().filter(|other| other.jwk["kty"] != key.jwk["kty"]) {
            let mixed = SigningKey { jwk: other.jwk.clone(), ..key.clone() };
            let header = json!({ "alg": key.alg, "typ": "at+jwt", "kid": key.kid });
            let found = verify(&compact(&header, &claims(), sign), &[mixed], &EXPECTED);
            assert_eq!(found, Err("unusable key"));
        }
    }
}

#[test]
fn a_key_that_is_published_no_more_verifies_nothing() {
    let signers = signers();
    let (key, sign) = &signers[0];
    let others: Vec<_> = signers[1..].iter().map(|(key, _)| key.clone()).collect();
    let header = json!({ "alg": key.alg, "typ": "at+jwt", "kid": key.kid });
    assert_eq!(verify(&compact(&header, &claims(), sign), &others, &EXPECTED), Err("unknown key"));
}

#[test]
fn the_json_serialisation_and_two_signatures_are_no_compact_token() {
    let fixture = Fixture::new();
    let token = fixture.token(HEADER, &claims().to_string());
    let parts: Vec<_> = token.split('.').collect();
    let one = json!({ "protected": parts[0], "signature": parts[2] });
    for wrong in [
        json!({ "payload": parts[1], "protected": parts[0], "signature": parts[2] }).to_string(),
        json!({ "payload": parts[1], "signatures": [one, one] }).to_string(),
        format!("{token}.{token}"),
        format!("{}.{}.{}.{}", parts[0], parts[1], parts[2], parts[2]),
        // A detached payload (RFC 7515, appendix F), and one of five parts as a JWE has.
        format!("{}..{}", parts[0], parts[2]),
        format!("{token}.a.b"),
    ] {
        assert!(verify(&wrong, &fixture.keys, &EXPECTED).is_err(), "{wrong}");
    }
}

#[test]
fn an_ecdsa_signature_is_two_numbers_of_full_width() {
    let fixture = Fixture::new();
    let token = fixture.token(HEADER, &claims().to_string());
    let (input, signature) = token.rsplit_once('.').unwrap();
    let raw = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let der = Signature::from_slice(&raw).unwrap().to_der().as_bytes().to_vec();
    let zero = vec![0; 64];
    for wrong in [der, zero, raw[..63].to_vec(), [&raw[..], &[0]].concat(), [&raw[32..], &raw[..32]].concat()]
    {
        let token = format!("{input}.{}", URL_SAFE_NO_PAD.encode(wrong));
        assert_eq!(verify(&token, &fixture.keys, &EXPECTED), Err("wrong signature"));
    }
}
