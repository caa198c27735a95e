//! RO-1: random life of a ring, with a virtual clock, two daemons that see it late and whose clocks differ, and
//! verifiers that keep documents. Whatever happens, I1 to I6 of reliability.md (5.3) hold.
//!
//! Real time is what passes; a daemon's wall clock is ahead of it or behind; its steady clock is neither. The
//! database is one ring; a daemon works on the copy that it read last, which is not older than `propagation`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::{Moment, Ring, Step};
use crate::clock::Timestamp;
use crate::ids::SigningKeyId;
use crate::keys::model::{Choice, End, Phase, Policy, PolicyPatch, Use};
use crate::keys::time::Timekeeper;

const START: i64 = 1_800_000_000;
const DAEMONS: usize = 2;
/// Looks of a daemon in one span of time.
const LOOKS: u64 = 6;
/// RO-1 asks for so many, over two threads.
const CASES: u32 = 50_000;

/// What can happen.
#[derive(Clone, Debug)]
enum Op {
    /// Real seconds pass; every daemon looks in between, as late as it may.
    Pass(u64),
    /// A daemon is told to rotate: at once, or with a grace.
    Rotate(usize, u64, Choice),
    Cancel(usize),
    Revert(usize),
    /// Deletes, or revokes, the key at that place of the list.
    Delete(usize, usize),
    Revoke(usize, usize),
    /// A daemon signs something that lives so long.
    Sign(usize, u64),
    /// A verifier loads the JWKS from a daemon.
    Load(usize),
    /// A daemon dies in the middle of a rotation, and all of them forget what they have seen.
    Crash(usize),
    /// A daemon's wall clock is set, by at most a day.
    Jump(usize, i64),
    /// A policy is changed: max-age, and how often keys rotate.
    Policy(u64, u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let daemon = 0..DAEMONS;
    let lifetime = prop_oneof![Just(10_u64), 30..400_u64, Just(3600)];
    let choice = prop_oneof![Just(Choice::Ec), Just(Choice::Rsa)];
    let op = prop_oneof![
        6 => prop_oneof![1..5_u64, 5..60_u64, 60..600_u64].prop_map(Op::Pass),
        3 => (daemon.clone(), prop_oneof![Just(0_u64), 1..300_u64], choice).prop_map(|(d, g, c)| Op::Rotate(d, g, c)),
        1 => daemon.clone().prop_map(Op::Cancel),
        1 => daemon.clone().prop_map(Op::Revert),
        1 => (daemon.clone(), 0..4_usize).prop_map(|(d, k)| Op::Delete(d, k)),
        1 => (daemon.clone(), 0..4_usize).prop_map(|(d, k)| Op::Revoke(d, k)),
        8 => (daemon.clone(), lifetime).prop_map(|(d, l)| Op::Sign(d, l)),
        6 => daemon.clone().prop_map(Op::Load),
        1 => daemon.clone().prop_map(Op::Crash),
        1 => (daemon, prop_oneof![-86_000..86_000_i64, -120..120_i64]).prop_map(|(d, j)| Op::Jump(d, j)),
        1 => (prop_oneof![Just(0_u64), 5..120_u64], prop_oneof![Just(0_u64), 60..2000_u64])
            .prop_map(|(age, every)| Op::Policy(age, every)),
    ];
    proptest::collection::vec(op, 1..25)
}

struct Daemon {
    /// Its wall clock against real time, in seconds.
    skew: i64,
    keeper: Timekeeper,
    view: Ring,
    /// When it was read.
    view_at: i64,
    seen: BTreeMap<SigningKeyId, i64>,
}

struct Token {
    key: SigningKeyId,
    signed: i64,
    dies: i64,
}

struct Document {
    served: i64,
    max_age: i64,
    keys: BTreeSet<SigningKeyId>,
}

struct World {
    now: i64,
    ring: Ring,
    daemons: Vec<Daemon>,
    tokens: Vec<Token>,
    documents: Vec<Document>,
    /// When each key was really published, and the longest document without it that was served before.
    published: BTreeMap<SigningKeyId, i64>,
    /// Keys that somebody took out on purpose: what they signed is dead.
    killed: BTreeSet<SigningKeyId>,
    /// Keys that took the place of a revoked one: waiting would have protected nobody.
    urgent: BTreeSet<SigningKeyId>,
    ever: BTreeSet<SigningKeyId>,
    algs: BTreeMap<SigningKeyId, Choice>,
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros((START + seconds) * 1_000_000)
}

fn policy() -> Policy {
    Policy { propagation: Duration::from_secs(5), skew: Duration::from_secs(240), ..Policy::default() }
}

impl World {
    fn new(skews: [i64; DAEMONS]) -> Self {
        let ring = Ring::empty(Use::Jwt, policy());
        let daemon = |skew| Daemon {
            skew,
            keeper: Timekeeper::start(at(skew), Duration::ZERO, None),
            view: ring.clone(),
            view_at: 0,
            seen: BTreeMap::new(),
        };
        let daemons = skews.map(daemon).into_iter().collect();
        let mut world = Self {
            now: 0,
            ring,
            daemons,
            tokens: Vec::new(),
            documents: Vec::new(),
            published: BTreeMap::new(),
            killed: BTreeSet::new(),
            urgent: BTreeSet::new(),
            ever: BTreeSet::new(),
            algs: BTreeMap::new(),
        };
        world.rotate(0, 0, Choice::Ec);
        world.refresh_all();
        world
    }

