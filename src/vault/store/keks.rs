//! SQL of KEK versions and of the records that each one wraps, by either of a record's two wraps.

use std::collections::BTreeMap;

use diesel::dsl::{count_star, max};
use diesel::prelude::*;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::{keks, secret_versions};
use crate::db::{Conn, DbError};
use crate::ids::TenantId;
use crate::seal::{DeviceName, Kek, KekId, KeyRef};
use crate::vault::model::{KekRole, KekState};
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
    device: String,
    role: String,
}

/// A KEK version as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::vault) struct KekRecord {
    pub(in crate::vault) kek: Kek,
    pub(in crate::vault) role: KekRole,
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
        let device = DeviceName::parse(&row.device).ok_or_else(impossible)?;
        let key = KeyRef::from_bytes(&row.key_ref).ok_or_else(impossible)?.on(device);
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
            role: KekRole::parse(&row.role).ok_or_else(impossible)?,
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

/// Records the next version before it is made, or returns the one that is planned already on that device.
/// `kek_id` is used for a tenant's first version, `key` for a new plan. A plan for another device gives
/// way, because that device may be why there is a new one: its key, if it was made, never wrapped anything.
pub(in crate::vault) fn plan(
    conn: &mut Conn,
    tenant: &TenantId,
    role: KekRole,
    kek_id: KekId,
    key: &KeyRef,
    now: Timestamp,
) -> Result<Kek, DbError> {
    let known = load(conn, tenant)?;
    let is_planned = |record: &&KekRecord| record.role == role && record.state == KekState::Planned;
    if let Some(KekRecord { kek: planned, .. }) = known.iter().find(is_planned) {
        if planned.key.device() == key.device() {
            return Ok(planned.clone());
        }
        let update = diesel::update(keks::table)
            .filter(keks::tenant_id.eq(tenant.as_str()).and(keks::version.eq(i64::from(planned.version))))
            .filter(keks::state.eq(KekState::Planned.name()))
            .set((keks::key_ref.eq(key.to_bytes()), keks::device.eq(key.device().as_str())));
        with_conn!(conn, |c| update.execute(c))?;
        return Ok(Kek { key: key.clone(), ..planned.clone() });
    }
    let (id, version) = known.last().map_or((kek_id, 1), |last| (last.kek.id, last.kek.version + 1));
    let row = (
        (keks::tenant_id.eq(tenant.as_str()), keks::version.eq(i64::from(version))),
        (keks::kek_id.eq(id.as_bytes().as_slice()), keks::key_ref.eq(key.to_bytes())),
        (keks::state.eq(KekState::Planned.name()), keks::wraps_reserved.eq(FIRST_WRAPS)),
        (keks::created_at.eq(now.as_micros()), keks::role.eq(role.name())),
        keks::device.eq(key.device().as_str()),
    );
    with_conn!(&mut *conn, |c| diesel::insert_into(keks::table).values(row).execute(c))?;
    Ok(Kek { id, version, key: key.clone() })
}

/// Makes the planned version the one that wraps in its role, and retires those before it. `false` if
/// another daemon has already done so, or if the plan has given way to another one.
pub(in crate::vault) fn activate(
    conn: &mut Conn,
    tenant: &TenantId,
    role: KekRole,
    planned: &Kek,
    pinned: &KeyRef,
    now: Timestamp,
) -> Result<bool, DbError> {
    let of_tenant = keks::tenant_id.eq(tenant.as_str()).and(keks::role.eq(role.name()));
    let activate = diesel::update(keks::table)
        .filter(of_tenant.and(keks::version.eq(i64::from(planned.version))))
        // As long as it is that plan.
        .filter(keks::state.eq(KekState::Planned.name()).and(keks::key_ref.eq(planned.key.to_bytes())))
        .set((
            keks::state.eq(KekState::Active.name()),
            keks::key_ref.eq(pinned.to_bytes()),
            keks::activated_at.eq(now.as_micros()),
        ));
    if with_conn!(&mut *conn, |c| activate.execute(c))? == 0 {
        return Ok(false);
    }
    let retire = diesel::update(keks::table)
        .filter(of_tenant.and(keks::version.lt(i64::from(planned.version))))
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

/// How many stored records each backup KEK version wraps a second time; 0 stands for none.
pub(in crate::vault) fn backups(conn: &mut Conn, tenant: &TenantId) -> Result<BTreeMap<u32, u64>, DbError> {
    use secret_versions as v;
    let query = v::table
        .filter(v::tenant_id.eq(tenant.as_str()))
        .group_by(v::backup_kek)
        .select((v::backup_kek, count_star()));
    let rows: Vec<(i64, i64)> = with_conn!(conn, |c| query.load(c))?;
    let mut counts = BTreeMap::new();
    for (version, count) in rows {
        let version = u32::try_from(version).unwrap_or(0);
        *counts.entry(version).or_insert(0) += unsigned("secret_versions", tenant.as_str(), count)?;
    }
    Ok(counts)
}

/// The version that wraps now, in that role.
pub(in crate::vault) fn active_version(
    conn: &mut Conn,
    tenant: &TenantId,
    role: KekRole,
) -> Result<Option<u32>, DbError> {
    let query = keks::table
        .filter(keks::tenant_id.eq(tenant.as_str()).and(keks::state.eq(KekState::Active.name())))
        .filter(keks::role.eq(role.name()))
        .select(max(keks::version));
    let version: Option<i64> = with_conn!(conn, |c| query.first(c))?;
    version
        .map(|version| u32::try_from(version).map_err(|_| DbError::impossible("keks", tenant.as_str())))
        .transpose()
}
