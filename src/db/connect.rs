//! Where the database is, how a connection is made, and which errors mean that it does not answer.

use std::fmt;
use std::path::{Path, PathBuf};

use diesel::connection::SimpleConnection;
use diesel::{Connection, PgConnection};
use secrecy::{ExposeSecret, SecretString};

use crate::db::{Conn, OpenError};

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// SQLite.
    Sqlite,
    /// PostgreSQL.
    Postgres,
}

/// A parsed database URL: `sqlite:/path` or `postgres://...`. Its `Display` masks a password.
#[derive(Clone)]
pub struct Url(Target);

#[derive(Clone)]
pub(super) enum Target {
    Sqlite(PathBuf),
    Postgres(SecretString),
}

impl Url {
    /// Reads `sqlite:/absolute`, `sqlite:relative`, `postgres://...` or `postgresql://...`.
    ///
    /// # Errors
    /// [`OpenError::BadUrl`].
    pub fn parse(text: &str) -> Result<Self, OpenError> {
        let bad = |reason: &str| Err(OpenError::BadUrl { reason: reason.to_owned() });
        if let Some(path) = text.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => bad("no file is named after `sqlite:`"),
                ":memory:" => bad("a database in memory would lose what was acknowledged"),
                path => Ok(Self::sqlite(PathBuf::from(path))),
            };
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self(Target::Postgres(SecretString::from(text))));
        }
        bad("it begins neither with `sqlite:` nor with `postgres://`")
    }

    /// An SQLite file.
    pub fn sqlite(path: PathBuf) -> Self {
        Self(Target::Sqlite(path))
    }

    /// Which engine it names.
    pub fn engine(&self) -> Engine {
        match self.0 {
            Target::Sqlite(_) => Engine::Sqlite,
            Target::Postgres(_) => Engine::Postgres,
        }
    }

    /// Whether a password is in it.
    pub fn has_password(&self) -> bool {
        matches!(&self.0, Target::Postgres(url) if !passwords(url.expose_secret()).is_empty())
    }

    pub(super) fn target(&self) -> &Target {
        &self.0
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Target::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Target::Postgres(url) => f.write_str(&masked(url.expose_secret())),
        }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Url({self})")
    }
}

/// How the database is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Threads with a reading connection (PostgreSQL: with any connection).
    pub connections: usize,
    /// Migrate now instead of refusing pending migrations (always so on SQLite).
    pub migrate: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { connections: 2, migrate: false }
    }
}

/// The passwords in a PostgreSQL URL: after the user's name, and in a `password` parameter.
fn passwords(url: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    // A password may itself contain `/` or `?` where its writer forgot to escape it: go by the last `@`.
    if let Some((userinfo, _)) = rest.rsplit_once('@') {
        found.extend(userinfo.split_once(':').map(|(_, password)| password));
    }
    let parameters = rest.split_once('?').map_or("", |(_, parameters)| parameters);
    found.extend(parameters.split('&').filter_map(|pair| pair.strip_prefix("password=")));
    found.retain(|password| !password.is_empty());
    found
}

fn masked(url: &str) -> String {
    scrubbed(url, url)
}

/// `text` without the passwords of `url`.
fn scrubbed(text: &str, url: &str) -> String {
    passwords(url).into_iter().fold(text.to_owned(), |text, password| text.replace(password, "***"))
}

/// A PostgreSQL connection for jobs. The limits keep a lost server from holding a thread for long. A role or
/// database that is set to acknowledge commits before they are durable is overruled.
pub(super) fn postgres(url: &SecretString) -> Result<Conn, String> {
    let mut conn = postgres_bare(url)?;
    conn.batch_execute(
        "SET statement_timeout = '10s'; SET lock_timeout = '5s'; SET client_min_messages = error;
         SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
    )
    .map_err(|error| scrubbed(&error.to_string(), url.expose_secret()))?;
    Ok(Conn::Postgres(conn))
}

/// A PostgreSQL connection without statement limits, for migrations.
pub(super) fn postgres_bare(url: &SecretString) -> Result<PgConnection, String> {
    let url = url.expose_secret();
    let problem = |text: String| scrubbed(text.trim_end(), url);
    let mut conn = PgConnection::establish(&with_limits(url)).map_err(|error| problem(error.to_string()))?;
    // The statements here are written for this level, whatever the role's or the database's default is.
    conn.batch_execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED")
        .map_err(|error| problem(error.to_string()))?;
    Ok(conn)
}

