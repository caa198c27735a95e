//! `lacre import logto`: takes over what a Logto database has. Works on the daemon's host; on SQLite while no daemon
//! runs. The whole move is in `docs/guides/import-from-logto.md`.

mod keys;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use secrecy::SecretString;
use serde_json::{Value, json};

use super::error::CliError;
use super::global::{Context, Format};
use super::kek::Style;
use super::progress::Show;
use super::{input, local, output};
use crate::config::Config;
use crate::daemon::{Services, StartError};
use crate::db::{Engine, Url};
use crate::identity::Caller;
use crate::tokens::LogtoKek;
use crate::tokens::import::{ImportError, Kind, Logto, Report};

/// So many losses are told as text; all of them are in `-o json`.
const TOLD: usize = 20;

/// Take over what another program has stored
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Take over users, identities, connectors, token sets and signing keys of a Logto database
    #[command(after_help = "EXAMPLES
  lacre import logto --database-url postgres://logto@db/logto --kek-file kek.txt --dry-run
  lacre import logto --database-url postgres://logto@db/logto --kek-file kek.txt -o json

Reads Logto's database and writes nothing to it. What is there already (the same id) is left alone, so a command that
was killed goes on when it is run again. Run it on the daemon's host; with SQLite the daemon must not run.")]
    Logto(LogtoArgs),
}

/// Arguments of `logto`.
#[derive(Args)]
pub(crate) struct LogtoArgs {
    /// Logto's database, postgres://...; its password belongs into a passfile
    #[arg(long, value_name = "URL", env = "LACRE_LOGTO_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// File with the value of Logto's `SECRET_VAULT_KEK`; not needed where no token sets are stored
    #[arg(long, value_name = "FILE")]
    kek_file: Option<PathBuf>,
    /// Logto's tenant
    #[arg(long, value_name = "ID", default_value = "default")]
    tenant_id: String,
    /// The longest lifetime of a token that Logto's signing keys have signed
    #[arg(long, value_name = "SECONDS", default_value = "86400",
        value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    lifetime: u64,
    /// Leave the signing keys
    #[arg(long)]
    no_keys: bool,
    /// Read, decrypt and check everything; write nothing
    #[arg(long)]
    dry_run: bool,
    /// How progress is shown on standard error
    #[arg(long, value_enum, default_value = "auto", value_name = "STYLE")]
    progress: Style,
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    let Command::Logto(args) = command;
    let config = local::config(context)?;
    let url = source(&args, context)?;
    let kek = args.kek_file.as_deref().map(kek).transpose()?;
    let logto = Logto::open(&url, args.tenant_id.clone()).await;
    let logto = logto.map_err(|e| CliError::local(format!("cannot open {url}"), e))?;
    let services = open(config).await?;
    let imported = import(&services, &logto, kek.as_ref(), &args, context).await;
    services.close().await;
    let report = imported?;
    show(&report, args.dry_run, context)?;
    match report.losses() {
        0 => Ok(()),
        count => Err(CliError::LeftBehind { count }),
    }
}

fn source(args: &LogtoArgs, context: &Context) -> Result<Url, CliError> {
    let hint = "it is the DB_URL of Logto: postgres://USER@HOST/DATABASE";
    let url = Url::parse(&args.database_url).ok().filter(|url| url.engine() == Engine::Postgres);
    let url = url.ok_or_else(|| CliError::usage("--database-url is not a PostgreSQL URL", hint))?;
    if url.has_password() {
        context.note("the URL has a password in it, which the process list shows: a passfile does not");
    }
    Ok(url)
}

fn kek(path: &Path) -> Result<LogtoKek, CliError> {
    let text = input::document(Some(path))?;
    LogtoKek::from_base64(&SecretString::from(text.as_str())).map_err(|bad| {
        let hint = "it holds the value of Logto's SECRET_VAULT_KEK: base64 of 32 bytes";
        CliError::usage(format!("{}: {bad}", path.display()), hint)
    })
}

async fn open(config: Config) -> Result<Services, CliError> {
    Services::start(config).await.map_err(|error| match error {
        StartError::Database(error) => error.into(),
        error => CliError::local("cannot open the installation", error),
    })
}

async fn import(
    services: &Services,
    logto: &Logto,
    kek: Option<&LogtoKek>,
    args: &LogtoArgs,
    context: &Context,
) -> Result<Report, CliError> {
    let caller = Caller::system("import", services.config.tenant.clone());
    let style = if context.global.quiet { Style::None } else { args.progress };
    let bar = OnceCell::new();
    let tell = |report: &Report| {
        let job = json!({
            "id": "logto", "state": "running", "total": report.total, "done": report.done(),
            "failed": report.losses(),
        });
        bar.get_or_init(|| Show::new(style, &job)).update(&job);
    };
    let done = services.tokens.import_logto(&caller, logto, kek, args.dry_run, tell).await;
    if let Some(bar) = bar.get() {
        bar.end();
    }
    let mut report = done.map_err(refused)?;
    if !args.no_keys {
        let how = keys::How { lifetime: Duration::from_secs(args.lifetime), dry_run: args.dry_run };
        keys::import(services, &caller, logto, how, &mut report).await?;
    }
    Ok(report)
}

fn refused(error: ImportError) -> CliError {
    match error {
        ImportError::NoKek(_) => {
            CliError::usage(error.to_string(), "give --kek-file with the value of SECRET_VAULT_KEK")
        }
        ImportError::WrongKek(_) => {
            CliError::usage(error.to_string(), "look at SECRET_VAULT_KEK in the environment of that Logto")
        }
        error => CliError::local("cannot import", error),
    }
}

fn show(report: &Report, dry_run: bool, context: &Context) -> Result<(), CliError> {
    let row = |kind: Kind| {
        let counts = report.of(kind);
        json!({
            "kind": kind.name(), "found": counts.found, "imported": counts.imported, "present": counts.present,
            "skipped": counts.skipped, "reasons": counts.reasons,
        })
    };
    let items: Vec<Value> = Kind::ALL.into_iter().map(row).collect();
    if context.global.output == Format::Json {
        return output::json(&json!({
            "dry_run": dry_run, "items": items, "losses": report.losses(), "lost": report.named(),
        }));
    }
    let columns = [
        ("KIND", "kind"),
        ("FOUND", "found"),
        ("IMPORTED", "imported"),
        ("PRESENT", "present"),
        ("SKIPPED", "skipped"),
        ("WHY", "reasons"),
    ];
    output::list(context.global.output, &items, &columns, "kind")?;
    for loss in report.named().iter().take(TOLD) {
        context.note(&format!("{} {}: {}", loss.kind.name(), loss.id, loss.reason));
    }
    if report.losses() > TOLD as u64 {
        context.note("there are more; -o json names them");
    }
    if dry_run {
        context.note("nothing was changed");
    }
    Ok(())
}
