//! The TPM 2.0 device: the same promises as a PKCS#11 token, kept with what a TPM has.
//!
//! A KEK is a storage primary whose template carries the key's id, so each KEK is another key and none is
//! stored; a DEK is a sealed child of it, with SHA-256 of the context sealed beside it. Signing and MAC
//! keys are children of one root and kept as blobs inside their `KeyRef`. Nothing in the chain counts
//! for the dictionary attack protection (`noDA`): a power cut would cost a try otherwise (reliability.md,
//! F6). Every secret crosses the bus in a session that is salted to the root, whose name is recorded at
//! the first start: another TPM, a cleared one or somebody in between is noticed by it and stops the device.
//!
//! `link` is the connection: sessions, object slots, retries; `template` what keys look like and the rules
//! they must keep; `keys` the [`Backend`]; `selftest` what the chip must pass before it is ready; `report` what
//! it can do; `error` what response codes mean.
//! Not here: recovery and deadlines, which are those of every device.

mod counter;
mod error;
mod keys;
mod link;
mod policy;
mod report;
mod salt;
mod scrub;
mod selftest;
mod sign;
mod template;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use crate::seal::StartError;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::driver::{Count, Driver, Known, Problem};
use crate::seal::guarded::{Arena, SecretBuf};
use crate::seal::key::KeyId;
use crate::seal::latch::Latch;
use crate::seal::pin::PinSource;

use keys::Session;
use link::Link;
use policy::{SealedSecret, Secret};

/// How long a key that was found bad is believed to be so at the first word.
const BAD: Duration = Duration::from_secs(60);
/// How long a call waits for another one that is at the TPM.
const TURN: Duration = Duration::from_secs(3);

/// `[seal.tpm]`.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the TPM is, as the TCTI of tpm2-tss: `device:/dev/tpmrm0`, `swtpm:host=127.0.0.1,port=2321`,
    /// `tabrmd:...`.
    #[serde(default = "default_tcti")]
    pub tcti: String,
    /// The secret that every key's authorisation value is made of: `file:/path`, `credential:NAME`, or
    /// `sealed:/path` of a file that `lacre hsm seal-auth` has made. Without it no key of this installation can
    /// be used, so keep a copy.
    pub auth_source: String,
    /// The owner hierarchy's authorisation, where one is set; in the same form.
    #[serde(default)]
    pub owner_auth_source: Option<String>,
    /// systemd's `$CREDENTIALS_DIRECTORY`; filled by the configuration's reader, not by the file.
    #[serde(skip)]
    pub credentials_dir: Option<PathBuf>,
}

impl Config {
    /// Whether it is a simulator, which is reached over TCP.
    pub(crate) fn is_simulated(&self) -> bool {
        ["swtpm", "mssim"].iter().any(|kind| self.tcti.starts_with(kind))
    }
}

fn default_tcti() -> String {
    "device:/dev/tpmrm0".to_owned()
}

/// Checks the configuration. Opens no connection and reads no secret.
pub(crate) fn load(config: &Config, latch: Latch, arena: &Arena) -> Result<Box<dyn Driver>, StartError> {
    Ok(Box::new(Module(Arc::new(Tpm::new(config, latch, arena)?))))
}

/// Seals the secret that `auth_source` gives now under the present values of `pcrs`, with the holder of the
/// key in `authority` (PEM, P-256) as the one who may approve other values. The text is for a file that
/// `auth_source = "sealed:..."` names.
///
/// # Errors
/// A text for the operator.
pub fn seal_auth(
    config: &crate::seal::DeviceConfig,
    arena: &Arena,
    pcrs: &[u8],
    authority: &str,
) -> Result<String, String> {
    let tpm = alone(config, arena)?;
    let sealed = tpm.with_link(|link| {
        let secret = tpm.auth.read(&tpm, link)?;
        policy::seal(link, &secret, pcrs, authority)
    });
    drop(tpm.take_down());
    sealed.map_err(|error| error.to_string())
}

/// The digest that an approval of the present values of `pcrs` signs.
///
/// # Errors
/// A text for the operator.
pub fn pcr_digest(config: &crate::seal::DeviceConfig, arena: &Arena, pcrs: &[u8]) -> Result<Vec<u8>, String> {
    let tpm = alone(config, arena)?;
    let place = tpm.place();
    // Without the secret: it is sealed, and does not open now.
    let digest = Link::open(&tpm).and_then(|mut link| {
        let digest = policy::present(&mut link, pcrs);
        link.close();
        digest
    });
    drop(place);
    digest.map_err(|error| error.to_string())
}

