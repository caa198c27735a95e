//! Errors as they cross from the sealer process to the daemon.
//!
//! The daemon bounds what it takes from there: waiting times, and the texts that its errors keep for the
//! life of the program.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::seal::SealError;
use crate::seal::backend::BackendError;
use crate::seal::child::wire::Garbled;
use crate::seal::key::KeyId;

/// Gives texts from the other process the lifetime that errors want. Bounded: a process that makes
/// names up gets no more memory than this.
#[derive(Default)]
pub(super) struct Names(Mutex<HashSet<&'static str>>);

impl Names {
    const MOST: usize = 512;
    const LONGEST: usize = 256;

    pub(super) fn get(&self, text: &str) -> &'static str {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = known.get(text) {
            return name;
        }
        if known.len() >= Self::MOST || text.len() > Self::LONGEST {
            return "unnamed";
        }
        let name: &'static str = Box::leak(text.to_owned().into_boxed_str());
        known.insert(name);
        name
    }
}

/// A [`SealError`] that crosses.
#[derive(Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub(super) enum WireError {
    Rejected,
    KeyMissing { key: String },
    KeyUnfit { key: String, reason: String },
    Unavailable { millis: u64, reason: String },
    Busy { what: String, millis: u64 },
    Unknown { operation: String, source: WireCause },
    TooLarge { len: usize },
    Refused { operation: String, source: WireCause },
}

