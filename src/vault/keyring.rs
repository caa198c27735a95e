//! The tenants' KEKs: which version seals, which ones open, and how a new version comes to be.
//!
//! The ring in memory repeats the table and is at most five seconds behind it: for so long a daemon
//! may go on sealing under a version that another daemon has just retired, which still opens.
//! Wraps are counted before they are made: a block of them is reserved in the database, so a crash
//! loses none. A wrap that is repeated (a lost session, a DEK that waited too long) counts once: the
//! budget, at most 2^31, leaves as much again to the 2^32 of SP 800-38D. When the budget does not
//! allow another block, a new version is made first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as AsyncMutex;

use crate::audit::{Action, AuditCode, Event, Outcome};
use crate::db::{DbError, Turn, TurnName};
use crate::identity::{Caller, Scope};
use crate::ids::TenantId;
use crate::seal::{DeviceName, Faults, Kek, KekId, KeyId, KeyRef, KeySpec, SealError, WrappedKey};

use super::idempotency::Request;
use super::model::{IdempotencyKey, KekInfo, KekRole, KekState};
use super::store::keks::{self, KekRecord};
use super::store::{self, IdempotencyRow};
use super::{Vault, VaultError, check};

/// How old a ring may be.
const FRESH: Duration = Duration::from_secs(5);
/// How long somebody waits for another request that makes a version.
const OUTGROWING: Duration = Duration::from_secs(30);
/// Most wraps that are reserved at once: what a crash may waste.
const BLOCK: u64 = 1024;

/// One tenant's KEK versions.
struct Ring {
    records: Vec<KekRecord>,
    loaded: Instant,
}

impl Ring {
    /// Whether a version has to be made: one is planned, or none seals.
    fn is_unfinished(&self, role: KekRole) -> bool {
        let planned = |record: &KekRecord| record.role == role && record.state == KekState::Planned;
        self.records.iter().any(planned) || self.active(role).is_none()
    }

    /// The version that wraps in that role: the newest active one.
    fn active(&self, role: KekRole) -> Option<&Kek> {
        let wraps = |record: &&KekRecord| record.role == role && record.state == KekState::Active;
        self.records.iter().rev().find(wraps).map(|record| &record.kek)
    }

    /// A version that may open what that role wraps. Looked up among the tenant's own only.
    fn opening(&self, role: KekRole, id: KekId, version: u32) -> Option<&Kek> {
        let opens = |state| matches!(state, KekState::Active | KekState::Retired);
        let found = self.records.iter().find(|record| record.kek.id == id && record.kek.version == version);
        found.filter(|record| record.role == role && opens(record.state)).map(|record| &record.kek)
    }
}

/// Wraps that are reserved and not made yet.
#[derive(Clone, Copy)]
struct Grant {
    version: u32,
    left: u64,
}

/// What is known about KEKs in memory.
#[derive(Default)]
pub(super) struct Keyring {
    rings: RwLock<HashMap<TenantId, Arc<Ring>>>,
    grants: Mutex<HashMap<(TenantId, KekRole), Grant>>,
    /// What the last look found wrong, so that each fault is one incident.
    faults: Faults,
    /// Keys that the last whole look did not find on the device.
    missing: RwLock<Vec<KeyId>>,
    /// Held while wraps are reserved, so that a burst reserves one block.
    reserving: AsyncMutex<()>,
    /// Held while a version is made because the budget of the one before is used up.
    outgrowing: AsyncMutex<()>,
}

impl Keyring {
    /// Takes one wrap out of what is reserved under `version`.
    fn take(&self, tenant: &TenantId, role: KekRole, version: u32) -> bool {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        match grants.get_mut(&(tenant.clone(), role)) {
            Some(grant) if grant.version == version && grant.left > 0 => {
                grant.left -= 1;
                true
            }
            _ => false,
        }
    }

    fn grant(&self, tenant: &TenantId, role: KekRole, grant: Grant) {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner).insert((tenant.clone(), role), grant);
    }

    fn cached(&self, tenant: &TenantId) -> Option<Arc<Ring>> {
        self.rings.read().unwrap_or_else(PoisonError::into_inner).get(tenant).cloned()
    }

    fn keep(&self, tenant: &TenantId, ring: Arc<Ring>) {
        self.rings.write().unwrap_or_else(PoisonError::into_inner).insert(tenant.clone(), ring);
    }
}

