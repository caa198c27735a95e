//! What the two halves of the table keep, in transactions that are rolled back.

use std::time::Duration;

use diesel::RunQueryDsl;

use super::rings::{self, Entry};
use super::{Public, activate, current, insert_planned, retire};
use crate::clock::Timestamp;
use crate::db::{Conn, Db, DbError, OpenOptions, Url};
use crate::ids::{SigningKeyId, TenantId};
use crate::keys::model::{Choice, Origin, Policy, Use};
use crate::keys::plan::Slot;
use crate::keys::{Phase, Purpose};
use crate::seal::{Alg, DeviceName, Fingerprint, KeyRef, KeySpec, PublicKey};
use crate::with_conn;

const NOW: Timestamp = Timestamp::from_micros(1_800_000_000_000_000);

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

const FIXED: Purpose = Purpose::ClientSecret;

#[tokio::test]
async fn a_fixed_key_is_planned_once_and_then_activated_once() {
    let work = |conn: &mut Conn, tenant: &TenantId| {
        let (id, key) = (SigningKeyId::generate(), KeyRef::plan(KeySpec::HmacSha256).unwrap());
        insert_planned(conn, tenant, FIXED, &id, &key, NOW)?;
        let found = current(conn, tenant, FIXED)?.unwrap();
        assert!(!found.is_made && found.id == id && found.device == key);

        activate(conn, &id, &pinned(&key, &public_key(7)), NOW)?;
        activate(conn, &id, &key, NOW)?;
        let found = current(conn, tenant, FIXED)?.unwrap();
        assert!(found.is_made && found.device.is_pinned());
        assert!(current(conn, tenant, Purpose::RequestBody)?.is_none());

        let again = insert_planned(conn, tenant, FIXED, &SigningKeyId::generate(), &key, NOW);
        assert!(matches!(again, Err(DbError::Duplicate)));
        Ok(())
    };
    trial(work).await;
}

#[tokio::test]
async fn a_key_keeps_its_device_and_a_lost_one_makes_room_for_another() {
    let work = |conn: &mut Conn, tenant: &TenantId| {
        let b = DeviceName::parse("b").unwrap();
        let (id, key) = (SigningKeyId::generate(), KeyRef::plan(KeySpec::HmacSha256).unwrap());
        insert_planned(conn, tenant, FIXED, &id, &key, NOW)?;
        assert!(current(conn, tenant, FIXED)?.unwrap().device.device().is_default());

        assert!(retire(conn, &id)? && !retire(conn, &id)?);
        assert!(current(conn, tenant, FIXED)?.is_none());
        let (id, key) = (SigningKeyId::generate(), key.on(b.clone()));
        insert_planned(conn, tenant, FIXED, &id, &key, NOW)?;
        assert_eq!(*current(conn, tenant, FIXED)?.unwrap().device.device(), b);
        Ok(())
    };
    trial(work).await;
}

fn planned_entry() -> Entry {
    Entry {
        choice: Some(Choice::Ec),
        origin: Origin::Generated,
        device: KeyRef::plan(KeySpec::EcP256).unwrap(),
        alg: Some(Alg::Es256),
        public: None,
    }
}

/// A ring with one key that signs.
fn first_key(conn: &mut Conn, tenant: &TenantId) -> Result<SigningKeyId, DbError> {
    rings::create(conn, tenant, Use::Jwt, &Policy::default())?;
    let before = rings::load(conn, tenant, Use::Jwt)?.unwrap().ring;
    let (id, mut after) = (SigningKeyId::generate(), before.clone());
    after.plan(id.clone(), Duration::ZERO, NOW).unwrap();
    let entry = planned_entry();
    assert!(rings::claim(conn, tenant, &before, &after)?);
    rings::insert(conn, tenant, Use::Jwt, after.slot(&id).unwrap(), &entry)?;
    let public = Public::of(&public_key(7), Alg::Es256, entry.choice);
    rings::made(conn, &id, &pinned(&entry.device, &public_key(7)), Some(&public))?;

    let before = rings::load(conn, tenant, Use::Jwt)?.unwrap().ring;
    let mut after = before.clone();
    after.publish(&id, Duration::ZERO, NOW).unwrap();
    assert!(rings::claim(conn, tenant, &before, &after)?);
    assert!(!rings::claim(conn, tenant, &before, &after)?, "decided on what is not there any more");
    rings::save(conn, &before, &after)?;
    Ok(id)
}

#[tokio::test]
async fn a_ring_comes_back_as_it_was_saved() {
    let work = |conn: &mut Conn, tenant: &TenantId| {
        assert!(rings::load(conn, tenant, Use::Jwt)?.is_none());
        let id = first_key(conn, tenant)?;
        let stored = rings::load(conn, tenant, Use::Jwt)?.unwrap();
        let slot = stored.ring.signer().unwrap();
        assert_eq!((&slot.id, slot.phase, slot.signs_from), (&id, Phase::Current, NOW));
        assert!(stored.entries[&id].public.is_some());
        assert_eq!(rings::version(conn, tenant, Use::Jwt)?, Some(stored.ring.version));

        // Everything that a slot has, in one go.
        let mut after = stored.ring.clone();
        let slot = Slot {
            phase: Phase::Previous,
            signs_until: Some(NOW.plus(Duration::from_secs(9))),
            longest: Duration::from_secs(77),
            margin: Duration::from_secs(5),
            is_leaving: true,
            ..after.slots[0].clone()
        };
        after.slots[0] = slot.clone();
        rings::save(conn, &stored.ring, &after)?;
        assert_eq!(rings::load(conn, tenant, Use::Jwt)?.unwrap().ring.slots, [slot]);
        Ok(())
    };
    trial(work).await;
}

