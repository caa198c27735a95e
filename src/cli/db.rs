//! `lacre db`: the database's schema.

use clap::Subcommand;
use serde_json::json;

use super::error::CliError;
use super::global::Context;
use super::{local, output};
use crate::db::{OpenError, migrate};

/// The database's schema
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Bring the schema to this version (SQLite is migrated at start by itself)
    #[command(after_help = "EXAMPLES
  lacre db migrate --config /etc/lacre/lacre.toml
  lacre db migrate -o json")]
    Migrate,
    /// List migrations; exit code 4 if some are pending
    #[command(after_help = "EXAMPLES
  lacre db status
  lacre db status -o json")]
    Status,
}

/// Runs the command. It blocks its thread: nothing else runs.
pub(crate) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    let parts = local::Local::of(&local::config(context)?)?;
    if matches!(command, Command::Migrate) {
        let names = migrate::migrate(&parts.database).map_err(refused)?;
        context.note(&format!("{} migration(s) applied now", names.len()));
    }
    let all = migrate::status(&parts.database).map_err(refused)?;
    let items: Vec<_> = all.iter().map(|migration| json!(migration)).collect();
    let columns = [("MIGRATION", "name"), ("APPLIED", "applied")];
    output::list(context.global.output, &items, &columns, "name")?;
    match all.iter().filter(|migration| !migration.applied).count() {
        0 => Ok(()),
        count => Err(CliError::Schema(OpenError::MigrationsPending { count })),
    }
}

fn refused(error: OpenError) -> CliError {
    match error {
        OpenError::BadUrl { .. } => CliError::local("configuration", error),
        other => CliError::Schema(other),
    }
}
