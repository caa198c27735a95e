//! AP-9 of reliability.md for every algorithm that a published key may have.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use p256::ecdsa::signature::Signer;
use p256::ecdsa::{Signature, SigningKey as EcKey};
use serde_json::{Value, json};

use super::{EXPECTED, Fixture, HEADER, claims};
use crate::issuer::verify::verify;
use crate::keys::SigningKey;

type Sign = Box<dyn Fn(&[u8]) -> Vec<u8>>;

/// A key of every algorithm, and what it signs.
fn signers() -> Vec<(SigningKey, Sign)> {
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
