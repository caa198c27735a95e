//! What one daemon at a time does, among all that share a PostgreSQL database.
//!
//! The row of the thing's name in `turns` is locked by a transaction on a connection of its own, so
//! a daemon that dies gives its turn back when its connection ends, and nothing has to expire first.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use diesel::PgConnection;
use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};
use secrecy::SecretString;
use tokio::sync::oneshot;

use super::lanes::spawn;
use super::schema::turns;
use super::{DbError, connect};

/// How long somebody waits for a turn. Making a key takes up to fifteen times the device's deadline.
const PATIENCE: Duration = Duration::from_secs(75);
const RETRY: Duration = Duration::from_millis(100);

/// A turn; it ends when this is dropped.
#[must_use = "the turn ends when it is dropped"]
pub struct Turn {
    _end: Option<mpsc::Sender<()>>,
}

/// What one daemon at a time does. The names are rows of `turns`.
#[derive(Clone, Copy, Debug)]
pub enum Name {
    /// Making keys on the token: two daemons that make the same planned key would make two objects
    /// of one id, and neither could be used.
    DeviceKeys,
}

impl Name {
    const fn row(self) -> &'static str {
        match self {
            Self::DeviceKeys => "device-keys",
        }
    }
}

impl Turn {
    /// The turn of the only daemon.
    pub(super) const fn alone() -> Self {
        Self { _end: None }
    }

    /// Waits for the turn on a thread with a connection of its own.
    pub(super) async fn take(url: SecretString, name: Name) -> Result<Self, DbError> {
        let (granted, grant) = oneshot::channel();
        let (end, ended) = mpsc::channel();
        spawn("lacre-db-turn", move || hold(&url, name, granted, &ended))
            .map_err(|_| DbError::Unavailable(None))?;
        grant.await.unwrap_or(Err(DbError::Unavailable(None)))?;
        Ok(Self { _end: Some(end) })
    }
}

fn hold(
    url: &SecretString,
    name: Name,
    granted: oneshot::Sender<Result<(), DbError>>,
    ended: &mpsc::Receiver<()>,
) {
    let (conn, answer) = match lock(url, name, || granted.is_closed()) {
        Ok(conn) => (Some(conn), Ok(())),
        Err(error) => (None, Err(error)),
    };
    if granted.send(answer).is_ok() && conn.is_some() {
        // Nothing is ever sent: this returns when the turn is dropped. The connection ends with this
        // thread, and the transaction with it.
        let _ = ended.recv();
    }
}

/// A connection inside the transaction that has the row.
fn lock(url: &SecretString, name: Name, given_up: impl Fn() -> bool) -> Result<PgConnection, DbError> {
    let mut conn = connect::postgres_bare(url).map_err(|_| DbError::Unavailable(None))?;
    // A daemon that is cut off without a word must not keep the turn for as long as TCP believes in it.
    conn.batch_execute("SET idle_in_transaction_session_timeout = '5min'; SET statement_timeout = '10s'")?;
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until && !given_up() {
        AnsiTransactionManager::begin_transaction(&mut conn)?;
        let row = turns::table.filter(turns::name.eq(name.row())).select(turns::name);
        let row: Option<String> = row.for_no_key_update().skip_locked().first(&mut conn).optional()?;
        if row.is_some() {
            return Ok(conn);
        }
        AnsiTransactionManager::rollback_transaction(&mut conn)?;
        std::thread::sleep(RETRY);
    }
    Err(DbError::Unavailable(None))
}
