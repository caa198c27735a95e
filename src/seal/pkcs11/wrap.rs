//! How DEKs are wrapped: one call into the device for each of the mechanisms with associated data or
//! integrity of its own, two for those that have neither.
//!
//! AES-GCM takes the wrap's AAD. All others wrap `DEK || SHA-256(AAD)`. RSA-OAEP and AES-CBC
//! authenticate nothing (anybody can encrypt with a public key), so an HMAC by a key beside the KEK
//! covers AAD, IV and ciphertext; it is checked first, and the device decrypts only what it vouched for.

use cryptoki_sys::{
    CK_SESSION_HANDLE, CK_ULONG, CKA_CLASS, CKA_EXTRACTABLE, CKA_KEY_TYPE, CKA_PRIVATE, CKA_SENSITIVE,
    CKA_TOKEN, CKA_VALUE_LEN, CKK_GENERIC_SECRET, CKM_AES_KEY_WRAP, CKM_SHA256_HMAC, CKO_SECRET_KEY,
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use crate::seal::backend::BackendError;
use crate::seal::envelope::DEK_LEN;
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{WrapMechanism, WrappedDek};
use crate::seal::pkcs11::GcmIv;
use crate::seal::pkcs11::error::from_unwrap;
use crate::seal::pkcs11::objects::Handles;
use crate::seal::pkcs11::raw::{Fail, Mechanism, Raw};
use crate::seal::pkcs11::token::Token;

/// RFC 5649 by its number of PKCS#11 3.0. Never 0x210A: two modules have two formats under it.
pub(super) const CKM_AES_KEY_WRAP_KWP: CK_ULONG = 0x210B;

/// The fault of a device that was to make the IV and did not.
pub(super) const NO_DEVICE_IV: &str = "device IV";

const TAG_LABEL: &[u8] = b"lacre/sealed/v1/tag";
const TAG_LEN: usize = WrapMechanism::TAG_LEN;

/// A wrapping key on the token, ready for one call.
pub(super) struct Wrapper<'a> {
    pub(super) token: &'a Token,
    pub(super) session: CK_SESSION_HANDLE,
    pub(super) keys: Handles,
}

