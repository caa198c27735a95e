//! Keys from outside (`KeyAdmin::import`): the same key as before, kept like any other, and known to be imported.

use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cryptoki_sys::{CKA_ID, CKA_LABEL, CKA_VALUE, CKO_PRIVATE_KEY, CKO_SECRET_KEY};
use hmac::{Hmac, KeyInit, Mac};
use lacre::seal::{
    Alg, BadPrivateKey, Device, DeviceName, DeviceState, KeyRef, KeySpec, SealError, WeakRsa, public_half,
};
use sha2::Sha256;

use crate::stage::{HERE, Stage, hex_id, in_process, kek_of, stage};

const KINDS: [(KeySpec, &[&str]); 6] = [
    (KeySpec::EcP256, &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
    (KeySpec::EcP384, &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
    (KeySpec::Ed25519, &["-algorithm", "ED25519"]),
    (KeySpec::Rsa2048, &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
    (KeySpec::Rsa3072, &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072"]),
    (KeySpec::Rsa4096, &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:4096"]),
];

/// A fresh key by OpenSSL, as PKCS#8 in DER.
fn fresh(args: &[&str]) -> Vec<u8> {
    let made = Command::new("openssl").arg("genpkey").args(args).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // (Its own DER output is of another form than its PEM.)
    let text = String::from_utf8(made.stdout).unwrap();
    let lines: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
    STANDARD.decode(lines).unwrap()
}

/// Every kind of key: imported twice, used, inspected, found again by another login, another one refused.
async fn takes_keys_of_every_kind(stage: &Stage, device: &Device) {
    for (spec, args) in KINDS {
        let (der, other) = (fresh(args), fresh(args));
        let public = public_half(&der).unwrap();
        assert_eq!(public.spec(), Some(spec));
        let planned = KeyRef::plan(spec).unwrap();
        let key = device.admin.import(&planned, &der).await.unwrap();
        assert!(key.is_imported() && key.is_pinned_by(&public) && key.id() == planned.id(), "{spec:?}");
        assert_eq!(device.sealer.public_key(&key).await.unwrap(), public);
        assert!(device.admin.import(&planned, &der).await.unwrap() == key, "a second time");
        assert_eq!(stage.objects(&hex_id(key.id())).len(), 2, "{spec:?}");
        let taken = device.admin.import(&planned, &other).await;
        assert!(matches!(taken, Err(SealError::KeyUnfit { .. })), "{spec:?}: {taken:?}");

        let kept = KeyRef::from_bytes(&key.to_bytes()).unwrap();
        for alg in Alg::ALL.into_iter().filter(|alg| alg.fits(spec)) {
            let signature = device.sealer.sign(&kept, alg, b"message").await.unwrap();
            let (dir, bytes) = (&stage.token.dir, signature.as_bytes());
            assert!(crate::openssl::verifies(dir, &public, alg, b"message", bytes), "{alg:?}: openssl");
            assert!(crate::openssl::verifies_here(&public, alg, b"message", signature.as_bytes()), "{alg:?}");
        }
        let report = device.admin.inspect(&kept).await.unwrap();
        assert!(report.deviations.is_empty(), "{spec:?}: {:?}", report.deviations);
        assert_eq!(report.accepted.len(), 3, "{spec:?}: {:?}", report.accepted);
        let session = stage.other_session();
        let object = session.find(CKO_PRIVATE_KEY, key.id().as_bytes()).unwrap();
        assert!(session.value(object, CKA_VALUE).is_err(), "its private half can be read");
        drop(session);
        // Said to be made here, it is not believed.
        let made = device.admin.generate(&planned).await;
        assert!(matches!(made, Err(SealError::KeyUnfit { .. })), "{spec:?}: {made:?}");

        let listed = device.admin.list(&DeviceName::default()).await.unwrap();
        let found = listed.iter().find(|found| found.id() == key.id()).expect("it is listed");
        assert!(found.spec() == spec && !found.is_pinned());
        device.admin.destroy(found).await.unwrap();
        assert!(stage.objects(&hex_id(key.id())).is_empty());
    }
    for secret in [&b"Kd8FpW3nQz7vXc5mTj2hLr9sYb4gNe6u"[..], &[0xA7; 64]] {
        let planned = KeyRef::plan(KeySpec::HmacSha256).unwrap();
        let key = device.admin.import(&planned, secret).await.unwrap();
        let mut expected = Hmac::<Sha256>::new_from_slice(secret).unwrap();
        expected.update(b"cookie");
        assert_eq!(device.sealer.mac(&key, b"cookie").await.unwrap(), expected.finalize().into_bytes()[..]);
        assert!(device.admin.import(&planned, secret).await.unwrap() == key);
        let taken = device.admin.import(&planned, &[9; 32]).await;
        assert!(matches!(taken, Err(SealError::KeyUnfit { .. })), "{taken:?}");
        assert!(device.admin.inspect(&key).await.unwrap().deviations.is_empty());
        let session = stage.other_session();
        let object = session.find(CKO_SECRET_KEY, key.id().as_bytes()).unwrap();
        assert!(session.value(object, CKA_VALUE).is_err());
        drop(session);
        device.admin.destroy(&key).await.unwrap();
    }
}

#[tokio::test]
async fn a_key_from_outside_is_itself_and_kept_like_any_other() {
    let stage = stage().await;
    let device = stage.start();
    takes_keys_of_every_kind(&stage, &device).await;
}

#[tokio::test]
async fn a_key_from_outside_goes_through_the_sealer_process() {
    let stage = stage().await;
    // Its login is what the other program's session takes part in.
    let _here = stage.start();
    let (device, _arena) = in_process(&stage);
    takes_keys_of_every_kind(&stage, &device).await;
    device.close();
}

#[tokio::test]
async fn what_is_no_key_or_another_kind_is_refused_and_leaves_nothing() {
    let stage = stage().await;
    let device = stage.start();
    let (ec, rsa) = (fresh(KINDS[0].1), fresh(KINDS[3].1));
    let odd = fresh(&["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"]);
    let small = fresh(&["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"]);
    let three = fresh(&[KINDS[3].1, &["-pkeyopt", "rsa_keygen_pubexp:3"]].concat());
    let mut wrong = ec.clone();
    // The last octet is of the public point that goes with the scalar.
    *wrong.last_mut().unwrap() ^= 1;
    for (der, why) in [
        (&odd[..], BadPrivateKey::Kind),
        (&small, BadPrivateKey::Kind),
        (&wrong, BadPrivateKey::Inconsistent),
        (&ec[..ec.len() - 1], BadPrivateKey::Form),
        (b"-----BEGIN PRIVATE KEY-----", BadPrivateKey::Form),
        (&three, BadPrivateKey::Weak(WeakRsa::Exponent)),
    ] {
        assert_eq!(public_half(der), Err(why));
    }
    for (spec, private) in [
        (KeySpec::EcP384, &ec[..]),
        (KeySpec::EcP256, &rsa),
        (KeySpec::EcP256, &wrong),
        (KeySpec::EcP256, &odd),
        (KeySpec::Rsa2048, &small),
        (KeySpec::Rsa2048, &three),
        (KeySpec::Rsa2048, b"no key"),
        (KeySpec::HmacSha256, &[7; 15]),
        (KeySpec::HmacSha256, &[7; 65]),
        (KeySpec::Kek, &[7; 32]),
        (KeySpec::EcP256, b""),
    ] {
        let planned = KeyRef::plan(spec).unwrap();
        let refused = device.admin.import(&planned, private).await;
        assert!(matches!(refused, Err(SealError::Refused { .. })), "{spec:?}: {refused:?}");
        assert!(stage.objects(&hex_id(planned.id())).is_empty());
    }
    // SoftHSM takes no HMAC key that is shorter than the hash, and says so at its first use.
    let short = KeyRef::plan(KeySpec::HmacSha256).unwrap();
    let refused = device.admin.import(&short, &[7; 16]).await;
    assert!(matches!(refused, Err(SealError::Refused { .. })), "{refused:?}");
    assert!(stage.objects(&hex_id(short.id())).is_empty());
    let long = device.admin.import(&KeyRef::plan(KeySpec::Rsa4096).unwrap(), &vec![0; 1 << 16]).await;
    assert!(matches!(long, Err(SealError::TooLarge { .. })));
    assert_eq!(device.status().state, DeviceState::Ready);
}

/// A key that was made on the device may lack none of what an imported one lacks.
#[tokio::test]
async fn only_a_key_that_was_imported_may_look_imported() {
    let stage = stage().await;
    let device = stage.start();
    let made = device.key(KeySpec::EcP256).await;
    let imported = KeyRef::plan(KeySpec::EcP256).unwrap();
    let imported = device.admin.import(&imported, &fresh(KINDS[0].1)).await.unwrap();
    // Its bytes with the mark of a generated key.
    let mut bytes = imported.to_bytes();
    let at = bytes.len() - 33;
    assert_eq!(std::mem::replace(&mut bytes[at], 1), 4);
    let posing = KeyRef::from_bytes(&bytes).unwrap();
    drop(device);

    let device = stage.start();
    let report = device.admin.inspect(&posing).await.unwrap();
    assert_eq!(report.deviations.len(), 3, "{:?}", report.deviations);
    let used = device.sealer.sign(&posing, Alg::Es256, b"m").await;
    assert!(matches!(used, Err(SealError::KeyUnfit { .. })), "{:?}", used.err());
    device.sealer.sign(&imported, Alg::Es256, b"m").await.unwrap();
    assert!(device.admin.inspect(&made).await.unwrap().accepted.is_empty());
    // Of the rest nothing is done without: CKA_EXTRACTABLE told as true. (The shim turns answers of success, and a
    // private key does not have all attributes that are asked for.)
    let mac = KeyRef::plan(KeySpec::HmacSha256).unwrap();
    let mac = device.admin.import(&mac, &[7; 32]).await.unwrap();
    stage.control.set_rules("C_GetAttributeValue * turn:0x162");
    let weak = device.admin.inspect(&mac).await.unwrap();
    assert!(weak.deviations.contains(&"CKA_EXTRACTABLE is true".to_owned()), "{:?}", weak.deviations);
    stage.control.set_rules("");
    for key in [&made, &imported, &mac] {
        device.admin.destroy(key).await.unwrap();
    }
}

/// RO-5: whatever call an import ends at, before its effect or after, the same import again converges.
#[tokio::test]
async fn an_import_that_failed_anywhere_is_repeated_and_converges() {
    let stage = stage().await;
    for (spec, args) in [KINDS[0], KINDS[3]] {
        let der = fresh(args);
        for code in ["return:0x30", "return-after:0x30", "return:0x6", "return-after:0xb3", "return:0x12"] {
            for call in ["C_CreateObject", "C_FindObjectsInit", "C_GetAttributeValue", "C_Sign"] {
                for n in 1..=4 {
                    let device = stage.start();
                    let planned = KeyRef::plan(spec).unwrap();
                    stage.control.set_rules(&format!("{call} {n} {code}"));
                    let first = device.admin.import(&planned, &der).await;
                    stage.control.set_rules("");
                    device.ready(Duration::from_secs(10)).await;
                    let key = device.admin.import(&planned, &der).await;
                    let key =
                        key.unwrap_or_else(|error| panic!("{call} {n} {code}: {first:?}, then {error:?}"));
                    device.sealer.sign(&key, Alg::for_spec(spec).unwrap(), b"m").await.unwrap();
                    assert_eq!(stage.objects(&hex_id(key.id())).len(), 2, "{call} {n} {code}");
                    device.admin.destroy(&key).await.unwrap();
                }
            }
        }
    }
}

#[tokio::test]
async fn the_list_has_every_key_that_was_made_here_and_nobody_elses() {
    let stage = stage().await;
    let device = stage.start();
    let specs = [KeySpec::Kek, KeySpec::EcP256, KeySpec::EcP384, KeySpec::HmacSha256, KeySpec::Ed25519];
    let mut keys = Vec::new();
    for spec in specs {
        keys.push(device.key(spec).await);
    }
    let session = stage.other_session();
    let foreign = session.generate_ec(&[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]).unwrap();
    session.set(foreign, &[crate::raw::attribute(CKA_LABEL, b"lacre ec-p256 00000000")]).unwrap();
    session.set(foreign, &[crate::raw::attribute(CKA_ID, &[1; 16])]).unwrap();
    let listed = device.admin.list(&DeviceName::default()).await.unwrap();
    for key in &keys {
        let found: Vec<_> = listed.iter().filter(|found| found.id() == key.id()).collect();
        assert!(found.len() == 1 && found[0].spec() == key.spec(), "{key:?}");
    }
    assert!(listed.iter().all(|found| found.id().as_bytes() != &[1; 16]));
    session.destroy(foreign).unwrap();
    let nowhere = device.admin.list(&DeviceName::parse("elsewhere").unwrap()).await;
    assert!(matches!(nowhere, Err(SealError::Refused { .. })));
    // One that was found is taken up or destroyed.
    let found = listed.iter().find(|found| found.id() == keys[1].id()).unwrap();
    assert!(device.admin.generate(found).await.unwrap() == keys[1]);
    for key in &keys {
        device.admin.destroy(listed.iter().find(|found| found.id() == key.id()).unwrap()).await.unwrap();
    }
    let rest = device.admin.list(&DeviceName::default()).await.unwrap();
    assert!(keys.iter().all(|key| rest.iter().all(|found| found.id() != key.id())));
    // What is left works.
    let kek = kek_of(device.key(KeySpec::Kek).await);
    device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
}
