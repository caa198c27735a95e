//! Direct calls into the module's function list: one call per operation, output straight into the
//! caller's buffer, return values and mechanism numbers unfiltered.
//!
//! `cryptoki` makes two calls per operation, returns vectors, and hides mechanisms it does not know
//! (hsm.md 3.2). Everything unsafe about PKCS#11 is in this file. Calls go through the list, never
//! by symbol name: some modules export `C_GetFunctionList` only.

#![expect(unsafe_code, reason = "the PKCS#11 function list is a C interface")]

use std::ffi::{CStr, c_char, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::ptr;

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_FUNCTION_LIST, CK_GCM_PARAMS, CK_MECHANISM, CK_MECHANISM_INFO, CK_MECHANISM_TYPE,
    CK_OBJECT_HANDLE, CK_RSA_PKCS_OAEP_PARAMS, CK_RSA_PKCS_PSS_PARAMS, CK_RV, CK_SESSION_HANDLE,
    CK_SESSION_INFO, CK_SLOT_ID, CK_TOKEN_INFO, CK_ULONG, CKF_OS_LOCKING_OK, CKF_USER_PIN_FINAL_TRY,
    CKF_USER_PIN_INITIALIZED, CKF_USER_PIN_LOCKED, CKG_MGF1_SHA1, CKG_MGF1_SHA256, CKM_AES_CBC_PAD,
    CKM_AES_GCM, CKM_RSA_PKCS_OAEP, CKM_RSA_PKCS_PSS, CKM_SHA_1, CKM_SHA256,
    CKR_CRYPTOKI_ALREADY_INITIALIZED, CKR_FUNCTION_NOT_SUPPORTED, CKR_OK, CKS_RO_USER_FUNCTIONS,
    CKS_RW_USER_FUNCTIONS, CKU_USER, CKZ_DATA_SPECIFIED,
};

/// A call that did not return `CKR_OK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fail {
    /// The PKCS#11 function.
    pub(super) function: &'static str,
    /// Its return value.
    pub(super) code: u64,
}

/// A mechanism and its parameter.
pub(super) enum Mechanism<'a> {
    /// Without parameter.
    Plain(CK_MECHANISM_TYPE),
    /// AES-GCM with a 128-bit tag and a 96-bit IV. The device may overwrite the IV with its own.
    Gcm { iv: &'a mut [u8; 12], aad: &'a [u8] },
    /// AES-CBC with PKCS#7 padding.
    CbcPad { iv: &'a [u8; 16] },
    /// RSA-OAEP and MGF1 with SHA-256, without label.
    OaepSha256,
    /// RSA-OAEP and MGF1 with SHA-1, without label.
    OaepSha1,
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256, salt as long as the hash (RFC 7518, section 3.5).
    PssSha256,
}

impl Mechanism<'_> {
    /// Builds the C form, which is valid during `call` only.
    fn with<T>(self, call: impl FnOnce(*mut CK_MECHANISM) -> T) -> T {
        match self {
            Self::Plain(mechanism) => {
                call(&mut CK_MECHANISM { mechanism, pParameter: ptr::null_mut(), ulParameterLen: 0 })
            }
            Self::Gcm { iv, aad } => {
                let mut params = CK_GCM_PARAMS {
                    pIv: iv.as_mut_ptr(),
                    ulIvLen: 12,
                    // Some devices refuse 0 here (hsm.md 4.7).
                    ulIvBits: 96,
                    pAAD: aad.as_ptr().cast_mut(),
                    ulAADLen: len(aad),
                    ulTagBits: 128,
                };
                call(&mut parameterised(CKM_AES_GCM, &mut params))
            }
            Self::CbcPad { iv } => {
                let mut iv = *iv;
                call(&mut parameterised(CKM_AES_CBC_PAD, &mut iv))
            }
            Self::OaepSha256 => {
                let mut params =
                    CK_RSA_PKCS_OAEP_PARAMS { hashAlg: CKM_SHA256, mgf: CKG_MGF1_SHA256, ..NO_LABEL };
                call(&mut parameterised(CKM_RSA_PKCS_OAEP, &mut params))
            }
            Self::OaepSha1 => {
                let mut params = NO_LABEL;
                call(&mut parameterised(CKM_RSA_PKCS_OAEP, &mut params))
            }
            Self::PssSha256 => {
                let mut params =
                    CK_RSA_PKCS_PSS_PARAMS { hashAlg: CKM_SHA256, mgf: CKG_MGF1_SHA256, sLen: 32 };
                call(&mut parameterised(CKM_RSA_PKCS_PSS, &mut params))
            }
        }
    }
}

