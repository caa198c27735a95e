//! The stores on both engines, through the database's own doors.

use std::collections::BTreeMap;

use super::records::Position;
use super::{IdempotencyRow, NewVersion, StoredVersion, jobs, keks, records, restore};
use crate::clock::Timestamp;
use crate::db::{Conn, Db, DbError, OpenOptions, Url};
use crate::ids::{JobId, SecretId, TenantId};
use crate::seal::{DeviceName, KekId, KeyRef, KeySpec};
use crate::vault::VaultError;
use crate::vault::model::{
    Encoding, JobKind, JobState, KekRole, KekState, ListFilter, SecretInfo, SecretKind,
};

#[path = "../../../tests/support/postgres.rs"]
mod postgres;

const NOW: Timestamp = Timestamp::from_micros(1_000_000);
const LATER: Timestamp = Timestamp::from_micros(2_000_000);

struct Store {
    db: Db,
    tenant: TenantId,
    _directory: tempfile::TempDir,
}

impl Store {
    async fn both() -> [Self; 2] {
        let directory = tempfile::tempdir().unwrap();
        let sqlite = Url::sqlite(directory.path().join("lacre.db"));
        let server = Url::parse(&postgres::Postgres::shared().database()).unwrap();
        [Self::open(sqlite, directory).await, Self::open(server, tempfile::tempdir().unwrap()).await]
    }

    async fn open(url: Url, directory: tempfile::TempDir) -> Self {
        let db = Db::open(&url, &OpenOptions { connections: 2, migrate: true }).unwrap();
        let store = Self { db, tenant: TenantId::parse("t").unwrap(), _directory: directory };
        for tenant in ["t", "other"] {
            let tenant = TenantId::parse(tenant).unwrap();
            store.write(move |conn| Ok(super::ensure_tenant(conn, &tenant, NOW)?)).await.unwrap();
        }
        store
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Conn) -> Result<T, VaultError> + Send + 'static,
    ) -> Result<T, VaultError> {
        self.db.write(work).await
    }

    async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut Conn, &TenantId) -> Result<T, DbError> + Send + 'static,
    ) -> T {
        let tenant = self.tenant.clone();
        self.db.read(move |conn| query(conn, &tenant)).await.unwrap()
    }

    async fn insert(&self, name: &str) -> Result<SecretInfo, VaultError> {
        self.insert_with_key(name, None).await
    }

    async fn insert_with_key(
        &self,
        name: &str,
        key: Option<IdempotencyRow>,
    ) -> Result<SecretInfo, VaultError> {
        let (tenant, info) = (self.tenant.clone(), info(name));
        let stored = info.clone();
        self.write(move |conn| super::insert(conn, &tenant, &stored, version(1, 1), key.as_ref())).await?;
        Ok(info)
    }

    async fn replace(&self, id: &SecretId, expected: i64, new: NewVersion) -> Result<SecretInfo, VaultError> {
        let (tenant, id) = (self.tenant.clone(), id.clone());
        self.write(move |conn| super::replace(conn, &tenant, &id, expected, new, 3, LATER)).await
    }

    async fn delete(&self, id: &SecretId, expected: Option<i64>) -> Result<(), VaultError> {
        let (tenant, id) = (self.tenant.clone(), id.clone());
        self.write(move |conn| super::delete(conn, &tenant, &id, expected)).await
    }

    async fn version(
        &self,
        id: &SecretId,
        version: Option<u64>,
    ) -> Option<(SecretInfo, Option<StoredVersion>)> {
        let id = id.clone();
        self.read(move |conn, tenant| super::find_version(conn, tenant, &id, version)).await
    }

    async fn version_numbers(&self, id: &SecretId) -> Vec<u64> {
        let id = id.clone();
        let infos = self.read(move |conn, tenant| super::versions(conn, tenant, &id, None, 100)).await;
        infos.into_iter().map(|info| info.version).collect()
    }

    /// Plans the next KEK version and lets it seal.
    async fn make_kek(&self) -> u32 {
        let tenant = self.tenant.clone();
        let (kek_id, key) = (KekId::generate().unwrap(), KeyRef::plan(KeySpec::Kek).unwrap());
        let work = move |conn: &mut Conn| -> Result<u32, VaultError> {
            let planned = keks::plan(conn, &tenant, KekRole::Main, kek_id, &key, NOW)?;
            let pinned = pinned(&planned.key);
            assert!(keks::activate(conn, &tenant, KekRole::Main, &planned, &pinned, NOW)?);
            assert!(!keks::activate(conn, &tenant, KekRole::Main, &planned, &pinned, NOW)?);
            Ok(planned.version)
        };
        self.write(work).await.unwrap()
    }

    async fn queue(&self) -> Result<crate::vault::model::JobInfo, VaultError> {
        let (tenant, id) = (self.tenant.clone(), JobId::generate());
        self.write(move |conn| jobs::queue(conn, &tenant, JobKind::Rewrap, &id, None, NOW)).await
    }

    async fn claim(&self, now: Timestamp, until: Timestamp) -> Option<jobs::Job> {
        match self.write(move |conn| Ok(jobs::claim(conn, "me", now, until)?)).await.unwrap()? {
            jobs::Claimed::Job(job) => Some(job),
            jobs::Claimed::Unreadable(id) => panic!("{id} cannot be read"),
        }
    }
}

