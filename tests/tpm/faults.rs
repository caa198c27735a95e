//! TP-1 to TP-5: lockout, power cuts, a cleared chip, full slots, and a bad wire.

use std::time::{Duration, Instant};

use lacre::seal::{Alg, DeviceState, KeyRef, KeySpec, SealError};
use rustix::process::Signal;

use crate::proxy::{Alter, Proxy, Wire};
use crate::stage::{HERE, Running};
use crate::swtpm::Swtpm;

/// Part 2, section 6.5.2.
const START_AUTH_SESSION: u32 = 0x0000_0176;

pub fn failed_tries(tpm: &Swtpm) -> u64 {
    let listed = tpm.tool(&["tpm2_getcap", "properties-variable"]);
    let line = listed.lines().find(|line| line.contains("TPM2_PT_LOCKOUT_COUNTER")).unwrap();
    u64::from_str_radix(line.rsplit("0x").next().unwrap().trim(), 16).unwrap()
}

/// TP-1.
#[tokio::test]
async fn a_lockout_that_others_caused_is_told_and_stops_nothing() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    assert_eq!(device.status().notice, None);

    // Somebody guesses the password of an object that is under the protection, and has no regard for what
    // is loaded.
    tpm.tool(&["tpm2_createprimary", "-Q", "-c", "p.ctx"]);
    tpm.tool(&["tpm2_flushcontext", "-t"]);
    tpm.tool(&["tpm2_create", "-Q", "-C", "p.ctx", "-p", "right", "-c", "k.ctx", "-G", "ecc"]);
    for _ in 0..4 {
        tpm.tool(&["tpm2_flushcontext", "-t"]);
        let guess = tpm.try_tool(&["tpm2_sign", "-Q", "-c", "k.ctx", "-p", "wrong", "-o", "s", "auth"]);
        assert!(!guess.status.success());
    }
    tpm.tool(&["tpm2_flushcontext", "-t"]);
    let before = failed_tries(&tpm);
    assert!(before >= 3, "{before}");

    device.opens(&kek, &sealed, b"value").await;
    device.admin.inspect(&kek.key).await.unwrap();
    let notice = device.status().notice.unwrap();
    assert!(notice.starts_with("tpm_lockout") && notice.contains("1000 seconds"), "{notice}");
    assert_eq!(device.status().state, DeviceState::Ready);
    drop(device);
    let device = Running::ready_on(&tpm);
    device.opens(&kek, &sealed, b"value").await;
    assert_eq!(failed_tries(&tpm), before, "a try was spent");

    tpm.tool(&["tpm2_dictionarylockout", "--clear-lockout"]);
    device.admin.inspect(&kek.key).await.unwrap();
    assert_eq!(device.status().notice, None);
}

/// TP-2. With one object of the chain under the protection this locks at the fourth round.
#[tokio::test]
async fn ten_power_cuts_cost_no_try() {
    let mut tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    for round in 0..10 {
        device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
        device.opens(&kek, &sealed, b"value").await;
        tpm.kill();
        device.away(&kek).await;
        tpm.start();
        assert!(device.ready(Duration::from_secs(6)).await < Duration::from_secs(5), "round {round}");
        assert_eq!(failed_tries(&tpm), 0, "round {round}");
    }
    device.opens(&kek, &sealed, b"value").await;
}

