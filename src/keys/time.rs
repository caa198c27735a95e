//! Whether the wall clock can be believed. Pure: two clocks in, a verdict out.
//!
//! Keys leave the JWKS by wall time, and a clock that is set forward would take them out while what they
//! signed is alive. So every step that the wall clock makes against the steady one is kept as doubt, and
//! what cannot be undone waits for as long (reliability.md, T13 and RO-6). A host that was down for a while
//! cannot tell a pause from a jump: its doubt is the pause, a day at the most. Doubt ends after a day.
//! Further jumps than a day are not dealt with: nothing is signed, and the reason is told.

use std::time::Duration;

use crate::clock::Timestamp;

/// Jumps up to this are dealt with.
const BOUND: Duration = Duration::from_secs(24 * 3600);
/// A restart takes no longer; what is longer may have been a jump.
const RESTART: Duration = Duration::from_secs(600);

/// What daemons remember of the wall clock when they are not running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The latest wall time seen.
    pub(super) high: Timestamp,
    /// By how much the wall clock may be ahead.
    pub(super) doubt: Duration,
    /// When (by the wall clock) the doubt ends.
    pub(super) doubt_until: Timestamp,
}

/// What can be said of the time now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    /// Wall time.
    pub(super) now: Timestamp,
    /// A time that has surely come.
    pub(super) surely: Timestamp,
    /// Why nothing may be signed.
    pub(super) suspect: Option<String>,
}

/// Compares the wall clock with a steady one that began with the process.
#[derive(Debug)]
pub(super) struct Timekeeper {
    wall: Timestamp,
    steady: Duration,
    high: Timestamp,
    doubt: Duration,
    /// When the doubt ends, on the steady clock.
    doubt_until: Duration,
    /// How far the wall clock has gone ahead of the steady one since the start, or behind it if negative.
    ahead: i64,
}

impl Timekeeper {
    /// Begins with what is remembered.
    pub(super) fn start(wall: Timestamp, steady: Duration, mark: Option<Mark>) -> Self {
        let gap = mark.map_or(Duration::ZERO, |mark| wall.since(mark.high));
        let kept = mark.filter(|mark| mark.doubt_until > wall);
        let left = kept.map_or(Duration::ZERO, |mark| mark.doubt_until.since(wall).min(BOUND));
        let kept = kept.map_or(Duration::ZERO, |mark| mark.doubt);
        let (doubt, until) = match gap > RESTART {
            true => ((kept + gap).min(BOUND), BOUND),
            false => (kept.min(BOUND), left),
        };
        let high = mark.map_or(wall, |mark| mark.high.max(wall));
        Self { wall, steady, high, doubt, doubt_until: steady + until, ahead: 0 }
    }

    /// Looks at both clocks.
    pub(super) fn read(&mut self, wall: Timestamp, steady: Duration) -> Reading {
        let (passed, walked) =
            (micros(steady.saturating_sub(self.steady)), wall.as_micros().saturating_sub(self.wall.as_micros()));
        let step = walked.saturating_sub(passed);
        (self.wall, self.steady, self.high) = (wall, steady, self.high.max(wall));
        self.ahead = self.ahead.saturating_add(step);
        let doubt = micros(self.doubt).saturating_add(step);
        self.doubt = Duration::from_micros(u64::try_from(doubt).unwrap_or(0));
        if step > 1_000_000 {
            self.doubt_until = steady + BOUND;
        }
        if steady >= self.doubt_until {
            self.doubt = Duration::ZERO;
        }
        let surely = Timestamp::from_micros(wall.as_micros().saturating_sub(micros(self.doubt)));
        Reading { now: wall, surely, suspect: self.suspect(wall) }
    }

    fn suspect(&self, wall: Timestamp) -> Option<String> {
        let behind = self.high.since(wall);
        if behind > BOUND {
            return Some(format!("the wall clock is {} s behind a time that was seen before", behind.as_secs()));
        }
        let ahead = Duration::from_micros(u64::try_from(self.ahead).unwrap_or(0));
        let is_far = ahead > BOUND;
        is_far.then(|| format!("the wall clock went {} s ahead of the steady clock", ahead.as_secs()))
    }

