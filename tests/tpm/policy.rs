//! TP-7: keys bound to the state of the host, and the way out when it has changed.

use std::fs;

use lacre::seal::guarded::Options;
use lacre::seal::{Alg, Arena, DeviceState, KeySpec, tpm as seal_tpm};
use serde_json::json;

use crate::stage::{HERE, Running};
use crate::swtpm::{Swtpm, program};

pub fn config(tpm: &Swtpm, tcti: &str, source: &str) -> lacre::seal::DeviceConfig {
    let tpm_section = json!({ "tcti": tcti, "auth_source": source });
    serde_json::from_value(json!({ "latch_dir": tpm.dir().join("latch"), "tpm": tpm_section })).unwrap()
}

fn openssl(tpm: &Swtpm, args: &[&str]) {
    let status = program("openssl").args(args).current_dir(tpm.dir()).status().unwrap();
    assert!(status.success());
}

/// Seals the secret under two PCRs; what `auth_source` is then. The authority's key and a stranger's lie beside it.
pub fn sealed_source(tpm: &Swtpm, arena: &Arena) -> String {
    for name in ["authority", "other"] {
        let key = format!("{name}.key");
        openssl(tpm, &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &key]);
        openssl(tpm, &["ec", "-in", &key, "-pubout", "-out", &format!("{name}.pem")]);
    }
    let pem = fs::read_to_string(tpm.dir().join("authority.pem")).unwrap();
    let file = tpm.dir().join("auth.sealed");
    let plain = format!("file:{}", tpm.auth_file.display());
    let config = config(tpm, &tpm.tcti(), &plain);
    fs::write(&file, seal_tpm::seal_auth(&config, arena, &[7, 11], &pem).unwrap()).unwrap();
    format!("sealed:{}", file.display())
}

pub fn arena() -> Arena {
    Arena::new(&Options { slots: 16, allow_unlocked: true, ..Options::default() }).unwrap()
}

#[tokio::test]
async fn changed_pcrs_keep_the_keys_shut_until_the_authority_has_approved_them() {
    let tpm = Swtpm::new();
    let arena = arena();
    let device = Running::ready_on(&tpm);
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);

    let source = sealed_source(&tpm, &arena);
    let start = || Running::with(&config(&tpm, &tpm.tcti(), &source));
    let device = start();
    assert_eq!(device.status().state, DeviceState::Ready);
    device.opens(&kek, &sealed, b"value").await;
    drop(device);
    // A PCR that was not chosen changes nothing.
    tpm.tool(&["tpm2_pcrextend", &format!("4:sha256={}", "ab".repeat(32))]);
    assert_eq!(start().status().state, DeviceState::Ready);

    tpm.tool(&["tpm2_pcrextend", &format!("7:sha256={}", "cd".repeat(32))]);
    let digest = seal_tpm::pcr_digest(&config(&tpm, &tpm.tcti(), &source), &arena, &[7, 11]).unwrap();
    let DeviceState::Stopped(reason) = start().status().state else { panic!("opened") };
    assert!(reason.starts_with("policy") && reason.contains(&hex::encode(&digest)), "{reason}");

    fs::write(tpm.dir().join("digest"), &digest).unwrap();
    // Somebody else's approval, and one of another state.
    openssl(&tpm, &["dgst", "-sha256", "-sign", "other.key", "-out", "auth.sealed.approval", "digest"]);
    fs::write(tpm.dir().join("stale"), [7; 32]).unwrap();
    openssl(&tpm, &["dgst", "-sha256", "-sign", "authority.key", "-out", "auth.sealed.approval.2", "stale"]);
    assert!(matches!(start().status().state, DeviceState::Stopped(_)));

    openssl(&tpm, &["dgst", "-sha256", "-sign", "authority.key", "-out", "auth.sealed.approval.3", "digest"]);
    let device = start();
    assert_eq!(device.status().state, DeviceState::Ready);
    device.opens(&kek, &sealed, b"value").await;
    device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    drop(device);
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-transient"]).trim(), "");
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-loaded-session"]).trim(), "");
}
