//! What commands that work on the daemon's own host take from its configuration.

use std::path::PathBuf;

use super::error::CliError;
use super::global::Context;
use crate::config::Config;
use crate::db::Url;
use crate::seal::{DeviceConfig, guarded};

/// Parts of the configuration.
pub(crate) struct Local {
    /// The device, if one is configured.
    pub(crate) seal: Option<DeviceConfig>,
    /// Guarded memory.
    pub(crate) memory: guarded::Options,
    /// The database.
    pub(crate) database: Url,
    /// The daemon's files.
    pub(crate) data_dir: PathBuf,
}

impl Local {
    /// Takes the parts.
    pub(crate) fn of(config: &Config) -> Result<Self, CliError> {
        // The daemon's latch, wherever this command runs.
        let mut seal = config.seal.clone();
        if let Some(seal) = &mut seal {
            seal.latch_dir.get_or_insert_with(|| config.data_dir.join("latch"));
        }
        Ok(Self {
            seal,
            memory: config.memory.clone(),
            database: config.database_url().map_err(|e| CliError::local("configuration", e))?,
            data_dir: config.data_dir.clone(),
        })
    }
}

/// Reads the configuration that `--config` names, or the default one.
pub(crate) fn config(context: &Context) -> Result<Config, CliError> {
    Config::load(context.global.config.as_deref())
        .map_err(|e| CliError::local("cannot use the configuration", e))
}
