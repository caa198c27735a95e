//! The audit trail: intent, work, outcome.
//!
//! [`AuditLog::around`] makes the intent durable before the work starts and refuses to go on if it
//! cannot within its deadline; the outcome follows. No secret value leaves and no signature is made
//! outside of it. Records are one JSON line each (`docs/formats/audit-v1.md`), numbered without gaps
//! and chained: each names the SHA-256 of the line before it. Requests that wait at the same time
//! share one database transaction. Nothing secret enters a record: details are names and numbers.

mod append;
mod model;
mod store;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope};

pub use model::{Action, Event, Note, Outcome, Record};

/// Why the audit log refused.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The record could not be made durable in time, so the work was not started. Retry later.
    #[error("the audit log cannot take the record")]
    Unavailable,
    /// The log could not be read.
    #[error("the audit log cannot be read")]
    Read(#[from] DbError),
    /// The caller may not read the log.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
}

/// An error's short name in the outcome record: stable, lower case, no data in it.
pub trait AuditCode {
    /// The name, such as `not-found` or `device-unavailable`.
    fn audit_code(&self) -> &'static str;
}

/// Appends to the log and reads it. Cheap to clone.
#[derive(Clone)]
pub struct AuditLog {
    db: Db,
    clock: Arc<dyn Clock>,
    appender: append::Appender,
}

/// How the log behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long an intent may take to become durable before the work is refused.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        // AU-4: fail closed within 2 s, never hang.
        Self { deadline: Duration::from_secs(2) }
    }
}

impl AuditLog {
    /// Opens the log, starts its appender task (needs a tokio runtime) and closes intents that a
    /// crash left without outcome as `unknown`.
    ///
    /// # Errors
    /// If the database cannot be read or written.
    pub async fn open(db: Db, clock: Arc<dyn Clock>, options: Options) -> Result<Self, AuditError> {
        todo!()
    }

    /// Runs `work` between a durable intent and its outcome. `work` adds what it learns (a new id,
    /// a version) to the [`Note`]. If the caller goes away in the middle, the outcome is `unknown`.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] before the work was started, else what `work` returns.
    pub async fn around<T, E, F, Fut>(&self, caller: &Caller, event: Event, work: F) -> Result<T, E>
    where
        E: From<AuditError> + AuditCode,
        F: FnOnce(Note) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        todo!()
    }

    /// Records something that has already happened or was refused, as one durable record.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] if it could not be made durable in time.
    pub async fn record(&self, caller: &Caller, event: Event, outcome: Outcome) -> Result<(), AuditError> {
        todo!()
    }

    /// Records of the caller's tenant (and, for system events, of the daemon) with a number above
    /// `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`AuditError::Forbidden`] without `audit:read`.
    pub async fn events(&self, caller: &Caller, after: u64, limit: u32) -> Result<Vec<Record>, AuditError> {
        todo!()
    }

    /// Stops taking records and waits until all accepted ones are durable.
    pub async fn close(&self) {
        todo!()
    }
}
