//! PKCS#11 without a library between: the function list of a module, and sessions on it.
//!
//! For oracles that must not share code with Lacre's own backend, and for measuring what a device
//! can do at most. Include it with `#[path = "support/raw.rs"] mod raw;`. Errors are the codes.

#![allow(dead_code, reason = "every test program uses another part of it")]
#![expect(unsafe_code, reason = "PKCS#11 is a C interface")]
#![expect(clippy::cast_possible_truncation, reason = "lengths of buffers in this process")]

use std::ffi::c_void;
use std::path::Path;

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_ATTRIBUTE_TYPE, CK_C_INITIALIZE_ARGS, CK_FALSE, CK_FUNCTION_LIST, CK_GCM_PARAMS,
    CK_MECHANISM, CK_MECHANISM_TYPE, CK_OBJECT_CLASS, CK_OBJECT_HANDLE, CK_RSA_PKCS_PSS_PARAMS, CK_RV,
    CK_SESSION_HANDLE, CK_SLOT_ID, CK_TOKEN_INFO, CK_TRUE, CK_ULONG, CKA_CLASS, CKA_EC_PARAMS, CKA_ID,
    CKA_MODULUS_BITS, CKA_PUBLIC_EXPONENT, CKA_SIGN, CKA_TOKEN, CKF_OS_LOCKING_OK, CKF_RW_SESSION,
    CKF_SERIAL_SESSION, CKG_MGF1_SHA256, CKM_AES_GCM, CKM_EC_KEY_PAIR_GEN, CKM_RSA_PKCS_KEY_PAIR_GEN,
    CKM_RSA_PKCS_PSS, CKM_SHA256, CKR_CRYPTOKI_ALREADY_INITIALIZED, CKR_OK, CKR_USER_ALREADY_LOGGED_IN,
    CKU_USER,
};

