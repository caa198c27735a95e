//! Values: sealed and opened under one KEK and at one place, and under nothing else.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use lacre::seal::{Context, Kek, KekId, KeyRef, KeySpec, SealError, Sealed};

use crate::keys::NO_KEK_BY;
use crate::stage::{HERE, Running, Stage, THERE, chain, is_rejected, kek_of, rounds};

async fn opens(device: &Running, kek: &Kek, sealed: &Sealed, value: &[u8]) {
    let opened = device.sealer.open(kek, &HERE, sealed).await.unwrap();
    assert!(opened.with(|bytes| bytes == value), "another value of {} bytes", value.len());
}

pub async fn values_of_every_size_come_back(stage: &Stage) {
    let device = stage.start().await;
    let kek = device.kek().await;
    for len in [0, 1, 4096, 64 << 10, 1 << 20] {
        let value: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let sealed = device.sealer.seal(&kek, &HERE, &value).await.unwrap();
        // Through its bytes, as it is stored.
        opens(&device, &kek, &Sealed::from_bytes(&sealed.to_bytes()).unwrap(), &value).await;
    }
    let too_large = device.sealer.seal(&kek, &HERE, &vec![0; 2 << 20]).await;
    assert!(matches!(too_large, Err(SealError::TooLarge { .. })));
    device.destroy(&[&kek.key]).await;
}

pub async fn another_place_is_rejected(stage: &Stage) {
    let device = stage.start().await;
    let kek = device.kek().await;
    let place = Context { tenant: "ab", kind: "c", record: "de", version: 7 };
    let sealed = device.sealer.seal(&kek, &place, b"value").await.unwrap();
    let others = [
        Context { tenant: "a", kind: "bc", ..place },
        Context { tenant: "ab\0", ..place },
        Context { tenant: "", ..place },
        Context { kind: "cd", record: "e", ..place },
        Context { record: "d\u{e9}", ..place },
        Context { version: 8, ..place },
        Context { version: 7 << 32, ..place },
    ];
    for other in others {
        let answer = device.sealer.open(&kek, &other, &sealed).await;
        assert!(is_rejected(&answer), "{other:?}: {:?}", answer.err());
    }
    device.sealer.open(&kek, &place, &sealed).await.unwrap();
    device.assert_ready();
    device.destroy(&[&kek.key]).await;
}

