//! What `src/seal/backend.rs` promises, on SoftHSM, where the shim or another program has to look too. The
//! rules for every device are in `tests/backend.rs`.

use std::fs;
use std::time::{Duration, Instant};

use lacre::seal::{Alg, DeviceState, Kek, KeyRef, KeySpec, SealError, Sealed};
use serde_json::json;

use crate::stage::{HERE, Running, Stage, THERE, hex_id, kek_of, stage};

/// The ways in which SoftHSM can be made to wrap: two mechanisms, and either side making the IV.
const WAYS: [(&str, &str, &str); 3] =
    [("A256GCM", "host", ""), ("A256GCM", "device", "C_EncryptInit * write-iv"), ("A256KW-OBJ", "host", "")];

fn start(stage: &Stage, (wrap, gcm_iv, rules): (&str, &str, &str)) -> Running {
    stage.control.set_rules(rules);
    stage.try_start(json!({}), json!({ "wrap": wrap, "gcm_iv": gcm_iv }), 64).unwrap()
}

fn is_rejected<T>(answer: Result<T, SealError>) -> bool {
    matches!(answer, Err(SealError::Rejected))
}

async fn opens(device: &Running, kek: &Kek, sealed: &Sealed, value: &[u8]) {
    let opened = device.sealer.open(kek, &HERE, sealed).await.unwrap();
    assert!(opened.with(|bytes| bytes == value), "another value of {} bytes", value.len());
}

#[tokio::test]
async fn making_a_key_twice_makes_one_object_and_destroying_it_twice_succeeds() {
    let stage = stage().await;
    let device = stage.start();
    for spec in [KeySpec::Kek, KeySpec::EcP256, KeySpec::EcP384, KeySpec::Rsa2048, KeySpec::HmacSha256] {
        let planned = KeyRef::plan(spec).unwrap();
        let first = device.admin.generate(&planned).await.unwrap();
        let second = device.admin.generate(&planned).await.unwrap();
        assert!(first.is_pinned() && first.id() == second.id());

        let listed = stage.objects(&hex_id(planned.id()));
        let secret = matches!(spec, KeySpec::Kek | KeySpec::HmacSha256);
        let expected: &[&str] = if secret { &["Secret Key"] } else { &["Private Key", "Public Key"] };
        assert_eq!(listed.len(), expected.len(), "{listed:?}");
        assert!(listed.iter().zip(expected).all(|(object, kind)| object.starts_with(kind)), "{listed:?}");
        assert!(device.admin.inspect(&second).await.unwrap().deviations.is_empty());

        device.admin.destroy(&first).await.unwrap();
        device.admin.destroy(&first).await.unwrap();
        let gone = device.admin.inspect(&first).await;
        assert!(matches!(gone, Err(SealError::KeyMissing { key }) if key == planned.id()));
        assert!(stage.objects(&hex_id(planned.id())).is_empty());
    }
}

#[tokio::test]
async fn values_of_every_size_come_back_in_every_way_of_wrapping() {
    let stage = stage().await;
    for way in WAYS {
        let device = start(&stage, way);
        let kek = device.kek().await;
        assert_eq!(kek.mechanism_name(), way.0);
        for len in [0, 1, 4096, 64 << 10, 1 << 20] {
            let value: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let sealed = device.sealer.seal(&kek, &HERE, &value).await.unwrap();
            opens(&device, &kek, &sealed, &value).await;
        }
        let too_large = device.sealer.seal(&kek, &HERE, &vec![0; 2 << 20]).await;
        assert!(matches!(too_large, Err(SealError::TooLarge { .. })));
    }
    // CB-4: a 128-bit tag, a 96-bit IV and associated data, in every call that was ever made.
    assert_eq!(stage.control.count("bad_gcm_params"), 0);
    assert!(stage.control.count("C_DecryptInit") > 0);
}

