//! Jobs that wrap records' DEKs anew, in the background, a batch at a time: under the newest KEK version
//! (`rewrap`, also from one device to another), under the backup KEK (`backup`), or from there under the
//! newest version (`restore`).
//!
//! A daemon takes a job for as long as its lease lives. Every batch is one transaction: the new
//! wraps, each in the place of exactly the old one that was read, with the job's progress and lease.
//! A crash loses at most the batch at hand. A record that does not open is counted and passed over;
//! a device that does not answer is waited for.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};

use crate::audit::{Action, AuditCode, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::{DbError, Engine};
use crate::identity::{Caller, Scope};
use crate::ids::TenantId;
use crate::ids::{JobId, RequestId};
use crate::seal::{Context, Kek, SealError, WrappedKey};

use super::idempotency::Request;
use super::model::{IdempotencyKey, JobInfo, JobKind, JobState, KekRole};
use super::store::jobs::{self, Claimed, Job};
use super::store::records::{self, Position, ToRewrap};
use super::{Vault, VaultError, check, store};

/// Records per transaction.
const BATCH: i64 = 64;
/// Records of one batch that are at the device at the same time.
const AT_ONCE: usize = 4;
/// How often jobs of other daemons that died are looked for.
const POLL: Duration = Duration::from_secs(2);
/// How often a restore tells how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How often expired idempotency keys are deleted.
const PURGE_EVERY: u32 = 300;
/// Longest pause before the device is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What became of one record.
enum Moved {
    /// Wrapped anew.
    To(ToRewrap, WrappedKey),
    /// Cannot be moved; the code says why.
    Not(&'static str),
}

/// What follows a pass over all records.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    End(JobState),
    /// Records came under an old version while the pass ran.
    Again,
}

/// Decides what follows a pass that moved `moved` records and left `remaining`, of which `failed` cannot
/// be moved.
fn after_pass(moved: u64, remaining: u64, failed: u64) -> Next {
    match (moved, remaining, failed) {
        (_, 0, _) => Next::End(JobState::Succeeded),
        (_, remaining, failed) if remaining <= failed => Next::End(JobState::Failed),
        // Another pass would meet the same.
        (0, _, 1..) => Next::End(JobState::Failed),
        _ => Next::Again,
    }
}

/// The pause after the `failures`th failure in a row: doubles, up to a limit, and not shorter than asked for.
fn pause(failures: u32, asked: Option<Duration>) -> Duration {
    let doubled = Duration::from_millis(250).saturating_mul(1 << failures.min(10));
    doubled.max(asked.unwrap_or_default()).min(LONGEST_PAUSE)
}

impl Vault {
    /// Starts a job that moves every record of the tenant to the newest KEK version. An open job to
    /// that version is returned instead of a second one.
    ///
    /// # Errors
    /// Those of idempotency keys, or what the log and the database say.
    pub async fn rewrap(
        &self,
        caller: &Caller,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<JobInfo, VaultError> {
        let event = Event::new(Action::RewrapStart, "kek", caller.tenant.as_str());
        let job = self
            .audited(caller, Scope::KeysAdmin, event, |note| async move {
                check::idempotency(idempotency.as_ref())?;
                self.refuse_in_quarantine().await?;
                let operation = Action::RewrapStart.name();
                let job = match self.request(caller, operation, idempotency.as_ref()).await? {
                    Request::Repeated(id) => self.found_job(caller, &id).await,
                    request => match self.queue_rewrap(caller, &request).await {
                        Err(VaultError::IdempotencyInFlight) => {
                            match self.request(caller, operation, idempotency.as_ref()).await? {
                                Request::Repeated(id) => self.found_job(caller, &id).await,
                                Request::New(_) | Request::Plain => Err(VaultError::IdempotencyInFlight),
                            }
                        }
                        result => result,
                    },
                }?;
                note.add("job", job.id.as_str());
                note.add("target_version", job.target_version.to_string());
                Ok(job)
            })
            .await?;
        self.inner.job_queued.notify_one();
        Ok(job)
    }

    async fn queue_rewrap(&self, caller: &Caller, request: &Request) -> Result<JobInfo, VaultError> {
        self.queue_job(&caller.tenant, JobKind::Rewrap, request).await
    }

    pub(super) async fn queue_job(
        &self,
        tenant: &TenantId,
        kind: JobKind,
        request: &Request,
    ) -> Result<JobInfo, VaultError> {
        let (tenant, id, now) = (tenant.clone(), JobId::generate(), self.parts().clock.now());
        let row = request.row(id.as_str());
        self.parts().db.write(move |conn| jobs::queue(conn, &tenant, kind, &id, row, now)).await
    }

    /// Queues the backup job if records lack their second wrap and its device takes requests.
    async fn queue_backup(&self, tenant: &TenantId) -> Result<(), VaultError> {
        if self.parts().backup.is_none() || self.quarantined_at().await?.is_some() {
            return Ok(());
        }
        let Some(kek) = self.active_in(tenant, KekRole::Backup).await? else { return Ok(()) };
        if self.parts().sealer.admits(&kek.key).is_err() {
            // The lag is in the metrics; the next round asks again.
            return Ok(());
        }
        let (owner, target) = (tenant.clone(), (KekRole::Backup, kek.version));
        let count = move |conn: &mut _| records::remaining(conn, &owner, target);
        let lacking = self.parts().db.read::<_, DbError, _>(count).await?;
        // What could not be wrapped is tried again seldom, and not every two seconds.
        if lacking > self.inner.hopeless.load(Ordering::Relaxed) {
            self.queue_job(tenant, JobKind::Backup, &Request::Plain).await?;
        }
        Ok(())
    }

    async fn found_job(&self, caller: &Caller, id: &str) -> Result<JobInfo, VaultError> {
        let id = JobId::parse(id).map_err(|_| DbError::impossible("idempotency_keys", id))?;
        self.job(caller, &id).await
    }

    /// A job's progress.
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], [`VaultError::NotFound`], or what the database says.
    pub async fn job(&self, caller: &Caller, id: &JobId) -> Result<JobInfo, VaultError> {
        caller.require(Scope::KeysAdmin)?;
        let (tenant, id) = (caller.tenant.clone(), id.clone());
        let job = self.parts().db.read::<_, DbError, _>(move |conn| jobs::find(conn, &tenant, &id)).await?;
        job.map(|job| job.info).ok_or(VaultError::NotFound("job"))
    }

    /// Asks a job to stop after the batch it is at. What was moved stays moved.
    ///
    /// # Errors
    /// [`VaultError::JobEnded`], [`VaultError::NotFound`], or what the log and the database say.
    pub async fn cancel_job(&self, caller: &Caller, id: &JobId) -> Result<JobInfo, VaultError> {
        let event = Event::new(Action::JobCancel, "job", id.as_str());
        self.audited(caller, Scope::KeysAdmin, event, |_| async move {
            let (tenant, id, now) = (caller.tenant.clone(), id.clone(), self.parts().clock.now());
            self.parts().db.write(move |conn| jobs::cancel(conn, &tenant, &id, now)).await
        })
        .await
    }

    /// Goes on with jobs that a crash or stop interrupted, takes new ones, and keeps the tenant's records
    /// backed up. Runs until the process ends.
    pub async fn run_jobs(&self, tenant: &TenantId) {
        let owner = RequestId::generate().as_str().to_owned();
        let mut rounds = 0_u32;
        self.end_leases().await;
        loop {
            if let Err(error) = self.queue_backup(tenant).await {
                tracing::debug!(%error, "no look at the backups now");
            }
            while let Some(mut job) = self.claim_job(&owner).await {
                self.work_on(&mut job).await;
            }
            if rounds.is_multiple_of(PURGE_EVERY) {
                self.inner.hopeless.store(0, Ordering::Relaxed);
                let now = self.parts().clock.now();
                let purge = move |conn: &mut _| store::purge_keys(conn, now);
                if let Err(error) = self.parts().db.write::<_, DbError, _>(purge).await {
                    tracing::warn!(%error, "expired idempotency keys were not deleted");
                }
            }
            rounds = rounds.wrapping_add(1);
            // Either way the table is asked: a notification only makes it sooner.
            let _ = tokio::time::timeout(POLL, self.inner.job_queued.notified()).await;
        }
    }

    /// SQLite is locked by this process, so whoever held a lease is gone: no need to wait for its end.
    async fn end_leases(&self) {
        if self.parts().db.engine() == Engine::Sqlite
            && let Err(error) = self.parts().db.write::<_, DbError, _>(jobs::end_leases).await
        {
            tracing::warn!(%error, "interrupted jobs go on when their lease ends");
        }
    }

    /// Works on the tenant's restore job until it has ended, telling how far it is. For `lacre restore`,
    /// which runs while no daemon does; killed, it or a daemon goes on where it was.
    pub(super) async fn run_restore(
        &self,
        tenant: &TenantId,
        id: &JobId,
        tell: impl Fn(&JobInfo),
    ) -> Result<JobInfo, VaultError> {
        let owner = RequestId::generate().as_str().to_owned();
        self.end_leases().await;
        let caller = Caller::system("restore", tenant.clone());
        let find = || async {
            let (tenant, id) = (caller.tenant.clone(), id.clone());
            let job =
                self.parts().db.read::<_, DbError, _>(move |conn| jobs::find(conn, &tenant, &id)).await?;
            job.map(|job| job.info).ok_or(VaultError::NotFound("job"))
        };
        loop {
            let job = find().await?;
            tell(&job);
            if job.state.has_ended() {
                return Ok(job);
            }
            match self.claim_job(&owner).await {
                Some(mut job) => {
                    let mut work = std::pin::pin!(self.work_on(&mut job));
                    while tokio::time::timeout(TELL_EVERY, &mut work).await.is_err() {
                        tell(&find().await?);
                    }
                }
                // On PostgreSQL another process may be at it.
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    async fn claim_job(&self, owner: &str) -> Option<Job> {
        let (now, until) = self.lease();
        loop {
            let owner = owner.to_owned();
            let claim = move |conn: &mut _| jobs::claim(conn, &owner, now, until);
            match self.parts().db.write::<_, DbError, _>(claim).await {
                Ok(None) => return None,
                Ok(Some(Claimed::Job(job))) => return Some(job),
                Ok(Some(Claimed::Unreadable(id))) => {
                    tracing::error!(job = id, "a job's row was altered; the job has failed");
                }
                Err(error) => {
                    tracing::warn!(%error, "jobs cannot be read");
                    return None;
                }
            }
        }
    }

    fn lease(&self) -> (Timestamp, Timestamp) {
        let now = self.parts().clock.now();
        (now, now.plus(self.parts().config.job_lease))
    }

    /// Moves batch after batch until the job has ended or its lease is gone.
    async fn work_on(&self, job: &mut Job) {
        let mut failures = 0;
        while job.info.state == JobState::Running {
            let before = job.position.clone();
            match self.step(job).await {
                Ok(true) => failures = 0,
                // Cancelled, or another daemon has it.
                Ok(false) => return,
                Err(error) => {
                    failures = if job.position == before { failures + 1 } else { 1 };
                    let asked = match &error {
                        VaultError::Seal(error) => error.retry_after(),
                        _ => None,
                    };
                    tracing::warn!(job = %job.info.id, code = error.audit_code(), "a job waits");
                    if job.info.kind == JobKind::Backup && asked.is_some() {
                        // Its device may be away for days, and other jobs must not wait for it.
                        return self.put_off(job, error.audit_code()).await;
                    }
                    tokio::time::sleep(pause(failures, asked)).await;
                    // A sign of life; the database may be what does not answer, then the lease runs on.
                    if matches!(self.save(job).await, Ok(false)) {
                        return;
                    }
                }
            }
        }
        if job.info.kind == JobKind::Backup {
            // Made again every few seconds while values come in: the log would be full of it.
            self.inner.hopeless.store(job.info.failed, Ordering::Relaxed);
        } else {
            self.record_end(job).await;
        }
    }

    /// Ends a backup job that cannot go on; another one is queued when its device is back.
    async fn put_off(&self, job: &mut Job, code: &'static str) {
        job.info.state = JobState::Failed;
        job.info.last_error = Some(code.to_owned());
        if let Err(error) = self.save(job).await {
            tracing::debug!(%error, "the job's lease runs out instead");
        }
    }

    /// One batch, or the decision at the end of a pass. `false`: the lease is gone. After an error the part of
    /// the batch that came before it is stored.
    async fn step(&self, job: &mut Job) -> Result<bool, VaultError> {
        let (tenant, target, position) = (job.tenant.clone(), job.info.target_version, job.position.clone());
        let target = (job.info.kind.writes(), target);
        let query = move |conn: &mut _| records::to_rewrap(conn, &tenant, target, &position, BATCH);
        let batch = self.parts().db.read::<_, DbError, _>(query).await?;
        let Some(last) = batch.last() else { return self.end_pass(job).await };
        if last.position == job.position {
            // However an altered id is ordered: never the same rows again.
            return self.end_pass(job).await;
        }
        let positions: Vec<_> = batch.iter().map(|record| record.position.clone()).collect();
        let results: Vec<_> =
            stream::iter(batch).map(|record| self.move_record(job, record)).buffered(AT_ONCE).collect().await;
        let (mut next, mut moved, mut failure) = (job.clone(), Vec::new(), None);
        for (position, result) in positions.into_iter().zip(results) {
            match result {
                Ok(Moved::To(old, new)) => moved.push((old, new)),
                Ok(Moved::Not(code)) => {
                    next.info.failed += 1;
                    next.info.last_error = Some(code.to_owned());
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
            next.position = position;
        }
        // What came before a failure is kept: a device that now and then has no time must not hold up the job
        // for ever.
        if next.position != job.position {
            match self.save_batch(next, moved).await? {
                Some(saved) => *job = saved,
                None => return Ok(false),
            }
        }
        failure.map_or(Ok(true), Err)
    }

    /// Wraps one record's DEK anew. An error means: try again later.
    async fn move_record(&self, job: &Job, record: ToRewrap) -> Result<Moved, VaultError> {
        let system = Caller::system("rewrap", job.tenant.clone());
        let id = record.position.secret.as_str();
        let Ok(version) = u64::try_from(record.position.version) else {
            self.incident(&system, id, None).await;
            return Ok(Moved::Not("integrity"));
        };
        let Some((wrapped, from)) = self.source(job, &record).await? else {
            self.incident(&system, id, Some(version)).await;
            return Ok(Moved::Not("integrity"));
        };
        let to = self.kek_for_wrapping(&job.tenant, job.info.kind.writes()).await?;
        let context = Context { tenant: job.tenant.as_str(), kind: &record.kind, record: id, version };
        match self.parts().sealer.rewrap(&from, &to, &context, &wrapped).await {
            Ok(new) => Ok(Moved::To(record, new)),
            Err(SealError::Rejected) => {
                self.incident(&system, id, Some(version)).await;
                Ok(Moved::Not("integrity"))
            }
            Err(SealError::KeyMissing { .. } | SealError::NoDevice { .. }) => Ok(Moved::Not("key-missing")),
            Err(SealError::KeyUnfit { .. }) => Ok(Moved::Not("key-unfit")),
            Err(error) => Err(VaultError::Seal(error)),
        }
    }

    /// The wrap that the DEK is taken from, and the KEK version that made it; `None` if the row names none
    /// of the tenant's. A restore takes the second wrap; a record that has none may be under a KEK that
    /// was not lost.
    async fn source(&self, job: &Job, record: &ToRewrap) -> Result<Option<(WrappedKey, Kek)>, VaultError> {
        let (role, bytes) = match (&record.backup_dek, job.info.kind) {
            (Some(backup), JobKind::Restore) => (KekRole::Backup, backup),
            _ => (KekRole::Main, &record.wrapped_dek),
        };
        let Ok(wrapped) = WrappedKey::from_bytes(bytes) else { return Ok(None) };
        let kek = self.kek_that_wrapped(&job.tenant, role, &wrapped).await?;
        Ok(kek.map(|kek| (wrapped, kek)))
    }

    /// Stores a batch and the job's progress together; `None` if the lease is gone, and then nothing is stored.
    async fn save_batch(
        &self,
        mut job: Job,
        moved: Vec<(ToRewrap, WrappedKey)>,
    ) -> Result<Option<Job>, VaultError> {
        let (now, until) = self.lease();
        let work = move |conn: &mut _| {
            for (old, new) in &moved {
                // A record that was deleted or replaced meanwhile is nobody's loss.
                let (role, version) = (job.info.kind.writes(), new.kek_version());
                if records::swap_wrap(conn, &job.tenant, role, old, &new.to_bytes(), version)? {
                    job.info.done += 1;
                }
            }
            if jobs::save(conn, &job, now, until)? { Ok(job) } else { Err(VaultError::JobEnded) }
        };
        match self.parts().db.write(work).await {
            Ok(job) => Ok(Some(job)),
            Err(VaultError::JobEnded) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn end_pass(&self, job: &mut Job) -> Result<bool, VaultError> {
        let (tenant, target) = (job.tenant.clone(), (job.info.kind.writes(), job.info.target_version));
        let count = move |conn: &mut _| records::remaining(conn, &tenant, target);
        let remaining = self.parts().db.read::<_, DbError, _>(count).await?;
        let mut next = job.clone();
        match after_pass(job.info.done.saturating_sub(job.done_before), remaining, job.info.failed) {
            Next::End(state) => next.info.state = state,
            Next::Again => {
                next.position = Position::default();
                next.info.failed = 0;
                next.done_before = next.info.done;
            }
        }
        let saved = self.save(&next).await?;
        *job = next;
        Ok(saved)
    }

    async fn save(&self, job: &Job) -> Result<bool, VaultError> {
        let (job, (now, until)) = (job.clone(), self.lease());
        Ok(self.parts().db.write::<_, DbError, _>(move |conn| jobs::save(conn, &job, now, until)).await?)
    }

    async fn record_end(&self, job: &Job) {
        let system = Caller::system("rewrap", job.tenant.clone());
        let event = Event::new(Action::RewrapEnd, "job", job.info.id.as_str())
            .detail("kind", job.info.kind.name())
            .detail("target_version", job.info.target_version.to_string())
            .detail("done", job.info.done.to_string())
            .detail("failed", job.info.failed.to_string());
        let outcome = match job.info.state {
            JobState::Succeeded => Outcome::Success,
            _ => Outcome::Failure("records-failed"),
        };
        if self.parts().audit.record(&system, event, outcome).await.is_err() {
            tracing::error!(job = %job.info.id, "the end of a rewrap could not be recorded");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Next, after_pass, pause};
    use crate::vault::model::JobState;

    #[test]
    fn a_job_goes_on_until_only_failures_remain() {
        for (moved, remaining, failed, next) in [
            (5, 0, 0, Next::End(JobState::Succeeded)),
            // What failed was deleted meanwhile.
            (5, 0, 2, Next::End(JobState::Succeeded)),
            (5, 2, 2, Next::End(JobState::Failed)),
            (5, 1, 2, Next::End(JobState::Failed)),
            (5, 3, 2, Next::Again),
            (0, 3, 0, Next::Again),
            // Nothing moves any more.
            (0, 3, 2, Next::End(JobState::Failed)),
        ] {
            assert_eq!(after_pass(moved, remaining, failed), next, "{moved} {remaining} {failed}");
        }
    }

    #[test]
    fn pauses_grow_and_end() {
        assert_eq!(pause(1, None), Duration::from_millis(500));
        assert_eq!(pause(1, Some(Duration::from_secs(2))), Duration::from_secs(2));
        assert_eq!(pause(99, None), Duration::from_secs(10));
    }
}