/// The budget within what the format allows, and above what a version needs to be of any use.
fn budget(configured: u64) -> u64 {
    configured.clamp(2, 1 << 31)
}

/// How many wraps are reserved at once.
fn block(budget: u64) -> u64 {
    (budget / 8).clamp(1, BLOCK)
}

impl Vault {
    /// The KEK that seals, with one wrap counted against its budget.
    pub(super) async fn kek_for_sealing(&self, tenant: &TenantId) -> Result<Kek, VaultError> {
        self.kek_for_wrapping(tenant, KekRole::Main).await
    }

    /// The KEK that wraps in that role, with one wrap counted against its budget.
    pub(super) async fn kek_for_wrapping(&self, tenant: &TenantId, role: KekRole) -> Result<Kek, VaultError> {
        loop {
            let kek = self.active_kek(tenant, role).await?;
            if self.inner.keyring.take(tenant, role, kek.version) {
                return Ok(kek);
            }
            let reserving = self.inner.keyring.reserving.lock().await;
            // Who waited for the lock finds what its holder has reserved.
            let kek = self.active_kek(tenant, role).await?;
            if self.inner.keyring.take(tenant, role, kek.version) {
                return Ok(kek);
            }
            let reserved = self.reserve(tenant, role, kek.version).await?;
            // Not held while a version is made: whoever waits for that waits with all others, not after them.
            drop(reserving);
            if !reserved {
                self.outgrow(tenant, role, kek.version).await?;
            }
        }
    }

    /// The device on which the tenant's values are sealed, as far as is known without asking.
    pub fn sealing_device(&self, tenant: &TenantId) -> Option<DeviceName> {
        let ring = self.inner.keyring.cached(tenant)?;
        ring.active(KekRole::Main).map(|kek| kek.key.device().clone())
    }

    /// The version that wraps in that role, without a wrap.
    pub(super) async fn active_in(
        &self,
        tenant: &TenantId,
        role: KekRole,
    ) -> Result<Option<Kek>, VaultError> {
        Ok(self.ring(tenant).await?.active(role).cloned())
    }

    /// The KEK version that a wrapped DEK names, if it is the tenant's own and may open.
    pub(super) async fn kek_for_opening(
        &self,
        tenant: &TenantId,
        key: &WrappedKey,
    ) -> Result<Option<Kek>, VaultError> {
        self.kek_that_wrapped(tenant, KekRole::Main, key).await
    }

    /// The same for what that role wraps.
    pub(super) async fn kek_that_wrapped(
        &self,
        tenant: &TenantId,
        role: KekRole,
        key: &WrappedKey,
    ) -> Result<Option<Kek>, VaultError> {
        let (id, version) = (key.kek_id(), key.kek_version());
        if let Some(kek) = self.ring(tenant).await?.opening(role, id, version) {
            return Ok(Some(kek.clone()));
        }
        // Another daemon may have made it a moment ago.
        Ok(self.reload(tenant).await?.opening(role, id, version).cloned())
    }

    async fn active_kek(&self, tenant: &TenantId, role: KekRole) -> Result<Kek, VaultError> {
        self.active_in(tenant, role).await?.ok_or(VaultError::NotFound("key-encryption key"))
    }

    async fn ring(&self, tenant: &TenantId) -> Result<Arc<Ring>, VaultError> {
        match self.inner.keyring.cached(tenant) {
            Some(ring) if ring.loaded.elapsed() < FRESH => Ok(ring),
            _ => self.reload(tenant).await,
        }
    }

    async fn reload(&self, tenant: &TenantId) -> Result<Arc<Ring>, VaultError> {
        let owner = tenant.clone();
        let loaded = Instant::now();
        let records = self.parts().db.read::<_, DbError, _>(move |conn| keks::load(conn, &owner)).await?;
        let ring = Arc::new(Ring { records, loaded });
        self.inner.keyring.keep(tenant, Arc::clone(&ring));
        Ok(ring)
    }

