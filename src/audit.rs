//! The audit trail: intent, work, outcome.
//!
//! [`AuditLog::around`] makes the intent durable before the work starts and refuses to go on if it
//! cannot within its deadline; the outcome follows. No secret value leaves and no signature is made
//! outside of it. Records are one JSON line each (`docs/formats/audit-v1.md`), numbered without gaps
//! and chained: each names the SHA-256 of the line before it. Requests that wait at the same time
//! share one database transaction. Nothing secret enters a record: details are names and numbers.

mod append;
mod model;
mod pending;
mod record;
mod recover;
mod refusals;
mod store;
mod verify;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::db::{Conn, Db, DbError};
use crate::identity::{Caller, MissingScope, Principal, Scope};
use crate::ids::TenantId;

use append::Appender;
use record::Subject;

pub use model::{Action, Event, Note, Outcome, Record};
pub use pending::Pending;
pub use refusals::Refusals;
pub use verify::{BadReason, BadRecord, Checkpoint, verify, verify_against};

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
    /// The records of all tenants are for local users of the daemon's host.
    #[error("the records of all tenants are served on the Unix socket only")]
    NotLocal,
}

/// An error's short name in the outcome record: stable, lower case, no data in it.
pub trait AuditCode {
    /// The name, such as `not-found` or `device-unavailable`.
    fn audit_code(&self) -> &'static str;

    /// Whether it is not known how far the work came: the device or the database did not say.
    fn is_unknown(&self) -> bool {
        false
    }

    /// The outcome that the error makes: a failure, unless it is a refusal or nobody knows.
    fn audit_outcome(&self) -> Outcome {
        match self.audit_code() {
            _ if self.is_unknown() => Outcome::Unknown,
            "forbidden" => Outcome::Denied("forbidden"),
            code => Outcome::Failure(code),
        }
    }
}

/// Appends to the log and reads it. Cheap to clone.
#[derive(Clone)]
pub struct AuditLog {
    db: Db,
    clock: Arc<dyn Clock>,
    appender: Appender,
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
    /// Opens the log, starts its appender task (needs a tokio runtime) and, on SQLite, closes intents
    /// that a crash left without outcome as `unknown`. On PostgreSQL another daemon may be working on
    /// them still, so there they stay open; to a reader an intent without outcome means `unknown`.
    ///
    /// # Errors
    /// If the database cannot be read or written.
    pub async fn open(db: Db, clock: Arc<dyn Clock>, options: Options) -> Result<Self, AuditError> {
        let settled = recover::close_unfinished(&db, clock.now()).await?;
        let appender = Appender::start(db.clone(), Arc::clone(&clock), options.deadline, settled);
        Ok(Self { db, clock, appender })
    }

    /// Whether the log takes no records now, so that work is refused.
    pub fn is_refusing(&self) -> bool {
        self.appender.is_refusing()
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
        Pending::begin(&self.appender, &self.clock, caller, &event).await?.run(work).await
    }

    /// The parts of one request, each with an intent of its own: all of them are durable when this
    /// returns, with as many waits for the disk as one takes.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] if one of them is not durable in time: then none is to be started.
    pub async fn begin_all(
        &self,
        caller: &Caller,
        events: impl IntoIterator<Item = Event>,
    ) -> Result<Vec<Pending>, AuditError> {
        let begin = |event| async move { Pending::begin(&self.appender, &self.clock, caller, &event).await };
        futures_util::future::try_join_all(events.into_iter().map(begin)).await
    }

    /// Records something that has already happened or was refused, as one durable record.
    ///
    /// # Errors
    /// [`AuditError::Unavailable`] if it could not be made durable in time.
    pub async fn record(&self, caller: &Caller, event: Event, outcome: Outcome) -> Result<(), AuditError> {
        let draft = Subject::new(caller, &event).event(self.clock.now(), outcome, &event.details);
        self.appender.append(draft).await
    }

