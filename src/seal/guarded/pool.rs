//! The arena's memory and the counts that bound it.
//!
//! A [`Pool`] is made once, with every limit tried out. It knows what may be lent; lending, waiting
//! and giving back are in `guarded.rs`, and the pages themselves in `map.rs`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::seal::SealError;

use super::map::{self, Cell, MapError};
use super::{LARGEST, Mode, Options};

/// What a buffer takes out of the pool.
#[derive(Clone, Copy)]
pub(super) enum Share {
    Slot,
    Large {
        pages: u32,
    },
    /// Nothing: it was mapped beside the pool.
    Apart,
}

/// The arena's memory and the counts that bound it.
pub(super) struct Pool {
    pub(super) mode: Mode,
    pub(super) page: usize,
    pub(super) wait: Duration,
    pub(super) slots: usize,
    // INVARIANT: idle cells hold zeros, and there are at least as many as `free` has permits.
    idle: Mutex<Vec<Cell>>,
    pub(super) free: Semaphore,
    pub(super) large: usize,
    pub(super) large_free: Semaphore,
    pub(super) large_pages: usize,
    pub(super) large_pages_free: Semaphore,
}

impl Pool {
    pub(super) fn map(mode: Mode, options: &Options) -> Result<Self, MapError> {
        let page = map::page_size();
        let slots = options.slots.max(1);
        let idle = map::cells(mode, slots, page)?;
        let large = options.large_buffers.min(Semaphore::MAX_PERMITS);
        let large_pages = lockable(mode, options)? / page;
        Ok(Self {
            mode,
            page,
            wait: options.wait,
            slots,
            idle: Mutex::new(idle),
            free: Semaphore::new(slots),
            large,
            large_free: Semaphore::new(large),
            large_pages,
            large_pages_free: Semaphore::new(large_pages),
        })
    }

    pub(super) fn share(&self, len: usize) -> Result<Share, SealError> {
        if len <= self.page {
            return Ok(Share::Slot);
        }
        let pages = len.div_ceil(self.page);
        if len > LARGEST || pages > self.large_pages || self.large == 0 {
            return Err(SealError::TooLarge { len });
        }
        u32::try_from(pages).map(|pages| Share::Large { pages }).map_err(|_| SealError::TooLarge { len })
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, Vec<Cell>> {
        // Nothing panics under this lock, and a list of cells is whole after every step anyway.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of `large_bytes` that can be locked on top of the slots, tried out now so that a limit
/// shows at start. One largest value must fit; below that, starting would only postpone the failure.
fn lockable(mode: Mode, options: &Options) -> Result<usize, MapError> {
    let page = map::page_size();
    let wanted = options.large_bytes / page * page;
    if wanted == 0 || options.large_buffers == 0 {
        return Ok(0);
    }
    let mut bytes = wanted;
    while let Err(error) = map::could_lock(mode, bytes) {
        bytes = bytes / 2 / page * page;
        if bytes < LARGEST.min(wanted) {
            return Err(error);
        }
    }
    if bytes < wanted {
        tracing::warn!(wanted, bytes, "the limit on locked memory leaves less room for large values");
    }
    Ok(bytes)
}