#[tokio::test]
async fn another_place_another_key_or_a_turned_bit_is_rejected_and_the_device_stays_ready() {
    let stage = stage().await;
    for way in WAYS {
        let device = start(&stage, way);
        let kek = device.kek().await;
        let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();

        assert!(is_rejected(device.sealer.open(&kek, &THERE, &sealed).await), "{way:?}");
        // The row says that this version wrapped it, and the device must find out that it did not (CB-10).
        let other = Kek { key: device.kek().await.key, ..kek.clone() };
        assert!(is_rejected(device.sealer.open(&other, &HERE, &sealed).await), "{way:?}");
        let later = Kek { version: 2, ..kek.clone() };
        assert!(is_rejected(device.sealer.open(&later, &HERE, &sealed).await), "{way:?}");

        // CB-3: every single bit.
        let bytes = sealed.to_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut altered = bytes.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            let Ok(altered) = Sealed::from_bytes(&altered) else { continue };
            assert!(is_rejected(device.sealer.open(&kek, &HERE, &altered).await), "{way:?}, bit {bit}");
        }
        assert_eq!(device.status().state, DeviceState::Ready);
        opens(&device, &kek, &sealed, b"value").await;
    }
    assert_eq!(stage.control.count("bad_gcm_params"), 0);
}

#[tokio::test]
async fn a_mac_is_the_one_that_pkcs11_tool_makes_with_the_same_key() {
    let stage = stage().await;
    let device = stage.start();
    let (key, other) = (device.key(KeySpec::HmacSha256).await, device.key(KeySpec::HmacSha256).await);
    let mac = device.sealer.mac(&key, b"message").await.unwrap();
    assert_eq!(device.sealer.mac(&key, b"message").await.unwrap(), mac);
    assert_ne!(device.sealer.mac(&key, b"other message").await.unwrap(), mac);
    assert_ne!(device.sealer.mac(&other, b"message").await.unwrap(), mac);

    let (message, out) = (stage.file("message"), stage.file("mac"));
    fs::write(&message, b"message").unwrap();
    let (message, out_path) = (message.to_str().unwrap(), out.to_str().unwrap());
    let id = hex_id(key.id());
    stage.pkcs11_tool(&["--sign", "-m", "SHA256-HMAC", "--id", &id, "-i", message, "-o", out_path]);
    assert_eq!(fs::read(out).unwrap(), mac);
}

/// HS-14: SoftHSM 2.6.1 says `GENERAL_ERROR` of altered bytes, 2.7 and others `ENCRYPTED_DATA_INVALID`.
#[tokio::test]
async fn the_same_holds_with_the_codes_of_newer_modules_and_gcm_never_goes_without_aad() {
    let stage = stage().await;
    for rules in ["", "C_Decrypt * translate:0x5=0x40"] {
        stage.control.set_rules(rules);
        let fired = stage.control.count("rules_fired");
        let device = stage.start();
        let (kek, other) = (device.kek().await, device.kek().await);
        let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
        assert!(is_rejected(device.sealer.open(&kek, &THERE, &sealed).await), "{rules}");
        let pretends = Kek { key: other.key.clone(), ..kek.clone() };
        assert!(is_rejected(device.sealer.open(&pretends, &HERE, &sealed).await), "{rules}");
        let mut altered = sealed.to_bytes();
        altered[60] ^= 1;
        let altered = Sealed::from_bytes(&altered).unwrap();
        assert!(is_rejected(device.sealer.open(&kek, &HERE, &altered).await), "{rules}");
        // The same for a key that another one has replaced: its canary does not open.
        device.admin.destroy(&other.key).await.unwrap();
        let mut planned = other.key.to_bytes();
        planned.truncate(18);
        planned.push(0);
        device.admin.generate(&KeyRef::from_bytes(&planned).unwrap()).await.unwrap();
        let replaced = device.sealer.seal(&other, &HERE, b"value").await;
        assert!(matches!(replaced, Err(SealError::KeyUnfit { .. })), "{rules}: {:?}", replaced.err());

        assert_eq!(device.status().state, DeviceState::Ready, "{rules}");
        opens(&device, &kek, &sealed, b"value").await;
        assert_eq!(stage.control.count("rules_fired") > fired, !rules.is_empty());
    }
    assert_eq!(stage.control.count("bad_gcm_params"), 0);
}

#[tokio::test]
async fn the_probe_takes_the_next_mechanism_where_gcm_is_refused() {
    let stage = stage().await;
    stage.control.set_rules("C_EncryptInit * return:0x70");
    let device = stage.try_start(json!({}), json!({}), 64).unwrap();
    let kek = device.kek().await;
    // SoftHSM has RFC 3394 for C_WrapKey only, and with the rule nothing for C_Encrypt.
    assert_eq!(kek.mechanism_name(), "A256KW-OBJ");
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    opens(&device, &kek, &sealed, b"value").await;
}

