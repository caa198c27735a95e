//! The keys on the token as other programs see them (KL-1), and keys that somebody planted (KL-2).

use std::collections::BTreeMap;

use cryptoki_sys::{
    CK_FALSE, CK_TRUE, CKA_ALLOWED_MECHANISMS, CKA_ALWAYS_SENSITIVE, CKA_CLASS, CKA_COPYABLE, CKA_DECRYPT,
    CKA_DERIVE, CKA_EC_PARAMS, CKA_EC_POINT, CKA_ENCRYPT, CKA_EXTRACTABLE, CKA_ID, CKA_KEY_TYPE, CKA_LABEL,
    CKA_LOCAL, CKA_MODIFIABLE, CKA_NEVER_EXTRACTABLE, CKA_PRIVATE, CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN,
    CKA_UNWRAP, CKA_VALUE, CKA_VERIFY, CKA_WRAP, CKK_AES, CKK_EC, CKM_AES_GCM, CKM_AES_KEY_WRAP, CKM_ECDSA,
    CKM_RSA_PKCS, CKM_RSA_PKCS_PSS, CKM_SHA256_HMAC, CKO_PRIVATE_KEY, CKO_PUBLIC_KEY, CKO_SECRET_KEY,
};
use lacre::seal::{Alg, DeviceState, KeyRef, KeySpec, SealError};
use serde_json::json;

use crate::raw::{Session, attribute};
use crate::stage::{HERE, hex_id, kek_of, stage};

/// The attributes that are true, of those that matter.
fn switched_on(session: &Session, class: u64, key: &KeyRef) -> Vec<&'static str> {
    let names = BTreeMap::from([
        ("always-sensitive", CKA_ALWAYS_SENSITIVE),
        ("copyable", CKA_COPYABLE),
        ("decrypt", CKA_DECRYPT),
        ("derive", CKA_DERIVE),
        ("encrypt", CKA_ENCRYPT),
        ("extractable", CKA_EXTRACTABLE),
        ("local", CKA_LOCAL),
        ("modifiable", CKA_MODIFIABLE),
        ("never-extractable", CKA_NEVER_EXTRACTABLE),
        ("private", CKA_PRIVATE),
        ("sensitive", CKA_SENSITIVE),
        ("sign", CKA_SIGN),
        ("token", CKA_TOKEN),
        ("unwrap", CKA_UNWRAP),
        ("verify", CKA_VERIFY),
        ("wrap", CKA_WRAP),
    ]);
    let object = session.find(class, key.id().as_bytes()).expect("one object");
    let is_on = |kind| session.value(object, kind).is_ok_and(|value| value == [CK_TRUE]);
    names.into_iter().filter(|(_, kind)| is_on(*kind)).map(|(name, _)| name).collect()
}

fn mechanisms(session: &Session, class: u64, key: &KeyRef) -> Vec<u64> {
    let object = session.find(class, key.id().as_bytes()).expect("one object");
    let list = session.value(object, CKA_ALLOWED_MECHANISMS).unwrap();
    list.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
}