/// The TPM of the configuration, for one command of an operator.
fn alone(config: &crate::seal::DeviceConfig, arena: &Arena) -> Result<Tpm, String> {
    let section = config.tpm.as_ref().ok_or("the configuration has no [seal.tpm]")?;
    let latch_dir = config.latch_dir.clone().unwrap_or_else(|| PathBuf::from("latch"));
    let latch = Latch::open(&latch_dir).map_err(|error| format!("{}: {error}", latch_dir.display()))?;
    Tpm::new(section, latch, arena).map_err(|error| error.to_string())
}

/// The connection, or nothing while the TPM is away.
type Place = Arc<Mutex<Option<Link>>>;

/// One TPM.
pub(crate) struct Tpm {
    tcti: tss_esapi::tcti_ldr::TctiNameConf,
    address: String,
    auth: Secret,
    owner_auth: Option<PinSource>,
    arena: Arena,
    latch: Latch,
    /// Replaced as a whole when a call hangs in it: the thread that hangs keeps the old one.
    place: Mutex<Place>,
    known: Mutex<Known>,
    /// Keys that were found bad, and when.
    bad: Mutex<HashMap<KeyId, Instant>>,
    epoch: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tpm {
    fn new(config: &Config, latch: Latch, arena: &Arena) -> Result<Self, StartError> {
        let selection = |reason: &str| StartError::Selection(reason.to_owned());
        let tcti = config.tcti.parse().map_err(|_| {
            selection("`tcti` of [seal.tpm] is none that tpm2-tss knows (device:, swtpm:, mssim:, tabrmd:)")
        })?;
        if config.auth_source == "prompt" {
            return Err(selection("`auth_source` must be file:/path, credential:NAME or sealed:/path"));
        }
        let source = |text: &str| PinSource::parse(text, config.credentials_dir.as_deref(), arena);
        Ok(Self {
            tcti,
            address: config.tcti.clone(),
            auth: match config.auth_source.strip_prefix("sealed:") {
                Some(path) => Secret::Sealed(SealedSecret::at(path.as_ref())),
                None => Secret::Plain(source(&config.auth_source)?),
            },
            owner_auth: config.owner_auth_source.as_deref().map(source).transpose()?,
            arena: arena.clone(),
            latch,
            place: Mutex::default(),
            known: Mutex::default(),
            bad: Mutex::default(),
            epoch: AtomicU64::new(1),
        })
    }

    fn place(&self) -> Place {
        Arc::clone(&lock(&self.place))
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn bump_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// A guarded buffer for a worker thread, without waiting.
    fn buffer(&self, len: usize) -> Result<SecretBuf, BackendError> {
        self.arena.try_take(len).map_err(|_| BackendError::Refused { function: "guarded memory", code: 0 })
    }

    /// One call with the connection. One at a time: a TPM does nothing in parallel.
    fn with_link<T>(
        &self,
        call: impl FnOnce(&mut Link) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let place = self.place();
        let mut link = turn(&place).ok_or(BackendError::Away { function: "another call", code: 0 })?;
        let current = link.as_ref().is_some_and(|link| link.since == self.epoch());
        if !current {
            // Flushes what it has before the next one is opened: a TPM has three slots.
            drop(link.take());
            *link = Some(self.connect()?);
        }
        let Some(open) = link.as_mut() else {
            return Err(BackendError::Away { function: "connect", code: 0 });
        };
        let result = call(open);
        if matches!(
            result,
            Err(BackendError::Away { .. } | BackendError::SessionLost { .. } | BackendError::Unknown { .. })
        ) {
            // Whatever is left of an answer must not be taken for that of the next command.
            drop(link.take());
        }
        result
    }

    /// Whether the TPM has said twice, a moment ago, that there is something wrong with the key.
    fn is_known_bad(&self, key: KeyId) -> bool {
        lock(&self.bad).get(&key).is_some_and(|since| since.elapsed() < BAD)
    }

    fn note_bad(&self, key: KeyId) {
        let mut bad = lock(&self.bad);
        bad.retain(|_, since| since.elapsed() < BAD);
        bad.insert(key, Instant::now());
    }

    /// Ends the connection; the next call opens another one.
    fn hang_up(&self) {
        let place = self.place();
        if let Some(mut link) = turn(&place) {
            drop(link.take());
        }
    }

    /// Opens a connection, makes the root and compares it with the one that was known.
    fn connect(&self) -> Result<Link, BackendError> {
        let mut link = Link::open(self)?;
        let name = hex::encode(link.root_name()?);
        let selection = format!("tpm {}", self.address);
        let latch = |error: std::io::Error| {
            BackendError::Stopped(format!("the record of the TPM's identity cannot be used: {error}"))
        };
        let expected = self.latch.expected_serial(&selection, &name).map_err(latch)?;
        if expected != name {
            return Err(BackendError::Stopped(format!(
                "tpm_cleared: the TPM at {} has the root {}, and {} was known. It was cleared, or it is \
                 another TPM: keys made before are lost with it, and nothing is made in their place. See \
                 docs/operations/tpm.md",
                self.address,
                short(&name),
                short(&expected)
            )));
        }
        link.unlock(self)?;
        let library = link.description()?;
        {
            let mut known = lock(&self.known);
            known.library = library;
            known.label.clone_from(&self.address);
            short(&name).clone_into(&mut known.serial);
        }
        self.look_at_lockout(&mut link)?;
        Ok(link)
    }

    /// Takes note of the dictionary attack protection. Reads properties, makes no try.
    fn look_at_lockout(&self, link: &mut Link) -> Result<(), BackendError> {
        let notice = link.lockout()?.notice();
        let mut known = lock(&self.known);
        if known.notice.is_some() != notice.is_some() {
            match &notice {
                Some(notice) => tracing::warn!(notice, "the TPM counts failed tries"),
                None => tracing::info!("the TPM counts no failed tries any more"),
            }
        }
        known.notice = notice;
        Ok(())
    }

    fn bring_up(&self) -> Result<(), Problem> {
        self.with_link(selftest::run).map_err(|error| match error {
            BackendError::Stopped(reason) => Problem::Stopped(reason),
            other => Problem::Away(format!("TPM at {}: {other}", self.address)),
        })
    }

    /// An orderly end: what is loaded is flushed, and the TPM is told that its power may go.
    fn take_down(&self) -> Result<(), Problem> {
        let place = self.place();
        let mut link = turn(&place).ok_or_else(|| Problem::Away("a call hangs at the TPM".to_owned()))?;
        self.bump_epoch();
        if let Some(link) = link.take() {
            link.close();
        }
        Ok(())
    }

    fn secret(&self, source: &PinSource) -> Result<SecretBuf, BackendError> {
        source.read(&self.arena).map_err(|error| BackendError::Stopped(error.to_string()))
    }
}

/// The first half of a name is enough to tell TPMs apart.
fn short(name: &str) -> &str {
    // Four digits of the hash algorithm come first.
    name.get(4..36).unwrap_or(name)
}

/// Waits for a bounded time.
fn turn(place: &Place) -> Option<MutexGuard<'_, Option<Link>>> {
    let until = Instant::now() + TURN;
    loop {
        match place.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(Duration::from_micros(200));
            }
            Err(TryLockError::WouldBlock) => return None,
        }
    }
}

