//! SQL of secrets, their versions and idempotency keys. Every statement names the tenant.

pub(super) mod jobs;
pub(super) mod keks;
pub(super) mod records;
pub(super) mod restore;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use diesel::prelude::*;

use crate::clock::Timestamp;
use crate::db::schema::{idempotency_keys, secret_versions, secrets, tenants};
use crate::db::{Conn, DbError};
use crate::ids::{SecretId, TenantId};
use crate::seal::Sealed;
use crate::with_conn;

use super::VaultError;
use super::model::{Encoding, Figures, JobState, KekRole, ListFilter, SecretInfo, SecretKind, VersionInfo};

/// A number from the database that cannot be negative.
pub(super) fn unsigned(table: &'static str, id: &str, number: i64) -> Result<u64, DbError> {
    u64::try_from(number).map_err(|_| DbError::impossible(table, id))
}

/// A number on its way to the database; no counter here comes near the end of the range.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[derive(Queryable, Selectable, Insertable)]
#[diesel(table_name = secrets)]
struct SecretRow {
    id: String,
    tenant_id: String,
    name: String,
    kind: String,
    labels: String,
    current_version: i64,
    expires_at: Option<i64>,
    created_at: i64,
    updated_at: i64,
    row_version: i64,
}

impl TryFrom<SecretRow> for SecretInfo {
    type Error = DbError;

    fn try_from(row: SecretRow) -> Result<Self, DbError> {
        let impossible = || DbError::impossible("secrets", &row.id);
        Ok(Self {
            id: SecretId::parse(&row.id).map_err(|_| impossible())?,
            kind: SecretKind::parse(&row.kind).ok_or_else(impossible)?,
            labels: serde_json::from_str(&row.labels).map_err(|_| impossible())?,
            version: unsigned("secrets", &row.id, row.current_version)?,
            expires_at: row.expires_at.map(Timestamp::from_micros),
            created_at: Timestamp::from_micros(row.created_at),
            updated_at: Timestamp::from_micros(row.updated_at),
            row_version: row.row_version,
            name: row.name,
        })
    }
}

/// A version with its sealed bytes as they are stored: read, not yet believed.
pub(super) struct StoredVersion {
    pub(super) version: u64,
    pub(super) encoding: Encoding,
    pub(super) len: u64,
    /// What the rewrap goes by; the wrapped DEK says it too.
    pub(super) kek_version: i64,
    /// Wrapped DEK, IV, ciphertext, tag.
    pub(super) columns: [Vec<u8>; 4],
}

/// A version that is to be stored.
pub(super) struct NewVersion {
    pub(super) version: u64,
    pub(super) encoding: Encoding,
    pub(super) len: usize,
    pub(super) kek_version: u32,
    /// Wrapped DEK, IV, ciphertext, tag.
    pub(super) columns: [Vec<u8>; 4],
}

impl NewVersion {
    pub(super) fn new(version: u64, encoding: Encoding, len: usize, sealed: Sealed) -> Self {
        let kek_version = sealed.key().kek_version();
        Self { version, encoding, len, kek_version, columns: sealed.into_columns() }
    }
}

/// An idempotency key as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Insertable, Queryable, Selectable)]
#[diesel(table_name = idempotency_keys)]
pub(super) struct IdempotencyRow {
    pub(super) tenant_id: String,
    pub(super) principal: String,
    pub(super) key: String,
    pub(super) operation: String,
    pub(super) body_mac: Vec<u8>,
    pub(super) result_id: String,
    pub(super) expires_at: i64,
}

/// Makes the tenant if it is missing.
pub(super) fn ensure_tenant(conn: &mut Conn, tenant: &TenantId, now: Timestamp) -> Result<(), DbError> {
    let row = (tenants::id.eq(tenant.as_str()), tenants::created_at.eq(now.as_micros()));
    with_conn!(conn, |c| diesel::insert_into(tenants::table)
        .values(row)
        .on_conflict_do_nothing()
        .execute(c))?;
    Ok(())
}

