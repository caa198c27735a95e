//! The database: SQLite inside the daemon, or PostgreSQL beside it, behind one connection type.
//!
//! [`Db::read`] and [`Db::write`] run a closure on a thread that owns a connection; a write returns
//! only after its commit is durable. On SQLite one thread writes, and the writes that wait at the
//! same time share one transaction (each in a savepoint of its own) and so one fsync. Stores are
//! plain functions on [`Conn`]; [`with_conn!`](crate::with_conn) expands one diesel expression for both engines.
//!
//! Rules for closures: a read sees a fresh snapshot per statement, not per closure. A write must not
//! swallow a statement's error and go on (PostgreSQL aborts the whole transaction): use ON CONFLICT,
//! or return the error. Waiting is bounded: after 5 s in the queue, or with 1024 jobs before it, a
//! call is refused as [`DbError::Unavailable`] and was not done.

mod connect;
mod foreign;
mod lanes;
pub mod migrate;
mod postgres;
mod queue;
pub mod schema;
mod sqlite;
mod time;
mod turn;

use std::sync::Arc;

use diesel::{PgConnection, SqliteConnection};

pub use connect::{Engine, OpenOptions, Url};
pub use foreign::Foreign;
pub use lanes::DbStatus;
pub use time::now;
pub use turn::{Name as TurnName, Turn};

/// A connection of either engine.
pub enum Conn {
    /// SQLite.
    Sqlite(SqliteConnection),
    /// PostgreSQL.
    Postgres(PgConnection),
}

/// Expands one diesel expression once per engine: `with_conn!(conn, |c| query.execute(c))`.
#[macro_export]
macro_rules! with_conn {
    ($conn:expr, |$c:ident| $body:expr) => {
        match $conn {
            $crate::db::Conn::Sqlite($c) => $body,
            $crate::db::Conn::Postgres($c) => $body,
        }
    };
}

/// Why a database call failed, sorted by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The database does not answer, is full, or is locked for too long. Nothing was written. Retry later.
    #[error("database unavailable")]
    Unavailable(#[source] Option<diesel::result::Error>),
    /// The connection broke at commit, or no answer came: written or not, nobody knows. Look before repeating.
    #[error("outcome of a write unknown")]
    Unknown(#[source] Option<diesel::result::Error>),
    /// A unique rule was broken: somebody else was first.
    #[error("a row of that key exists")]
    Duplicate,
    /// Somebody else does it, and did not end in time. Nothing was done.
    #[error("somebody else is at {0}")]
    Taken(&'static str),
    /// A row that this program cannot have written, by table and id.
    #[error("impossible row in {table}: {id}")]
    Impossible {
        /// The table.
        table: &'static str,
        /// The row's key.
        id: String,
    },
    /// The database refused a statement: a bug here, or a foreign schema.
    #[error("database refused a statement")]
    Refused(#[source] diesel::result::Error),
}

impl DbError {
    /// A row that cannot be.
    pub fn impossible(table: &'static str, id: &str) -> Self {
        Self::Impossible { table, id: id.to_owned() }
    }
}

impl DbError {
    /// A short name: `storage-failed` and `busy` if nothing was written and the same call may succeed later,
    /// else `storage-error`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "storage-failed",
            Self::Taken(_) => "busy",
            Self::Unknown(_) | Self::Duplicate | Self::Impossible { .. } | Self::Refused(_) => {
                "storage-error"
            }
        }
    }
}

impl From<diesel::result::Error> for DbError {
    fn from(error: diesel::result::Error) -> Self {
        use diesel::result::{DatabaseErrorKind as Kind, Error};
        match error {
            Error::DatabaseError(Kind::UniqueViolation, _) => Self::Duplicate,
            Error::RollbackErrorOnCommit { commit_error, .. } => Self::from(*commit_error),
            Error::DatabaseError(
                Kind::ClosedConnection | Kind::SerializationFailure | Kind::ReadOnlyTransaction,
                _,
            )
            | Error::BrokenTransactionManager => Self::Unavailable(Some(error)),
            Error::DatabaseError(Kind::Unknown, ref info) if connect::is_outage(info.message()) => {
                Self::Unavailable(Some(error))
            }
            other => Self::Refused(other),
        }
    }
}

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    lanes: Arc<lanes::Lanes>,
}