/// A TPM as a driver.
struct Module(Arc<Tpm>);

impl Driver for Module {
    fn open(&self, _read_write: bool) -> Result<Box<dyn Backend>, BackendError> {
        self.0.with_link(|_| Ok(()))?;
        Ok(Box::new(Session::new(Arc::clone(&self.0))))
    }

    fn bring_up(&self) -> Result<(), Problem> {
        self.0.bring_up()
    }

    fn reinitialise(&self) -> Result<(), Problem> {
        if self.0.take_down().is_err() {
            // Its thread keeps the connection that hangs, and ends it when the call returns.
            *lock(&self.0.place) = Place::default();
        }
        self.0.bring_up()
    }

    fn take_down(&self) -> Result<(), Problem> {
        self.0.take_down()
    }

    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    fn bump_epoch(&self) {
        self.0.bump_epoch();
    }

    fn known(&self) -> Known {
        lock(&self.0.known).clone()
    }

    fn address(&self) -> String {
        self.0.address.clone()
    }

    fn unlatch(&self, force: bool) -> Result<bool, String> {
        if force {
            // A new TPM in the place of one that is gone, on an operator's word.
            let selection = format!("tpm {}", self.0.address);
            self.0.latch.forget_serial(&selection).map_err(|error| error.to_string())?;
        }
        self.0.bring_up().map(|()| true).map_err(|(Problem::Away(reason) | Problem::Stopped(reason))| reason)
    }

    fn capabilities(&self) -> Result<serde_json::Value, BackendError> {
        report::capabilities(&self.0)
    }

    fn count(&self, count: Count) -> Result<Option<u64>, BackendError> {
        self.0.with_link(|link| counter::count(link, count))
    }
}