    /// Reserves a block of wraps; `false` if the budget does not allow it or the version is not active any more.
    async fn reserve(&self, tenant: &TenantId, role: KekRole, version: u32) -> Result<bool, VaultError> {
        let budget = budget(self.parts().config.wrap_budget);
        let left = block(budget);
        let owner = tenant.clone();
        let work = move |conn: &mut _| keks::reserve(conn, &owner, version, left, budget);
        let reserved = self.parts().db.write::<_, DbError, _>(work).await?;
        if reserved {
            self.inner.keyring.grant(tenant, role, Grant { version, left });
        }
        Ok(reserved)
    }

    /// Makes the next version because `version` has used up its budget, unless that has happened already.
    async fn outgrow(&self, tenant: &TenantId, role: KekRole, version: u32) -> Result<(), VaultError> {
        // One asks for the turn, and the others find what it made.
        let outgrowing = tokio::time::timeout(OUTGROWING, self.inner.keyring.outgrowing.lock()).await;
        let _outgrowing = outgrowing.map_err(|_| DbError::Taken("making a KEK version"))?;
        if self.is_outgrown(tenant, role, version).await? {
            return Ok(());
        }
        let turn = Arc::new(self.parts().db.turn(TurnName::DeviceKeys).await?);
        if self.is_outgrown(tenant, role, version).await? {
            return Ok(());
        }
        self.refuse_in_quarantine().await?;
        self.make_unasked(tenant, role, "wrap-budget", &turn).await
    }

    async fn is_outgrown(&self, tenant: &TenantId, role: KekRole, version: u32) -> Result<bool, VaultError> {
        Ok(self.reload(tenant).await?.active(role).is_some_and(|active| active.version != version))
    }

    /// Where a new version of that role is made.
    fn placement(&self, role: KekRole) -> Result<&DeviceName, VaultError> {
        match role {
            KekRole::Main => Ok(&self.parts().placement),
            KekRole::Backup => self.parts().backup.as_ref().ok_or(VaultError::NotFound("backup device")),
        }
    }

    /// Makes a version that nobody asked for, and records why.
    pub(super) async fn make_unasked(
        &self,
        tenant: &TenantId,
        role: KekRole,
        reason: &'static str,
        turn: &Arc<Turn>,
    ) -> Result<(), VaultError> {
        let system = Caller::system("vault", tenant.clone());
        let device = self.placement(role)?;
        let event = Event::new(Action::KekRotate, "kek", tenant.as_str())
            .detail("reason", reason)
            .detail("role", role.name())
            .detail("device", device.as_str());
        let work = |note: crate::audit::Note| async move {
            let kek = self.make_version(tenant, (role, device), &Request::Plain, turn).await?;
            note.add("kek_version", kek.version.to_string());
            Ok(())
        };
        self.parts().audit.around(&system, event, work).await
    }

    /// Makes a KEK version and lets it seal. The turn lasts until the device has ended its call, also
    /// where that is long after this gave up.
    ///
    /// The row comes first. A crash after it leaves a planned row, which the next call finishes under
    /// the same device id; the other order would leave an object on the token that nothing names.
    async fn make_version(
        &self,
        tenant: &TenantId,
        (role, device): (KekRole, &DeviceName),
        request: &Request,
        turn: &Arc<Turn>,
    ) -> Result<Kek, VaultError> {
        let parts = self.parts();
        let (owner, now) = (tenant.clone(), parts.clock.now());
        let kek_id = KekId::generate().map_err(no_randomness)?;
        let key = KeyRef::plan(KeySpec::Kek).map_err(no_randomness)?.on(device.clone());
        let plan = move |conn: &mut _| keks::plan(conn, &owner, role, kek_id, &key, now);
        let planned = match parts.db.write::<_, DbError, _>(plan).await {
            // Another daemon planned at the same moment: its plan is as good, and so is what it made of it.
            Err(DbError::Duplicate) => match self.planned(tenant, role).await? {
                Some(planned) => planned,
                None => return self.active_kek(tenant, role).await,
            },
            result => result?,
        };
        let pinned = parts.admin.generate_holding(&planned.key, Arc::clone(turn)).await;
        let pinned = pinned.map_err(VaultError::Seal)?;
        let (owner, now, key, plan) = (tenant.clone(), parts.clock.now(), pinned, planned.clone());
        let row: Option<IdempotencyRow> = request.row(&planned.version.to_string());
        let activate = move |conn: &mut _| -> Result<bool, VaultError> {
            let activated = keks::activate(conn, &owner, role, &plan, &key, now)?;
            if let Some(row) = &row {
                store::claim_key(conn, row, now)?;
            }
            Ok(activated)
        };
        parts.db.write(activate).await?;
        let ring = self.reload(tenant).await?;
        ring.opening(role, planned.id, planned.version)
            .cloned()
            .ok_or(VaultError::NotFound("key-encryption key"))
    }

