//! A device as the daemon sees it: started once, watched, closed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::seal::child::{Client, Supervisor};
use crate::seal::devices::{DeviceName, Routes};
use crate::seal::driver::Driver;
use crate::seal::guarded::{self, Arena};
use crate::seal::latch::Latch;
use crate::seal::recovery::{self, Watch};
use crate::seal::worker::{Lanes, Sizes};
use crate::seal::{KeyAdmin, SealError, Sealer, Way};
use crate::seal::{pkcs11, tpm};

/// How the device is driven (`[seal]` in the configuration).
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The PKCS#11 module and token.
    #[serde(default)]
    pub pkcs11: Option<pkcs11::Config>,
    /// The TPM; one of both.
    #[serde(default)]
    pub tpm: Option<tpm::Config>,
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
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum DeviceState {
    /// Logged in and answering.
    Ready,
    /// Not answering; recovery is under way.
    Away(String),
    /// Needs a person: wrong PIN, wrong token. No further login is tried.
    Stopped(String),
}

impl Default for DeviceState {
    fn default() -> Self {
        Self::Away("not started".to_owned())
    }
}

/// The process that drives the device.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SealerStatus {
    /// Its process id.
    pub pid: u32,
    /// How often another one had to be started.
    pub restarts: u64,
    /// Its guarded memory.
    pub memory: guarded::Status,
}

/// The device's status for `lacre status`, `/readyz` and metrics.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct DeviceStatus {
    /// Its name in the configuration.
    pub name: DeviceName,
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
    /// What somebody should know although the device works, such as a TPM that counts failed tries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
    /// Changes whenever handles were dropped in a recovery.
    pub epoch: u64,
    /// Jobs waiting, per lane (fast, slow, admin).
    pub queued: [usize; 3],
    /// Threads stuck in the module now.
    pub stuck_threads: usize,
    /// Calls since the start that met a key which is missing or unfit for use.
    pub key_failures: u64,
    /// The process that drives the device, where that is not this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealer: Option<SealerStatus>,
    /// Evidence of the keys' custody that is done without, as configured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_evidence: Vec<String>,
}