fn info(name: &str) -> SecretInfo {
    SecretInfo {
        id: SecretId::generate(),
        name: name.to_owned(),
        kind: SecretKind::Password,
        labels: BTreeMap::from([("team".to_owned(), "payments \u{e4}".to_owned())]),
        version: 1,
        expires_at: Some(LATER),
        created_at: NOW,
        updated_at: NOW,
        row_version: 1,
    }
}

fn version(number: u64, kek_version: u32) -> NewVersion {
    let part = |tag: u8| vec![tag, u8::try_from(number).unwrap(), 0xff, 0];
    NewVersion {
        version: number,
        encoding: Encoding::Utf8,
        len: 4,
        kek_version,
        columns: [part(1), part(2), part(3), part(4)],
    }
}

fn pinned(key: &KeyRef) -> KeyRef {
    // The bytes of a planned key end in "no pin"; those of a pinned one in its kind and 32 bytes.
    let mut bytes = key.to_bytes();
    bytes.pop();
    bytes.push(1);
    bytes.extend([7; 32]);
    KeyRef::from_bytes(&bytes).unwrap()
}

fn key(name: &str, result: &str, expires_at: Timestamp) -> IdempotencyRow {
    IdempotencyRow {
        tenant_id: "t".to_owned(),
        principal: "app:a".to_owned(),
        key: name.to_owned(),
        operation: "secret.create".to_owned(),
        body_mac: vec![1; 32],
        result_id: result.to_owned(),
        expires_at: expires_at.as_micros(),
    }
}

#[tokio::test]
async fn a_secret_is_found_as_it_was_stored() {
    for store in Store::both().await {
        let stored = store.insert("db/password").await.unwrap();

        let (info, found) = store.version(&stored.id, None).await.unwrap();
        assert_eq!(info, stored);
        assert_eq!(found.unwrap().columns, version(1, 1).columns);
        assert!(store.version(&stored.id, Some(2)).await.unwrap().1.is_none());
        assert!(store.version(&SecretId::generate(), None).await.is_none());
    }
}

#[tokio::test]
async fn another_tenants_secret_looks_like_none() {
    for mut store in Store::both().await {
        let id = store.insert("a").await.unwrap().id;
        store.tenant = TenantId::parse("other").unwrap();

        assert!(store.version(&id, None).await.is_none());
        assert!(store.version_numbers(&id).await.is_empty());
        assert!(matches!(store.replace(&id, 1, version(2, 1)).await, Err(VaultError::NotFound(_))));
        assert!(matches!(store.delete(&id, None).await, Err(VaultError::NotFound(_))));
        // Names are unique within a tenant, not beyond.
        store.insert("a").await.unwrap();
    }
}

