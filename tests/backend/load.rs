//! Many things at once, and the same thing again and again.

use std::fs;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lacre::seal::KeySpec;

use crate::keys::alg_of;
use crate::openssl::verifies_here;
use crate::stage::{HERE, Stage, THERE, is_rejected};

pub async fn sixty_four_operations_of_all_kinds_at_once(stage: &Stage) {
    let device = stage.start().await;
    let (kek, other) = (device.kek().await, device.kek().await);
    let mac_key = device.key(KeySpec::HmacSha256).await;
    let mac = device.sealer.mac(&mac_key, b"message").await.unwrap();
    let mut signers = Vec::new();
    for spec in [KeySpec::EcP256, KeySpec::EcP384, KeySpec::Rsa2048] {
        if stage.specs(&device, true).await.contains(&spec) {
            let key = device.key(spec).await;
            let public = device.sealer.public_key(&key).await.unwrap();
            signers.push((key, alg_of(spec).unwrap(), public));
        }
    }
    assert!(!signers.is_empty());
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();

    let (sealer, kek_ref, sealed_ref) = (&device.sealer, &kek, &sealed);
    let (other_ref, signers_ref, mac_ref) = (&other, &signers, &mac_key);
    let operation = |at: usize| async move {
        match at % 6 {
            0 => {
                let value = vec![u8::try_from(at).unwrap(); at * 100];
                let sealed = sealer.seal(kek_ref, &HERE, &value).await.unwrap();
                let opened = sealer.open(kek_ref, &HERE, &sealed).await.unwrap();
                assert!(opened.with(|bytes| bytes == value));
            }
            1 => sealer
                .open(kek_ref, &HERE, sealed_ref)
                .await
                .unwrap()
                .with(|value| assert_eq!(value, b"value")),
            2 => {
                let (key, alg, public) = &signers_ref[at / 6 % signers_ref.len()];
                let message = format!("message {at}");
                let signature = sealer.sign(key, *alg, message.as_bytes()).await.unwrap();
                assert!(verifies_here(public, *alg, message.as_bytes(), signature.as_bytes()), "{at}");
            }
            3 => assert_eq!(sealer.mac(mac_ref, b"message").await.unwrap(), mac),
            4 => {
                let (key, _, public) = &signers_ref[at / 6 % signers_ref.len()];
                assert!(sealer.public_key(key).await.unwrap() == *public);
            }
            _ if at % 12 == 5 => {
                sealer.rewrap(kek_ref, other_ref, &HERE, sealed_ref.key()).await.unwrap();
            }
            _ => assert!(is_rejected(&sealer.open(kek_ref, &THERE, sealed_ref).await)),
        }
    };
    join_all((0..64).map(operation)).await;
    device.assert_ready();
    let mut made = vec![&kek.key, &other.key, &mac_key];
    made.extend(signers.iter().map(|(key, ..)| key));
    device.destroy(&made).await;
}

/// What this process has open, and its threads.
fn held() -> (Vec<String>, usize) {
    let files = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut files: Vec<_> = files.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    files.sort();
    let files = files.into_iter().map(|file| file.display().to_string()).collect();
    (files, fs::read_dir("/proc/self/task").unwrap().count())
}

fn resident_kib() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

const ROUNDS: usize = 6;

pub async fn opening_and_closing_leaves_nothing_behind(stage: &Stage) {
    let device = stage.start().await;
    let key = device.key(KeySpec::HmacSha256).await;
    let mac = device.sealer.mac(&key, b"m").await.unwrap();
    drop(device);
    // What a module or the allocator makes once and keeps is there after the first rounds.
    let cycle = async || {
        let device = stage.start().await;
        assert_eq!(device.sealer.mac(&key, b"m").await.unwrap(), mac);
    };
    for _ in 0..3 {
        cycle().await;
    }
    let ((files, threads), memory) = (held(), resident_kib());
    for _ in 0..ROUNDS {
        cycle().await;
    }
    let began = Instant::now();
    loop {
        let now = held();
        if now == (files.clone(), threads) {
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{threads} threads and {files:#?} before, {now:#?} after"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let grown = resident_kib().saturating_sub(memory);
    assert!(grown < ROUNDS * 512, "{grown} KiB more after {ROUNDS} rounds");
    stage.start().await.destroy(&[&key]).await;
}
