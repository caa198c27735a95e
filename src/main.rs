//! The `lacre` program: an allocator that wipes, a hardened process, then the command line.

use std::process::ExitCode;

/// Wipes every heap block when it is freed. Guarded memory holds keys and plaintext; this is the net
/// under what HTTP, TLS, JSON and database drivers copy.
#[global_allocator]
static ALLOC: zeroizing_alloc::ZeroAlloc<std::alloc::System> = zeroizing_alloc::ZeroAlloc(std::alloc::System);

fn main() -> ExitCode {
    let hardening = lacre::process::harden();
    if hardening.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