#[tokio::test]
async fn a_name_is_taken_once() {
    for store in Store::both().await {
        store.insert("a").await.unwrap();

        assert!(matches!(store.insert("a").await, Err(VaultError::NameTaken)));
    }
}

#[tokio::test]
async fn a_new_version_needs_the_row_version_that_was_seen() {
    for store in Store::both().await {
        let id = store.insert("a").await.unwrap().id;

        let replaced = store.replace(&id, 1, version(2, 1)).await.unwrap();
        assert_eq!((replaced.version, replaced.row_version, replaced.updated_at), (2, 2, LATER));
        let stale = store.replace(&id, 1, version(2, 1)).await;
        assert!(matches!(stale, Err(VaultError::VersionConflict { current: 2 })));
        assert!(matches!(store.delete(&id, Some(1)).await, Err(VaultError::VersionConflict { current: 2 })));
        let (_, newest) = store.version(&id, None).await.unwrap();
        assert_eq!(newest.unwrap().version, 2);
        assert_eq!(store.version(&id, Some(1)).await.unwrap().1.unwrap().columns, version(1, 1).columns);
    }
}

#[tokio::test]
async fn old_versions_give_way_to_new_ones() {
    for store in Store::both().await {
        let id = store.insert("a").await.unwrap().id;
        for number in 2..=5 {
            store.replace(&id, i64::try_from(number).unwrap() - 1, version(number, 1)).await.unwrap();
        }

        assert_eq!(store.version_numbers(&id).await, [5, 4, 3]);
    }
}

#[tokio::test]
async fn a_deleted_secret_leaves_no_version_behind() {
    for store in Store::both().await {
        let id = store.insert("a").await.unwrap().id;
        store.delete(&id, Some(1)).await.unwrap();

        assert!(store.version(&id, None).await.is_none());
        assert!(store.version_numbers(&id).await.is_empty());
        assert!(matches!(store.delete(&id, None).await, Err(VaultError::NotFound(_))));
    }
}

#[tokio::test]
async fn a_list_goes_on_after_the_last_id_and_filters() {
    for store in Store::both().await {
        let mut ids = Vec::new();
        for name in ["a", "b", "c"] {
            ids.push(store.insert(name).await.unwrap().id);
        }
        ids.sort();
        let list = |filter: ListFilter| {
            store.read(move |conn, tenant| {
                let after = filter.after.as_ref().map(SecretId::as_str);
                super::list(conn, tenant, &filter, after, 1)
            })
        };

        let first = list(ListFilter::default()).await;
        assert_eq!(first.len(), 2, "one more than asked for");
        let rest = list(ListFilter { after: Some(ids[1].clone()), ..ListFilter::default() }).await;
        assert_eq!(rest.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), [ids[2].as_str()]);
        let named = list(ListFilter { name: Some("b".to_owned()), ..ListFilter::default() }).await;
        assert_eq!(named[0].1.as_ref().unwrap().name, "b");
        let opaque = list(ListFilter { kind: Some(SecretKind::Opaque), ..ListFilter::default() }).await;
        assert!(opaque.is_empty());
    }
}

#[tokio::test]
async fn an_idempotency_key_is_written_with_its_result_or_not_at_all() {
    for store in Store::both().await {
        let find = |now| store.read(move |conn, tenant| super::find_key(conn, tenant, "app:a", "k", now));
        store.insert("taken").await.unwrap();

        let refused = store.insert_with_key("taken", Some(key("k", "x", LATER))).await;
        assert!(matches!(refused, Err(VaultError::NameTaken)));
        assert_eq!(find(NOW).await, None);

        store.insert_with_key("a", Some(key("k", "x", LATER))).await.unwrap();
        assert_eq!(find(NOW).await, Some(key("k", "x", LATER)));
        let again = store.insert_with_key("b", Some(key("k", "y", LATER))).await;
        assert!(matches!(again, Err(VaultError::IdempotencyInFlight)));

        assert_eq!(find(LATER).await, None, "expired");
        assert_eq!(store.write(|conn| Ok(super::purge_keys(conn, LATER)?)).await.unwrap(), 1);
    }
}

