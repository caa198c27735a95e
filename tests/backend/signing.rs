//! Signatures and MACs: of the form that JOSE has, and right by the judgement of others.

use std::time::{Duration, Instant};

use lacre::seal::{Alg, KeySpec, PublicKey, SealError};

use crate::openssl::{verifies, verifies_here};
use crate::stage::{Running, Stage, rounds};

pub async fn signatures_have_the_jose_form_and_foreign_code_accepts_them(stage: &Stage) {
    let device = stage.start().await;
    let capabilities = stage.capabilities(&device).await;
    let mut tried = Vec::new();
    for spec in stage.specs(&device, true).await {
        if matches!(spec, KeySpec::Kek | KeySpec::HmacSha256) {
            continue;
        }
        let key = device.key(spec).await;
        let public = device.sealer.public_key(&key).await.unwrap();
        for alg in Alg::ALL {
            if !alg.fits(spec) {
                let unfit = device.sealer.sign(&key, alg, b"m").await;
                assert!(matches!(unfit, Err(SealError::Refused { .. })), "{alg:?} with {spec:?}");
            } else if capabilities["algorithms"][alg.name()] == true {
                sign_many(stage, &device, &key, alg, &public).await;
                tried.push(alg);
            }
        }
        device.destroy(&[&key]).await;
    }
    let offered = |alg: &Alg| capabilities["algorithms"][alg.name()] == true;
    assert!(Alg::ALL.iter().filter(|alg| offered(alg)).all(|alg| tried.contains(alg)), "{tried:?}");
    device.assert_ready();
}

/// RO-8: one ECDSA half in 256 begins with a zero byte, and some devices leave that out.
async fn sign_many(stage: &Stage, device: &Running, key: &lacre::seal::KeyRef, alg: Alg, public: &PublicKey) {
    let width = match public {
        PublicKey::Ec { x, y, .. } => {
            assert_eq!(x.len(), y.len());
            assert_eq!(x.len(), if alg == Alg::Es384 { 48 } else { 32 }, "full width");
            x.len() * 2
        }
        PublicKey::Rsa { n, .. } => {
            assert_ne!(n[0], 0, "no leading zero");
            n.len()
        }
        PublicKey::Ed { x } => {
            assert_eq!(x.len(), 32);
            64
        }
    };
    let began = Instant::now();
    device.sealer.sign(key, alg, b"first").await.unwrap();
    let most = if matches!(alg, Alg::Es256 | Alg::Es384) { 700 } else { 25 };
    let rounds = rounds(began.elapsed(), Duration::from_secs(1), most);
    for round in 0..rounds {
        let message = format!("message {round}");
        let signature = device.sealer.sign(key, alg, message.as_bytes()).await.unwrap();
        let bytes = signature.as_bytes();
        assert_eq!(bytes.len(), width, "{alg:?}");
        assert!(verifies_here(public, alg, message.as_bytes(), bytes), "{alg:?}, round {round}");
        if round % rounds.div_ceil(3) == 0 {
            assert!(verifies(&stage.dir, public, alg, message.as_bytes(), bytes), "{alg:?}: openssl");
            assert!(!verifies(&stage.dir, public, alg, b"another", bytes), "{alg:?}: openssl takes anything");
        }
    }
}

pub async fn a_mac_depends_on_key_and_message_and_nothing_else(stage: &Stage) {
    let device = stage.start().await;
    let (key, other) = (device.key(KeySpec::HmacSha256).await, device.key(KeySpec::HmacSha256).await);
    let mac = device.sealer.mac(&key, b"message").await.unwrap();
    assert_eq!(device.sealer.mac(&key, b"message").await.unwrap(), mac);
    assert_ne!(device.sealer.mac(&key, b"message ").await.unwrap(), mac);
    assert_ne!(device.sealer.mac(&key, b"").await.unwrap(), mac);
    assert_ne!(device.sealer.mac(&other, b"message").await.unwrap(), mac);
    // RFC 2104: a block more than the hash takes at once.
    let long = device.sealer.mac(&key, &[7; 1000]).await.unwrap();
    assert_eq!(device.sealer.mac(&key, &[7; 1000]).await.unwrap(), long);
    assert_ne!(device.sealer.mac(&key, &[7; 1001]).await.unwrap(), long);
    drop(device);

    let device = stage.start().await;
    assert_eq!(device.sealer.mac(&key, b"message").await.unwrap(), mac);
    device.destroy(&[&key, &other]).await;
}