    fn steady(&self) -> Duration {
        Duration::from_secs(u64::try_from(self.now).unwrap())
    }

    fn wall(&self, daemon: usize) -> Timestamp {
        at(self.now + self.daemons[daemon].skew)
    }

    /// What the daemon writes down as the time of a change.
    fn decided_at(&mut self, daemon: usize) -> Timestamp {
        let (wall, steady) = (self.wall(daemon), self.steady());
        self.daemons[daemon].keeper.read(wall, steady).latest
    }

    fn refresh(&mut self, daemon: usize) {
        let (now, ring, daemon) = (self.now, &self.ring, &mut self.daemons[daemon]);
        daemon.view_at = now;
        if daemon.view.version == ring.version {
            return;
        }
        for slot in ring.slots.iter().filter(|slot| slot.phase.is_published()) {
            daemon.seen.entry(slot.id.clone()).or_insert(now);
        }
        daemon.view.clone_from(ring);
    }

    fn refresh_all(&mut self) {
        (0..DAEMONS).for_each(|daemon| self.refresh(daemon));
    }

    fn settle(&mut self, before: &Ring) {
        for slot in self.ring.slots.iter().filter(|slot| slot.phase.is_published()) {
            self.published.entry(slot.id.clone()).or_insert(self.now);
        }
        for slot in &self.ring.slots {
            let old = before.slot(&slot.id).map(|old| old.phase);
            let is_edge = old.is_none_or(|old| old == slot.phase || reaches(old, slot.phase));
            assert!(is_edge, "KL-3: {old:?} to {:?}", slot.phase);
            if matches!(slot.end, Some(End::Deleted | End::Revoked)) || slot.is_leaving {
                self.killed.insert(slot.id.clone());
            }
        }
        let signers = self.ring.slots.iter().filter(|slot| slot.phase == Phase::Current).count();
        assert!(signers <= 1, "I3: {signers} keys sign");
        let nexts = self.ring.listed(at(self.now)).iter().filter(|(_, s)| s.name() == "Next").count();
        assert!(nexts <= 1, "RO-2: {nexts} Next keys");
        self.ring.slots.retain(|slot| slot.phase != Phase::Destroyed);
    }

    fn change(&mut self, change: impl FnOnce(&mut Ring)) {
        let before = self.ring.clone();
        let nobody_signed = before.signer().is_none();
        change(&mut self.ring);
        if nobody_signed {
            self.urgent.extend(self.ring.signer().map(|slot| slot.id.clone()));
        }
        self.ring.version += 1;
        self.settle(&before);
    }

    fn rotate(&mut self, daemon: usize, grace: u64, choice: Choice) {
        let (now, id) = (self.decided_at(daemon), SigningKeyId::generate());
        assert!(self.ever.insert(id.clone()), "I5");
        self.algs.insert(id.clone(), choice);
        self.change(|ring| {
            if ring.plan(id.clone(), Duration::from_secs(grace), now).is_ok() {
                ring.publish(&id, Duration::ZERO, now).unwrap();
            }
        });
        self.refresh(daemon);
    }

