//! Keys: made, found again, looked at, destroyed.

use std::collections::BTreeSet;

use lacre::seal::{Alg, Kek, KeyRef, KeySpec, SealError};

use crate::stage::{HERE, Running, Stage, chain, kek_of};

/// One algorithm for each kind of signing key.
pub fn alg_of(spec: KeySpec) -> Option<Alg> {
    match spec {
        KeySpec::EcP256 => Some(Alg::Es256),
        KeySpec::EcP384 => Some(Alg::Es384),
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => Some(Alg::Rs256),
        KeySpec::Ed25519 => Some(Alg::EdDsa),
        KeySpec::Kek | KeySpec::HmacSha256 => None,
    }
}

/// The kinds that the device has, without large RSA keys, which take seconds to make.
async fn quick_specs(stage: &Stage, device: &Running) -> Vec<KeySpec> {
    let mut specs = stage.specs(device, true).await;
    specs.retain(|spec| !matches!(spec, KeySpec::Rsa3072 | KeySpec::Rsa4096));
    assert!(specs.contains(&KeySpec::Kek) && specs.contains(&KeySpec::HmacSha256), "{specs:?}");
    specs
}

/// Uses the key for what it is for.
async fn used(device: &Running, key: &KeyRef) -> Result<(), SealError> {
    match key.spec() {
        KeySpec::Kek => {
            let kek = kek_of(key.clone());
            let sealed = device.sealer.seal(&kek, &HERE, b"value").await?;
            device.sealer.open(&kek, &HERE, &sealed).await.map(|_| ())
        }
        KeySpec::HmacSha256 => device.sealer.mac(key, b"m").await.map(|_| ()),
        spec => device.sealer.sign(key, alg_of(spec).unwrap(), b"m").await.map(|_| ()),
    }
}

/// What makes the key this one and no other, as far as its users see it.
async fn identity(device: &Running, key: &KeyRef) -> Vec<u8> {
    match key.spec() {
        KeySpec::Kek => Vec::new(),
        KeySpec::HmacSha256 => device.sealer.mac(key, b"identity").await.unwrap().to_vec(),
        _ => device.sealer.public_key(key).await.unwrap().fingerprint().0.to_vec(),
    }
}

/// Whether a key of that kind is in its name, as the device gave it out: then making it twice gives two, and
/// it ends with the last copy of its name.
async fn is_a_blob(stage: &Stage, device: &Running, spec: KeySpec) -> bool {
    let place = if spec == KeySpec::Kek { "kek" } else { "signing" };
    stage.capabilities(device).await["keys_live_in"][place] == "blob"
}

pub async fn a_key_made_twice_is_one_key_and_destroying_it_twice_succeeds(stage: &Stage) {
    let device = stage.start().await;
    for spec in quick_specs(stage, &device).await {
        let planned = KeyRef::plan(spec).unwrap();
        let first = device.admin.generate(&planned).await.unwrap();
        let second = device.admin.generate(&planned).await.unwrap();
        assert!(first.is_pinned() && second.is_pinned() && first.id() == second.id(), "{spec:?}");
        let is_a_blob = is_a_blob(stage, &device, spec).await;
        let is_one = identity(&device, &first).await == identity(&device, &second).await;
        assert_eq!(is_one, !is_a_blob, "{spec:?}");
        if spec == KeySpec::Kek {
            let kek = kek_of(first.clone());
            let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
            let same = Kek { key: second.clone(), ..kek };
            let opened = device.sealer.open(&same, &HERE, &sealed).await.unwrap();
            opened.with(|value| assert_eq!(value, b"value"));
        }
        assert!(device.admin.inspect(&second).await.unwrap().deviations.is_empty(), "{spec:?}");

        device.admin.destroy(&first).await.unwrap();
        device.admin.destroy(&first).await.unwrap();
        if is_a_blob {
            continue;
        }
        let gone = device.admin.inspect(&first).await;
        assert!(matches!(gone, Err(SealError::KeyMissing { key }) if key == planned.id()), "{spec:?}");
        let gone = used(&device, &first).await;
        assert!(matches!(gone, Err(SealError::KeyMissing { key }) if key == planned.id()), "{spec:?}");
    }
    device.assert_ready();
}

pub async fn a_fresh_key_breaks_no_rule(stage: &Stage) {
    let device = stage.start().await;
    for spec in quick_specs(stage, &device).await {
        let key = device.key(spec).await;
        let report = device.admin.inspect(&key).await.unwrap();
        assert!(report.deviations.is_empty(), "{spec:?}: {report:?}");
        assert!(!report.attributes.is_empty(), "{spec:?}: nothing was read back");
        device.destroy(&[&key]).await;
    }
}

/// Begins a deviation that ends with the name of a mechanism: its known answer is right, and still no KEK
/// of it passes the checks.
pub const NO_KEK_BY: &str = "no KEK by ";

/// What the device is known to do wrongly: evidence that its keys lack, and keys that leave it.
pub async fn deviations(stage: &Stage, device: &Running) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for spec in quick_specs(stage, device).await {
        let key = device.key(spec).await;
        let report = device.admin.inspect(&key).await.unwrap();
        found.extend(report.accepted.into_iter().map(|rule| rule.replace("HMAC key: ", "")));
        device.destroy(&[&key]).await;
    }
    if stage.capabilities(device).await["refuses_to_export"] == false {
        found.insert("exports keys that are not extractable".to_owned());
    }
    found
}

