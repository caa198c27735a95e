//! KEKs of several objects (RSA or CBC with an HMAC key beside it): made, destroyed and found whole across
//! every place where the work can be cut short, and never used with a part that somebody replaced.

use cryptoki_sys::{
    CK_TRUE, CKA_CLASS, CKA_ENCRYPT, CKA_ID, CKA_KEY_TYPE, CKA_MODULUS, CKA_PRIVATE, CKA_PUBLIC_EXPONENT,
    CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN, CKA_VALUE, CKK_GENERIC_SECRET, CKK_RSA, CKO_PRIVATE_KEY,
    CKO_PUBLIC_KEY, CKO_SECRET_KEY,
};
use lacre::seal::{DeviceState, KeyRef, KeySpec, SealError};
use serde_json::json;

use crate::raw::{Session, attribute};
use crate::stage::{HERE, Running, Stage, hex_id, kek_of, stage};

/// What SoftHSM has of them, with the objects that such a KEK consists of, as pkcs11-tool lists them.
const WAYS: [(&str, &[&str]); 2] = [
    ("RSA-OAEP+HS256", &["Private Key", "Public Key", "Secret Key"]),
    ("A256CBC+HS256", &["Secret Key", "Secret Key"]),
];

fn start(stage: &Stage, wrap: &str) -> Running {
    stage.try_start(json!({}), json!({ "wrap": wrap }), 64).unwrap()
}

fn assert_objects(stage: &Stage, key: &KeyRef, kinds: &[&str]) {
    let listed = stage.objects(&hex_id(key.id()));
    assert_eq!(listed.len(), kinds.len(), "{listed:?}");
    assert!(listed.iter().zip(kinds).all(|(object, kind)| object.starts_with(kind)), "{listed:?}");
}

async fn works(device: &Running, key: &KeyRef) {
    let kek = kek_of(key.clone());
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap().with(|value| assert_eq!(value, b"value"));
    assert!(device.admin.inspect(key).await.unwrap().deviations.is_empty());
}

#[tokio::test]
async fn cut_short_between_two_objects_the_next_try_makes_a_whole_kek() {
    let stage = stage().await;
    for (wrap, kinds) in WAYS {
        let device = start(&stage, wrap);
        // Its probe is over.
        device.admin.destroy(&device.key(KeySpec::Kek).await).await.unwrap();
        let planned = KeyRef::plan(KeySpec::Kek).unwrap();
        stage.control.set_rules("C_GenerateKey after:1 return:0x31\nC_GenerateKeyPair * return:0x31");
        assert!(device.admin.generate(&planned).await.is_err());
        stage.control.set_rules("");
        assert_objects(&stage, &planned, &["Secret Key"]);
        drop(device);

        let device = start(&stage, wrap);
        let key = device.admin.generate(&planned).await.unwrap();
        assert_eq!(kek_of(key.clone()).mechanism_name(), wrap);
        assert_objects(&stage, &key, kinds);
        works(&device, &key).await;
        // Made once more, it is the same, also where another mechanism is configured meanwhile.
        drop(device);
        let device = stage.start();
        assert!(device.admin.generate(&planned).await.unwrap().id() == key.id());
        assert_objects(&stage, &key, kinds);
        works(&device, &key).await;
        device.admin.destroy(&key).await.unwrap();
        assert_objects(&stage, &key, &[]);
    }
}

#[tokio::test]
async fn what_a_crash_left_is_no_hindrance_where_another_mechanism_is_configured() {
    let stage = stage().await;
    for (wrap, _) in WAYS {
        let device = start(&stage, wrap);
        let planned = KeyRef::plan(KeySpec::Kek).unwrap();
        stage.control.set_rules("C_GenerateKey after:1 return:0x31\nC_GenerateKeyPair * return:0x31");
        assert!(device.admin.generate(&planned).await.is_err());
        stage.control.set_rules("");
        drop(device);

        let device = stage.start();
        let key = device.admin.generate(&planned).await.unwrap();
        assert_eq!(kek_of(key.clone()).mechanism_name(), "A256GCM");
        assert_objects(&stage, &key, &["Secret Key"]);
        works(&device, &key).await;
    }
}

#[tokio::test]
async fn destruction_cut_short_is_finished_by_the_next_one_and_the_rest_is_no_key() {
    let stage = stage().await;
    for (wrap, kinds) in WAYS {
        for last in 1..kinds.len() {
            let device = start(&stage, wrap);
            let key = device.key(KeySpec::Kek).await;
            stage.control.set_rules(&format!("C_DestroyObject after:{last} return:0x31"));
            assert!(device.admin.destroy(&key).await.is_err());
            stage.control.set_rules("");
            assert_eq!(stage.objects(&hex_id(key.id())).len(), kinds.len() - last, "{wrap}");
            drop(device);

            let device = start(&stage, wrap);
            let answer = device.sealer.seal(&kek_of(key.clone()), &HERE, b"value").await;
            assert!(
                matches!(answer, Err(SealError::KeyMissing { .. } | SealError::KeyUnfit { .. })),
                "{wrap}: {:?}",
                answer.err()
            );
            device.admin.destroy(&key).await.unwrap();
            assert_objects(&stage, &key, &[]);
            assert!(matches!(device.admin.inspect(&key).await, Err(SealError::KeyMissing { .. })));
        }
    }
}

