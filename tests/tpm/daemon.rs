//! The program on a TPM: initialised, looked at, served, killed and started again.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::swtpm::{Swtpm, program};

pub fn lacre(dir: &Path) -> Command {
    let mut command = program(env!("CARGO_BIN_EXE_lacre"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LACRE")) {
        command.env_remove(name);
    }
    command.current_dir(dir);
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    output
}

/// A daemon that is killed with the value.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts it and waits until it says that it serves.
fn dev(dir: &Path) -> Serving {
    let mut command = lacre(dir);
    command.args(["dev", "--device", "tpm", "--data-dir", "dev", "--listen", "127.0.0.1:0"]);
    command.arg("--allow-unlocked-memory").stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("lacre ready url="), "{line}");
    Serving(process)
}

fn client(dir: &Path) -> Command {
    let mut command = lacre(dir);
    command.args(["--dev-json", "dev/dev.json", "-o", "json"]);
    command
}

#[test]
fn dev_keeps_secrets_in_a_software_tpm_over_kills() {
    let dir = tempfile::tempdir().unwrap();
    let serving = dev(dir.path());
    let mut create = client(dir.path());
    create.args(["secrets", "create", "a", "--kind", "opaque"]);
    let mut child =
        create.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"value in a TPM").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let status = text(&run(client(dir.path()).arg("status")).stdout);
    assert!(status.contains("\"TPM 2.0"), "{status}");
    // SIGKILL: the TPM has to end with it, and a new one takes up its state.
    drop(serving);
    let _serving = dev(dir.path());
    let value = run(client(dir.path()).args(["secrets", "get", "a", "--reveal"]));
    assert!(text(&value.stdout).contains("value in a TPM"), "{}", text(&value.stdout));
    let kek: Value = serde_json::from_slice(&run(client(dir.path()).args(["kek", "list"])).stdout).unwrap();
    assert!(kek.to_string().contains("TPM2-SEAL"), "{kek}");
}

#[test]
fn init_and_doctor_know_a_tpm() {
    let tpm = Swtpm::new();
    let dir = tempfile::tempdir().unwrap();
    let config: PathBuf = dir.path().join("lacre.toml");
    let data = dir.path().join("data");
    let top = format!("data_dir = \"{}\"\n[memory]\nallow_unlocked = true\n", data.display());
    fs::write(&config, &top).unwrap();
    let with_config = |args: &[&str]| {
        let mut command = lacre(dir.path());
        command.arg("--config").arg(&config).args(args);
        command
    };
    let init = ["init", "--device", "tpm", "--tcti", &tpm.tcti(), "--secret-out", "secret"];
    let made = text(&run(&mut with_config(&init)).stderr);
    assert!(made.contains("keep a copy"), "{made}");
    // What it says is the section that the daemon needs.
    let section: Vec<_> =
        made.lines().filter(|line| line.contains("[seal.tpm]") || line.contains(" = \"")).collect();
    fs::write(&config, format!("{top}{}\n", section.join("\n"))).unwrap();
    let again = text(&run(&mut with_config(&init)).stderr);
    assert!(!again.contains("keep a copy"), "the secret was made again: {again}");

    let doctor = run(&mut with_config(&["doctor", "-o", "json"]));
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!(report["capabilities"]["wrap"], "TPM2-SEAL");
    assert_eq!(report["capabilities"]["algorithms"]["ES256"], true);
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["level"] != "fail"), "{checks:#?}");

    // Others may not read what every authorisation is made of.
    let auth = data.join("tpm-auth");
    let mut rights = fs::metadata(&auth).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut rights, 0o644);
    fs::set_permissions(&auth, rights).unwrap();
    let doctor = with_config(&["doctor"]).output().unwrap();
    assert!(
        !doctor.status.success() && text(&doctor.stdout).contains("tpm-auth"),
        "{}",
        text(&doctor.stdout)
    );
}
