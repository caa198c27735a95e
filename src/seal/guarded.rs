//! Guarded memory: where keys and plaintext live while they are in use.
//!
//! An [`Arena`] is mapped, locked and touched once at start; a [`SecretBuf`] is one slot of it, lent
//! out, wiped and given back. Promises: the bytes are never on the heap, in swap, in a core dump or
//! in a forked child; with [`Mode::MemfdSecret`] not even `/proc/PID/mem` shows them. A buffer is
//! zeroed when it is taken and wiped when it is dropped, also by a panic. An empty pool makes callers
//! wait and then fails them; it never falls back to other memory, and the arena is never weaker than
//! its [`Options`] allow. Taking and giving back a slot is no system call.
//!
//! Not here: what a caller copies out of `with`, and the registers and stack of the cipher it calls.
//! `std::mem::forget` on a buffer loses its slot until the process ends, but shows it to nobody.
//! Start at [`Arena::new`]; the limits are in `pool.rs`, the system calls in `map.rs`, keys with a deadline in `dek.rs`, and
//! what must not compile in `misuse.rs`.

mod dek;
mod map;
#[cfg(doctest)]
mod misuse;
mod pool;

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Resource;
use tokio::sync::SemaphorePermit;
use zeroize::Zeroize;

use crate::seal::SealError;

pub(crate) use dek::Lent;
pub use dek::{Dek, Expired};

use map::{Cell, MapError};
use pool::{Pool, Share};

/// The largest value, and what its envelope adds to it.
pub(crate) const LARGEST: usize = (1 << 20) + (64 << 10);

/// Buffers live for one call to the device, so a second is long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How guarded memory is set up (`[memory]` in the configuration).
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Slots of one page (4 KiB) in the arena; 256 by default, at least one.
    pub slots: usize,
    /// Buffers larger than a slot at one time.
    pub large_buffers: usize,
    /// Bytes in such buffers at one time. Lowered at start, with a warning, to what can be locked.
    pub large_bytes: usize,
    /// Start although memory cannot be locked (development only).
    pub allow_unlocked: bool,
    /// Refuse anything but `memfd_secret`.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// `memfd_secret(2)`: not readable even through `/proc/self/mem`.
    MemfdSecret,
    /// Anonymous memory with mlock, `MADV_DONTDUMP`, `MADV_WIPEONFORK`.
    Mlock,
    /// Not locked: only with `allow_unlocked`.
    Unlocked,
}

/// The arena's state for `lacre status` and metrics.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// What the pages are.
    pub mode: Mode,
    /// Slots in all.
    pub slots: usize,
    /// Bytes in a slot; longer values take a large buffer.
    pub slot_len: usize,
    /// Slots free now.
    pub free: usize,
    /// Large buffers in use.
    pub large_in_use: usize,
    /// Large buffers there may be at one time.
    pub large_buffers: usize,
    /// Bytes in large buffers.
    pub large_bytes_in_use: usize,
    /// Bytes there may be in large buffers at one time.
    pub large_bytes: usize,
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
    /// `memfd_secret` is required and missing.
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
pub struct Arena {
    pool: Arc<Pool>,
}

/// A buffer in guarded memory. Wiped and given back on drop.
///
/// To receive output of unknown length, take a buffer as long as the output may be, let the device
/// write into it and [`truncate`](Self::truncate) to what was written: `take(96)` has length 96.
pub struct SecretBuf {
    // INVARIANT: `len <= cell.bytes().len()`, and all bytes beyond `len` that were ever written
    // since the buffer was taken are wiped at the latest on drop, which wipes the whole cell.
    cell: Cell,
    len: usize,
    pool: Arc<Pool>,
    share: Share,
}

