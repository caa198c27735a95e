//! What commands that work on the daemon's own host take from its configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::error::CliError;
use super::global::Context;
use crate::config::Config;
use crate::db::Url;
use crate::seal::{DeviceConfig, DeviceName, guarded};

/// Parts of the configuration.
pub(crate) struct Local {
    /// The configured devices, by name.
    pub(crate) devices: BTreeMap<DeviceName, DeviceConfig>,
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
        Ok(Self {
            // With the daemon's latch, wherever this command runs.
            devices: config.all_devices(),
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
