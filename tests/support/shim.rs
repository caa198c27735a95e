//! Builds and drives the PKCS#11 shim of `tests/backend/shim` (its README explains the rules).
//!
//! Include it with `#[path = "support/shim.rs"] mod shim;`. Typical use with a daemon:
//! `Command::new(lacre).envs(control.env())` with [`shim_path`] as the configured module.

#![allow(dead_code, reason = "every test program uses another part of it")]

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const FILE_LEN: u64 = 8192;
const NAMES_AT: usize = 4096;
const WORD: usize = 8;
const FIRST_COUNTER: usize = 2;

/// The shim's module file, built at the first call.
///
/// Several test programs may ask at once: cargo locks the target directory, so one of them builds
/// and the others wait and find it done.
pub fn shim_path() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            let target = root.join("target/shim");
            let output = Command::new(env!("CARGO"))
                .args(["build", "--release", "--locked", "--quiet", "--manifest-path"])
                .arg(root.join("tests/backend/shim/Cargo.toml"))
                .arg("--target-dir")
                .arg(&target)
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            target.join("release/liblacre_shim.so")
        })
        .clone()
}

/// The files through which a test drives the shim, in a directory of their own.
pub struct ShimControl {
    module: PathBuf,
    control: PathBuf,
    counts: PathBuf,
    dir: tempfile::TempDir,
}

impl ShimControl {
    /// For a shim over `module`, without rules.
    pub fn new(module: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("lacre-shim-").tempdir().unwrap();
        let counts = dir.path().join("counts");
        OpenOptions::new().write(true).create_new(true).open(&counts).unwrap().set_len(FILE_LEN).unwrap();
        let this = Self { module: module.to_owned(), control: dir.path().join("rules"), counts, dir };
        this.set_rules("");
        this
    }

    /// The environment for the process that loads [`shim_path`].
    pub fn env(&self) -> [(&'static str, &Path); 3] {
        [
            ("LACRE_SHIM_MODULE", &self.module),
            ("LACRE_SHIM_CONTROL", &self.control),
            ("LACRE_SHIM_COUNTS", &self.counts),
        ]
    }

    /// Replaces all rules. They hold from the next call in every process; counting starts anew.
    pub fn set_rules(&self, rules: &str) {
        let fresh = self.dir.path().join("rules.new");
        fs::write(&fresh, rules).unwrap();
        fs::rename(&fresh, &self.control).unwrap();
        // The second word is the generation: the shim reads the rules again when it has changed. Only
        // the test writes it, so this needs no atomic operation.
        let counts = OpenOptions::new().read(true).write(true).open(&self.counts).unwrap();
        let mut word = [0; WORD];
        counts.read_exact_at(&mut word, 8).unwrap();
        counts.write_all_at(&(u64::from_ne_bytes(word) + 1).to_ne_bytes(), 8).unwrap();
    }

    /// Calls so far by function, over all processes, and the shim's own counters (`bad_gcm_params`,
    /// `rules_fired`, `bad_rules`). Empty until a process has loaded the shim.
    ///
    /// # Panics
    /// If the shim did not understand a rule.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        read_counts(&self.counts)
    }

    /// One counter; 0 if it is not there yet.
    pub fn count(&self, name: &str) -> u64 {
        self.counts().get(name).copied().unwrap_or(0)
    }
}

/// [`ShimControl::counts`] for a process that knows only the file.
pub fn read_counts(file: &Path) -> BTreeMap<String, u64> {
    let bytes = fs::read(file).unwrap();
    let names = String::from_utf8(bytes[NAMES_AT..].to_vec()).unwrap();
    let words = bytes.chunks_exact(WORD).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
    let names = names.lines().take_while(|name| !name.is_empty() && !name.starts_with('\0'));
    let counts: BTreeMap<_, _> = names.map(str::to_owned).zip(words.skip(FIRST_COUNTER)).collect();
    assert!(counts.get("bad_rules").is_none_or(|bad| *bad == 0), "the shim refused a rule; see stderr");
    counts
}
