//! Rings in memory, and how they are changed.
//!
//! A daemon works on a view of the ring. It replaces the view when it changes the ring itself, and looks
//! once a second whether another daemon did. On PostgreSQL a view that could not be confirmed for the
//! policy's `propagation` is not used: by then another daemon may sign with a key that it does not show.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::model::Use;
use super::plan::{Refusal, Ring, Slot};
use super::store::rings::{self as store, Entry};
use super::time::Timekeeper;
use super::{Keys, KeysError};
use crate::clock::Timestamp;
use crate::db::{Conn, Db, DbError, Engine};
use crate::ids::{SigningKeyId, TenantId};

/// How often a change is decided anew because others were faster.
const TRIES: usize = 8;

/// A ring as this daemon sees it.
pub(super) use super::store::rings::Stored as View;

impl View {
    /// The key that signs.
    pub(super) fn signer(&self) -> Result<(&Slot, &Arc<Entry>), KeysError> {
        let slot = self.ring.signer().ok_or(KeysError::NoSigner)?;
        Ok((slot, self.entry(slot)?))
    }

    pub(super) fn entry(&self, slot: &Slot) -> Result<&Arc<Entry>, KeysError> {
        let entry = self.entries.get(&slot.id);
        entry.ok_or_else(|| DbError::impossible("signing_keys", slot.id.as_str()).into())
    }
}

/// Views, each with the moment at which it was known to be the present one.
type Views = HashMap<(TenantId, Use), (Arc<View>, Instant)>;

/// Every ring that this daemon has seen.
pub(super) struct Rings {
    views: RwLock<Views>,
    /// When each key was first seen published.
    seen: Mutex<HashMap<SigningKeyId, Instant>>,
    /// Lifetimes that the database is known to have taken note of.
    longest: RwLock<HashMap<SigningKeyId, Duration>>,
    /// Tokens that are not counted in the database yet, by key and time of expiry.
    pub(super) counts: Mutex<HashMap<(SigningKeyId, Timestamp), i64>>,
    pub(super) time: Mutex<Timekeeper>,
    pub(super) started: Instant,
}

impl Rings {
    pub(super) fn new(now: Timestamp) -> Self {
        Self {
            views: RwLock::default(),
            seen: Mutex::default(),
            longest: RwLock::default(),
            counts: Mutex::default(),
            time: Mutex::new(Timekeeper::start(now, Duration::ZERO, None)),
            started: Instant::now(),
        }
    }

    /// The keys that sign for a tenant, as far as they are known.
    pub(super) fn signers(&self, tenant: &TenantId) -> Vec<Arc<Entry>> {
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        let of_tenant = views.iter().filter(|((owner, _), _)| owner == tenant);
        of_tenant.filter_map(|(_, (view, _))| Some(Arc::clone(view.signer().ok()?.1))).collect()
    }

    fn known(&self, tenant: &TenantId, used: Use) -> Option<(Arc<View>, Instant)> {
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        views.get(&(tenant.clone(), used)).cloned()
    }

    /// Keeps a view that was loaded at `at`, unless a newer one is there.
    fn keep(&self, tenant: &TenantId, view: Arc<View>, at: Instant) -> Arc<View> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in view.ring.slots.iter().filter(|slot| slot.phase.is_published()) {
            // What is in the database is served from now on.
            seen.entry(slot.id.clone()).or_insert_with(Instant::now);
        }
        drop(seen);
        let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
        let kept = views.entry((tenant.clone(), view.ring.used)).or_insert_with(|| (Arc::clone(&view), at));
        if kept.0.ring.version <= view.ring.version {
            *kept = (Arc::clone(&view), at.max(kept.1));
        }
        Arc::clone(&kept.0)
    }

    fn confirm(&self, tenant: &TenantId, used: Use, at: Instant) {
        let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, loaded)) = views.get_mut(&(tenant.clone(), used)) {
            *loaded = at.max(*loaded);
        }
    }

    /// For how long this daemon has seen the key published.
    pub(super) fn seen_for(&self, id: &SigningKeyId) -> Duration {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(id).map_or(Duration::ZERO, Instant::elapsed)
    }

    fn knows_longest(&self, slot: &Slot, lifetime: Duration) -> bool {
        let known = self.longest.read().unwrap_or_else(PoisonError::into_inner);
        slot.longest >= lifetime || known.get(&slot.id).is_some_and(|known| *known >= lifetime)
    }

    fn note_longest(&self, id: &SigningKeyId, lifetime: Duration) {
        let mut known = self.longest.write().unwrap_or_else(PoisonError::into_inner);
        let longest = known.entry(id.clone()).or_default();
        *longest = lifetime.max(*longest);
    }
}

