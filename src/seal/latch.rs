//! The wrong-PIN latch: one wrong try, then no more, over restarts and over daemons (F5, HS-3).
//!
//! A restart is also a PIN try, and a service manager that restarts a daemon with a wrong PIN locks a
//! real token within seconds. So each login happens under a file lock shared by all daemons that share
//! the directory, a try is recorded before it is made, and a PIN that was wrong once is not sent again:
//! the latch knows it by a keyed hash over token and PIN. Another PIN is another hash and is free to try.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Tries that were begun and never ended (the process died inside the module) before the latch holds.
/// One is forgiven: a power cut at the wrong moment must not need a person.
const UNFINISHED_LIMIT: u32 = 2;

/// Why no login may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// This PIN was wrong on this token.
    WrongPin,
    /// The module did not survive the last tries.
    Unfinished,
}

/// What is kept of one token.
#[derive(Default, Serialize, Deserialize)]
struct State {
    /// HMAC of token and PIN, in hex, of PINs that were wrong.
    wrong: Vec<String>,
    /// Tries begun and not ended.
    unfinished: u32,
}

/// The latch of one directory.
pub(crate) struct Latch {
    dir: PathBuf,
    key: [u8; 32],
}

/// A login in progress: holds the lock. Dropped without an end, the try counts as unfinished.
pub(crate) struct Attempt {
    file: File,
    state: State,
    mac: String,
}

impl Latch {
    /// Opens the directory, making it and its key where they are missing.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let path = dir.join("latch.key");
        let file = private(&path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        let mut key = [0; 32];
        let mut file = file;
        let mut stored = Vec::new();
        file.read_to_end(&mut stored)?;
        if let Ok(found) = <[u8; 32]>::try_from(stored.as_slice()) {
            key = found;
        } else {
            getrandom::fill(&mut key).map_err(|error| io::Error::other(error.to_string()))?;
            rewrite(&mut file, &key)?;
        }
        Ok(Self { dir: dir.to_owned(), key })
    }

    /// Begins a login, or says why none may be tried. Waits for other daemons' logins to end.
    pub(crate) fn begin(&self, token: &str, pin: &[u8]) -> io::Result<Result<Attempt, Held>> {
        let (file, state) = self.load(token)?;
        let mac = self.mac(token, pin);
        if state.wrong.contains(&mac) {
            return Ok(Err(Held::WrongPin));
        }
        if state.unfinished >= UNFINISHED_LIMIT {
            return Ok(Err(Held::Unfinished));
        }
        let mut attempt = Attempt { file, state, mac };
        attempt.state.unfinished += 1;
        attempt.store()?;
        Ok(Ok(attempt))
    }

    /// Forgets unfinished tries; with `force` also the wrong PINs, so that the same PIN is tried again.
    pub(crate) fn clear(&self, token: &str, force: bool) -> io::Result<()> {
        let (mut file, mut state) = self.load(token)?;
        state.unfinished = 0;
        if force {
            state.wrong.clear();
        }
        rewrite(&mut file, &encode(&state)?)
    }

    /// Whether this PIN was wrong on this token, so that it will not be sent.
    pub(crate) fn holds(&self, token: &str, pin: &[u8]) -> io::Result<bool> {
        let (_file, state) = self.load(token)?;
        Ok(state.wrong.contains(&self.mac(token, pin)))
    }

    /// The serial number that the selection `name` meant the first time; recorded now if it is new.
    /// Another token with the same label is noticed by it before a PIN is sent (KL-8).
    pub(crate) fn expected_serial(&self, name: &str, found: &str) -> io::Result<String> {
        let mut file = private(&self.dir.join(format!("{}.serial", digest(name))))?;
        flock(&file, FlockOperation::LockExclusive)?;
        let mut known = String::new();
        file.read_to_string(&mut known)?;
        if known.is_empty() {
            rewrite(&mut file, found.as_bytes())?;
            known.push_str(found);
        }
        Ok(known)
    }

