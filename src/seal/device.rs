//! A device as the daemon sees it: started once, watched, closed.

use std::path::PathBuf;
use std::time::Duration;

use crate::seal::guarded::Arena;
use crate::seal::{KeyAdmin, SealError, Sealer, pkcs11};

/// How the device is driven (`[seal]` in the configuration).
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The PKCS#11 module and token.
    pub pkcs11: pkcs11::Config,
    /// Where the wrong-PIN latch is kept; daemons of one host that share a token should share it.
    /// Default: `latch` in the data directory.
    #[serde(default)]
    pub latch_dir: Option<PathBuf>,
    /// Threads for EC, AES and HMAC. 1 for tokens in software, 4 to 16 for a network HSM.
    #[serde(default = "one")]
    pub fast_threads: usize,
    /// Threads for RSA; default: the number of cores.
    #[serde(default)]
    pub slow_threads: Option<usize>,
    /// Jobs that may wait in one lane.
    #[serde(default = "queue_default")]
    pub queue: usize,
    /// How long one request may take, queue included.
    #[serde(default = "deadline_default", with = "crate::config::seconds")]
    pub deadline: Duration,
}

fn one() -> usize {
    1
}

fn queue_default() -> usize {
    1024
}

fn deadline_default() -> Duration {
    Duration::from_secs(2)
}

/// How the device is, in one word and one sentence.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum DeviceState {
    /// Logged in and answering.
    Ready,
    /// Not answering; recovery is under way.
    Away(String),
    /// Needs a person: wrong PIN, wrong token. No further login is tried.
    Stopped(String),
}

/// The device's status for `lacre status`, `/readyz` and metrics.
#[derive(Clone, Debug, serde::Serialize)]
pub struct DeviceStatus {
    /// How it is.
    #[serde(flatten)]
    pub state: DeviceState,
    /// The module's path.
    pub module: String,
    /// The module's own description.
    pub library: String,
    /// The token's label.
    pub token_label: String,
    /// The token's serial number.
    pub token_serial: String,
    /// Changes whenever handles were dropped in a recovery.
    pub epoch: u64,
    /// Jobs waiting, per lane (fast, slow, admin).
    pub queued: [usize; 3],
    /// Threads stuck in the module now.
    pub stuck_threads: usize,
}

/// Why a device could not be started at all. What heals by itself (token away) is not an error here.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The module cannot be loaded or is not a PKCS#11 module.
    #[error("PKCS#11 module {path}: {reason}")]
    Module {
        /// Its path.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The PIN cannot be read (not: is wrong).
    #[error("PIN from {origin}: {reason}")]
    Pin {
        /// Where it was looked for.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// The configuration names no token, or a `pkcs11:` URI that does not parse.
    #[error("token selection: {0}")]
    Selection(String),
    /// The latch directory cannot be used.
    #[error("latch directory {path}: {reason}")]
    Latch {
        /// Its path.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// A started device.
pub struct Device {
    /// Uses keys.
    pub sealer: Sealer,
    /// Makes and destroys keys.
    pub admin: KeyAdmin,
}

/// Loads the module, starts the lanes and tries to bring the device up. Returns with the device up,
/// or with the reason in [`Device::status`] while recovery goes on in the background.
///
/// # Errors
/// [`StartError`] for what no waiting heals.
pub fn start(config: &Config, arena: &Arena) -> Result<Device, StartError> {
    todo!()
}

impl Device {
    /// The present status; never waits for the device.
    pub fn status(&self) -> DeviceStatus {
        todo!()
    }

    /// What the token can do, measured: for `lacre doctor`.
    ///
    /// # Errors
    /// If the device does not answer.
    pub async fn capabilities(&self) -> Result<serde_json::Value, SealError> {
        todo!()
    }

    /// Allows login again after a wrong PIN was replaced. `force` also for the same PIN.
    ///
    /// # Errors
    /// If the latch cannot be written.
    pub fn unlatch(&self, force: bool) -> std::io::Result<()> {
        todo!()
    }

    /// Finishes queued work, logs out and finalises the module.
    pub fn close(&self) {
        todo!()
    }
}
