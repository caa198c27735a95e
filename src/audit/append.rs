//! The appender: one task that turns queued drafts into chained rows, a batch per transaction.
//!
//! While one batch commits, the next one collects in the queue, so concurrent requests share an
//! fsync. Whoever waits for a record learns that it is durable, or that it is not there. A record
//! that nobody waits for (an outcome) is kept over an outage and written when the database is back,
//! with one `audit.outage` record that says what was refused meanwhile.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::audit::model::{Action, Event, Outcome};
use crate::audit::record::{ClosedBy, Draft, Kind, Subject};
use crate::audit::{AuditError, store};
use crate::clock::{Clock, Timestamp};
use crate::db::{Conn, Db, DbError, Engine};
use crate::identity::Caller;
use crate::ids::TenantId;

const OUTAGE: &str = Action::AuditOutage.name();
const QUEUE: usize = 4096;
const BATCH: usize = 512;
/// Outcomes kept over an outage; at a few hundred bytes each.
const BACKLOG: usize = 8192;
/// How often an idle appender tries again to write what it kept.
const RETRY: Duration = Duration::from_millis(250);
/// How long a batch may take to get its turn to write: less than the database's threads give it.
const WRITE: Duration = Duration::from_secs(20);
/// How long an orderly end waits for a database that does not answer.
const CLOSE: Duration = Duration::from_secs(10);
/// How many records may pass before the start point of the next recovery is moved.
const SETTLE_EVERY: u64 = 1024;

/// Tells the waiter that its record is durable; dropped if it is not.
type Waiter = oneshot::Sender<()>;

enum Message {
    Append(Draft, Option<Waiter>),
    Close,
}

/// The task's address.
#[derive(Clone)]
pub(super) struct Appender {
    queue: mpsc::Sender<Message>,
    done: watch::Receiver<bool>,
    deadline: Duration,
    refusing: Arc<AtomicBool>,
    /// Held by everyone with this address and by every record that waits for room.
    waiting: Arc<()>,
}

impl Appender {
    /// Starts the task. Every intent up to `settled` has its outcome.
    pub(super) fn start(db: Db, clock: Arc<dyn Clock>, deadline: Duration, settled: u64) -> Self {
        let (queue, messages) = mpsc::channel(QUEUE);
        let (finished, done) = watch::channel(false);
        let refusing = Arc::new(AtomicBool::new(false));
        let task = Task {
            // Several daemons may write to PostgreSQL, and each knows its own intents only.
            open: (db.engine() == Engine::Sqlite).then(HashMap::new),
            db,
            clock,
            messages,
            deadline,
            head: settled,
            settled,
            backlog: Vec::new(),
            doubt: None,
            outage: None,
            refusing: Arc::clone(&refusing),
        };
        tokio::spawn(async move {
            task.run().await;
            let _ = finished.send(true);
        });
        Self { queue, done, deadline, refusing, waiting: Arc::default() }
    }

    /// Appends and waits until the record is durable, at most for the deadline.
    pub(super) async fn append(&self, draft: Draft) -> Result<(), AuditError> {
        let (waiter, answer) = oneshot::channel();
        let sent = async {
            self.offer(draft, waiter).await?;
            answer.await.map_err(|_| AuditError::Unavailable)
        };
        timeout(self.deadline, sent).await.map_err(|_| AuditError::Unavailable)?
    }

    /// Queues a record whose waiter is told when it is durable.
    pub(super) async fn offer(&self, draft: Draft, waiter: Waiter) -> Result<(), AuditError> {
        let message = Message::Append(draft, Some(waiter));
        self.queue.send(message).await.map_err(|_| AuditError::Unavailable)
    }

    /// Queues a record that nobody waits for. Where there is no room, a task waits for it: the caller may go
    /// away, and the record stays due. A queue that is closed takes none; a restart closes the intent then.
    pub(super) fn push(&self, draft: Draft) {
        let Err(TrySendError::Full(message)) = self.queue.try_send(Message::Append(draft, None)) else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if Arc::strong_count(&self.waiting) > BACKLOG {
            tracing::error!("an audit record that nobody waits for is lost: too many wait for the database");
            return;
        }
        let (queue, waiting) = (self.queue.clone(), Arc::clone(&self.waiting));
        runtime.spawn(async move {
            // It fails only if the log was closed meanwhile.
            let _ = queue.send(message).await;
            drop(waiting);
        });
    }

