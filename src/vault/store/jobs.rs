//! SQL of jobs and their leases. A worker's write is guarded by the lease epoch it was given: a
//! worker that lost its lease writes nothing more.

use diesel::prelude::*;

use super::keks::active_version;
use super::records::{Position, remaining};
use super::restore;
use super::{IdempotencyRow, claim_key, signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::jobs;
use crate::db::{Conn, DbError};
use crate::ids::{JobId, TenantId};
use crate::vault::VaultError;
use crate::vault::model::{JobInfo, JobKind, JobState};
use crate::with_conn;

#[derive(Queryable, Selectable, Insertable)]
#[diesel(table_name = jobs)]
struct Row {
    id: String,
    tenant_id: String,
    kind: String,
    state: String,
    target: i64,
    total: i64,
    done: i64,
    failed: i64,
    position: String,
    last_error: Option<String>,
    lease_owner: Option<String>,
    lease_until: i64,
    lease_epoch: i64,
    created_at: i64,
    updated_at: i64,
}

/// A job with what a worker needs to know.
#[derive(Clone, Debug)]
pub(in crate::vault) struct Job {
    pub(in crate::vault) info: JobInfo,
    pub(in crate::vault) tenant: TenantId,
    pub(in crate::vault) position: Position,
    pub(in crate::vault) epoch: i64,
    /// `done` when the present pass began, as far as this worker knows.
    pub(in crate::vault) done_before: u64,
}

impl TryFrom<Row> for Job {
    type Error = DbError;

    fn try_from(row: Row) -> Result<Self, DbError> {
        let impossible = || DbError::impossible("jobs", &row.id);
        let count = |number| unsigned("jobs", &row.id, number);
        Ok(Self {
            info: JobInfo {
                id: JobId::parse(&row.id).map_err(|_| impossible())?,
                kind: JobKind::parse(&row.kind).ok_or_else(impossible)?,
                state: JobState::parse(&row.state).ok_or_else(impossible)?,
                target_version: u32::try_from(row.target).map_err(|_| impossible())?,
                total: count(row.total)?,
                done: count(row.done)?,
                failed: count(row.failed)?,
                last_error: row.last_error.clone(),
                created_at: Timestamp::from_micros(row.created_at),
                updated_at: Timestamp::from_micros(row.updated_at),
            },
            tenant: TenantId::parse(&row.tenant_id).map_err(|_| impossible())?,
            position: Position::parse(&row.position).ok_or_else(impossible)?,
            epoch: row.lease_epoch,
            done_before: count(row.done)?,
        })
    }
}

/// Queues a job to the version that wraps now. An open job of that kind to that version is returned
/// instead of a second one. Of backup jobs a tenant has one row, which is queued again and again.
pub(in crate::vault) fn queue(
    conn: &mut Conn,
    tenant: &TenantId,
    kind: JobKind,
    id: &JobId,
    idempotency: Option<IdempotencyRow>,
    now: Timestamp,
) -> Result<JobInfo, VaultError> {
    let role = kind.writes();
    let target = active_version(conn, tenant, role)?.ok_or(VaultError::NotFound("key-encryption key"))?;
    let open = jobs::table
        .filter(jobs::tenant_id.eq(tenant.as_str()).and(jobs::target.eq(i64::from(target))))
        .filter(jobs::state.eq_any([JobState::Queued.name(), JobState::Running.name()]))
        .filter(jobs::kind.eq(kind.name()))
        .order(jobs::id);
    let open: Option<Row> = with_conn!(&mut *conn, |c| open.select(Row::as_select()).first(c).optional())
        .map_err(DbError::from)?;
    // One that cannot be read is not taken up by any worker either.
    let open = open.and_then(|row| Job::try_from(row).ok());
    let id = open.as_ref().map_or(id, |job| &job.info.id).as_str().to_owned();
    if let Some(row) = idempotency {
        claim_key(conn, &IdempotencyRow { result_id: id.clone(), ..row }, now)?;
    }
    if let Some(job) = open {
        return Ok(job.info);
    }
    let row = Row {
        id: id.clone(),
        tenant_id: tenant.as_str().to_owned(),
        kind: kind.name().to_owned(),
        state: JobState::Queued.name().to_owned(),
        target: i64::from(target),
        total: signed(remaining(conn, tenant, (role, target))?),
        done: 0,
        failed: 0,
        position: String::new(),
        last_error: None,
        lease_owner: None,
        lease_until: 0,
        lease_epoch: 0,
        created_at: now.as_micros(),
        updated_at: now.as_micros(),
    };
    if kind == JobKind::Backup {
        let before = jobs::table.filter(jobs::tenant_id.eq(tenant.as_str()).and(jobs::kind.eq(kind.name())));
        with_conn!(&mut *conn, |c| diesel::delete(before).execute(c)).map_err(DbError::from)?;
    }
    let insert = diesel::insert_into(jobs::table).values(row);
    with_conn!(&mut *conn, |c| insert.execute(c)).map_err(DbError::from)?;
    let id = JobId::parse(&id).map_err(|_| DbError::impossible("jobs", &id))?;
    find(conn, tenant, &id)?.map(|job| job.info).ok_or(VaultError::NotFound("job"))
}

/// A job of the tenant.
pub(in crate::vault) fn find(conn: &mut Conn, tenant: &TenantId, id: &JobId) -> Result<Option<Job>, DbError> {
    let query = jobs::table.filter(jobs::id.eq(id.as_str()).and(jobs::tenant_id.eq(tenant.as_str())));
    let row: Option<Row> = with_conn!(conn, |c| query.select(Row::as_select()).first(c).optional())?;
    row.map(Job::try_from).transpose()
}

/// Marks a job as cancelled. A worker that is at a batch finds its lease gone when it writes.
pub(in crate::vault) fn cancel(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &JobId,
    now: Timestamp,
) -> Result<JobInfo, VaultError> {
    let open = [JobState::Queued.name(), JobState::Running.name()];
    let update = diesel::update(jobs::table)
        .filter(jobs::id.eq(id.as_str()).and(jobs::tenant_id.eq(tenant.as_str())))
        .filter(jobs::state.eq_any(open))
        .set((jobs::state.eq(JobState::Cancelled.name()), jobs::updated_at.eq(now.as_micros())));
    let changed = with_conn!(&mut *conn, |c| update.execute(c)).map_err(DbError::from)?;
    let job = find(conn, tenant, id)?.ok_or(VaultError::NotFound("job"))?;
    if changed == 0 { Err(VaultError::JobEnded) } else { Ok(job.info) }
}

/// Ends every lease: for a database that has no other daemon.
pub(in crate::vault) fn end_leases(conn: &mut Conn) -> Result<usize, DbError> {
    let update = diesel::update(jobs::table)
        .filter(jobs::state.eq(JobState::Running.name()))
        .set(jobs::lease_until.eq(0_i64));
    Ok(with_conn!(conn, |c| update.execute(c))?)
}

/// What [`claim`] found.
pub(in crate::vault) enum Claimed {
    /// A job, from now on this worker's.
    Job(Job),
    /// A row that this program cannot have written, by its id. It has failed, so that it is in nobody's way.
    Unreadable(String),
}

/// Takes the oldest job that waits, or whose worker gave no sign of life until its lease ended.
pub(in crate::vault) fn claim(
    conn: &mut Conn,
    owner: &str,
    now: Timestamp,
    until: Timestamp,
) -> Result<Option<Claimed>, DbError> {
    let waits = jobs::state.eq(JobState::Queued.name());
    let lost = jobs::state.eq(JobState::Running.name()).and(jobs::lease_until.lt(now.as_micros()));
    // Nothing goes on by itself in quarantine but the restore.
    // By what it is not: a kind that nobody knows is claimed too, and fails.
    let waiting: &[&str] = match restore::quarantined_at(conn)? {
        Some(_) => &[JobKind::Rewrap.name(), JobKind::Backup.name()],
        None => &[],
    };
    let query =
        jobs::table.filter(waits.or(lost)).filter(jobs::kind.ne_all(waiting)).order(jobs::id).limit(1);
    let Some(row): Option<Row> =
        with_conn!(&mut *conn, |c| query.select(Row::as_select()).first(c).optional())?
    else {
        return Ok(None);
    };
    let (id, state, epoch) = (row.id.clone(), row.state.clone(), row.lease_epoch);
    let next = epoch.wrapping_add(1);
    let job = Job::try_from(row).ok();
    let to = if job.is_some() { JobState::Running } else { JobState::Failed };
    // Compare-and-set: of two daemons that saw the same row, one gets it.
    let update = diesel::update(jobs::table)
        .filter(jobs::id.eq(&id).and(jobs::lease_epoch.eq(epoch)))
        .filter(jobs::state.eq(&state))
        .set((
            jobs::state.eq(to.name()),
            jobs::lease_owner.eq(owner),
            jobs::lease_until.eq(until.as_micros()),
            jobs::lease_epoch.eq(next),
            jobs::updated_at.eq(now.as_micros()),
        ));
    if with_conn!(conn, |c| update.execute(c))? == 0 {
        return Ok(None);
    }
    Ok(Some(match job {
        Some(job) => Claimed::Job(Job { info: JobInfo { state: to, ..job.info }, epoch: next, ..job }),
        None => Claimed::Unreadable(id),
    }))
}

/// Writes the job's progress and prolongs its lease; `false` if the lease is gone.
pub(in crate::vault) fn save(
    conn: &mut Conn,
    job: &Job,
    now: Timestamp,
    until: Timestamp,
) -> Result<bool, DbError> {
    let update = diesel::update(jobs::table)
        .filter(jobs::id.eq(job.info.id.as_str()).and(jobs::lease_epoch.eq(job.epoch)))
        .filter(jobs::state.eq(JobState::Running.name()))
        .set((
            jobs::state.eq(job.info.state.name()),
            jobs::done.eq(signed(job.info.done)),
            jobs::failed.eq(signed(job.info.failed)),
            jobs::position.eq(job.position.to_text()),
            jobs::last_error.eq(job.info.last_error.as_deref()),
            jobs::lease_until.eq(until.as_micros()),
            jobs::updated_at.eq(now.as_micros()),
        ));
    Ok(with_conn!(conn, |c| update.execute(c))? == 1)
}