/// A loaded module. It is never unloaded.
#[derive(Clone, Copy)]
pub struct Module(&'static CK_FUNCTION_LIST);

/// Calls a function through the list: not every module exports the functions by name.
macro_rules! call {
    ($list:expr, $name:ident($($arg:expr),* $(,)?)) => {{
        let function = $list.$name.expect("a module has every function of the 2.40 list");
        // SAFETY: the arguments are pointers to live values of the callers below, with their lengths.
        check(unsafe { function($($arg),*) })
    }};
}

fn check(code: CK_RV) -> Result<(), CK_RV> {
    if code == CKR_OK { Ok(()) } else { Err(code) }
}

fn len(bytes: &[u8]) -> CK_ULONG {
    bytes.len() as CK_ULONG
}

impl Module {
    /// Loads a module and initialises it, unless this process has done so already.
    pub fn load(path: &Path) -> Self {
        type GetList = unsafe extern "C" fn(*mut *mut CK_FUNCTION_LIST) -> CK_RV;
        // SAFETY: a PKCS#11 module that the test names; the symbol has the standard's type.
        let list = unsafe {
            let library = Box::leak(Box::new(libloading::Library::new(path).unwrap()));
            let get: libloading::Symbol<GetList> = library.get(b"C_GetFunctionList\0").unwrap();
            let mut list = std::ptr::null_mut();
            assert_eq!(get(&raw mut list), CKR_OK);
            &*list
        };
        let module = Self(list);
        match module.initialize() {
            Ok(()) | Err(CKR_CRYPTOKI_ALREADY_INITIALIZED) => module,
            Err(code) => panic!("C_Initialize answered {code:#x}"),
        }
    }

    fn initialize(self) -> Result<(), CK_RV> {
        let mut args = CK_C_INITIALIZE_ARGS { flags: CKF_OS_LOCKING_OK, ..Default::default() };
        call!(self.0, C_Initialize((&raw mut args).cast::<c_void>()))
    }

    /// What a slot's token says about itself.
    pub fn token_info(self, slot: CK_SLOT_ID) -> Result<CK_TOKEN_INFO, CK_RV> {
        let mut info = CK_TOKEN_INFO::default();
        call!(self.0, C_GetTokenInfo(slot, &raw mut info))?;
        Ok(info)
    }

    /// The slot whose token has that label.
    pub fn slot(self, label: &str) -> Option<CK_SLOT_ID> {
        let mut slots = [0; 64];
        let mut count = slots.len() as CK_ULONG;
        call!(self.0, C_GetSlotList(1, slots.as_mut_ptr(), &raw mut count)).ok()?;
        let mut slots = slots.into_iter().take(count as usize);
        slots.find(|slot| self.token_info(*slot).is_ok_and(|info| text(&info.label) == label))
    }

    /// Opens a session that may write.
    pub fn session(self, slot: CK_SLOT_ID) -> Result<Session, CK_RV> {
        let flags = CKF_SERIAL_SESSION | CKF_RW_SESSION;
        let mut handle = 0;
        call!(self.0, C_OpenSession(slot, flags, std::ptr::null_mut(), None, &raw mut handle))?;
        Ok(Session { list: self.0, handle })
    }
}

/// A padded field of a PKCS#11 structure as text.
pub fn text(field: &[u8]) -> &str {
    std::str::from_utf8(field).unwrap_or_default().trim_end()
}

/// An attribute of a template; `value` must outlive the call.
pub fn attribute(kind: CK_ATTRIBUTE_TYPE, value: &[u8]) -> CK_ATTRIBUTE {
    CK_ATTRIBUTE { type_: kind, pValue: value.as_ptr().cast_mut().cast(), ulValueLen: len(value) }
}

/// A mechanism without parameters.
pub fn plain(mechanism: CK_MECHANISM_TYPE) -> CK_MECHANISM {
    CK_MECHANISM { mechanism, pParameter: std::ptr::null_mut(), ulParameterLen: 0 }
}

/// PSS as PS256 has it.
pub const PSS_SHA256: CK_RSA_PKCS_PSS_PARAMS =
    CK_RSA_PKCS_PSS_PARAMS { hashAlg: CKM_SHA256, mgf: CKG_MGF1_SHA256, sLen: 32 };

/// RSASSA-PSS with parameters that outlive the mechanism.
pub fn pss_sha256(params: *mut CK_RSA_PKCS_PSS_PARAMS) -> CK_MECHANISM {
    CK_MECHANISM {
        mechanism: CKM_RSA_PKCS_PSS,
        pParameter: params.cast(),
        ulParameterLen: size_of::<CK_RSA_PKCS_PSS_PARAMS>() as CK_ULONG,
    }
}

/// A session; closed when dropped.
pub struct Session {
    list: &'static CK_FUNCTION_LIST,
    handle: CK_SESSION_HANDLE,
}

impl Drop for Session {
    fn drop(&mut self) {
        // A session that is gone already is as good as closed.
        let _ = call!(self.list, C_CloseSession(self.handle));
    }
}

impl Session {
    /// Logs the user in, for all sessions of this process.
    pub fn login(&self, pin: &str) -> Result<(), CK_RV> {
        let pin_len = len(pin.as_bytes());
        match call!(self.list, C_Login(self.handle, CKU_USER, pin.as_ptr().cast_mut(), pin_len)) {
            Err(CKR_USER_ALREADY_LOGGED_IN) => Ok(()),
            other => other,
        }
    }

    /// Makes an object.
    pub fn create(&self, template: &[CK_ATTRIBUTE]) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        let (first, count) = (template.as_ptr().cast_mut(), template.len() as CK_ULONG);
        let mut object = 0;
        call!(self.list, C_CreateObject(self.handle, first, count, &raw mut object))?;
        Ok(object)
    }

    /// Makes a secret key.
    pub fn generate(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        template: &[CK_ATTRIBUTE],
    ) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        let (first, count) = (template.as_ptr().cast_mut(), template.len() as CK_ULONG);
        let mut mechanism = plain(mechanism);
        let mut object = 0;
        call!(self.list, C_GenerateKey(self.handle, &raw mut mechanism, first, count, &raw mut object))?;
        Ok(object)
    }

    /// Makes a key pair for one session: the private half of a key on the given curve.
    pub fn generate_ec(&self, curve: &[u8]) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        let public = [attribute(CKA_EC_PARAMS, curve), attribute(CKA_TOKEN, &[CK_FALSE])];
        self.generate_pair(CKM_EC_KEY_PAIR_GEN, &public)
    }

    /// The same of RSA.
    pub fn generate_rsa(&self, bits: CK_ULONG) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        let (bits, exponent, no) = (bits.to_ne_bytes(), [1, 0, 1], [CK_FALSE]);
        let public = [
            attribute(CKA_MODULUS_BITS, &bits),
            attribute(CKA_PUBLIC_EXPONENT, &exponent),
            attribute(CKA_TOKEN, &no),
        ];
        self.generate_pair(CKM_RSA_PKCS_KEY_PAIR_GEN, &public)
    }

    fn generate_pair(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        public: &[CK_ATTRIBUTE],
    ) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        let private = [attribute(CKA_TOKEN, &[CK_FALSE]), attribute(CKA_SIGN, &[CK_TRUE])];
        let mut mechanism = plain(mechanism);
        let (mut public_key, mut private_key) = (0, 0);
        call!(
            self.list,
            C_GenerateKeyPair(
                self.handle,
                &raw mut mechanism,
                public.as_ptr().cast_mut(),
                public.len() as CK_ULONG,
                private.as_ptr().cast_mut(),
                2,
                &raw mut public_key,
                &raw mut private_key,
            )
        )?;
        Ok(private_key)
    }

    /// As [`Session::sign`], with a mechanism that has parameters.
    pub fn sign_with(
        &self,
        mut mechanism: CK_MECHANISM,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CK_RV> {
        call!(self.list, C_SignInit(self.handle, &raw mut mechanism, key))?;
        let mut out_len = len(out);
        let (data, data_len) = (data.as_ptr().cast_mut(), len(data));
        call!(self.list, C_Sign(self.handle, data, data_len, out.as_mut_ptr(), &raw mut out_len))?;
        Ok(out_len as usize)
    }

    /// Destroys an object.
    pub fn destroy(&self, object: CK_OBJECT_HANDLE) -> Result<(), CK_RV> {
        call!(self.list, C_DestroyObject(self.handle, object))
    }

    /// The only object of that class and id.
    pub fn find(&self, class: CK_OBJECT_CLASS, id: &[u8]) -> Option<CK_OBJECT_HANDLE> {
        let class = class.to_ne_bytes();
        let mut template = [attribute(CKA_CLASS, &class), attribute(CKA_ID, id)];
        call!(self.list, C_FindObjectsInit(self.handle, template.as_mut_ptr(), 2)).ok()?;
        let mut found = [0; 2];
        let mut count = 0;
        let result = call!(self.list, C_FindObjects(self.handle, found.as_mut_ptr(), 2, &raw mut count));
        call!(self.list, C_FindObjectsFinal(self.handle)).ok()?;
        (result.is_ok() && count == 1).then_some(found[0])
    }

    /// Changes attributes.
    pub fn set(&self, object: CK_OBJECT_HANDLE, template: &[CK_ATTRIBUTE]) -> Result<(), CK_RV> {
        let (first, count) = (template.as_ptr().cast_mut(), template.len() as CK_ULONG);
        call!(self.list, C_SetAttributeValue(self.handle, object, first, count))
    }

    /// An attribute's value of at most 1 KiB.
    pub fn value(&self, object: CK_OBJECT_HANDLE, kind: CK_ATTRIBUTE_TYPE) -> Result<Vec<u8>, CK_RV> {
        let mut buffer = vec![0; 1024];
        let mut wanted = attribute(kind, &buffer);
        wanted.pValue = buffer.as_mut_ptr().cast();
        call!(self.list, C_GetAttributeValue(self.handle, object, &raw mut wanted, 1))?;
        buffer.truncate(wanted.ulValueLen as usize);
        Ok(buffer)
    }

    /// One signature or MAC: `C_SignInit` and `C_Sign`, into `out`. Gives the length.
    pub fn sign(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CK_RV> {
        self.sign_with(plain(mechanism), key, data, out)
    }

    /// Whether the token takes a signature: `C_VerifyInit` and `C_Verify`.
    pub fn verify(
        &self,
        mut mechanism: CK_MECHANISM,
        key: CK_OBJECT_HANDLE,
        data: &[u8],
        signature: &[u8],
    ) -> Result<(), CK_RV> {
        call!(self.list, C_VerifyInit(self.handle, &raw mut mechanism, key))?;
        let (input, input_len) = (data.as_ptr().cast_mut(), len(data));
        call!(
            self.list,
            C_Verify(self.handle, input, input_len, signature.as_ptr().cast_mut(), len(signature))
        )
    }

    /// `C_Sign` where no operation was begun: a refusal.
    pub fn sign_without_init(&self) -> Result<(), CK_RV> {
        let (mut data, mut out, mut out_len) = ([0; 32], [0; 64], 64);
        call!(self.list, C_Sign(self.handle, data.as_mut_ptr(), 32, out.as_mut_ptr(), &raw mut out_len))
    }

    /// Opens AES-GCM: `C_DecryptInit` and `C_Decrypt`, into `out`. Gives the length.
    pub fn gcm_open(
        &self,
        key: CK_OBJECT_HANDLE,
        iv: &[u8],
        aad: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CK_RV> {
        let mut iv = iv.to_vec();
        let mut params = gcm_params(&mut iv, aad);
        let mut mechanism = gcm(&mut params);
        call!(self.list, C_DecryptInit(self.handle, &raw mut mechanism, key))?;
        let mut out_len = len(out);
        let (sealed, sealed_len) = (sealed.as_ptr().cast_mut(), len(sealed));
        call!(self.list, C_Decrypt(self.handle, sealed, sealed_len, out.as_mut_ptr(), &raw mut out_len))?;
        Ok(out_len as usize)
    }

    /// Seals with AES-GCM; `iv` is what the device says that it used.
    pub fn gcm_seal(
        &self,
        key: CK_OBJECT_HANDLE,
        iv: &mut [u8],
        aad: &[u8],
        plain: &[u8],
    ) -> Result<Vec<u8>, CK_RV> {
        let mut params = gcm_params(iv, aad);
        let mut mechanism = gcm(&mut params);
        call!(self.list, C_EncryptInit(self.handle, &raw mut mechanism, key))?;
        let mut out = vec![0; plain.len() + 16];
        let mut out_len = len(&out);
        let (plain, plain_len) = (plain.as_ptr().cast_mut(), len(plain));
        call!(self.list, C_Encrypt(self.handle, plain, plain_len, out.as_mut_ptr(), &raw mut out_len))?;
        out.truncate(out_len as usize);
        Ok(out)
    }

    /// Unwraps a key into a new object.
    pub fn unwrap(
        &self,
        mechanism: CK_MECHANISM_TYPE,
        key: CK_OBJECT_HANDLE,
        wrapped: &[u8],
        template: &[CK_ATTRIBUTE],
    ) -> Result<CK_OBJECT_HANDLE, CK_RV> {
        let mut mechanism = plain(mechanism);
        let (wrapped, wrapped_len) = (wrapped.as_ptr().cast_mut(), len(wrapped));
        let (first, count) = (template.as_ptr().cast_mut(), template.len() as CK_ULONG);
        let mut object = 0;
        let (m, out) = (&raw mut mechanism, &raw mut object);
        call!(self.list, C_UnwrapKey(self.handle, m, key, wrapped, wrapped_len, first, count, out))?;
        Ok(object)
    }
}

fn gcm_params(iv: &mut [u8], aad: &[u8]) -> CK_GCM_PARAMS {
    CK_GCM_PARAMS {
        pIv: iv.as_mut_ptr(),
        ulIvLen: len(iv),
        ulIvBits: len(iv) * 8,
        pAAD: aad.as_ptr().cast_mut(),
        ulAADLen: len(aad),
        ulTagBits: 128,
    }
}

fn gcm(params: &mut CK_GCM_PARAMS) -> CK_MECHANISM {
    CK_MECHANISM {
        mechanism: CKM_AES_GCM,
        pParameter: (&raw mut *params).cast(),
        ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
    }
}
