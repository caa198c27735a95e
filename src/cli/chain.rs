//! The check of the audit chain, as the command line uses it.
//!
//! Each record is one line of JSON with `seq` (1, 2, ... without gaps) and `prev`, the hex SHA-256
//! of the exact bytes of the line before; the first `prev` is 64 zeros. This file is the only one
//! that knows, and the place where the service's own check is called.

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::error::CliError;

/// How far the log has been checked: the last good record and the hash of its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// Its number; 0 before the first record.
    pub(crate) seq: u64,
    /// SHA-256 of its line; zeros before the first record.
    pub(crate) hash: [u8; 32],
}

impl Checkpoint {
    /// Before the first record.
    pub(crate) const GENESIS: Self = Self { seq: 0, hash: [0; 32] };
}

#[derive(Deserialize)]
struct Links {
    seq: u64,
    prev: String,
}

/// The number of a record, if the line is one.
pub(crate) fn seq_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Links>(line).ok().map(|links| links.seq)
}

/// The hash of a line.
pub(crate) fn hash_of(line: &[u8]) -> [u8; 32] {
    Sha256::digest(line).into()
}

/// Checks that `lines` continue the log from `start`, and returns how far it goes.
pub(crate) fn verify<'a>(
    lines: impl IntoIterator<Item = &'a [u8]>,
    start: Checkpoint,
) -> Result<Checkpoint, CliError> {
    lines.into_iter().try_fold(start, |before, line| {
        let seq = before.seq + 1;
        let bad = |reason: &str| CliError::BadRecord { seq, reason: reason.to_owned() };
        let links: Links = serde_json::from_slice(line).map_err(|_| bad("not a record with seq and prev"))?;
        if links.seq != seq {
            return Err(bad(&format!("its place is taken by record {}", links.seq)));
        }
        if links.prev != hex::encode(before.hash) {
            return Err(bad("it does not name the hash of the record before it"));
        }
        Ok(Checkpoint { seq, hash: hash_of(line) })
    })
}