impl Keys {
    /// The tenant's ring, as fresh as it has to be.
    pub(super) async fn ring(&self, tenant: &TenantId, used: Use) -> Result<Arc<View>, KeysError> {
        let Some((view, loaded)) = self.rings.known(tenant, used) else {
            return self.look(tenant, used).await;
        };
        let is_alone = self.parts.db.engine() == Engine::Sqlite;
        if is_alone || loaded.elapsed() < view.ring.policy.propagation {
            return Ok(view);
        }
        self.look(tenant, used).await
    }

    /// Looks whether the ring has changed; makes it where there is none.
    pub(super) async fn look(&self, tenant: &TenantId, used: Use) -> Result<Arc<View>, KeysError> {
        let at = Instant::now();
        if let Some((view, _)) = self.rings.known(tenant, used) {
            let owner = tenant.clone();
            let version = self.parts.db.read(move |conn| store::version(conn, &owner, used)).await?;
            if version == Some(view.ring.version) {
                self.rings.confirm(tenant, used, at);
                return Ok(view);
            }
        }
        let stored = match load(&self.parts.db, tenant, used).await? {
            Some(stored) => stored,
            None => {
                let (owner, policy) = (tenant.clone(), self.parts.policy.clone());
                let create = move |conn: &mut Conn| store::create(conn, &owner, used, &policy);
                self.parts.db.write::<_, DbError, _>(create).await?;
                load(&self.parts.db, tenant, used)
                    .await?
                    .ok_or_else(|| DbError::impossible("signing_rings", used.name()))?
            }
        };
        Ok(self.rings.keep(tenant, Arc::new(stored), at))
    }

    /// Decides on the ring as it is in the database, writes what differs, and keeps the new view. `decide` is given
    /// the time of the change: of the moment in which it is made, because keys stay from then on.
    pub(super) async fn change<T: Send + 'static>(
        &self,
        tenant: &TenantId,
        used: Use,
        decide: impl Fn(&mut Ring, Timestamp) -> Result<T, Refusal> + Send + Sync + 'static,
    ) -> Result<T, KeysError> {
        self.change_with(tenant, used, |_, _| Ok(()), decide).await
    }

    /// As [`Keys::change`]; `write` runs in the same transaction, after the decision and before it is saved.
    pub(super) async fn change_with<T: Send + 'static>(
        &self,
        tenant: &TenantId,
        used: Use,
        write: impl Fn(&mut Conn, &Ring) -> Result<(), KeysError> + Send + Sync + 'static,
        decide: impl Fn(&mut Ring, Timestamp) -> Result<T, Refusal> + Send + Sync + 'static,
    ) -> Result<T, KeysError> {
        let work = Arc::new((write, decide));
        for _ in 0..TRIES {
            let (owner, work, keys) = (tenant.clone(), Arc::clone(&work), self.clone());
            let changed = self.parts.db.write::<_, KeysError, _>(move |conn| {
                let (write, decide) = &*work;
                let found = store::load(conn, &owner, used)?;
                let before = found.ok_or_else(|| DbError::impossible("signing_rings", used.name()))?.ring;
                let mut after = before.clone();
                let made = decide(&mut after, keys.decided_at()).map_err(KeysError::Refused)?;
                if !store::claim(conn, &owner, &before, &after)? {
                    return Ok(None);
                }
                write(conn, &after)?;
                store::save(conn, &before, &after)?;
                Ok(Some(made))
            });
            if let Some(made) = changed.await? {
                if let Err(error) = self.look(tenant, used).await {
                    tracing::debug!(%error, "the ring was changed and is not read again yet");
                }
                return Ok(made);
            }
        }
        Err(KeysError::Refused(Refusal::Busy))
    }

    /// Makes durable that the key signs something that lives for `lifetime`, before it does. `false` if the key
    /// is not in the JWKS any more.
    pub(super) async fn may_live(
        &self,
        tenant: &TenantId,
        used: Use,
        slot: &Slot,
        lifetime: Duration,
    ) -> Result<bool, KeysError> {
        if self.rings.knows_longest(slot, lifetime) {
            return Ok(true);
        }
        let (owner, id) = (tenant.clone(), slot.id.clone());
        let raise = move |conn: &mut Conn| store::raise_longest(conn, &owner, used, &id, lifetime);
        let is_published = self.parts.db.write::<_, DbError, _>(raise).await?;
        if is_published {
            self.rings.note_longest(&slot.id, lifetime);
        }
        Ok(is_published)
    }

    /// The ring as it is stored; `None` if the tenant has none yet.
    pub(super) async fn peek(&self, tenant: &TenantId, used: Use) -> Result<Option<Ring>, DbError> {
        Ok(load(&self.parts.db, tenant, used).await?.map(|stored| stored.ring))
    }
}

async fn load(db: &Db, tenant: &TenantId, used: Use) -> Result<Option<View>, DbError> {
    let owner = tenant.clone();
    db.read(move |conn| store::load(conn, &owner, used)).await
}
