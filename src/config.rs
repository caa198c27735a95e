//! Configuration: one TOML file, environment and flags over it (stub, being written).

use std::path::{Path, PathBuf};

/// The configuration (stub).
pub struct Config {
    /// `[seal]`.
    pub seal: Option<crate::seal::DeviceConfig>,
    /// `[memory]`.
    pub memory: crate::seal::guarded::Options,
    /// Where files are kept.
    pub data_dir: PathBuf,
    /// `[log]`.
    pub log: LogConfig,
}

/// `[log]` (stub).
pub struct LogConfig {
    /// Filter, for example `info`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks (stub).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Why there is no configuration (stub).
#[derive(Debug, thiserror::Error)]
#[error("configuration: not built into this program")]
pub struct ConfigError;

impl Config {
    /// Stub.
    ///
    /// # Errors
    /// Always.
    pub fn load(_file: Option<&Path>) -> Result<Self, ConfigError> {
        Err(ConfigError)
    }

    /// Stub.
    ///
    /// # Errors
    /// If it is none.
    pub fn database_url(&self) -> Result<crate::db::Url, crate::db::OpenError> {
        Ok(crate::db::Url::sqlite(self.data_dir.join("lacre.db")))
    }
}

/// Serde helper: a `Duration` written as seconds (number) or as text such as `"30s"`, `"4h"`.
pub mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Seconds(u64),
        Text(String),
    }

    /// # Errors
    /// If it is neither a whole number nor a duration text.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        match Form::deserialize(input)? {
            Form::Seconds(seconds) => Ok(Duration::from_secs(seconds)),
            Form::Text(text) => humantime::parse_duration(&text).map_err(D::Error::custom),
        }
    }
}
