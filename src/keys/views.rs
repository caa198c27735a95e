//! Keys as administrators see them.

use std::sync::Arc;
use std::time::Duration;

use super::model::{Change, KeyView, Phase, Policy, Status};
use super::plan::{Ring, Slot};
use super::rings::View;
use super::store::rings::Entry;
use crate::clock::Timestamp;
use crate::seal::Alg;

impl View {
    /// The ring's keys in the order Next, Current, Previous (newest first).
    pub(super) fn told(&self, now: Timestamp) -> Vec<KeyView> {
        let listed = self.ring.listed(now);
        let view = |(slot, status): (&Slot, Status)| {
            self.entries.get(&slot.id).map(|entry| view(&self.ring, slot, status, entry))
        };
        listed.into_iter().filter_map(view).collect()
    }

    pub(super) fn change(&self, now: Timestamp, dead_tokens: Option<u64>, dry_run: bool) -> Change {
        Change { keys: self.told(now), dead_tokens, dry_run }
    }

    /// What `decide` would make of it.
    pub(super) fn would_be(&self, ring: Ring, more: Option<(&Slot, Entry)>) -> Self {
        let mut entries = self.entries.clone();
        entries.extend(more.map(|(slot, entry)| (slot.id.clone(), Arc::new(entry))));
        Self { ring, entries }
    }
}

fn view(ring: &Ring, slot: &Slot, status: Status, entry: &Entry) -> KeyView {
    let signs_until = slot.signs_until.or_else(|| heir(ring, slot).map(|heir| heir.signs_from));
    let margin =
        slot.margin.max(if slot.phase == Phase::Current { ring.policy.margin() } else { Duration::ZERO });
    let waits = slot.phase == Phase::Next && status == Status::Current;
    KeyView {
        id: slot.id.clone(),
        used: ring.used,
        status,
        choice: entry.choice,
        kid: entry.public.as_ref().map(|public| public.kid.clone()),
        alg: entry.alg.map_or("HS256", Alg::name),
        origin: entry.origin,
        device: entry.device.device().as_str().to_owned(),
        created_at: slot.created_at,
        effective_at: slot.effective_at,
        is_signing: slot.phase == Phase::Current,
        signs_from: slot.signs_from,
        signs_until,
        published_until: signs_until.map(|until| until.plus(slot.longest + margin)),
        waits_for: waits.then(|| reason(&ring.policy)),
    }
}

/// The key that takes over from this one, if one waits.
fn heir<'a>(ring: &'a Ring, slot: &Slot) -> Option<&'a Slot> {
    let after = |other: &&Slot| other.phase == Phase::Next && other.signs_from > slot.signs_from;
    let signs = matches!(slot.phase, Phase::Current | Phase::Next);
    ring.slots.iter().filter(|_| signs).filter(after).min_by_key(|other| other.signs_from)
}

fn reason(policy: &Policy) -> String {
    format!(
        "until then the key before it signs: every daemon has to publish it ({} s), a verifier may keep an older \
         JWKS ({} s), and clocks may differ ({} s)",
        policy.propagation.as_secs(),
        policy.jwks_max_age.as_secs(),
        policy.skew.as_secs()
    )
}