    /// Records a refusal or a read of metadata: queued and written soon, but nothing waits for it.
    pub fn record_soon(&self, caller: &Caller, event: Event, outcome: Outcome) {
        let draft = Subject::new(caller, &event).event(self.clock.now(), outcome, &event.details);
        self.appender.push(draft);
    }

    /// Records of the caller's tenant with a number above `after`, oldest first, at most `limit`.
    /// The daemon's own events belong to the tenant it names as caller.
    ///
    /// # Errors
    /// [`AuditError::Forbidden`] without `audit:read`.
    pub async fn events(&self, caller: &Caller, after: u64, limit: u32) -> Result<Vec<Record>, AuditError> {
        self.may_read(caller, true)?;
        self.read(caller, Some(caller.tenant.clone()), after, limit).await
    }

    /// All tenants' records with a number above `after`: the whole chain, for [`verify`]. For the
    /// operator on the daemon's host only (the daemon itself or a local user).
    ///
    /// # Errors
    /// [`AuditError::NotLocal`] for everybody else, [`AuditError::Forbidden`] without `audit:read`.
    pub async fn export(&self, caller: &Caller, after: u64, limit: u32) -> Result<Vec<Record>, AuditError> {
        self.may_read(caller, matches!(caller.principal, Principal::System(_) | Principal::LocalUser(_)))?;
        self.read(caller, None, after, limit).await
    }

    /// The end of the chain now: note it elsewhere, and a later [`verify_against`] shows a cut-off tail.
    ///
    /// # Errors
    /// [`AuditError::Read`] if the database cannot be read.
    pub async fn head(&self) -> Result<Checkpoint, AuditError> {
        Ok(self.db.read(store::head).await?)
    }

    /// A tenant's last record of the roll-back anchor, for the daemon itself.
    ///
    /// # Errors
    /// [`AuditError::Read`] if the database cannot be read.
    pub async fn last_of_anchor(&self, tenant: &TenantId) -> Result<Option<Record>, AuditError> {
        let tenant = tenant.clone();
        Ok(self.db.read(move |conn| store::last_of_anchor(conn, tenant.as_str())).await?)
    }

    /// The hash of the record with that number, `None` if it is not there. 0 is before the first.
    ///
    /// # Errors
    /// [`AuditError::Read`] if the database cannot be read.
    pub async fn hash_at(&self, seq: u64) -> Result<Option<[u8; 32]>, AuditError> {
        Ok(self.db.read(move |conn| store::hash_at(conn, seq)).await?)
    }

    /// Stops taking records and waits until all accepted ones are durable.
    pub async fn close(&self) {
        self.appender.close().await;
    }

    fn may_read(&self, caller: &Caller, is_admitted: bool) -> Result<(), AuditError> {
        let refused = match caller.require(Scope::AuditRead) {
            Ok(()) if is_admitted => return Ok(()),
            Ok(()) => AuditError::NotLocal,
            Err(missing) => missing.into(),
        };
        let event = Event::new(Action::AuditRead, "audit-log", "");
        self.record_soon(caller, event, Outcome::Denied("forbidden"));
        Err(refused)
    }

    async fn read(
        &self,
        caller: &Caller,
        tenant: Option<TenantId>,
        after: u64,
        limit: u32,
    ) -> Result<Vec<Record>, AuditError> {
        let range = if tenant.is_some() { "tenant" } else { "all" };
        let page =
            move |conn: &mut Conn| store::page(conn, tenant.as_ref().map(TenantId::as_str), after, limit);
        let records = self.db.read(page).await?;
        // A follower would otherwise get the record of its own last call for ever.
        if records.iter().any(|(action, _)| action != Action::AuditRead.name()) {
            let event = Event::new(Action::AuditRead, "audit-log", range)
                .detail("after", after.to_string())
                .detail("count", records.len().to_string());
            self.record_soon(caller, event, Outcome::Success);
        }
        Ok(records.into_iter().map(|(_, record)| record).collect())
    }
}