    async fn planned(&self, tenant: &TenantId, role: KekRole) -> Result<Option<Kek>, VaultError> {
        let ring = self.reload(tenant).await?;
        let is_planned = |record: &&KekRecord| record.role == role && record.state == KekState::Planned;
        let planned = ring.records.iter().find(is_planned);
        Ok(planned.map(|record| record.kek.clone()))
    }

    /// Makes the tenant and its first KEK where they are missing, finishes planned KEKs, and inspects
    /// every live KEK on the device (attributes, ambiguity, fingerprint). Repeatable. Returns the keys that are
    /// not on their device any more: only what needs them fails. Versions that do not wrap are looked at where
    /// their device answers. In quarantine nothing is made.
    ///
    /// # Errors
    /// [`VaultError::Seal`] with `KeyUnfit` names a key that must not be used.
    pub async fn provision(&self, tenant: &TenantId) -> Result<Vec<KeyId>, VaultError> {
        let (owner, now) = (tenant.clone(), self.parts().clock.now());
        let work = move |conn: &mut _| store::ensure_tenant(conn, &owner, now);
        self.parts().db.write::<_, DbError, _>(work).await?;
        self.reload(tenant).await?;
        for role in [KekRole::Main, KekRole::Backup] {
            match self.finish_version(tenant, role).await {
                // What was planned and cannot be made takes nothing from what is there.
                Err(error) if role == KekRole::Backup || self.ring(tenant).await?.active(role).is_some() => {
                    let error = &error as &dyn std::error::Error;
                    let role = role.name();
                    tracing::warn!(error, role, "a KEK version cannot be made now; what is there goes on");
                }
                finished => finished?,
            }
        }
        let system = Caller::system("vault", tenant.clone());
        // All of them, also after a bad one: each has its own incident.
        let (mut first_bad, mut missing) = (Ok(()), Vec::new());
        for record in &self.reload(tenant).await?.records {
            if matches!(record.state, KekState::Active | KekState::Retired) {
                let seals = record.state == KekState::Active && record.role == KekRole::Main;
                match self.inspect(&system, &record.kek).await {
                    Err(VaultError::Seal(
                        SealError::KeyMissing { key } | SealError::NoDevice { key, .. },
                    )) => missing.push(key),
                    // Its device is away, which is said elsewhere; who needs the key is told so.
                    Err(VaultError::Seal(error)) if !seals && error.retry_after().is_some() => {}
                    found => first_bad = first_bad.and(found),
                }
            }
        }
        first_bad?;
        self.inner.keyring.missing.write().unwrap_or_else(PoisonError::into_inner).clone_from(&missing);
        Ok(missing)
    }

    async fn finish_version(&self, tenant: &TenantId, role: KekRole) -> Result<(), VaultError> {
        if !self.lacks_version(tenant, role).await? || self.quarantined_at().await?.is_some() {
            return Ok(());
        }
        let turn = Arc::new(self.parts().db.turn(TurnName::DeviceKeys).await?);
        // Once more: whose turn it was before may have finished it.
        self.reload(tenant).await?;
        if self.lacks_version(tenant, role).await? {
            self.make_unasked(tenant, role, "provision", &turn).await?;
        }
        Ok(())
    }

