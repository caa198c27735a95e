//! `lacre serve`: the daemon.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::error::CliError;
use super::global::Context;
use super::{local, logging, output};
use crate::config::{Config, LogFormat};
use crate::daemon;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre serve --config /etc/lacre/lacre.toml
  lacre serve --log-level info,lacre::seal=debug

SIGTERM drains and ends the daemon. SIGHUP reads certificates and log level again.";

/// Arguments of `serve`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Start although memory cannot be locked (development only)
    #[arg(long)]
    allow_unlocked_memory: bool,
    /// What to log, over the configuration: error, warn, info, debug or a filter
    #[arg(long, env = "LACRE_LOG", value_name = "FILTER")]
    log_level: Option<String>,
}

/// Runs the command.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let mut config = local::config(context)?;
    config.memory.allow_unlocked |= args.allow_unlocked_memory;
    let is_fixed = args.log_level.is_some();
    if let Some(filter) = args.log_level {
        config.log.level = filter;
    }
    let levels = logging::start(&config.log.level, config.log.format == LogFormat::Json)?;
    if !is_fixed {
        let (tell, changes) = watch::channel(config.log.level.clone());
        config.log.changes = Some(changes);
        reload_on_hangup(levels, tell, context)?;
    }
    let ready = |url: &str| {
        // The daemon works whether somebody reads this line or not.
        let _ = output::line(&format!("lacre ready url={url}"));
    };
    daemon::run(config, ready).await.map_err(|e| CliError::local("the daemon ended", e))
}

/// Reads the level again when the daemon is told to; `tell` is for the sealer process, which has a log filter of
/// its own.
fn reload_on_hangup(
    levels: logging::Levels,
    tell: watch::Sender<String>,
    context: &Context,
) -> Result<(), CliError> {
    let mut hangups =
        signal(SignalKind::hangup()).map_err(|e| CliError::local("cannot listen for SIGHUP", e))?;
    let file = context.global.config.clone();
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match Config::load(file.as_deref()) {
                Ok(config) => match levels.set(&config.log.level) {
                    Ok(()) => {
                        tracing::info!(level = config.log.level, "log level read again");
                        tell.send_replace(config.log.level);
                    }
                    Err(error) => tracing::error!(%error, "the old log level stays"),
                },
                Err(error) => tracing::error!(%error, "the old log level stays"),
            }
        }
    });
    Ok(())
}
