//! What one piece of work at a time does, among all daemons that share a database.
//!
//! Within a daemon a mutex says whose turn it is. Among daemons on PostgreSQL, the row of the thing's
//! name in `turns` is locked by a transaction on a connection of its own: a daemon that dies gives its
//! turn back when its connection ends, and nothing has to expire first.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use diesel::PgConnection;
use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};
use secrecy::SecretString;
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};
use tokio::time::timeout_at;

use super::lanes::spawn;
use super::schema::turns;
use super::{DbError, connect};

/// How long somebody waits for a turn: as long as the device is given to make a key, by default.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(100);
/// How often the connection of a turn says that it is in use; the server ends one that is silent for a minute.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// A turn; it ends when this is dropped.
#[must_use = "the turn ends when it is dropped"]
pub struct Turn {
    /// Ends first: who is next in this daemon finds the row free.
    _end: Option<mpsc::Sender<()>>,
    _here: OwnedMutexGuard<()>,
}

/// What one daemon at a time does. The names are rows of `turns`.
#[derive(Clone, Copy, Debug)]
pub enum Name {
    /// Making keys on the token: two daemons that make the same planned key would make two objects
    /// of one id, and neither could be used.
    DeviceKeys,
    /// Advancing the roll-back anchor's counter: its record and its step belong together.
    Anchor,
}

impl Name {
    const fn what(self) -> &'static str {
        match self {
            Self::DeviceKeys => "making keys on the token",
            Self::Anchor => "advancing the roll-back anchor",
        }
    }

    const fn row(self) -> &'static str {
        match self {
            Self::DeviceKeys => "device-keys",
            Self::Anchor => "anchor",
        }
    }
}

/// Whose turn it is in this daemon, for each name.
#[derive(Default)]
pub(super) struct Turns {
    device_keys: Arc<Mutex<()>>,
    anchor: Arc<Mutex<()>>,
}

impl Turns {
    /// Waits for the turn in this daemon and then, with a `server`, among all daemons on it.
    pub(super) async fn take(&self, name: Name, server: Option<&SecretString>) -> Result<Turn, DbError> {
        let until = Instant::now() + PATIENCE;
        let place = match name {
            Name::DeviceKeys => &self.device_keys,
            Name::Anchor => &self.anchor,
        };
        let here = timeout_at(until.into(), Arc::clone(place).lock_owned()).await;
        let here = here.map_err(|_| taken(name))?;
        let Some(url) = server.cloned() else { return Ok(Turn { _end: None, _here: here }) };
        let (granted, grant) = oneshot::channel();
        let (end, ended) = mpsc::channel();
        spawn("lacre-db-turn", move || hold(&url, name, until, granted, &ended))
            .map_err(|_| DbError::Unavailable(None))?;
        match timeout_at(until.into(), grant).await {
            Ok(answer) => answer.unwrap_or(Err(DbError::Unavailable(None)))?,
            Err(_) => return Err(taken(name)),
        }
        Ok(Turn { _end: Some(end), _here: here })
    }
}

/// Nobody gave the turn up in time.
fn taken(name: Name) -> DbError {
    let (what, patience) = (name.what(), PATIENCE.as_secs());
    tracing::warn!(what, patience, "somebody else has the turn, as long as a call hangs in the device");
    DbError::Taken(what)
}

/// Holds the row until the turn ends, or until nobody waits for it any more.
fn hold(
    url: &SecretString,
    name: Name,
    until: Instant,
    granted: oneshot::Sender<Result<(), DbError>>,
    ended: &mpsc::Receiver<()>,
) {
    let mut conn = match lock(url, name, until, || granted.is_closed()) {
        Ok(Some(conn)) => conn,
        Ok(None) => return,
        Err(error) => {
            // Who asked may have gone.
            let _ = granted.send(Err(error));
            return;
        }
    };
    if granted.send(Ok(())).is_err() {
        return;
    }
    // Nothing is ever sent: the wait ends when the turn is dropped. The connection ends with this thread,
    // and the transaction with it.
    while ended.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
        if conn.batch_execute("SELECT 1").is_err() {
            tracing::error!(what = name.what(), "the turn is lost: its database connection ended");
            return;
        }
    }
}

/// A connection inside the transaction that has the row; `None` if it did not get it in time.
fn lock(
    url: &SecretString,
    name: Name,
    until: Instant,
    given_up: impl Fn() -> bool,
) -> Result<Option<PgConnection>, DbError> {
    let mut conn = connect::postgres_bare(url).map_err(|_| DbError::Unavailable(None))?;
    // A daemon that is cut off without a word must not keep the turn for as long as TCP believes in it.
    conn.batch_execute("SET idle_in_transaction_session_timeout = '1min'; SET statement_timeout = '10s'")?;
    while Instant::now() < until && !given_up() {
        AnsiTransactionManager::begin_transaction(&mut conn)?;
        let row = turns::table.filter(turns::name.eq(name.row())).select(turns::name);
        let row: Option<String> = row.for_no_key_update().skip_locked().first(&mut conn).optional()?;
        if row.is_some() {
            return Ok(Some(conn));
        }
        AnsiTransactionManager::rollback_transaction(&mut conn)?;
        std::thread::sleep(RETRY);
    }
    Ok(None)
}
