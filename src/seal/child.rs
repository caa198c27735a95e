//! The sealer process: everything below the sealing API in a child of the daemon, so that a vendor's
//! module that crashes or hangs takes nothing else along, and no plain DEK is ever in the daemon.
//!
//! The cut is at [`Sealer`](crate::seal::Sealer) and [`KeyAdmin`](crate::seal::KeyAdmin): lanes, breaker,
//! recovery, latch and the payload's cipher are the child's, whatever driver is below them. `client.rs`,
//! `supervisor.rs` and `account.rs` are the daemon's side, `serve.rs` and `confine.rs` the child's; `wire.rs`, `errors.rs`
//! and `pipe.rs` are what both speak. The daemon never loads a module in this mode.
//!
//! Not here: what a module may do to the host with the files of its own user. That is the unit's business,
//! and that of `user`.

mod account;
mod client;
mod confine;
mod errors;
mod pipe;
mod serve;
mod supervisor;
mod transfer;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::seal::StartError;
use crate::seal::device::{Config, Device, DeviceState, DeviceStatus, SealerStatus};
use crate::seal::devices::DeviceName;
use crate::seal::guarded::{Arena, Options};
use crate::seal::pin::TypedPin;
use crate::seal::{device, pkcs11};

pub(crate) use client::Client;
pub use serve::{ServeError, serve};
pub(crate) use supervisor::Supervisor;
pub(crate) use transfer::{Address, Mailbox, Parcel, pack};

use account::Account;
use supervisor::Plan;

/// For so long a start waits for the device; after that it goes on in the background.
const FIRST_START: Duration = Duration::from_secs(10);
/// Requests that wait for the child at one time, in lanes. Its own lanes refuse what is too much for them.
const LANES: usize = 3;

/// `[sealer]`: where the device is driven.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SealerConfig {
    /// In a process of its own, or in threads of the daemon.
    pub mode: Mode,
    /// Whether the process may reach the network: for network HSMs.
    pub network: bool,
    /// The user that the process runs as, by a name of /etc/passwd or a number, with all its groups of
    /// /etc/group; the daemon has to be started as root. The PIN file and `seal.latch_dir` then belong to
    /// that user.
    pub user: Option<String>,
}

/// Where the device is driven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In a child process. A crash of the module costs the requests under way.
    #[default]
    Process,
    /// In threads of the daemon. A crash of the module ends the daemon.
    Thread,
}

/// What else the child process needs to be told.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The program to start; the running one by default.
    pub program: PathBuf,
    /// How its guarded memory is set up.
    pub memory: Options,
    /// What it logs, now and after each change.
    pub log_filter: watch::Receiver<String>,
    /// Whether it logs JSON also on a terminal.
    pub log_json: bool,
}

impl Surroundings {
    /// With the running program.
    pub fn new(memory: &Options, log_filter: &str, log_json: bool) -> Self {
        // The link and not its target: the same program also after the file was replaced by an upgrade.
        let program = PathBuf::from("/proc/self/exe");
        // Never changed unless somebody puts another receiver in its place.
        let (_, log_filter) = watch::channel(log_filter.to_owned());
        Self { program, memory: memory.clone(), log_filter, log_json }
    }
}

/// The first message: what the child is to do. Nothing in it is secret; a typed PIN is its body.
#[derive(Serialize, Deserialize)]
struct Start {
    device: Config,
    memory: Options,
    credentials_dir: Option<PathBuf>,
    network: bool,
    log_filter: String,
    log_json: bool,
}

/// Starts the device where `sealer` says. As [`device::start`], it returns with the device up or with the
/// reason in its status.
///
/// # Errors
/// [`StartError`] for what no waiting heals.
pub fn launch(
    sealer: &SealerConfig,
    config: &Config,
    surroundings: &Surroundings,
    arena: &Arena,
) -> Result<Device, StartError> {
    match sealer.mode {
        Mode::Thread => device::start(config, arena),
        Mode::Process => start(DeviceName::default(), sealer, config, surroundings, arena),
    }
}

/// [`launch`] in the process, for the device of that name.
pub(crate) fn start(
    name: DeviceName,
    sealer: &SealerConfig,
    config: &Config,
    surroundings: &Surroundings,
    arena: &Arena,
) -> Result<Device, StartError> {
    let failed = |reason: String| StartError::Sealer { reason };
    let user = sealer.user.as_deref().map(Account::find).transpose().map_err(failed)?.flatten();
    // Asked for here, once: a child that is started again must not ask anybody.
    let typed = config.pkcs11.as_ref().map(|pkcs11| pkcs11::ask_pin(pkcs11, arena)).transpose()?.flatten();
    let start = Start {
        device: config.clone(),
        memory: surroundings.memory.clone(),
        credentials_dir: credentials_dir(config),
        network: sealer.network || config.tpm.as_ref().is_some_and(|tpm| tpm.is_simulated()),
        log_filter: surroundings.log_filter.borrow().clone(),
        log_json: surroundings.log_json,
    };
    let program = surroundings.program.clone();
    let log_filter = surroundings.log_filter.clone();
    let plan = Plan { program, user, start, log_filter, pin: typed.map(|typed| typed.0) };
    let status = DeviceStatus {
        state: DeviceState::Away("the sealer process is starting".to_owned()),
        sealer: Some(SealerStatus { pid: 0, restarts: 0, memory: arena.status() }),
        ..DeviceStatus::default()
    };
    let limit = config.queue.saturating_mul(LANES);
    let client = Arc::new(Client::new(name.clone(), config.deadline, limit, status));
    let (tell, told) = mpsc::channel();
    let supervisor = Supervisor::start(Arc::clone(&client), plan, arena, tell)
        .map_err(|error| StartError::Threads { reason: error.to_string() })?;
    match told.recv_timeout(FIRST_START) {
        Ok(Err(error)) => return Err(error),
        Ok(Ok(())) => {}
        Err(_) => tracing::warn!("The sealer process is not ready yet, the start goes on without it"),
    }
    Ok(Device::of_child(name, client, supervisor, arena))
}

fn credentials_dir(config: &Config) -> Option<PathBuf> {
    let pkcs11 = config.pkcs11.as_ref().and_then(|pkcs11| pkcs11.credentials_dir.clone());
    pkcs11.or_else(|| config.tpm.as_ref().and_then(|tpm| tpm.credentials_dir.clone()))
}

/// Puts back what does not travel inside the configuration.
fn complete(config: &mut Config, credentials_dir: Option<&Path>, typed: Option<TypedPin>) {
    if let Some(tpm) = &mut config.tpm {
        tpm.credentials_dir = credentials_dir.map(Path::to_owned);
    }
    if let Some(pkcs11) = &mut config.pkcs11 {
        pkcs11.credentials_dir = credentials_dir.map(Path::to_owned);
        pkcs11.typed_pin = typed;
    }
}
