//! A data key that is good for a moment.

use std::time::{Duration, Instant};

use super::SecretBuf;

/// A data encryption key in guarded memory with a deadline. A key that waits longer than its
/// lifetime, for whatever reason, is wiped instead of used.
///
/// Time is noticed, not watched: a key past its deadline is wiped at its next use or when it is
/// dropped, whichever comes first.
pub struct Dek {
    key: Option<SecretBuf>,
    deadline: Instant,
}

/// The key was not used in time and is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the data key passed its deadline and was wiped")]
pub struct Expired;

impl Dek {
    /// Takes the key in `buf`; it can be used for `lifetime` from now.
    pub fn new(buf: SecretBuf, lifetime: Duration) -> Self {
        let now = Instant::now();
        // A lifetime beyond what the clock can express is a mistake: such a key has expired.
        Self { key: Some(buf), deadline: now.checked_add(lifetime).unwrap_or(now) }
    }

    /// Lets `read` see the key.
    ///
    /// # Errors
    /// [`Expired`] after the deadline; the key is wiped then.
    pub fn with<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T, Expired> {
        if Instant::now() >= self.deadline {
            self.key = None;
        }
        self.key.as_ref().map(|key| key.with(read)).ok_or(Expired)
    }
}
