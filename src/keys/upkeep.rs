//! What a daemon does about its rings without being asked: each second, in small repeatable steps.
//!
//! `plan.rs` says what is due. A step that fails is tried again, later and later; a daemon that is killed
//! in the middle leaves it to the next one. In quarantine nothing takes over, rotates or goes.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::make::Order;
use super::model::{End, Phase, Use};
use super::plan::{Moment, Refusal, Ring, Step};
use super::rings::View;
use super::store::rings as store;
use super::time::{Mark, Reading, Timekeeper};
use super::{Keys, KeysError};
use crate::audit::{Action, AuditCode, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::{Conn, DbError};
use crate::identity::{Caller, Scope};
use crate::ids::{SigningKeyId, TenantId};

const PERIOD: Duration = Duration::from_secs(1);
/// How often what was seen of the clock is kept.
const MARK: Duration = Duration::from_secs(30);
/// A step that failed waits so long at the most before it is tried again.
const PATIENCE: Duration = Duration::from_secs(60);
/// And a destruction so long.
const LEISURE: Duration = Duration::from_secs(3600);
/// Tokens that are dead for so long are not counted any more.
const FORGET: Duration = Duration::from_secs(3600);

/// Steps of one ring that failed: when they are due again, and how long they waited.
#[derive(Default)]
struct Memory {
    failed: HashMap<Step, (Instant, Duration)>,
}

impl Memory {
    fn is_due(&self, step: &Step) -> bool {
        self.failed.get(step).is_none_or(|(at, _)| *at <= Instant::now())
    }

    fn note(&mut self, step: &Step, result: &Result<(), KeysError>) {
        let Err(error) = result else {
            self.failed.remove(step);
            return;
        };
        let before = self.failed.get(step).map_or(PERIOD, |(_, wait)| *wait);
        // Each try is on record, and a device may be away for days: nobody waits for a destruction.
        let longest = if matches!(step, Step::Destroy(_)) { LEISURE } else { PATIENCE };
        let wait = (before * 2).min(longest);
        if before == PERIOD {
            tracing::warn!(?step, %error, code = error.audit_code(), "a step of the signing keys failed");
        }
        self.failed.insert(step.clone(), (Instant::now() + wait, wait));
    }
}

impl Keys {
    /// Keeps the tenant's rings going until it is dropped. Making a key takes seconds, and nothing else waits for it.
    pub async fn run(&self, tenant: &TenantId) {
        let [jwt, cookie] = Use::ALL.map(|used| self.run_ring(tenant, used));
        tokio::join!(self.run_clock(tenant), jwt, cookie);
    }

    async fn run_ring(&self, tenant: &TenantId, used: Use) {
        let mut memory = Memory::default();
        loop {
            match self.look(tenant, used).await {
                Ok(view) => self.take_steps(tenant, &view, &mut memory).await,
                Err(error) => tracing::debug!(%error, used = used.name(), "the ring cannot be read"),
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    async fn run_clock(&self, tenant: &TenantId) {
        let (mut marked, mut suspect) = (None::<(Instant, Mark)>, None);
        loop {
            let reading = self.reading();
            self.tell_suspect(tenant, &mut suspect, &reading);
            let mark = self.rings.time.lock().unwrap_or_else(PoisonError::into_inner).mark();
            let is_known = |(at, known): (Instant, Mark)| at.elapsed() < MARK && !mark.differs(&known);
            if !marked.is_some_and(is_known) && self.keep_time(reading.surely, mark).await.is_ok() {
                marked = Some((Instant::now(), mark));
            }
            if let Err(error) = self.flush_counts().await {
                tracing::debug!(%error, "tokens are not counted yet");
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    async fn take_steps(&self, tenant: &TenantId, view: &View, memory: &mut Memory) {
        let reading = self.reading();
        // What cannot be undone is not done by a clock that is not believed.
        if reading.suspect.is_some() {
            return;
        }
        let steps = self.due(view, &reading);
        memory.failed.retain(|step, _| steps.contains(step));
        let steps: Vec<_> = steps.into_iter().filter(|step| memory.is_due(step)).collect();
        if steps.is_empty() {
            return;
        }
        let is_quarantined = self.parts.db.read::<_, DbError, _>(store::is_quarantined).await.unwrap_or(true);
        for step in steps {
            let waits = matches!(step, Step::TakeOver(_) | Step::Rotate { .. } | Step::Retire(_));
            if waits && is_quarantined && view.ring.signer().is_some() {
                continue;
            }
            let result = self.take(tenant, view, &step, &reading).await;
            memory.note(&step, &result);
        }
    }

    fn due(&self, view: &View, reading: &Reading) -> Vec<Step> {
        let seen_for = |id: &SigningKeyId| self.rings.seen_for(id);
        view.ring.due(&Moment { now: reading.now, surely: reading.surely, seen_for: &seen_for })
    }

    async fn take(
        &self,
        tenant: &TenantId,
        view: &View,
        step: &Step,
        reading: &Reading,
    ) -> Result<(), KeysError> {
        let (used, surely) = (view.ring.used, reading.surely);
        match step {
            Step::Make(_) => self.settle(tenant, used).await,
            Step::Rotate { grace } => self.rotate_by_policy(tenant, view, *grace).await,
            Step::TakeOver(id) => {
                let take_over = |ring: &mut Ring, id: &SigningKeyId, now| {
                    let waits = ring.slot(id).is_some_and(|slot| slot.phase == Phase::Next);
                    waits.then(|| ring.take_over(id, now)).ok_or(Refusal::NotFound)
                };
                self.step(tenant, used, (Action::KeyActivate, "due"), id, take_over).await
            }
            Step::Retire(id) => {
                let retire = move |ring: &mut Ring, id: &SigningKeyId, _| ring.retire(id, surely);
                self.step(tenant, used, (Action::KeyRetire, End::Expired.name()), id, retire).await
            }
            Step::Destroy(id) => self.destroy(tenant, view, id).await,
        }
    }

    /// One recorded change of one key, if it is due still.
    async fn step(
        &self,
        tenant: &TenantId,
        used: Use,
        (action, reason): (Action, &'static str),
        id: &SigningKeyId,
        change: impl Fn(&mut Ring, &SigningKeyId, Timestamp) -> Result<(), Refusal> + Send + Sync + 'static,
    ) -> Result<(), KeysError> {
        let caller = Caller::system("keys", tenant.clone());
        let event =
            Event::new(action, "key", id.as_str()).detail("purpose", used.name()).detail("reason", reason);
        let id = id.clone();
        let done = self.parts.audit.around(&caller, event, async |_| {
            self.change(tenant, used, move |ring, now| change(ring, &id, now)).await
        });
        match done.await {
            // Another daemon was first.
            Err(KeysError::Refused(Refusal::NotFound)) => Ok(()),
            other => other,
        }
    }

    async fn rotate_by_policy(
        &self,
        tenant: &TenantId,
        view: &View,
        grace: Duration,
    ) -> Result<(), KeysError> {
        let used = view.ring.used;
        if view.ring.signer().is_none() {
            return self.replace(tenant, used).await;
        }
        let caller = Caller::system("keys", tenant.clone());
        let event = Event::new(Action::KeyRotate, "ring", used.name()).detail("reason", "policy");
        let order = Order::generated(used, None, grace, &view.ring);
        let rotated = self.parts.audit.around(&caller, event, async |note| {
            // Asked again when it is this daemon's turn: another one may have rotated.
            if let Some(id) =
                self.add(tenant, used, order, |ring| ring.is_old(self.parts.clock.now())).await?
            {
                note.add("key", id.as_str());
            }
            Ok::<_, KeysError>(())
        });
        rotated.await
    }

    /// Makes a key where none signs and none waits.
    pub(super) async fn replace(&self, tenant: &TenantId, used: Use) -> Result<(), KeysError> {
        let lacks = |ring: &Ring| {
            !ring.slots.iter().any(|slot| matches!(slot.phase, Phase::Planned | Phase::Next | Phase::Current))
        };
        let view = self.look(tenant, used).await?;
        if lacks(&view.ring) {
            let order = Order::generated(used, None, Duration::ZERO, &view.ring);
            self.add(tenant, used, order, lacks).await?;
        }
        Ok(())
    }

    async fn destroy(&self, tenant: &TenantId, view: &View, id: &SigningKeyId) -> Result<(), KeysError> {
        let Some(slot) = view.ring.slot(id) else { return Ok(()) };
        let (entry, used) = (Arc::clone(view.entry(slot)?), view.ring.used);
        let caller = Caller::system("keys", tenant.clone());
        let event = Event::new(Action::KeyDestroy, "key", id.as_str())
            .detail("purpose", used.name())
            .detail("reason", slot.end.map_or("", End::name))
            .detail("device", entry.device.device().as_str())
            .detail("device_id", entry.device.id().to_string());
        let id = id.clone();
        let destroyed = self.parts.audit.around(&caller, event, async |_| {
            self.parts.admin.destroy(&entry.device).await?;
            self.change(tenant, used, move |ring, _| {
                ring.destroyed(&id);
                Ok(())
            })
            .await
        });
        destroyed.await
    }

    /// What the two clocks say now.
    pub(super) fn reading(&self) -> Reading {
        let mut time = self.rings.time.lock().unwrap_or_else(PoisonError::into_inner);
        time.read(self.parts.clock.now(), self.rings.started.elapsed())
    }

    /// What is written down as the time of a change: as late as it may be, because keys stay from then on.
    pub(super) fn decided_at(&self) -> Timestamp {
        self.reading().latest
    }

    /// Goes on from what daemons remember of the wall clock. Before anything is signed.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn remember_time(&self) -> Result<(), KeysError> {
        let mark = self.parts.db.read::<_, DbError, _>(store::mark).await?;
        let mut time = self.rings.time.lock().unwrap_or_else(PoisonError::into_inner);
        *time = Timekeeper::start(self.parts.clock.now(), self.rings.started.elapsed(), mark);
        Ok(())
    }

    async fn keep_time(&self, now: Timestamp, mark: Mark) -> Result<(), DbError> {
        let before = Timestamp::from_micros(
            now.as_micros().saturating_sub(i64::try_from(FORGET.as_micros()).unwrap_or(i64::MAX)),
        );
        let keep = move |conn: &mut Conn| {
            store::forget_tokens(conn, before)?;
            store::add_mark(conn, mark)
        };
        self.parts.db.write(keep).await
    }

    fn tell_suspect(&self, tenant: &TenantId, told: &mut Option<String>, reading: &Reading) {
        if told.is_some() == reading.suspect.is_some() {
            return;
        }
        told.clone_from(&reading.suspect);
        match &reading.suspect {
            Some(reason) => {
                tracing::error!(reason, "signing is suspended");
                let event = Event::new(Action::KeyIncident, "clock", "").detail("reason", "clock-suspect");
                let caller = Caller::system("keys", tenant.clone());
                self.parts.audit.record_soon(&caller, event, Outcome::Failure("clock-suspect"));
            }
            None => tracing::info!("signing goes on: the clock is within a day of what was seen"),
        }
    }

    /// Why nothing is signed, for the daemon's readiness.
    pub fn suspended(&self) -> Option<String> {
        self.reading().suspect
    }

    /// An administrator says that the wall clock is right, although it is further from what was seen before than
    /// can be dealt with: signing goes on, and for a day no key leaves the JWKS.
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:admin`.
    pub async fn accept_clock(&self, caller: &Caller) -> Result<(), KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyPolicy, "clock")?;
        let event = Event::new(Action::KeyPolicy, "clock", "")
            .detail("suspect", self.suspended().unwrap_or_default());
        let accepted = self.parts.audit.around(caller, event, async |_| {
            let mark = {
                let mut time = self.rings.time.lock().unwrap_or_else(PoisonError::into_inner);
                time.accept(self.parts.clock.now(), self.rings.started.elapsed());
                time.mark()
            };
            self.parts.db.write(move |conn| store::set_mark(conn, mark)).await?;
            Ok::<_, KeysError>(())
        });
        accepted.await
    }

    /// Adds what was signed since the last time to the counts in the database.
    pub(super) async fn flush_counts(&self) -> Result<(), DbError> {
        let counts = std::mem::take(&mut *self.rings.counts.lock().unwrap_or_else(PoisonError::into_inner));
        if counts.is_empty() {
            return Ok(());
        }
        let counts: Arc<Vec<_>> =
            Arc::new(counts.into_iter().map(|((id, expires), tokens)| (id, expires, tokens)).collect());
        let rows = Arc::clone(&counts);
        let written = self.parts.db.write(move |conn| store::count_tokens(conn, &rows)).await;
        if written.is_err() {
            let mut waiting = self.rings.counts.lock().unwrap_or_else(PoisonError::into_inner);
            for (id, expires, tokens) in counts.iter() {
                *waiting.entry((id.clone(), *expires)).or_default() += tokens;
            }
        }
        written
    }
}