    /// Forgets the recorded serial number of a selection.
    pub(crate) fn forget_serial(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.dir.join(format!("{}.serial", digest(name)))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn load(&self, token: &str) -> io::Result<(File, State)> {
        let mut file = private(&self.dir.join(format!("{}.json", digest(token))))?;
        flock(&file, FlockOperation::LockExclusive)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        if text.is_empty() {
            return Ok((file, State::default()));
        }
        // A damaged latch must hold rather than let tries through.
        let state = serde_json::from_str(&text).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, "the latch file is damaged; remove it to reset")
        })?;
        Ok((file, state))
    }

    fn mac(&self, token: &str, pin: &[u8]) -> String {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(&u64::try_from(token.len()).unwrap_or(u64::MAX).to_be_bytes());
        mac.update(token.as_bytes());
        mac.update(pin);
        hex::encode(mac.finalize().into_bytes())
    }
}

impl Attempt {
    /// The token took the PIN: nothing is held against it.
    pub(crate) fn succeeded(mut self) -> io::Result<()> {
        self.state = State::default();
        self.store()
    }

    /// The token refused the PIN: it is not sent again.
    pub(crate) fn wrong_pin(mut self) -> io::Result<()> {
        self.state.unfinished = 0;
        self.state.wrong.push(std::mem::take(&mut self.mac));
        self.store()
    }

    /// The login failed for a reason that says nothing about the PIN.
    pub(crate) fn undecided(mut self) -> io::Result<()> {
        self.state.unfinished = 0;
        self.store()
    }

    fn store(&mut self) -> io::Result<()> {
        rewrite(&mut self.file, &encode(&self.state)?)
    }
}

fn encode(state: &State) -> io::Result<Vec<u8>> {
    serde_json::to_vec(state).map_err(io::Error::from)
}

fn digest(name: &str) -> String {
    hex::encode(&Sha256::digest(name.as_bytes())[..8])
}

fn private(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// In place and synced, under the lock: a rename would leave other holders with the old file.
fn rewrite(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.rewind()?;
    file.write_all(bytes)?;
    file.set_len(u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::{Held, Latch};

    #[test]
    fn a_wrong_pin_is_held_over_restarts_and_another_one_is_free() {
        let dir = tempfile::tempdir().unwrap();
        Latch::open(dir.path()).unwrap().begin("t", b"0000").unwrap().ok().unwrap().wrong_pin().unwrap();

        let again = Latch::open(dir.path()).unwrap();
        assert_eq!(again.begin("t", b"0000").unwrap().err(), Some(Held::WrongPin));
        assert!(again.begin("other token", b"0000").unwrap().is_ok());
        again.begin("t", b"1111").unwrap().ok().unwrap().succeeded().unwrap();
    }

    #[test]
    fn a_process_that_dies_inside_the_login_twice_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let latch = Latch::open(dir.path()).unwrap();
        drop(latch.begin("t", b"1").unwrap().ok().unwrap());
        drop(latch.begin("t", b"1").unwrap().ok().unwrap());
        assert_eq!(latch.begin("t", b"1").unwrap().err(), Some(Held::Unfinished));

        latch.clear("t", false).unwrap();
        assert!(latch.begin("t", b"1").unwrap().is_ok());
    }

    #[test]
    fn only_force_lets_the_same_pin_be_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let latch = Latch::open(dir.path()).unwrap();
        latch.begin("t", b"1").unwrap().ok().unwrap().wrong_pin().unwrap();
        latch.clear("t", false).unwrap();
        assert!(latch.begin("t", b"1").unwrap().is_err());
        latch.clear("t", true).unwrap();
        assert!(latch.begin("t", b"1").unwrap().is_ok());
    }

    #[test]
    fn a_damaged_latch_holds() {
        let dir = tempfile::tempdir().unwrap();
        let latch = Latch::open(dir.path()).unwrap();
        drop(latch.begin("t", b"1").unwrap().ok());
        let file = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let file = file.into_iter().find(|path| path.extension().is_some_and(|ext| ext == "json")).unwrap();
        std::fs::write(file, "{").unwrap();
        assert!(latch.begin("t", b"1").is_err());
    }
}