    /// A backup KEK also has to be on the device that is configured for it now.
    async fn lacks_version(&self, tenant: &TenantId, role: KekRole) -> Result<bool, VaultError> {
        let ring = self.ring(tenant).await?;
        Ok(match (role, &self.parts().backup) {
            (KekRole::Main, _) => ring.is_unfinished(role),
            (KekRole::Backup, None) => false,
            (KekRole::Backup, Some(device)) => {
                ring.is_unfinished(role) || ring.active(role).is_some_and(|kek| kek.key.device() != device)
            }
        })
    }

    async fn inspect(&self, system: &Caller, kek: &Kek) -> Result<(), VaultError> {
        let found = match self.parts().admin.inspect(&kek.key).await {
            Ok(report) if report.deviations.is_empty() => {
                self.inner.keyring.faults.clear(kek.key.id());
                return Ok(());
            }
            Ok(report) => SealError::KeyUnfit { key: kek.key.id(), reason: report.deviations.join("; ") },
            Err(error) => error,
        };
        let found = VaultError::Seal(found);
        let code = found.audit_code();
        let is_fault = ["key-missing", "key-unfit"].contains(&code);
        if is_fault && self.inner.keyring.faults.note(kek.key.id(), code) {
            let event = Event::new(Action::KeyIncident, "key", kek.id.to_string())
                .detail("purpose", "kek")
                .detail("version", kek.version.to_string())
                .detail("device", kek.key.device().as_str())
                .detail("device_id", kek.key.id().to_string());
            self.parts().audit.record_soon(system, event, Outcome::Failure(code));
        }
        Err(found)
    }

    /// The tenant's KEK versions, newest first, with how many records each wraps.
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], or what the database says.
    pub async fn keks(&self, caller: &Caller) -> Result<Vec<KekInfo>, VaultError> {
        caller.require(Scope::KeysAdmin)?;
        let tenant = caller.tenant.clone();
        let query = move |conn: &mut _| {
            Ok((keks::load(conn, &tenant)?, keks::records(conn, &tenant)?, keks::backups(conn, &tenant)?))
        };
        let (records, counts, backups) = self.parts().db.read::<_, DbError, _>(query).await?;
        let budget = budget(self.parts().config.wrap_budget);
        let missing = self.inner.keyring.missing.read().unwrap_or_else(PoisonError::into_inner);
        let info = |record: &KekRecord| {
            let counts = if record.role == KekRole::Main { &counts } else { &backups };
            let records = counts.get(&record.kek.version).copied().unwrap_or(0);
            let is_missing = missing.contains(&record.kek.key.id());
            KekInfo {
                state: if is_missing { KekState::Missing } else { record.state },
                ..info(record, records, budget)
            }
        };
        Ok(records.iter().rev().map(info).collect())
    }

    /// Makes a new KEK version, which seals from now on: on `device`, or where new ones are placed.
    ///
    /// # Errors
    /// [`VaultError::Invalid`] for a device that is not there or that holds backups;
    /// [`VaultError::Quarantined`]; those of idempotency keys, or what the device, the log and the database say.
    pub async fn rotate_kek(
        &self,
        caller: &Caller,
        device: Option<DeviceName>,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<KekInfo, VaultError> {
        let device = &device.unwrap_or_else(|| self.parts().placement.clone());
        let event =
            Event::new(Action::KekRotate, "kek", caller.tenant.as_str()).detail("device", device.as_str());
        let version = self
            .audited(caller, Scope::KeysAdmin, event, |note| async move {
                check::idempotency(idempotency.as_ref())?;
                self.check_device(device)?;
                self.refuse_in_quarantine().await?;
                // Asked in its turn: of two equal requests at once, the second finds the first one's result.
                let turn = Arc::new(self.parts().db.turn(TurnName::DeviceKeys).await?);
                let version =
                    match self.request(caller, Action::KekRotate.name(), idempotency.as_ref()).await? {
                        Request::Repeated(version) => {
                            note.add("repeated", version.as_str());
                            version.parse().map_err(|_| DbError::impossible("idempotency_keys", &version))?
                        }
                        request => {
                            let place = (KekRole::Main, device);
                            self.make_version(&caller.tenant, place, &request, &turn).await?.version
                        }
                    };
                note.add("kek_version", version.to_string());
                Ok(version)
            })
            .await?;
        let found = self.keks(caller).await?.into_iter().find(|kek| kek.version == version);
        found.ok_or(VaultError::NotFound("key-encryption key"))
    }
}

