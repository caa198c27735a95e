//! The `lacre` program: an allocator that wipes, then the command line. Everything else is in the
//! library, so that tests and benches can use it.

use std::process::ExitCode;

/// Wipes every heap block when it is freed. Guarded memory holds keys and plaintext; this is the net
/// under what HTTP, TLS, JSON and database drivers copy.
#[global_allocator]
static ALLOC: zeroizing_alloc::ZeroAlloc<std::alloc::System> = zeroizing_alloc::ZeroAlloc(std::alloc::System);

fn main() -> ExitCode {
    #[cfg(feature = "tpm")]
    lacre::process::quiet_tss();
    lacre::cli::main()
}