impl Arena {
    /// Maps and locks everything at once.
    ///
    /// # Errors
    /// [`ArenaError`]; never falls back to weaker memory than `options` allows.
    pub fn new(options: &Options) -> Result<Self, ArenaError> {
        let mut mode = Mode::MemfdSecret;
        loop {
            let error = match Pool::map(mode, options) {
                Ok(pool) => return Ok(Self { pool: Arc::new(pool) }),
                Err(error) => error,
            };
            let Some(next) = weaker(mode, options) else { return Err(refusal(options, error)) };
            tracing::warn!(wanted = ?mode, instead = ?next, reason = %error, "guarded memory is weaker than it could be");
            mode = next;
        }
    }

    /// A zeroed buffer of `len` bytes; waits for a free one, at most `Options::wait`.
    ///
    /// # Errors
    /// [`SealError::Busy`] if none came free, [`SealError::TooLarge`] if none ever could.
    pub async fn take(&self, len: usize) -> Result<SecretBuf, SealError> {
        match self.try_take(len) {
            Err(SealError::Busy { .. }) => {}
            taken_or_too_large => return taken_or_too_large,
        }
        let waited = tokio::time::timeout(self.pool.wait, self.take_when_free(len)).await;
        waited.unwrap_or_else(|_| Err(busy()))
    }

    /// The same without waiting, for threads that must not.
    ///
    /// # Errors
    /// As [`Arena::take`].
    pub fn try_take(&self, len: usize) -> Result<SecretBuf, SealError> {
        let pool = &self.pool;
        match pool.share(len)? {
            Share::Slot => self.lend_slot(len, pool.free.try_acquire().map_err(|_| busy())?),
            // Never a share of the pool.
            Share::Apart => Err(busy()),
            Share::Large { pages } => {
                let buffer = pool.large_free.try_acquire().map_err(|_| busy())?;
                let room = pool.large_pages_free.try_acquire_many(pages).map_err(|_| busy())?;
                self.lend_large(len, pages, buffer, room)
            }
        }
    }

    /// A buffer of random bytes from the operating system.
    ///
    /// # Errors
    /// As [`Arena::take`]; [`SealError::Unavailable`] if the operating system has no randomness.
    pub async fn random(&self, len: usize) -> Result<SecretBuf, SealError> {
        let mut buf = self.take(len).await?;
        buf.with_mut(getrandom::fill).map_err(|error| SealError::Unavailable {
            retry_after: RETRY_AFTER,
            reason: format!("no random bytes from the operating system: {error}"),
        })?;
        Ok(buf)
    }

    /// A buffer beside the pool and its counts, for what is there once and stays. As well guarded as any.
    ///
    /// # Errors
    /// [`SealError::Busy`] if that much more cannot be locked.
    pub(crate) fn apart(&self, len: usize) -> Result<SecretBuf, SealError> {
        let cell =
            map::cells(self.pool.mode, 1, len).ok().and_then(|mut cells| cells.pop()).ok_or_else(busy)?;
        Ok(SecretBuf { cell, len, pool: Arc::clone(&self.pool), share: Share::Apart })
    }

    /// The present state.
    pub fn status(&self) -> Status {
        let pool = &self.pool;
        Status {
            mode: pool.mode,
            slots: pool.slots,
            slot_len: pool.page,
            free: pool.idle().len(),
            large_in_use: pool.large - pool.large_free.available_permits(),
            large_buffers: pool.large,
            large_bytes_in_use: (pool.large_pages - pool.large_pages_free.available_permits()) * pool.page,
            large_bytes: pool.large_pages * pool.page,
        }
    }

    /// First come, first served: a large buffer that waits is not overtaken by smaller ones.
    async fn take_when_free(&self, len: usize) -> Result<SecretBuf, SealError> {
        let pool = &self.pool;
        match pool.share(len)? {
            Share::Slot => self.lend_slot(len, pool.free.acquire().await.map_err(|_| busy())?),
            // Never a share of the pool.
            Share::Apart => Err(busy()),
            Share::Large { pages } => {
                let buffer = pool.large_free.acquire().await.map_err(|_| busy())?;
                let room = pool.large_pages_free.acquire_many(pages).await.map_err(|_| busy())?;
                self.lend_large(len, pages, buffer, room)
            }
        }
    }

