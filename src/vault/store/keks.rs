//! SQL of KEK versions and of the records that each one wraps.

use std::collections::BTreeMap;

use diesel::dsl::{count_star, max};
use diesel::prelude::*;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::{keks, secret_versions};
use crate::db::{Conn, DbError};
use crate::ids::TenantId;
use crate::seal::{Kek, KekId, KeyRef};
use crate::vault::model::KekState;
use crate::with_conn;

/// Wraps that making a KEK costs: the canary that pins it.
const FIRST_WRAPS: i64 = 1;

#[derive(Queryable, Selectable)]
#[diesel(table_name = keks)]
struct Row {
    tenant_id: String,
    version: i64,
    kek_id: Vec<u8>,
    key_ref: Vec<u8>,
    state: String,
    wraps_reserved: i64,
    created_at: i64,
    activated_at: Option<i64>,
}

/// A KEK version as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::vault) struct KekRecord {
    pub(in crate::vault) kek: Kek,
    pub(in crate::vault) state: KekState,
    pub(in crate::vault) wraps_reserved: u64,
    pub(in crate::vault) created_at: Timestamp,
    pub(in crate::vault) activated_at: Option<Timestamp>,
}

impl TryFrom<Row> for KekRecord {
    type Error = DbError;

    fn try_from(row: Row) -> Result<Self, DbError> {
        let address = format!("{}/{}", row.tenant_id, row.version);
        let impossible = || DbError::impossible("keks", &address);
        let key = KeyRef::from_bytes(&row.key_ref).ok_or_else(impossible)?;
        let state = KekState::parse(&row.state).ok_or_else(impossible)?;
        // Only a planned key may be without its pin: an unpinned one could be any key.
        if key.is_pinned() == (state == KekState::Planned) {
            return Err(impossible());
        }
        Ok(Self {
            kek: Kek {
                id: KekId::from_bytes(&row.kek_id).ok_or_else(impossible)?,
                version: u32::try_from(row.version).map_err(|_| impossible())?,
                key,
            },
            state,
            wraps_reserved: unsigned("keks", &address, row.wraps_reserved)?,
            created_at: Timestamp::from_micros(row.created_at),
            activated_at: row.activated_at.map(Timestamp::from_micros),
        })
    }
}

/// A tenant's KEK versions, oldest first.
pub(in crate::vault) fn load(conn: &mut Conn, tenant: &TenantId) -> Result<Vec<KekRecord>, DbError> {
    let query = keks::table.filter(keks::tenant_id.eq(tenant.as_str())).order(keks::version);
    let rows: Vec<Row> = with_conn!(conn, |c| query.select(Row::as_select()).load(c))?;
    rows.into_iter().map(KekRecord::try_from).collect()
}

/// Records the next version before it is made, or returns the one that is planned already. `kek_id`
/// is used for a tenant's first version, `key` for a new plan.
pub(in crate::vault) fn plan(
    conn: &mut Conn,
    tenant: &TenantId,
    kek_id: KekId,
    key: &KeyRef,
    now: Timestamp,
) -> Result<Kek, DbError> {
    let known = load(conn, tenant)?;
    if let Some(planned) = known.iter().find(|record| record.state == KekState::Planned) {
        return Ok(planned.kek.clone());
    }
    let (id, version) = known.last().map_or((kek_id, 1), |last| (last.kek.id, last.kek.version + 1));
    let row = (
        (keks::tenant_id.eq(tenant.as_str()), keks::version.eq(i64::from(version))),
        (keks::kek_id.eq(id.as_bytes().as_slice()), keks::key_ref.eq(key.to_bytes())),
        (keks::state.eq(KekState::Planned.name()), keks::wraps_reserved.eq(FIRST_WRAPS)),
        keks::created_at.eq(now.as_micros()),
    );
    with_conn!(&mut *conn, |c| diesel::insert_into(keks::table).values(row).execute(c))?;
    Ok(Kek { id, version, key: key.clone() })
}