impl Vault {
    fn check_device(&self, device: &DeviceName) -> Result<(), VaultError> {
        let reason = if !self.parts().devices.contains(device) {
            "no device of that name is configured"
        } else if self.parts().backup.as_ref() == Some(device) {
            "that device holds the backup KEK; one loss would take both wraps"
        } else {
            return Ok(());
        };
        Err(VaultError::Invalid { field: "device", reason: reason.to_owned() })
    }
}

fn info(record: &KekRecord, records: u64, wrap_budget: u64) -> KekInfo {
    KekInfo {
        kek_id: record.kek.id.to_string(),
        version: record.kek.version,
        key_id: record.kek.key.id().to_string(),
        device: record.kek.key.device().clone(),
        role: record.role,
        mechanism: record.kek.mechanism_name(),
        state: record.state,
        wraps: record.wraps_reserved,
        wrap_budget,
        records,
        created_at: record.created_at,
        activated_at: record.activated_at,
    }
}

fn no_randomness(_: getrandom::Error) -> VaultError {
    VaultError::Seal(SealError::Unavailable {
        retry_after: Duration::from_secs(1),
        reason: "the operating system gives no random bytes".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{BLOCK, Grant, Keyring, Ring, block, budget};
    use crate::clock::Timestamp;
    use crate::ids::TenantId;
    use crate::seal::{Kek, KekId, KeyRef, KeySpec};
    use crate::vault::model::{KekRole, KekState};
    use crate::vault::store::keks::KekRecord;

    fn ring(id: KekId, states: &[KekState]) -> Ring {
        let record = |(version, state): (u32, &KekState)| KekRecord {
            kek: Kek { id, version, key: KeyRef::plan(KeySpec::Kek).unwrap() },
            role: KekRole::Main,
            state: *state,
            wraps_reserved: 0,
            created_at: Timestamp::from_micros(0),
            activated_at: None,
        };
        Ring { records: (1..).zip(states).map(record).collect(), loaded: Instant::now() }
    }

    #[test]
    fn the_newest_active_version_seals_and_older_ones_open() {
        use KekState::{Active, Destroyed, Planned, Retired};
        let (id, other) = (KekId::generate().unwrap(), KekId::generate().unwrap());
        let ring = ring(id, &[Destroyed, Retired, Active, Planned]);

        assert_eq!(ring.active(KekRole::Main).map(|kek| kek.version), Some(3));
        let opens = |version| ring.opening(KekRole::Main, id, version).is_some();
        assert_eq!([1, 2, 3, 4, 5].map(opens), [false, true, true, false, false]);
        assert!(ring.opening(KekRole::Main, other, 3).is_none());
        assert!(ring.active(KekRole::Backup).is_none() && ring.opening(KekRole::Backup, id, 3).is_none());
    }

    #[test]
    fn a_reservation_is_spent_once_and_under_its_version_only() {
        let (keyring, tenant) = (Keyring::default(), TenantId::parse("t").unwrap());
        let main = KekRole::Main;
        keyring.grant(&tenant, main, Grant { version: 2, left: 2 });

        assert!(!keyring.take(&tenant, main, 1) && !keyring.take(&tenant, KekRole::Backup, 2));
        assert!(keyring.take(&tenant, main, 2) && keyring.take(&tenant, main, 2));
        assert!(!keyring.take(&tenant, main, 2));
        assert!(!keyring.take(&TenantId::parse("u").unwrap(), main, 2));
    }

    #[test]
    fn a_block_never_exceeds_its_budget() {
        for configured in [0, 1, 2, 8, 100, 1 << 20, u64::MAX] {
            let budget = budget(configured);
            // One wrap is the canary's; the first block must fit beside it.
            assert!(block(budget) < budget && block(budget) <= BLOCK && budget <= 1 << 31, "{configured}");
        }
    }
}