/// The probe's calls are the first ones: device error, function failed, host memory.
#[tokio::test]
async fn a_fault_that_passes_during_the_probe_does_not_choose_a_weaker_mechanism() {
    for rule in [
        "C_EncryptInit 1 return:0x30",
        "C_EncryptInit 1 return:0x6",
        "C_Encrypt 1 return:0x30",
        "C_Decrypt 1 return:0x2",
        "C_Decrypt 1 return:0x5",
        "C_DecryptInit 1 return:0x6",
        "C_CreateObject 1 return:0x30",
        "C_CreateObject 1 return:0x5",
    ] {
        let stage = stage().await;
        let device = stage.start();
        let fired = stage.control.count("rules_fired");
        stage.control.set_rules(rule);
        let planned = KeyRef::plan(KeySpec::Kek).unwrap();
        let began = Instant::now();
        let made = loop {
            match device.admin.generate(&planned).await {
                Ok(made) => break made,
                Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{rule}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(kek_of(made).mechanism_name(), "A256GCM", "{rule}");
        assert_eq!(stage.control.count("rules_fired"), fired + 1, "{rule}");
    }
}

#[tokio::test]
async fn a_full_token_makes_no_key_and_goes_on_with_those_it_has() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    stage.control.set_rules("C_GenerateKey * return:0x31");
    let answer = device.admin.generate(&KeyRef::plan(KeySpec::Kek).unwrap()).await;
    assert!(matches!(answer, Err(SealError::Refused { .. })), "{answer:?}");
    assert_eq!(device.status().state, DeviceState::Ready);
    opens(&device, &kek, &sealed, b"value").await;
}

#[tokio::test]
async fn a_configured_mechanism_that_the_device_lacks_is_refused_and_the_device_stays_ready() {
    let stage = stage().await;
    let device = stage.try_start(json!({}), json!({ "wrap": "A256KW" }), 64).unwrap();
    let planned = KeyRef::plan(KeySpec::Kek).unwrap();
    let answer = device.admin.generate(&planned).await;
    assert!(matches!(answer, Err(SealError::Refused { .. } | SealError::KeyUnfit { .. })), "{answer:?}");
    assert_eq!(device.status().state, DeviceState::Ready);
    device.admin.destroy(&planned).await.unwrap();
}

#[tokio::test]
async fn a_kek_made_in_one_way_stays_in_use_when_another_is_configured() {
    let stage = stage().await;
    let planned = KeyRef::plan(KeySpec::Kek).unwrap();
    let device = stage.start();
    let kek = kek_of(device.admin.generate(&planned).await.unwrap());
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);

    let device = stage.try_start(json!({}), json!({ "wrap": "A256KW-OBJ" }), 64).unwrap();
    opens(&device, &kek, &sealed, b"value").await;
    // A crash lost the pin and the step is repeated, under the new configuration.
    let again = kek_of(device.admin.generate(&planned).await.unwrap());
    assert_eq!(again.mechanism_name(), "A256GCM");
    assert_eq!(device.kek().await.mechanism_name(), "A256KW-OBJ");
}

#[tokio::test]
async fn a_device_that_was_to_make_the_iv_and_does_not_is_refused() {
    let stage = stage().await;
    let device = stage.try_start(json!({}), json!({ "wrap": "A256GCM", "gcm_iv": "device" }), 64).unwrap();
    // SoftHSM uses the zeros it is given: the same IV for every value.
    let answer = device.admin.generate(&KeyRef::plan(KeySpec::Kek).unwrap()).await;
    assert!(matches!(answer, Err(SealError::Refused { .. })), "{answer:?}");
}

#[tokio::test]
async fn the_iv_in_the_value_is_the_one_that_the_device_used() {
    let stage = stage().await;
    // CB-8: an own IV is given, and the device writes another over it, early or late.
    for rule in ["C_EncryptInit * write-iv", "C_EncryptInit * write-iv-late"] {
        stage.control.set_rules(rule);
        let device = stage.start();
        let kek = device.kek().await;
        let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
        opens(&device, &kek, &sealed, b"value").await;
        stage.control.set_rules("");
        opens(&device, &kek, &sealed, b"value").await;
    }
}

#[tokio::test]
async fn a_signature_of_a_wrong_length_never_leaves() {
    let stage = stage().await;
    let device = stage.start();
    let key = device.key(KeySpec::EcP256).await;
    device.sealer.sign(&key, Alg::Es256, b"m").await.unwrap();
    for rule in ["C_Sign * short", "C_Sign * long"] {
        stage.control.set_rules(rule);
        let answer = device.sealer.sign(&key, Alg::Es256, b"m").await;
        assert!(matches!(answer, Err(SealError::Refused { .. })), "{rule}");
        stage.control.set_rules("");
        device.sealer.sign(&key, Alg::Es256, b"m").await.unwrap();
    }
}

