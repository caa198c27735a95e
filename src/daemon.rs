//! Daemon (stub).

pub mod dev;

use crate::config::Config;
use crate::ids::ClientId;

/// Why the daemon could not run (stub).
#[derive(Debug, thiserror::Error)]
#[error("not built into this program")]
pub struct RunError;

/// What [`init`] made.
pub struct InitReport {
    /// The first application.
    pub client_id: ClientId,
    /// Its secret.
    pub client_secret: secrecy::SecretString,
    /// Whether it was made now.
    pub created: bool,
}

/// Stub.
///
/// # Errors
/// Always.
pub async fn run(_config: Config, _on_ready: impl FnOnce(&str)) -> Result<(), RunError> {
    Err(RunError)
}

/// Stub.
///
/// # Errors
/// Always.
pub async fn init(_config: Config, _app_name: &str) -> Result<InitReport, RunError> {
    Err(RunError)
}