    /// A person says that the wall clock is right.
    pub(super) fn accept(&mut self, wall: Timestamp, steady: Duration) {
        *self = Self { doubt: BOUND, doubt_until: steady + BOUND, ..Self::start(wall, steady, None) };
    }

    /// What to remember.
    pub(super) fn mark(&self) -> Mark {
        let left = self.doubt_until.saturating_sub(self.steady);
        Mark { high: self.high, doubt: self.doubt, doubt_until: self.wall.plus(left) }
    }
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * 3600;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_micros(1_800_000_000_000_000).plus(Duration::from_secs(seconds))
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn keeper() -> Timekeeper {
        Timekeeper::start(at(0), s(0), None)
    }

    #[test]
    fn a_clock_that_walks_with_the_steady_one_is_believed() {
        let mut keeper = keeper();
        for second in 1..10_000 {
            let reading = keeper.read(at(second), s(second));
            assert_eq!((reading.surely, reading.suspect), (at(second), None));
        }
    }

    #[test]
    fn a_jump_forward_is_doubted_for_a_day_and_one_back_takes_the_doubt_away() {
        let mut keeper = keeper();
        assert_eq!(keeper.read(at(1 + DAY / 2), s(1)).surely, at(1));
        assert_eq!(keeper.read(at(101 + DAY / 2), s(101)).surely, at(101));
        // Corrected.
        assert_eq!(keeper.read(at(102), s(102)).surely, at(102));

        let reading = keeper.read(at(103 + 3600), s(103));
        assert_eq!((reading.surely, reading.suspect), (at(103), None));
        let later = DAY + 200;
        assert_eq!(keeper.read(at(later + 3600), s(later)).surely, at(later + 3600), "a day later");
    }

    #[test]
    fn small_steps_add_up() {
        let mut keeper = keeper();
        // A clock that runs a hundred times too fast.
        for second in 1..100 {
            assert_eq!(keeper.read(at(second * 100), s(second)).surely, at(second));
        }
        // One that stands still: what is certain stands still as well.
        assert!(keeper.read(at(9900), s(20_000)).surely <= at(9900));
    }

    #[test]
    fn beyond_a_day_nothing_is_signed_until_it_is_put_right_or_accepted() {
        let mut keeper = keeper();
        assert!(keeper.read(at(DAY - 10), s(1)).suspect.is_none());
        assert!(keeper.read(at(DAY + 10), s(2)).suspect.is_some());
        assert!(keeper.read(at(10), s(3)).suspect.is_some(), "a day behind what was seen");
        keeper.accept(at(10), s(4));
        let reading = keeper.read(at(11), s(5));
        assert!(reading.suspect.is_none());
        assert!(reading.surely < at(11), "and what cannot be undone waits for a day");
    }

    #[test]
    fn a_pause_may_have_been_a_jump_and_a_restart_may_not() {
        let mark = |high, doubt, until| Some(Mark { high: at(high), doubt: s(doubt), doubt_until: at(until) });
        let surely = |mark, now| Timekeeper::start(at(now), s(0), mark).read(at(now), s(0)).surely;
        assert_eq!(surely(mark(1000, 0, 0), 1300), at(1300));
        assert_eq!(surely(mark(1000, 0, 0), 1000 + 3600), at(1000));
        assert_eq!(surely(mark(1000, 0, 0), 1000 + 7 * DAY), at(1000 + 6 * DAY), "a day at the most");
        // Doubt survives a restart, and ends when it would have.
        assert_eq!(surely(mark(1000, 500, 5000), 1010), at(510));
        assert_eq!(surely(mark(1000, 500, 1005), 1010), at(1010));
        // A clock that was set back.
        let mut back = Timekeeper::start(at(1000), s(0), mark(4000, 0, 0));
        assert!(back.read(at(1001), s(1)).suspect.is_none());
        let mut far = Timekeeper::start(at(1000), s(0), mark(2000 + DAY, 0, 0));
        assert!(far.read(at(1001), s(1)).suspect.is_some());
    }

    #[test]
    fn what_is_remembered_is_what_was_known() {
        let mut keeper = keeper();
        keeper.read(at(3601), s(1));
        let again = Timekeeper::start(at(3611), s(0), Some(keeper.mark()));
        assert_eq!((again.doubt, again.high), (s(3600), at(3611)));
    }
}