impl Wrapper<'_> {
    fn raw(&self) -> &Raw {
        &self.token.raw
    }

    pub(super) fn wrap(
        &self,
        mechanism: WrapMechanism,
        dek: &SecretBuf,
        aad: &[u8],
    ) -> Result<WrappedDek, BackendError> {
        if mechanism == WrapMechanism::TpmSeal {
            return Err(own_fault("another kind of device"));
        }
        let (iv_len, len) = mechanism.lengths();
        let mut bytes = vec![0; len];
        let mut iv = [0; 16];
        let written = if mechanism == WrapMechanism::AesGcm {
            self.wrap_gcm(dek, aad, &mut iv, &mut bytes)?
        } else {
            getrandom::fill(&mut iv[..iv_len]).map_err(|_| own_fault("getrandom"))?;
            let bound = self.bind(dek, aad)?;
            match plain(mechanism, &iv) {
                Some(plain) => bound.with(|bound| {
                    self.raw().encrypt(self.session, plain, self.keys.public, bound, &mut bytes)
                })?,
                None => self.wrap_object(&bound, &mut bytes)?,
            }
        };
        let iv = iv[..iv_len].to_vec();
        let expected = if mechanism.has_tag() { len - TAG_LEN } else { len };
        if written != expected {
            return Err(own_fault("length of a wrapped key"));
        }
        if mechanism.has_tag() {
            let tag = self.tag(aad, &iv, &bytes[..written])?;
            bytes[written..].copy_from_slice(&tag);
        }
        Ok(WrappedDek { mechanism, iv, bytes })
    }

    fn wrap_gcm(
        &self,
        dek: &SecretBuf,
        aad: &[u8],
        iv_out: &mut [u8; 16],
        bytes: &mut [u8],
    ) -> Result<usize, BackendError> {
        let mut iv = [0; 12];
        let device_iv = self.token.selection.gcm_iv == GcmIv::Device;
        if !device_iv {
            getrandom::fill(&mut iv).map_err(|_| own_fault("getrandom"))?;
        }
        let gcm = Mechanism::Gcm { iv: &mut iv, aad };
        let written = dek.with(|dek| self.raw().encrypt(self.session, gcm, self.keys.main, dek, bytes))?;
        // A device that was to make the IV and did not would repeat it: refuse.
        if device_iv && iv == [0; 12] {
            return Err(own_fault(NO_DEVICE_IV));
        }
        iv_out[..12].copy_from_slice(&iv);
        Ok(written)
    }

    /// Leaves the DEK in `out`, or `out` wiped at its old length (so that the call can be repeated)
    /// after an error: some modules write before they check.
    pub(super) fn unwrap(
        &self,
        wrapped: &WrappedDek,
        aad: &[u8],
        out: &mut SecretBuf,
    ) -> Result<(), BackendError> {
        let result = self.unwrap_into(wrapped, aad, out);
        match result {
            Ok(()) => out.truncate(DEK_LEN),
            Err(_) => out.with_mut(Zeroize::zeroize),
        }
        result
    }

    fn unwrap_into(&self, wrapped: &WrappedDek, aad: &[u8], out: &mut SecretBuf) -> Result<(), BackendError> {
        if wrapped.mechanism == WrapMechanism::TpmSeal {
            return Err(own_fault("another kind of device"));
        }
        let bytes = wrapped.bytes.as_slice();
        if wrapped.mechanism == WrapMechanism::AesGcm {
            let mut iv: [u8; 12] = wrapped.iv.as_slice().try_into().map_err(|_| own_fault("IV length"))?;
            let gcm = Mechanism::Gcm { iv: &mut iv, aad };
            let read = out
                .with_mut(|out| self.raw().decrypt(self.session, gcm, self.keys.main, bytes, out))
                .map_err(from_unwrap)?;
            return if read == DEK_LEN { Ok(()) } else { Err(rejected("unwrapped length")) };
        }
        let mut iv = [0; 16];
        let iv_place = iv.get_mut(..wrapped.iv.len()).ok_or_else(|| own_fault("IV length"))?;
        iv_place.copy_from_slice(&wrapped.iv);
        let encrypted = if wrapped.mechanism.has_tag() { self.checked(wrapped, aad)? } else { bytes };
        let read = match plain(wrapped.mechanism, &iv) {
            Some(plain) => {
                out.with_mut(|out| self.raw().decrypt(self.session, plain, self.keys.main, encrypted, out))
            }
            None => self.unwrap_object(encrypted, out),
        }
        .map_err(from_unwrap)?;
        if read == DEK_LEN + 32 { check_bound(out, aad) } else { Err(rejected("unwrapped length")) }
    }

    /// `DEK || SHA-256(AAD)`: these mechanisms have no associated data of their own.
    fn bind(&self, dek: &SecretBuf, aad: &[u8]) -> Result<SecretBuf, BackendError> {
        let mut bound = self.token.buffer(DEK_LEN + 32)?;
        dek.with(|dek| {
            bound.with_mut(|bound| {
                bound[..DEK_LEN].copy_from_slice(dek);
                bound[DEK_LEN..].copy_from_slice(&Sha256::digest(aad));
            });
        });
        Ok(bound)
    }

    fn tag(&self, aad: &[u8], iv: &[u8], encrypted: &[u8]) -> Result<[u8; TAG_LEN], BackendError> {
        let mut tag = [0; TAG_LEN];
        let (hmac, message) = (Mechanism::Plain(CKM_SHA256_HMAC), tagged(aad, iv, encrypted));
        let written = self.raw().sign(self.session, hmac, self.keys.mac, &message, &mut tag)?;
        if written == TAG_LEN { Ok(tag) } else { Err(own_fault("length of a tag")) }
    }

    /// The ciphertext, after its tag was found right.
    fn checked<'a>(&self, wrapped: &'a WrappedDek, aad: &[u8]) -> Result<&'a [u8], BackendError> {
        let split = wrapped.bytes.len().checked_sub(TAG_LEN).ok_or_else(|| rejected("tag length"))?;
        let (encrypted, tag) = wrapped.bytes.split_at(split);
        let expected = self.tag(aad, &wrapped.iv, encrypted)?;
        if bool::from(expected.ct_eq(tag)) { Ok(encrypted) } else { Err(rejected("tag")) }
    }

    /// The object lives inside the module for one call and is destroyed on every path.
    fn wrap_object(&self, bound: &SecretBuf, out: &mut [u8]) -> Result<usize, BackendError> {
        let object = bound.with(|bound| self.raw().create_secret(self.session, &carrier(), bound))?;
        let wrapped = self.raw().wrap_key(self.session, CKM_AES_KEY_WRAP, self.keys.main, object, out);
        self.raw().destroy(self.session, object)?;
        Ok(wrapped?)
    }

    fn unwrap_object(&self, wrapped: &[u8], out: &mut SecretBuf) -> Result<usize, Fail> {
        let raw = self.raw();
        let mut template = carrier();
        template.push((CKA_VALUE_LEN, ulong(64)));
        let object = match raw.unwrap_key(self.session, CKM_AES_KEY_WRAP, self.keys.main, wrapped, &template)
        {
            // Some modules take the length from the wrapped bytes and refuse to be told.
            Err(fail)
                if fail.code == cryptoki_sys::CKR_TEMPLATE_INCONSISTENT
                    || fail.code == cryptoki_sys::CKR_ATTRIBUTE_READ_ONLY =>
            {
                raw.unwrap_key(self.session, CKM_AES_KEY_WRAP, self.keys.main, wrapped, &carrier())?
            }
            other => other?,
        };
        let read = out.with_mut(|out| raw.read_value(self.session, object, out));
        raw.destroy(self.session, object)?;
        read
    }
}

