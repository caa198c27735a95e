//! A TPM whose owner hierarchy has an authorisation: what needs it works, and nobody learns it.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use lacre::seal::{Alg, Count, DeviceConfig, DeviceName, DeviceState, KeySpec, SealError};
use serde_json::{Value, json};

use crate::daemon::{lacre, run, text};
use crate::faults::failed_tries;
use crate::proxy::Proxy;
use crate::stage::{HERE, Running};
use crate::swtpm::Swtpm;
use crate::wire::contains;

const OWNER: &str = "canary of the owner, 5f1c9a7e3b";

/// A TPM with that authorisation.
fn owned() -> Swtpm {
    let tpm = Swtpm::new();
    tpm.tool(&["tpm2_changeauth", "-c", "owner", OWNER]);
    tpm
}

/// Puts a text where `owner_auth_source` reads it.
fn put(tpm: &Swtpm, text: &str) -> String {
    use std::io::Write;
    let path = tpm.dir().join("owner");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    format!("file:{}", path.display())
}

fn config(tpm: &Swtpm, tcti: &str, owner: Option<&str>) -> DeviceConfig {
    let auth = format!("file:{}", tpm.auth_file.display());
    let section = json!({ "tcti": tcti, "auth_source": auth, "owner_auth_source": owner });
    let latch = tpm.dir().join("latch");
    serde_json::from_value(json!({ "latch_dir": latch, "deadline": 5, "tpm": section })).unwrap()
}

fn stopped(device: &Running) -> String {
    match device.status().state {
        DeviceState::Stopped(reason) => reason,
        other => panic!("{other:?}"),
    }
}

