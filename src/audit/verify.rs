//! Checks a log offline: every line against the line before it.
//!
//! A chain proves that nothing inside it was edited, deleted, inserted, repeated or moved. It cannot
//! prove that its end was not cut off, nor that its last line is as it was written: for that, compare
//! the result with a [`Checkpoint`] that was noted elsewhere ([`verify_against`] does).

use crate::audit::record::{GENESIS, hash_of, links_of};

/// A place in the log: the last record's number and the SHA-256 of its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its number; 0 before the first record.
    pub seq: u64,
    /// Its hash.
    pub hash: [u8; 32],
}

impl Checkpoint {
    /// Before the first record.
    pub const START: Self = Self { seq: 0, hash: GENESIS };
}

/// What is wrong with the first bad record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadReason {
    /// The line is not a record of this format.
    Malformed,
    /// The record is not there; a later one stands in its place.
    Missing,
    /// The number occurs twice.
    Duplicate,
    /// An earlier record stands in its place.
    OutOfPlace,
    /// The record is not what its neighbours say it was.
    Altered,
    /// The log ends before the checkpoint.
    CutOff,
}

/// The first record that cannot be what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("record {seq}: {}", .reason.text())]
pub struct BadRecord {
    /// Its number, by its place in the log.
    pub seq: u64,
    /// What is wrong.
    pub reason: BadReason,
}

impl BadReason {
    const fn text(self) -> &'static str {
        match self {
            Self::Malformed => "not a record",
            Self::Missing => "missing",
            Self::Duplicate => "the number occurs twice",
            Self::OutOfPlace => "an earlier record stands in its place",
            Self::Altered => "altered after it was written",
            Self::CutOff => "the log ends before the checkpoint",
        }
    }
}

/// Checks `lines`, which continue the log after `start`, and says where they end.
///
/// # Errors
/// [`BadRecord`] names the first bad record.
pub fn verify<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    start: Checkpoint,
) -> Result<Checkpoint, BadRecord> {
    check(lines, start, None)
}

/// Like [`verify`], and the log must pass through `end`: what was cut off or rewritten up to there shows.
///
/// # Errors
/// [`BadRecord`] names the first bad record.
pub fn verify_against<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    start: Checkpoint,
    end: Checkpoint,
) -> Result<(), BadRecord> {
    check(lines, start, Some(end)).map(|_| ())
}

fn check<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    start: Checkpoint,
    end: Option<Checkpoint>,
) -> Result<Checkpoint, BadRecord> {
    let mut lines = lines.into_iter().peekable();
    let mut last = start;
    while let Some(line) = lines.next() {
        let here = last.seq + 1;
        let (seq, prev) = links_of(line).ok_or(BadRecord { seq: here, reason: BadReason::Malformed })?;
        // The same number twice accuses that number; the place of the second one is innocent.
        let bad = match seq {
            _ if seq == here => None,
            _ if seq == last.seq => Some(BadRecord { seq, reason: BadReason::Duplicate }),
            _ if seq > here => Some(BadRecord { seq: here, reason: BadReason::Missing }),
            _ => Some(BadRecord { seq: here, reason: BadReason::OutOfPlace }),
        };
        if let Some(bad) = bad {
            return Err(bad);
        }
        let hash = hash_of(line);
        if prev != last.hash {
            // Either the line before was edited, or this one: the next line (or the checkpoint) knows this one.
            let witness = match (lines.peek().copied().and_then(links_of), end) {
                (Some((next, prev)), _) if next == here + 1 => Some(prev),
                (_, Some(end)) if end.seq == here => Some(end.hash),
                _ => None,
            };
            let before = witness.is_none_or(|witness| witness == hash) && last.seq > start.seq;
            let seq = if before { last.seq } else { here };
            return Err(BadRecord { seq, reason: BadReason::Altered });
        }
        if end.is_some_and(|end| end.seq == seq && end.hash != hash) {
            return Err(BadRecord { seq, reason: BadReason::Altered });
        }
        last = Checkpoint { seq, hash };
    }
    match end {
        Some(end) if last.seq < end.seq => Err(BadRecord { seq: last.seq + 1, reason: BadReason::CutOff }),
        _ => Ok(last),
    }
}