/// OAEP with SHA-1 and an empty label.
const NO_LABEL: CK_RSA_PKCS_OAEP_PARAMS = CK_RSA_PKCS_OAEP_PARAMS {
    hashAlg: CKM_SHA_1,
    mgf: CKG_MGF1_SHA1,
    source: CKZ_DATA_SPECIFIED,
    pSourceData: ptr::null_mut(),
    ulSourceDataLen: 0,
};

/// The argument of `C_Initialize` with one member more than the standard's, as NSS wants it. The
/// parameters lie where the standard has its reserved pointer, through which others (Kryoptic) take them.
#[repr(C)]
struct InitializeArgs {
    mutex_callbacks: [*const c_void; 4],
    flags: CK_ULONG,
    parameters: *const c_char,
    reserved: *const c_void,
}

fn parameterised<P>(mechanism: CK_MECHANISM_TYPE, params: &mut P) -> CK_MECHANISM {
    let size = size_of::<P>() as CK_ULONG;
    CK_MECHANISM { mechanism, pParameter: ptr::from_mut(params).cast::<c_void>(), ulParameterLen: size }
}

fn len(bytes: &[u8]) -> CK_ULONG {
    bytes.len() as CK_ULONG
}

/// What `C_GetTokenInfo` says, trimmed.
#[derive(Clone, Debug)]
pub(super) struct TokenInfo {
    pub(super) label: String,
    pub(super) serial: String,
    pub(super) manufacturer: String,
    pub(super) model: String,
    pub(super) firmware: String,
    pub(super) max_sessions: u64,
    pub(super) max_rw_sessions: u64,
    flags: u64,
}

impl TokenInfo {
    /// No further login will be accepted.
    pub(super) const fn pin_locked(&self) -> bool {
        self.flags & CKF_USER_PIN_LOCKED != 0
    }

    /// One more wrong PIN locks the token.
    pub(super) const fn pin_final_try(&self) -> bool {
        self.flags & CKF_USER_PIN_FINAL_TRY != 0
    }

    /// The token has a user PIN at all.
    pub(super) const fn pin_initialized(&self) -> bool {
        self.flags & CKF_USER_PIN_INITIALIZED != 0
    }
}

/// The module's function list, and the library that it points into.
pub(super) struct Raw {
    list: *const CK_FUNCTION_LIST,
    /// Keeps the library loaded, for ever: what vendors' code leaves behind in threads (openCryptoki's
    /// does, and crashes when it is loaded again) must not point into nothing.
    _library: ManuallyDrop<cryptoki_sys::Pkcs11>,
}

// SAFETY: the list is a constant table of functions inside the library, which stays loaded; modules
// are initialised with CKF_OS_LOCKING_OK, so their functions may be called from any thread.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// Calls one entry of the list and names it in the failure.
macro_rules! call {
    ($raw:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: `list` points to the module's table, which lives as long as `_library`.
        let entry = unsafe { (*$raw.list).$name };
        let code: CK_RV = match entry {
            // SAFETY: pointer arguments are valid for the call: they come from live references whose
            // lengths are passed beside them.
            Some(function) => unsafe { function($($argument),*) },
            None => CKR_FUNCTION_NOT_SUPPORTED,
        };
        if code == CKR_OK { Ok(()) } else { Err(Fail { function: stringify!($name), code }) }
    }};
}

