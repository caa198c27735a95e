//! TP-4: other programs at a TPM without a resource manager, and what they leave in its slots.

use lacre::seal::{Alg, DeviceState, KeySpec};

use crate::foreign::{leave_an_object_behind, leave_objects_behind, leave_sessions_behind, save_sessions};
use crate::policy::{arena, config, sealed_source};
use crate::proxy::Proxy;
use crate::stage::{HERE, Running};
use crate::swtpm::Swtpm;

const START_AUTH_SESSION: u32 = 0x176;

/// A sealed secret needs a second session at the start, beside the one that everything needs.
#[tokio::test]
async fn sessions_that_others_left_are_flushed_and_ours_are_not() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);
    let source = sealed_source(&tpm, &arena());
    let proxy = Proxy::before(&tpm);
    let config = config(&tpm, &proxy.tcti(), &source);
    // Three places: one is left for the first session, none, or the policy session has one that is the last.
    for left in [2, 3, 1] {
        assert_eq!(leave_sessions_behind(&tpm.tcti(), left), left);
        // The sealed object has no place either, so that everything is flushed while the policy session is there.
        leave_an_object_behind(&tpm.tcti());
        leave_an_object_behind(&tpm.tcti());
        let before = proxy.count(START_AUTH_SESSION);
        let device = Running::with(&config);
        assert_eq!(device.status().state, DeviceState::Ready, "{left} were left");
        device.opens(&kek, &sealed, b"value").await;
        // One of each kind, and one that found no place where that had to be found out.
        let started = proxy.count(START_AUTH_SESSION) - before;
        assert_eq!(started, if left == 1 { 2 } else { 3 }, "{left} were left");
    }
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-loaded-session"]).trim(), "");

    let saved = save_sessions(&tpm.tcti());
    assert!(saved > 32, "{saved} sessions");
    let device = Running::with(&config);
    assert_eq!(device.status().state, DeviceState::Ready);
    device.opens(&kek, &sealed, b"value").await;
}

/// The device has two objects loaded and needs a third place in nearly every call.
#[tokio::test]
async fn objects_that_others_leave_while_it_runs_are_flushed_and_no_call_fails() {
    let tpm = Swtpm::new();
    let proxy = Proxy::before(&tpm);
    let device = Running::at(&proxy.tcti(), &tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let mac = device.key(KeySpec::HmacSha256).await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let sessions = proxy.count(START_AUTH_SESSION);
    let mut left = 0;
    for round in 0..10 {
        left += leave_objects_behind(&tpm.tcti());
        let loaded = tpm.tool(&["tpm2_getcap", "handles-transient"]).lines().count();
        assert_eq!(loaded, 3, "round {round}: there is room");
        if round % 2 == 0 {
            leave_sessions_behind(&tpm.tcti(), 2);
        }
        match round % 4 {
            0 => device.opens(&kek, &sealed, b"value").await,
            1 => drop(device.sealer.seal(&kek, &HERE, b"other").await.unwrap()),
            2 => drop(device.sealer.mac(&mac, b"m").await.unwrap()),
            _ => drop(device.kek().await),
        }
        device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
        device.sealer.mac(&mac, b"m").await.unwrap();
        assert_eq!(device.status().state, DeviceState::Ready);
    }
    assert!(left > 5, "{left} objects were left in ten rounds");
    assert_eq!(proxy.count(START_AUTH_SESSION), sessions, "our own session was flushed");
}
