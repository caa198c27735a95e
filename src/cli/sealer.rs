//! `lacre sealer`: the process that drives the device for a daemon, which starts it.

use super::error::CliError;
use super::logging;
use crate::seal;

/// What the daemon calls it by.
pub(crate) const NAME: &str = "sealer";

/// Runs the command.
pub(crate) fn run() -> Result<(), CliError> {
    let log = |filter: &str, json: bool| {
        let started = logging::start(filter, json);
        if let Err(error) = &started {
            eprintln!("lacre: warning: the sealer process does not log: {error}");
        }
        move |filter: &str| {
            let Ok(levels) = &started else { return };
            match levels.set(filter) {
                Ok(()) => tracing::info!(level = filter, "log level of the sealer process changed"),
                Err(error) => tracing::error!(%error, "the old log level stays"),
            }
        }
    };
    seal::serve(log).map_err(|e| CliError::local("the sealer process ended", e))
}
