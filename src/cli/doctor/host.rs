//! Checks of the host: locked memory and the clock.

use std::path::Path;
use std::time::UNIX_EPOCH;

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::seal::Arena;
use crate::seal::guarded::{Mode, Options};

/// Bytes of a slot, as `Options::slots` counts them.
const SLOT: usize = 4096;
/// 2026-01-01: this program is not older, so neither is the time.
const OLDEST: Timestamp = Timestamp::from_micros(1_767_225_600_000_000);
/// How far a file may lie in the future before the clock is the suspect.
const SKEW_SECS: i64 = 300;

/// Whether the process may lock as much memory as the configuration wants.
pub(crate) fn memlock(options: &Options) -> Finding {
    const CHECK: &str = "memlock limit";
    let wanted = options.slots * SLOT + options.large_bytes;
    let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
    match getrlimit(Resource::Memlock).current {
        None => Finding::ok(CHECK, format!("unlimited; {} wanted", mib(wanted))),
        Some(limit) if limit >= wanted => {
            Finding::ok(CHECK, format!("{}; {} wanted", mib(limit), mib(wanted)))
        }
        Some(limit) => Finding::warn(
            CHECK,
            format!("{} of the {} that may be wanted", mib(limit), mib(wanted)),
            "set LimitMEMLOCK=infinity in the unit (ulimit -l), or lower [memory] large_bytes",
        ),
    }
}

/// What guarded memory this host really gives, by asking for it.
pub(crate) fn guarded_memory(options: &Options) -> Finding {
    const CHECK: &str = "guarded memory";
    let asked = Options { allow_unlocked: true, require_secretmem: false, ..options.clone() };
    let raise = "raise LimitMEMLOCK (ulimit -l); --allow-unlocked-memory is for development only";
    match Arena::new(&asked).map(|arena| arena.status().mode) {
        Ok(Mode::MemfdSecret) => Finding::ok(CHECK, "memfd_secret"),
        Ok(Mode::Mlock) if options.require_secretmem => Finding::fail(
            CHECK,
            "mlock, and require_secretmem is set",
            "boot with secretmem.enable=1 (kernel 5.14 or newer), or drop require_secretmem",
        ),
        Ok(Mode::Mlock) => Finding::ok(CHECK, "mlock (this kernel does not offer memfd_secret here)"),
        Ok(Mode::Unlocked) if options.allow_unlocked => {
            Finding::warn(CHECK, "not locked, as configured", raise)
        }
        Ok(Mode::Unlocked) => Finding::fail(CHECK, "memory cannot be locked", raise),
        Err(error) => Finding::fail(CHECK, error.to_string(), raise),
    }
}

/// Whether the clock is plausible: tokens and audit records are dated by it.
pub(crate) fn clock(data_dir: &Path) -> Finding {
    const CHECK: &str = "clock";
    let todo = "set the clock and keep it by NTP; tokens and audit records are dated by it";
    let now = SystemClock.now();
    if now < OLDEST {
        return Finding::fail(CHECK, format!("it is not {now}"), todo);
    }
    match newest_file(data_dir) {
        Some(newest) if newest > now.as_secs() + SKEW_SECS => {
            let found = format!("{now}, and files of the daemon are {} s newer", newest - now.as_secs());
            Finding::fail(CHECK, found, todo)
        }
        _ => Finding::ok(CHECK, now.to_string()),
    }
}

/// When a file of the daemon was last written, in seconds since the epoch.
fn newest_file(dir: &Path) -> Option<i64> {
    let entries = std::fs::read_dir(dir).ok()?;
    let times = entries.filter_map(|entry| entry.ok()?.metadata().ok()?.modified().ok());
    let newest = times.max()?.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(newest.as_secs()).ok()
}
