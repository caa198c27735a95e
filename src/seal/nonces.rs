//! A watch over the nonces of ECDSA (RO-9): two signatures of one key over two hashes with the same `r` tell the private
//! key to whoever sees both.
//!
//! Eight octets of each `r` are kept, which are as good as random, beside eight of the hash: a signature that is made again, or
//! by RFC 6979 for the same hash, is no repetition. Bounded: of each key the last 114 688 at least, twice as many at most. Among
//! so many random values two are the same once in 2^47 signatures.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a table of 2^17 places holds.
const GENERATION: usize = (1 << 17) / 8 * 7;

/// The nonces of one key.
#[derive(Default)]
pub(super) struct Nonces(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    present: HashMap<u64, u64>,
    /// The generation before: forgotten as a whole.
    before: HashMap<u64, u64>,
}

/// What became of a note.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// It was new, or the same signature as before.
    Fresh,
    /// Another hash was signed with this `r`.
    Repeated,
}

impl Nonces {
    /// Takes note of a signature that was verified: `r || s`, and the hash.
    pub(super) fn note(&self, signature: &[u8], hash: &[u8]) -> Noted {
        let (r, _) = signature.split_at(signature.len() / 2);
        // The last octets: the first are zero more often where a curve's order is not near a power of two.
        let (r, hash) = (last(r), last(hash));
        let mut seen = self.seen();
        if let Some(other) = seen.present.get(&r).or_else(|| seen.before.get(&r)) {
            return if *other == hash { Noted::Fresh } else { Noted::Repeated };
        }
        if seen.present.len() >= GENERATION {
            seen.before = std::mem::take(&mut seen.present);
        }
        seen.present.insert(r, hash);
        Noted::Fresh
    }

    /// How many are kept.
    pub(super) fn len(&self) -> usize {
        let seen = self.seen();
        seen.present.len() + seen.before.len()
    }

    /// Forgets the older ones, to make room for other keys'.
    pub(super) fn age(&self) {
        let mut seen = self.seen();
        seen.before = std::mem::take(&mut seen.present);
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn last(bytes: &[u8]) -> u64 {
    bytes.last_chunk::<8>().map_or(0, |last| u64::from_be_bytes(*last))
}

#[cfg(test)]
mod tests {
    use super::{GENERATION, Nonces, Noted};

    fn signature(r: u64, s: u8) -> Vec<u8> {
        [&[7; 24][..], &r.to_be_bytes(), &[s; 32]].concat()
    }

    fn hash(of: u64) -> [u8; 32] {
        let mut hash = [1; 32];
        hash[24..].copy_from_slice(&of.to_be_bytes());
        hash
    }

    #[test]
    fn a_nonce_that_signed_two_hashes_is_told_and_the_same_signature_again_is_not() {
        let nonces = Nonces::default();
        assert_eq!(nonces.note(&signature(1, 1), &hash(1)), Noted::Fresh);
        assert_eq!(nonces.note(&signature(2, 1), &hash(1)), Noted::Fresh, "another nonce for the same hash");
        assert_eq!(nonces.note(&signature(1, 1), &hash(1)), Noted::Fresh, "the same signature");
        assert_eq!(nonces.note(&signature(1, 2), &hash(1)), Noted::Fresh, "its twin, n - s");
        assert_eq!(nonces.note(&signature(1, 2), &hash(2)), Noted::Repeated);
        assert_eq!(nonces.note(&signature(1, 2), &hash(2)), Noted::Repeated, "again");
    }

    #[test]
    fn a_hundred_thousand_random_ones_raise_nothing_and_the_first_is_still_known() {
        let nonces = Nonces::default();
        let random = || {
            let mut bytes = [0; 8];
            getrandom::fill(&mut bytes).unwrap();
            u64::from_ne_bytes(bytes)
        };
        let first = random();
        assert_eq!(nonces.note(&signature(first, 1), &hash(0)), Noted::Fresh);
        for at in 1..=100_000 {
            assert_eq!(nonces.note(&signature(random(), 1), &hash(at)), Noted::Fresh, "{at}");
        }
        assert_eq!(nonces.len(), 100_001);
        assert_eq!(nonces.note(&signature(first, 1), &hash(1)), Noted::Repeated);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let nonces = Nonces::default();
        let (many, mut most) = (3 * GENERATION as u64, 0);
        for at in 0..many {
            nonces.note(&signature(at, 1), &hash(at));
            if at % 1000 == 0 {
                most = most.max(nonces.len());
            }
        }
        assert!((GENERATION..=2 * GENERATION).contains(&most), "{most}");
        let oldest = many - GENERATION as u64;
        assert_eq!(nonces.note(&signature(oldest, 1), &hash(0)), Noted::Repeated, "of those that are kept");
        nonces.age();
        assert_eq!(
            nonces.note(&signature(many - 1, 1), &hash(0)),
            Noted::Repeated,
            "the present ones stay once"
        );
        nonces.age();
        nonces.age();
        assert_eq!(nonces.len(), 0);
    }
}
