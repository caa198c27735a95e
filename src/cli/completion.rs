//! `lacre completion`: scripts for shells.

use clap_complete::Shell;

use super::error::CliError;
use super::output;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre completion bash > /etc/bash_completion.d/lacre
  lacre completion zsh > ~/.zfunc/_lacre";

/// Arguments of `completion`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which shell
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(["bash", "zsh", "fish"]))]
    shell: String,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let shell = match args.shell.as_str() {
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        _ => Shell::Bash,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "lacre", &mut script);
    output::raw(&script)
}
