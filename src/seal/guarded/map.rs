//! The system calls behind guarded memory, and the only unsafe code in it.
//!
//! [`cells`] maps `guard|cell|guard|cell|...|guard` and hands out each cell once, as a [`Cell`] that
//! owns its bytes alone; the mapping goes when its last cell goes. So everything above this file is
//! safe code: two buffers cannot share a cell, and a cell cannot outlive its pages. Every lock is
//! verified and every page touched before a cell is handed out.
//!
//! Not here: which mode is tried and when to give up (`guarded.rs`), and wiping (`SecretBuf`).

#![expect(unsafe_code, reason = "mapping, locking and touching pages; each block says why it holds")]

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, MlockFlags, MprotectFlags, ProtFlags};

use super::Mode;

/// Why pages of the wanted mode could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum MapError {
    /// The kernel gave no address space.
    #[error("no address space: {0}")]
    Reserve(io::Error),
    /// There is no `memfd_secret`: an old kernel, switched off, or forbidden by a seccomp profile.
    #[error("no `memfd_secret`: {0}")]
    NoSecretmem(io::Error),
    /// The pages cannot be locked, or not be kept out of dumps and children.
    #[error("pages cannot be locked: {0}")]
    Lock(io::Error),
}

/// One buffer's pages. Whoever has the cell is alone with its bytes.
pub(super) struct Cell {
    bytes: NonNull<[u8]>,
    // INVARIANT: `bytes` lies in this region; `None` only for the empty cell, which has no bytes.
    _region: Option<Arc<Region>>,
}

// SAFETY: a cell owns its bytes alone, like a `Box<[u8]>`; `&Cell` gives out shared slices only.
unsafe impl Send for Cell {}
// SAFETY: as above.
unsafe impl Sync for Cell {}

impl Cell {
    /// A cell without bytes, to leave behind where a real one is moved out.
    pub(super) fn empty() -> Self {
        Self { bytes: NonNull::from(&mut []), _region: None }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the pages are mapped readable and writable as long as the region lives, which this
        // cell holds; `&mut self` makes the borrow exclusive and no other cell covers these bytes.
        unsafe { self.bytes.as_mut() }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: as in `bytes_mut`, with a shared borrow.
        unsafe { self.bytes.as_ref() }
    }
}

/// An address range with nothing in it until cells are laid into it. Unmapped as a whole.
struct Region {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the region is an address and a length. Nothing is read or written through it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn reserve(len: usize) -> Result<Self, MapError> {
        // SAFETY: the kernel chooses the place, so no existing mapping is touched.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let base = base.map_err(|error| MapError::Reserve(error.into()))?;
        let base = NonNull::new(base).ok_or_else(|| MapError::Reserve(io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { base, len })
    }

