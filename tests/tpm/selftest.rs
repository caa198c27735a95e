//! KL-10 on a TPM: a chip that computes wrongly is not ready, says which test it failed, and comes back.

use std::time::{Duration, Instant};

use lacre::seal::{Alg, DeviceState, KeySpec, SealError};

use crate::proxy::{Alter, Proxy, Wire};
use crate::stage::{HERE, Running};
use crate::swtpm::Swtpm;

const HMAC: u32 = 0x155;
const SELF_TEST: u32 = 0x143;
const GET_RANDOM: u32 = 0x17B;
const GET_TEST_RESULT: u32 = 0x17C;
const SIGN: u32 = 0x15D;
const UNSEAL: u32 = 0x15E;

/// An answer's header, and the length of the parameters where there is a session.
const HEADER: usize = 10;
const WITH_SESSION: usize = HEADER + 4;
const FAILURE: [u8; 4] = [0, 0, 1, 1];

#[tokio::test]
async fn a_chip_that_computes_wrongly_is_not_ready_and_says_which_test_it_failed() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);
    let proxy = Proxy::before(&tpm);
    let ills: [(u32, Alter, &str); 7] = [
        (SELF_TEST, |answer| answer[6..HEADER].copy_from_slice(&FAILURE), "the chip's own test failed"),
        (
            GET_TEST_RESULT,
            |answer| {
                let at = answer.len() - 4;
                answer[at..].copy_from_slice(&FAILURE);
            },
            "the chip's own test failed",
        ),
        (GET_RANDOM, |answer| answer[HEADER + 2..].fill(0), "random numbers repeat or are zero"),
        (GET_RANDOM, |answer| answer[HEADER + 2..].fill(7), "random numbers repeat or are zero"),
        // After the length of the HMAC; after two algorithms and the length of r.
        (HMAC, |answer| answer[WITH_SESSION + 2 + 9] ^= 1, "an HMAC under a known key is not the known one"),
        (SIGN, |answer| answer[WITH_SESSION + 6 + 9] ^= 1, "a signature does not verify with its public key"),
        // In its session it cannot even lie.
        (UNSEAL, |answer| answer[WITH_SESSION + 2 + 9] ^= 1, "self-test: TPM2_Unseal"),
    ];
    for (command, how, why) in ills {
        proxy.set(Wire::Altered(command, how));
        let device = Running::at(&proxy.tcti(), &tpm);
        let opened = device.sealer.open(&kek, &HERE, &sealed).await;
        assert!(matches!(opened, Err(SealError::Unavailable { .. })), "{why}: {:?}", opened.err());
        // It is tested again and again meanwhile.
        for _ in 0..10 {
            let DeviceState::Away(reason) = device.status().state else {
                panic!("{why}: {:?}", device.status())
            };
            assert!(reason.contains("self-test") && reason.contains(why), "{why}: {reason}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        proxy.set(Wire::Clean);
        device.ready(Duration::from_secs(5)).await;
        device.opens(&kek, &sealed, b"value").await;
        device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    }
}

#[tokio::test]
async fn the_self_test_belongs_to_the_start_and_not_to_an_operation() {
    let tpm = Swtpm::new();
    let proxy = Proxy::before(&tpm);
    let began = Instant::now();
    let device = Running::at(&proxy.tcti(), &tpm);
    println!("a start with its self-test: {:?}", began.elapsed());
    assert_eq!(device.status().state, DeviceState::Ready);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    for _ in 0..5 {
        device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
        device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    }
    device.admin.inspect(&kek.key).await.unwrap();
    assert_eq!(proxy.count(GET_TEST_RESULT), 1);
    // Looking at a signing key tries it (the contract of every device).
    let before = proxy.count(SIGN);
    device.admin.inspect(&signer).await.unwrap();
    assert_eq!(proxy.count(SIGN), before + 1);
}
