//! The bytes of a sealed value, format 1, against vectors that other code made from the document
//! (`docs/formats/sealed-v1.md`, `tests/vectors/make_sealed_v1.py`). No device here; `tests/device/sealed.rs`
//! has the same with one.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use aws_lc_rs::cipher::{DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey};
use aws_lc_rs::digest::{Algorithm, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded};
use hmac::{Hmac, Mac};
use lacre::seal::{Context, Sealed, WrappedKey};
use proptest::prelude::*;
use rsa::BigUint;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn vectors() -> Value {
    serde_json::from_str(include_str!("vectors/sealed-v1.json")).unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn valid(vectors: &Value) -> &[Value] {
    vectors["valid"].as_array().unwrap()
}

fn context(vector: &Value) -> Context<'_> {
    Context {
        tenant: vector["tenant"].as_str().unwrap(),
        kind: vector["kind"].as_str().unwrap(),
        record: vector["record"].as_str().unwrap(),
        version: vector["version"].as_str().unwrap().parse().unwrap(),
    }
}

#[test]
fn the_checked_in_vectors_are_what_the_independent_maker_makes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut python = Command::new(root.join(".deps/venv/bin/python"));
    let made = python.arg(root.join("tests/vectors/make_sealed_v1.py")).output().expect("run `make deps`");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(serde_json::from_slice::<Value>(&made.stdout).unwrap(), vectors());
}

#[test]
fn foreign_bytes_are_read_and_written_as_they_are() {
    let vectors = vectors();
    assert_eq!(valid(&vectors).len(), 16);
    for vector in valid(&vectors) {
        let name = &vector["name"];
        let whole = bytes(&vector["sealed"]);
        let sealed = Sealed::from_bytes(&whole).unwrap();
        assert!(sealed.to_bytes() == whole, "{name}");
        assert_eq!(sealed.key().kek_id().as_bytes().to_vec(), bytes(&vectors["kek_id"]), "{name}");
        assert_eq!(u64::from(sealed.key().kek_version()), vector["kek_version"].as_u64().unwrap(), "{name}");

        let columns = [&vector["wrapped_dek"], &vectors["payload_iv"], &vector["ciphertext"], &vector["tag"]];
        let columns = columns.map(bytes);
        assert!(sealed.into_columns() == columns, "{name}");
        let [wrapped, iv, ciphertext, tag] = columns;
        assert!(Sealed::from_columns(&wrapped, &iv, ciphertext, &tag).unwrap().to_bytes() == whole, "{name}");
    }
}

#[test]
fn the_associated_data_is_what_the_document_says() {
    let vectors = vectors();
    for vector in valid(&vectors) {
        let aad = context(vector).payload_aad();
        assert_eq!(hex::encode(&aad), vector["payload_aad"].as_str().unwrap(), "{}", vector["name"]);
        let cipher = Aes256Gcm::new_from_slice(&bytes(&vectors["dek"])).unwrap();
        let mut body = bytes(&vector["ciphertext"]);
        body.extend(bytes(&vector["tag"]));
        let iv: [u8; 12] = bytes(&vectors["payload_iv"]).try_into().unwrap();
        let opened = cipher.decrypt(&Nonce::from(iv), Payload { msg: &body, aad: &aad }).unwrap();
        assert!(opened == bytes(&vector["plaintext"]), "{}", vector["name"]);
    }
}

/// The wrapped DEK of a vector by code that Lacre does not wrap with: `DEK || SHA-256(wrap AAD)`.
fn unwrapped(vectors: &Value, mechanism: &str, encrypted: &[u8]) -> Vec<u8> {
    let kek = bytes(&vectors["kek"]);
    let mut out = encrypted.to_vec();
    match mechanism {
        "A256KWP" => {
            let kek = AesKek::new(&AES_256, &kek).unwrap();
            return kek.unwrap_with_padding(encrypted, &mut out).unwrap().to_vec();
        }
        "A256CBC+HS256" => {
            let iv: [u8; 16] = bytes(&vectors["cbc_iv"]).try_into().unwrap();
            let key = UnboundCipherKey::new(&aws_lc_rs::cipher::AES_256, &kek).unwrap();
            let cbc = PaddedBlockDecryptingKey::cbc_pkcs7(key).unwrap();
            let iv = DecryptionContext::Iv128(FixedLength::from(iv));
            return cbc.decrypt(&mut out, iv).unwrap().to_vec();
        }
        _ => {}
    }
    let number = |name: &str| BigUint::from_bytes_be(&bytes(&vectors[name]));
    let encoded = BigUint::from_bytes_be(encrypted).modpow(&number("rsa_d"), &number("rsa_n")).to_bytes_be();
    oaep_decoded(&encoded, if mechanism.contains("256+") { &SHA256 } else { &SHA1_FOR_LEGACY_USE_ONLY })
}