/// Why a device could not be started at all. What heals by itself (token away) is not an error here.
#[derive(Debug, thiserror::Error, serde::Serialize, serde::Deserialize)]
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
    /// The operating system gives no threads.
    #[error("no threads for the device: {reason}")]
    Threads {
        /// What it said.
        reason: String,
    },
    /// The process that is to drive the device cannot be started.
    #[error("sealer process: {reason}")]
    Sealer {
        /// What is wrong.
        reason: String,
    },
    /// The latch directory cannot be used.
    #[error("latch directory {path}: {reason}")]
    Latch {
        /// Its path.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// Why [`unlatch`] did not allow logins.
#[derive(Debug, thiserror::Error)]
pub enum UnlatchError {
    /// The configuration or the library.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The token is not there, or the latch cannot be written.
    #[error("{0}")]
    Token(String),
}

/// A started device.
pub struct Device {
    /// Uses keys on this device.
    pub sealer: Sealer,
    /// Makes and destroys keys on this device.
    pub admin: KeyAdmin,
    name: DeviceName,
    driven: Driven,
}

/// Where it is driven.
enum Driven {
    /// In threads of this process.
    Here { lanes: Arc<Lanes>, watch: Watch, address: String, without_evidence: Vec<String> },
    /// In the sealer process.
    There { client: Arc<Client>, supervisor: Supervisor },
}

/// Loads the module, starts the lanes and tries to bring the device up. Returns with the device up,
/// or with the reason in [`Device::status`] while recovery goes on in the background.
///
/// # Errors
/// [`StartError`] for what no waiting heals.
pub fn start(config: &Config, arena: &Arena) -> Result<Device, StartError> {
    start_named(DeviceName::default(), config, arena, &pkcs11::Modules::default())
}

/// [`start`] for one of several, which share their `modules`.
pub(crate) fn start_named(
    name: DeviceName,
    config: &Config,
    arena: &Arena,
    modules: &pkcs11::Modules,
) -> Result<Device, StartError> {
    let driver = driver(config, arena, modules)?;
    let address = driver.address();
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let sizes = Sizes {
        fast: config.fast_threads,
        slow: config.slow_threads.unwrap_or(cores),
        queue: config.queue,
        deadline: config.deadline,
    };
    let threads = |error: std::io::Error| StartError::Threads { reason: error.to_string() };
    let lanes = Lanes::start(name.clone(), driver, arena.clone(), &sizes).map_err(threads)?;
    recovery::first_round(&lanes);
    let watch = Watch::start(&lanes).map_err(threads)?;
    let way = Way::Lanes(Arc::clone(&lanes));
    let routes = Routes::new(vec![(name.clone(), way)], arena);
    Ok(Device {
        sealer: Sealer::new(routes.clone(), arena.clone()),
        admin: KeyAdmin::new(routes, arena.clone()),
        name,
        driven: Driven::Here { lanes, watch, address, without_evidence: without_evidence(config) },
    })
}

/// Evidence of the keys' custody that the configuration does without.
fn without_evidence(config: &Config) -> Vec<String> {
    config.pkcs11.as_ref().map(|token| token.without_evidence.clone()).unwrap_or_default()
}

/// The device that the configuration means, with its latch; loads the library and no more.
fn driver(config: &Config, arena: &Arena, modules: &pkcs11::Modules) -> Result<Box<dyn Driver>, StartError> {
    let latch_dir = config.latch_dir.clone().unwrap_or_else(|| PathBuf::from("latch"));
    let latch = Latch::open(&latch_dir).map_err(|error| StartError::Latch {
        path: latch_dir.display().to_string(),
        reason: error.to_string(),
    })?;
    match (&config.pkcs11, &config.tpm) {
        (Some(pkcs11), None) => pkcs11::load(pkcs11, latch, arena, modules),
        (None, Some(tpm)) => tpm::load(tpm, latch, arena),
        _ => Err(StartError::Selection("give one of [seal.pkcs11] and [seal.tpm]".to_owned())),
    }
}

/// Allows login again after a wrong PIN was replaced. `force` also for the same PIN, and for another
/// token under the same name. Sends no PIN itself: the next login of a daemon does. Returns the
/// token's serial number, or `None` if the PIN that its source gives now is one that was refused, so
/// that logins stay off.
///
/// # Errors
/// [`UnlatchError`]: the latch may be cleared already; no PIN was sent.
pub fn unlatch(config: &Config, arena: &Arena, force: bool) -> Result<Option<String>, UnlatchError> {
    let driver = driver(config, arena, &pkcs11::Modules::default())?;
    let done = driver.unlatch(force);
    let serial = driver.known().serial;
    if let Err(problem) = driver.take_down() {
        tracing::debug!(?problem, "PKCS#11 module left as it is");
    }
    Ok(done.map_err(UnlatchError::Token)?.then_some(serial))
}

impl Device {
    /// A device in the sealer process.
    pub(crate) fn of_child(
        name: DeviceName,
        client: Arc<Client>,
        supervisor: Supervisor,
        arena: &Arena,
    ) -> Self {
        let routes = Routes::new(vec![(name.clone(), Way::Child(Arc::clone(&client)))], arena);
        Self {
            sealer: Sealer::new(routes.clone(), arena.clone()),
            admin: KeyAdmin::new(routes, arena.clone()),
            name,
            driven: Driven::There { client, supervisor },
        }
    }

    /// Its name in the configuration.
    pub const fn name(&self) -> &DeviceName {
        &self.name
    }

    /// How calls get to it.
    pub(crate) fn way(&self) -> Way {
        match &self.driven {
            Driven::Here { lanes, .. } => Way::Lanes(Arc::clone(lanes)),
            Driven::There { client, .. } => Way::Child(Arc::clone(client)),
        }
    }

    /// The present status; never waits for the device.
    pub fn status(&self) -> DeviceStatus {
        let (lanes, address, without_evidence) = match &self.driven {
            Driven::Here { lanes, address, without_evidence, .. } => (lanes, address, without_evidence),
            Driven::There { client, .. } => {
                return DeviceStatus { name: self.name.clone(), ..client.status() };
            }
        };
        let known = lanes.driver.known();
        DeviceStatus {
            name: self.name.clone(),
            state: lanes.breaker.device_state(),
            module: address.clone(),
            library: known.library,
            token_label: known.label,
            token_serial: known.serial,
            notice: known.notice,
            epoch: lanes.driver.epoch(),
            queued: lanes.queued(),
            stuck_threads: lanes.counters.stuck.load(Ordering::Relaxed),
            key_failures: lanes.counters.key_failures.load(Ordering::Relaxed),
            sealer: None,
            without_evidence: without_evidence.clone(),
        }
    }

    /// What the token can do, measured: for `lacre doctor`.
    ///
    /// # Errors
    /// If the device does not answer.
    pub async fn capabilities(&self) -> Result<serde_json::Value, SealError> {
        match &self.driven {
            Driven::Here { lanes, .. } => lanes.capabilities().await,
            Driven::There { client, .. } => client.capabilities().await,
        }
    }

    /// Finishes queued work, closes all sessions (which logs out) and finalises the module. A call
    /// that hangs inside the module is waited for, for a few seconds, and then left behind.
    pub fn close(&self) {
        let (lanes, watch) = match &self.driven {
            Driven::Here { lanes, watch, .. } => (lanes, watch),
            Driven::There { supervisor, .. } => return supervisor.close(),
        };
        watch.stop();
        lanes.close();
        lanes.join(Duration::from_secs(3));
        if let Err(problem) = lanes.driver.take_down() {
            tracing::warn!(?problem, "PKCS#11 module left as it is");
        }
    }
}
