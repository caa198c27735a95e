//! Whether the wall clock can be believed. Pure: two clocks in, a verdict out.
//!
//! Keys leave the JWKS by wall time, and a clock that is set forward would take them out while what they
//! signed is alive. So every step that the wall clock makes against the steady one is kept as doubt, and
//! what cannot be undone waits for as long (reliability.md, T13 and RO-6). A daemon that was down for a while
//! cannot tell a pause from a jump: its doubt is the pause, a day at the most. Doubt ends after a day. Likewise
//! a clock that was set back may be late, and when a key stopped is written down as late as it may have been.
//! Further jumps than a day are not dealt with: nothing is signed, and the reason is told.

use std::time::Duration;

use crate::clock::Timestamp;

/// Jumps up to this are dealt with: a day, and what a day's jump may be off.
const BOUND: Duration = Duration::from_secs(25 * 3600);
/// Steps that add up to less (microseconds) are the noise of reading two clocks one after the other.
const NOTABLE: u64 = 1_000_000;

/// What daemons remember of the wall clock when they are not running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The latest wall time seen.
    pub(super) high: Timestamp,
    /// By how much the wall clock may be ahead.
    pub(super) doubt: Duration,
    /// By how much it may be behind.
    pub(super) lag: Duration,
    /// When (by the wall clock) both end.
    pub(super) doubt_until: Timestamp,
}

impl Mark {
    /// What two daemons have seen.
    pub(super) fn with(self, other: Self) -> Self {
        let others =
            if other.doubt_until > self.high { (other.doubt, other.lag) } else { Default::default() };
        Self {
            high: self.high.max(other.high),
            doubt: self.doubt.max(others.0),
            lag: self.lag.max(others.1),
            doubt_until: self.doubt_until.max(other.doubt_until),
        }
    }

    /// Whether it says much else than another one.
    pub(super) fn differs(&self, other: &Self) -> bool {
        self.doubt.abs_diff(other.doubt).max(self.lag.abs_diff(other.lag)) > Duration::from_secs(1)
    }
}

/// What can be said of the time now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    /// Wall time.
    pub(super) now: Timestamp,
    /// A time that has surely come.
    pub(super) surely: Timestamp,
    /// A time that has surely not passed yet: later than `now` if the clock was set back.
    pub(super) latest: Timestamp,
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
    /// By how much it may be behind.
    lag: Duration,
    /// When doubt and lag end, on the steady clock; `None`: there has been no step worth the name.
    ends: Option<Duration>,
    /// `ahead` when the last such step was noted: many small ones are one.
    noted: i64,
    /// How far the wall clock has gone ahead of the steady one since the start, or behind it if negative; at the
    /// start, how far it was behind a time that was seen before.
    ahead: i64,
}

impl Timekeeper {
    /// Begins with what is remembered.
    pub(super) fn start(wall: Timestamp, steady: Duration, mark: Option<Mark>) -> Self {
        let gap = mark.map_or(Duration::ZERO, |mark| wall.since(mark.high));
        let kept = mark.filter(|mark| mark.doubt_until > wall);
        let left = kept.map_or(Duration::ZERO, |mark| mark.doubt_until.since(wall).min(BOUND));
        let late = kept.map_or(Duration::ZERO, |mark| mark.lag);
        let kept = kept.map_or(Duration::ZERO, |mark| mark.doubt);
        let doubt = (kept + gap).min(BOUND);
        let until = if gap.is_zero() { left } else { BOUND };
        let high = mark.map_or(wall, |mark| mark.high.max(wall));
        let until = if high > wall { BOUND } else { until };
        let lag = late.max(high.since(wall)).min(BOUND);
        let ahead = micros(high.since(wall)).saturating_neg();
        let ends = (!doubt.is_zero() || !lag.is_zero()).then_some(steady + until);
        Self { wall, steady, high, doubt, lag, ends, noted: ahead, ahead }
    }

    /// Looks at both clocks.
    pub(super) fn read(&mut self, wall: Timestamp, steady: Duration) -> Reading {
        let (passed, walked) = (
            micros(steady.saturating_sub(self.steady)),
            wall.as_micros().saturating_sub(self.wall.as_micros()),
        );
        let step = walked.saturating_sub(passed);
        (self.wall, self.steady) = (wall, steady);
        self.ahead = self.ahead.saturating_add(step);
        let moved = |span: Duration, by: i64| {
            Duration::from_micros(u64::try_from(micros(span).saturating_add(by)).unwrap_or(0)).min(BOUND)
        };
        (self.doubt, self.lag) = (moved(self.doubt, step), moved(self.lag, step.saturating_neg()));
        if (self.ahead - self.noted).unsigned_abs() > NOTABLE {
            (self.noted, self.ends) = (self.ahead, Some(steady + BOUND));
        }
        if self.ends.is_some_and(|ends| ends <= steady) {
            (self.doubt, self.lag, self.ahead, self.noted) = (Duration::ZERO, Duration::ZERO, 0, 0);
            self.ends = None;
        }
        let surely = Timestamp::from_micros(wall.as_micros().saturating_sub(micros(self.doubt)));
        let suspect = self.suspect();
        if suspect.is_none() {
            self.high = self.high.max(wall);
        }
        Reading { now: wall, surely, latest: wall.plus(self.lag), suspect }
    }

