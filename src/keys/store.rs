//! The `signing_keys` table.

use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};
use serde_json::Value;

use crate::clock::Timestamp;
use crate::db::schema::signing_keys;
use crate::db::{Conn, DbError};
use crate::ids::{SigningKeyId, TenantId};
use crate::keys::{Purpose, TOKEN_ALG, jwk};
use crate::seal::{DeviceName, KeyRef, PublicKey};
use crate::with_conn;

/// A tenant's current key of a purpose.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) id: SigningKeyId,
    pub(super) device: KeyRef,
    pub(super) phase: Phase,
}

/// How far it has come.
#[derive(Clone)]
pub(super) enum Phase {
    /// Recorded; the device may or may not have made it yet.
    Planned,
    /// In use.
    Active {
        /// Its public half, for keys that sign.
        public: Option<Public>,
    },
}

/// What the world may know of a signing key.
#[derive(Clone)]
pub(super) struct Public {
    pub(super) kid: String,
    pub(super) jwk: Value,
}

impl Public {
    pub(super) fn of(key: &PublicKey) -> Self {
        Self { kid: jwk::thumbprint(key), jwk: jwk::jwk(key, TOKEN_ALG) }
    }
}

type Row = (String, Vec<u8>, Option<String>, Option<String>, String, String);

/// The tenant's planned or active key of that purpose.
pub(super) fn current(conn: &mut Conn, tenant: &TenantId, purpose: Purpose) -> Result<Option<Key>, DbError> {
    let query = signing_keys::table
        .filter(signing_keys::tenant_id.eq(tenant.as_str()))
        .filter(signing_keys::purpose.eq(purpose.name()))
        .filter(signing_keys::state.eq_any(["planned", "active"]))
        .select((
            signing_keys::id,
            signing_keys::key_ref,
            signing_keys::kid,
            signing_keys::jwk,
            signing_keys::state,
            signing_keys::device,
        ));
    let row: Option<Row> = with_conn!(conn, |c| query.first(c).optional())?;
    row.map(|row| read(&row, purpose).ok_or_else(|| DbError::impossible("signing_keys", &row.0))).transpose()
}

