//! `lacre sealer`: the process that drives the device for a daemon, which starts it.

use super::error::CliError;
use super::logging;
use crate::seal;

/// What the daemon calls it by.
pub(crate) const NAME: &str = "sealer";

/// Runs the command.
pub(crate) fn run() -> Result<(), CliError> {
    let log = |filter: &str, json: bool| {
        if let Err(error) = logging::start(filter, json) {
            eprintln!("lacre: warning: the sealer process does not log: {error}");
        }
    };
    seal::serve(log).map_err(|e| CliError::local("the sealer process ended", e))
}
