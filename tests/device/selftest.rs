//! A device that is there and computes wrongly (KL-10): nothing is served with it, the reason is told, and
//! it is used again when it is well.

use std::time::{Duration, Instant};

use lacre::seal::{Alg, DeviceState, KeyRef, KeySpec, SealError};
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Options, TestDaemon, free_port};
use crate::served::{config, over, refused_for_now, stored, value_path};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;
use crate::stage::{HERE, Running, in_process, kek_of, stage};

/// The reason for which the device is away.
fn reason(device: &Running) -> String {
    match device.status().state {
        DeviceState::Away(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_key_is_not_used_before_it_has_passed_its_self_test() {
    let stage = stage().await;
    let device = stage.start();
    let [ec, rsa, mac] = [
        device.key(KeySpec::EcP256).await,
        device.key(KeySpec::Rsa2048).await,
        device.key(KeySpec::HmacSha256).await,
    ];
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);

    for (rule, key, alg) in [
        ("C_Sign * corrupt", &ec, Alg::Es256),
        ("C_Sign * zero", &rsa, Alg::Rs256),
        ("C_Sign * long", &ec, Alg::Es256),
    ] {
        stage.control.set_rules(rule);
        let device = stage.try_start(json!({}), json!({}), 64).unwrap();
        let answer = device.sealer.sign(key, alg, b"m").await;
        assert!(matches!(answer, Err(SealError::Unavailable { .. })), "{rule}: a signature left");
        assert!(reason(&device).contains("self-test: a signature"), "{rule}: {}", reason(&device));
        // Probes go on with the key that failed, although another one may work.
        tokio::time::sleep(Duration::from_secs(1)).await;
        reason(&device);
        stage.control.set_rules("");
        device.ready(Duration::from_secs(5)).await;
        device.sealer.sign(key, alg, b"m").await.unwrap();
        device.sealer.mac(&mac, b"m").await.unwrap();
    }
    for (rule, why) in [
        ("C_Encrypt * corrupt", "does not open"),
        ("C_EncryptInit * same-iv", "IVs"),
        ("C_Decrypt * corrupt", "does not open"),
    ] {
        stage.control.set_rules(rule);
        let device = stage.try_start(json!({}), json!({}), 64).unwrap();
        let answer = device.sealer.open(&kek, &HERE, &sealed).await;
        assert!(matches!(answer, Err(SealError::Unavailable { .. })), "{rule}: {:?}", answer.err());
        let reason = reason(&device);
        assert!(reason.contains("self-test") && reason.contains(why), "{rule}: {reason}");
        stage.control.set_rules("");
        device.ready(Duration::from_secs(5)).await;
        assert!(device.sealer.open(&kek, &HERE, &sealed).await.unwrap().with(|value| value == b"value"));
    }
}

#[tokio::test]
async fn one_corrupt_output_costs_a_moment_and_no_key() {
    let stage = stage().await;
    let device = stage.start();
    let ec = device.key(KeySpec::EcP256).await;
    let kek = kek_of(device.key(KeySpec::Kek).await);
    drop(device);
    // In the self-test of each key: its one signature, its second wrap.
    stage.control.set_rules("C_Sign 1 corrupt\nC_Encrypt 2 corrupt");
    let device = stage.start();
    assert!(device.sealer.sign(&ec, Alg::Es256, b"m").await.is_err());
    device.ready(Duration::from_secs(5)).await;
    device.sealer.sign(&ec, Alg::Es256, b"m").await.unwrap();
    assert!(device.sealer.seal(&kek, &HERE, b"value").await.is_err());
    device.ready(Duration::from_secs(5)).await;
    device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    assert!(device.admin.inspect(&kek.key).await.unwrap().deviations.is_empty());
}

/// Keys that are in use and have passed: what the device makes of a later message is looked at all the same.
async fn no_false_signature_leaves(device: &lacre::seal::Device, control: &ShimControl) {
    for (spec, algs) in [
        (KeySpec::EcP256, &[Alg::Es256][..]),
        (KeySpec::EcP384, &[Alg::Es384]),
        (KeySpec::Ed25519, &[Alg::EdDsa]),
        (KeySpec::Rsa2048, &[Alg::Rs256, Alg::Ps256]),
    ] {
        let key = device.admin.generate(&KeyRef::plan(spec).unwrap()).await.unwrap();
        for alg in algs {
            device.sealer.sign(&key, *alg, b"m").await.unwrap();
            control.set_rules("C_Sign 1 corrupt");
            let answer = device.sealer.sign(&key, *alg, b"m").await;
            assert!(matches!(answer, Err(SealError::Unavailable { .. })), "{alg:?}: a signature left");
            control.set_rules("");
            ready(device).await;
            device.sealer.sign(&key, *alg, b"m").await.unwrap();
        }
        device.admin.destroy(&key).await.unwrap();
    }
    // As long as it lasts the device is away: the probes look too.
    let key = device.admin.generate(&KeyRef::plan(KeySpec::EcP256).unwrap()).await.unwrap();
    device.sealer.sign(&key, Alg::Es256, b"m").await.unwrap();
    control.set_rules("C_Sign * corrupt");
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        let answer = device.sealer.sign(&key, Alg::Es256, b"m").await;
        assert!(matches!(answer, Err(SealError::Unavailable { .. })), "a signature left");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    match device.status().state {
        DeviceState::Away(reason) => assert!(reason.contains("self-test: a signature"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert!(device.status().key_failures == 0, "the device is blamed, not the key");
    control.set_rules("");
    ready(device).await;
    device.sealer.sign(&key, Alg::Es256, b"m").await.unwrap();
    device.admin.destroy(&key).await.unwrap();
}

async fn ready(device: &lacre::seal::Device) {
    let began = Instant::now();
    while device.status().state != DeviceState::Ready {
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", device.status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn every_signature_is_verified_before_it_leaves() {
    let stage = stage().await;
    let device = stage.start();
    no_false_signature_leaves(&device, &stage.control).await;
}

#[tokio::test]
async fn every_signature_is_verified_in_the_sealer_process() {
    let stage = stage().await;
    let (device, _arena) = in_process(&stage);
    no_false_signature_leaves(&device, &stage.control).await;
    device.close();
}

#[tokio::test]
async fn a_self_test_is_not_part_of_an_operation() {
    let stage = stage().await;
    let device = stage.start();
    let ec = device.key(KeySpec::EcP256).await;
    device.sealer.sign(&ec, Alg::Es256, b"m").await.unwrap();
    let before = stage.control.count("C_Sign");
    for _ in 0..10 {
        device.sealer.sign(&ec, Alg::Es256, b"m").await.unwrap();
    }
    assert_eq!(stage.control.count("C_Sign"), before + 10);
    // Lost sessions find the key again and do not test it again.
    stage.control.set_rules("C_SignInit 1 close-all-sessions");
    device.sealer.sign(&ec, Alg::Es256, b"m").await.unwrap();
    assert_eq!(stage.control.count("C_Sign"), before + 11);
    // An inspection does.
    device.admin.inspect(&ec).await.unwrap();
    assert_eq!(stage.control.count("C_Sign"), before + 12);
}

#[tokio::test]
async fn a_daemon_whose_device_signs_wrongly_is_not_ready_says_why_and_becomes_ready_when_it_is_well() {
    let control = ShimControl::new(&softhsm::module());
    let listen = format!("127.0.0.1:{}", free_port());
    let text = config(&shim_path(), "").replace("127.0.0.1:0", &listen);
    let mut daemon = TestDaemon::start(Options { config: Some(text), ..over(&control, "") }).await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = stored(&api, "kept", &value).await;
    daemon.stop().await;

    control.set_rules("C_Sign * corrupt");
    let base = format!("http://{listen}");
    let watched = async {
        let (client, began) = (Client::new(), Instant::now());
        let verbose = || async {
            let answer = client.get(format!("{base}/readyz?verbose")).send().await.ok()?;
            Some((answer.status(), answer.text().await.ok()?))
        };
        loop {
            if let Some((status, text)) = verbose().await {
                assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
                if text.contains("self-test: a signature does not verify") {
                    break;
                }
            }
            assert!(began.elapsed() < Duration::from_secs(20), "it does not say why");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Longer than the time in which an unfit key ends a daemon that has just started.
        for _ in 0..12 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(verbose().await.unwrap().0, StatusCode::SERVICE_UNAVAILABLE);
            refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
        }
        let jwks = client.request(Method::GET, format!("{base}/oidc/jwks")).send().await.unwrap();
        assert_eq!(jwks.status(), StatusCode::SERVICE_UNAVAILABLE, "a key that nothing vouches for");
        control.set_rules("");
    };
    let (became_ready, ()) = tokio::join!(daemon.try_run(), watched);

    assert!(became_ready, "{}", daemon.log());
    let api = daemon.api().await;
    assert_eq!(api.value(&id).await, value);
    let incidents = api.audit_lines().await.into_iter().filter(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        record["action"] == "incident.key"
    });
    assert_eq!(incidents.count(), 0, "a key was blamed");
    daemon.finish().await;
}