    /// Whether the last attempt to write failed. A log that nobody writes to stays as it was found.
    pub(super) fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Relaxed)
    }

    pub(super) const fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Takes no more records and waits until the queued ones are written, for 10 s at most.
    pub(super) async fn close(&self) {
        // A send that fails means that somebody else closed it; then only the wait is left.
        let closed = async {
            let _ = self.queue.send(Message::Close).await;
            let _ = self.done.clone().wait_for(|done| *done).await;
        };
        if timeout(CLOSE, closed).await.is_err() {
            tracing::warn!("the database takes no audit records; outcomes that are due are lost");
        }
    }
}

struct Task {
    db: Db,
    clock: Arc<dyn Clock>,
    messages: mpsc::Receiver<Message>,
    deadline: Duration,
    /// Written intents without outcome, by number; `None` where other daemons write too.
    open: Option<HashMap<Uuid, u64>>,
    /// The last number this task wrote.
    head: u64,
    /// Where the next recovery starts, as the database has it.
    settled: u64,
    /// What nobody waits for and could not be written yet.
    backlog: Vec<Draft>,
    /// What a broken commit may have written.
    doubt: Option<Doubt>,
    outage: Option<Outage>,
    /// Whether there is an outage, for whoever asks from outside.
    refusing: Arc<AtomicBool>,
}

#[derive(Clone)]
struct Doubt {
    since: u64,
    drafts: Vec<Draft>,
}

struct Outage {
    since: Timestamp,
    tenant: TenantId,
    refused: u64,
    lost: u64,
}

/// What one transaction writes.
#[derive(Clone)]
struct Batch {
    doubt: Option<Doubt>,
    drafts: Vec<Draft>,
    settled: Option<u64>,
    now: Timestamp,
    /// Later than this nothing is written: whoever waited has been told that it is in doubt, and somebody
    /// else may have looked.
    until: Instant,
}

impl Task {
    async fn run(mut self) {
        let mut received = Vec::with_capacity(BATCH);
        loop {
            let waiting = self.messages.recv_many(&mut received, BATCH);
            let idle = self.backlog.is_empty() && self.doubt.is_none() && self.outage.is_none();
            let count = if idle {
                waiting.await
            } else {
                // A closed queue answers 0 at once; a quiet one is left for another attempt.
                timeout(RETRY, waiting).await.unwrap_or(usize::MAX)
            };
            if count == 0 {
                break;
            }
            self.commit(received.drain(..)).await;
        }
        self.flush().await;
    }

    /// After the last message: whatever is left, and a start point that spares the next recovery a scan.
    async fn flush(&mut self) {
        let end = Instant::now() + self.deadline;
        while (!self.backlog.is_empty() || self.doubt.is_some()) && Instant::now() < end {
            if !self.commit(std::iter::empty()).await {
                tokio::time::sleep(RETRY.min(self.deadline)).await;
            }
        }
        if let Some(settled) = self.settles(1) {
            // If it fails, the next start reads a few records more.
            let _ = self.db.write(move |conn| store::set_settled(conn, settled)).await;
        }
    }

    /// Writes the backlog and the messages in one transaction; whether that worked.
    async fn commit(&mut self, messages: impl Iterator<Item = Message>) -> bool {
        let now = self.clock.now();
        let mut drafts = std::mem::take(&mut self.backlog);
        drafts.extend(self.outage.as_ref().map(|outage| outage.draft(now)));
        let mut waiters = Vec::with_capacity(BATCH);
        waiters.resize_with(drafts.len(), || None);
        for message in messages {
            match message {
                Message::Close => self.messages.close(),
                // The request has given up already and its work will not start: nothing to record.
                Message::Append(_, Some(waiter)) if waiter.is_closed() => {}
                Message::Append(draft, waiter) => {
                    drafts.push(draft);
                    waiters.push(waiter);
                }
            }
        }
        if drafts.is_empty() && self.doubt.is_none() {
            return true;
        }
        let until = Instant::now() + WRITE;
        let batch =
            Batch { doubt: self.doubt.clone(), drafts, settled: self.settles(SETTLE_EVERY), now, until };
        let batch = Arc::new(batch);
        let shared = Arc::clone(&batch);
        let written = self.db.write(move |conn| shared.write(conn)).await;
        let batch = Arc::try_unwrap(batch).unwrap_or_else(|shared| (*shared).clone());
        match written {
            Ok(seqs) => self.written(&batch, &seqs, waiters),
            Err(error) => {
                self.failed(batch, &waiters, &error);
                return false;
            }
        }
        true
    }

