//! The contract's sequences and the edges of each change, as tables.

use std::time::Duration;

use super::{MOST, Moment, Refusal, Ring, Step};
use crate::clock::Timestamp;
use crate::ids::SigningKeyId;
use crate::keys::model::{End, Phase, Policy, Status, Use};

const GRACE: Duration = Duration::from_secs(14_400);
const NONE: Duration = Duration::ZERO;

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_micros(1_800_000_000_000_000).plus(Duration::from_secs(seconds))
}

/// A ring whose keys are called k1, k2, ... in the order of their making.
struct Stage {
    ring: Ring,
    names: Vec<SigningKeyId>,
    now: u64,
}

impl Stage {
    fn new(used: Use) -> Self {
        let mut stage = Self { ring: Ring::empty(used, Policy::default()), names: Vec::new(), now: 0 };
        stage.rotate(NONE).unwrap();
        stage
    }

    fn rotate(&mut self, grace: Duration) -> Result<(), Refusal> {
        let id = SigningKeyId::generate();
        self.ring.plan(id.clone(), grace, at(self.now))?;
        self.ring.publish(&id, NONE, at(self.now))?;
        self.names.push(id);
        Ok(())
    }

    fn id(&self, name: usize) -> SigningKeyId {
        self.names[name - 1].clone()
    }

    /// `k3 Current, k2 Previous`, as the contract writes it.
    fn told(&self) -> String {
        let name = |id| self.names.iter().position(|known| known == id).unwrap() + 1;
        let keys = self.ring.listed(at(self.now));
        let keys: Vec<_> = keys.iter().map(|(slot, s)| format!("k{} {}", name(&slot.id), s.name())).collect();
        keys.join(", ")
    }

    fn signer(&self) -> usize {
        let id = &self.ring.signer().unwrap().id;
        self.names.iter().position(|known| known == id).unwrap() + 1
    }

    /// Lets the time pass, and does what is due each second.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += 1;
            self.step();
        }
    }

    fn step(&mut self) {
        let (now, published) = (at(self.now), self.ring.clone());
        let seen_for =
            |id: &SigningKeyId| published.slot(id).map_or(NONE, |slot| now.since(slot.published_at));
        for step in self.ring.due(&Moment { now, surely: now, seen_for: &seen_for }) {
            match step {
                Step::TakeOver(id) => self.ring.take_over(&id, now),
                Step::Retire(id) => self.ring.retire(&id, now).unwrap(),
                Step::Destroy(id) => self.ring.destroyed(&id),
                Step::Rotate { grace } => self.rotate(grace).unwrap(),
                Step::Make(_) => unreachable!("rotate makes at once"),
            }
        }
    }

    /// The key that signs has signed something that lives so long.
    fn sign(&mut self, lifetime: u64) {
        let slot = self.ring.slots.iter_mut().find(|slot| slot.phase == Phase::Current).unwrap();
        slot.longest = slot.longest.max(Duration::from_secs(lifetime));
    }
}

/// The lead of the default policy: 30 s of propagation and 60 s of skew.
const LEAD: u64 = 90;

#[test]
fn the_first_key_signs_at_once_and_the_next_when_all_know_it() {
    let mut stage = Stage::new(Use::Jwt);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k1 Current", 1));

    stage.rotate(NONE).unwrap();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 1));
    stage.pass(LEAD - 1);
    assert_eq!(stage.signer(), 1);
    stage.pass(1);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 2));
}