impl Db {
    /// Opens the database, takes the single-daemon lock on SQLite, and checks the schema: SQLite is
    /// migrated at once, PostgreSQL only by `lacre db migrate`.
    ///
    /// # Errors
    /// [`OpenError`] says what to do.
    pub fn open(url: &Url, options: &OpenOptions) -> Result<Self, OpenError> {
        Ok(Self { lanes: Arc::new(lanes::Lanes::open(url, options)?) })
    }

    /// Runs `query` on a reading connection.
    ///
    /// # Errors
    /// What `query` returns, or [`DbError::Unavailable`].
    pub async fn read<T, E, F>(&self, query: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
        F: FnOnce(&mut Conn) -> Result<T, E> + Send + 'static,
    {
        self.lanes.read(query).await
    }

    /// Runs `work` in a write transaction and returns after the commit is durable. An error from
    /// `work` rolls its changes back and nothing else.
    ///
    /// # Errors
    /// What `work` returns, [`DbError::Unavailable`], or [`DbError::Unknown`] if the commit broke.
    pub async fn write<T, E, F>(&self, work: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
        F: FnOnce(&mut Conn) -> Result<T, E> + Send + 'static,
    {
        self.lanes.write(work).await
    }

    /// Waits for the turn to do what may be done once at a time only, in this daemon and in all others on
    /// this database, for at most 30 s. Not for what may not happen twice at all: a daemon that is cut
    /// off from the database loses its turn after a minute.
    ///
    /// # Errors
    /// [`DbError::Taken`] if somebody does not end their turn; [`DbError::Unavailable`].
    pub async fn turn(&self, name: TurnName) -> Result<Turn, DbError> {
        self.lanes.turn(name).await
    }

    /// What is wrong with the schema now: another program may have migrated it since it was opened. `None`
    /// also if the database does not answer, which [`Db::status`] tells.
    pub async fn schema_problem(&self) -> Option<String> {
        // An SQLite file has one daemon, and `lacre db migrate` refuses while it has it open.
        if self.engine() == Engine::Sqlite {
            return None;
        }
        let look = |conn: &mut Conn| Ok::<_, DbError>(migrate::pending(conn).err());
        match self.read(look).await {
            Ok(Some(problem @ OpenError::NewerSchema { .. })) => Some(problem.to_string()),
            _ => None,
        }
    }

    /// Which engine, and whether it answers.
    pub fn status(&self) -> DbStatus {
        self.lanes.status()
    }

    /// Which engine.
    pub fn engine(&self) -> Engine {
        self.lanes.engine()
    }

    /// Waits for queued work and closes the connections.
    pub fn close(&self) {
        self.lanes.close();
    }
}

/// Why the database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon has this SQLite file open.
    #[error("another daemon is using {path} (its lock is held)")]
    InUse {
        /// The database file.
        path: String,
    },
    /// The schema was made by a newer version of this program.
    #[error(
        "the database has migration {found}, which this version does not know: it was made by a newer lacre"
    )]
    NewerSchema {
        /// The unknown migration.
        found: String,
    },
    /// Migrations are pending, and this engine is migrated by hand only.
    #[error("{count} migration(s) pending: run `lacre db migrate`")]
    MigrationsPending {
        /// How many.
        count: usize,
    },
    /// The file is not a database of this program.
    #[error("{path} is not a lacre database: {reason}")]
    Foreign {
        /// The database file.
        path: String,
        /// What it looks like.
        reason: String,
    },
    /// The file or server cannot be reached.
    #[error("cannot open the database: {reason}")]
    Unreachable {
        /// What the driver said, without the password of the URL.
        reason: String,
    },
    /// The URL is not understood.
    #[error("not a database URL: {reason}")]
    BadUrl {
        /// What is wrong with it.
        reason: String,
    },
}
