//! Keys in a TPM: made, used, recognised, destroyed.

use lacre::seal::{Alg, DeviceName, DeviceState, KeyRef, KeySpec, SealError};

use crate::stage::{HERE, Running};
use crate::swtpm::Swtpm;

#[tokio::test]
async fn values_are_sealed_and_opened_and_keys_sign() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.opens(&kek, &sealed, b"value").await;
    for (spec, alg) in
        [(KeySpec::EcP256, Alg::Es256), (KeySpec::EcP384, Alg::Es384), (KeySpec::Rsa2048, Alg::Rs256)]
    {
        let key = device.key(spec).await;
        device.sealer.sign(&key, alg, b"message").await.unwrap();
        let report = device.admin.inspect(&key).await.unwrap();
        assert!(report.deviations.is_empty(), "{report:?}");
    }
    let rsa = device.key(KeySpec::Rsa2048).await;
    println!("PS256: {:?}", device.sealer.sign(&rsa, Alg::Ps256, b"message").await.map(|_| "ok"));
    let mac = device.key(KeySpec::HmacSha256).await;
    assert_eq!(device.sealer.mac(&mac, b"m").await.unwrap(), device.sealer.mac(&mac, b"m").await.unwrap());
    println!("{:#}", device.capabilities().await.unwrap());
    assert_eq!(device.status().state, DeviceState::Ready);
    assert!(device.admin.inspect(&kek.key).await.unwrap().deviations.is_empty());
    device.admin.destroy(&kek.key).await.unwrap();
    let gone = device.admin.inspect(&kek.key).await;
    assert!(matches!(gone, Err(SealError::KeyMissing { .. })), "{gone:?}");
    let planned = KeyRef::plan(KeySpec::Rsa4096).unwrap();
    assert!(matches!(device.admin.generate(&planned).await, Err(SealError::Refused { .. })));
    // Nor are there Ed25519 keys, nor keys from outside, nor any to be listed.
    let planned = KeyRef::plan(KeySpec::Ed25519).unwrap();
    assert!(matches!(device.admin.generate(&planned).await, Err(SealError::Refused { .. })));
    let planned = KeyRef::plan(KeySpec::HmacSha256).unwrap();
    let imported = device.admin.import(&planned, &[7; 32]).await;
    assert!(matches!(imported, Err(SealError::Refused { .. })), "{imported:?}");
    assert!(device.admin.list(&DeviceName::default()).await.unwrap().is_empty());
    assert_eq!(device.status().state, DeviceState::Ready);
}

/// TP-2: the check at the start.
#[tokio::test]
async fn a_key_that_counts_towards_a_lockout_is_unfit() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let (private, public) = crate::foreign::key_without_no_da(&tpm.tcti());
    let id = KeyRef::plan(KeySpec::EcP256).unwrap().id();
    let len = u16::try_from(private.len()).unwrap().to_be_bytes();
    let bytes = [&[1, 2], &id.as_bytes()[..], &[3], &[0; 32], &len, &private, &public].concat();
    let key = KeyRef::from_bytes(&bytes).unwrap();
    let report = device.admin.inspect(&key).await.unwrap();
    assert!(report.deviations.contains(&"noDA is false".to_owned()), "{report:?}");
}
