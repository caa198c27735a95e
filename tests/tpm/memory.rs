//! What stays in this process of a data key that went through the TPM's library (ME-4), and the format of
//! what is sealed.

use std::fs;
use std::os::unix::fs::FileExt;

use lacre::seal::Sealed;
use sha2::{Digest, Sha256};

use crate::stage::{HERE, Running};
use crate::swtpm::Swtpm;

/// Everything writable that this process has mapped and that can be read by others at all.
fn memory() -> Vec<(String, Vec<u8>)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let file = fs::File::open("/proc/self/mem").unwrap();
    let mut all = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with("rw")))
    {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        if file.read_exact_at(&mut bytes, start).is_ok() {
            all.push((line.to_owned(), bytes));
        }
    }
    all
}

/// The wrapped bytes at the end of the sealed header (docs/formats/sealed-v1.md).
fn wrapped(sealed: &Sealed) -> Vec<u8> {
    let header = sealed.key().to_bytes();
    let mut at = 4 + 1 + 16 + 4;
    for _ in 0..2 {
        at += 1 + usize::from(header[at]);
    }
    header[at + 1..].to_vec()
}

/// Where either half of the key is.
fn hits(memory: &[(String, Vec<u8>)], key: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for (place, bytes) in memory {
        for half in [&key[..16], &key[16..32]] {
            let at = bytes.windows(16).enumerate().filter(|(_, window)| window == &half);
            found.extend(at.map(|(at, _)| format!("{at:#x} in {place}")));
        }
    }
    found
}

#[tokio::test]
async fn no_copy_of_a_data_key_stays_behind_and_foreign_code_opens_it() {
    let tpm = Swtpm::new();
    let device = Running::ready_on(&tpm);
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let after_sealing = memory();
    device.opens(&kek, &sealed, b"value").await;
    let after_opening = memory();
    drop(device);

    let secret = fs::read(&tpm.auth_file).unwrap();
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret);
    let id = *kek.key.id().as_bytes();
    let auth = aws_lc_rs::hmac::sign(&key, &[&b"lacre/tpm-auth/v1"[..], &id].concat());
    let opened = crate::foreign::unseal(&tpm.tcti(), &id, auth.as_ref(), &wrapped(&sealed));
    assert_eq!(opened.len(), 64);
    let control = memory();
    assert!(!hits(&control, &opened[..32]).is_empty(), "the scan does not find what is there");
    for (when, memory) in [("sealing", after_sealing), ("opening", after_opening)] {
        let hits = hits(&memory, &opened[..32]);
        assert!(hits.is_empty(), "after {when}: {hits:#?}");
    }
    // `DEK || SHA-256(context)`: the context is the AAD of the wrap.
    assert_ne!(&opened[32..], &Sha256::digest(b"")[..]);
}
