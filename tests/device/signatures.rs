//! Many signatures and many keys (KL-9, RO-8, RO-9): fixed lengths, right by the judgement of others, no nonce twice.

use std::collections::HashSet;

use lacre::seal::{Alg, KeySpec, PublicKey, check_rsa, shares_a_prime};

use crate::openssl::{verifies, verifies_here};
use crate::stage::{Running, Stage, stage};

/// Length of a signature of that key.
fn length(spec: KeySpec) -> usize {
    match spec {
        KeySpec::EcP384 => 96,
        KeySpec::Rsa2048 => 256,
        KeySpec::Rsa3072 => 384,
        KeySpec::Rsa4096 => 512,
        _ => 64,
    }
}

/// So many signatures of a fresh key, 32 at a time: each of the one length, verified by aws-lc, and a few by OpenSSL.
/// How many begin with a zero in one half.
async fn sign_many(stage: &Stage, device: &Running, (spec, alg): (KeySpec, Alg), count: usize) -> usize {
    let key = device.key(spec).await;
    let public = device.sealer.public_key(&key).await.unwrap();
    let (mut short, mut nonces) = (0, HashSet::new());
    for first in (0..count).step_by(32) {
        let messages: Vec<_> = (first..count.min(first + 32)).map(|at| format!("message {at}")).collect();
        let made = messages.iter().map(|message| device.sealer.sign(&key, alg, message.as_bytes()));
        for (message, signature) in messages.iter().zip(futures_util::future::join_all(made).await) {
            let signature = signature.unwrap();
            let bytes = signature.as_bytes();
            assert_eq!(bytes.len(), length(spec), "{alg:?}");
            assert!(verifies_here(&public, alg, message.as_bytes(), bytes), "{alg:?}: {message}");
            if matches!(alg, Alg::Es256 | Alg::Es384) {
                let (r, s) = bytes.split_at(bytes.len() / 2);
                assert!(nonces.insert(r.to_vec()), "a nonce twice");
                let is_short = r[0] == 0 || s[0] == 0;
                short += usize::from(is_short);
                if is_short && short <= 3 {
                    assert!(verifies(&stage.token.dir, &public, alg, message.as_bytes(), bytes), "openssl");
                }
            } else if first == 0 {
                assert!(verifies(&stage.token.dir, &public, alg, message.as_bytes(), bytes), "openssl");
            }
        }
    }
    assert!(device.admin.inspect(&key).await.unwrap().deviations.is_empty(), "{alg:?}: suspended");
    device.admin.destroy(&key).await.unwrap();
    short
}

const OTHERS: [(KeySpec, Alg); 7] = [
    (KeySpec::EcP384, Alg::Es384),
    (KeySpec::Rsa2048, Alg::Rs256),
    (KeySpec::Rsa2048, Alg::Ps256),
    (KeySpec::Rsa3072, Alg::Ps256),
    (KeySpec::Rsa4096, Alg::Rs256),
    (KeySpec::Rsa4096, Alg::Ps256),
    (KeySpec::Ed25519, Alg::EdDsa),
];

#[tokio::test]
async fn ten_thousand_signatures_have_one_length_and_verify() {
    let stage = stage().await;
    let device = stage.start();
    let short = sign_many(&stage, &device, (KeySpec::EcP256, Alg::Es256), 10_000).await;
    // Two halves, one in 256 each.
    assert!((30..150).contains(&short), "{short} with a leading zero");
}

#[tokio::test]
async fn signatures_of_every_algorithm_have_one_length_and_verify() {
    let stage = stage().await;
    let device = stage.start();
    for kind @ (spec, _) in OTHERS {
        let count = if matches!(spec, KeySpec::EcP384 | KeySpec::Ed25519) { 600 } else { 100 };
        sign_many(&stage, &device, kind, count).await;
    }
}

#[tokio::test]
#[ignore = "soak: minutes"]
async fn ten_thousand_signatures_of_every_algorithm_have_one_length_and_verify() {
    let stage = stage().await;
    let device = stage.start();
    for kind in OTHERS {
        sign_many(&stage, &device, kind, 10_000).await;
    }
    sign_many(&stage, &device, (KeySpec::EcP256, Alg::Es256), 100_000).await;
}

/// KL-9, on the keys of the token's own generator.
#[tokio::test]
async fn fifty_rsa_keys_of_the_token_pass() {
    let stage = stage().await;
    let device = stage.start();
    let mut moduli: Vec<Vec<u8>> = Vec::new();
    for _ in 0..50 {
        let key = device.key(KeySpec::Rsa2048).await;
        let PublicKey::Rsa { n, e } = device.sealer.public_key(&key).await.unwrap() else {
            panic!("no RSA key")
        };
        assert_eq!(check_rsa(&n, &e), Ok(()));
        assert_eq!(shares_a_prime(&n, moduli.iter().map(Vec::as_slice)), None);
        moduli.push(n);
        device.admin.destroy(&key).await.unwrap();
    }
}
