//! A rewrap's DEK: on one device both calls are one job, between two it waits 50 ms and no longer (ME-8).

use std::time::{Duration, Instant};

use lacre::seal::{DeviceState, Kek, KeySpec, SealError, Sealer};
use serde_json::json;

use crate::shared::{kek, second, start};
use crate::shim::{ShimControl, shim_path};
use crate::stage::{HERE, Running, THERE, stage};

/// The next version of a KEK, with a device key of its own.
async fn next_version(device: &Running, kek: &Kek) -> Kek {
    Kek { id: kek.id, version: kek.version + 1, key: device.key(KeySpec::Kek).await }
}

/// Every call of the module so far.
fn calls(control: &ShimControl) -> u64 {
    control.counts().iter().filter(|(name, _)| name.starts_with("C_")).map(|(_, count)| count).sum()
}

#[tokio::test]
async fn on_one_device_a_rewrap_is_four_calls_one_after_the_other() {
    let stage = stage().await;
    let device = stage.start();
    let old = device.kek().await;
    let new = next_version(&device, &old).await;
    let sealed = device.sealer.seal(&old, &HERE, b"value").await.unwrap();
    // Both keys are looked up and tested.
    device.sealer.rewrap(&old, &new, &HERE, sealed.key()).await.unwrap();

    let before = calls(&stage.control);
    let names = ["C_DecryptInit", "C_Decrypt", "C_EncryptInit", "C_Encrypt"];
    let each = names.map(|name| stage.control.count(name));
    for _ in 0..10 {
        device.sealer.rewrap(&old, &new, &HERE, sealed.key()).await.unwrap();
    }
    assert_eq!(names.map(|name| stage.control.count(name)), each.map(|count| count + 10));
    assert_eq!(calls(&stage.control), before + 40);

    // Work of somebody who waits comes before or behind both of them, never in between: with the one thread
    // in a call, seals queue up, and the rewrap's second call is not behind those.
    stage.control.set_rules("C_Decrypt 1 sleep:300");
    let rewrap = device.sealer.rewrap(&old, &new, &HERE, sealed.key());
    let seals = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stage.control.set_rules("C_Encrypt 2 sleep:1500");
        device.sealer.seal(&old, &HERE, b"other").await
    };
    let began = Instant::now();
    let timed = async {
        let moved = rewrap.await;
        (moved, began.elapsed())
    };
    let ((moved, took), other) = tokio::join!(timed, seals);
    assert!(took < Duration::from_millis(1500), "{took:?}: behind the seal");
    other.unwrap();
    assert_eq!(moved.unwrap().kek_version(), 2);
}

#[tokio::test]
async fn a_session_lost_between_the_two_calls_has_both_repeated() {
    let stage = stage().await;
    for wrap in ["A256GCM", "A256KW-OBJ"] {
        let device = stage.try_start(json!({}), json!({ "wrap": wrap }), 64).unwrap();
        let old = device.kek().await;
        let new = next_version(&device, &old).await;
        let sealed = device.sealer.seal(&old, &HERE, b"value").await.unwrap();
        let again = device.sealer.rewrap(&old, &new, &HERE, sealed.key()).await.unwrap();
        let (unwraps, call) = match wrap {
            "A256GCM" => ("C_Decrypt", "C_EncryptInit"),
            _ => ("C_UnwrapKey", "C_WrapKey"),
        };
        // CKR_SESSION_HANDLE_INVALID. (Keys are looked up anew in the next session, which opens canaries.)
        let before = stage.control.count(unwraps);
        stage.control.set_rules(&format!("{call} 1 return:0xB3"));
        let moved = device.sealer.rewrap(&old, &new, &HERE, sealed.key()).await.unwrap();
        stage.control.set_rules("");

        assert!(stage.control.count(unwraps) >= before + 2, "{wrap}");
        assert_eq!(device.status().state, DeviceState::Ready);
        for moved in [again, moved] {
            // Under the new KEK it is what it was.
            let back = device.sealer.rewrap(&new, &old, &HERE, &moved).await.unwrap();
            assert_eq!(back.kek_version(), 1, "{wrap}");
            let elsewhere = device.sealer.rewrap(&new, &old, &THERE, &moved).await;
            assert!(matches!(elsewhere, Err(SealError::Rejected)), "{wrap}");
        }
        assert_eq!(device.arena.status().free, 64, "guarded memory is held");
    }
}

#[tokio::test]
async fn an_error_names_the_key_that_it_is_about() {
    let stage = stage().await;
    let device = stage.start();
    let old = device.kek().await;
    let sealed = device.sealer.seal(&old, &HERE, b"value").await.unwrap();
    let gone = next_version(&device, &old).await;
    device.admin.destroy(&gone.key).await.unwrap();
    let missing = device.sealer.rewrap(&old, &gone, &HERE, sealed.key()).await;
    assert!(matches!(missing, Err(SealError::KeyMissing { key }) if key == gone.key.id()));

    let new = next_version(&device, &old).await;
    device.admin.destroy(&old.key).await.unwrap();
    let missing = device.sealer.rewrap(&old, &new, &HERE, sealed.key()).await;
    assert!(matches!(missing, Err(SealError::KeyMissing { key }) if key == old.key.id()));
}