    /// One look of a daemon, and what it does about it.
    fn look(&mut self, daemon: usize) {
        self.refresh(daemon);
        let (wall, steady, now) = (self.wall(daemon), self.steady(), self.now);
        let reading = self.daemons[daemon].keeper.read(wall, steady);
        if reading.suspect.is_some() {
            return;
        }
        let seen = &self.daemons[daemon].seen;
        let seen_for = |id: &SigningKeyId| {
            let since = seen.get(id).map_or(0, |since| now - since);
            Duration::from_secs(u64::try_from(since).unwrap())
        };
        let latest = reading.latest;
        let moment = Moment { now: reading.now, surely: reading.surely, seen_for: &seen_for };
        let steps = self.daemons[daemon].view.due(&moment);
        for step in steps {
            match step {
                Step::Make(id) => self.change(|ring| {
                    let _ = ring.publish(&id, Duration::ZERO, latest);
                }),
                Step::Rotate { grace } => self.rotate(daemon, grace.as_secs(), Choice::Ec),
                Step::TakeOver(id) => self.change(|ring| ring.take_over(&id, latest)),
                Step::Retire(id) => self.retire(&id, reading.surely),
                Step::Destroy(id) => self.change(|ring| ring.destroyed(&id)),
            }
        }
        self.refresh(daemon);
    }

    fn retire(&mut self, id: &SigningKeyId, surely: Timestamp) {
        if self.ring.clone().retire(id, surely).is_err() {
            return;
        }
        let alive = self.tokens.iter().filter(|token| token.key == *id && token.dies > self.now).count();
        assert_eq!(alive, 0, "I4: {alive} live tokens of a key that leaves the JWKS");
        self.change(|ring| ring.retire(id, surely).unwrap());
    }

    /// As `Keys::sign_jwt`: a lifetime is noted in the database before the first such signature.
    fn sign(&mut self, daemon: usize, lifetime: u64) {
        let (wall, steady) = (self.wall(daemon), self.steady());
        if self.daemons[daemon].keeper.read(wall, steady).suspect.is_some() {
            return;
        }
        let span = Duration::from_secs(lifetime);
        for _ in 0..2 {
            let Some(signer) = self.daemons[daemon].view.signer() else { return };
            let (id, known) = (signer.id.clone(), signer.longest);
            if known < span {
                let is_there = |slot: &&mut super::Slot| slot.id == id && slot.phase.is_published();
                let Some(slot) = self.ring.slots.iter_mut().find(is_there) else {
                    self.refresh(daemon);
                    continue;
                };
                slot.longest = slot.longest.max(span);
                self.ring.version += 1;
            }
            return self.signed(id, lifetime);
        }
    }

    fn signed(&mut self, id: SigningKeyId, lifetime: u64) {
        let (now, lifetime) = (self.now, i64::try_from(lifetime).unwrap());
        for document in &self.documents {
            let is_kept = document.served + document.max_age >= now;
            let missed = is_kept && !document.keys.contains(&id);
            let is_exempt = self.urgent.contains(&id) || self.killed.contains(&id);
            assert!(!missed || is_exempt, "I1: signed with a key that a verifier has not");
        }
        self.tokens.push(Token { key: id, signed: now, dies: now + lifetime });
    }

    fn load(&mut self, daemon: usize) {
        let daemon = &self.daemons[daemon];
        let wall = at(self.now + daemon.skew);
        let keys: BTreeSet<_> = daemon.view.published(wall).iter().map(|slot| slot.id.clone()).collect();
        for token in self.tokens.iter().filter(|token| token.dies > self.now) {
            // Every daemon publishes a key within the propagation; one that could not wait signs meanwhile.
            let is_new = self.urgent.contains(&token.key) && self.now <= self.published[&token.key] + 5;
            let is_there = keys.contains(&token.key) || self.killed.contains(&token.key) || is_new;
            assert!(
                is_there,
                "I2: signed at {}, dies at {}, not in the JWKS at {}",
                token.signed, token.dies, self.now
            );
        }
        let max_age = i64::try_from(daemon.view.policy.jwks_max_age.as_secs()).unwrap();
        self.documents.push(Document { served: self.now, max_age, keys });
    }

    /// Looks are at most `LOOKS` per span, because a test has to end; what is due between two is due at the next.
    fn pass(&mut self, seconds: u64) {
        let stride = seconds.div_ceil(LOOKS).max(1);
        let mut left = seconds;
        while left > 0 {
            let step = stride.min(left);
            left -= step;
            self.now += i64::try_from(step).unwrap();
            self.look(0);
            // The other one looks as late as it may: what it has is up to five seconds old.
            if left > 0 || seconds.is_multiple_of(2) {
                self.look(1);
            }
        }
        if self.daemons[1].view_at < self.now - 5 {
            self.refresh(1);
        }
    }

