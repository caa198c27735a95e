//! `lacre dev`: everything at once, without configuration, for development.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use super::error::CliError;
use super::global::Context;
use super::logging;
use crate::daemon::dev::{self, DevOptions, Kind};

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre dev --data-dir ./dev-data --listen 127.0.0.1:8290
  lacre dev --device tpm --data-dir ./dev-tpm

When it is ready it prints `lacre ready url=... data=...` and has written DIR/dev.json, which other
commands take with --dev-json. Run again on the same DIR it goes on with the same keys and data.";

/// Arguments of `dev`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where token, database and dev.json are kept
    #[arg(long, default_value = "lacre-dev", value_name = "DIR")]
    data_dir: PathBuf,
    /// Where to listen; loopback only
    #[arg(long, default_value = "127.0.0.1:8280", value_name = "ADDR")]
    listen: SocketAddr,
    /// What keys are kept in: a SoftHSM token, or a TPM in software (swtpm)
    #[arg(long, value_enum, default_value_t = Device::Softhsm)]
    device: Device,
    /// Start although memory cannot be locked
    #[arg(long)]
    allow_unlocked_memory: bool,
    /// What to log: error, warn, info, debug or a filter
    #[arg(long, env = "LACRE_LOG", default_value = "info", value_name = "FILTER")]
    log_level: String,
}

/// What keys are kept in.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Device {
    Softhsm,
    Tpm,
}

impl From<Device> for Kind {
    fn from(device: Device) -> Self {
        match device {
            Device::Softhsm => Self::SoftHsm,
            Device::Tpm => Self::Tpm,
        }
    }
}

impl Args {
    fn options(&self) -> DevOptions {
        DevOptions {
            data_dir: self.data_dir.clone(),
            listen: self.listen,
            allow_unlocked_memory: self.allow_unlocked_memory,
            device: self.device.into(),
            log_level: self.log_level.clone(),
        }
    }
}

/// Makes the token, and starts this program again if its environment does not name it yet: SoftHSM
/// reads `SOFTHSM2_CONF` when it is loaded, and a running process cannot change its environment
/// safely. Called before any thread is started.
pub(crate) fn prepare(args: &Args, context: &Context) -> Result<(), CliError> {
    if context.global.config.is_some() {
        return Err(CliError::usage(
            "`lacre dev` takes no configuration",
            "leave out --config (LACRE_CONFIG), or use `lacre serve`",
        ));
    }
    let conf = dev::prepare(&args.options()).map_err(|e| CliError::local("cannot make the token", e))?;
    let Some(conf) = conf else { return Ok(()) };
    if context.env.softhsm2_conf.as_ref() == Some(&conf) {
        return Ok(());
    }
    let program = std::env::current_exe().map_err(|e| CliError::local("cannot find this program", e))?;
    let mut again = Command::new(program);
    again.args(std::env::args_os().skip(1)).env("SOFTHSM2_CONF", conf);
    Err(CliError::local("cannot start again", again.exec()))
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), CliError> {
    logging::start(&args.log_level, false)?;
    dev::run(args.options()).await.map_err(|e| CliError::local("the daemon ended", e))
}
