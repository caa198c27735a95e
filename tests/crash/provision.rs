//! The first start is killed (KL-1, RO-5 in small): run again it converges, with no key object that no
//! row knows and no row whose key is not there.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::shim::{ShimControl, shim_path};
use crate::softhsm::SoftHsm;

/// A KEK, two HMAC keys of Lacre's own, a cookie key, and the two halves of the token key.
const OBJECTS: usize = 6;

struct Place {
    token: SoftHsm,
    control: ShimControl,
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let token = SoftHsm::new("lacre-dev");
        let control = ShimControl::new(&token.module);
        let place = Self { token, control, dir: tempfile::tempdir().unwrap() };
        fs::write(place.dir.path().join("pin"), &place.token.pin).unwrap();
        fs::set_permissions(place.dir.path().join("pin"), Permissions::from_mode(0o600)).unwrap();
        place
    }

    fn data(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `lacre init` for the installation of that name, behind `wrapper`.
    fn init(&self, name: &str, wrapper: &[String]) -> Output {
        let (dir, module) = (self.dir.path().display(), shim_path());
        let config = self.dir.path().join(format!("{name}.toml"));
        let text = format!(
            "data_dir = \"{dir}/{name}\"\n[memory]\nallow_unlocked = true\n[seal.pkcs11]\nmodule = \"{}\"\n\
             token = \"lacre-dev\"\npin_source = \"file:{dir}/pin\"\n",
            module.display()
        );
        fs::write(&config, text).unwrap();
        let secret = self.dir.path().join(format!("{name}.secret"));
        let _ = fs::remove_file(&secret);
        let program = env!("CARGO_BIN_EXE_lacre").to_owned();
        let words = [wrapper, &[program][..]].concat();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("init").arg("--config").arg(config).arg("--secret-out").arg(secret);
        command.env("SOFTHSM2_CONF", &self.token.conf).envs(self.control.env()).output().unwrap()
    }

    /// Key objects on the token.
    fn objects(&self) -> usize {
        let mut command = Command::new("pkcs11-tool");
        command.env("SOFTHSM2_CONF", &self.token.conf).arg("--module").arg(&self.token.module);
        command.args(["--token-label", "lacre-dev", "--login", "--pin", &self.token.pin, "--list-objects"]);
        let output = command.output().expect("pkcs11-tool is installed");
        String::from_utf8_lossy(&output.stdout).matches(" Object; ").count()
    }

    /// Run again, it ends well, with its keys and nobody else's.
    fn converges(&self, name: &str, before: usize, what: &str) {
        let again = self.init(name, &[]);
        assert!(again.status.success(), "{what}: {}", String::from_utf8_lossy(&again.stderr));
        assert_eq!(self.objects(), before + OBJECTS, "{what}: key objects on the token");
        let third = self.init(name, &[]);
        assert!(third.status.success(), "{what}: {}", String::from_utf8_lossy(&third.stderr));
        assert_eq!(self.objects(), before + OBJECTS, "{what}: made again");
    }
}

fn strace(data: &Path, when: usize) -> Vec<String> {
    let base = data.join("lacre.db");
    let mut words: Vec<String> =
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync"].map(str::to_owned).to_vec();
    for ending in ["", "-wal"] {
        words.extend(["-P".to_owned(), format!("{}{ending}", base.display())]);
    }
    words.extend(["-e".to_owned(), format!("inject=fsync:signal=SIGKILL:when={when}")]);
    words
}

#[test]
fn a_first_start_that_died_in_the_module_is_finished_by_the_next() {
    let place = Place::new();
    let rules = [
        "C_GenerateKey 1 abort",
        "C_GenerateKey 2 abort",
        "C_GenerateKey 3 abort",
        "C_GenerateKey 4 abort",
        "C_GenerateKeyPair 1 abort",
    ];
    for (number, rule) in rules.into_iter().enumerate() {
        let (name, before) = (format!("abort-{number}"), place.objects());
        place.control.set_rules(rule);
        assert!(!place.init(&name, &[]).status.success(), "{rule} did not happen");
        place.control.set_rules("");
        place.converges(&name, before, rule);
    }
    // Made on the token, and the answer was lost: it must be found again and not be made twice.
    for (number, rule) in
        ["C_GenerateKey 1 return-after:0x30", "C_GenerateKeyPair 1 return-after:0x30"].into_iter().enumerate()
    {
        let (name, before) = (format!("lost-{number}"), place.objects());
        place.control.set_rules(rule);
        let _ = place.init(&name, &[]);
        assert_eq!(place.control.count("rules_fired"), 6 + number as u64, "{rule}");
        place.control.set_rules("");
        place.converges(&name, before, rule);
    }
}

#[test]
fn a_first_start_killed_at_its_commits_is_finished_by_the_next() {
    let place = Place::new();
    let mut killed = 0;
    for when in (1..=22).step_by(3) {
        let (name, before) = (format!("kill-{when}"), place.objects());
        fs::create_dir(place.data(&name)).unwrap();
        let died = !place.init(&name, &strace(&place.data(&name), when)).status.success();
        killed += usize::from(died);
        place.converges(&name, before, &format!("killed at fsync {when}"));
    }
    assert!(killed >= 5, "killed {killed} times only");
}
