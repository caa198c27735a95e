//! How DEKs are wrapped, and how that is chosen: known answers decide, names do not (hsm.md 4.7).
//!
//! For each candidate a session key of known value is imported with the KEK's roles, used once, and
//! compared with software byte for byte. Where a device refuses the import, its mechanism list counts,
//! and the checks on the real KEK (round trip, wrong AAD, flipped bit, exact length) must hold anyway.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use cryptoki_sys::{
    CK_OBJECT_HANDLE, CK_SESSION_HANDLE, CK_ULONG, CKA_CLASS, CKA_DECRYPT, CKA_ENCRYPT, CKA_EXTRACTABLE,
    CKA_KEY_TYPE, CKA_PRIVATE, CKA_SENSITIVE, CKA_TOKEN, CKA_UNWRAP, CKA_VALUE_LEN, CKA_WRAP, CKF_DECRYPT,
    CKF_ENCRYPT, CKF_UNWRAP, CKF_WRAP, CKK_AES, CKK_GENERIC_SECRET, CKM_AES_GCM, CKM_AES_KEY_WRAP,
    CKO_SECRET_KEY, CKR_FUNCTION_FAILED, CKR_GENERAL_ERROR,
};
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

use crate::seal::backend::BackendError;
use crate::seal::envelope::DEK_LEN;
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{WrapMechanism, WrappedDek};
use crate::seal::pkcs11::GcmIv;
use crate::seal::pkcs11::error::from_unwrap;
use crate::seal::pkcs11::raw::{Fail, Mechanism, Raw};
use crate::seal::pkcs11::token::{Entered, Token};

/// Order of preference (hsm.md section 1).
const CANDIDATES: [WrapMechanism; 3] =
    [WrapMechanism::AesGcm, WrapMechanism::AesKw, WrapMechanism::AesKwObject];

/// The fault of a device that was to make the IV and did not.
pub(super) const NO_DEVICE_IV: &str = "device IV";

/// A wrapping key on the token, ready for one call.
pub(super) struct Wrapper<'a> {
    pub(super) token: &'a Token,
    pub(super) session: CK_SESSION_HANDLE,
    pub(super) kek: CK_OBJECT_HANDLE,
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
        let (iv_len, len) = mechanism.lengths();
        let mut bytes = vec![0; len];
        let mut iv = [0; 12];
        let written = match mechanism {
            WrapMechanism::AesGcm => {
                let device_iv = self.token.selection.gcm_iv == GcmIv::Device;
                if !device_iv {
                    getrandom::fill(&mut iv).map_err(|_| own_fault("getrandom"))?;
                }
                let gcm = Mechanism::Gcm { iv: &mut iv, aad };
                let written =
                    dek.with(|dek| self.raw().encrypt(self.session, gcm, self.kek, dek, &mut bytes))?;
                // A device that was to make the IV and did not would repeat it: refuse.
                if device_iv && iv == [0; 12] {
                    return Err(own_fault(NO_DEVICE_IV));
                }
                written
            }
            WrapMechanism::AesKw => {
                let bound = self.bind(dek, aad)?;
                let plain = Mechanism::Plain(CKM_AES_KEY_WRAP);
                bound.with(|bound| self.raw().encrypt(self.session, plain, self.kek, bound, &mut bytes))?
            }
            WrapMechanism::AesKwObject => self.wrap_object(dek, aad, &mut bytes)?,
            WrapMechanism::TpmSeal => return Err(own_fault("another kind of device")),
        };
        if written != len {
            return Err(own_fault("length of a wrapped key"));
        }
        Ok(WrappedDek { mechanism, iv: iv[..iv_len].to_vec(), bytes })
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
        let bytes = wrapped.bytes.as_slice();
        let read = match wrapped.mechanism {
            WrapMechanism::AesGcm => {
                let mut iv: [u8; 12] =
                    wrapped.iv.as_slice().try_into().map_err(|_| own_fault("IV length"))?;
                let gcm = Mechanism::Gcm { iv: &mut iv, aad };
                out.with_mut(|out| self.raw().decrypt(self.session, gcm, self.kek, bytes, out))
            }
            WrapMechanism::AesKw => {
                let plain = Mechanism::Plain(CKM_AES_KEY_WRAP);
                out.with_mut(|out| self.raw().decrypt(self.session, plain, self.kek, bytes, out))
            }
            WrapMechanism::AesKwObject => self.unwrap_object(bytes, out),
            WrapMechanism::TpmSeal => return Err(own_fault("another kind of device")),
        }
        .map_err(from_unwrap)?;
        match wrapped.mechanism {
            WrapMechanism::AesGcm if read == DEK_LEN => Ok(()),
            WrapMechanism::AesKw | WrapMechanism::AesKwObject if read == DEK_LEN + 32 => {
                check_bound(out, aad)
            }
            _ => Err(BackendError::Rejected { function: "unwrapped length", code: 0 }),
        }
    }

    /// `DEK || SHA-256(AAD)`: key wrap has no associated data of its own.
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

    /// The object lives inside the module for one call and is destroyed on every path.
    fn wrap_object(&self, dek: &SecretBuf, aad: &[u8], out: &mut [u8]) -> Result<usize, BackendError> {
        let bound = self.bind(dek, aad)?;
        let object = bound.with(|bound| self.raw().create_secret(self.session, &carrier(), bound))?;
        let wrapped = self.raw().wrap_key(self.session, CKM_AES_KEY_WRAP, self.kek, object, out);
        self.raw().destroy(self.session, object)?;
        Ok(wrapped?)
    }

    fn unwrap_object(&self, wrapped: &[u8], out: &mut SecretBuf) -> Result<usize, Fail> {
        let raw = self.raw();
        let mut template = carrier();
        template.push((CKA_VALUE_LEN, ulong(64)));
        let object = match raw.unwrap_key(self.session, CKM_AES_KEY_WRAP, self.kek, wrapped, &template) {
            // Some modules take the length from the wrapped bytes and refuse to be told.
            Err(fail)
                if fail.code == cryptoki_sys::CKR_TEMPLATE_INCONSISTENT
                    || fail.code == cryptoki_sys::CKR_ATTRIBUTE_READ_ONLY =>
            {
                raw.unwrap_key(self.session, CKM_AES_KEY_WRAP, self.kek, wrapped, &carrier())?
            }
            other => other?,
        };
        let read = out.with_mut(|out| raw.read_value(self.session, object, out));
        raw.destroy(self.session, object)?;
        read
    }
}