#[test]
fn the_contracts_worked_sequence_comes_out() {
    let mut stage = Stage::new(Use::Jwt);
    stage.sign(3600);
    stage.rotate(NONE).unwrap();
    assert_eq!(stage.told(), "k2 Current, k1 Previous");
    stage.rotate(NONE).unwrap();
    assert_eq!(stage.told(), "k3 Current, k2 Previous, k1 Previous");
    let k3 = stage.id(3);
    assert_eq!(stage.ring.delete(&k3, at(0)), Err(Refusal::OnlyPrevious));
    for name in [2, 1] {
        let id = stage.id(name);
        stage.ring.delete(&id, at(0)).unwrap();
    }
    assert_eq!(stage.told(), "k3 Current");
    assert_eq!(stage.signer(), 1, "the deleted key signs until another can");
    let unknown = SigningKeyId::generate();
    assert_eq!(stage.ring.delete(&unknown, at(0)), Err(Refusal::KeyRequired), "even for an unknown id");
    stage.pass(LEAD + 1);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k3 Current", 3));
    assert_eq!(stage.ring.published(at(stage.now)).len(), 1, "and is gone then, with what it signed");

    stage.rotate(GRACE).unwrap();
    assert_eq!(stage.told(), "k4 Next, k3 Current");
    assert_eq!(stage.rotate(NONE), Err(Refusal::NextPending));
    stage.rotate(Duration::from_secs(7200)).unwrap();
    assert_eq!(stage.told(), "k5 Next, k3 Current");
    let (k4, k5) = (stage.id(4), stage.id(5));
    assert_eq!(stage.ring.slot(&k4).unwrap().end, Some(End::Cancelled));
    assert_eq!(stage.ring.delete(&k4, at(stage.now)), Err(Refusal::NotFound));
    assert_eq!(stage.ring.delete(&k5, at(stage.now)), Err(Refusal::OnlyPrevious));
    stage.pass(7199);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k5 Next, k3 Current", 3));
    stage.pass(1);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k5 Current, k3 Previous", 5));
}

#[test]
fn a_short_grace_makes_the_key_current_in_time_and_not_sign_early() {
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(Duration::from_secs(5)).unwrap();
    assert_eq!(stage.told(), "k2 Next, k1 Current");
    stage.pass(5);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 1));
    stage.pass(LEAD - 5);
    assert_eq!(stage.signer(), 2);
}

#[test]
fn a_key_stays_until_the_longest_token_is_dead_and_goes_then() {
    let mut stage = Stage::new(Use::Jwt);
    stage.sign(600);
    stage.rotate(NONE).unwrap();
    stage.pass(LEAD);
    let margin = 120;
    stage.pass(600 + margin - 1);
    assert_eq!(stage.told(), "k2 Current, k1 Previous");
    stage.pass(1);
    assert_eq!(stage.told(), "k2 Current");
    stage.pass(1);
    let k1 = stage.id(1);
    assert_eq!(stage.ring.slot(&k1).unwrap().phase, Phase::Destroyed);
}

#[test]
fn rotations_in_a_row_stand_in_line_and_the_line_moves() {
    let mut stage = Stage::new(Use::Jwt);
    stage.sign(60);
    let mut signers = Vec::new();
    for _ in 0..20 {
        stage.rotate(NONE).unwrap();
        stage.pass(20);
        signers.push(stage.signer());
    }
    // The line of those that wait is short, the one who is next is not pushed out of it, and keys that signed stay.
    assert!(stage.ring.slots.iter().filter(|slot| slot.phase == Phase::Next).count() <= 4);
    assert!(signers.windows(2).all(|pair| pair[0] <= pair[1]) && signers[19] > signers[5], "{signers:?}");
    stage.pass(LEAD * 3);
    assert_eq!(stage.signer(), 21);
}

#[test]
fn a_next_key_can_be_cancelled_once() {
    let mut stage = Stage::new(Use::Jwt);
    assert_eq!(stage.ring.cancel(at(0)), Err(Refusal::NoNext));
    stage.rotate(GRACE).unwrap();
    stage.ring.cancel(at(0)).unwrap();
    assert_eq!(stage.told(), "k1 Current");
    assert_eq!(stage.ring.cancel(at(0)), Err(Refusal::NoNext));
    stage.pass(20_000);
    assert_eq!(stage.signer(), 1);
}