/// Waits until the device says that its TPM was cleared, and nothing else.
async fn cleared(device: &Running) {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match device.status().state {
            DeviceState::Stopped(reason) => {
                assert!(reason.starts_with("tpm_cleared"), "{reason}");
                return;
            }
            state => assert!(Instant::now() < until, "{state:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// TP-3.
#[tokio::test]
async fn a_cleared_tpm_is_recognised_and_nothing_is_made_in_it() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    tpm.tool(&["tpm2_clear", "-c", "p"]);

    let refused = device.sealer.open(&kek, &HERE, &sealed).await;
    assert!(matches!(refused, Err(SealError::Unavailable { .. })), "not opened, not blamed on the row");
    cleared(&device).await;
    drop(device);
    let again = Running::on(&tpm);
    cleared(&again).await;
    let made = again.admin.generate(&KeyRef::plan(KeySpec::Kek).unwrap()).await;
    assert!(matches!(made, Err(SealError::Unavailable { .. })), "{made:?}");
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-nv-index"]).trim(), "");
}

/// TP-3: what opens the secret went with the TPM, and that is not what is told first.
#[tokio::test]
async fn a_cleared_tpm_is_recognised_where_the_secret_is_sealed_too() {
    let tpm = Swtpm::new();
    let source = crate::policy::sealed_source(&tpm, &crate::policy::arena());
    let config = crate::policy::config(&tpm, &tpm.tcti(), &source);
    let device = Running::with(&config);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    tpm.tool(&["tpm2_clear", "-c", "p"]);

    let refused = device.sealer.open(&kek, &HERE, &sealed).await;
    assert!(matches!(refused, Err(SealError::Unavailable { .. })), "not opened, not blamed on the row");
    cleared(&device).await;
    drop(device);
    let again = Running::with(&config);
    cleared(&again).await;
    let made = again.admin.generate(&KeyRef::plan(KeySpec::Kek).unwrap()).await;
    assert!(matches!(made, Err(SealError::Unavailable { .. })), "{made:?}");
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-nv-index"]).trim(), "");
}

/// TP-4.
#[tokio::test]
async fn what_others_left_in_the_slots_is_flushed_once_it_is_in_the_way() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);
    for _ in 0..3 {
        crate::foreign::leave_an_object_behind(&tpm.tcti());
    }
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-transient"]).lines().count(), 3);
    let device = Running::ready_on(&tpm);
    device.opens(&kek, &sealed, b"value").await;
}

/// TP-4: at most three objects at a time, and none left over.
#[tokio::test]
async fn ten_thousand_operations_leave_nothing_loaded() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let mac = device.key(KeySpec::HmacSha256).await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    for round in 0..10_000 {
        // Mostly the quickest one: what could leak is the same in each.
        match round % 50 {
            0 => device.opens(&kek, &sealed, b"value").await,
            25 => drop(device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap()),
            _ => drop(device.sealer.mac(&mac, b"m").await.unwrap()),
        }
    }
    // Asked between two calls: another connection, to the same slots.
    let loaded = tpm.tool(&["tpm2_getcap", "handles-transient"]).lines().count();
    assert!(loaded <= 2, "{loaded} objects");
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-loaded-session"]).lines().count(), 1);
    drop(device);
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-transient"]).trim(), "");
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-loaded-session"]).trim(), "");
}