#[tokio::test]
async fn one_version_seals_and_older_ones_are_retired() {
    for store in Store::both().await {
        assert_eq!((store.make_kek().await, store.make_kek().await), (1, 2));

        let records = store.read(keks::load).await;
        let states: Vec<_> = records.iter().map(|record| record.state).collect();
        assert_eq!(states, [KekState::Retired, KekState::Active]);
        assert_eq!(records[0].kek.id, records[1].kek.id);
        assert_ne!(records[0].kek.key.id(), records[1].kek.key.id());
        assert_eq!(
            store.read(|conn, tenant| keks::active_version(conn, tenant, KekRole::Main)).await,
            Some(2)
        );
    }
}

#[tokio::test]
async fn a_plan_that_was_interrupted_is_taken_up_again() {
    for store in Store::both().await {
        let plan = || {
            let tenant = store.tenant.clone();
            let (kek_id, key) = (KekId::generate().unwrap(), KeyRef::plan(KeySpec::Kek).unwrap());
            store.write(move |conn| Ok(keks::plan(conn, &tenant, KekRole::Main, kek_id, &key, NOW)?))
        };

        assert_eq!(plan().await.unwrap(), plan().await.unwrap());
        assert_eq!(store.read(|conn, tenant| keks::active_version(conn, tenant, KekRole::Main)).await, None);
    }
}

#[tokio::test]
async fn reservations_stay_within_the_budget() {
    for store in Store::both().await {
        let version = store.make_kek().await;
        let reserve = |block| {
            let tenant = store.tenant.clone();
            store.write(move |conn| Ok(keks::reserve(conn, &tenant, version, block, 10)?))
        };

        // One wrap was the canary's.
        assert!(reserve(5).await.unwrap());
        assert!(!reserve(5).await.unwrap());
        assert!(reserve(4).await.unwrap());
        assert!(!reserve(1).await.unwrap());
        assert_eq!(store.read(keks::load).await[0].wraps_reserved, 10);
        store.make_kek().await;
        assert!(!reserve(0).await.unwrap(), "a retired version wraps nothing");
    }
}

#[tokio::test]
async fn records_are_walked_in_order_and_moved_once() {
    for store in Store::both().await {
        for name in ["a", "b", "c"] {
            let id = store.insert(name).await.unwrap().id;
            store.replace(&id, 1, version(2, 2)).await.unwrap();
        }
        let batch = |position: Position| {
            store.read(move |conn, tenant| records::to_rewrap(conn, tenant, (KekRole::Main, 3), &position, 4))
        };

        let first = batch(Position::default()).await;
        let places: Vec<_> = first.iter().map(|record| record.position.clone()).collect();
        assert_eq!(places.iter().map(|place| place.kek_version).collect::<Vec<_>>(), [1, 1, 1, 2]);
        assert!(places.is_sorted());
        let second = batch(places[3].clone()).await;
        assert_eq!(second.len(), 2);
        assert!(batch(second[1].position.clone()).await.is_empty());

        let swap = || {
            let (tenant, old) = (store.tenant.clone(), first[0].clone());
            store.write(move |conn| Ok(records::swap_wrap(conn, &tenant, KekRole::Main, &old, b"new", 3)?))
        };
        assert!(swap().await.unwrap());
        assert!(!swap().await.unwrap());
        assert_eq!(store.read(|conn, tenant| records::remaining(conn, tenant, (KekRole::Main, 3))).await, 5);
        assert_eq!(store.read(keks::records).await, BTreeMap::from([(1, 2), (2, 3), (3, 1)]));
    }
}

#[test]
fn a_position_survives_its_text() {
    let place = Position { kek_version: 3, secret: SecretId::generate().to_string(), version: 7 };

    assert_eq!(Position::parse(&place.to_text()), Some(place));
    assert_eq!(Position::parse(""), Some(Position::default()));
    assert_eq!(Position::parse("x/y"), None);
}