#[tokio::test]
async fn the_database_keeps_two_keys_of_a_ring_from_signing_and_a_kid_from_being_used_twice() {
    let signs_twice = |conn: &mut Conn, tenant: &TenantId| {
        first_key(conn, tenant)?;
        let slot = Slot::planned(SigningKeyId::generate(), Duration::ZERO, NOW);
        rings::insert(conn, tenant, Use::Jwt, &slot, &planned_entry())?;
        let set = "UPDATE signing_keys SET state = 'current', published_at = 1";
        let twice = with_conn!(&mut *conn, |c| diesel::sql_query(set).execute(c)).map_err(DbError::from);
        assert!(matches!(twice, Err(DbError::Duplicate)));
        Ok(())
    };
    trial(signs_twice).await;
    let same_kid = |conn: &mut Conn, tenant: &TenantId| {
        first_key(conn, tenant)?;
        let slot = Slot::planned(SigningKeyId::generate(), Duration::ZERO, NOW);
        let entry = planned_entry();
        rings::insert(conn, tenant, Use::Jwt, &slot, &entry)?;
        let public = Public::of(&public_key(7), Alg::Es256, entry.choice);
        let again = rings::made(conn, &slot.id, &pinned(&entry.device, &public_key(7)), Some(&public));
        assert!(matches!(again, Err(DbError::Duplicate)));
        Ok(())
    };
    trial(same_kid).await;
}

#[tokio::test]
async fn a_key_that_is_out_of_the_jwks_signs_nothing_more() {
    let work = |conn: &mut Conn, tenant: &TenantId| {
        let id = first_key(conn, tenant)?;
        let longest =
            |conn: &mut Conn| rings::load(conn, tenant, Use::Jwt).unwrap().unwrap().ring.slots[0].longest;
        let version = |conn: &mut Conn| rings::version(conn, tenant, Use::Jwt).unwrap().unwrap();
        let before = version(conn);
        assert!(rings::raise_longest(conn, tenant, Use::Jwt, &id, Duration::from_secs(60))?);
        assert_eq!(version(conn), before + 1, "who decided on the ring without it decides again");
        assert!(rings::raise_longest(conn, tenant, Use::Jwt, &id, Duration::from_secs(50))?);
        assert_eq!((longest(conn), version(conn)), (Duration::from_secs(60), before + 1));
        with_conn!(&mut *conn, |c| diesel::sql_query("UPDATE signing_keys SET state = 'retired'")
            .execute(c))?;
        assert!(!rings::raise_longest(conn, tenant, Use::Jwt, &id, Duration::from_secs(70))?);
        assert_eq!(longest(conn), Duration::from_secs(60));
        Ok(())
    };
    trial(work).await;
}

#[tokio::test]
async fn live_tokens_are_counted_by_when_they_expire() {
    let work = |conn: &mut Conn, _: &TenantId| {
        let (one, other) = (SigningKeyId::generate(), SigningKeyId::generate());
        let at = |seconds| NOW.plus(Duration::from_secs(seconds));
        rings::count_tokens(
            conn,
            &[(one.clone(), at(10), 3), (one.clone(), at(20), 4), (other, at(20), 100)],
        )?;
        rings::count_tokens(conn, &[(one.clone(), at(20), 1)])?;
        let live = |conn: &mut Conn, seconds| rings::live_tokens(conn, &one, at(seconds)).unwrap();
        assert_eq!([live(conn, 0), live(conn, 10), live(conn, 20)], [8, 5, 0]);
        rings::forget_tokens(conn, at(10))?;
        assert_eq!(live(conn, 0), 5);
        Ok(())
    };
    trial(work).await;
}

#[tokio::test]
async fn a_public_half_that_is_not_the_pinned_one_is_no_key() {
    let work = |conn: &mut Conn, tenant: &TenantId| {
        first_key(conn, tenant)?;
        let kept = Public::of(&public_key(7), Alg::Es256, Some(Choice::Ec)).jwk.to_string();
        let other = Public::of(&public_key(8), Alg::Es256, Some(Choice::Ec));
        for (column, text) in [("jwk", other.jwk.to_string()), ("kid", other.kid)] {
            let set = |column: &str, text: &str| format!("UPDATE signing_keys SET {column} = '{text}'");
            with_conn!(&mut *conn, |c| diesel::sql_query(set(column, &text)).execute(c))?;
            let found = rings::load(conn, tenant, Use::Jwt);
            assert!(matches!(found, Err(DbError::Impossible { .. })), "{column}");
            with_conn!(&mut *conn, |c| diesel::sql_query(set("jwk", &kept)).execute(c))?;
        }
        Ok(())
    };
    trial(work).await;
}
