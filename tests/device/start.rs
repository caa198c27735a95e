//! What must not be loaded is not loaded (HS-2), and what is not there yet is waited for.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use serde_json::Value;

use crate::daemon::{Options, TestDaemon, free_port};
use crate::served::{config, over, stored, value_path};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;

/// Starts the daemon over `module` and watches it end; what it said.
async fn refused(daemon: &mut TestDaemon, control: &ShimControl, module: &Path) -> String {
    let options = over(control, "");
    daemon.set_options(Options { config: Some(config(module, "")), ..options });
    let before = daemon.log().len();
    let began = Instant::now();
    assert!(!daemon.try_run().await, "{} was loaded", module.display());
    assert_eq!(daemon.ended(Duration::from_secs(10)).await, Some(1), "{}", module.display());
    assert!(began.elapsed() < Duration::from_secs(20), "it was tried again and again");
    let said = daemon.log()[before..].to_owned();
    assert!(said.contains(module.to_str().unwrap()), "does not name {}: {said}", module.display());
    said
}

/// A copy of a file with that mode, in a directory with that mode.
fn copied(dir: &Path, name: &str, from: &Path, mode: u32, dir_mode: u32) -> PathBuf {
    let dir = dir.join(format!("{name}.d"));
    fs::create_dir(&dir).unwrap();
    let copy = dir.join(format!("{name}.so"));
    fs::copy(from, &copy).unwrap();
    fs::set_permissions(&copy, Permissions::from_mode(mode)).unwrap();
    fs::set_permissions(&dir, Permissions::from_mode(dir_mode)).unwrap();
    copy
}

/// A library that is there in any case and no PKCS#11 module.
fn libc() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("/libc.so.6")).unwrap();
    PathBuf::from(line.split_whitespace().last().unwrap())
}

#[tokio::test]
async fn a_module_that_must_not_be_loaded_is_named_and_no_pin_is_sent() {
    let control = ShimControl::new(&softhsm::module());
    let mut daemon = TestDaemon::dev().await;
    daemon.stop().await;
    let dir = daemon.dir().to_owned();
    let shim = shim_path();

    let missing = refused(&mut daemon, &control, &dir.join("no-such-module.so")).await;
    assert!(missing.contains("No such file"), "{missing}");

    fs::write(dir.join("text.so"), "not a library\n").unwrap();
    fs::set_permissions(dir.join("text.so"), Permissions::from_mode(0o644)).unwrap();
    refused(&mut daemon, &control, &dir.join("text.so")).await;

    let foreign = copied(&dir, "foreign", &shim, 0o644, 0o755);
    let mut elf = fs::read(&foreign).unwrap();
    // e_machine: a library for another processor.
    elf[18] = if elf[18] == 0x3e { 0xb7 } else { 0x3e };
    fs::write(&foreign, elf).unwrap();
    refused(&mut daemon, &control, &foreign).await;

    let other = refused(&mut daemon, &control, &libc().canonicalize().unwrap()).await;
    assert!(other.contains("C_GetFunctionList"), "{other}");

    let open = copied(&dir, "open", &shim, 0o666, 0o755);
    let said = refused(&mut daemon, &control, &open).await;
    assert!(said.contains("writable by everybody"), "{said}");
    let replaceable = copied(&dir, "replaceable", &shim, 0o644, 0o777);
    let said = refused(&mut daemon, &control, &replaceable).await;
    assert!(said.contains("writable by everybody"), "{said}");

    assert_eq!(control.count("C_Initialize"), 0, "something was loaded after all");
    assert_eq!(control.count("C_Login"), 0);
    daemon.set_options(Options::default());
    daemon.finish().await;
}

#[tokio::test]
async fn a_daemon_that_starts_without_its_token_says_so_and_waits_for_it() {
    let listen = format!("127.0.0.1:{}", free_port());
    let text = config(&softhsm::module(), "").replace("127.0.0.1:0", &listen);
    let mut daemon = TestDaemon::start(Options { config: Some(text), ..Options::default() }).await;
    let api = daemon.api().await;
    let value = daemon.secret("early");
    let id = stored(&api, "early", &value).await;
    daemon.stop().await;
    let (here, away) = (daemon.dir().join("tokens"), daemon.dir().join("away"));
    fs::rename(&here, &away).unwrap();

    let base = format!("http://{listen}");
    let client = Client::new();
    let waiting = async {
        let began = Instant::now();
        while client.get(format!("{base}/livez")).send().await.is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not serve without its token");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let ready = client.get(format!("{base}/readyz")).send().await.unwrap();
        assert_eq!(ready.status(), StatusCode::SERVICE_UNAVAILABLE);
        let answer = api.get(&value_path(&id)).await;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer.headers().contains_key("Retry-After"));
        // Nothing vouches yet for the public key that tokens are checked with.
        let metadata = api.get(&format!("/v1/secrets/{id}")).await;
        assert_eq!(metadata.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(metadata.json::<Value>().await.unwrap()["code"], "device-unavailable");
        fs::rename(&away, &here).unwrap();
    };
    let (became_ready, ()) = tokio::join!(daemon.try_run(), waiting);

    assert!(became_ready, "{}", daemon.log());
    assert_eq!(daemon.api().await.value(&id).await, value);
    daemon.finish().await;
}

#[tokio::test]
async fn a_database_without_keys_is_not_served() {
    let token = softhsm::SoftHsm::new("lacre-dev");
    let dir = tempfile::tempdir().unwrap();
    let text = config(&token.module, "").replace("{dir}", dir.path().to_str().unwrap());
    let text = text.replace("{pin}", token.pin_file.to_str().unwrap());
    fs::write(dir.path().join("lacre.toml"), text).unwrap();

    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lacre"));
    command.args(["serve", "--allow-unlocked-memory", "--config"]).arg(dir.path().join("lacre.toml"));
    let output = command.env("SOFTHSM2_CONF", &token.conf).output().unwrap();

    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("lacre init"), "{said}");
}
