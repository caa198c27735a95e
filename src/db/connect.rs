//! Where the database is and how a connection is made.

use std::path::PathBuf;

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
pub struct Url {}

impl Url {
    /// # Errors
    /// [`super::OpenError::BadUrl`].
    pub fn parse(text: &str) -> Result<Self, super::OpenError> {
        todo!()
    }

    /// An SQLite file.
    pub fn sqlite(path: PathBuf) -> Self {
        todo!()
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

pub(super) fn is_outage(message: &str) -> bool {
    todo!()
}