/// HS-7: the operation that `C_SignInit` began may still be active in the session.
#[tokio::test]
async fn a_session_in_which_a_signature_failed_half_way_is_not_used_again() {
    let stage = stage().await;
    let device = stage.start();
    let key = device.key(KeySpec::EcP256).await;
    device.sealer.sign(&key, Alg::Es256, b"m").await.unwrap();
    // Buffer too small, device memory, function failed, data length: before the effect, so that the
    // operation stays active.
    for code in ["0x150", "0x31", "0x6", "0x21"] {
        let closed = stage.control.count("C_CloseSession");
        stage.control.set_rules(&format!("C_Sign 1 return:{code}"));
        assert!(device.sealer.sign(&key, Alg::Es256, b"m").await.is_err(), "{code}");
        assert!(stage.control.count("C_CloseSession") > closed, "{code}: the session was kept");
        device.ready(Duration::from_secs(5)).await;
        device.sealer.sign(&key, Alg::Es256, b"m").await.unwrap();
    }
}

/// HS-14: SoftHSM 2.7 and Kryoptic say `CKR_ENCRYPTED_DATA_INVALID` where SoftHSM 2.6.1 says `CKR_GENERAL_ERROR`.
#[tokio::test]
async fn altered_bytes_are_rejected_whatever_the_module_calls_them() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    for code in ["0x40", "0x41", "0x20", "0xC0", "0x6"] {
        stage.control.set_rules(&format!("C_Decrypt * translate:0x5={code}"));
        assert!(is_rejected(device.sealer.open(&kek, &THERE, &sealed).await), "{code}");
        assert_eq!(device.status().state, DeviceState::Ready, "{code}");
        opens(&device, &kek, &sealed, b"value").await;
    }
    assert_eq!(stage.control.count("bad_gcm_params"), 0);
}

/// HS-1: one failed call is no evidence against a row or a key.
#[tokio::test]
async fn a_single_general_error_blames_nobody() {
    let stage = stage().await;
    let device = stage.start();
    let (kek, signing) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    opens(&device, &kek, &sealed, b"value").await;
    stage.control.set_rules("C_Decrypt 1 return-after:0x5");
    opens(&device, &kek, &sealed, b"value").await;
    // When the key is found again: its canary.
    stage.control.set_rules("C_DecryptInit 1 close-all-sessions\nC_Decrypt 1 return-after:0x5");
    opens(&device, &kek, &sealed, b"value").await;
    // Attributes that the module says were longer than the buffer: refused perhaps, and never a verdict.
    for n in 1..=6 {
        stage.control.set_rules(&format!(
            "C_SignInit 1 close-all-sessions\nC_DecryptInit 1 close-all-sessions\nC_GetAttributeValue {n} return:0x150"
        ));
        let opened = device.sealer.open(&kek, &HERE, &sealed).await.map(drop);
        let signed = device.sealer.sign(&signing, Alg::Es256, b"m").await.map(drop);
        for answer in [opened, signed] {
            assert!(matches!(answer, Ok(()) | Err(SealError::Refused { .. })), "{n}: {answer:?}");
        }
    }
}

/// HS-1: the second, weaker template is for tokens that refuse the first one twice.
#[tokio::test]
async fn a_key_whose_making_failed_once_is_made_in_full() {
    let stage = stage().await;
    let device = stage.start();
    for rule in
        ["C_GenerateKey 1 return:0x5", "C_GenerateKey 1 return:0x150", "C_GenerateKey 1 return-after:0x5"]
    {
        stage.control.set_rules(rule);
        let key = device.key(KeySpec::Kek).await;
        assert!(device.admin.inspect(&key).await.unwrap().deviations.is_empty(), "{rule}");
    }
    // Twice: made without the two attributes, found unfit and not left there.
    stage.control.set_rules("C_GenerateKey 1 return:0x5\nC_GenerateKey 2 return:0x5");
    let planned = KeyRef::plan(KeySpec::Kek).unwrap();
    let answer = device.admin.generate(&planned).await;
    assert!(matches!(answer, Err(SealError::KeyUnfit { .. })), "{answer:?}");
    device.admin.generate(&planned).await.unwrap();
}
