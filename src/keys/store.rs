//! The `signing_keys` table as far as fixed keys are in it; `rings.rs` has the rest of it.

pub(super) mod rings;

use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};
use serde_json::Value;

use crate::clock::Timestamp;
use crate::db::schema::{keks, signing_keys};
use crate::db::{Conn, DbError};
use crate::ids::{SigningKeyId, TenantId};
use crate::keys::model::Choice;
use crate::keys::{Purpose, jwk};
use crate::seal::{Alg, DeviceName, KeyId, KeyRef, KeySpec, PublicKey};
use crate::with_conn;

/// A tenant's fixed key of a purpose.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) id: SigningKeyId,
    pub(super) device: KeyRef,
    /// Whether it is in use; else the device may or may not have made it yet.
    pub(super) is_made: bool,
}

/// What the world may know of a signing key.
#[derive(Clone)]
pub(super) struct Public {
    pub(super) kid: String,
    pub(super) jwk: Value,
}

impl Public {
    pub(super) fn of(key: &PublicKey, alg: Alg, choice: Option<Choice>) -> Self {
        Self { kid: jwk::thumbprint(key), jwk: jwk::jwk(key, alg, choice) }
    }
}

type Row = (String, Vec<u8>, String, String);

/// The tenant's planned or active key of that purpose.
pub(super) fn current(conn: &mut Conn, tenant: &TenantId, purpose: Purpose) -> Result<Option<Key>, DbError> {
    let query = signing_keys::table
        .filter(signing_keys::tenant_id.eq(tenant.as_str()))
        .filter(signing_keys::purpose.eq(purpose.name()))
        .filter(signing_keys::state.eq_any(["planned", "active"]))
        .select((signing_keys::id, signing_keys::key_ref, signing_keys::state, signing_keys::device));
    let row: Option<Row> = with_conn!(conn, |c| query.first(c).optional())?;
    row.map(|row| read(&row).ok_or_else(|| DbError::impossible("signing_keys", &row.0))).transpose()
}

fn read((id, key_ref, state, device): &Row) -> Option<Key> {
    let id = SigningKeyId::parse(id).ok()?;
    let device = KeyRef::from_bytes(key_ref)?.on(DeviceName::parse(device)?);
    let is_made = state == "active";
    (device.spec() == KeySpec::HmacSha256).then_some(Key { id, device, is_made })
}

/// Records a key that is to be made.
///
/// # Errors
/// [`DbError::Duplicate`] if the tenant has a current key of that purpose already.
pub(super) fn insert_planned(
    conn: &mut Conn,
    tenant: &TenantId,
    purpose: Purpose,
    id: &SigningKeyId,
    key: &KeyRef,
    now: Timestamp,
) -> Result<(), DbError> {
    let row = (
        signing_keys::id.eq(id.as_str()),
        signing_keys::tenant_id.eq(tenant.as_str()),
        signing_keys::purpose.eq(purpose.name()),
        signing_keys::alg.eq("HS256"),
        signing_keys::key_ref.eq(key.to_bytes()),
        signing_keys::state.eq("planned"),
        signing_keys::created_at.eq(now.as_micros()),
        signing_keys::device.eq(key.device().as_str()),
    );
    with_conn!(conn, |c| diesel::insert_into(signing_keys::table).values(row).execute(c))?;
    Ok(())
}

/// Gives up a key that was lost with its device; its row stays. `false` if it is not current any more.
pub(super) fn retire(conn: &mut Conn, id: &SigningKeyId) -> Result<bool, DbError> {
    let current = signing_keys::table
        .filter(signing_keys::id.eq(id.as_str()))
        .filter(signing_keys::state.eq_any(["planned", "active"]));
    let retired = signing_keys::state.eq("retired");
    Ok(with_conn!(conn, |c| diesel::update(current).set(retired).execute(c))? == 1)
}

/// Whether the tenant has, or had, a key of that purpose or use that was made.
pub(super) fn was_made(conn: &mut Conn, tenant: &TenantId, name: &str) -> Result<bool, DbError> {
    let query = signing_keys::table
        .filter(signing_keys::tenant_id.eq(tenant.as_str()))
        .filter(signing_keys::purpose.eq(name))
        .filter(signing_keys::state.ne("planned"))
        .select(signing_keys::id);
    let found: Option<String> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(found.is_some())
}

/// The device ids of all keys, of all tenants, that are or may be on a device. `keks` is `vault`'s.
pub(super) fn device_ids(conn: &mut Conn) -> Result<Vec<KeyId>, DbError> {
    let signing = signing_keys::table.select(signing_keys::key_ref);
    let mut refs: Vec<Vec<u8>> = with_conn!(&mut *conn, |c| signing.load(c))?;
    refs.extend(with_conn!(conn, |c| keks::table.select(keks::key_ref).load::<Vec<u8>>(c))?);
    Ok(refs.iter().filter_map(|bytes| Some(KeyRef::from_bytes(bytes)?.id())).collect())
}

/// When the tenant's current key of that purpose came into use.
pub(super) fn activated_at(
    conn: &mut Conn,
    tenant: &TenantId,
    purpose: Purpose,
) -> Result<Option<Timestamp>, DbError> {
    let query = signing_keys::table
        .filter(signing_keys::tenant_id.eq(tenant.as_str()))
        .filter(signing_keys::purpose.eq(purpose.name()))
        .filter(signing_keys::state.eq("active"))
        .select(signing_keys::activated_at);
    let at: Option<Option<i64>> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(at.flatten().map(Timestamp::from_micros))
}

/// Takes a planned key into use. Does nothing if another daemon has done it already.
pub(super) fn activate(
    conn: &mut Conn,
    id: &SigningKeyId,
    pinned: &KeyRef,
    now: Timestamp,
) -> Result<(), DbError> {
    let planned = signing_keys::table
        .filter(signing_keys::id.eq(id.as_str()))
        .filter(signing_keys::state.eq("planned"));
    let active = (
        signing_keys::key_ref.eq(pinned.to_bytes()),
        signing_keys::state.eq("active"),
        signing_keys::activated_at.eq(now.as_micros()),
    );
    with_conn!(conn, |c| diesel::update(planned).set(active).execute(c))?;
    Ok(())
}

#[cfg(test)]
mod tests;