#[tokio::test]
async fn a_rewrap_from_or_to_an_rsa_kek_is_one_job_too() {
    let stage = stage().await;
    let rsa = stage.try_start(json!({}), json!({ "wrap": "RSA-OAEP+HS256" }), 64).unwrap();
    let key = rsa.key(KeySpec::Kek).await;
    drop(rsa);
    let device = stage.start();
    let aes = device.kek().await;
    let new = Kek { id: aes.id, version: 2, key };
    let sealed = device.sealer.seal(&aes, &HERE, b"value").await.unwrap();
    let moved = device.sealer.rewrap(&aes, &new, &HERE, sealed.key()).await.unwrap();
    let back = device.sealer.rewrap(&new, &aes, &HERE, &moved).await.unwrap();
    assert_eq!((moved.kek_version(), back.kek_version()), (2, 1));
}

/// Keeps the device of `kek` in seals for as long as `rewrapping` takes.
async fn beside_seals<T>(sealer: &Sealer, kek: &Kek, rewrapping: impl Future<Output = T>) -> T {
    let load: Vec<_> = (0..4)
        .map(|_| {
            let (sealer, kek) = (sealer.clone(), kek.clone());
            tokio::spawn(async move {
                loop {
                    let _ = sealer.seal(&kek, &HERE, b"load").await;
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let result = rewrapping.await;
    for task in load {
        task.abort();
        let _ = task.await;
    }
    result
}

#[tokio::test]
async fn between_devices_a_dek_that_waits_is_wiped_and_unwrapped_again_until_the_device_is_too_busy() {
    let stage = stage().await;
    let shim = shim_path();
    let devices = start(&stage, [&shim, &shim], second(&stage));
    let (from, to) = (kek(&devices, "b").await, kek(&devices, "default").await);
    let to = Kek { id: from.id, version: 2, ..to };
    let sealed = devices.sealer.seal(&from, &HERE, b"value").await.unwrap();
    devices.sealer.rewrap(&from, &to, &HERE, sealed.key()).await.unwrap();

    // One thread, and always somebody who waits: the rewrap's turn never comes.
    stage.control.set_rules("C_EncryptInit * sleep:40");
    let before = stage.control.count("C_DecryptInit");
    let (answer, took) = beside_seals(&devices.sealer, &to, async {
        let began = Instant::now();
        (devices.sealer.rewrap(&from, &to, &HERE, sealed.key()).await, began.elapsed())
    })
    .await;
    assert!(matches!(answer, Err(SealError::Busy { .. })), "{:?}", answer.err());
    assert_eq!(stage.control.count("C_DecryptInit"), before + 3, "three DEKs");
    assert!(took > Duration::from_millis(150), "{took:?}");

    // A device that is free takes as long as it takes.
    stage.control.set_rules("C_EncryptInit * sleep:200");
    let before = stage.control.count("C_DecryptInit");
    devices.sealer.rewrap(&from, &to, &HERE, sealed.key()).await.unwrap();
    assert_eq!(stage.control.count("C_DecryptInit"), before + 1);

    // Several at once do not expire behind each other.
    let (before, began) = (stage.control.count("C_DecryptInit"), Instant::now());
    let one = || devices.sealer.rewrap(&from, &to, &HERE, sealed.key());
    let all = tokio::join!(one(), one(), one(), one());
    assert!(all.0.is_ok() && all.1.is_ok() && all.2.is_ok() && all.3.is_ok());
    assert_eq!(stage.control.count("C_DecryptInit"), before + 4);
    assert!(began.elapsed() >= Duration::from_millis(800));

    // Busy for a moment only: the first DEK or two expire, the next one comes in time.
    stage.control.set_rules("C_EncryptInit 1 sleep:80");
    let before = stage.control.count("C_DecryptInit");
    let rewrap = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        devices.sealer.rewrap(&from, &to, &HERE, sealed.key()).await
    };
    let (sealing, moved) = tokio::join!(devices.sealer.seal(&to, &HERE, b"load"), rewrap);
    sealing.unwrap();
    moved.unwrap();
    let unwraps = stage.control.count("C_DecryptInit") - before;
    assert!((2..=3).contains(&unwraps), "{unwraps}");

    // A device that is away costs the other one no call.
    stage.control.set_rules("C_EncryptInit * return:0x30\nC_OpenSession * return:0x30");
    let _ = devices.sealer.seal(&to, &HERE, b"load").await;
    let before = stage.control.count("C_DecryptInit");
    let answer = devices.sealer.rewrap(&from, &to, &HERE, sealed.key()).await;
    assert!(matches!(answer, Err(SealError::Unavailable { .. })));
    assert_eq!(stage.control.count("C_DecryptInit"), before);
    devices.close();
}
