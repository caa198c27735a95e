//! `lacre man`: manual pages, one per command.

use std::path::PathBuf;

use super::error::CliError;
use super::global::Context;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre man --out /usr/local/share/man/man1
  lacre man --out ./man";

/// Arguments of `man`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the pages go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let shown = args.out.display();
    let failed = |e: std::io::Error| CliError::local(format!("cannot write to {shown}"), e);
    std::fs::create_dir_all(&args.out).map_err(failed)?;
    clap_mangen::generate_to(super::command().disable_help_subcommand(true), &args.out).map_err(failed)?;
    context.note(&format!("manual pages written to {shown}"));
    Ok(())
}
