//! `lacre hsm`: the device itself.

use clap::{Args, Subcommand};
use serde_json::json;

use super::error::CliError;
use super::global::Context;
use super::{local, output};
use crate::seal::{self, Arena};

/// The HSM itself
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Allow login again after a wrong PIN was replaced
    #[command(after_help = "EXAMPLES
  lacre hsm unlatch --config /etc/lacre/lacre.toml
  lacre hsm unlatch --force

A wrong PIN stops all logins, because every further try brings the token nearer to its lock. Replace
the PIN file first. --force allows one more try with the same PIN.")]
    Unlatch(Unlatch),
}

/// Arguments of `unlatch`.
#[derive(Args)]
pub(crate) struct Unlatch {
    /// Also if the PIN is still the one that was refused
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub(crate) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    let Command::Unlatch(args) = command;
    let mut parts = local::Local::of(&local::config(context)?)?;
    let Some(config) = parts.seal else {
        return Err(CliError::usage("no device is configured", "add [seal.pkcs11] to the configuration"));
    };
    // Nothing secret passes through here except the PIN, which is never in the arena.
    parts.memory.allow_unlocked = true;
    let arena = Arena::new(&parts.memory).map_err(|e| CliError::local("guarded memory", e))?;
    let Some(serial) = seal::unlatch(&config, &arena, args.force)
        .map_err(|e| CliError::local("cannot change the latch", e))?
    else {
        return Err(CliError::local(
            "logins stay off",
            "the PIN is still the one that the token refused; replace it, or use --force to send it again",
        ));
    };
    context.note("the next login uses the PIN that its source gives now");
    output::object(context.global.output, &json!({ "unlatched": serial }), "unlatched")
}