    fn lend_slot(&self, len: usize, slot: SemaphorePermit<'_>) -> Result<SecretBuf, SealError> {
        let cell = self.pool.idle().pop().ok_or_else(busy)?;
        slot.forget();
        Ok(SecretBuf { cell, len, pool: Arc::clone(&self.pool), share: Share::Slot })
    }

    fn lend_large(
        &self,
        len: usize,
        pages: u32,
        buffer: SemaphorePermit<'_>,
        room: SemaphorePermit<'_>,
    ) -> Result<SecretBuf, SealError> {
        // The budget was tried at start. If it is gone all the same, somebody else in the process
        // locks memory: wait, but never take weaker pages.
        let cell =
            map::cells(self.pool.mode, 1, len).ok().and_then(|mut cells| cells.pop()).ok_or_else(busy)?;
        buffer.forget();
        room.forget();
        Ok(SecretBuf { cell, len, pool: Arc::clone(&self.pool), share: Share::Large { pages } })
    }
}

impl SecretBuf {
    /// Shortens the buffer and wipes what is cut off. Does nothing if it is not longer.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.cell.bytes_mut()[len..self.len].zeroize();
            self.len = len;
        }
    }

    /// Wipes the buffer and makes it as long as it was when it was taken, or shorter: `len` bytes.
    pub(crate) fn renew(&mut self, len: usize) {
        self.cell.bytes_mut().zeroize();
        self.len = len.min(self.cell.bytes().len());
    }

    /// Lets `write` change the bytes.
    pub fn with_mut<T>(&mut self, write: impl FnOnce(&mut [u8]) -> T) -> T {
        write(&mut self.cell.bytes_mut()[..self.len])
    }

    /// Lets `read` see the bytes.
    pub fn with<T>(&self, read: impl FnOnce(&[u8]) -> T) -> T {
        read(&self.cell.bytes()[..self.len])
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for SecretBuf {
    fn drop(&mut self) {
        self.cell.bytes_mut().zeroize();
        let cell = mem::replace(&mut self.cell, Cell::empty());
        // The cell goes back before its permit does, or a waiting taker would find the pool empty
        // and large mappings would exceed their budget.
        match self.share {
            Share::Slot => {
                self.pool.idle().push(cell);
                self.pool.free.add_permits(1);
            }
            Share::Apart => drop(cell),
            Share::Large { pages } => {
                drop(cell);
                self.pool.large_pages_free.add_permits(pages as usize);
                self.pool.large_free.add_permits(1);
            }
        }
    }
}

/// What to try after `mode`, if anything else is allowed.
fn weaker(mode: Mode, options: &Options) -> Option<Mode> {
    match mode {
        Mode::MemfdSecret if !options.require_secretmem => Some(Mode::Mlock),
        Mode::Mlock if options.allow_unlocked => Some(Mode::Unlocked),
        _ => None,
    }
}

fn refusal(options: &Options, error: MapError) -> ArenaError {
    let bytes = options
        .slots
        .max(1)
        .saturating_mul(map::page_size())
        .saturating_add(LARGEST.min(options.large_bytes));
    match error {
        MapError::NoSecretmem(reason) => ArenaError::NoSecretmem { reason: reason.to_string() },
        MapError::Reserve(reason) => ArenaError::NoMemory { bytes, reason: reason.to_string() },
        MapError::Lock(reason) => {
            let limit = rustix::process::getrlimit(Resource::Memlock).current;
            let limit =
                limit.map_or_else(|| "no limit".to_owned(), |limit| format!("a limit of {limit} bytes"));
            ArenaError::CannotLock { bytes, reason: format!("{reason}, with {limit}") }
        }
    }
}

fn busy() -> SealError {
    SealError::Busy { what: "guarded memory", retry_after: RETRY_AFTER }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(slots: usize) -> Arena {
        Arena::new(&Options { slots, wait: Duration::from_millis(20), ..Options::default() }).unwrap()
    }

    #[test]
    fn a_slot_is_wiped_when_it_comes_back_and_not_when_it_is_next_taken() {
        let arena = arena(1);
        let mut buf = arena.try_take(32).unwrap();
        buf.with_mut(|bytes| bytes.fill(0xA5));

        drop(buf);

        assert!(arena.pool.idle()[0].bytes().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn truncating_wipes_the_tail_at_once() {
        let arena = arena(1);
        let mut buf = arena.try_take(96).unwrap();
        buf.with_mut(|bytes| bytes.fill(0xA5));

        buf.truncate(32);
        buf.truncate(64);

        assert_eq!(buf.len(), 32);
        assert!(buf.cell.bytes()[..32].iter().all(|byte| *byte == 0xA5));
        assert!(buf.cell.bytes()[32..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_expired_key_is_wiped_and_its_slot_given_back() {
        let arena = arena(1);
        let mut key = Dek::new(arena.try_take(32).unwrap(), Duration::ZERO);

        assert_eq!(key.with(<[u8]>::len), Err(Expired));
        assert_eq!(arena.status().free, 1);
    }

    #[test]
    fn a_key_is_readable_until_its_deadline() {
        let arena = arena(1);
        let mut key = Dek::new(arena.try_take(32).unwrap(), Duration::from_mins(1));

        assert_eq!(key.with(<[u8]>::len), Ok(32));
        assert_eq!(key.with(<[u8]>::len), Ok(32));
        assert_eq!(arena.status().free, 0);
    }

    #[test]
    fn a_lent_key_is_wiped_by_whoever_is_done_with_it_first() {
        let arena = arena(1);
        let lend = |lifetime| Lent::new(Dek::new(arena.try_take(32).unwrap(), lifetime));
        let works = |_: &SecretBuf| Ok::<_, ()>(());
        let long = Duration::from_mins(1);

        let expired = lend(Duration::ZERO);
        assert!(expired.share().spend(works).is_err() && !expired.take_away());
        assert_eq!(arena.status().free, 1);

        let used = lend(long);
        let other = used.share();
        // What failed may be tried again.
        assert_eq!(other.spend(|_| Err::<(), _>(7)), Ok(Err(7)));
        assert_eq!(arena.status().free, 0);
        assert_eq!(other.spend(works), Ok(Ok(())));
        assert!(arena.status().free == 1 && !used.take_away());

        let taken = lend(long);
        let other = taken.share();
        assert!(taken.take_away() && arena.status().free == 1);
        assert_eq!(other.spend(works), Err(Expired));

        let forgotten = lend(long);
        let other = forgotten.share();
        drop(forgotten);
        assert!(arena.status().free == 1 && other.spend(works).is_err());

        let busy = lend(long);
        let other = busy.share();
        let done = other.spend(|key| if busy.take_away() { Err(()) } else { Ok(key.len()) });
        assert_eq!(done, Ok(Ok(32)), "taken away in the middle of its use");
    }

    #[test]
    fn a_renewed_buffer_is_empty_and_has_its_old_length() {
        let arena = arena(1);
        let mut buf = arena.try_take(96).unwrap();
        buf.with_mut(|bytes| bytes.fill(0xA5));
        buf.truncate(32);

        buf.renew(96);

        assert!(buf.len() == 96 && buf.with(|bytes| bytes.iter().all(|byte| *byte == 0)));
    }

    #[test]
    fn weaker_memory_is_tried_only_where_the_options_allow_it() {
        let strict = Options { require_secretmem: true, allow_unlocked: true, ..Options::default() };
        let usual = Options::default();
        let lax = Options { allow_unlocked: true, ..Options::default() };

        assert_eq!(weaker(Mode::MemfdSecret, &strict), None);
        assert_eq!(weaker(Mode::MemfdSecret, &usual), Some(Mode::Mlock));
        assert_eq!(weaker(Mode::Mlock, &usual), None);
        assert_eq!(weaker(Mode::Mlock, &lax), Some(Mode::Unlocked));
    }
}
