//! A wrong PIN is tried once: across restarts, and across daemons that share the token (HS-3, F5).

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::shim::{ShimControl, shim_path};
use crate::softhsm::SoftHsm;

const DAEMONS: usize = 3;
const RESTARTS: usize = 20;

/// Three installations on one token, with one latch and one PIN file.
struct Host {
    token: SoftHsm,
    control: ShimControl,
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let token = SoftHsm::new("lacre-dev");
        let control = ShimControl::new(&token.module);
        let host = Self { token, control, dir: tempfile::tempdir().unwrap() };
        host.set_pin(&host.token.pin);
        for number in 0..DAEMONS {
            fs::write(host.config(number), host.text(number)).unwrap();
            let output = host.run(number, &["init", "--secret-out", &format!("secret-{number}")]);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        host
    }

    fn text(&self, number: usize) -> String {
        let (dir, module) = (self.dir.path().display(), shim_path());
        format!(
            "data_dir = \"{dir}/data-{number}\"\n[server]\nlisten = \"127.0.0.1:0\"\n[memory]\nallow_unlocked = true\n\
             [seal]\nlatch_dir = \"{dir}/latch\"\n[seal.pkcs11]\nmodule = \"{}\"\ntoken = \"lacre-dev\"\n\
             pin_source = \"file:{dir}/pin\"\n",
            module.display()
        )
    }

    fn config(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("{number}.toml"))
    }

    fn set_pin(&self, pin: &str) {
        let path = self.dir.path().join("pin");
        fs::write(&path, pin).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }

    fn command(&self, number: usize, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
        command.args(args).arg("--config").arg(self.config(number)).current_dir(self.dir.path());
        command.env("SOFTHSM2_CONF", &self.token.conf).envs(self.control.env());
        command
    }

    fn run(&self, number: usize, args: &[&str]) -> Output {
        self.command(number, args).output().unwrap()
    }

    fn logins(&self) -> u64 {
        self.control.count("C_Login")
    }

    /// Starts a daemon with its output in a file of its own.
    fn serve(&self, number: usize) -> (Child, PathBuf) {
        let log = self.dir.path().join(format!("log-{number}"));
        let file = File::create(&log).unwrap();
        let mut command = self.command(number, &["serve"]);
        command.stdout(file.try_clone().unwrap()).stderr(file).stdin(Stdio::null());
        (command.spawn().unwrap(), log)
    }
}