#[tokio::test]
async fn a_worker_without_its_lease_writes_nothing() {
    for store in Store::both().await {
        assert!(matches!(store.queue().await, Err(VaultError::NotFound(_))), "nothing seals yet");
        store.make_kek().await;
        let queued = store.queue().await.unwrap();
        assert_eq!(store.queue().await.unwrap().id, queued.id, "one open job per target");

        let first = store.claim(NOW, LATER).await.unwrap();
        assert!(store.claim(NOW, LATER).await.is_none());
        let after = Timestamp::from_micros(LATER.as_micros() + 1);
        let second = store.claim(after, after).await.unwrap();
        assert_eq!((first.info.id.clone(), first.epoch + 1), (second.info.id.clone(), second.epoch));

        let save = |mut job: jobs::Job, state| {
            job.info.state = state;
            job.info.done = 5;
            store.write(move |conn| Ok(jobs::save(conn, &job, after, after)?))
        };
        assert!(!save(first, JobState::Running).await.unwrap());
        assert!(save(second.clone(), JobState::Succeeded).await.unwrap());
        let (tenant, id) = (store.tenant.clone(), queued.id);
        let cancelled = store.write(move |conn| jobs::cancel(conn, &tenant, &id, after)).await;
        assert!(matches!(cancelled, Err(VaultError::JobEnded)));
        let found = store.read(move |conn, tenant| jobs::find(conn, tenant, &second.info.id)).await.unwrap();
        assert_eq!((found.info.state, found.info.done), (JobState::Succeeded, 5));
    }
}

#[tokio::test]
async fn a_cancelled_job_is_not_worked_on() {
    for store in Store::both().await {
        store.make_kek().await;
        let id = store.queue().await.unwrap().id;
        let job = store.claim(NOW, LATER).await.unwrap();
        let tenant = store.tenant.clone();
        store.write(move |conn| jobs::cancel(conn, &tenant, &id, NOW)).await.unwrap();

        assert!(!store.write(move |conn| Ok(jobs::save(conn, &job, NOW, LATER)?)).await.unwrap());
        assert!(store.claim(LATER, LATER).await.is_none());
    }
}

#[tokio::test]
async fn figures_count_what_is_there() {
    for store in Store::both().await {
        store.make_kek().await;
        store.insert("a").await.unwrap();
        store.insert("b").await.unwrap();
        store.queue().await.unwrap();

        let figures = store.read(super::figures).await;
        assert_eq!(figures.secrets, BTreeMap::from([("password", 2)]));
        assert_eq!(figures.records_by_kek_version, BTreeMap::from([(1, 2)]));
        assert_eq!(figures.open_jobs, 1);
    }
}

#[tokio::test]
async fn a_plan_for_another_device_gives_way_and_is_never_activated() {
    for store in Store::both().await {
        let b = DeviceName::parse("b").unwrap();
        let plan = |device: DeviceName| {
            let tenant = store.tenant.clone();
            let key = KeyRef::plan(KeySpec::Kek).unwrap().on(device);
            let kek_id = KekId::generate().unwrap();
            store.write(move |conn| Ok(keks::plan(conn, &tenant, KekRole::Main, kek_id, &key, NOW)?))
        };
        let activate = |planned: &crate::seal::Kek| {
            let (tenant, planned) = (store.tenant.clone(), planned.clone());
            let key = pinned(&planned.key);
            store.write(move |conn| Ok(keks::activate(conn, &tenant, KekRole::Main, &planned, &key, NOW)?))
        };
        let first = plan(DeviceName::default()).await.unwrap();
        let second = plan(b.clone()).await.unwrap();

        assert_eq!((first.version, second.version), (1, 1));
        assert!(!activate(&first).await.unwrap());
        assert!(activate(&second).await.unwrap());
        let records = store.read(keks::load).await;
        assert_eq!(*records[0].kek.key.device(), b);
        assert_eq!(records[0].kek.key.id(), second.key.id());
    }
}