#[test]
fn a_revert_goes_back_at_once_because_the_key_never_left() {
    let mut stage = Stage::new(Use::Jwt);
    assert_eq!(stage.ring.revert(at(0)), Err(Refusal::NoPrevious));
    stage.sign(3600);
    stage.rotate(NONE).unwrap();
    stage.pass(LEAD);
    stage.sign(3600);
    stage.ring.revert(at(stage.now)).unwrap();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k1 Current, k2 Previous", 1));
    stage.pass(1000);
    assert_eq!(stage.signer(), 1);
    // And forward again.
    stage.ring.revert(at(stage.now)).unwrap();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 2));
}

#[test]
fn a_revert_of_a_rotation_that_waits_cancels_it() {
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(NONE).unwrap();
    stage.ring.revert(at(0)).unwrap();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k1 Current", 1));
    stage.rotate(GRACE).unwrap();
    assert_eq!(stage.ring.revert(at(0)), Err(Refusal::NextPending));
}

#[test]
fn a_revoked_key_is_gone_at_once_whatever_it_was() {
    // Current, with nobody in line: a new one is needed, and the previous one does not come back.
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(NONE).unwrap();
    stage.pass(LEAD);
    let k2 = stage.id(2);
    assert_eq!(stage.ring.revoke(&k2, at(stage.now)), Ok(true));
    assert!(stage.ring.signer().is_none());
    stage.step();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k3 Current, k1 Previous", 3));
    assert_eq!(stage.ring.revoke(&k2, at(stage.now)), Err(Refusal::NotFound));

    // Current, with one in line: that one takes over early.
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(GRACE).unwrap();
    let k1 = stage.id(1);
    assert_eq!(stage.ring.revoke(&k1, at(0)), Ok(false));
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current", 2));

    // The one that is called Current and waits: the signer goes on.
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(NONE).unwrap();
    let k2 = stage.id(2);
    assert_eq!(stage.ring.revoke(&k2, at(0)), Ok(false));
    assert_eq!((stage.told().as_str(), stage.signer()), ("k1 Current", 1));
}

#[test]
fn those_who_stood_before_the_heir_do_not_take_over_from_it_later() {
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(NONE).unwrap();
    stage.pass(10);
    stage.rotate(NONE).unwrap();
    let k1 = stage.id(1);
    stage.ring.revoke(&k1, at(stage.now)).unwrap();
    assert_eq!(stage.signer(), 3);
    stage.pass(1000);
    assert_eq!(stage.signer(), 3);
}

#[test]
fn of_cookie_keys_the_current_one_can_be_deleted_and_unused_ones_are_not_kept() {
    let mut stage = Stage::new(Use::Cookie);
    let k1 = stage.id(1);
    assert_eq!(stage.ring.delete(&k1, at(0)), Err(Refusal::KeyRequired));
    stage.rotate(NONE).unwrap();
    stage.pass(LEAD);
    stage.rotate(NONE).unwrap();
    assert_eq!(
        stage.told(),
        "k3 Current, k2 Previous",
        "at most two, where none of the others signed a cookie"
    );
    stage.pass(LEAD);
    let k3 = stage.id(3);
    stage.ring.delete(&k3, at(stage.now)).unwrap();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current", 2));

    let mut stage = Stage::new(Use::Cookie);
    for _ in 0..3 {
        stage.sign(1_209_600);
        stage.rotate(NONE).unwrap();
        stage.pass(LEAD);
    }
    assert_eq!(stage.told(), "k4 Current, k3 Previous, k2 Previous, k1 Previous");
}

#[test]
fn a_clock_that_is_set_back_undoes_nothing() {
    let mut stage = Stage::new(Use::Jwt);
    stage.now = 100_000;
    stage.sign(60);
    stage.rotate(NONE).unwrap();
    stage.pass(LEAD);
    stage.now = 10_000;
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 2));
    stage.rotate(NONE).unwrap();
    assert_eq!(stage.told(), "k3 Current, k2 Previous, k1 Previous");
    let seen_for = |_: &SigningKeyId| Duration::from_secs(LEAD);
    let moment = Moment { now: at(stage.now), surely: at(stage.now), seen_for: &seen_for };
    assert_eq!(stage.ring.due(&moment), [Step::TakeOver(stage.id(3))], "nor does it keep a key waiting");
}

