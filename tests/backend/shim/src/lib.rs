//! A PKCS#11 module between a program and its real module.
//!
//! It forwards every function of the 2.40 function list, counts the calls in a shared file and does
//! what the control file says: fail, delay, hang, crash, change an output. `README.md` beside
//! `Cargo.toml` is the manual. Start reading at `forward.rs` (the functions), then `rules.rs` (what
//! may be asked for), then `state.rs` (how a call meets a rule).
//!
//! It never writes down an argument of a call: PINs and keys pass through it.

mod attempt;
mod counts;
mod forward;
mod gcm;
mod rules;
mod state;

use cryptoki_sys::{CK_FUNCTION_LIST_PTR_PTR, CK_RV, CKR_ARGUMENTS_BAD, CKR_GENERAL_ERROR};

/// The only symbol that a PKCS#11 2.40 host looks up by name.
///
/// # Safety
/// `list` is null or points to writable room for one pointer, as the standard says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: CK_FUNCTION_LIST_PTR_PTR) -> CK_RV {
    if list.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    match state::load() {
        // SAFETY: the host's own argument, passed on.
        Ok(()) => unsafe { forward::C_GetFunctionList(list) },
        Err(reason) => {
            eprintln!("lacre-shim: {reason}");
            CKR_GENERAL_ERROR
        }
    }
}