    fn named(&self, daemon: usize, place: usize) -> Option<SigningKeyId> {
        let now = self.wall(daemon);
        self.ring.listed(now).get(place).map(|(slot, _)| slot.id.clone())
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Pass(seconds) => self.pass(seconds),
            Op::Rotate(daemon, grace, choice) => self.rotate(daemon, grace, choice),
            Op::Cancel(daemon) => self.alter(daemon, |ring, now| {
                let _ = ring.cancel(now);
            }),
            Op::Revert(daemon) => self.alter(daemon, |ring, now| {
                let _ = ring.revert(now);
            }),
            Op::Delete(daemon, place) => {
                let id = self.named(daemon, place);
                self.alter(daemon, |ring, now| {
                    let _ = id.map(|id| ring.delete(&id, now));
                });
            }
            Op::Revoke(daemon, place) => self.revoke(daemon, place),
            Op::Sign(daemon, lifetime) => self.sign(daemon, lifetime),
            Op::Load(daemon) => self.load(daemon),
            Op::Crash(daemon) => self.crash(daemon),
            Op::Jump(daemon, by) => {
                let skew = &mut self.daemons[daemon].skew;
                // Back to where it may be, or by as much as a day.
                *skew = if by.abs() <= 120 { by } else { (*skew + by).clamp(-43_000, 43_000) };
            }
            Op::Policy(age, every) => self.alter(0, |ring, now| {
                let patch = PolicyPatch {
                    jwks_max_age: Some(age),
                    rotate_every: Some(every),
                    ..PolicyPatch::default()
                };
                ring.policy = ring.policy.patched(&patch, now).unwrap();
            }),
        }
    }

    fn alter(&mut self, daemon: usize, change: impl FnOnce(&mut Ring, Timestamp)) {
        let now = self.decided_at(daemon);
        self.change(|ring| change(ring, now));
        self.refresh(daemon);
    }

    fn revoke(&mut self, daemon: usize, place: usize) {
        let Some(id) = self.named(daemon, place) else { return };
        let now = self.decided_at(daemon);
        let signer = |ring: &Ring| ring.signer().map(|slot| slot.id.clone());
        let before = signer(&self.ring);
        self.change(|ring| {
            let _ = ring.revoke(&id, now);
        });
        self.urgent.extend(signer(&self.ring).filter(|_| before != signer(&self.ring)));
        assert!(!self.ring.published(now).iter().any(|slot| slot.id == id), "RO-4");
        self.look(daemon);
    }

    fn crash(&mut self, daemon: usize) {
        // The row is written, and that is all.
        let (now, id) = (self.decided_at(daemon), SigningKeyId::generate());
        self.change(|ring| {
            let _ = ring.plan(id.clone(), Duration::ZERO, now);
        });
        self.refresh(daemon);
        for daemon in 0..DAEMONS {
            let (wall, steady) = (self.wall(daemon), self.steady());
            let it = &mut self.daemons[daemon];
            it.seen.clear();
            it.keeper = Timekeeper::start(wall, steady, Some(it.keeper.mark()));
        }
    }
}

/// Whether a phase can be reached from another one by legal edges: one change may make several.
fn reaches(from: Phase, to: Phase) -> bool {
    from.may_become(to) || Phase::ALL.into_iter().any(|via| from.may_become(via) && via.may_become(to))
}

fn hold(skews: (std::ops::RangeInclusive<i64>, std::ops::RangeInclusive<i64>)) {
    let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
    let held = runner.run(&(skews, ops()), |((one, other), ops)| {
        let mut world = World::new([one, other]);
        for op in &ops {
            world.apply(op);
        }
        // Left alone, the line empties and one key signs.
        for daemon in 0..DAEMONS {
            world.apply(&Op::Jump(daemon, 0));
        }
        world.alter(0, |ring, _| ring.policy.rotate_every = None);
        for _ in 0..3 {
            world.pass(500);
        }
        prop_assert!(world.ring.signer().is_some(), "nobody signs");
        let waiting = world.ring.slots.iter().filter(|slot| slot.phase == Phase::Next).count();
        prop_assert_eq!(waiting, 0, "a key waits for ever");
        Ok(())
    });
    if let Err(error) = held {
        panic!("{error}");
    }
}

#[test]
fn the_invariants_hold_whatever_happens() {
    hold((-120..=120, -120..=120));
}

#[test]
fn the_invariants_hold_with_clocks_that_agree() {
    hold((0..=0, 0..=0));
}