pub async fn the_listed_deviations_are_there_and_no_others(stage: &Stage) {
    let device = stage.start().await;
    let listed = stage.backend.deviations;
    assert!(listed.iter().all(|(_, reason)| !reason.is_empty()));
    // What begins so is asked by the rule for all ways of wrapping.
    let listed = listed.iter().map(|(deviation, _)| *deviation);
    let listed: BTreeSet<_> = listed.filter(|text| !text.starts_with(NO_KEK_BY)).map(str::to_owned).collect();
    assert_eq!(deviations(stage, &device).await, listed, "left: found; right: listed");
}

pub async fn a_kind_of_key_that_the_device_lacks_is_refused_by_name(stage: &Stage) {
    let device = stage.start().await;
    for spec in stage.specs(&device, false).await {
        let planned = KeyRef::plan(spec).unwrap();
        let answer = device.admin.generate(&planned).await;
        let Err(error @ SealError::Refused { .. }) = answer else { panic!("{spec:?}: {answer:?}") };
        assert!(chain(&error).contains(spec.name()), "{}", chain(&error));
        let inspected = device.admin.inspect(&planned).await;
        assert!(matches!(inspected, Err(SealError::KeyMissing { .. })), "{spec:?}: {inspected:?}");
        device.assert_ready();
    }
    // The device goes on as if nothing had been.
    let key = device.key(KeySpec::HmacSha256).await;
    used(&device, &key).await.unwrap();
    device.destroy(&[&key]).await;
}

pub async fn a_key_survives_closing_and_opening_the_device(stage: &Stage) {
    let device = stage.start().await;
    let mut keys = Vec::new();
    for spec in quick_specs(stage, &device).await {
        let key = device.key(spec).await;
        let identity = identity(&device, &key).await;
        // Kept as bytes, as the layers above keep it.
        keys.push((key.to_bytes(), identity));
    }
    let kek = kek_of(KeyRef::from_bytes(&keys[0].0).unwrap());
    assert_eq!(kek.key.spec(), KeySpec::Kek);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);

    for _ in 0..2 {
        let device = stage.start().await;
        let opened = device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
        opened.with(|value| assert_eq!(value, b"value"));
        for (bytes, before) in &keys {
            let key = KeyRef::from_bytes(bytes).unwrap();
            used(&device, &key).await.unwrap();
            assert_eq!(&identity(&device, &key).await, before, "{key:?}");
            assert!(device.admin.inspect(&key).await.unwrap().deviations.is_empty(), "{key:?}");
        }
    }
    let device = stage.start().await;
    for (bytes, _) in keys {
        device.destroy(&[&KeyRef::from_bytes(&bytes).unwrap()]).await;
    }
}

/// The same id before its key was made, by the documented bytes of a `KeyRef`: version, spec, id, pin.
fn planned_again(key: &KeyRef) -> KeyRef {
    let mut bytes = key.to_bytes();
    bytes.truncate(18);
    bytes.push(0);
    KeyRef::from_bytes(&bytes).unwrap()
}

pub async fn another_key_under_the_same_id_is_unfit(stage: &Stage) {
    let device = stage.start().await;
    for spec in quick_specs(stage, &device).await {
        let key = device.key(spec).await;
        used(&device, &key).await.unwrap();
        device.admin.destroy(&key).await.unwrap();
        // Made in the same way, under the same id: only the pin tells.
        let other = device.admin.generate(&planned_again(&key)).await.unwrap();
        used(&device, &other).await.unwrap();

        if is_a_blob(stage, &device, spec).await {
            // Each name is its own key.
            assert_ne!(identity(&device, &key).await, identity(&device, &other).await, "{spec:?}");
            used(&device, &key).await.unwrap();
            continue;
        }
        let answer = used(&device, &key).await;
        assert!(matches!(answer, Err(SealError::KeyUnfit { .. })), "{spec:?}: {answer:?}");
        let report = device.admin.inspect(&key).await.unwrap();
        assert!(!report.deviations.is_empty(), "{spec:?}");
        device.assert_ready();
        used(&device, &other).await.unwrap();
        device.destroy(&[&other]).await;
    }
}

pub async fn a_key_that_was_only_planned_is_never_made_by_using_it(stage: &Stage) {
    let device = stage.start().await;
    for spec in quick_specs(stage, &device).await {
        let planned = KeyRef::plan(spec).unwrap();
        let answer = used(&device, &planned).await;
        assert!(
            matches!(answer, Err(SealError::KeyMissing { .. } | SealError::KeyUnfit { .. })),
            "{spec:?}: {answer:?}"
        );
        let inspected = device.admin.inspect(&planned).await;
        assert!(matches!(inspected, Err(SealError::KeyMissing { .. })), "{spec:?}: {inspected:?}");
        // Destroying what was never made is a success, too.
        device.admin.destroy(&planned).await.unwrap();
        // Made, and then used by the name that it had before: it may be anybody's key.
        let made = device.admin.generate(&planned).await.unwrap();
        let answer = used(&device, &planned).await;
        assert!(matches!(answer, Err(SealError::KeyUnfit { .. })), "{spec:?}: {answer:?}");
        device.destroy(&[&made]).await;
    }
    device.assert_ready();
}
