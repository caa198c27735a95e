//! The rotation planner: what a ring of keys becomes, and what is to be done about it. Pure.
//!
//! Rules (reliability.md, section 5.3). A key signs only after it was published for [`Policy::lead`] (I1): the
//! daemon that lets it take over has seen it published for so long on its own steady clock, whatever the wall
//! clock says. One key signs (I3). A key that has signed stays published until the longest-lived token that it
//! may have signed is dead (I2, I4), unless it is deleted or revoked on purpose. Phases go forward as
//! [`Phase::may_become`] says, and what has happened is in the ring, so no clock that is set back undoes it.
//!
//! A rotation is called done at once (`effective_at`) and the key signs later (`signs_from`); in between the
//! old one does. Any number of rotations may wait in line.

use std::time::Duration;

use super::model::{End, Phase, Policy, Status, Use};
use crate::clock::Timestamp;
use crate::ids::SigningKeyId;

/// Keys of one ring that may be published at one time: a JWKS is loaded on every look.
pub(super) const MOST: usize = 32;

/// A key, as far as planning needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// The row.
    pub(super) id: SigningKeyId,
    /// How far it has come.
    pub(super) phase: Phase,
    /// When its row was written.
    pub(super) created_at: Timestamp,
    /// How long it was asked to be Next.
    pub(super) grace: Duration,
    /// Since when it is in the JWKS.
    pub(super) published_at: Timestamp,
    /// From when it is called Current.
    pub(super) effective_at: Timestamp,
    /// When it signs from; for keys that have taken over, when that was.
    pub(super) signs_from: Timestamp,
    /// When it stopped.
    pub(super) signs_until: Option<Timestamp>,
    /// The longest lifetime of a token that it has signed; zero: it has signed none.
    pub(super) longest: Duration,
    /// What is added to that before it goes.
    pub(super) margin: Duration,
    /// Deleted while it signs: goes when another has taken over.
    pub(super) is_leaving: bool,
    /// Why it was retired.
    pub(super) end: Option<End>,
}

impl Slot {
    /// A key that is to be made.
    pub(super) fn planned(id: SigningKeyId, grace: Duration, now: Timestamp) -> Self {
        Self {
            id,
            phase: Phase::Planned,
            created_at: now,
            grace,
            published_at: now,
            effective_at: now,
            signs_from: now,
            signs_until: None,
            longest: Duration::ZERO,
            margin: Duration::ZERO,
            is_leaving: false,
            end: None,
        }
    }

    /// Until when it has to stay in the JWKS, once it has stopped.
    pub(super) fn published_until(&self) -> Option<Timestamp> {
        self.signs_until.map(|until| until.plus(self.longest + self.margin))
    }

    /// Whether nothing that it signed lives at that time.
    fn is_over(&self, surely: Timestamp) -> bool {
        self.phase == Phase::Previous && self.published_until().is_some_and(|until| until <= surely)
    }

    fn is_listed(&self) -> bool {
        self.phase.is_published() && !self.is_leaving
    }

    fn become_(&mut self, phase: Phase) {
        debug_assert!(self.phase.may_become(phase), "{:?} to {phase:?}", self.phase);
        self.phase = phase;
    }

    fn retire(&mut self, end: End) {
        self.become_(Phase::Retired);
        self.end = Some(end);
    }

    /// A key that waits, and waits no more. One that has signed elsewhere stays for what it signed.
    fn set_aside(&mut self, now: Timestamp) {
        if self.longest.is_zero() {
            return self.retire(End::Cancelled);
        }
        self.become_(Phase::Previous);
        self.signs_until = Some(now);
    }

    fn take_over(&mut self, now: Timestamp) {
        self.become_(Phase::Current);
        self.signs_from = now;
        self.signs_until = None;
        self.effective_at = self.effective_at.min(now);
    }
}

/// All keys of a tenant for one use that are not destroyed, and the rules for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    /// What its keys do.
    pub(super) used: Use,
    /// Grows with every change; what a change is based on.
    pub(super) version: i64,
    /// The rules.
    pub(super) policy: Policy,
    /// The keys, in no order.
    pub(super) slots: Vec<Slot>,
}

/// Why a change is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An immediate rotation, or a revert, while a Next key is pending.
    NextPending,
    /// There is no Next key to cancel.
    NoNext,
    /// There is no Previous key to go back to.
    NoPrevious,
    /// It is the only key.
    KeyRequired,
    /// No such key is published.
    NotFound,
    /// The previous key is not published for long enough to sign.
    NotYet {
        /// When to try again.
        retry_at: Timestamp,
    },
    /// Of private keys only Previous ones can be deleted.
    OnlyPrevious,
    /// A key is being made already.
    Busy,
    /// As many keys as can be are published; the first of them may go then.
    TooMany {
        /// When to try again.
        retry_at: Timestamp,
    },
}