    /// The address `offset` bytes into the range.
    fn at(&self, offset: usize) -> NonNull<c_void> {
        debug_assert!(offset < self.len, "cells are laid out inside their region");
        // SAFETY: callers stay below `len`, so the result lies in this one mapping.
        unsafe { self.base.byte_add(offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is this region's own, and cells, the only way to its bytes, hold the region.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.len) };
        // Fails only when the process is out of mappings; the cells are wiped, so what stays is zeros.
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping");
    }
}

/// Maps `count` cells of at least `len` bytes between guard pages, locks them and touches every page.
pub(super) fn cells(mode: Mode, count: usize, len: usize) -> Result<Vec<Cell>, MapError> {
    let page = page_size();
    let len = len.next_multiple_of(page);
    let stride = len + page;
    let too_much = || MapError::Reserve(io::ErrorKind::OutOfMemory.into());
    let total = count.checked_mul(stride).and_then(|cells| cells.checked_add(page)).ok_or_else(too_much)?;

    // The file is closed when this function ends. A descriptor left open could be taken by
    // pidfd_getfd(2) and mapped in another process.
    let secret = if mode == Mode::MemfdSecret { Some(secret_file(count * len)?) } else { None };
    let region = Arc::new(Region::reserve(total)?);
    let mut cells = Vec::with_capacity(count);
    for index in 0..count {
        let start = region.at(page + index * stride);
        match &secret {
            Some(file) => lay_secret(start, len, file, index * len)?,
            None => lay_anonymous(start, len, mode)?,
        }
        touch(start, len, page);
        let bytes = NonNull::slice_from_raw_parts(start.cast::<u8>(), len);
        cells.push(Cell { bytes, _region: Some(Arc::clone(&region)) });
    }
    Ok(cells)
}

/// Whether `len` bytes more could be locked now. Takes no memory: the pages are not touched.
pub(super) fn could_lock(mode: Mode, len: usize) -> Result<(), MapError> {
    match mode {
        Mode::Unlocked => Ok(()),
        Mode::MemfdSecret => {
            let file = secret_file(len)?;
            let region = Region::reserve(len)?;
            lay_secret(region.base, len, &file, 0)
        }
        Mode::Mlock => {
            let region = Region::reserve(len)?;
            let start = region.base.as_ptr();
            // SAFETY: the range is the region's own and holds nothing.
            unsafe {
                rustix::mm::mprotect(start, len, MprotectFlags::READ | MprotectFlags::WRITE)
                    .map_err(|error| MapError::Lock(error.into()))?;
                rustix::mm::mlock_with(start, len, MlockFlags::ONFAULT)
                    .map_err(|error| MapError::Lock(error.into()))
            }
        }
    }
}

/// The size of a page, and of a slot.
pub(super) fn page_size() -> usize {
    // SAFETY: reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// A file of secret memory (`memfd_secret(2)`; neither libc nor rustix has a wrapper for it).
fn secret_file(len: usize) -> Result<OwnedFd, MapError> {
    // SAFETY: takes one integer, touches no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC as c_uint) };
    if fd < 0 {
        return Err(MapError::NoSecretmem(io::Error::last_os_error()));
    }
    let fd = c_int::try_from(fd).map_err(|_| MapError::NoSecretmem(io::ErrorKind::Unsupported.into()))?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::fs::ftruncate(&file, len as u64).map_err(|error| MapError::NoSecretmem(error.into()))?;
    Ok(file)
}

/// Lays pages of `file` over the reserved range. They count as locked and are never swapped: the
/// kernel refuses the mapping if the limit does not allow it.
fn lay_secret(start: NonNull<c_void>, len: usize, file: &OwnedFd, offset: usize) -> Result<(), MapError> {
    let start = start.as_ptr();
    // SAFETY: both callers pass a range inside a region of their own that no cell covers yet, so
    // MAP_FIXED replaces reserved, empty pages only.
    unsafe {
        rustix::mm::mmap(
            start,
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
            file,
            offset as u64,
        )
        .map_err(|error| MapError::Lock(error.into()))?;
        // mlock and MADV_WIPEONFORK are refused on such pages; a child gets none of them instead.
        rustix::mm::madvise(start, len, Advice::LinuxDontDump)
            .and_then(|()| rustix::mm::madvise(start, len, Advice::LinuxDontFork))
            .map_err(|error| MapError::Lock(error.into()))
    }
}

/// Opens a reserved range for use and, unless `mode` is [`Mode::Unlocked`], locks it.
fn lay_anonymous(start: NonNull<c_void>, len: usize, mode: Mode) -> Result<(), MapError> {
    let start = start.as_ptr();
    // SAFETY: the caller passes a range inside its own region that no cell covers yet; the calls
    // change how its pages are kept, not what other memory holds.
    unsafe {
        rustix::mm::mprotect(start, len, MprotectFlags::READ | MprotectFlags::WRITE)
            .map_err(|error| MapError::Reserve(error.into()))?;
        let advised = rustix::mm::madvise(start, len, Advice::LinuxDontDump)
            .and_then(|()| rustix::mm::madvise(start, len, Advice::LinuxWipeOnFork));
        if mode == Mode::Unlocked {
            // The operator accepted weaker memory; some sandboxes know neither kind of advice.
            return Ok(());
        }
        advised.and_then(|()| rustix::mm::mlock(start, len)).map_err(|error| MapError::Lock(error.into()))
    }
}

/// Writes to every page, so that what is missing is missing now and not under a request.
fn touch(start: NonNull<c_void>, len: usize, page: usize) {
    for offset in (0..len).step_by(page) {
        // SAFETY: the range was just mapped writable and no cell covers it yet.
        unsafe { start.cast::<u8>().add(offset).write_volatile(0) };
    }
}
