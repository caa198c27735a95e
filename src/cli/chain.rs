//! The check of the audit chain, fed page by page: what `audit verify` reads from a daemon or a file.
//!
//! The rules themselves are [`crate::audit::verify`]'s. Here is only what pages need: a bad record is
//! named rightly only by the records after it, so the last line of a page waits for the next page,
//! and a page that fails is judged again together with the one behind it.

use serde::Deserialize;

use super::error::CliError;
use crate::audit::{BadRecord, Checkpoint, verify, verify_against};

#[derive(Deserialize)]
struct Links {
    seq: u64,
    prev: String,
}

/// The number of a record, if the line is one.
pub(crate) fn seq_of(line: &str) -> Option<u64> {
    serde_json::from_str::<Links>(line).ok().map(|links| links.seq)
}

/// The way along the log: every record fits the one before, and the trusted one is met unchanged.
pub(crate) struct Walk {
    /// What was verified here before.
    trusted: Option<Checkpoint>,
    /// Whether it was met, or lies before the first line.
    met: bool,
    /// Before the first held line.
    head: Checkpoint,
    /// Read, and not judged finally.
    held: Vec<String>,
    /// The number before the first record that is new to us.
    begin: Option<u64>,
    failed: bool,
}

impl Walk {
    /// Begins a walk.
    pub(crate) fn new(trusted: Option<Checkpoint>) -> Self {
        let met = trusted.is_none_or(|trusted| trusted.seq == 0);
        Self { trusted, met, head: Checkpoint::START, held: Vec::new(), begin: None, failed: false }
    }

    /// Takes the next lines of the log.
    pub(crate) fn feed(&mut self, lines: Vec<String>) -> Result<(), CliError> {
        if let (None, Some(first)) = (self.begin, lines.first()) {
            self.begin = Some(self.find_begin(first)?);
        }
        self.held.extend(lines);
        match self.judge() {
            Ok(()) => {}
            Err(bad) if self.failed => return Err(bad),
            Err(_) => {
                self.failed = true;
                return Ok(());
            }
        }
        if let Some(last) = self.held.pop() {
            self.head = verify(self.held.iter().map(String::as_str), self.head)?;
            self.held = vec![last];
        }
        Ok(())
    }

    /// Ends the walk: how many records were new, and where the log ends.
    pub(crate) fn end(mut self) -> Result<(u64, Checkpoint), CliError> {
        self.judge()?;
        let head = verify(self.held.iter().map(String::as_str), self.head)?;
        match self.trusted {
            Some(trusted) if !self.met => Err(CliError::BadRecord {
                seq: head.seq + 1,
                reason: format!("the log ends before record {}, which was verified here before", trusted.seq),
            }),
            _ => Ok((head.seq - self.begin.unwrap_or(head.seq), head)),
        }
    }

    /// Judges what is held, with the trusted record as witness as soon as it is among it.
    fn judge(&mut self) -> Result<(), CliError> {
        let lines = self.held.iter().map(String::as_str);
        let reach = self.head.seq + u64::try_from(self.held.len()).unwrap_or(u64::MAX);
        match self.trusted {
            Some(trusted) if !self.met && trusted.seq <= reach => {
                verify_against(lines, self.head, trusted)?;
                self.met = true;
            }
            _ => {
                verify(lines, self.head)?;
            }
        }
        Ok(())
    }

    /// Finds out where the lines begin: at the log's beginning, at the trusted record, or right after it.
    fn find_begin(&mut self, first: &str) -> Result<u64, CliError> {
        let links = serde_json::from_str::<Links>(first).ok();
        let begin = links.as_ref().map_or(1, |links| links.seq);
        match (self.trusted, links) {
            (Some(trusted), _) if begin == trusted.seq + 1 => {
                self.head = trusted;
                self.met = true;
                Ok(trusted.seq)
            }
            (Some(trusted), Some(links)) if begin == trusted.seq && begin > 1 => {
                let mut hash = [0; 32];
                // A link that is no hash is found by the check of this very line.
                let _ = hex::decode_to_slice(&links.prev, &mut hash);
                self.head = Checkpoint { seq: begin - 1, hash };
                Ok(trusted.seq)
            }
            (None, _) if begin > 1 => Err(CliError::NoBeginning { seq: begin }),
            (Some(_) | None, _) => Ok(0),
        }
    }
}

impl From<BadRecord> for CliError {
    fn from(bad: BadRecord) -> Self {
        let text = bad.to_string();
        // The check's own words, without the number that stands before them there and here.
        let reason = text.split_once(": ").map_or(text.as_str(), |(_, reason)| reason).to_owned();
        Self::BadRecord { seq: bad.seq, reason }
    }
}