#[test]
fn a_clock_that_is_set_forward_makes_no_key_sign_early_and_none_go_early() {
    let mut stage = Stage::new(Use::Jwt);
    stage.sign(600);
    stage.rotate(NONE).unwrap();
    let day = 24 * 3600;
    let due = |stage: &Stage, seen: u64, surely| {
        let seen_for = |_: &SigningKeyId| Duration::from_secs(seen);
        stage.ring.due(&Moment { now: at(day), surely: at(surely), seen_for: &seen_for })
    };
    assert_eq!(due(&stage, LEAD - 1, 0), []);
    assert_eq!(due(&stage, LEAD, 0), [Step::TakeOver(stage.id(2))]);
    stage.pass(LEAD);
    assert_eq!(due(&stage, 0, LEAD + 600), []);
    assert_eq!(due(&stage, 0, LEAD + 720), [Step::Retire(stage.id(1))]);
}

#[test]
fn a_lower_max_age_counts_when_the_documents_with_the_higher_one_are_gone() {
    let mut stage = Stage::new(Use::Jwt);
    let patch = |seconds| crate::keys::PolicyPatch { jwks_max_age: Some(seconds), ..Default::default() };
    let set = |stage: &mut Stage, seconds| {
        stage.ring.policy = stage.ring.policy.patched(&patch(seconds), at(stage.now)).unwrap();
    };
    set(&mut stage, 3600);
    set(&mut stage, 0);
    stage.pass(600);
    stage.rotate(NONE).unwrap();
    stage.pass(3000);
    assert_eq!(stage.signer(), 1);
    stage.pass(LEAD + 60);
    assert_eq!(stage.signer(), 2);
}

#[test]
fn a_policy_rotates_when_the_key_is_old_and_a_new_interval_leaves_no_gap() {
    let mut stage = Stage::new(Use::Jwt);
    stage.ring.policy.rotate_every = Some(Duration::from_secs(3600));
    stage.ring.policy.grace = Duration::from_secs(600);
    stage.pass(3000);
    assert_eq!(stage.told(), "k2 Next, k1 Current", "a grace before the hour");
    stage.pass(600);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 2));
    stage.ring.policy.rotate_every = Some(Duration::from_secs(12 * 3600));
    stage.sign(600);
    stage.pass(3 * 3600);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current", 2));
    stage.ring.policy.rotate_every = Some(Duration::from_secs(3600));
    stage.pass(1);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k3 Next, k2 Current", 2));
    stage.pass(600);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k3 Current, k2 Previous", 3));
}

#[test]
fn an_imported_key_that_verifies_only_is_older_than_all_others() {
    let mut stage = Stage::new(Use::Jwt);
    let id = SigningKeyId::generate();
    stage.ring.plan(id.clone(), NONE, at(5)).unwrap();
    stage.ring.publish_as_previous(&id, Duration::from_secs(600), at(5)).unwrap();
    stage.names.push(id);
    assert_eq!((stage.told().as_str(), stage.signer()), ("k1 Current, k2 Previous", 1));
    assert!(matches!(stage.ring.revert(at(5)), Err(Refusal::NotYet { .. })), "verifiers do not know it yet");
    stage.pass(600 + 120 + 4);
    assert_eq!(stage.told(), "k1 Current, k2 Previous");
    stage.pass(2);
    assert_eq!(stage.told(), "k1 Current");
}

#[test]
fn there_is_an_end_to_what_a_jwks_can_hold() {
    let mut stage = Stage::new(Use::Jwt);
    let refused = (0..2 * MOST).find_map(|_| {
        stage.sign(1_000_000);
        let refused = stage.rotate(NONE).err();
        stage.pass(LEAD);
        refused
    });
    assert!(matches!(refused, Some(Refusal::TooMany { retry_at }) if retry_at > at(stage.now)));
    assert_eq!(stage.ring.published(at(stage.now)).len(), MOST);
}