impl Raw {
    /// Loads the library and reads its function list. Initialises nothing.
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: loading runs the library's constructors; the caller checked that the operator named
        // this file and that nobody else can write it.
        let library = unsafe { cryptoki_sys::Pkcs11::new(path) }.map_err(|error| error.to_string())?;
        let Ok(entry) = &library.C_GetFunctionList else {
            return Err("not a PKCS#11 module: it does not export C_GetFunctionList".to_owned());
        };
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: `list` is a valid place for the pointer.
        let code = unsafe { entry(&raw mut list) };
        if code != CKR_OK || list.is_null() {
            return Err(format!("C_GetFunctionList failed ({code:#x})"));
        }
        Ok(Self { list, _library: ManuallyDrop::new(library) })
    }

    /// Initialises the library, with the parameters that some modules want. Already initialised is well.
    pub(super) fn initialize(&self, parameters: Option<&CStr>) -> Result<(), Fail> {
        let mut args = InitializeArgs {
            mutex_callbacks: [ptr::null(); 4],
            flags: CKF_OS_LOCKING_OK,
            parameters: parameters.map_or(ptr::null(), CStr::as_ptr),
            reserved: ptr::null(),
        };
        match call!(self, C_Initialize((&raw mut args).cast::<c_void>())) {
            Err(Fail { code: CKR_CRYPTOKI_ALREADY_INITIALIZED, .. }) => Ok(()),
            other => other,
        }
    }

    pub(super) fn token_info(&self, slot: CK_SLOT_ID) -> Result<TokenInfo, Fail> {
        // SAFETY: CK_TOKEN_INFO is plain data, for which all zeros is a valid value.
        let mut info: CK_TOKEN_INFO = unsafe { std::mem::zeroed() };
        call!(self, C_GetTokenInfo(slot, &raw mut info))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches([' ', '\0']).to_owned();
        Ok(TokenInfo {
            label: text(&info.label),
            serial: text(&info.serialNumber),
            manufacturer: text(&info.manufacturerID),
            model: text(&info.model),
            firmware: format!("{}.{}", info.firmwareVersion.major, info.firmwareVersion.minor),
            max_sessions: info.ulMaxSessionCount,
            max_rw_sessions: info.ulMaxRwSessionCount,
            flags: info.flags,
        })
    }

    /// Whether the session is there and its application logged in as user.
    pub(super) fn is_user_session(&self, session: CK_SESSION_HANDLE) -> Result<bool, Fail> {
        // SAFETY: CK_SESSION_INFO is plain data.
        let mut info: CK_SESSION_INFO = unsafe { std::mem::zeroed() };
        call!(self, C_GetSessionInfo(session, &raw mut info))?;
        Ok(matches!(info.state, CKS_RO_USER_FUNCTIONS | CKS_RW_USER_FUNCTIONS))
    }

    pub(super) fn login(&self, session: CK_SESSION_HANDLE, pin: &[u8]) -> Result<(), Fail> {
        call!(self, C_Login(session, CKU_USER, pin.as_ptr().cast_mut(), len(pin)))
    }

    /// Also logs out: login lives as long as a session of the application with that token.
    pub(super) fn close_all_sessions(&self, slot: CK_SLOT_ID) -> Result<(), Fail> {
        call!(self, C_CloseAllSessions(slot))
    }

    pub(super) fn mechanisms(&self, slot: CK_SLOT_ID) -> Result<Vec<CK_MECHANISM_TYPE>, Fail> {
        let mut count: CK_ULONG = 0;
        call!(self, C_GetMechanismList(slot, ptr::null_mut(), &raw mut count))?;
        let mut list = vec![0; usize::try_from(count).unwrap_or(0)];
        call!(self, C_GetMechanismList(slot, list.as_mut_ptr(), &raw mut count))?;
        list.truncate(usize::try_from(count).unwrap_or(0));
        Ok(list)
    }

    /// Smallest key, largest key, flags.
    pub(super) fn mechanism_info(
        &self,
        slot: CK_SLOT_ID,
        mechanism: CK_MECHANISM_TYPE,
    ) -> Result<(u64, u64, u64), Fail> {
        // SAFETY: CK_MECHANISM_INFO is plain data.
        let mut info: CK_MECHANISM_INFO = unsafe { std::mem::zeroed() };
        call!(self, C_GetMechanismInfo(slot, mechanism, &raw mut info))?;
        Ok((info.ulMinKeySize, info.ulMaxKeySize, info.flags))
    }

    /// Signs or MACs `data` and returns the length of the result in `out`.
    pub(super) fn sign(
        &self,
        session: CK_SESSION_HANDLE,
        mechanism: Mechanism<'_>,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Fail> {
        mechanism.with(|mechanism| call!(self, C_SignInit(session, mechanism, key)))?;
        let mut written = len(out);
        let input = data.as_ptr().cast_mut();
        call!(self, C_Sign(session, input, len(data), out.as_mut_ptr(), &raw mut written))?;
        within("C_Sign", written, out)
    }

    pub(super) fn encrypt(
        &self,
        session: CK_SESSION_HANDLE,
        mechanism: Mechanism<'_>,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Fail> {
        // The parameter must stay valid over both calls: a device may write its IV at either.
        mechanism.with(|mechanism| {
            call!(self, C_EncryptInit(session, mechanism, key))?;
            let mut written = len(out);
            let input = data.as_ptr().cast_mut();
            call!(self, C_Encrypt(session, input, len(data), out.as_mut_ptr(), &raw mut written))?;
            within("C_Encrypt", written, out)
        })
    }

    pub(super) fn decrypt(
        &self,
        session: CK_SESSION_HANDLE,
        mechanism: Mechanism<'_>,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Fail> {
        mechanism.with(|mechanism| {
            call!(self, C_DecryptInit(session, mechanism, key))?;
            let mut written = len(out);
            let input = data.as_ptr().cast_mut();
            call!(self, C_Decrypt(session, input, len(data), out.as_mut_ptr(), &raw mut written))?;
            within("C_Decrypt", written, out)
        })
    }

    /// Wraps the object `key` under `kek`.
    pub(super) fn wrap_key(
        &self,
        session: CK_SESSION_HANDLE,
        mechanism: CK_MECHANISM_TYPE,
        kek: CK_OBJECT_HANDLE,
        key: CK_OBJECT_HANDLE,
        out: &mut [u8],
    ) -> Result<usize, Fail> {
        let mut written = len(out);
        Mechanism::Plain(mechanism).with(|mechanism| {
            call!(self, C_WrapKey(session, mechanism, kek, key, out.as_mut_ptr(), &raw mut written))
        })?;
        within("C_WrapKey", written, out)
    }

    /// Unwraps into a new object made from `template`: pairs of attribute type and value.
    pub(super) fn unwrap_key(
        &self,
        session: CK_SESSION_HANDLE,
        mechanism: CK_MECHANISM_TYPE,
        kek: CK_OBJECT_HANDLE,
        wrapped: &[u8],
        template: &[(CK_ULONG, Vec<u8>)],
    ) -> Result<CK_OBJECT_HANDLE, Fail> {
        let mut attributes: Vec<_> = template.iter().map(|(kind, value)| attribute(*kind, value)).collect();
        let mut object: CK_OBJECT_HANDLE = 0;
        Mechanism::Plain(mechanism).with(|mechanism| {
            let (input, count) = (wrapped.as_ptr().cast_mut(), attributes.len() as CK_ULONG);
            let template = attributes.as_mut_ptr();
            call!(
                self,
                C_UnwrapKey(session, mechanism, kek, input, len(wrapped), template, count, &raw mut object)
            )
        })?;
        Ok(object)
    }

    /// Makes an object from attributes whose values stay in the caller's buffers.
    pub(super) fn create(
        &self,
        session: CK_SESSION_HANDLE,
        template: &[(CK_ULONG, &[u8])],
    ) -> Result<CK_OBJECT_HANDLE, Fail> {
        let mut attributes: Vec<_> = template.iter().map(|(kind, value)| attribute(*kind, value)).collect();
        let (count, mut object) = (attributes.len() as CK_ULONG, 0);
        call!(self, C_CreateObject(session, attributes.as_mut_ptr(), count, &raw mut object))?;
        Ok(object)
    }

    /// Makes a session object from `template` and a secret value that stays in the caller's buffer.
    pub(super) fn create_secret(
        &self,
        session: CK_SESSION_HANDLE,
        template: &[(CK_ULONG, Vec<u8>)],
        value: &[u8],
    ) -> Result<CK_OBJECT_HANDLE, Fail> {
        let mut attributes: Vec<_> = template.iter().map(|(kind, value)| attribute(*kind, value)).collect();
        attributes.push(attribute(cryptoki_sys::CKA_VALUE, value));
        let (count, mut object) = (attributes.len() as CK_ULONG, 0);
        call!(self, C_CreateObject(session, attributes.as_mut_ptr(), count, &raw mut object))?;
        Ok(object)
    }

    /// Reads `CKA_VALUE` of a readable object straight into `out`.
    pub(super) fn read_value(
        &self,
        session: CK_SESSION_HANDLE,
        object: CK_OBJECT_HANDLE,
        out: &mut [u8],
    ) -> Result<usize, Fail> {
        let mut wanted = CK_ATTRIBUTE {
            type_: cryptoki_sys::CKA_VALUE,
            pValue: out.as_mut_ptr().cast::<c_void>(),
            ulValueLen: len(out),
        };
        call!(self, C_GetAttributeValue(session, object, &raw mut wanted, 1))?;
        within("C_GetAttributeValue", wanted.ulValueLen, out)
    }

    pub(super) fn destroy(&self, session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE) -> Result<(), Fail> {
        call!(self, C_DestroyObject(session, object))
    }
}

fn attribute(kind: CK_ULONG, value: &[u8]) -> CK_ATTRIBUTE {
    CK_ATTRIBUTE {
        type_: kind,
        pValue: value.as_ptr().cast_mut().cast::<c_void>(),
        ulValueLen: value.len() as CK_ULONG,
    }
}

/// A module that claims to have written more than there is room for has lied or overrun: refuse.
fn within(function: &'static str, written: CK_ULONG, out: &[u8]) -> Result<usize, Fail> {
    match usize::try_from(written) {
        Ok(written) if written <= out.len() => Ok(written),
        _ => Err(Fail { function, code: 0 }),
    }
}
