//! A SoftHSM token of one's own, in a temporary directory.
//!
//! Include it with `#[path = "support/softhsm.rs"] mod softhsm;`. Nothing outside the directory is
//! touched. [`SoftHsm::new`] sets nothing global: give [`SoftHsm::env`] to a child process. To load
//! the module in the test process itself use [`SoftHsm::in_process`].

#![expect(unsafe_code, reason = "the environment of the test process is set once")]
#![allow(dead_code, reason = "every test program uses another part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where the module may be: Debian, then what others install.
const MODULES: [&str; 5] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
];

/// A SoftHSM configuration with one token in it.
pub struct SoftHsm {
    /// The directory of everything below.
    pub dir: PathBuf,
    /// The configuration file, for `SOFTHSM2_CONF`.
    pub conf: PathBuf,
    /// The PKCS#11 module.
    pub module: PathBuf,
    /// The token's label.
    pub label: String,
    /// The token's serial number.
    pub serial: String,
    /// A file of mode 0600 with the user PIN.
    pub pin_file: PathBuf,
    /// The user PIN.
    pub pin: String,
    // Removes the directory when the value goes; None for a directory that others will remove.
    _guard: Option<tempfile::TempDir>,
}

impl SoftHsm {
    /// Makes a token in a fresh directory, which goes with the value.
    pub fn new(label: &str) -> Self {
        let guard = tempfile::Builder::new().prefix("lacre-softhsm-").tempdir().unwrap();
        Self::make(guard.path().to_owned(), Some(guard), label)
    }

    /// The one token of this test process: made at the first call, whose label it gets.
    ///
    /// SoftHSM reads `SOFTHSM2_CONF` at every `C_Initialize`, so the environment of this process is
    /// set here, once. Call it before anything else in every test of the program: setting a variable
    /// is only sound while no other thread reads the environment, and every test that needs the
    /// variable waits here until it is set.
    pub fn in_process(label: &str) -> &'static Self {
        static TOKEN: OnceLock<SoftHsm> = OnceLock::new();
        TOKEN.get_or_init(|| {
            // A static is never dropped: the directory is named by the process and the next run removes it.
            let dir = process_dir();
            let token = Self::make(dir, None, label);
            // SAFETY: see above; the tests of such a program start here.
            unsafe { std::env::set_var("SOFTHSM2_CONF", &token.conf) };
            token
        })
    }

    fn make(dir: PathBuf, guard: Option<tempfile::TempDir>, label: &str) -> Self {
        let tokens = dir.join("tokens");
        fs::create_dir_all(&tokens).unwrap();
        let conf = dir.join("softhsm2.conf");
        let lines = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            tokens.display()
        );
        fs::write(&conf, lines).unwrap();
        let pin = random_digits();
        let pin_file = dir.join("pin");
        write_private(&pin_file, &pin);
        let mut token = Self {
            module: module(),
            label: label.to_owned(),
            serial: String::new(),
            dir,
            conf,
            pin_file,
            pin,
            _guard: guard,
        };
        token.serial = token.add_token(label);
        token
    }

    /// Makes another token under the same configuration and PIN; gives its serial number.
    pub fn add_token(&self, label: &str) -> String {
        self.util(&[
            "--init-token",
            "--free",
            "--label",
            label,
            "--pin",
            &self.pin,
            "--so-pin",
            &random_digits(),
        ]);
        let slots = self.util(&["--show-slots"]);
        serial_of(&slots, label).unwrap_or_else(|| panic!("no token {label} in:\n{slots}"))
    }

    /// The environment that a child process needs to see this token.
    pub fn env(&self) -> (&'static str, &Path) {
        ("SOFTHSM2_CONF", &self.conf)
    }

    /// Runs `softhsm2-util`; its standard output.
    pub fn util(&self, args: &[&str]) -> String {
        let (name, conf) = self.env();
        let output = Command::new("softhsm2-util")
            .args(args)
            .env(name, conf)
            .output()
            .expect("softhsm2-util is installed (apt-get install softhsm2)");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "softhsm2-util {}: {error}", args[0]);
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The module's path, `SOFTHSM2_MODULE` first.
pub fn module() -> PathBuf {
    let chosen = std::env::var_os("SOFTHSM2_MODULE").map(PathBuf::from);
    chosen
        .or_else(|| MODULES.iter().map(PathBuf::from).find(|path| path.exists()))
        .expect("SoftHSM is installed (apt-get install softhsm2), or SOFTHSM2_MODULE says where")
}

/// A directory of this process, and none of processes that are gone.
fn process_dir() -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("softhsm-"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let dir = root.join(format!("softhsm-{}", std::process::id()));
    // Left by an earlier process of the same number.
    let _ = fs::remove_dir_all(&dir);
    dir
}

/// Serial numbers of the slots listing: `Serial number` comes before `Label` in each slot.
fn serial_of(slots: &str, label: &str) -> Option<String> {
    let mut serial = None;
    for line in slots.lines() {
        match line.split_once(':').map(|(name, value)| (name.trim(), value.trim())) {
            Some(("Serial number", value)) => serial = Some(value.to_owned()),
            Some(("Label", value)) if value == label => return serial,
            _ => {}
        }
    }
    None
}

fn random_digits() -> String {
    let mut bytes = [0; 12];
    getrandom::fill(&mut bytes).unwrap();
    bytes.iter().map(|byte| char::from(b'0' + byte % 10)).collect()
}

fn write_private(path: &Path, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}
