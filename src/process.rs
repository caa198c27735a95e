//! What the process does to itself before it holds a secret: no core dumps, no tracing by others.
//!
//! [`harden`] comes first in `main`, before threads and before the configuration is read. It reports
//! what the kernel says afterwards and not what was asked for. A process that is not dumpable keeps
//! its files in /proc to root, also against other processes of its own user; `exec` undoes that, so
//! every program started from here must call it for itself.
//!
//! Not here: locking memory (`seal::guarded`). SIGPIPE stays ignored, as the Rust runtime sets it: a
//! peer that hangs up is an error of one write, not the end of the daemon.

use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// Keeps tpm2-tss from writing to standard error by itself: what fails is told in the log, once and with its
/// code. An operator who sets `TSS2_LOG` gets what they ask for.
#[cfg(feature = "tpm")]
#[expect(unsafe_code, clippy::disallowed_methods, reason = "called first in main, while there is one thread")]
pub fn quiet_tss() {
    if std::env::var_os("TSS2_LOG").is_none() {
        // SAFETY: no other thread exists yet that could read the environment.
        unsafe { std::env::set_var("TSS2_LOG", "all+none") };
    }
}

/// The state of the process after [`harden`], for the log and `lacre status`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Hardening {
    /// Whether processes of the same user may trace it and read its memory, and cores may be written.
    pub dumpable: bool,
    /// The largest core file in bytes; `u64::MAX` is no limit.
    pub core_limit: u64,
    /// How much memory may be locked, in bytes; `None` is no limit.
    pub memlock_limit: Option<u64>,
    /// What the kernel refused, as text for the operator. Empty if all is well.
    pub problems: Vec<String>,
}

impl Hardening {
    /// Whether neither a core dump nor another process of this user can show the memory.
    pub fn is_complete(&self) -> bool {
        !self.dumpable && self.core_limit == 0 && self.problems.is_empty()
    }
}

/// Forbids core dumps and tracing, for good: the hard limit goes to zero too.
#[must_use = "what could not be hardened has to be reported"]
pub fn harden() -> Hardening {
    let mut problems = Vec::new();
    if let Err(error) =
        rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
    {
        problems.push(format!("core dumps cannot be limited (RLIMIT_CORE): {error}"));
    }
    // Needed besides the limit: a core_pattern that is a pipe gets its dump whatever the limit says.
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        problems.push(format!("tracing cannot be forbidden (PR_SET_DUMPABLE): {error}"));
    }
    state(problems)
}

/// How the process stands now.
pub fn hardening() -> Hardening {
    state(Vec::new())
}

fn state(mut problems: Vec<String>) -> Hardening {
    let dumpable = rustix::process::dumpable_behavior().unwrap_or_else(|error| {
        problems.push(format!("the dumpable state cannot be read (PR_GET_DUMPABLE): {error}"));
        DumpableBehavior::Dumpable
    });
    Hardening {
        dumpable: dumpable != DumpableBehavior::NotDumpable,
        core_limit: rustix::process::getrlimit(Resource::Core).current.unwrap_or(u64::MAX),
        memlock_limit: rustix::process::getrlimit(Resource::Memlock).current,
        problems,
    }
}