/// The call's mechanism for `C_Encrypt` and `C_Decrypt`. `None` where only `C_WrapKey` does it; AES-GCM,
/// which takes AAD, is not here.
fn plain(mechanism: WrapMechanism, iv: &[u8; 16]) -> Option<Mechanism<'_>> {
    Some(match mechanism {
        WrapMechanism::AesGcm | WrapMechanism::AesKwObject | WrapMechanism::TpmSeal => return None,
        WrapMechanism::AesKw => Mechanism::Plain(CKM_AES_KEY_WRAP),
        WrapMechanism::AesKwp => Mechanism::Plain(CKM_AES_KEY_WRAP_KWP),
        WrapMechanism::RsaOaep256 => Mechanism::OaepSha256,
        WrapMechanism::RsaOaep1 => Mechanism::OaepSha1,
        WrapMechanism::AesCbc => Mechanism::CbcPad { iv },
    })
}

/// What a tag is made over: label, AAD, IV and ciphertext, each with its length in front.
pub(super) fn tagged(aad: &[u8], iv: &[u8], encrypted: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(640);
    for part in [TAG_LABEL, aad, iv, encrypted] {
        // All of them are far below 4 GiB.
        message.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        message.extend_from_slice(part);
    }
    message
}

fn own_fault(function: &'static str) -> BackendError {
    BackendError::Refused { function, code: 0 }
}

fn rejected(function: &'static str) -> BackendError {
    BackendError::Rejected { function, code: 0 }
}

fn check_bound(out: &SecretBuf, aad: &[u8]) -> Result<(), BackendError> {
    let expected = Sha256::digest(aad);
    let same = out.with(|out| out[DEK_LEN..DEK_LEN + 32].ct_eq(&expected));
    if bool::from(same) { Ok(()) } else { Err(rejected("bound context")) }
}

pub(super) fn ulong(value: CK_ULONG) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

/// A readable session object that carries `DEK || hash` through `C_WrapKey` and `C_UnwrapKey`.
fn carrier() -> Vec<(CK_ULONG, Vec<u8>)> {
    vec![
        (CKA_CLASS, ulong(CKO_SECRET_KEY)),
        (CKA_KEY_TYPE, ulong(CKK_GENERIC_SECRET)),
        (CKA_TOKEN, vec![0]),
        (CKA_PRIVATE, vec![1]),
        (CKA_SENSITIVE, vec![0]),
        (CKA_EXTRACTABLE, vec![1]),
    ]
}
