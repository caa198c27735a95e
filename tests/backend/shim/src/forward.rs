//! The 68 functions of PKCS#11 2.40, in the order of its function list.
//!
//! Each does nothing but name itself and its interesting arguments to [`Shim::call`](crate::state::Shim::call).

#![expect(non_snake_case, reason = "the functions have the names of the standard")]

use std::ffi::c_void;

use cryptoki_sys::*;

use crate::rules::Action;
use crate::state::shim;

/// The arguments of a call that a rule or a watch may look at.
#[derive(Clone, Copy)]
pub enum Subject {
    /// None.
    Nothing,
    /// An output and its length.
    Output(*mut CK_BYTE, *mut CK_ULONG),
    /// The same, of `C_Encrypt` in a session.
    Encrypt(CK_SESSION_HANDLE, *mut CK_BYTE, *mut CK_ULONG),
    /// A session and the mechanism that starts an operation in it.
    Gcm(CK_SESSION_HANDLE, CK_MECHANISM_PTR),
    /// An output whose length the caller has fixed.
    Bytes(*mut CK_BYTE, CK_ULONG),
    /// A list of slots and its length.
    Slots(*mut CK_SLOT_ID, *mut CK_ULONG),
    /// Attributes that are asked for, and their number.
    Attributes(*mut CK_ATTRIBUTE, CK_ULONG),
    /// What is told about a session.
    SessionInfo(*mut CK_SESSION_INFO),
    /// What is told about a token.
    TokenInfo(*mut CK_TOKEN_INFO),
    /// Where the function list goes.
    List(*mut *mut CK_FUNCTION_LIST),
}