fn with_roles(roles: &[&'static str]) -> Vec<&'static str> {
    let custody = ["always-sensitive", "local", "never-extractable", "private", "sensitive", "token"];
    let mut all = [&custody[..], roles].concat();
    all.sort_unstable();
    all
}

#[tokio::test]
async fn every_key_has_one_role_one_mechanism_and_full_custody() {
    let stage = stage().await;
    for (wrap, roles, mechanism) in [
        ("A256GCM", ["decrypt", "encrypt"], CKM_AES_GCM),
        ("A256KW-OBJ", ["unwrap", "wrap"], CKM_AES_KEY_WRAP),
    ] {
        let device = stage.try_start(json!({}), json!({ "wrap": wrap }), 64).unwrap();
        let key = device.key(KeySpec::Kek).await;
        let session = stage.other_session();
        assert_eq!(switched_on(&session, CKO_SECRET_KEY, &key), with_roles(&roles));
        assert_eq!(mechanisms(&session, CKO_SECRET_KEY, &key), [mechanism]);
    }
    let device = stage.start();
    let session = stage.other_session();
    let cases: [(KeySpec, u64, &[u64]); 6] = [
        (KeySpec::HmacSha256, CKO_SECRET_KEY, &[CKM_SHA256_HMAC]),
        (KeySpec::EcP256, CKO_PRIVATE_KEY, &[CKM_ECDSA]),
        (KeySpec::EcP384, CKO_PRIVATE_KEY, &[CKM_ECDSA]),
        (KeySpec::Rsa2048, CKO_PRIVATE_KEY, &[CKM_RSA_PKCS, CKM_RSA_PKCS_PSS]),
        (KeySpec::Rsa3072, CKO_PRIVATE_KEY, &[CKM_RSA_PKCS, CKM_RSA_PKCS_PSS]),
        (KeySpec::Rsa4096, CKO_PRIVATE_KEY, &[CKM_RSA_PKCS, CKM_RSA_PKCS_PSS]),
    ];
    for (spec, class, allowed) in cases {
        let key = device.key(spec).await;
        assert_eq!(switched_on(&session, class, &key), with_roles(&["sign"]), "{spec:?}");
        assert_eq!(mechanisms(&session, class, &key), allowed, "{spec:?}");
        // The same once more by a program that shares no code with this one.
        let id = hex_id(key.id());
        let listed = stage.objects(&id).into_iter().find(|object| !object.starts_with("Public")).unwrap();
        // (It does not know that a secret key can sign.)
        let usage = if class == CKO_SECRET_KEY { "none" } else { "sign" };
        assert!(listed.contains(&format!("Usage:      {usage}\n")), "{listed}");
        assert!(listed.contains("sensitive, always sensitive, never extractable, local"), "{listed}");
    }
}

#[tokio::test]
async fn a_key_cannot_be_weakened_afterwards() {
    let stage = stage().await;
    let device = stage.start();
    let key = device.key(KeySpec::Kek).await;
    let session = stage.other_session();
    let object = session.find(CKO_SECRET_KEY, key.id().as_bytes()).unwrap();
    for kind in [CKA_EXTRACTABLE, CKA_WRAP, CKA_MODIFIABLE, CKA_COPYABLE] {
        assert!(session.set(object, &[attribute(kind, &[CK_TRUE])]).is_err(), "{kind:#x}");
    }
    assert!(session.set(object, &[attribute(CKA_SENSITIVE, &[CK_FALSE])]).is_err());
    assert!(session.value(object, CKA_VALUE).is_err());
    assert!(device.admin.inspect(&key).await.unwrap().deviations.is_empty());
}

/// A secret key that anybody who knows the PIN can make.
fn plant_secret(session: &Session, id: &[u8], label: &[u8]) {
    let (class, kind) = (CKO_SECRET_KEY.to_ne_bytes(), CKK_AES.to_ne_bytes());
    session
        .create(&[
            attribute(CKA_CLASS, &class),
            attribute(CKA_KEY_TYPE, &kind),
            attribute(CKA_TOKEN, &[CK_TRUE]),
            attribute(CKA_PRIVATE, &[CK_TRUE]),
            attribute(CKA_ENCRYPT, &[CK_TRUE]),
            attribute(CKA_DECRYPT, &[CK_TRUE]),
            attribute(CKA_ID, id),
            attribute(CKA_LABEL, label),
            attribute(CKA_VALUE, &[7; 32]),
        ])
        .unwrap();
}

fn plant_public(session: &Session, id: &[u8]) {
    let secret = p256::SecretKey::from_slice(&[9; 32]).unwrap();
    let point = secret.public_key().to_sec1_bytes();
    let point = [&[4, 65], point.as_ref()].concat();
    let (class, kind) = (CKO_PUBLIC_KEY.to_ne_bytes(), CKK_EC.to_ne_bytes());
    let p256 = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    session
        .create(&[
            attribute(CKA_CLASS, &class),
            attribute(CKA_KEY_TYPE, &kind),
            attribute(CKA_TOKEN, &[CK_TRUE]),
            attribute(CKA_VERIFY, &[CK_TRUE]),
            attribute(CKA_ID, id),
            attribute(CKA_EC_PARAMS, &p256),
            attribute(CKA_EC_POINT, &point),
        ])
        .unwrap();
}

#[tokio::test]
async fn a_second_key_with_the_same_id_stops_that_key_only() {
    let stage = stage().await;
    let device = stage.start();
    let (kek, other) = (device.kek().await, device.kek().await);
    let sealed = device.sealer.seal(&other, &HERE, b"value").await.unwrap();
    plant_secret(&stage.other_session(), kek.key.id().as_bytes(), b"planted");
    drop(device);

    let device = stage.start();
    let answer = device.sealer.seal(&kek, &HERE, b"value").await;
    let Err(SealError::KeyUnfit { key, reason }) = answer else { panic!("used an ambiguous key") };
    assert!(key == kek.key.id() && reason.contains("2 objects"), "{reason}");
    let report = device.admin.inspect(&kek.key).await.unwrap();
    assert!(report.deviations[0].contains("2 objects"));
    assert_eq!(device.status().state, DeviceState::Ready);
    device.sealer.open(&other, &HERE, &sealed).await.unwrap();
    device.admin.destroy(&kek.key).await.unwrap();
}

#[tokio::test]
async fn found_by_an_inspection_a_planted_key_stops_the_sessions_that_had_found_the_right_one() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    plant_secret(&stage.other_session(), kek.key.id().as_bytes(), b"planted");

    // The handle is known and right: it stays in use until somebody looks.
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
    assert!(!device.admin.inspect(&kek.key).await.unwrap().deviations.is_empty());
    let answer = device.sealer.open(&kek, &HERE, &sealed).await;
    assert!(matches!(answer, Err(SealError::KeyUnfit { .. })));
    device.admin.destroy(&kek.key).await.unwrap();
}

#[tokio::test]
async fn a_key_with_the_same_label_is_nobody() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let label = format!("lacre kek-aes256 {}", &hex_id(kek.key.id())[..8]);
    plant_secret(&stage.other_session(), b"another id", label.as_bytes());
    drop(device);

    let device = stage.start();
    device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    assert!(device.admin.inspect(&kek.key).await.unwrap().deviations.is_empty());
}