#[cfg(test)]
mod tests {
    use super::{BadReason, BadRecord, Checkpoint, verify, verify_against};
    use crate::audit::record::{Subject, seal};
    use crate::audit::{Action, Event};
    use crate::clock::Timestamp;
    use crate::identity::Caller;
    use crate::ids::TenantId;

    const LEN: usize = 1000;

    /// The lines, and the checkpoint before each of them and after the last.
    fn log() -> (Vec<String>, Vec<Checkpoint>) {
        let caller = Caller::system("test", TenantId::parse("default").unwrap());
        let mut head = Checkpoint::START;
        let (mut lines, mut heads) = (Vec::new(), vec![head]);
        for _ in 0..LEN {
            let subject = Subject::new(&caller, &Event::new(Action::SecretList, "secret", "x"));
            let draft = subject.intent(Timestamp::from_micros(1), &[]);
            let (line, hash) = seal(&draft, head.seq + 1, &head.hash);
            head = Checkpoint { seq: head.seq + 1, hash };
            lines.push(line);
            heads.push(head);
        }
        (lines, heads)
    }

    /// The first bad record of the log after `tamper`. Starts a little before `at`, to save time.
    fn first_bad(
        (lines, heads): &(Vec<String>, Vec<Checkpoint>),
        at: usize,
        tamper: impl FnOnce(&mut Vec<String>),
    ) -> u64 {
        let from = at.saturating_sub(3);
        let mut lines = lines.clone();
        tamper(&mut lines);
        let lines = lines[from..].iter().map(String::as_str);
        verify_against(lines, heads[from], heads[LEN]).unwrap_err().seq
    }

    #[test]
    fn an_untouched_log_verifies_whole_and_in_parts() {
        let (lines, heads) = log();
        let head = heads[LEN];
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();

        assert_eq!(verify(lines.iter().copied(), Checkpoint::START), Ok(head));
        let middle = verify(lines[..400].iter().copied(), Checkpoint::START).unwrap();
        assert_eq!(verify(lines[400..].iter().copied(), middle), Ok(head));
    }

    #[test]
    fn every_edit_deletion_insertion_repetition_and_swap_is_named() {
        let log = log();
        for at in 0..LEN {
            let seq = at as u64 + 1;
            let edited = first_bad(&log, at, |l| l[at] = l[at].replace("secret.list", "secret.show"));
            assert_eq!(edited, seq, "edited");
            let relinked = first_bad(&log, at, |l| {
                let end = l[at].len() - 3;
                let other = if l[at].as_bytes()[end] == b'0' { "1" } else { "0" };
                l[at].replace_range(end..=end, other);
            });
            assert_eq!(relinked, seq, "relinked");
            let deleted = first_bad(&log, at, |l| drop(l.remove(at)));
            assert_eq!(deleted, seq, "deleted");
            let repeated = first_bad(&log, at, |l| l.insert(at, l[at].clone()));
            assert_eq!(repeated, seq, "repeated");
            let forged = first_bad(&log, at, |l| l.insert(at, l[at].replace("secret.list", "secret.show")));
            assert_eq!(forged, seq, "inserted");
            if at + 1 < LEN {
                assert_eq!(first_bad(&log, at, |l| l.swap(at, at + 1)), seq, "swapped");
            }
        }
    }

    #[test]
    fn a_cut_tail_is_seen_with_a_checkpoint_and_not_without() {
        let (lines, heads) = log();
        for cut in 1..=100 {
            let kept = lines[..LEN - cut].iter().map(String::as_str);
            assert!(verify(kept.clone(), Checkpoint::START).is_ok());
            let bad = verify_against(kept, Checkpoint::START, heads[LEN]).unwrap_err();
            assert_eq!(bad, BadRecord { seq: (LEN - cut) as u64 + 1, reason: BadReason::CutOff });
        }
    }
}