fn read((id, key_ref, kid, jwk, state, device): &Row, purpose: Purpose) -> Option<Key> {
    let id = SigningKeyId::parse(id).ok()?;
    let device = KeyRef::from_bytes(key_ref)?.on(DeviceName::parse(device)?);
    if device.spec() != purpose.spec() {
        return None;
    }
    let phase = match (state.as_str(), kid, jwk) {
        ("planned", None, None) => Phase::Planned,
        ("active", Some(kid), Some(jwk)) => {
            // The columns are for people to read. Tokens are checked with the key that the pin is of.
            let key = jwk::ec_public_key(&serde_json::from_str(jwk).ok()?, purpose.spec())?;
            let public = Public::of(&key);
            if !device.is_pinned_by(&key) || public.kid != *kid {
                return None;
            }
            Phase::Active { public: Some(public) }
        }
        ("active", None, None) => Phase::Active { public: None },
        _ => return None,
    };
    Some(Key { id, device, phase })
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
        signing_keys::alg.eq(purpose.alg_name()),
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

/// Whether the tenant has, or had, a key of that purpose that was made.
pub(super) fn was_made(conn: &mut Conn, tenant: &TenantId, purpose: Purpose) -> Result<bool, DbError> {
    let query = signing_keys::table
        .filter(signing_keys::tenant_id.eq(tenant.as_str()))
        .filter(signing_keys::purpose.eq(purpose.name()))
        .filter(signing_keys::state.eq_any(["active", "retired"]))
        .select(signing_keys::id);
    let found: Option<String> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(found.is_some())
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
    public: Option<&Public>,
    now: Timestamp,
) -> Result<(), DbError> {
    let planned = signing_keys::table
        .filter(signing_keys::id.eq(id.as_str()))
        .filter(signing_keys::state.eq("planned"));
    let active = (
        signing_keys::key_ref.eq(pinned.to_bytes()),
        signing_keys::kid.eq(public.map(|public| public.kid.as_str())),
        signing_keys::jwk.eq(public.map(|public| public.jwk.to_string())),
        signing_keys::state.eq("active"),
        signing_keys::activated_at.eq(now.as_micros()),
    );
    with_conn!(conn, |c| diesel::update(planned).set(active).execute(c))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use diesel::RunQueryDsl;

    use super::{Phase, Public, activate, current, insert_planned, retire};
    use crate::clock::Timestamp;
    use crate::db::{Conn, Db, DbError, OpenOptions, Url};
    use crate::ids::{SigningKeyId, TenantId};
    use crate::keys::Purpose;
    use crate::seal::{DeviceName, Fingerprint, KeyRef, KeySpec, PublicKey};
    use crate::with_conn;

    const NOW: Timestamp = Timestamp::from_micros(1);

    fn public_key(x: u8) -> PublicKey {
        PublicKey::Ec { spec: KeySpec::EcP256, x: vec![x; 32], y: vec![9; 32] }
    }

    /// The planned key as the device gives it back.
    fn pinned(planned: &KeyRef, key: &PublicKey) -> KeyRef {
        let Fingerprint(sum) = key.fingerprint();
        let mut bytes = planned.to_bytes();
        bytes.pop();
        bytes.push(1);
        bytes.extend_from_slice(&sum);
        KeyRef::from_bytes(&bytes).unwrap()
    }

    /// Runs `work` in a transaction that is rolled back.
    async fn trial(work: impl FnOnce(&mut Conn, &TenantId) -> Result<(), DbError> + Send + 'static) {
        let directory = tempfile::tempdir().unwrap();
        let url = Url::sqlite(directory.path().join("lacre.db"));
        let db = Db::open(&url, &OpenOptions { connections: 1, migrate: true }).unwrap();
        let tenant = TenantId::parse("default").unwrap();
        let work = move |conn: &mut Conn| -> Result<(), DbError> {
            work(conn, &tenant)?;
            Err(DbError::Duplicate)
        };
        assert!(matches!(db.write(work).await, Err(DbError::Duplicate)));
    }

    #[tokio::test]
    async fn a_key_is_planned_once_and_then_activated_once() {
        let work = |conn: &mut Conn, tenant: &TenantId| {
            let (id, key) = (SigningKeyId::generate(), KeyRef::plan(Purpose::Jwt.spec()).unwrap());
            insert_planned(conn, tenant, Purpose::Jwt, &id, &key, NOW)?;
            let found = current(conn, tenant, Purpose::Jwt)?.unwrap();
            assert!(matches!(found.phase, Phase::Planned) && found.id == id && found.device == key);

            let public = Public::of(&public_key(7));
            activate(conn, &id, &pinned(&key, &public_key(7)), Some(&public), NOW)?;
            activate(conn, &id, &key, None, NOW)?;
            let found = current(conn, tenant, Purpose::Jwt)?.unwrap();
            let kid = public.kid;
            assert!(matches!(found.phase, Phase::Active { public: Some(public) } if public.kid == kid));
            assert!(current(conn, tenant, Purpose::ClientSecret)?.is_none());

            let again = insert_planned(conn, tenant, Purpose::Jwt, &SigningKeyId::generate(), &key, NOW);
            assert!(matches!(again, Err(DbError::Duplicate)));
            Ok(())
        };
        trial(work).await;
    }

    #[tokio::test]
    async fn a_key_keeps_its_device_and_a_lost_one_makes_room_for_another() {
        let work = |conn: &mut Conn, tenant: &TenantId| {
            let b = DeviceName::parse("b").unwrap();
            let (id, key) = (SigningKeyId::generate(), KeyRef::plan(Purpose::Jwt.spec()).unwrap());
            insert_planned(conn, tenant, Purpose::Jwt, &id, &key, NOW)?;
            assert!(current(conn, tenant, Purpose::Jwt)?.unwrap().device.device().is_default());

            assert!(retire(conn, &id)? && !retire(conn, &id)?);
            assert!(current(conn, tenant, Purpose::Jwt)?.is_none());
            let (id, key) = (SigningKeyId::generate(), key.on(b.clone()));
            insert_planned(conn, tenant, Purpose::Jwt, &id, &key, NOW)?;
            assert_eq!(*current(conn, tenant, Purpose::Jwt)?.unwrap().device.device(), b);
            Ok(())
        };
        trial(work).await;
    }

    #[tokio::test]
    async fn a_public_half_that_is_not_the_pinned_one_is_no_key() {
        let work = |conn: &mut Conn, tenant: &TenantId| {
            let (id, key) = (SigningKeyId::generate(), KeyRef::plan(Purpose::Jwt.spec()).unwrap());
            insert_planned(conn, tenant, Purpose::Jwt, &id, &key, NOW)?;
            let public = Public::of(&public_key(7));
            activate(conn, &id, &pinned(&key, &public_key(7)), Some(&public), NOW)?;
            let other = Public::of(&public_key(8));
            for (column, text) in [("jwk", other.jwk.to_string()), ("kid", other.kid)] {
                let kept = public.jwk.to_string();
                let set = |column: &str, text: &str| format!("UPDATE signing_keys SET {column} = '{text}'");
                with_conn!(&mut *conn, |c| diesel::sql_query(set(column, &text)).execute(c))?;
                let found = current(conn, tenant, Purpose::Jwt);
                assert!(matches!(found, Err(DbError::Impossible { .. })), "{column}");
                with_conn!(&mut *conn, |c| diesel::sql_query(set("jwk", &kept)).execute(c))?;
            }
            Ok(())
        };
        trial(work).await;
    }
}