/// TP-6.
#[tokio::test]
async fn everything_works_under_an_owner_authorisation_and_a_listener_learns_nothing_of_it() {
    let tpm = owned();
    let proxy = Proxy::before(&tpm);
    let source = put(&tpm, OWNER);
    let config = config(&tpm, &proxy.tcti(), Some(&source));
    let device = Running::with(&config);
    assert_eq!(device.status().state, DeviceState::Ready);
    let (kek, to) = (device.kek().await, device.kek().await);
    let (signer, mac) = (device.key(KeySpec::EcP256).await, device.key(KeySpec::HmacSha256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.opens(&kek, &sealed, b"value").await;
    device.sealer.rewrap(&kek, &to, &HERE, sealed.key()).await.unwrap();
    device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    device.sealer.mac(&mac, b"m").await.unwrap();
    for key in [&kek.key, &signer, &mac] {
        assert!(device.admin.inspect(key).await.unwrap().deviations.is_empty());
    }
    device.capabilities().await.unwrap();
    device.admin.destroy(&to.key).await.unwrap();
    let gone = device.admin.inspect(&to.key).await;
    assert!(matches!(gone, Err(SealError::KeyMissing { .. })), "{gone:?}");
    let count = async |count| device.admin.count(&DeviceName::default(), count).await.unwrap();
    assert_eq!(count(Count::Read).await, None);
    let made = count(Count::Make).await.unwrap();
    assert_eq!(count(Count::Make).await, Some(made));
    assert_eq!(count(Count::Advance { from: made }).await, Some(made + 1));
    // Asked again, as after an answer that was lost.
    assert_eq!(count(Count::Advance { from: made }).await, Some(made + 1));
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-loaded-session"]).lines().count(), 1);
    drop(device);
    assert_eq!(tpm.tool(&["tpm2_getcap", "handles-loaded-session"]).trim(), "");

    let device = Running::with(&config);
    device.opens(&kek, &sealed, b"value").await;
    device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    drop(device);

    let seen = proxy.seen();
    for half in [&OWNER.as_bytes()[..OWNER.len() / 2], &OWNER.as_bytes()[OWNER.len() / 2..]] {
        assert!(!contains(&seen, half), "the owner's authorisation is on the wire");
    }
    // TPM2_StartAuthSession with TPM_RH_NULL in the place of the key that the salt is for: to its HMACs guesses
    // could be tried.
    let unsalted = [0, 0, 1, 0x76, 0x40, 0, 0, 7];
    assert!(contains(&seen, &unsalted[..4]) && !contains(&seen, &unsalted), "a session has no salt");

    // The same wire shows what a program sends that does not care.
    crate::foreign::make_as_owner(&proxy.tcti(), OWNER);
    assert!(contains(&proxy.seen(), OWNER.as_bytes()));
}

#[tokio::test]
async fn a_wrong_owner_authorisation_stops_the_device_and_costs_no_try() {
    let tpm = owned();
    let device = Running::with(&config(&tpm, &tpm.tcti(), None));
    assert!(stopped(&device).contains("`owner_auth_source` has to give it"), "{}", stopped(&device));
    drop(device);
    let source = put(&tpm, "another one");
    let config = config(&tpm, &tpm.tcti(), Some(&source));
    for _ in 0..5 {
        let device = Running::with(&config);
        assert!(stopped(&device).contains("`owner_auth_source`"), "{}", stopped(&device));
    }
    // More than the TPM allows with what is under its protection.
    for _ in 0..5 {
        let guess = ["tpm2_createprimary", "-Q", "-C", "o", "-P", "wrong", "-c", "p.ctx"];
        assert!(!tpm.try_tool(&guess).status.success());
    }
    assert_eq!(failed_tries(&tpm), 0, "a try was spent");

    let device = Running::with(&config);
    stopped(&device);
    put(&tpm, OWNER);
    device.ready(Duration::from_secs(15)).await;
    let (kek, signer) = (device.kek().await, device.key(KeySpec::EcP256).await);
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();

    // Changed while it runs. What needs no owner goes on.
    tpm.tool(&["tpm2_changeauth", "-c", "owner", "-p", OWNER, "changed"]);
    device.sealer.sign(&signer, Alg::Es256, b"m").await.unwrap();
    let made = device.admin.generate(&lacre::seal::KeyRef::plan(KeySpec::Kek).unwrap()).await;
    assert!(matches!(made, Err(SealError::Unavailable { .. })), "{made:?}");
    assert!(stopped(&device).contains("`owner_auth_source`"), "{}", stopped(&device));
    put(&tpm, "changed");
    device.ready(Duration::from_secs(15)).await;
    device.opens(&kek, &sealed, b"value").await;
    assert_eq!(failed_tries(&tpm), 0, "a try was spent");

    // A clear takes the owner's authorisation away too.
    tpm.tool(&["tpm2_clear", "-c", "p"]);
    drop(device);
    let device = Running::with(&config);
    assert!(stopped(&device).starts_with("tpm_cleared"), "{}", stopped(&device));
}

#[test]
fn the_program_initialises_itself_under_an_owner_authorisation() {
    let tpm = owned();
    let source = put(&tpm, OWNER);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lacre.toml");
    let text_of = |owner: &str| {
        format!(
            "data_dir = \"{}\"\n[memory]\nallow_unlocked = true\n[seal.tpm]\ntcti = \"{}\"\n\
             auth_source = \"file:{}\"\n{owner}",
            dir.path().join("data").display(),
            tpm.tcti(),
            tpm.auth_file.display()
        )
    };
    let with_config = |args: &[&str]| {
        let mut command = lacre(dir.path());
        command.arg("--config").arg(&path).args(args);
        command
    };
    let init = ["init", "--secret-out", "secret"];
    fs::write(&path, text_of("")).unwrap();
    let refused = with_config(&init).output().unwrap();
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("owner_auth_source"), "{}", text(&refused.stderr));

    fs::write(&path, text_of(&format!("owner_auth_source = \"{source}\"\n"))).unwrap();
    run(&mut with_config(&init));
    let doctor = run(&mut with_config(&["doctor", "-o", "json"]));
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!(report["capabilities"]["wrap"], "TPM2-SEAL");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["level"] != "fail"), "{checks:#?}");
}