pub async fn another_kek_or_version_is_rejected(stage: &Stage) {
    let device = stage.start().await;
    let (kek, other) = (device.kek().await, device.kek().await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();

    // The row says that this version wrapped it, and the device must find out that it did not (CB-10).
    let pretends = Kek { key: other.key.clone(), ..kek.clone() };
    assert!(is_rejected(&device.sealer.open(&pretends, &HERE, &sealed).await));
    assert!(is_rejected(&device.sealer.open(&other, &HERE, &sealed).await));
    let later = Kek { version: 2, ..kek.clone() };
    assert!(is_rejected(&device.sealer.open(&later, &HERE, &sealed).await));

    // Relabelled in the header, too: the same device key, and still another wrap.
    let mut relabelled = sealed.to_bytes();
    relabelled[24] = 2;
    let relabelled = Sealed::from_bytes(&relabelled).unwrap();
    assert!(is_rejected(&device.sealer.open(&later, &HERE, &relabelled).await));
    let foreign = Kek { id: KekId::generate().unwrap(), ..kek.clone() };
    let mut relabelled = sealed.to_bytes();
    relabelled[5..21].copy_from_slice(foreign.id.as_bytes());
    let relabelled = Sealed::from_bytes(&relabelled).unwrap();
    assert!(is_rejected(&device.sealer.open(&foreign, &HERE, &relabelled).await));

    device.assert_ready();
    opens(&device, &kek, &sealed, b"value").await;
    device.destroy(&[&kek.key, &other.key]).await;
}

/// Turns bits all over the value, each one where the device is quick enough (CB-3).
async fn turn_bits(device: &Running, kek: &Kek, budget: Duration) {
    let sealed = device.sealer.seal(kek, &HERE, b"16 bytes of text").await.unwrap();
    let bytes = sealed.to_bytes();
    let began = Instant::now();
    let mut altered = bytes.clone();
    *altered.last_mut().unwrap() ^= 1;
    assert!(is_rejected(&device.sealer.open(kek, &HERE, &Sealed::from_bytes(&altered).unwrap()).await));

    let all = bytes.len() * 8;
    // Odd, so that every place in a byte has its turn.
    let stride = all.div_ceil(rounds(began.elapsed(), budget, all)) | 1;
    let (mut asked, first) = (0, usize::from(bytes[bytes.len() - 1]) % stride);
    for bit in (first..all).step_by(stride) {
        let mut altered = bytes.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        let Ok(altered) = Sealed::from_bytes(&altered) else { continue };
        let answer = device.sealer.open(kek, &HERE, &altered).await;
        assert!(is_rejected(&answer), "bit {bit} of {all}: {:?}", answer.err());
        asked += 1;
    }
    assert!(asked > 0);
    device.assert_ready();
    opens(device, kek, &sealed, b"16 bytes of text").await;
}

pub async fn a_turned_bit_is_rejected(stage: &Stage) {
    let device = stage.start().await;
    let kek = device.kek().await;
    turn_bits(&device, &kek, Duration::from_secs(3)).await;
    device.destroy(&[&kek.key]).await;
}

pub async fn the_same_value_never_gives_the_same_bytes(stage: &Stage) {
    let device = stage.start().await;
    let keks = [device.kek().await, device.kek().await];
    let mut seen = HashSet::new();
    let began = Instant::now();
    device.sealer.seal(&keks[0], &HERE, b"the same value").await.unwrap();
    let rounds = rounds(began.elapsed(), Duration::from_secs(2), 500);
    for round in 0..rounds {
        let sealed = device.sealer.seal(&keks[round % 2], &HERE, b"the same value").await.unwrap();
        // CB-7: wrapped DEK with its IV, nonce, ciphertext, tag.
        for column in sealed.into_columns() {
            assert!(seen.insert(column), "repeated in round {round}");
        }
    }
    device.destroy(&[&keks[0].key, &keks[1].key]).await;
}

pub async fn a_rewrap_moves_the_key_and_leaves_the_payload(stage: &Stage) {
    let device = stage.start().await;
    let (from, to) = (device.kek().await, device.kek().await);
    let sealed = device.sealer.seal(&from, &HERE, b"value").await.unwrap();

    let key = device.sealer.rewrap(&from, &to, &HERE, sealed.key()).await.unwrap();
    assert!(is_rejected(&device.sealer.rewrap(&from, &to, &THERE, sealed.key()).await));

    let [_, nonce, ciphertext, tag] = sealed.into_columns();
    let moved = Sealed::from_columns(&key.to_bytes(), &nonce, ciphertext, &tag).unwrap();
    opens(&device, &to, &moved, b"value").await;
    assert!(is_rejected(&device.sealer.open(&from, &HERE, &moved).await));
    // The old one may go: nothing of the value depends on it any more.
    device.destroy(&[&from.key]).await;
    opens(&device, &to, &moved, b"value").await;
    device.destroy(&[&to.key]).await;
}

/// A PKCS#11 token may offer several; the one that it would choose by itself is tried by all rules.
pub async fn every_way_of_wrapping_that_is_offered_keeps_the_promises(stage: &Stage) {
    let device = stage.start().await;
    let capabilities = stage.capabilities(&device).await;
    let Some(offered) = capabilities["wrap_gives_known_answer"].as_object() else { return };
    let offered: Vec<_> = offered.iter().filter(|(_, works)| **works == true).map(|(name, _)| name).collect();
    assert!(offered.iter().any(|name| Some(name.as_str()) == capabilities["wrap"].as_str()));
    drop(device);
    let (mut kept, mut failed) = (Vec::new(), BTreeSet::new());
    for wrap in offered {
        let device = stage.start_with(|config| config["pkcs11"]["wrap"] = wrap.as_str().into()).await;
        let planned = KeyRef::plan(KeySpec::Kek).unwrap();
        let kek = match device.admin.generate(&planned).await {
            Ok(made) => kek_of(made),
            Err(error) => {
                println!("{}: no KEK by {wrap}: {}", stage.backend.title, chain(&error));
                // What a device says of altered bytes may look like a fault of it: then it is back soon.
                device.ready_again().await;
                device.admin.destroy(&planned).await.unwrap();
                failed.insert(format!("{NO_KEK_BY}{wrap}"));
                continue;
            }
        };
        assert_eq!(kek.mechanism_name(), wrap);
        let report = device.admin.inspect(&kek.key).await.unwrap();
        assert!(report.deviations.is_empty(), "{wrap}: {report:?}");
        let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
        let sealed = Sealed::from_bytes(&sealed.to_bytes()).unwrap();
        opens(&device, &kek, &sealed, b"value").await;
        assert!(is_rejected(&device.sealer.open(&kek, &THERE, &sealed).await), "{wrap}");
        let other = Kek { key: device.kek().await.key, ..kek.clone() };
        assert!(is_rejected(&device.sealer.open(&other, &HERE, &sealed).await), "{wrap}");
        turn_bits(&device, &kek, Duration::from_millis(400)).await;
        device.destroy(&[&other.key]).await;
        kept.push((kek, sealed));
    }
    let listed = stage.backend.deviations.iter().map(|(deviation, _)| (*deviation).to_owned());
    let listed: BTreeSet<_> = listed.filter(|text| text.starts_with(NO_KEK_BY)).collect();
    assert_eq!(failed, listed, "left: found; right: listed");
    // With any other configuration a KEK keeps the way it was made with.
    let device = stage.start().await;
    for (kek, sealed) in kept {
        opens(&device, &kek, &sealed, b"value").await;
        device.destroy(&[&kek.key]).await;
        let gone = device.sealer.open(&kek, &HERE, &sealed).await;
        assert!(matches!(gone, Err(SealError::KeyMissing { .. })), "{}", kek.mechanism_name());
    }
}
