//! `lacre dev` (stub).

use std::net::SocketAddr;
use std::path::PathBuf;

use super::RunError;

/// What `lacre dev` was asked for.
pub struct DevOptions {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Start although memory cannot be locked.
    pub allow_unlocked_memory: bool,
}

/// Makes the token and returns the path of its `softhsm2.conf`.
///
/// # Errors
/// Always (stub).
pub fn prepare(_options: &DevOptions) -> Result<PathBuf, RunError> {
    Err(RunError)
}

/// Runs.
///
/// # Errors
/// Always (stub).
pub async fn run(_options: DevOptions) -> Result<(), RunError> {
    Err(RunError)
}