#[tokio::test]
async fn another_key_under_the_id_is_noticed_by_its_canary() {
    let stage = stage().await;
    let device = stage.start();
    let key = device.key(KeySpec::Kek).await;
    device.admin.destroy(&key).await.unwrap();
    // Made by the same program with the same attributes, under the same id: only the canary knows.
    let planned = planned_again(&key);
    device.admin.generate(&planned).await.unwrap();

    let answer = device.sealer.seal(&kek_of(key.clone()), &HERE, b"value").await;
    let Err(SealError::KeyUnfit { reason, .. }) = answer else { panic!("used another key") };
    assert!(reason.contains("canary"), "{reason}");
    assert_eq!(device.status().state, DeviceState::Ready);
}

/// The same id before its key was made, by the documented bytes of a `KeyRef`.
fn planned_again(key: &KeyRef) -> KeyRef {
    let mut bytes = key.to_bytes();
    bytes.truncate(18);
    bytes.push(0);
    KeyRef::from_bytes(&bytes).unwrap()
}

#[tokio::test]
async fn a_public_key_with_another_point_is_refused() {
    let stage = stage().await;
    let device = stage.start();
    let key = device.key(KeySpec::EcP256).await;
    let session = stage.other_session();
    plant_public(&session, key.id().as_bytes());

    // Two public keys: ambiguous.
    assert!(matches!(device.sealer.public_key(&key).await, Err(SealError::KeyUnfit { .. })));
    assert!(!device.admin.inspect(&key).await.unwrap().deviations.is_empty());
    assert!(matches!(device.sealer.sign(&key, Alg::Es256, b"m").await, Err(SealError::KeyUnfit { .. })));

    // Only the wrong one: its fingerprint is not the pinned one.
    let device_key = device.key(KeySpec::EcP256).await;
    let public = session.find(CKO_PUBLIC_KEY, device_key.id().as_bytes()).unwrap();
    session.destroy(public).unwrap();
    plant_public(&session, device_key.id().as_bytes());
    let answer = device.sealer.sign(&device_key, Alg::Es256, b"m").await;
    let Err(SealError::KeyUnfit { reason, .. }) = answer else { panic!("used another key") };
    assert!(reason.contains("fingerprint"), "{reason}");
    device.sealer.sign(&device.key(KeySpec::EcP256).await, Alg::Es256, b"m").await.unwrap();
}
