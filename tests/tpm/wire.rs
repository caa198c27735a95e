//! TP-6: what somebody sees who listens between the processor and the chip.

use aws_lc_rs::hmac;
use lacre::seal::{Alg, KeyId, KeySpec, SealError};
use sha2::{Digest, Sha256};

use crate::proxy::Proxy;
use crate::stage::{HERE, Running};
use crate::swtpm::{Swtpm, program};

/// The text that a client would send as its secret.
const MESSAGE: &[u8] = b"canary of a client secret, 1234567890";

pub fn contains(seen: &[u8], needle: &[u8]) -> bool {
    seen.windows(needle.len()).any(|window| window == needle)
}

/// The data key that every KEK seals first: known to everybody (docs/formats).
fn canary(id: KeyId) -> Vec<u8> {
    Sha256::digest([&b"lacre/canary/v1"[..], id.as_bytes()].concat()).to_vec()
}

fn auth(secret: &[u8], id: &[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    hmac::sign(&key, &[b"lacre/tpm-auth/v1", id].concat()).as_ref().to_vec()
}

#[tokio::test]
async fn no_key_no_authorisation_and_no_message_crosses_in_clear() {
    let tpm = Swtpm::new();
    let proxy = Proxy::before(&tpm);
    let device = Running::at(&proxy.tcti(), &tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.opens(&kek, &sealed, b"value").await;
    let to = device.kek().await;
    device.sealer.rewrap(&kek, &to, &HERE, sealed.key()).await.unwrap();
    let (signer, mac) = (device.key(KeySpec::EcP256).await, device.key(KeySpec::HmacSha256).await);
    device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    device.sealer.mac(&mac, MESSAGE).await.unwrap();
    for key in [&kek.key, &to.key, &signer, &mac] {
        device.admin.inspect(key).await.unwrap();
    }
    device.capabilities().await.unwrap();
    drop(device);

    let seen = proxy.seen();
    assert!(seen.len() > 10_000, "the wire was not used");
    let secret = std::fs::read(&tpm.auth_file).unwrap();
    let mut needles = vec![MESSAGE.to_vec(), secret.clone(), hex::decode(&secret).unwrap()];
    for key in [&kek.key, &to.key, &signer, &mac] {
        needles.extend([canary(key.id()), auth(&secret, key.id().as_bytes())]);
    }
    for needle in &needles {
        let halves = [&needle[..needle.len() / 2], &needle[needle.len() / 2..]];
        assert!(!halves.iter().any(|half| contains(&seen, half)), "on the wire: {}", hex::encode(needle));
    }

    // The same wire shows what a program sends that does not care.
    std::fs::write(tpm.dir().join("plain"), MESSAGE).unwrap();
    let careless = program("sh")
        .args(["-c", "tpm2_createprimary -Q -c p.ctx && tpm2_create -Q -C p.ctx -i plain -u u -r r"])
        .env("TPM2TOOLS_TCTI", proxy.tcti())
        .current_dir(tpm.dir())
        .status()
        .unwrap();
    assert!(careless.success() && contains(&proxy.seen(), MESSAGE));
}

#[tokio::test]
async fn another_secret_stops_the_device_and_the_right_one_goes_on() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);
    let right = std::fs::read(&tpm.auth_file).unwrap();
    std::fs::write(&tpm.auth_file, "another secret, as long as it has to be, 0123456789").unwrap();
    for first in ["open", "sign"] {
        let device = Running::ready_on(&tpm);
        let answer = match first {
            "open" => device.sealer.open(&kek, &HERE, &sealed).await.map(drop),
            _ => device.sealer.sign(&signer, Alg::Es256, b"m").await.map(drop),
        };
        let Err(SealError::Unavailable { reason, .. }) = answer else { panic!("{first}: {answer:?}") };
        assert!(reason.contains("auth_source"), "{reason}");
    }
    std::fs::write(&tpm.auth_file, right).unwrap();
    let device = Running::ready_on(&tpm);
    device.opens(&kek, &sealed, b"value").await;
    device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
}
