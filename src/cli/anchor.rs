//! `lacre anchor`: what persons say about the roll-back anchor. Works on the daemon's host while no daemon runs.

use clap::{Args, Subcommand};

use super::error::CliError;
use super::global::Context;
use super::{local, output};
use crate::daemon::anchor::{self, Acceptance};

/// The counter in the device that tells an old copy of the database from the present one
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Take the database as it is for the present one
    #[command(after_help = "EXAMPLES
  lacre anchor accept --by ana --reason first-start
  lacre anchor accept --by ana --by rui --reason restored-2026-11-27

Run it while no daemon runs, once after [anchor] was put into the configuration, and after a database was put
back from a copy. Where it overrides the anchor it takes two persons and begins a quarantine, as `lacre restore run`
does. It is recorded in the audit log.")]
    Accept(Accept),
}

/// Arguments of `accept`.
#[derive(Args)]
pub(crate) struct Accept {
    /// Who says so; twice, with two names, to override the anchor
    #[arg(long, value_name = "NAME", required = true, value_parser = name)]
    by: Vec<String>,
    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

fn name(text: &str) -> Result<String, &'static str> {
    let text = text.trim();
    if (1..=64).contains(&text.len()) && !text.contains(',') {
        return Ok(text.to_owned());
    }
    Err("a name has 1 to 64 characters and no comma")
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    let Command::Accept(Accept { by, reason }) = command;
    let config = local::config(context)?;
    if config.anchor.is_none() {
        return Err(CliError::usage("the configuration has no [anchor]", "see docs/operations/anchor.md"));
    }
    let accepted = anchor::accept(config, &Acceptance { by, reason }).await;
    let accepted = accepted.map_err(|error| CliError::local("the database was not accepted", error))?;
    if !accepted.changed {
        context.note("database and anchor agree already: nothing was done");
    }
    let shown = serde_json::json!({
        "generation": accepted.generation,
        "overridden": accepted.overridden,
        "changed": accepted.changed,
    });
    output::object(context.global.output, &shown, "generation")
}