fn own_fault(function: &'static str) -> BackendError {
    BackendError::Refused { function, code: 0 }
}

fn check_bound(out: &SecretBuf, aad: &[u8]) -> Result<(), BackendError> {
    use subtle::ConstantTimeEq;
    let expected = Sha256::digest(aad);
    let same = out.with(|out| out[DEK_LEN..DEK_LEN + 32].ct_eq(&expected));
    if bool::from(same) { Ok(()) } else { Err(BackendError::Rejected { function: "bound context", code: 0 }) }
}

fn ulong(value: CK_ULONG) -> Vec<u8> {
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

/// The mechanism for new KEKs: configured, or the first candidate that gives the known answer.
pub(super) fn choose(
    token: &Token,
    entered: &Entered<'_>,
    session: CK_SESSION_HANDLE,
) -> Result<WrapMechanism, BackendError> {
    if let Some(configured) = token.selection.wrap {
        return Ok(configured);
    }
    let mut chosen = token.wrap_choice.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(known) = *chosen {
        return Ok(known);
    }
    for candidate in CANDIDATES {
        if works(token, entered, session, candidate)? {
            *chosen = Some(candidate);
            return Ok(candidate);
        }
    }
    Err(BackendError::Unfit("the token offers no mechanism that can wrap data keys".to_owned()))
}

/// The known answer, or, where a key of known value cannot be imported, what the token claims.
pub(super) fn works(
    token: &Token,
    entered: &Entered<'_>,
    session: CK_SESSION_HANDLE,
    candidate: WrapMechanism,
) -> Result<bool, BackendError> {
    let roles: [CK_ULONG; 2] = match candidate {
        WrapMechanism::AesGcm | WrapMechanism::AesKw => [CKA_ENCRYPT, CKA_DECRYPT],
        WrapMechanism::AesKwObject => [CKA_WRAP, CKA_UNWRAP],
        WrapMechanism::TpmSeal => return Ok(false),
    };
    let mut template = vec![
        (CKA_CLASS, ulong(CKO_SECRET_KEY)),
        (CKA_KEY_TYPE, ulong(CKK_AES)),
        (CKA_TOKEN, vec![0]),
        (CKA_PRIVATE, vec![1]),
    ];
    template.extend(roles.map(|role| (role, vec![1])));
    let mut answer = probe(token, entered, session, candidate, &template);
    if answer.as_ref().is_err_and(|error| verdict(error) == Verdict::Unclear) {
        answer = probe(token, entered, session, candidate, &template);
    }
    match answer {
        Ok(works) => Ok(works),
        Err(error) => match verdict(&error) {
            Verdict::Elsewhere => Err(error),
            Verdict::Unclear if !token.is_present(entered) => Err(error),
            Verdict::Unclear if matches!(error, BackendError::Away { function: "C_CreateObject", .. }) => {
                claims(token, entered, candidate)
            }
            Verdict::Unclear | Verdict::Unable => Ok(false),
        },
    }
}

/// What a failed probe says about the mechanism.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The device is well and does not do it.
    Unable,
    /// One of the two codes that some modules use for everything: twice, of a token that is there, it
    /// means no.
    Unclear,
    /// Something else went wrong. A KEK keeps the mechanism it was made with, so nothing is concluded.
    Elsewhere,
}