/// RFC 8017, section 7.1.2, step 3, without label. The leading zero byte is not in `encoded`.
fn oaep_decoded(encoded: &[u8], hash: &'static Algorithm) -> Vec<u8> {
    let mask = |seed: &[u8], data: &[u8]| -> Vec<u8> {
        let blocks =
            (0_u32..).flat_map(|at| digest(hash, &[seed, &at.to_be_bytes()].concat()).as_ref().to_vec());
        data.iter().zip(blocks).map(|(byte, mask)| byte ^ mask).collect()
    };
    let (seed, block) = encoded.split_at(hash.output_len());
    let seed = mask(block, seed);
    let block = mask(&seed, block);
    let (label, padded) = block.split_at(hash.output_len());
    assert_eq!(label, digest(hash, b"").as_ref());
    let end = padded.iter().position(|byte| *byte == 1).unwrap();
    assert!(padded[..end].iter().all(|byte| *byte == 0));
    padded[end + 1..].to_vec()
}

#[test]
fn what_has_no_associated_data_wraps_the_hash_of_it_and_a_tag_covers_all() {
    let vectors = vectors();
    for vector in &valid(&vectors)[12..] {
        let (name, mechanism) = (&vector["name"], vector["mechanism"].as_str().unwrap());
        let aad = bytes(&vector["wrap_aad"]);
        let first = bytes(&vector["wrapped_dek"]);
        let at = 4 + 1 + 16 + 4 + 1 + mechanism.len();
        let (iv, rest) = first[at + 1..].split_at(usize::from(first[at]));
        let mut encrypted = if mechanism.starts_with("RSA-") { &rest[2..] } else { &rest[1..] };
        if mechanism.ends_with("+HS256") {
            let tag;
            (encrypted, tag) = encrypted.split_at(encrypted.len() - 32);
            let parts = [b"lacre/sealed/v1/tag".as_slice(), &aad, iv, encrypted];
            let framed =
                parts.map(|part| [&u32::try_from(part.len()).unwrap().to_be_bytes()[..], part].concat());
            let mut mac = Hmac::<Sha256>::new_from_slice(&bytes(&vectors["mac_key"])).unwrap();
            mac.update(&framed.concat());
            mac.verify_slice(tag).unwrap();
        }
        let expected = [bytes(&vectors["dek"]), Sha256::digest(&aad).to_vec()].concat();
        assert!(unwrapped(&vectors, mechanism, encrypted) == expected, "{name}");
    }
}

#[test]
fn what_is_no_sealed_value_is_refused_without_a_device() {
    let vectors = vectors();
    for vector in vectors["invalid"].as_array().unwrap() {
        assert!(Sealed::from_bytes(&bytes(&vector["sealed"])).is_err(), "{}", vector["name"]);
    }
    // Every length of a good one but its own.
    let whole = bytes(&valid(&vectors)[0]["sealed"]);
    for len in 0..whole.len() {
        assert!(Sealed::from_bytes(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
    }
}

#[test]
fn every_other_format_and_algorithm_byte_is_refused() {
    let vectors = vectors();
    let whole = bytes(&valid(&vectors)[0]["sealed"]);
    let mechanism = 25..33;
    let payload = whole.windows(8).rposition(|part| part == b"\x07A256GCM").unwrap();
    for at in (0..5).chain(mechanism).chain(payload..payload + 8) {
        for byte in 0..=u8::MAX {
            let mut other = whole.clone();
            other[at] = byte;
            assert_eq!(Sealed::from_bytes(&other).is_ok(), byte == whole[at], "byte {at} is {byte:#x}");
        }
    }
    let [wrapped, iv, ciphertext, tag] = Sealed::from_bytes(&whole).unwrap().into_columns();
    for len in [0, 4, 8, 12, 15] {
        assert!(
            Sealed::from_columns(&wrapped, &iv, ciphertext.clone(), &tag[..len]).is_err(),
            "tag of {len}"
        );
    }
}

type Place = (String, String, String, u64);

fn aad((tenant, kind, record, version): &Place) -> Vec<u8> {
    Context { tenant, kind, record, version: *version }.payload_aad()
}

fn part() -> impl Strategy<Value = String> {
    // Short texts of few characters meet each other's boundaries often.
    prop_oneof![Just(String::new()), "[ab\u{0}/\u{e7}]{0,3}", ".{0,12}"]
}

proptest! {
    #[test]
    fn distinct_contexts_have_distinct_associated_data(
        one in (part(), part(), part(), 0..3_u64),
        two in (part(), part(), part(), 0..3_u64),
    ) {
        prop_assert_eq!(one == two, aad(&one) == aad(&two));
    }

    #[test]
    fn any_bytes_are_read_or_refused_and_never_more(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut framed = b"LCRS\x01".to_vec();
        framed.extend(&noise);
        for bytes in [noise, framed] {
            if let Ok(sealed) = Sealed::from_bytes(&bytes) {
                prop_assert_eq!(sealed.to_bytes(), bytes.clone());
            }
            if let Ok(key) = WrappedKey::from_bytes(&bytes) {
                prop_assert_eq!(key.to_bytes(), bytes);
            }
        }
    }
}