    fn written(&mut self, batch: &Batch, seqs: &[u64], waiters: Vec<Option<Waiter>>) {
        self.doubt = None;
        self.outage = None;
        self.refusing.store(false, Ordering::Relaxed);
        self.settled = batch.settled.unwrap_or(self.settled);
        self.head = seqs.last().copied().unwrap_or(self.head);
        for ((draft, seq), waiter) in batch.drafts.iter().zip(seqs).zip(waiters) {
            if let Some(open) = &mut self.open {
                match draft.kind {
                    Kind::Intent => drop(open.insert(draft.id, *seq)),
                    Kind::Outcome => drop(open.remove(&draft.id)),
                    Kind::Event => {}
                }
            }
            // Gave up between queue and commit: the work will not start, and the log says so.
            if waiter.is_some_and(|waiter| waiter.send(()).is_err()) {
                self.backlog.extend(draft.closed(ClosedBy::Deadline, batch.now));
            }
        }
    }

    fn failed(&mut self, batch: Batch, waiters: &[Option<Waiter>], error: &DbError) {
        if self.outage.is_none() {
            tracing::error!(error = %error, "the audit log cannot be written; refusing work");
        }
        let mut known = batch.drafts.iter().chain(self.doubt.iter().flat_map(|doubt| &doubt.drafts));
        let Some(tenant) = known.next().map(|draft| draft.tenant.clone()) else { return };
        let outage = self.outage.get_or_insert(Outage { since: batch.now, tenant, refused: 0, lost: 0 });
        outage.refused += waiters.iter().flatten().count() as u64;
        self.refusing.store(true, Ordering::Relaxed);
        if matches!(error, DbError::Unknown(_)) {
            // Outcomes and intents alike: the next commit looks which of them are there.
            let doubt = self.doubt.get_or_insert(Doubt { since: self.head, drafts: Vec::new() });
            doubt.drafts.extend(batch.drafts.into_iter().filter(|draft| draft.action != OUTAGE));
            return;
        }
        let unwaited = batch.drafts.into_iter().zip(waiters).filter(|(_, waiter)| waiter.is_none());
        for (draft, _) in unwaited.filter(|(draft, _)| draft.action != OUTAGE) {
            if self.backlog.len() < BACKLOG {
                self.backlog.push(draft);
            } else {
                outage.lost += 1;
            }
        }
    }

    /// The number up to which all intents have their outcome, if it is `step` beyond the stored one.
    fn settles(&self, step: u64) -> Option<u64> {
        if self.head < self.settled.saturating_add(step) {
            return None;
        }
        let oldest = self.open.as_ref()?.values().min();
        let settled = oldest.map_or(self.head, |oldest| oldest - 1);
        (self.doubt.is_none() && settled >= self.settled.saturating_add(step)).then_some(settled)
    }
}

impl Outage {
    fn draft(&self, now: Timestamp) -> Draft {
        let caller = Caller::system("audit", self.tenant.clone());
        let event = Event::new(Action::AuditOutage, "audit-log", "")
            .detail("since", self.since.to_rfc3339())
            .detail("refused", self.refused.to_string())
            .detail("lost", self.lost.to_string());
        Subject::new(&caller, &event).event(now, Outcome::Failure("storage-failed"), &event.details)
    }
}

impl Batch {
    /// Returns the numbers of `drafts`.
    fn write(&self, conn: &mut Conn) -> Result<Vec<u64>, DbError> {
        let head = store::lock_head(conn)?;
        // From here on whoever resolves a doubt about this batch waits for its end.
        if Instant::now() > self.until {
            return Err(DbError::Unavailable(None));
        }
        let found = self.resolve(conn)?;
        let mut seqs = store::append(conn, head, found.iter().chain(&self.drafts))?;
        if let Some(settled) = self.settled {
            store::set_settled(conn, settled)?;
        }
        Ok(seqs.split_off(found.len()))
    }

    /// What a broken commit leaves to be written: outcomes that are not there, and for intents that
    /// are there although their requests were refused, that nothing was started.
    fn resolve(&self, conn: &mut Conn) -> Result<Vec<Draft>, DbError> {
        let Some(doubt) = &self.doubt else { return Ok(Vec::new()) };
        let there = store::steps_since(conn, doubt.since, &doubt.drafts)?;
        let left = doubt.drafts.iter().filter_map(|draft| {
            let has = |kind| there.contains(&(kind, draft.id));
            match draft.kind {
                Kind::Intent if has(Kind::Intent) && !has(Kind::Outcome) => {
                    draft.closed(ClosedBy::Deadline, self.now)
                }
                Kind::Intent => None,
                kind => (!has(kind)).then(|| draft.clone()),
            }
        });
        Ok(left.collect())
    }
}