/// A [`BackendError`] that crosses.
#[derive(Serialize, Deserialize)]
pub(super) struct WireCause {
    is: u8,
    #[serde(default)]
    text: String,
    #[serde(default)]
    code: u64,
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl From<SealError> for WireError {
    fn from(error: SealError) -> Self {
        match error {
            SealError::Rejected => Self::Rejected,
            // The process drives one device and is asked for keys of that one only.
            SealError::KeyMissing { key } | SealError::NoDevice { key, .. } => {
                Self::KeyMissing { key: key.to_string() }
            }
            SealError::KeyUnfit { key, reason } => Self::KeyUnfit { key: key.to_string(), reason },
            SealError::Unavailable { retry_after, reason } => {
                Self::Unavailable { millis: millis(retry_after), reason }
            }
            SealError::Busy { what, retry_after } => {
                Self::Busy { what: what.to_owned(), millis: millis(retry_after) }
            }
            SealError::Unknown { operation, source } => {
                Self::Unknown { operation: operation.to_owned(), source: source.into() }
            }
            SealError::TooLarge { len } => Self::TooLarge { len },
            SealError::Refused { operation, source } => {
                Self::Refused { operation: operation.to_owned(), source: source.into() }
            }
        }
    }
}

impl WireError {
    /// Nothing that is not understood is believed: it becomes an error of its own.
    pub(super) fn into_error(self, names: &Names) -> Result<SealError, Garbled> {
        let key = |text: &str| KeyId::parse(text).ok_or(Garbled("not a key's id"));
        // An hour at the most: nobody is sent away for longer by a number from over there.
        let after = |millis: u64| Duration::from_millis(millis.min(3_600_000));
        Ok(match self {
            Self::Rejected => SealError::Rejected,
            Self::KeyMissing { key: id } => SealError::KeyMissing { key: key(&id)? },
            Self::KeyUnfit { key: id, reason } => SealError::KeyUnfit { key: key(&id)?, reason },
            Self::Unavailable { millis, reason } => {
                SealError::Unavailable { retry_after: after(millis), reason }
            }
            Self::Busy { what, millis } => {
                SealError::Busy { what: names.get(&what), retry_after: after(millis) }
            }
            Self::Unknown { operation, source } => {
                SealError::Unknown { operation: names.get(&operation), source: source.into_error(names)? }
            }
            Self::TooLarge { len } => SealError::TooLarge { len },
            Self::Refused { operation, source } => {
                SealError::Refused { operation: names.get(&operation), source: source.into_error(names)? }
            }
        })
    }
}

impl From<BackendError> for WireCause {
    fn from(error: BackendError) -> Self {
        let call = |is, function: &str, code| Self { is, text: function.to_owned(), code };
        match error {
            BackendError::Rejected { function, code } => call(1, function, code),
            BackendError::SessionLost { function, code } => call(2, function, code),
            BackendError::Away { function, code } => call(3, function, code),
            BackendError::Stopped(text) => Self { is: 4, text, code: 0 },
            BackendError::Missing => call(5, "", 0),
            BackendError::Unfit(text) => Self { is: 6, text, code: 0 },
            BackendError::Refused { function, code } => call(7, function, code),
            BackendError::Unknown { function, code } => call(8, function, code),
            BackendError::SelfTest(what) => call(9, what, 0),
        }
    }
}

impl WireCause {
    fn into_error(self, names: &Names) -> Result<BackendError, Garbled> {
        let Self { is, text, code } = self;
        let function = if matches!(is, 4 | 6) { "" } else { names.get(&text) };
        Ok(match is {
            1 => BackendError::Rejected { function, code },
            2 => BackendError::SessionLost { function, code },
            3 => BackendError::Away { function, code },
            4 => BackendError::Stopped(text),
            5 => BackendError::Missing,
            6 => BackendError::Unfit(text),
            7 => BackendError::Refused { function, code },
            8 => BackendError::Unknown { function, code },
            9 => BackendError::SelfTest(function),
            _ => return Err(Garbled("unknown error")),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Names, WireCause, WireError};
    use crate::seal::SealError;
    use crate::seal::backend::BackendError;
    use crate::seal::key::{KeyRef, KeySpec};

    #[test]
    fn an_error_says_the_same_on_both_sides() {
        let key = KeyRef::plan(KeySpec::Kek).unwrap().id();
        let second = Duration::from_secs(1);
        let source = BackendError::Away { function: "C_Sign", code: 0x30 };
        let all = [
            SealError::Rejected,
            SealError::KeyMissing { key },
            SealError::KeyUnfit { key, reason: "weak".to_owned() },
            SealError::Unavailable { retry_after: second, reason: "away".to_owned() },
            SealError::Busy { what: "the queue", retry_after: second },
            SealError::Unknown { operation: "generate", source: source.clone() },
            SealError::TooLarge { len: 7 },
            SealError::Refused { operation: "sign", source },
        ];
        let names = Names::default();
        for error in all {
            let said = format!("{error:?}");
            let text = serde_json::to_vec(&WireError::from(error)).unwrap();
            let read: WireError = serde_json::from_slice(&text).unwrap();
            assert_eq!(format!("{:?}", read.into_error(&names).unwrap()), said);
        }
    }

    #[test]
    fn every_cause_crosses() {
        let (function, code) = ("C_Sign", 5);
        let all = [
            BackendError::Rejected { function, code },
            BackendError::SessionLost { function, code },
            BackendError::Away { function, code },
            BackendError::Stopped("PIN".to_owned()),
            BackendError::Missing,
            BackendError::Unfit("weak".to_owned()),
            BackendError::Refused { function, code },
            BackendError::Unknown { function, code },
            BackendError::SelfTest("a signature that does not verify"),
        ];
        for error in all {
            assert_eq!(WireCause::from(error.clone()).into_error(&Names::default()).unwrap(), error);
        }
    }

    #[test]
    fn names_and_waiting_times_from_there_are_bounded() {
        let names = Names::default();
        assert_eq!(names.get("C_Sign"), "C_Sign");
        assert_eq!(names.get(&"x".repeat(257)), "unnamed");
        for number in 0..2000 {
            names.get(&number.to_string());
        }
        assert_eq!(names.get("one more"), "unnamed");
        assert_eq!(names.get("C_Sign"), "C_Sign");
        let long = WireError::Unavailable { millis: u64::MAX, reason: String::new() };
        let after = long.into_error(&names).unwrap().retry_after();
        assert_eq!(after, Some(Duration::from_secs(3600)));
        assert!(WireError::KeyMissing { key: "no id".to_owned() }.into_error(&names).is_err());
    }
}