fn verdict(error: &BackendError) -> Verdict {
    match error {
        BackendError::Refused { function: "guarded memory", .. } => Verdict::Elsewhere,
        BackendError::Away { code: CKR_GENERAL_ERROR | CKR_FUNCTION_FAILED, .. }
        | BackendError::Rejected { code: CKR_GENERAL_ERROR | CKR_FUNCTION_FAILED, .. } => Verdict::Unclear,
        BackendError::Rejected { .. } | BackendError::Refused { .. } => Verdict::Unable,
        _ => Verdict::Elsewhere,
    }
}

fn probe(
    token: &Token,
    entered: &Entered<'_>,
    session: CK_SESSION_HANDLE,
    candidate: WrapMechanism,
    template: &[(CK_ULONG, Vec<u8>)],
) -> Result<bool, BackendError> {
    let known_key = [0x42; 32];
    let kek = match token.raw.create_secret(session, template, &known_key).map_err(BackendError::from) {
        Ok(kek) => kek,
        Err(error) if verdict(&error) == Verdict::Unable => return claims(token, entered, candidate),
        Err(error) => return Err(error),
    };
    let answer = known_answer(&Wrapper { token, session, kek }, candidate, &known_key);
    token.raw.destroy(session, kek)?;
    answer
}

/// Wraps in the device and opens in software, then the other way round.
fn known_answer(
    wrapper: &Wrapper<'_>,
    candidate: WrapMechanism,
    key: &[u8; 32],
) -> Result<bool, BackendError> {
    let aad = b"lacre/probe/v1";
    let mut dek = wrapper.token.buffer(DEK_LEN)?;
    dek.with_mut(|dek| dek.copy_from_slice(&Sha256::digest(b"lacre probe")));
    let wrapped = wrapper.wrap(candidate, &dek, aad)?;
    let expected = dek.with(|dek| software_wrap(candidate, key, &wrapped.iv, dek, aad));
    if expected.as_deref() != Some(wrapped.bytes.as_slice()) {
        return Ok(false);
    }
    let mut back = wrapper.token.buffer(crate::seal::envelope::DEK_SLOT_LEN)?;
    wrapper.unwrap(&wrapped, aad, &mut back)?;
    Ok(back.with(|back| dek.with(|dek| back == dek)))
}

fn software_wrap(
    mechanism: WrapMechanism,
    key: &[u8; 32],
    iv: &[u8],
    dek: &[u8],
    aad: &[u8],
) -> Option<Vec<u8>> {
    if mechanism == WrapMechanism::AesGcm {
        let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).ok()?);
        let nonce = Nonce::assume_unique_for_key(iv.try_into().ok()?);
        let mut bytes = dek.to_vec();
        cipher.seal_in_place_append_tag(nonce, Aad::from(aad), &mut bytes).ok()?;
        return Some(bytes);
    }
    let mut bound = dek.to_vec();
    bound.extend_from_slice(&Sha256::digest(aad));
    let mut out = vec![0; bound.len() + 8];
    let kek = AesKek::new(&AES_256, key).ok()?;
    let written = kek.wrap(&bound, &mut out).ok()?.len();
    out.truncate(written);
    Some(out)
}

fn claims(token: &Token, entered: &Entered<'_>, candidate: WrapMechanism) -> Result<bool, BackendError> {
    let (mechanism, wanted) = match candidate {
        WrapMechanism::AesGcm => (CKM_AES_GCM, CKF_ENCRYPT | CKF_DECRYPT),
        WrapMechanism::AesKw => (CKM_AES_KEY_WRAP, CKF_ENCRYPT | CKF_DECRYPT),
        WrapMechanism::AesKwObject => (CKM_AES_KEY_WRAP, CKF_WRAP | CKF_UNWRAP),
        WrapMechanism::TpmSeal => return Ok(false),
    };
    match token.raw.mechanism_info(entered.loaded().slot.id(), mechanism).map_err(BackendError::from) {
        Ok((_, _, flags)) => Ok(flags & wanted == wanted),
        // The list does not have it.
        Err(error) if verdict(&error) == Verdict::Unable => Ok(false),
        Err(error) => Err(error),
    }
}
