//! A data key that is good for a moment.

use std::sync::{Arc, Mutex, TryLockError};
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
        self.buffer().map(|key| key.with(read))
    }

    fn buffer(&mut self) -> Result<&SecretBuf, Expired> {
        if Instant::now() >= self.deadline {
            self.key = None;
        }
        self.key.as_ref().ok_or(Expired)
    }
}

/// A [`Dek`] that waits in a queue: its owner keeps one handle and the job in the queue has the other.
///
/// The thread that the job comes to may be late or never come, so the owner can take the key away. Whichever
/// handle is dropped first wipes it.
pub(crate) struct Lent(Arc<Mutex<Dek>>);

impl Lent {
    pub(crate) fn new(dek: Dek) -> Self {
        Self(Arc::new(Mutex::new(dek)))
    }

    /// The other handle.
    pub(crate) fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Lets `work` have the key, for as long as it takes, and wipes it if that succeeds.
    ///
    /// # Errors
    /// [`Expired`] if the deadline has passed or the key was used or taken away.
    pub(crate) fn spend<T, E>(
        &self,
        work: impl FnOnce(&SecretBuf) -> Result<T, E>,
    ) -> Result<Result<T, E>, Expired> {
        let mut dek = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let done = work(dek.buffer()?);
        if done.is_ok() {
            dek.key = None;
        }
        Ok(done)
    }

    /// Wipes the key, unless it is in use at this moment or was used; whether it was there to be wiped.
    pub(crate) fn take_away(&self) -> bool {
        // Never waits: the lock is held for as long as a call to a device.
        let mut dek = match self.0.try_lock() {
            Ok(dek) => dek,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        dek.key.take().is_some()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.take_away();
    }
}
