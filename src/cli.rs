//! The command line: one file per command, results on stdout, talk on stderr.
//!
//! Commands for users (`secrets`, `kek`, `keys`, `audit`, `app`, `status`) speak HTTP with the daemon and
//! nothing else. Commands for the host (`serve`, `dev`, `init`, `db`, `hsm`, `doctor`, `restore run`, `import`, `anchor`) read
//! its configuration. Start at `Command`, then `client.rs` and `error.rs`, where the exit codes are.

mod anchor;
mod app;
mod audit;
mod chain;
mod client;
mod completion;
mod db;
mod dev;
mod doctor;
mod error;
mod global;
mod hsm;
mod import;
mod init;
mod input;
mod kek;
mod keys;
mod local;
mod logging;
mod man;
mod output;
mod progress;
mod restore;
mod sealer;
mod secrets;
mod serve;
mod status;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use error::CliError;
use global::{Context, Environment, Global};

const AFTER_HELP: &str = "ENVIRONMENT
  LACRE_TOKEN  access token; has no option, because arguments show in the process list
  LACRE_DEV    like --dev-json; LACRE_ADDR, LACRE_CONFIG and others stand beside their options
";

/// Lacre: a key service whose keys stay in an HSM
#[derive(Parser)]
#[command(name = "lacre", version, after_help = format!("{AFTER_HELP}\n{}", error::EXIT_CODES))]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    #[command(after_help = serve::HELP)]
    Serve(serve::Args),
    /// Run everything for development: token, database and daemon, without configuration
    #[command(after_help = dev::HELP)]
    Dev(dev::Args),
    /// Make the keys and the first application of a new installation
    #[command(after_help = init::HELP)]
    Init(init::Args),
    /// Say whether the daemon can work, and with what
    #[command(after_help = status::HELP)]
    Status(status::Args),
    /// Say what is wrong on this host and what to do, and what the token can do
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::Args),
    #[command(subcommand)]
    Db(db::Command),
    #[command(subcommand, visible_alias = "secret")]
    Secrets(secrets::Command),
    #[command(subcommand)]
    Kek(kek::Command),
    #[command(subcommand)]
    Keys(keys::Command),
    #[command(subcommand)]
    Audit(audit::Command),
    #[command(subcommand)]
    App(app::Command),
    #[command(subcommand)]
    Hsm(hsm::Command),
    #[command(subcommand)]
    Restore(restore::Command),
    #[command(subcommand)]
    Import(import::Command),
    #[command(subcommand)]
    Anchor(anchor::Command),
    /// Print a completion script for a shell
    #[command(after_help = completion::HELP)]
    Completion(completion::Args),
    /// Write manual pages, one per command
    #[command(after_help = man::HELP)]
    Man(man::Args),
}

/// The command tree, for completions, manual pages and tests.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program. Prints its own errors.
pub fn main() -> ExitCode {
    // Before anything else: no core file, no other process's look into this one.
    let hardening = crate::process::harden();
    for problem in &hardening.problems {
        eprintln!("lacre: warning: {problem}");
    }
    if std::env::args_os().skip(1).eq([sealer::NAME]) {
        // Not a command for people, so it is in no help.
        return sealer::run().map_or_else(|error| error.report(), |()| ExitCode::SUCCESS);
    }
    let parsed = Environment::read().and_then(|env| Ok((Cli::try_parse()?, env)));
    let (cli, env) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Nothing is left to do if this cannot be printed. clap's own code for wrong usage is 2,
            // which means here that the server refused.
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    let context = Context { global: cli.global, env };
    match dispatch(cli.command, &context) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn dispatch(command: Command, context: &Context) -> Result<(), CliError> {
    if let Command::Dev(args) = &command {
        dev::prepare(args, context)?;
    }
    match command {
        Command::Completion(args) => completion::run(&args),
        Command::Man(args) => man::run(&args, context),
        Command::Db(command) => db::run(&command, context),
        command => runtime()?.block_on(run(command, context)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::local("cannot start the runtime", e))
}

async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Serve(args) => serve::run(args, context).await,
        Command::Dev(args) => dev::run(args).await,
        Command::Init(args) => init::run(args, context).await,
        Command::Status(_) => status::run(context).await,
        Command::Doctor(args) => doctor::run(&args, context).await,
        Command::Secrets(command) => secrets::run(command, context).await,
        Command::Kek(command) => kek::run(command, context).await,
        Command::Keys(command) => keys::run(command, context).await,
        Command::Audit(command) => audit::run(command, context).await,
        Command::App(command) => app::run(command, context).await,
        Command::Hsm(command) => hsm::run(&command, context),
        Command::Restore(command) => restore::run(command, context).await,
        Command::Import(command) => import::run(command, context).await,
        Command::Anchor(command) => anchor::run(command, context).await,
        // Done without a runtime, in `dispatch`.
        Command::Db(command) => db::run(&command, context),
        Command::Completion(args) => completion::run(&args),
        Command::Man(args) => man::run(&args, context),
    }
}
