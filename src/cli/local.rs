//! What commands that work on the daemon's own host take from its configuration.
//!
//! The only file of the command line that knows the configuration's members, besides `serve`.

use std::path::PathBuf;

use super::error::CliError;
use super::global::Context;
use crate::config::Config;
use crate::db::Url;
use crate::seal::{DeviceConfig, guarded};

/// Parts of the configuration.
pub(crate) struct Local {
    /// The device.
    pub(crate) seal: DeviceConfig,
    /// Guarded memory.
    pub(crate) memory: guarded::Options,
    /// The database.
    pub(crate) database: Url,
    /// The daemon's files.
    pub(crate) data_dir: PathBuf,
}

impl Local {
    /// Takes the parts.
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            seal: config.seal.clone(),
            memory: config.memory.clone(),
            database: config.database.clone(),
            data_dir: config.data_dir.clone(),
        }
    }
}

/// Reads the configuration that `--config` names, or the default one.
pub(crate) fn config(context: &Context) -> Result<Config, CliError> {
    Config::load(context.global.config.as_deref()).map_err(|e| CliError::local("cannot start", e))
}