/// Stores a secret and its first version. The idempotency key, if any, is stored with it or the
/// whole is not: `IdempotencyInFlight` says that somebody else has just used the key.
pub(super) fn insert(
    conn: &mut Conn,
    tenant: &TenantId,
    info: &SecretInfo,
    version: NewVersion,
    idempotency: Option<&IdempotencyRow>,
) -> Result<(), VaultError> {
    if let Some(row) = idempotency {
        claim_key(conn, row, info.created_at)?;
    }
    let row = SecretRow {
        id: info.id.as_str().to_owned(),
        tenant_id: tenant.as_str().to_owned(),
        name: info.name.clone(),
        kind: info.kind.name().to_owned(),
        labels: labels_text(&info.labels),
        current_version: signed(info.version),
        expires_at: info.expires_at.map(Timestamp::as_micros),
        created_at: info.created_at.as_micros(),
        updated_at: info.updated_at.as_micros(),
        row_version: info.row_version,
    };
    let insert = diesel::insert_into(secrets::table).values(row).on_conflict_do_nothing();
    if with_conn!(&mut *conn, |c| insert.execute(c)).map_err(DbError::from)? == 0 {
        return Err(VaultError::NameTaken);
    }
    insert_version(conn, tenant, &info.id, version, info.created_at)?;
    Ok(())
}

fn labels_text(labels: &BTreeMap<String, String>) -> String {
    // A map of texts always has a JSON form.
    serde_json::to_string(labels).unwrap_or_else(|_| "{}".to_owned())
}

fn insert_version(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &SecretId,
    new: NewVersion,
    now: Timestamp,
) -> Result<(), DbError> {
    use secret_versions as v;
    let [wrapped_dek, iv, ciphertext, tag] = new.columns;
    let row = (
        (v::secret_id.eq(id.as_str()), v::version.eq(signed(new.version)), v::tenant_id.eq(tenant.as_str())),
        (v::encoding.eq(new.encoding.name()), v::value_len.eq(signed(new.len as u64))),
        v::kek_version.eq(i64::from(new.kek_version)),
        (v::wrapped_dek.eq(wrapped_dek), v::iv.eq(iv), v::ciphertext.eq(ciphertext), v::tag.eq(tag)),
        v::created_at.eq(now.as_micros()),
    );
    with_conn!(conn, |c| diesel::insert_into(v::table).values(row).execute(c))?;
    Ok(())
}

/// The metadata of a secret.
pub(super) fn find(conn: &mut Conn, tenant: &TenantId, id: &SecretId) -> Result<Option<SecretInfo>, DbError> {
    let query =
        secrets::table.filter(secrets::id.eq(id.as_str()).and(secrets::tenant_id.eq(tenant.as_str())));
    let row: Option<SecretRow> =
        with_conn!(conn, |c| query.select(SecretRow::as_select()).first(c).optional())?;
    row.map(SecretInfo::try_from).transpose()
}

/// A secret and one of its versions (the current one if none is given), in one statement so that
/// both are of one moment. The inner `None`: the secret is there, that version is not.
pub(super) fn find_version(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &SecretId,
    version: Option<u64>,
) -> Result<Option<(SecretInfo, Option<StoredVersion>)>, DbError> {
    use secret_versions as v;
    type Columns = (i64, String, i64, i64, Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>);
    let wanted = version.map_or(-1, signed);
    // -1 stands for "the current one": one statement for both questions.
    let current = wanted.into_sql::<diesel::sql_types::BigInt>().eq(-1_i64);
    let is_wanted = v::version.eq(wanted).or(v::version.eq(secrets::current_version).and(current));
    let query = secrets::table
        .left_join(
            v::table.on(v::secret_id.eq(secrets::id).and(v::tenant_id.eq(secrets::tenant_id)).and(is_wanted)),
        )
        .filter(secrets::id.eq(id.as_str()).and(secrets::tenant_id.eq(tenant.as_str())));
    let columns = || {
        (v::version, v::encoding, v::value_len, v::kek_version, v::wrapped_dek, v::iv, v::ciphertext, v::tag)
            .nullable()
    };
    let row: Option<(SecretRow, Option<Columns>)> =
        with_conn!(conn, |c| { query.select((SecretRow::as_select(), columns())).first(c).optional() })?;
    let Some((row, columns)) = row else { return Ok(None) };
    let stored = columns.map(|(version, encoding, len, kek_version, wrapped_dek, iv, ciphertext, tag)| {
        let encoding = Encoding::parse(&encoding);
        Ok::<_, DbError>(StoredVersion {
            version: unsigned("secret_versions", id.as_str(), version)?,
            encoding: encoding.ok_or_else(|| DbError::impossible("secret_versions", id.as_str()))?,
            len: unsigned("secret_versions", id.as_str(), len)?,
            kek_version,
            columns: [wrapped_dek, iv, ciphertext, tag],
        })
    });
    Ok(Some((SecretInfo::try_from(row)?, stored.transpose()?)))
}