impl Subject {
    /// Does to an output what a rule says.
    ///
    /// # Safety
    /// The arguments are those of a call that succeeded.
    pub unsafe fn change(self, action: &Action) {
        match (self, action) {
            (Self::Output(out, len) | Self::Encrypt(_, out, len), action) => {
                // SAFETY: after success the length is that of the output; a null output only asks for the length.
                if let Some(len) = unsafe { len.as_mut() }.filter(|len| **len > 0 && !out.is_null()) {
                    match action {
                        Action::Short => *len -= 1,
                        Action::Long => *len += 1,
                        // SAFETY: the output has that length.
                        _ => unsafe { change_bytes(out, *len, action) },
                    }
                }
            }
            (Self::Bytes(out, len), action) if len > 0 && !out.is_null() => {
                // SAFETY: the caller gave so much room and the call has filled it.
                unsafe { change_bytes(out, len, action) };
            }
            (Self::Attributes(first, count), Action::Turn(kind)) if !first.is_null() => {
                // SAFETY: the caller's own template; the real module has filled it.
                let asked = unsafe { std::slice::from_raw_parts(first, count as usize) };
                for attribute in asked.iter().filter(|asked| asked.type_ == *kind as CK_ULONG) {
                    if attribute.ulValueLen == 1 && !attribute.pValue.is_null() {
                        // SAFETY: a value of one byte.
                        unsafe { *attribute.pValue.cast::<CK_BYTE>() ^= 1 };
                    }
                }
            }
            (Self::TokenInfo(info), action) => {
                // SAFETY: filled by the real module.
                let Some(info) = (unsafe { info.as_mut() }) else { return };
                match action {
                    Action::Flags(flags) => info.flags |= *flags as CK_FLAGS,
                    Action::Serial(text) => pad(&mut info.serialNumber, text),
                    Action::Label(text) => pad(&mut info.label, text),
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

/// # Safety
/// There are `len` writable bytes at `out`, and `len` is not 0.
unsafe fn change_bytes(out: *mut CK_BYTE, len: CK_ULONG, action: &Action) {
    match action {
        // SAFETY: the first of `len` bytes.
        Action::Corrupt => unsafe { *out ^= 1 },
        // SAFETY: as promised.
        Action::Zero => unsafe { out.write_bytes(0, len as usize) },
        _ => {}
    }
}

fn pad(field: &mut [u8], text: &str) {
    field.fill(b' ');
    field.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
}

/// The list that hosts get.
pub fn list() -> *mut CK_FUNCTION_LIST {
    (&raw const LIST).cast_mut()
}

/// Whether the function has an output that can be changed.
pub fn has_output(function: &str) -> bool {
    const SINGLE: [&str; 18] = [
        "C_GetOperationState",
        "C_Encrypt",
        "C_EncryptUpdate",
        "C_EncryptFinal",
        "C_Decrypt",
        "C_DecryptUpdate",
        "C_DecryptFinal",
        "C_Digest",
        "C_DigestFinal",
        "C_Sign",
        "C_SignFinal",
        "C_SignRecover",
        "C_VerifyRecover",
        "C_DigestEncryptUpdate",
        "C_DecryptDigestUpdate",
        "C_SignEncryptUpdate",
        "C_DecryptVerifyUpdate",
        "C_WrapKey",
    ];
    SINGLE.contains(&function)
}

/// An argument as the real module knows it: slots may have other numbers there.
macro_rules! real {
    ($arg:ident) => {
        $arg
    };
    ($arg:ident slot) => {
        shim().real_slot($arg)
    };
}

macro_rules! forward {
    ($( $name:ident($($arg:ident: $ty:ty $(as $kind:ident)?),*) => $subject:expr; )*) => {
        /// The functions' names, in the list's order.
        pub const NAMES: [&str; [$( stringify!($name) ),*].len()] = [$( stringify!($name) ),*];

        #[expect(non_camel_case_types, reason = "the names of the standard")]
        enum Place { $( $name ),* }

        static LIST: CK_FUNCTION_LIST = CK_FUNCTION_LIST {
            version: CK_VERSION { major: 2, minor: 40 },
            $( $name: Some($name) ),*
        };

        $( /// # Safety
        /// The standard's own rules for its arguments.
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> CK_RV {
            let real = |real: &CK_FUNCTION_LIST| match real.$name {
                // SAFETY: the host's own arguments, passed on.
                Some(function) => unsafe { function($(real!($arg $($kind)?)),*) },
                None => CKR_FUNCTION_NOT_SUPPORTED,
            };
            // SAFETY: the host's own arguments.
            unsafe { shim().call(Place::$name as usize, $subject, real) }
        } )*
    };
}

forward! {
    C_Initialize(a: *mut c_void) => Subject::Nothing;
    C_Finalize(a: *mut c_void) => Subject::Nothing;
    C_GetInfo(a: *mut CK_INFO) => Subject::Nothing;
    C_GetFunctionList(a: *mut *mut CK_FUNCTION_LIST) => Subject::List(a);
    C_GetSlotList(a: CK_BBOOL, b: *mut CK_SLOT_ID, c: *mut CK_ULONG) => Subject::Slots(b, c);
    C_GetSlotInfo(a: CK_SLOT_ID as slot, b: *mut CK_SLOT_INFO) => Subject::Nothing;
    C_GetTokenInfo(a: CK_SLOT_ID as slot, b: *mut CK_TOKEN_INFO) => Subject::TokenInfo(b);
    C_GetMechanismList(a: CK_SLOT_ID as slot, b: *mut CK_MECHANISM_TYPE, c: *mut CK_ULONG) => Subject::Nothing;
    C_GetMechanismInfo(a: CK_SLOT_ID as slot, b: CK_MECHANISM_TYPE, c: *mut CK_MECHANISM_INFO) => Subject::Nothing;
    C_InitToken(a: CK_SLOT_ID as slot, b: *mut CK_UTF8CHAR, c: CK_ULONG, d: *mut CK_UTF8CHAR) => Subject::Nothing;
    C_InitPIN(a: CK_SESSION_HANDLE, b: *mut CK_UTF8CHAR, c: CK_ULONG) => Subject::Nothing;
    C_SetPIN(a: CK_SESSION_HANDLE, b: *mut CK_UTF8CHAR, c: CK_ULONG, d: *mut CK_UTF8CHAR, e: CK_ULONG) => Subject::Nothing;
    C_OpenSession(a: CK_SLOT_ID as slot, b: CK_FLAGS, c: *mut c_void, d: CK_NOTIFY, e: *mut CK_SESSION_HANDLE) => Subject::Nothing;
    C_CloseSession(a: CK_SESSION_HANDLE) => Subject::Nothing;
    C_CloseAllSessions(a: CK_SLOT_ID as slot) => Subject::Nothing;
    C_GetSessionInfo(a: CK_SESSION_HANDLE, b: *mut CK_SESSION_INFO) => Subject::SessionInfo(b);
    C_GetOperationState(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: *mut CK_ULONG) => Subject::Output(b, c);
    C_SetOperationState(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: CK_OBJECT_HANDLE, e: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_Login(a: CK_SESSION_HANDLE, b: CK_USER_TYPE, c: *mut CK_UTF8CHAR, d: CK_ULONG) => Subject::Nothing;
    C_Logout(a: CK_SESSION_HANDLE) => Subject::Nothing;
    C_CreateObject(a: CK_SESSION_HANDLE, b: *mut CK_ATTRIBUTE, c: CK_ULONG, d: *mut CK_OBJECT_HANDLE) => Subject::Nothing;
    C_CopyObject(a: CK_SESSION_HANDLE, b: CK_OBJECT_HANDLE, c: *mut CK_ATTRIBUTE, d: CK_ULONG, e: *mut CK_OBJECT_HANDLE) => Subject::Nothing;
    C_DestroyObject(a: CK_SESSION_HANDLE, b: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_GetObjectSize(a: CK_SESSION_HANDLE, b: CK_OBJECT_HANDLE, c: *mut CK_ULONG) => Subject::Nothing;
    C_GetAttributeValue(a: CK_SESSION_HANDLE, b: CK_OBJECT_HANDLE, c: *mut CK_ATTRIBUTE, d: CK_ULONG) => Subject::Attributes(c, d);
    C_SetAttributeValue(a: CK_SESSION_HANDLE, b: CK_OBJECT_HANDLE, c: *mut CK_ATTRIBUTE, d: CK_ULONG) => Subject::Nothing;
    C_FindObjectsInit(a: CK_SESSION_HANDLE, b: *mut CK_ATTRIBUTE, c: CK_ULONG) => Subject::Nothing;
    C_FindObjects(a: CK_SESSION_HANDLE, b: *mut CK_OBJECT_HANDLE, c: CK_ULONG, d: *mut CK_ULONG) => Subject::Nothing;
    C_FindObjectsFinal(a: CK_SESSION_HANDLE) => Subject::Nothing;
    C_EncryptInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE) => Subject::Gcm(a, b);
    C_Encrypt(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Encrypt(a, d, e);
    C_EncryptUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_EncryptFinal(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: *mut CK_ULONG) => Subject::Output(b, c);
    C_DecryptInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE) => Subject::Gcm(a, b);
    C_Decrypt(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_DecryptUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_DecryptFinal(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: *mut CK_ULONG) => Subject::Output(b, c);
    C_DigestInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM) => Subject::Nothing;
    C_Digest(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_DigestUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG) => Subject::Nothing;
    C_DigestKey(a: CK_SESSION_HANDLE, b: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_DigestFinal(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: *mut CK_ULONG) => Subject::Output(b, c);
    C_SignInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_Sign(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_SignUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG) => Subject::Nothing;
    C_SignFinal(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: *mut CK_ULONG) => Subject::Output(b, c);
    C_SignRecoverInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_SignRecover(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_VerifyInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_Verify(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: CK_ULONG) => Subject::Nothing;
    C_VerifyUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG) => Subject::Nothing;
    C_VerifyFinal(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG) => Subject::Nothing;
    C_VerifyRecoverInit(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE) => Subject::Nothing;
    C_VerifyRecover(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_DigestEncryptUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_DecryptDigestUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_SignEncryptUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_DecryptVerifyUpdate(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG, d: *mut CK_BYTE, e: *mut CK_ULONG) => Subject::Output(d, e);
    C_GenerateKey(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: *mut CK_ATTRIBUTE, d: CK_ULONG, e: *mut CK_OBJECT_HANDLE) => Subject::Nothing;
    C_GenerateKeyPair(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: *mut CK_ATTRIBUTE, d: CK_ULONG, e: *mut CK_ATTRIBUTE, f: CK_ULONG, g: *mut CK_OBJECT_HANDLE, h: *mut CK_OBJECT_HANDLE) => Subject::Nothing;
    C_WrapKey(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE, d: CK_OBJECT_HANDLE, e: *mut CK_BYTE, f: *mut CK_ULONG) => Subject::Output(e, f);
    C_UnwrapKey(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE, d: *mut CK_BYTE, e: CK_ULONG, f: *mut CK_ATTRIBUTE, g: CK_ULONG, h: *mut CK_OBJECT_HANDLE) => Subject::Nothing;
    C_DeriveKey(a: CK_SESSION_HANDLE, b: *mut CK_MECHANISM, c: CK_OBJECT_HANDLE, d: *mut CK_ATTRIBUTE, e: CK_ULONG, f: *mut CK_OBJECT_HANDLE) => Subject::Nothing;
    C_SeedRandom(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG) => Subject::Nothing;
    C_GenerateRandom(a: CK_SESSION_HANDLE, b: *mut CK_BYTE, c: CK_ULONG) => Subject::Bytes(b, c);
    C_GetFunctionStatus(a: CK_SESSION_HANDLE) => Subject::Nothing;
    C_CancelFunction(a: CK_SESSION_HANDLE) => Subject::Nothing;
    C_WaitForSlotEvent(a: CK_FLAGS, b: *mut CK_SLOT_ID, c: *mut c_void) => Subject::Nothing;
}
