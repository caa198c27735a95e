//! Watches AES-GCM parameters, and plays the device that makes its own IV.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cryptoki_sys::{CK_GCM_PARAMS, CK_MECHANISM_PTR, CK_SESSION_HANDLE, CKM_AES_GCM};

/// The caller's GCM parameters, if the mechanism is AES-GCM.
///
/// # Safety
/// `mechanism` is null or what a PKCS#11 caller passes to `C_EncryptInit` and `C_DecryptInit`.
unsafe fn params<'a>(mechanism: CK_MECHANISM_PTR) -> Option<&'a CK_GCM_PARAMS> {
    // SAFETY: as promised by the caller.
    let mechanism = unsafe { mechanism.as_ref() }?;
    if mechanism.mechanism != CKM_AES_GCM || mechanism.ulParameterLen as usize != size_of::<CK_GCM_PARAMS>() {
        return None;
    }
    // SAFETY: the length says that the parameter is this structure.
    unsafe { mechanism.pParameter.cast::<CK_GCM_PARAMS>().as_ref() }
}

/// Whether these are GCM parameters that Lacre never uses: a short tag, an odd IV, no AAD.
///
/// # Safety
/// As [`params`].
pub unsafe fn is_bad(mechanism: CK_MECHANISM_PTR) -> bool {
    // SAFETY: the same promise.
    unsafe { params(mechanism) }.is_some_and(|gcm| {
        gcm.ulTagBits != 128 || gcm.ulIvLen != 12 || gcm.ulAADLen == 0 || gcm.pAAD.is_null()
    })
}

/// An IV buffer of a caller, and what the device would write there.
pub struct ForeignIv {
    // An address and no pointer: the state is shared between threads, and the caller owns the buffer.
    address: usize,
    theirs: Vec<u8>,
    ours: Vec<u8>,
}

impl ForeignIv {
    /// Puts a random IV into the caller's buffer, or one that is always the same.
    ///
    /// # Safety
    /// As [`params`]; the IV buffer is writable, as it must be for a device that makes its own IV.
    pub unsafe fn write(mechanism: CK_MECHANISM_PTR, is_stuck: bool) -> Option<Self> {
        // SAFETY: the same promise.
        let gcm = unsafe { params(mechanism) }?;
        if gcm.pIv.is_null() || gcm.ulIvLen == 0 {
            return None;
        }
        let len = gcm.ulIvLen as usize;
        // SAFETY: the caller says that its IV has that length.
        let theirs = unsafe { std::slice::from_raw_parts(gcm.pIv, len) }.to_vec();
        let mut ours = vec![0x5a; len];
        if !is_stuck {
            // SAFETY: a buffer of our own and its length.
            unsafe { libc::getrandom(ours.as_mut_ptr().cast(), len, 0) };
        }
        let iv = Self { address: gcm.pIv as usize, theirs, ours };
        // SAFETY: the buffer that was just described.
        unsafe { iv.put(&iv.ours) };
        Some(iv)
    }

    /// Puts the caller's own IV back.
    ///
    /// # Safety
    /// The caller's buffer is still there.
    pub unsafe fn hide(&self) {
        // SAFETY: the same promise.
        unsafe { self.put(&self.theirs) };
    }

    /// # Safety
    /// The caller's buffer is still there.
    unsafe fn put(&self, bytes: &[u8]) {
        // SAFETY: as promised; `bytes` has the buffer's length.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address as *mut u8, bytes.len()) };
    }
}

/// IVs that the caller is to see only after `C_Encrypt`, by session.
#[derive(Default)]
pub struct LateIvs(Mutex<HashMap<CK_SESSION_HANDLE, ForeignIv>>);

impl LateIvs {
    /// Keeps an IV for later.
    pub fn keep(&self, session: CK_SESSION_HANDLE, iv: ForeignIv) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(session, iv);
    }

    /// Shows the session's IV, if one was kept.
    ///
    /// # Safety
    /// The caller keeps its IV buffer until `C_Encrypt` returns; a device that writes it late needs that.
    pub unsafe fn show(&self, session: CK_SESSION_HANDLE) {
        if let Some(iv) = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&session) {
            // SAFETY: the same promise.
            unsafe { iv.put(&iv.ours) };
        }
    }
}