/// Waits until the daemon has printed `text`.
fn said(log: &PathBuf, text: &str) {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let now = fs::read_to_string(log).unwrap();
        if now.contains(text) {
            return;
        }
        assert!(Instant::now() < until, "not said: {text:?}\n{now}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn end(mut daemons: Vec<(Child, PathBuf)>) {
    for (child, _) in &mut daemons {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn sixty_starts_of_three_daemons_try_a_wrong_pin_once() {
    let host = Host::new();
    let before = host.logins();

    host.set_pin("not-the-pin");
    for _ in 0..RESTARTS {
        let daemons: Vec<_> = (0..DAEMONS).map(|number| host.serve(number)).collect();
        for (_, log) in &daemons {
            // It stays up: an end would only make a supervisor start it again.
            said(log, "PIN");
        }
        end(daemons);
    }
    assert_eq!(host.logins(), before + 1, "tries of one wrong PIN");

    let doctor = host.run(0, &["doctor"]);
    assert_eq!(doctor.status.code(), Some(1));
    let refused = host.run(0, &["hsm", "unlatch"]);
    assert_ne!(refused.status.code(), Some(0), "unlatched for the same wrong PIN");
    assert_eq!(host.logins(), before + 1, "tries of one wrong PIN");

    host.set_pin(&host.token.pin);
    let (child, log) = host.serve(0);
    said(&log, "lacre ready");
    assert_eq!(host.logins(), before + 2);
    end(vec![(child, log)]);
}

#[test]
fn only_force_sends_a_wrong_pin_once_more() {
    let host = Host::new();
    host.set_pin("not-the-pin");
    let refused_once = host.run(0, &["doctor"]);
    assert_eq!(refused_once.status.code(), Some(1));
    let before = host.logins();

    let forced = host.run(0, &["hsm", "unlatch", "--force"]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    assert_eq!(host.logins(), before, "a login by the command itself");
    for _ in 0..2 {
        let (child, log) = host.serve(0);
        said(&log, "PIN");
        end(vec![(child, log)]);
    }
    assert_eq!(host.logins(), before + 1, "tries after one --force");
}

#[test]
fn a_pin_is_tried_by_a_running_daemon_as_soon_as_it_is_another_one() {
    let host = Host::new();
    let before = host.logins();
    host.set_pin("not-the-pin");
    let (child, log) = host.serve(0);
    said(&log, "PIN");
    // Longer than its looks at the file: the wrong one must not be tried again meanwhile.
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(host.logins(), before + 1);

    host.set_pin(&host.token.pin);
    said(&log, "lacre ready");

    assert_eq!(host.logins(), before + 2);
    end(vec![(child, log)]);
}

#[test]
fn a_token_that_is_about_to_lock_is_not_asked() {
    let host = Host::new();
    // CKF_USER_PIN_FINAL_TRY and CKF_USER_PIN_LOCKED (PKCS#11, section 3.2).
    for (flags, reason) in [("0x20000", "one more wrong PIN locks it"), ("0x40000", "the PIN is locked")] {
        host.control.set_rules(&format!("C_GetTokenInfo * flags:{flags}"));
        let before = host.logins();
        let (child, log) = host.serve(0);
        said(&log, reason);
        assert_eq!(host.logins(), before, "a login with flags {flags}");
        end(vec![(child, log)]);
    }
}

#[test]
fn a_login_that_is_refused_for_its_own_reason_says_which_and_is_not_repeated() {
    let host = Host::new();
    // CKR_PIN_LOCKED, CKR_PIN_EXPIRED, CKR_USER_PIN_NOT_INITIALIZED, CKR_PIN_LEN_RANGE.
    for (code, reason) in [
        ("0xA4", "the PIN is locked"),
        ("0xA3", "the PIN has expired"),
        ("0x102", "has no user PIN"),
        ("0xA2", "does not accept a PIN of this form"),
    ] {
        host.control.set_rules(&format!("C_Login * return:{code}"));
        let before = host.logins();
        for said_now in [reason, "not sent again"] {
            let (child, log) = host.serve(0);
            said(&log, said_now);
            end(vec![(child, log)]);
        }
        assert_eq!(host.logins(), before + 1, "{code}");
        assert!(host.run(0, &["hsm", "unlatch", "--force"]).status.success());
    }
    host.control.set_rules("");
    let (child, log) = host.serve(0);
    said(&log, "lacre ready");
    end(vec![(child, log)]);
}

/// The process id of a daemon's sealer process.
fn sealer_of(daemon: &Child) -> Option<u32> {
    let children = format!("/proc/{0}/task/*/children", daemon.id());
    let listed = Command::new("sh").args(["-c", &format!("cat {children}")]).output().unwrap();
    String::from_utf8_lossy(&listed.stdout).split_whitespace().next().and_then(|pid| pid.parse().ok())
}

#[test]
fn a_sealer_process_that_is_killed_again_and_again_tries_a_wrong_pin_once() {
    let host = Host::new();
    let before = host.logins();
    host.set_pin("not-the-pin");
    let (child, log) = host.serve(0);
    said(&log, "PIN");
    let mut killed = Vec::new();
    let until = Instant::now() + Duration::from_secs(30);
    while killed.len() < 4 {
        assert!(Instant::now() < until, "killed {} times only", killed.len());
        if let Some(pid) = sealer_of(&child).filter(|pid| !killed.contains(pid)) {
            // Long enough for a login, had there been one.
            std::thread::sleep(Duration::from_millis(500));
            assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
            killed.push(pid);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(host.logins(), before + 1, "tries of one wrong PIN");
    end(vec![(child, log)]);
}

#[test]
fn a_module_that_dies_in_the_login_is_given_two_tries_and_a_person_may_give_it_more() {
    let host = Host::new();
    let before = host.logins();
    host.control.set_rules("C_Login * abort");
    let (child, log) = host.serve(0);
    said(&log, "somebody has to act");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(host.logins(), before + 2, "logins that the module did not survive");

    host.control.set_rules("");
    let cleared = host.run(0, &["hsm", "unlatch"]);
    assert!(cleared.status.success(), "{}", String::from_utf8_lossy(&cleared.stderr));
    said(&log, "lacre ready");
    assert_eq!(host.logins(), before + 3);
    end(vec![(child, log)]);
}
