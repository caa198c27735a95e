//! The shared counters: one file, mapped by every process that uses it, so totals add up over all.
//!
//! Layout, all of it in the file itself: 64-bit native-endian words from offset 0 (`MAGIC`, the rules'
//! generation, then one counter for each name), and from offset 4096 the names, one a line, in the
//! counters' order. A reader needs nothing but the file.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::forward::NAMES;

const MAGIC: u64 = 0x3130_6d69_6873_636c; // "lcshim01"
const FILE_LEN: usize = 8192;
const NAMES_AT: u64 = 4096;
const FIRST_COUNTER: usize = 2;

/// Counters that are not functions, after the functions in the file.
const EXTRA: [&str; 3] = ["bad_gcm_params", "rules_fired", "bad_rules"];

/// A counter that is not a function.
#[derive(Clone, Copy)]
pub enum Extra {
    /// AES-GCM with a tag other than 128 bits, an IV other than 12 bytes or no AAD.
    BadGcmParams,
    /// A rule matched a call.
    RulesFired,
    /// A line of the control file was not understood.
    BadRules,
}

/// The mapped file, or anonymous memory where no file was asked for.
pub struct Counts {
    words: &'static [AtomicU64],
}

impl Counts {
    /// Maps `file`, which is made if it is not there. Repeating it in other processes is harmless:
    /// all write the same header.
    pub fn open(file: Option<&Path>) -> io::Result<Self> {
        let Some(path) = file else { return Self::map(None) };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(FILE_LEN as u64)?;
        let mut names = NAMES.iter().chain(&EXTRA).fold(String::new(), |text, name| text + name + "\n");
        names.push('\n');
        file.write_all_at(names.as_bytes(), NAMES_AT)?;
        file.write_all_at(&MAGIC.to_ne_bytes(), 0)?;
        Self::map(Some(&file))
    }

    fn map(file: Option<&std::fs::File>) -> io::Result<Self> {
        let (flags, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of a length that the file has; it is never unmapped.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), FILE_LEN, access, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = FILE_LEN / size_of::<AtomicU64>();
        // SAFETY: page-aligned, `FILE_LEN` bytes long, alive for ever, and only used as atomics.
        Ok(Self { words: unsafe { std::slice::from_raw_parts(address.cast(), words) } })
    }

    /// Grows whenever a test has written new rules.
    pub fn generation(&self) -> u64 {
        self.words[1].load(Ordering::Acquire)
    }

    /// Counts a call of the function with that place in the list.
    pub fn call(&self, function: usize) {
        self.words[FIRST_COUNTER + function].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts something else.
    pub fn extra(&self, what: Extra) {
        self.words[FIRST_COUNTER + NAMES.len() + what as usize].fetch_add(1, Ordering::Relaxed);
    }
}
