//! The daemon's log: standard error, text on a terminal, JSON elsewhere; its level can change while
//! the daemon runs.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use super::error::CliError;

/// Changes the level of a running daemon.
pub(crate) struct Levels(reload::Handle<EnvFilter, Registry>);

impl Levels {
    /// Sets another filter, for example `info,lacre::seal=debug`.
    ///
    /// # Errors
    /// If the filter is not understood; the old one stays.
    pub(crate) fn set(&self, filter: &str) -> Result<(), CliError> {
        self.0.reload(parse(filter)?).map_err(|e| CliError::local("cannot change the log level", e))
    }
}

/// Starts logging. `json` also on a terminal.
pub(crate) fn start(filter: &str, json: bool) -> Result<Levels, CliError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let lines = if json || !stderr().is_terminal() {
        fmt::layer().json().flatten_event(true).with_writer(stderr).boxed()
    } else {
        fmt::layer().with_ansi(false).with_writer(stderr).boxed()
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|e| CliError::local("cannot start logging", e))?;
    Ok(Levels(handle))
}

fn parse(filter: &str) -> Result<EnvFilter, CliError> {
    // The HTTP libraries' traces show bodies and headers: never below info, whatever is asked for.
    let capped = format!("{filter},hyper=info,hyper_util=info,reqwest=info,actix_http=info,h2=info");
    EnvFilter::try_new(capped).map_err(|e| CliError::local(format!("log level {filter}"), e))
}