impl Refusal {
    /// The name in the audit log.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NextPending => "next-pending",
            Self::NoNext => "no-next-key",
            Self::NoPrevious => "no-previous-key",
            Self::KeyRequired => "key-required",
            Self::NotFound => "not-found",
            Self::NotYet { .. } => "too-early",
            Self::OnlyPrevious => "only-previous",
            Self::Busy => "busy",
            Self::TooMany { .. } => "too-many-keys",
        }
    }
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Make the planned key on the device and publish it.
    Make(SigningKeyId),
    /// Plan a new key: nothing signs, or the policy says that it is time.
    Rotate {
        /// How long it is Next.
        grace: Duration,
    },
    /// Let it sign, and the one before it rest.
    TakeOver(SigningKeyId),
    /// Take it out of the JWKS: nothing that it signed lives.
    Retire(SigningKeyId),
    /// Destroy it on the device.
    Destroy(SigningKeyId),
}

/// What a look at the clocks gave.
pub(super) struct Moment<'a> {
    /// Wall time.
    pub(super) now: Timestamp,
    /// A time that has surely come, also if the wall clock was set forward: for what cannot be undone.
    pub(super) surely: Timestamp,
    /// For how long this daemon has seen a key published, on a clock that nobody sets.
    pub(super) seen_for: &'a dyn Fn(&SigningKeyId) -> Duration,
}

impl Ring {
    /// A ring without keys.
    #[cfg(test)]
    pub(super) fn empty(used: Use, policy: Policy) -> Self {
        Self { used, version: 0, policy, slots: Vec::new() }
    }

    /// `now`, but never before what has happened already: a clock that was set back undoes nothing.
    pub(super) fn clock(&self, now: Timestamp) -> Timestamp {
        let happened = |slot: &Slot| {
            let took_over = matches!(slot.phase, Phase::Current).then_some(slot.signs_from);
            let published = slot.phase.is_published().then_some(slot.published_at);
            [took_over, published, slot.signs_until].into_iter().flatten().max()
        };
        self.slots.iter().filter_map(happened).fold(now, Timestamp::max)
    }