/// Makes the planned version the one that seals, and retires those before it. `false` if another
/// daemon has already done so.
pub(in crate::vault) fn activate(
    conn: &mut Conn,
    tenant: &TenantId,
    version: u32,
    pinned: &KeyRef,
    now: Timestamp,
) -> Result<bool, DbError> {
    let of_tenant = keks::tenant_id.eq(tenant.as_str());
    let activate = diesel::update(keks::table)
        .filter(of_tenant.and(keks::version.eq(i64::from(version))))
        .filter(keks::state.eq(KekState::Planned.name()))
        .set((
            keks::state.eq(KekState::Active.name()),
            keks::key_ref.eq(pinned.to_bytes()),
            keks::activated_at.eq(now.as_micros()),
        ));
    if with_conn!(&mut *conn, |c| activate.execute(c))? == 0 {
        return Ok(false);
    }
    let retire = diesel::update(keks::table)
        .filter(of_tenant.and(keks::version.lt(i64::from(version))))
        .filter(keks::state.eq(KekState::Active.name()))
        .set(keks::state.eq(KekState::Retired.name()));
    with_conn!(&mut *conn, |c| retire.execute(c))?;
    Ok(true)
}

/// Reserves wraps under an active version; `false` if the budget does not allow it.
pub(in crate::vault) fn reserve(
    conn: &mut Conn,
    tenant: &TenantId,
    version: u32,
    block: u64,
    budget: u64,
) -> Result<bool, DbError> {
    let room = signed(budget).saturating_sub(signed(block));
    let update = diesel::update(keks::table)
        .filter(keks::tenant_id.eq(tenant.as_str()).and(keks::version.eq(i64::from(version))))
        .filter(keks::state.eq(KekState::Active.name()).and(keks::wraps_reserved.le(room)))
        .set(keks::wraps_reserved.eq(keks::wraps_reserved + signed(block)));
    Ok(with_conn!(conn, |c| update.execute(c))? == 1)
}

/// How many stored records each KEK version wraps.
pub(in crate::vault) fn records(conn: &mut Conn, tenant: &TenantId) -> Result<BTreeMap<u32, u64>, DbError> {
    use secret_versions as v;
    let query = v::table
        .filter(v::tenant_id.eq(tenant.as_str()))
        .group_by(v::kek_version)
        .select((v::kek_version, count_star()));
    let rows: Vec<(i64, i64)> = with_conn!(conn, |c| query.load(c))?;
    let mut counts = BTreeMap::new();
    for (version, count) in rows {
        // The column decides nothing. What no version can be is counted as that of none, which is 0.
        let version = u32::try_from(version).unwrap_or(0);
        *counts.entry(version).or_insert(0) += unsigned("secret_versions", tenant.as_str(), count)?;
    }
    Ok(counts)
}

/// Where a rewrap is: after this record. Ordered as the index of `secret_versions` is. Whatever stands
/// in the columns is a position: a row that cannot be must not keep the others from being moved.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::vault) struct Position {
    pub(in crate::vault) kek_version: i64,
    pub(in crate::vault) secret: String,
    pub(in crate::vault) version: i64,
}

impl Default for Position {
    /// Before every record.
    fn default() -> Self {
        Self { kek_version: i64::MIN, secret: String::new(), version: i64::MIN }
    }
}

impl Position {
    /// The form in the `position` column; empty for the beginning.
    pub(in crate::vault) fn to_text(&self) -> String {
        if *self == Self::default() {
            return String::new();
        }
        format!("{}/{}/{}", self.kek_version, self.secret, self.version)
    }

    /// Reads [`Position::to_text`].
    pub(in crate::vault) fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::default());
        }
        // Ids have no slash, but a row that somebody altered may.
        let (kek_version, rest) = text.split_once('/')?;
        let (secret, version) = rest.rsplit_once('/')?;
        Some(Self {
            kek_version: kek_version.parse().ok()?,
            secret: secret.to_owned(),
            version: version.parse().ok()?,
        })
    }
}