/// TP-5.
#[tokio::test]
async fn a_bad_wire_is_an_outage_that_heals() {
    let tpm = Swtpm::new();
    let proxy = Proxy::before(&tpm);
    let device = Running::at(&proxy.tcti(), &tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    for wire in [Wire::Cut(0), Wire::Cut(4), Wire::Cut(40), Wire::Garbage, Wire::TooLong] {
        proxy.set(wire);
        let began = Instant::now();
        let refused = device.sealer.open(&kek, &HERE, &sealed).await;
        assert!(matches!(refused, Err(SealError::Unavailable { .. })), "{wire:?}");
        assert!(began.elapsed() < Duration::from_secs(7), "{wire:?}: {:?}", began.elapsed());
        proxy.set(Wire::Clean);
        device.ready(Duration::from_secs(10)).await;
        device.opens(&kek, &sealed, b"value").await;
    }
    // Slow and right.
    proxy.set(Wire::Late(Duration::from_millis(500)));
    device.opens(&kek, &sealed, b"value").await;
    // Answers after the deadline: nobody takes them for those of later commands.
    proxy.set(Wire::Late(Duration::from_secs(7)));
    let late = device.sealer.open(&kek, &HERE, &sealed).await;
    assert!(matches!(late, Err(SealError::Unavailable { .. })));
    proxy.set(Wire::Clean);
    // The call that waits may still be taken for one that hangs; then the device is away for a while.
    let until = Instant::now() + Duration::from_secs(30);
    while device.sealer.seal(&kek, &HERE, b"is it back?").await.is_err() {
        assert!(Instant::now() < until, "{:?}", device.status());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for round in 0..20 {
        let value = format!("value {round}");
        let sealed = device.sealer.seal(&kek, &HERE, value.as_bytes()).await.unwrap();
        device.opens(&kek, &sealed, value.as_bytes()).await;
    }
}

/// TP-5: the first use after a start is when a key has to prove that it is itself.
#[tokio::test]
async fn a_bad_wire_at_the_first_use_of_a_key_blames_no_key() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);
    let proxy = Proxy::before(&tpm);
    let everything: Alter = |bytes| bytes.iter_mut().for_each(|byte| *byte ^= 0xA5);
    let its_end: Alter = |bytes| *bytes.last_mut().unwrap() ^= 1;
    // Behind the header: a length that is too long is another test's.
    let its_middle: Alter = |bytes| {
        let at = 10 + (bytes.len() - 10) / 2;
        bytes[at.min(bytes.len() - 1)] ^= 0x10;
    };
    // A refusal that the TPM does not prove: of a blob that was altered, of an index that was never written.
    let bad_blob: Alter = |bytes| bytes[6..10].copy_from_slice(&0x1DF_u32.to_be_bytes());
    let unwritten: Alter = |bytes| bytes[6..10].copy_from_slice(&0x14A_u32.to_be_bytes());
    let mut blamed = Vec::new();
    for (what, how) in [
        ("everything", everything),
        ("its end", its_end),
        ("its middle", its_middle),
        ("a bad blob", bad_blob),
        ("an unwritten index", unwritten),
    ] {
        for after in 0.. {
            let device = Running::at(&proxy.tcti(), &tpm);
            assert_eq!(device.status().state, DeviceState::Ready);
            proxy.spoil(after, how);
            let opened = device.sealer.open(&kek, &HERE, &sealed).await;
            let signed = device.sealer.sign(&signer, Alg::Es256, b"m").await;
            let looks = [device.admin.inspect(&kek.key).await, device.admin.inspect(&signer).await];
            let hit = proxy.has_spoiled();
            let mut looked = Vec::new();
            for look in looks {
                match look {
                    Ok(report) if report.deviations.is_empty() => {}
                    Ok(report) => blamed.push(format!("{what} of answer {after}: {:?}", report.deviations)),
                    Err(error) => looked.push(error),
                }
            }
            for error in [opened.err(), signed.err()].into_iter().flatten().chain(looked) {
                let state = device.status().state;
                // An admin call is told apart from a refusal by the caller, who looks again.
                let passes = matches!(error, SealError::Unavailable { .. } | SealError::Unknown { .. });
                if !passes || matches!(state, DeviceState::Stopped(_)) {
                    blamed.push(format!("{what} of answer {after}: {error:?}, {state:?}"));
                }
            }
            device.ready(Duration::from_secs(10)).await;
            device.opens(&kek, &sealed, b"value").await;
            device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
            for key in [&kek.key, &signer] {
                let report = device.admin.inspect(key).await.unwrap();
                assert!(report.deviations.is_empty(), "{what} of {after}: {report:?}");
            }
            if !hit {
                assert!(after > 10, "{after} answers");
                break;
            }
        }
    }
    assert!(blamed.is_empty(), "{blamed:#?}");
}

/// HS-9 on a TPM: who asks for a missing key costs nobody the connection.
#[tokio::test]
async fn a_missing_key_is_looked_for_twice_and_then_believed_to_be_missing() {
    let tpm = Swtpm::new();
    let proxy = Proxy::before(&tpm);
    let device = Running::at(&proxy.tcti(), &tpm);
    let (kek, lost) = (device.kek().await, device.kek().await);
    let sealed = device.sealer.seal(&lost, &HERE, b"value").await.unwrap();
    device.admin.destroy(&lost.key).await.unwrap();
    device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let connections = || proxy.count(START_AUTH_SESSION);
    let before = connections();
    for _ in 0..10 {
        let refused = device.sealer.open(&lost, &HERE, &sealed).await.err();
        assert!(matches!(refused, Some(SealError::KeyMissing { .. })), "{refused:?}");
        device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    }
    assert_eq!(connections(), before + 1);
}

/// TP-5.
#[tokio::test]
async fn a_tpm_that_stops_answering_is_an_outage_and_comes_back() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    tpm.signal(Signal::STOP);
    let began = Instant::now();
    let answer = device.sealer.open(&kek, &HERE, &sealed).await;
    assert!(matches!(answer, Err(SealError::Unavailable { .. })));
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    tpm.signal(Signal::CONT);
    device.ready(Duration::from_secs(15)).await;
    device.opens(&kek, &sealed, b"value").await;
}