fn plant_mac_key(session: &Session, id: &[u8]) {
    let (class, kind) = (CKO_SECRET_KEY.to_ne_bytes(), CKK_GENERIC_SECRET.to_ne_bytes());
    let object = [
        attribute(CKA_CLASS, &class),
        attribute(CKA_KEY_TYPE, &kind),
        attribute(CKA_TOKEN, &[CK_TRUE]),
        attribute(CKA_PRIVATE, &[CK_TRUE]),
        attribute(CKA_SENSITIVE, &[CK_TRUE]),
        attribute(CKA_SIGN, &[CK_TRUE]),
        attribute(CKA_ID, id),
        attribute(CKA_VALUE, &[7; 32]),
    ];
    session.create(&object).unwrap();
}

/// A public key of 3072 bits of which somebody else has the private half.
fn plant_public(session: &Session, id: &[u8]) {
    let (class, kind) = (CKO_PUBLIC_KEY.to_ne_bytes(), CKK_RSA.to_ne_bytes());
    let modulus = hex::decode(vectors()["rsa_n"].as_str().unwrap()).unwrap();
    let object = [
        attribute(CKA_CLASS, &class),
        attribute(CKA_KEY_TYPE, &kind),
        attribute(CKA_TOKEN, &[CK_TRUE]),
        attribute(CKA_ENCRYPT, &[CK_TRUE]),
        attribute(CKA_ID, id),
        attribute(CKA_MODULUS, &modulus),
        attribute(CKA_PUBLIC_EXPONENT, &[1, 0, 1]),
    ];
    session.create(&object).unwrap();
}

fn vectors() -> serde_json::Value {
    serde_json::from_str(include_str!("../vectors/sealed-v1.json")).unwrap()
}

#[tokio::test]
async fn values_do_not_go_to_a_public_half_that_somebody_put_there() {
    let stage = stage().await;
    let device = start(&stage, "RSA-OAEP+HS256");
    let key = device.key(KeySpec::Kek).await;
    let kek = kek_of(key.clone());
    device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let session = stage.other_session();
    plant_public(&session, key.id().as_bytes());
    assert!(device.admin.inspect(&key).await.unwrap().deviations[0].contains("2 objects"));

    // Now only the wrong one is there.
    let own = device.key(KeySpec::Kek).await;
    let public = session.find(CKO_PUBLIC_KEY, own.id().as_bytes()).unwrap();
    session.destroy(public).unwrap();
    let answer = device.admin.inspect(&own).await.unwrap();
    assert!(answer.deviations[0].contains("public half is missing"), "{answer:?}");
    plant_public(&session, own.id().as_bytes());
    let answer = device.sealer.seal(&kek_of(own.clone()), &HERE, b"value").await;
    let Err(SealError::KeyUnfit { reason, .. }) = answer else { panic!("used another public key") };
    assert!(reason.contains("public half"), "{reason}");
    assert_eq!(device.status().state, DeviceState::Ready);
    assert!(session.find(CKO_PRIVATE_KEY, own.id().as_bytes()).is_some());
    device.admin.destroy(&own).await.unwrap();
    device.admin.destroy(&key).await.unwrap();
}

#[tokio::test]
async fn another_hmac_key_under_the_id_is_noticed_by_the_canary() {
    let stage = stage().await;
    let device = start(&stage, "RSA-OAEP+HS256");
    let key = device.key(KeySpec::Kek).await;
    let session = stage.other_session();
    let mac = session.find(CKO_SECRET_KEY, key.id().as_bytes()).unwrap();
    session.destroy(mac).unwrap();
    plant_mac_key(&session, key.id().as_bytes());
    let report = device.admin.inspect(&key).await.unwrap();
    assert!(report.deviations.iter().any(|rule| rule.contains("HMAC key: CKA_LOCAL is false")), "{report:?}");
    assert!(report.deviations.iter().any(|rule| rule.contains("canary")), "{report:?}");
    let answer = device.sealer.seal(&kek_of(key.clone()), &HERE, b"value").await;
    assert!(matches!(answer, Err(SealError::KeyUnfit { .. })), "{:?}", answer.err());
    device.admin.destroy(&key).await.unwrap();
}