/// A connection to another program's database. One that only can be read will do.
pub(super) fn postgres_foreign(url: &SecretString) -> Result<PgConnection, String> {
    let url = url.expose_secret();
    let mut anywhere = url.to_owned();
    if !url.contains("target_session_attrs=") {
        anywhere.extend([if url.contains('?') { "&" } else { "?" }, "target_session_attrs=any"]);
    }
    PgConnection::establish(&with_limits(&anywhere))
        .map_err(|error| scrubbed(error.to_string().trim_end(), url))
}

/// The URL with timeouts, unless its writer has chosen them: for connecting, for what was sent and is not
/// acknowledged, and for a server that is gone while an answer is awaited.
fn with_limits(url: &str) -> String {
    let mut url = url.to_owned();
    for (name, value) in [
        ("connect_timeout", "2"),
        ("tcp_user_timeout", "5000"),
        ("keepalives_idle", "5"),
        ("keepalives_interval", "2"),
        ("keepalives_count", "3"),
        // After a failover the old primary may be back as a standby.
        ("target_session_attrs", "read-write"),
        ("application_name", "lacre"),
    ] {
        if !url.contains(&format!("{name}=")) {
            url.push(if url.contains('?') { '&' } else { '?' });
            url.extend([name, "=", value]);
        }
    }
    url
}

/// The path in the form that SQLite cannot take for one of its special names.
pub(super) fn sqlite_name(path: &Path) -> Result<String, OpenError> {
    let absolute = std::path::absolute(path).map_err(|error| unreachable(error.to_string()))?;
    absolute.into_os_string().into_string().map_err(|_| unreachable("the path is not UTF-8".to_owned()))
}

pub(super) fn unreachable(reason: String) -> OpenError {
    OpenError::Unreachable { reason }
}

/// Whether the driver's message (for errors without a kind of their own) says that the database does
/// not answer now, as opposed to: the statement is wrong.
pub(super) fn is_outage(message: &str) -> bool {
    const SIGNS: [&str; 20] = [
        // SQLite
        "database is locked",
        "database table is locked",
        "disk I/O error",
        "database or disk is full",
        "unable to open database file",
        "attempt to write a readonly database",
        "cannot rollback - no transaction is active",
        "cannot commit - no transaction is active",
        "no such savepoint",
        // PostgreSQL
        "server closed the connection",
        "terminating connection",
        "no connection to the server",
        "connection not open",
        "could not receive data from server",
        "could not send data to server",
        "the database system is",
        "deadlock detected",
        "canceling statement due to",
        "No space left on device",
        "too many clients",
    ];
    SIGNS.iter().any(|sign| message.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::{Engine, Url, scrubbed, with_limits};

    #[test]
    fn a_url_names_its_engine_or_is_refused() {
        for (text, engine) in [
            ("sqlite:/var/lib/lacre/db", Some(Engine::Sqlite)),
            ("sqlite:lacre.db", Some(Engine::Sqlite)),
            ("postgres://lacre@localhost/lacre", Some(Engine::Postgres)),
            ("postgresql:///lacre?host=/run/postgresql", Some(Engine::Postgres)),
            ("sqlite:", None),
            ("sqlite::memory:", None),
            ("mysql://x", None),
            ("", None),
        ] {
            assert_eq!(Url::parse(text).ok().map(|url| url.engine()), engine, "{text}");
        }
    }

    #[test]
    fn a_password_is_masked_wherever_it_stands() {
        for url in [
            "postgres://lacre:s3cret@db/lacre",
            "postgres://lacre:s3cret@a:1,b:2/lacre?target_session_attrs=read-write",
            "postgres://lacre@db/lacre?password=s3cret&sslmode=require",
            "postgres://lacre:s3cret/with?marks@db/lacre",
        ] {
            let url = Url::parse(url).unwrap();
            assert!(!url.to_string().contains("s3cret"), "{url}");
            assert!(!format!("{url:?}").contains("s3cret"));
            assert!(url.has_password());
        }
        assert!(!Url::parse("postgres://lacre@db/lacre?sslmode=require").unwrap().has_password());
        let url = "postgres://lacre:s3cret@db/lacre";
        assert_eq!(scrubbed("invalid port in \"s3cret@db\"", url), "invalid port in \"***@db\"");
    }

    #[test]
    fn the_writer_of_a_url_may_choose_its_timeouts() {
        let url = with_limits("postgres://db/lacre?connect_timeout=9");

        assert!(url.contains("connect_timeout=9&tcp_user_timeout=5000"), "{url}");
        assert!(with_limits("postgres://db/lacre").contains("lacre?connect_timeout=2&"));
    }
}
