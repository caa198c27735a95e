//! Guarded memory (stub, being written).

use std::time::Duration;

use crate::seal::SealError;

/// How guarded memory is set up (`[memory]` in the configuration).
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Slots of 4 KiB in the arena; 256 by default.
    pub slots: usize,
    /// Buffers larger than a slot at one time.
    pub large_buffers: usize,
    /// Bytes in such buffers at one time.
    pub large_bytes: usize,
    /// Start although memory cannot be locked (development only).
    pub allow_unlocked: bool,
    /// Refuse anything but memfd_secret.
    pub require_secretmem: bool,
    /// How long a request waits for a free slot before it is refused as busy.
    #[serde(with = "crate::config::seconds")]
    pub wait: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            slots: 256,
            large_buffers: 64,
            large_bytes: 32 << 20,
            allow_unlocked: false,
            require_secretmem: false,
            wait: Duration::from_secs(2),
        }
    }
}

/// What the arena's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// memfd_secret(2): not readable even through /proc/self/mem.
    MemfdSecret,
    /// Anonymous memory with mlock, MADV_DONTDUMP, MADV_WIPEONFORK.
    Mlock,
    /// Not locked: only with `allow_unlocked`.
    Unlocked,
}

/// The arena's state for `lacre status` and metrics.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Status {
    /// What the pages are.
    pub mode: Mode,
    /// Slots in all.
    pub slots: usize,
    /// Slots free now.
    pub free: usize,
    /// Large buffers in use.
    pub large_in_use: usize,
    /// Bytes in large buffers.
    pub large_bytes_in_use: usize,
}

/// Why guarded memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// Memory cannot be locked within the limits of the process.
    #[error(
        "cannot lock {bytes} bytes of memory: {reason}; raise LimitMEMLOCK (ulimit -l) or pass --allow-unlocked-memory"
    )]
    CannotLock {
        /// How much was wanted.
        bytes: usize,
        /// What the kernel said.
        reason: String,
    },
    /// memfd_secret is required and missing.
    #[error("memfd_secret is required and this kernel does not offer it: {reason}")]
    NoSecretmem {
        /// What the kernel said.
        reason: String,
    },
    /// The kernel gave no memory at all.
    #[error("cannot map {bytes} bytes: {reason}")]
    NoMemory {
        /// How much was wanted.
        bytes: usize,
        /// What the kernel said.
        reason: String,
    },
}

/// The pool of guarded memory. Cheap to clone.
#[derive(Clone)]
pub struct Arena {}

/// A buffer in guarded memory. Wiped and given back on drop.
pub struct SecretBuf {}

impl Arena {
    /// Maps and locks everything at once.
    ///
    /// # Errors
    /// [`ArenaError`]; never falls back to weaker memory than `options` allows.
    pub fn new(options: &Options) -> Result<Self, ArenaError> {
        todo!()
    }

    /// A zeroed buffer of `len` bytes; waits for a free one, at most `Options::wait`.
    ///
    /// # Errors
    /// [`SealError::Busy`] if none came free, [`SealError::TooLarge`] if none ever could.
    pub async fn take(&self, len: usize) -> Result<SecretBuf, SealError> {
        todo!()
    }

    /// The same without waiting, for threads that must not.
    ///
    /// # Errors
    /// As [`Arena::take`].
    pub fn try_take(&self, len: usize) -> Result<SecretBuf, SealError> {
        todo!()
    }

    /// A buffer of random bytes from the operating system.
    ///
    /// # Errors
    /// As [`Arena::take`].
    pub async fn random(&self, len: usize) -> Result<SecretBuf, SealError> {
        todo!()
    }

    /// The present state.
    pub fn status(&self) -> Status {
        todo!()
    }
}

impl SecretBuf {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shortens the buffer and wipes what is cut off. Does nothing if it is not longer.
    pub fn truncate(&mut self, len: usize) {
        todo!()
    }

    /// Lets `read` see the bytes.
    pub fn with<T>(&self, read: impl FnOnce(&[u8]) -> T) -> T {
        todo!()
    }

    /// Lets `write` change the bytes.
    pub fn with_mut<T>(&mut self, write: impl FnOnce(&mut [u8]) -> T) -> T {
        todo!()
    }
}