#[tokio::test]
async fn roles_are_numbered_together_and_retire_their_own() {
    for store in Store::both().await {
        assert_eq!(store.make_kek().await, 1);
        let backup = {
            let tenant = store.tenant.clone();
            let (kek_id, key) = (KekId::generate().unwrap(), KeyRef::plan(KeySpec::Kek).unwrap());
            store.write(move |conn| -> Result<u32, VaultError> {
                let planned = keks::plan(conn, &tenant, KekRole::Backup, kek_id, &key, NOW)?;
                let key = pinned(&planned.key);
                assert!(keks::activate(conn, &tenant, KekRole::Backup, &planned, &key, NOW)?);
                Ok(planned.version)
            })
        };
        assert_eq!(backup.await.unwrap(), 2);
        assert_eq!(store.make_kek().await, 3);

        let records = store.read(keks::load).await;
        let states: Vec<_> = records.iter().map(|record| record.state).collect();
        assert_eq!(states, [KekState::Retired, KekState::Active, KekState::Active]);
        let id = records[0].kek.id;
        assert!(records.iter().all(|record| record.kek.id == id));
        let active = |role| store.read(move |conn, tenant| keks::active_version(conn, tenant, role));
        assert_eq!((active(KekRole::Main).await, active(KekRole::Backup).await), (Some(3), Some(2)));
    }
}

#[tokio::test]
async fn in_quarantine_only_a_restore_is_taken_up() {
    for store in Store::both().await {
        store.make_kek().await;
        store.queue().await.unwrap();
        let since = store.write(|conn| Ok(restore::begin(conn, NOW)?)).await.unwrap();
        let again = store
            .write(move |conn| Ok(restore::begin(conn, since.plus(std::time::Duration::from_secs(9)))?))
            .await;
        assert_eq!(again.unwrap(), since, "the first begin stands");
        assert!(store.claim(NOW, NOW).await.is_none());

        let (tenant, id) = (store.tenant.clone(), JobId::generate());
        let queue = move |conn: &mut Conn| jobs::queue(conn, &tenant, JobKind::Restore, &id, None, NOW);
        store.write(queue).await.unwrap();
        let until = NOW.plus(std::time::Duration::from_secs(60));
        assert_eq!(store.claim(NOW, until).await.unwrap().info.kind, JobKind::Restore);

        assert!(store.write(|conn| Ok(restore::release(conn)?)).await.unwrap());
        assert!(!store.write(|conn| Ok(restore::release(conn)?)).await.unwrap());
        assert_eq!(store.claim(NOW, until).await.unwrap().info.kind, JobKind::Rewrap);
    }
}

#[tokio::test]
async fn a_backup_is_written_beside_the_wrap_and_goes_with_the_record() {
    for store in Store::both().await {
        store.insert("kept").await.unwrap();
        let todo = || {
            store.read(|conn, tenant| {
                records::to_rewrap(conn, tenant, (KekRole::Backup, 9), &Position::default(), 4)
            })
        };
        let left = || store.read(|conn, tenant| records::remaining(conn, tenant, (KekRole::Backup, 9)));
        let old = todo().await.remove(0);
        assert_eq!((old.position.kek_version, &old.backup_dek, left().await), (0, &None, 1));

        let swap = |old: records::ToRewrap| {
            let tenant = store.tenant.clone();
            store.write(move |conn| {
                Ok(records::swap_wrap(conn, &tenant, KekRole::Backup, &old, b"second", 9)?)
            })
        };
        assert!(swap(old.clone()).await.unwrap() && !swap(old.clone()).await.unwrap());
        assert_eq!((todo().await.len(), left().await), (0, 0));
        let all = store
            .read(|conn, tenant| {
                records::to_rewrap(conn, tenant, (KekRole::Main, 99), &Position::default(), 4)
            })
            .await;
        assert_eq!(all[0].wrapped_dek, old.wrapped_dek);
        assert_eq!(all[0].backup_dek.as_deref(), Some(&b"second"[..]));
    }
}