    fn suspect(&self) -> Option<String> {
        let far = Duration::from_micros(self.ahead.unsigned_abs());
        let seconds = far.as_secs();
        match far > BOUND {
            false => None,
            true if self.ahead > 0 => {
                Some(format!("the wall clock went {seconds} s ahead of the steady clock"))
            }
            true => Some(format!("the wall clock is {seconds} s behind what it has to be")),
        }
    }

    /// A person says that the wall clock is right.
    pub(super) fn accept(&mut self, wall: Timestamp, steady: Duration) {
        *self = Self { doubt: BOUND, ends: Some(steady + BOUND), ..Self::start(wall, steady, None) };
    }

    /// What to remember.
    pub(super) fn mark(&self) -> Mark {
        let left = self.ends.map_or(Duration::ZERO, |ends| ends.saturating_sub(self.steady));
        Mark { high: self.high, doubt: self.doubt, lag: self.lag, doubt_until: self.wall.plus(left) }
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
        let corrected = keeper.read(at(102), s(102));
        assert_eq!((corrected.surely, corrected.latest), (at(102), at(102 + DAY / 2)));

        let reading = keeper.read(at(103 + 3600), s(103));
        assert_eq!((reading.surely, reading.suspect), (at(103), None));
        let later = BOUND.as_secs() + 200;
        assert_eq!(keeper.read(at(later + 3600), s(later)).surely, at(later + 3600), "a day later");
    }

    #[test]
    fn a_jump_back_may_be_a_mistake_too() {
        let mut keeper = keeper();
        keeper.read(at(1000), s(1000));
        assert_eq!(keeper.read(at(501), s(1001)).latest, at(1001));
        assert_eq!(keeper.read(at(1101), s(1101)).latest, at(1101), "and was put right");
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
    fn a_clock_that_is_a_little_too_fast_adds_up_however_often_it_is_read() {
        let mut keeper = keeper();
        // Half as fast again, read each 10 ms, for an hour.
        for read in 1..360_000_u64 {
            let steady = Duration::from_millis(read * 10);
            let reading = keeper.read(at(0).plus(steady * 3 / 2), steady);
            assert!(reading.surely <= at(1).plus(steady), "after {steady:?}");
        }
    }

    #[test]
    fn beyond_a_day_nothing_is_signed_until_it_is_put_right_or_accepted() {
        let mut keeper = keeper();
        assert!(keeper.read(at(1 + DAY), s(1)).suspect.is_none());
        assert!(keeper.read(at(2 + 2 * DAY), s(2)).suspect.is_some());
        assert!(keeper.read(at(3), s(3)).suspect.is_none(), "put right");
        assert_eq!(keeper.mark().high, at(1 + DAY), "what was not believed is not remembered");
        assert!(keeper.read(at(4 + 2 * DAY), s(4)).suspect.is_some());
        keeper.accept(at(5 + 2 * DAY), s(5));
        let reading = keeper.read(at(6 + 2 * DAY), s(6));
        assert!(reading.suspect.is_none());
        assert!(reading.surely < at(6 + 2 * DAY), "and what cannot be undone waits for a day");
    }

    #[test]
    fn a_pause_may_have_been_a_jump() {
        let mark = |high, doubt, until| {
            Some(Mark { high: at(high), doubt: s(doubt), lag: s(0), doubt_until: at(until) })
        };
        let surely = |mark, now| Timekeeper::start(at(now), s(0), mark).read(at(now), s(0)).surely;
        assert_eq!(surely(mark(1000, 0, 0), 1010), at(1000));
        assert_eq!(surely(mark(1000, 0, 0), 1000 + 3600), at(1000));
        let week = at(1000 + 7 * DAY);
        assert_eq!(week.since(surely(mark(1000, 0, 0), 1000 + 7 * DAY)), BOUND, "a day at the most");
        // Doubt survives a restart, and ends when it would have.
        assert_eq!(surely(mark(1000, 500, 5000), 1010), at(500));
        assert_eq!(surely(mark(1000, 500, 1005), 1010), at(1000));
        // A clock that was set back.
        let mut back = Timekeeper::start(at(1000), s(0), mark(4000, 0, 0));
        assert!(back.read(at(1001), s(1)).suspect.is_none());
        let mut far = Timekeeper::start(at(1000), s(0), mark(2000 + 2 * DAY, 0, 0));
        assert!(far.read(at(1001), s(1)).suspect.is_some());
    }

    #[test]
    fn what_is_remembered_is_what_was_known() {
        let mut keeper = keeper();
        keeper.read(at(3601), s(1));
        let again = Timekeeper::start(at(3611), s(0), Some(keeper.mark()));
        assert_eq!((again.doubt, again.high), (s(3610), at(3611)));
    }
}