    /// The key with that id.
    pub(super) fn slot(&self, id: &SigningKeyId) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.id == *id)
    }

    fn slot_mut(&mut self, id: &SigningKeyId) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.id == *id)
    }

    /// The key that signs.
    pub(super) fn signer(&self) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.phase == Phase::Current)
    }

    fn planned(&self) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.phase == Phase::Planned)
    }

    /// Published keys that do not sign yet, in the order in which they will.
    fn waiting(&self) -> Vec<&Slot> {
        let mut waiting: Vec<_> = self.slots.iter().filter(|slot| slot.phase == Phase::Next).collect();
        waiting.sort_by_key(|slot| slot.signs_from);
        waiting
    }

    /// What is told of the ring: Next, Current, then Previous keys, newest first.
    pub(super) fn listed(&self, now: Timestamp) -> Vec<(&Slot, Status)> {
        let now = self.clock(now);
        let mut keys: Vec<_> = self.slots.iter().filter(|slot| slot.is_listed()).collect();
        keys.sort_by_key(|slot| std::cmp::Reverse((slot.effective_at, slot.signs_from, slot.created_at)));
        let mut is_current_due = true;
        let mut status = |slot: &Slot| match slot.effective_at > now {
            true => Status::Next,
            false if std::mem::take(&mut is_current_due) => Status::Current,
            false => Status::Previous,
        };
        keys.into_iter().map(|slot| (slot, status(slot))).collect()
    }

    /// The keys of the JWKS in the order of the contract: Current, Next, Previous. One that is deleted and
    /// signs still is the last.
    pub(super) fn published(&self, now: Timestamp) -> Vec<&Slot> {
        let mut keys = self.listed(now);
        let order = |status| match status {
            Status::Current => 0,
            Status::Next => 1,
            Status::Previous => 2,
        };
        keys.sort_by_key(|(_, status)| order(*status));
        let leaving = self.slots.iter().filter(|slot| slot.phase.is_published() && slot.is_leaving);
        keys.into_iter().map(|(slot, _)| slot).chain(leaving).collect()
    }

    fn pending(&self, now: Timestamp) -> Option<SigningKeyId> {
        self.listed(now)
            .first()
            .filter(|(_, status)| *status == Status::Next)
            .map(|(slot, _)| slot.id.clone())
    }

    /// Plans a new key: `id` is to be made, and will be Next for `grace`.
    ///
    /// # Errors
    /// [`Refusal::NextPending`], [`Refusal::Busy`], [`Refusal::TooMany`].
    pub(super) fn plan(&mut self, id: SigningKeyId, grace: Duration, now: Timestamp) -> Result<(), Refusal> {
        if self.planned().is_some() {
            return Err(Refusal::Busy);
        }
        if grace.is_zero() && self.pending(now).is_some() {
            return Err(Refusal::NextPending);
        }
        if self.slots.iter().filter(|slot| slot.phase.is_published()).count() >= MOST {
            let until = self.slots.iter().filter_map(Slot::published_until).min();
            return Err(Refusal::TooMany { retry_at: until.unwrap_or(now).max(now) });
        }
        self.slots.push(Slot::planned(id, grace, now));
        Ok(())
    }

    /// The planned key was made: it is published, and takes its place in the line. A pending Next key is
    /// discarded for another one. Where nothing signs it does so at once: waiting would protect nobody. An
    /// imported key has signed elsewhere: what lives `signed` at the most.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] if it is not planned any more.
    pub(super) fn publish(
        &mut self,
        id: &SigningKeyId,
        signed: Duration,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        if self.slot(id).is_none_or(|slot| slot.phase != Phase::Planned) {
            return Err(Refusal::NotFound);
        }
        let (now, lead) = (self.clock(now), self.policy.lead(self.used, now));
        let (replaced, margin) = (self.pending(now), self.policy.margin());
        let nobody_signs = self.signer().is_none();
        let last =
            self.slots.iter().filter(|slot| slot.phase == Phase::Next && Some(&slot.id) != replaced.as_ref());
        let last = last.map(|slot| slot.signs_from).max();
        if let Some(next) = replaced.and_then(|next| self.slot_mut(&next)) {
            next.retire(End::Cancelled);
        }
        let Some(slot) = self.slot_mut(id) else { return Err(Refusal::NotFound) };
        (slot.published_at, slot.margin, slot.longest) = (now, margin, signed);
        slot.effective_at = now.plus(slot.grace);
        slot.signs_from = slot.effective_at.max(now.plus(lead));
        if let Some(last) = last {
            slot.signs_from = slot.signs_from.max(last.plus(Duration::from_micros(1)));
        }
        if nobody_signs {
            slot.effective_at = now;
            slot.take_over(now);
        } else {
            slot.become_(Phase::Next);
        }
        self.supersede(id, now);
        Ok(())
    }

    /// An imported key that verifies only, tokens of `lifetime` from now on.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] if it is not planned any more.
    pub(super) fn publish_as_previous(
        &mut self,
        id: &SigningKeyId,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let (now, margin) = (self.clock(now), self.policy.margin());
        let oldest = self.slots.iter().filter(|slot| slot.is_listed()).map(|slot| slot.effective_at).min();
        let planned = |slot: &&mut Slot| slot.phase == Phase::Planned;
        let slot = self.slot_mut(id).filter(planned).ok_or(Refusal::NotFound)?;
        (slot.published_at, slot.margin, slot.longest) = (now, margin, lifetime);
        // It was in use before anything that is here.
        let before = oldest.unwrap_or(now).as_micros().saturating_sub(1);
        slot.effective_at = Timestamp::from_micros(before);
        (slot.signs_from, slot.signs_until) = (slot.effective_at, Some(now));
        slot.become_(Phase::Previous);
        Ok(())
    }

    /// Drops keys that wait and that nobody will miss: neither the newest two, nor the one whose turn is
    /// next. And old ones that never signed anything.
    fn supersede(&mut self, newest: &SigningKeyId, now: Timestamp) {
        let listed: Vec<_> = self.listed(now).iter().map(|(slot, _)| slot.id.clone()).collect();
        let at = listed.iter().position(|id| id == newest).unwrap_or(0);
        let before = listed.get(at + 1).cloned();
        let turn = self.waiting().first().map(|slot| slot.id.clone());
        for slot in &mut self.slots {
            let is_kept = [Some(newest), before.as_ref(), turn.as_ref()].contains(&Some(&slot.id));
            let is_unused = match slot.phase {
                Phase::Next => slot.effective_at <= now && slot.longest.is_zero(),
                Phase::Previous => slot.longest.is_zero(),
                _ => false,
            };
            if is_unused && !is_kept {
                let end = if slot.phase == Phase::Next { End::Cancelled } else { End::Expired };
                slot.retire(end);
            }
        }
    }

    /// Lets a waiting key sign, and the one before it rest.
    pub(super) fn take_over(&mut self, id: &SigningKeyId, now: Timestamp) {
        let now = self.clock(now);
        if !self.slots.iter().any(|slot| slot.id == *id && slot.phase == Phase::Next) {
            return;
        }
        self.rest(now);
        if let Some(slot) = self.slot_mut(id) {
            slot.take_over(now);
        }
    }

    /// The key that signs stops.
    fn rest(&mut self, now: Timestamp) {
        let margin = self.policy.margin();
        for slot in self.slots.iter_mut().filter(|slot| slot.phase == Phase::Current) {
            slot.signs_until = Some(now);
            slot.margin = slot.margin.max(margin);
            match slot.is_leaving {
                true => slot.retire(End::Deleted),
                false => slot.become_(Phase::Previous),
            }
        }
    }

    /// Cancels the pending Next key.
    ///
    /// # Errors
    /// [`Refusal::NoNext`].
    pub(super) fn cancel(&mut self, now: Timestamp) -> Result<SigningKeyId, Refusal> {
        let next = self.pending(now).ok_or(Refusal::NoNext)?;
        if let Some(slot) = self.slot_mut(&next) {
            slot.retire(End::Cancelled);
        }
        Ok(next)
    }

    /// Goes back to the newest Previous key. One that signs (the rotation waits still) just goes on; one
    /// that has rested signs again at once, because it never left the JWKS.
    ///
    /// # Errors
    /// [`Refusal::NextPending`], [`Refusal::NoPrevious`], [`Refusal::NotYet`].
    pub(super) fn revert(&mut self, now: Timestamp) -> Result<SigningKeyId, Refusal> {
        if self.pending(now).is_some() {
            return Err(Refusal::NextPending);
        }
        let listed = self.listed(now);
        let of =
            |wanted| listed.iter().find(|(_, status)| *status == wanted).map(|(slot, _)| slot.id.clone());
        let back = of(Status::Previous).ok_or(Refusal::NoPrevious)?;
        let now = self.clock(now);
        let lead = self.policy.lead(self.used, now);
        let rested = self.slot(&back).filter(|slot| slot.phase == Phase::Previous);
        // One that was just imported is not known to verifiers yet.
        if let Some(retry_at) = rested.map(|slot| slot.published_at.plus(lead)).filter(|at| *at > now)
            && self.signer().is_some()
        {
            return Err(Refusal::NotYet { retry_at });
        }
        // Whatever would take over from it is abandoned.
        let place = self.slot(&back).filter(|slot| slot.phase == Phase::Next).map(|slot| slot.signs_from);
        for slot in self.slots.iter_mut().filter(|slot| slot.phase == Phase::Next) {
            if place.is_none_or(|place| slot.signs_from > place) {
                slot.set_aside(now);
            }
        }
        if self.slot(&back).is_some_and(|slot| slot.phase == Phase::Previous) {
            self.rest(now);
            if let Some(slot) = self.slot_mut(&back) {
                slot.take_over(now);
                slot.effective_at = now;
            }
        }
        Ok(back)
    }

    /// Deletes a key: tokens that it signed are not valid any more. One that signs while another waits to
    /// take over goes when that has happened, and is not told of until then.
    ///
    /// # Errors
    /// [`Refusal::KeyRequired`] before everything else, then [`Refusal::NotFound`], [`Refusal::OnlyPrevious`].
    pub(super) fn delete(&mut self, id: &SigningKeyId, now: Timestamp) -> Result<(), Refusal> {
        let listed = self.listed(now);
        if listed.len() <= 1 {
            return Err(Refusal::KeyRequired);
        }
        let status = listed.iter().find(|(slot, _)| slot.id == *id).map(|(_, status)| *status);
        let status = status.ok_or(Refusal::NotFound)?;
        if self.used == Use::Jwt && status != Status::Previous {
            return Err(Refusal::OnlyPrevious);
        }
        let (now, has_heir) = (self.clock(now), !self.waiting().is_empty());
        if self.slot(id).is_some_and(|slot| slot.phase == Phase::Current) && !has_heir {
            // A cookie key that is Current: the one before it goes on.
            self.revert(now).map_err(|_| Refusal::KeyRequired)?;
        }
        let Some(slot) = self.slot_mut(id) else { return Err(Refusal::NotFound) };
        match slot.phase {
            Phase::Current => slot.is_leaving = true,
            _ => slot.retire(End::Deleted),
        }
        Ok(())
    }

    /// Takes a key out at once, whatever it does. If it signed, the key that waits takes over early; where
    /// none does, `true`: a new one is needed.
    ///
    /// # Errors
    /// [`Refusal::NotFound`].
    pub(super) fn revoke(&mut self, id: &SigningKeyId, now: Timestamp) -> Result<bool, Refusal> {
        let now = self.clock(now);
        let is_published = |slot: &&mut Slot| slot.phase.is_published();
        let slot = self.slot_mut(id).filter(is_published).ok_or(Refusal::NotFound)?;
        let signed = slot.phase == Phase::Current;
        slot.retire(End::Revoked);
        if !signed {
            if self.listed(now).is_empty()
                && let Some(slot) = self.slots.iter_mut().find(|slot| slot.phase == Phase::Current)
            {
                slot.is_leaving = false;
            }
            return Ok(false);
        }
        // The newest that is due, else the pending Next.
        let heir = self.waiting().into_iter().max_by_key(|slot| (slot.effective_at <= now, slot.signs_from));
        let Some((heir, place)) = heir.map(|slot| (slot.id.clone(), slot.signs_from)) else {
            return Ok(true);
        };
        // Those that stood before it in the line would take over from it later.
        let before = |slot: &&mut Slot| slot.phase == Phase::Next && slot.signs_from < place;
        self.slots.iter_mut().filter(before).for_each(|slot| slot.set_aside(now));
        self.take_over(&heir, now);
        Ok(false)
    }

    /// The device would not make a planned key.
    pub(super) fn give_up(&mut self, id: &SigningKeyId, end: End) {
        if let Some(slot) = self.slot_mut(id).filter(|slot| slot.phase.may_become(Phase::Retired)) {
            slot.retire(end);
        }
    }

    /// Takes out a key of which nothing lives any more at a time that has surely come.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] if it is not so any more.
    pub(super) fn retire(&mut self, id: &SigningKeyId, surely: Timestamp) -> Result<(), Refusal> {
        let slot = self.slot_mut(id).filter(|slot| slot.is_over(surely)).ok_or(Refusal::NotFound)?;
        slot.retire(End::Expired);
        Ok(())
    }

    /// The device does not hold a retired key any more.
    pub(super) fn destroyed(&mut self, id: &SigningKeyId) {
        if let Some(slot) = self.slot_mut(id).filter(|slot| slot.phase == Phase::Retired) {
            slot.become_(Phase::Destroyed);
        }
    }

    /// Decides what has to happen. Does nothing itself; each step may be repeated.
    pub(super) fn due(&self, moment: &Moment<'_>) -> Vec<Step> {
        let now = self.clock(moment.now);
        let mut steps: Vec<_> = self.planned().map(|slot| Step::Make(slot.id.clone())).into_iter().collect();
        let waiting = self.waiting();
        let nobody_signs = self.signer().is_none();
        match waiting.first() {
            None if nobody_signs && steps.is_empty() => steps.push(Step::Rotate { grace: Duration::ZERO }),
            None => {}
            Some(slot) if nobody_signs => steps.push(Step::TakeOver(slot.id.clone())),
            Some(slot) => {
                let (seen, planned) = ((moment.seen_for)(&slot.id), slot.signs_from.since(slot.published_at));
                // A clock that stands still or was set back must not keep it waiting for ever.
                let is_due = slot.signs_from <= now || planned <= seen;
                if is_due && self.policy.lead(self.used, slot.published_at) <= seen {
                    steps.push(Step::TakeOver(slot.id.clone()));
                }
            }
        }
        steps.extend(self.scheduled(now).filter(|_| self.planned().is_none() && !nobody_signs));
        let over = self.slots.iter().filter(|slot| slot.is_over(moment.surely));
        steps.extend(over.map(|slot| Step::Retire(slot.id.clone())));
        let retired = self.slots.iter().filter(|slot| slot.phase == Phase::Retired);
        steps.extend(retired.map(|slot| Step::Destroy(slot.id.clone())));
        steps
    }

    /// Whether the policy asks for a rotation now.
    pub(super) fn is_old(&self, now: Timestamp) -> bool {
        self.planned().is_none() && self.scheduled(self.clock(now)).is_some()
    }

    /// The rotation that the policy asks for now.
    fn scheduled(&self, now: Timestamp) -> Option<Step> {
        let every = self.policy.rotate_every?;
        let newest = self.listed(now).first().map(|(slot, _)| slot.effective_at)?;
        let grace = self.policy.grace.min(every / 2);
        // So early that its grace has passed when the key before it is old enough.
        let due = newest.plus(every.saturating_sub(grace));
        (newest <= now && due <= now).then_some(Step::Rotate { grace })
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