/// A page of secrets by id after `after`; one more than asked for tells whether more follow. A row that
/// this program cannot have written is an id without metadata.
pub(super) fn list(
    conn: &mut Conn,
    tenant: &TenantId,
    filter: &ListFilter,
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<(String, Option<SecretInfo>)>, DbError> {
    let rows: Vec<SecretRow> = with_conn!(conn, |c| {
        let mut query = secrets::table
            .filter(secrets::tenant_id.eq(tenant.as_str()))
            .select(SecretRow::as_select())
            .order(secrets::id)
            .limit(i64::from(limit) + 1)
            .into_boxed();
        if let Some(after) = after {
            query = query.filter(secrets::id.gt(after));
        }
        if let Some(kind) = filter.kind {
            query = query.filter(secrets::kind.eq(kind.name()));
        }
        if let Some(name) = &filter.name {
            query = query.filter(secrets::name.eq(name));
        }
        query.load(c)
    })?;
    Ok(rows.into_iter().map(|row| (row.id.clone(), SecretInfo::try_from(row).ok())).collect())
}

/// A page of a secret's versions, newest first, one more than asked for.
pub(super) fn versions(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &SecretId,
    before: Option<u64>,
    limit: u32,
) -> Result<Vec<VersionInfo>, DbError> {
    use secret_versions as v;
    let query = v::table
        .filter(v::secret_id.eq(id.as_str()).and(v::tenant_id.eq(tenant.as_str())))
        .filter(v::version.lt(before.map_or(i64::MAX, signed)))
        .order(v::version.desc())
        .limit(i64::from(limit) + 1)
        .select((v::version, v::encoding, v::value_len, v::kek_version, v::created_at));
    let rows: Vec<(i64, String, i64, i64, i64)> = with_conn!(conn, |c| query.load(c))?;
    let info = |(version, encoding, len, kek_version, created_at): (i64, String, i64, i64, i64)| {
        let impossible = || DbError::impossible("secret_versions", id.as_str());
        Ok(VersionInfo {
            version: unsigned("secret_versions", id.as_str(), version)?,
            encoding: Encoding::parse(&encoding).ok_or_else(impossible)?,
            len: unsigned("secret_versions", id.as_str(), len)?,
            kek_version: u32::try_from(kek_version).map_err(|_| impossible())?,
            created_at: Timestamp::from_micros(created_at),
        })
    };
    rows.into_iter().map(info).collect()
}

/// Stores the next version if the row is still at `expected`, and drops versions beyond `keep`.
pub(super) fn replace(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &SecretId,
    expected: i64,
    new: NewVersion,
    keep: u64,
    now: Timestamp,
) -> Result<SecretInfo, VaultError> {
    use secret_versions as v;
    let number = new.version;
    let Some(next) = expected.checked_add(1) else { return Err(conflict(conn, tenant, id)?) };
    let update = diesel::update(secrets::table)
        .filter(secrets::id.eq(id.as_str()).and(secrets::tenant_id.eq(tenant.as_str())))
        .filter(secrets::row_version.eq(expected))
        // Versions are dense, so the next one follows from the row that the caller has seen.
        .filter(secrets::current_version.eq(signed(number) - 1))
        .set((
            secrets::current_version.eq(signed(number)),
            secrets::row_version.eq(next),
            secrets::updated_at.eq(now.as_micros()),
        ));
    if with_conn!(&mut *conn, |c| update.execute(c)).map_err(DbError::from)? == 0 {
        return Err(conflict(conn, tenant, id)?);
    }
    insert_version(conn, tenant, id, new, now)?;
    let old = diesel::delete(v::table)
        .filter(v::secret_id.eq(id.as_str()).and(v::tenant_id.eq(tenant.as_str())))
        .filter(v::version.le(signed(number) - signed(keep)));
    with_conn!(&mut *conn, |c| old.execute(c)).map_err(DbError::from)?;
    find(conn, tenant, id)?.ok_or(VaultError::NotFound("secret"))
}

/// Deletes a secret and all its versions, if it is still at `expected`.
pub(super) fn delete(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &SecretId,
    expected: Option<i64>,
) -> Result<(), VaultError> {
    use secret_versions as v;
    // The secret's row is locked first: a replacement that runs at the same time then finds nothing.
    let found = row_version(conn, tenant, id)?.ok_or(VaultError::NotFound("secret"))?;
    let expected = expected.unwrap_or(found);
    let lock = diesel::update(secrets::table)
        .filter(secrets::id.eq(id.as_str()).and(secrets::tenant_id.eq(tenant.as_str())))
        .filter(secrets::row_version.eq(expected))
        .set(secrets::row_version.eq(expected));
    if with_conn!(&mut *conn, |c| lock.execute(c)).map_err(DbError::from)? == 0 {
        return Err(conflict(conn, tenant, id)?);
    }
    let of_it = v::secret_id.eq(id.as_str()).and(v::tenant_id.eq(tenant.as_str()));
    with_conn!(&mut *conn, |c| diesel::delete(v::table).filter(of_it).execute(c)).map_err(DbError::from)?;
    let itself = secrets::id.eq(id.as_str()).and(secrets::tenant_id.eq(tenant.as_str()));
    with_conn!(&mut *conn, |c| diesel::delete(secrets::table).filter(itself).execute(c))
        .map_err(DbError::from)?;
    Ok(())
}

/// Why a compare-and-set found nothing.
fn conflict(conn: &mut Conn, tenant: &TenantId, id: &SecretId) -> Result<VaultError, DbError> {
    Ok(match row_version(conn, tenant, id)? {
        Some(current) => VaultError::VersionConflict { current },
        None => VaultError::NotFound("secret"),
    })
}

/// The secret's row version, whatever else is in its row.
fn row_version(conn: &mut Conn, tenant: &TenantId, id: &SecretId) -> Result<Option<i64>, DbError> {
    let query =
        secrets::table.filter(secrets::id.eq(id.as_str()).and(secrets::tenant_id.eq(tenant.as_str())));
    Ok(with_conn!(conn, |c| query.select(secrets::row_version).first(c).optional())?)
}

/// The row of an idempotency key, if it is still valid.
pub(super) fn find_key(
    conn: &mut Conn,
    tenant: &TenantId,
    principal: &str,
    key: &str,
    now: Timestamp,
) -> Result<Option<IdempotencyRow>, DbError> {
    let query = idempotency_keys::table
        .find((tenant.as_str(), principal, key))
        .filter(idempotency_keys::expires_at.gt(now.as_micros()));
    Ok(with_conn!(conn, |c| query.select(IdempotencyRow::as_select()).first(c).optional())?)
}

/// Writes the key, in the transaction that makes its result.
pub(super) fn claim_key(conn: &mut Conn, row: &IdempotencyRow, now: Timestamp) -> Result<(), VaultError> {
    let expired = diesel::delete(
        idempotency_keys::table
            .find((&row.tenant_id, &row.principal, &row.key))
            .filter(idempotency_keys::expires_at.le(now.as_micros())),
    );
    with_conn!(&mut *conn, |c| expired.execute(c)).map_err(DbError::from)?;
    let insert = diesel::insert_into(idempotency_keys::table).values(row.clone()).on_conflict_do_nothing();
    match with_conn!(conn, |c| insert.execute(c)).map_err(DbError::from)? {
        0 => Err(VaultError::IdempotencyInFlight),
        _ => Ok(()),
    }
}

/// Forgets idempotency keys of all tenants whose time has passed.
pub(super) fn purge_keys(conn: &mut Conn, now: Timestamp) -> Result<usize, DbError> {
    let old =
        diesel::delete(idempotency_keys::table).filter(idempotency_keys::expires_at.le(now.as_micros()));
    Ok(with_conn!(conn, |c| old.execute(c))?)
}

/// Counts for status and metrics.
pub(super) fn figures(conn: &mut Conn, tenant: &TenantId) -> Result<Figures, DbError> {
    use crate::db::schema::jobs as j;
    use diesel::dsl::count_star;
    let by_kind = secrets::table
        .filter(secrets::tenant_id.eq(tenant.as_str()))
        .group_by(secrets::kind)
        .select((secrets::kind, count_star()));
    let rows: Vec<(String, i64)> = with_conn!(&mut *conn, |c| by_kind.load(c))?;
    let mut figures = Figures::default();
    for (kind, count) in rows {
        let kind = SecretKind::parse(&kind).map_or("unreadable", SecretKind::name);
        *figures.secrets.entry(kind).or_default() += unsigned("secrets", kind, count)?;
    }
    figures.records_by_kek_version = keks::records(conn, tenant)?;
    if let Some(target) = keks::active_version(conn, tenant, KekRole::Backup)? {
        figures.without_backup = Some(records::remaining(conn, tenant, (KekRole::Backup, target))?);
    }
    let open = [JobState::Queued.name(), JobState::Running.name()];
    let jobs =
        j::table.filter(j::tenant_id.eq(tenant.as_str()).and(j::state.eq_any(open))).select(count_star());
    let jobs: i64 = with_conn!(conn, |c| jobs.first(c))?;
    figures.open_jobs = unsigned("jobs", "", jobs)?;
    Ok(figures)
}
