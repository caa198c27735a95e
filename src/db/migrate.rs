//! The schema's versions: embedded, applied in order, checked at every start.
//!
//! An SQLite file is migrated when it is opened. PostgreSQL is migrated by `lacre db migrate` only,
//! because two daemons that start together would race. A schema that knows more than this program
//! is refused, so that an old daemon never writes into a newer database.

use diesel::pg::Pg;
use diesel::sqlite::Sqlite;
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::connect::{self, Target};
use super::{Conn, OpenError, Url, sqlite};
use crate::with_conn;

const SQLITE: EmbeddedMigrations = embed_migrations!("migrations/sqlite");
const POSTGRES: EmbeddedMigrations = embed_migrations!("migrations/postgres");

/// One migration and whether the database has it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Migration {
    /// Its number and name.
    pub name: String,
    /// Whether the database has it.
    pub applied: bool,
}

/// The migrations that this program knows, oldest first.
///
/// # Errors
/// [`OpenError::NewerSchema`], or why the database cannot be reached.
pub fn status(url: &Url) -> Result<Vec<Migration>, OpenError> {
    match url.target() {
        Target::Sqlite(path) if !path.exists() => {
            let names = known_names(&Conn::Sqlite(sqlite::in_memory()?))?;
            Ok(names.into_iter().map(|name| Migration { name, applied: false }).collect())
        }
        Target::Sqlite(path) => examine(&mut sqlite::connect_checked(path)?),
        Target::Postgres(url) => examine(&mut postgres(url)?),
    }
}

/// Applies what is pending and returns the names of what was applied.
///
/// # Errors
/// [`OpenError::InUse`] while a daemon has the SQLite file open, [`OpenError::NewerSchema`], or why
/// the database cannot be reached.
pub fn migrate(url: &Url) -> Result<Vec<String>, OpenError> {
    match url.target() {
        Target::Sqlite(path) => {
            let _lock = sqlite::lock(path)?;
            run_pending(&mut sqlite::connect_checked(path)?)
        }
        Target::Postgres(url) => run_pending(&mut postgres(url)?),
    }
}

/// How many migrations are pending.
pub(super) fn pending(conn: &mut Conn) -> Result<usize, OpenError> {
    Ok(examine(conn)?.iter().filter(|migration| !migration.applied).count())
}

/// Applies what is pending, each migration in a transaction of its own.
pub(super) fn run_pending(conn: &mut Conn) -> Result<Vec<String>, OpenError> {
    let pending = examine(conn)?.into_iter().filter(|migration| !migration.applied);
    let names = pending.map(|migration| migration.name).collect();
    match conn {
        Conn::Sqlite(conn) => conn.run_pending_migrations(SQLITE).map(|_| ()),
        Conn::Postgres(conn) => conn.run_pending_migrations(POSTGRES).map(|_| ()),
    }
    .map_err(failed)?;
    Ok(names)
}

fn postgres(url: &secrecy::SecretString) -> Result<Conn, OpenError> {
    connect::postgres_bare(url).map(Conn::Postgres).map_err(connect::unreachable)
}

/// Compares what the database has with what this program knows.
fn examine(conn: &mut Conn) -> Result<Vec<Migration>, OpenError> {
    let applied: Vec<String> = with_conn!(&mut *conn, |c| c.applied_migrations())
        .map_err(failed)?
        .iter()
        .map(ToString::to_string)
        .collect();
    let names = known_names(conn)?;
    let version_of = |name: &str| name.split('_').next().unwrap_or_default().to_owned();
    let is_known = |version: &&String| names.iter().any(|name| version_of(name) == **version);
    if let Some(found) = applied.iter().find(|version| !is_known(version)) {
        return Err(OpenError::NewerSchema { found: found.clone() });
    }
    let migration = |name: String| Migration { applied: applied.contains(&version_of(&name)), name };
    Ok(names.into_iter().map(migration).collect())
}

fn known_names(conn: &Conn) -> Result<Vec<String>, OpenError> {
    use diesel::migration::MigrationSource;
    let mut names: Vec<String> = match conn {
        Conn::Sqlite(_) => {
            let all = MigrationSource::<Sqlite>::migrations(&SQLITE).map_err(failed)?;
            all.iter().map(|migration| migration.name().to_string()).collect()
        }
        Conn::Postgres(_) => {
            let all = MigrationSource::<Pg>::migrations(&POSTGRES).map_err(failed)?;
            all.iter().map(|migration| migration.name().to_string()).collect()
        }
    };
    names.sort_unstable();
    Ok(names)
}

#[expect(clippy::needless_pass_by_value, reason = "it stands in map_err")]
fn failed(error: Box<dyn std::error::Error + Send + Sync>) -> OpenError {
    connect::unreachable(format!("migration: {error}"))
}