#[test]
fn one_key_is_made_at_a_time_and_one_that_cannot_be_made_is_given_up() {
    let mut stage = Stage::new(Use::Jwt);
    let id = SigningKeyId::generate();
    stage.ring.plan(id.clone(), NONE, at(0)).unwrap();
    assert_eq!(stage.rotate(NONE), Err(Refusal::Busy));
    let seen_for = |_: &SigningKeyId| NONE;
    let moment = Moment { now: at(0), surely: at(0), seen_for: &seen_for };
    assert_eq!(stage.ring.due(&moment), [Step::Make(id.clone())]);
    stage.ring.give_up(&id, End::Failed);
    assert_eq!(stage.ring.due(&moment), [Step::Destroy(id)]);
    stage.rotate(NONE).unwrap();
}

#[test]
fn the_jwks_has_the_contracts_order() {
    let mut stage = Stage::new(Use::Jwt);
    stage.sign(9000);
    stage.rotate(NONE).unwrap();
    stage.pass(LEAD);
    stage.rotate(GRACE).unwrap();
    let statuses: Vec<_> = stage.ring.listed(at(stage.now)).iter().map(|(_, status)| *status).collect();
    assert_eq!(statuses, [Status::Next, Status::Current, Status::Previous]);
    let ids: Vec<_> = stage.ring.published(at(stage.now)).iter().map(|slot| slot.id.clone()).collect();
    assert_eq!(ids, [stage.id(2), stage.id(3), stage.id(1)]);
}

#[test]
fn an_imported_key_that_takes_over_stays_for_what_it_signed_elsewhere() {
    let mut stage = Stage::new(Use::Jwt);
    let id = SigningKeyId::generate();
    stage.ring.plan(id.clone(), NONE, at(0)).unwrap();
    stage.ring.publish(&id, Duration::from_secs(600), at(0)).unwrap();
    stage.names.push(id.clone());
    assert_eq!(stage.told(), "k2 Current, k1 Previous");
    // Given up before it signed here, it verifies still.
    stage.ring.revert(at(0)).unwrap();
    assert_eq!((stage.told().as_str(), stage.signer()), ("k2 Current, k1 Previous", 1));
    assert_eq!(stage.ring.slot(&id).unwrap().phase, Phase::Previous);
    stage.pass(600 + 120 - 1);
    assert!(stage.ring.published(at(stage.now)).iter().any(|slot| slot.id == id));
    stage.pass(1);
    assert!(stage.ring.published(at(stage.now)).iter().all(|slot| slot.id != id));
}

#[test]
fn what_is_not_planned_is_not_published_and_cancels_nothing() {
    let mut stage = Stage::new(Use::Jwt);
    stage.rotate(GRACE).unwrap();
    let before = stage.ring.clone();
    let (k1, other) = (stage.id(1), SigningKeyId::generate());
    for id in [k1, other] {
        assert_eq!(stage.ring.publish(&id, NONE, at(0)), Err(Refusal::NotFound));
    }
    assert_eq!(stage.ring, before);
}

#[test]
fn a_less_careful_policy_counts_when_the_more_careful_one_has_passed() {
    let mut stage = Stage::new(Use::Cookie);
    let patch = crate::keys::PolicyPatch { propagation: Some(2), skew: Some(0), ..Default::default() };
    stage.ring.policy = stage.ring.policy.patched(&patch, at(0)).unwrap();
    stage.rotate(NONE).unwrap();
    // A daemon that is cut off may use what was there for as long as the old policy said.
    stage.pass(LEAD - 1);
    assert_eq!(stage.signer(), 1);
    stage.pass(1);
    assert_eq!(stage.signer(), 2);
    stage.rotate(NONE).unwrap();
    stage.pass(2);
    assert_eq!(stage.signer(), 3);
}