/// A record that is to be wrapped anew: its place and its wrapped DEK as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::vault) struct ToRewrap {
    pub(in crate::vault) position: Position,
    pub(in crate::vault) wrapped_dek: Vec<u8>,
}

/// The next records under a KEK version below `target`, after `position`, at most `limit`.
pub(in crate::vault) fn to_rewrap(
    conn: &mut Conn,
    tenant: &TenantId,
    target: u32,
    position: &Position,
    limit: i64,
) -> Result<Vec<ToRewrap>, DbError> {
    use secret_versions as v;
    let at = position.kek_version;
    let after = v::secret_id
        .gt(&position.secret)
        .or(v::secret_id.eq(&position.secret).and(v::version.gt(position.version)));
    let of_tenant = v::tenant_id.eq(tenant.as_str()).and(v::kek_version.lt(i64::from(target)));
    // Two statements, because each walks the index in its order; one with OR would sort everything.
    let here = v::table
        .filter(of_tenant.and(v::kek_version.eq(at)).and(after))
        .order((v::secret_id, v::version))
        .limit(limit)
        .select((v::kek_version, v::secret_id, v::version, v::wrapped_dek));
    let mut rows: Vec<(i64, String, i64, Vec<u8>)> = with_conn!(&mut *conn, |c| here.load(c))?;
    if rows.len() < usize::try_from(limit).unwrap_or(0) {
        let beyond = v::table
            .filter(of_tenant.and(v::kek_version.gt(at)))
            .order((v::kek_version, v::secret_id, v::version))
            .limit(limit - i64::try_from(rows.len()).unwrap_or(0))
            .select((v::kek_version, v::secret_id, v::version, v::wrapped_dek));
        let more: Vec<(i64, String, i64, Vec<u8>)> = with_conn!(conn, |c| beyond.load(c))?;
        rows.extend(more);
    }
    let record = |(kek_version, secret, version, wrapped_dek)| ToRewrap {
        position: Position { kek_version, secret, version },
        wrapped_dek,
    };
    Ok(rows.into_iter().map(record).collect())
}

/// How many records are under a KEK version below `target`.
pub(in crate::vault) fn remaining(conn: &mut Conn, tenant: &TenantId, target: u32) -> Result<u64, DbError> {
    use secret_versions as v;
    let query = v::table
        .filter(v::tenant_id.eq(tenant.as_str()).and(v::kek_version.lt(i64::from(target))))
        .select(count_star());
    let count: i64 = with_conn!(conn, |c| query.first(c))?;
    unsigned("secret_versions", tenant.as_str(), count)
}

/// Puts the new wrap in the old one's place, if that is still there.
pub(in crate::vault) fn swap_wrap(
    conn: &mut Conn,
    tenant: &TenantId,
    old: &ToRewrap,
    wrapped_dek: &[u8],
    kek_version: u32,
) -> Result<bool, DbError> {
    use secret_versions as v;
    let update = diesel::update(v::table)
        .filter(v::secret_id.eq(&old.position.secret).and(v::version.eq(old.position.version)))
        .filter(v::tenant_id.eq(tenant.as_str()).and(v::wrapped_dek.eq(&old.wrapped_dek)))
        .set((v::wrapped_dek.eq(wrapped_dek), v::kek_version.eq(i64::from(kek_version))));
    Ok(with_conn!(conn, |c| update.execute(c))? == 1)
}

/// The version that seals now.
pub(in crate::vault) fn active_version(conn: &mut Conn, tenant: &TenantId) -> Result<Option<u32>, DbError> {
    let query = keks::table
        .filter(keks::tenant_id.eq(tenant.as_str()).and(keks::state.eq(KekState::Active.name())))
        .select(max(keks::version));
    let version: Option<i64> = with_conn!(conn, |c| query.first(c))?;
    version
        .map(|version| u32::try_from(version).map_err(|_| DbError::impossible("keks", tenant.as_str())))
        .transpose()
}
