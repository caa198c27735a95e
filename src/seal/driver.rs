//! A device, loaded once for the life of the daemon: what the lanes and recovery ask of it.
//!
//! A driver brings the device up and down and opens sessions, each of which is a [`Backend`]. It keeps
//! an epoch: a number that grows whenever sessions and handles became void, so that nobody goes on with
//! one from before. When to do what is decided in `worker.rs` and `recovery.rs`, for every device alike.

use crate::seal::backend::{Backend, BackendError};
use crate::seal::key::KeyRef;

/// Why the device cannot be used now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// It may come back by itself.
    Away(String),
    /// A person is needed; no login is tried.
    Stopped(String),
}

impl From<Problem> for BackendError {
    fn from(problem: Problem) -> Self {
        match problem {
            Problem::Away(_) => Self::Away { function: "open device", code: 0 },
            Problem::Stopped(reason) => Self::Stopped(reason),
        }
    }
}

/// What is known of the device and stays known while it is away.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// The library's or the chip's own description.
    pub(crate) library: String,
    /// The token's label, or what stands for it.
    pub(crate) label: String,
    /// The token's serial number, or what tells this device from another.
    pub(crate) serial: String,
    /// What somebody should know although the device works.
    pub(crate) notice: Option<String>,
}

/// What is asked of a device's counter. It only grows, whatever is done to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Its value.
    Read,
    /// Makes it where there is none.
    Make,
    /// Adds one, if the value is still this one: so that a call whose answer was lost can be repeated.
    Advance {
        /// The value that the caller knows.
        from: u64,
    },
}

/// One device. Shared by all threads that have sessions with it.
pub(crate) trait Driver: Send + Sync {
    /// Opens a session that is logged in. Blocks; called by the thread that owns the session.
    fn open(&self, read_write: bool) -> Result<Box<dyn Backend>, BackendError>;

    /// Initialises what needs it, checks that it is the device that was known, and logs in.
    fn bring_up(&self) -> Result<(), Problem>;

    /// The last step of recovery: takes everything down where that is possible, and brings it up anew.
    fn reinitialise(&self) -> Result<(), Problem>;

    /// Logs out and lets the device go.
    fn take_down(&self) -> Result<(), Problem>;

    /// Grows whenever sessions and handles became void.
    fn epoch(&self) -> u64;

    /// Voids every session and handle that was opened so far.
    fn bump_epoch(&self);

    /// What is known of the device. Never waits for it.
    fn known(&self) -> Known;

    /// What the configuration calls it: the module's path, the TPM's address.
    fn address(&self) -> String;

    /// Clears the latch that a wrong PIN has set; sends none. Whether the PIN that its source gives now
    /// may be sent.
    fn unlatch(&self, force: bool) -> Result<bool, String>;

    /// What the device can do, measured.
    fn capabilities(&self) -> Result<serde_json::Value, BackendError>;

    /// Every key on the device that this program has made, as it was planned: nothing is proven of it. Empty where
    /// the device keeps no keys that it could list.
    fn list(&self) -> Result<Vec<KeyRef>, BackendError> {
        Ok(Vec::new())
    }

    /// The value of the device's counter after `count`; `None` if it was never made. Refused by devices
    /// without one.
    fn count(&self, count: Count) -> Result<Option<u64>, BackendError> {
        let _ = count;
        Err(BackendError::Refused { function: "counter", code: 0 })
    }
}
