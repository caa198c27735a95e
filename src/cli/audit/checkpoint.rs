//! The checkpoint file: what this machine trusts of a log.
//!
//! `{"seq":N,"hash":"hex"}`, replaced as a whole: a crash leaves the old or the new one.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::audit::Checkpoint;
use crate::cli::error::CliError;
use crate::cli::global::Environment;

#[derive(Serialize, Deserialize)]
struct Stored {
    seq: u64,
    hash: String,
}

/// Where the checkpoint of the daemon at `addr` is kept by default: one file per daemon. For `lacre dev`
/// it is beside its `dev.json`: such logs come and go at one address, each with its directory.
pub(crate) fn default_path(env: &Environment, dev_json: Option<&Path>, addr: &str) -> Option<PathBuf> {
    if let Some(dev_json) = dev_json {
        return Some(dev_json.with_file_name("audit-checkpoint.json"));
    }
    let state = match &env.state_home {
        Some(dir) => dir.clone(),
        None => std::env::home_dir()?.join(".local/state"),
    };
    let which = hex::encode(&Sha256::digest(addr)[..4]);
    Some(state.join("lacre").join(format!("audit-checkpoint-{which}.json")))
}

/// Reads a checkpoint; `None` if there is no file. A file that cannot be read is an error and never
/// "no checkpoint": that would turn damage into trust.
pub(crate) fn load(path: &Path) -> Result<Option<Checkpoint>, CliError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CliError::local(format!("cannot read {}", path.display()), error)),
    };
    let damaged = || CliError::local(format!("{}", path.display()), "not a checkpoint file");
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
    let mut hash = [0; 32];
    hex::decode_to_slice(&stored.hash, &mut hash).map_err(|_| damaged())?;
    Ok(Some(Checkpoint { seq: stored.seq, hash }))
}

/// Replaces the checkpoint.
pub(crate) fn save(path: &Path, checkpoint: Checkpoint) -> Result<(), CliError> {
    let stored = Stored { seq: checkpoint.seq, hash: hex::encode(checkpoint.hash) };
    let write = || -> std::io::Result<()> {
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(serde_json::to_string(&stored)?.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(|e| CliError::local(format!("cannot write {}", path.display()), e))
}
