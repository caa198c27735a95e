//! How a token's KEKs will wrap: known answers decide, names do not (hsm.md 4.7).
//!
//! For each candidate a session key of known value is imported with the KEK's roles, used once, and
//! compared with software byte for byte. An RSA key is made by the token instead, and has to decrypt
//! what software encrypted. Where a device refuses the import, its mechanism list counts, and the checks
//! on the real KEK (round trip, wrong AAD, flipped bit, exact length) must hold anyway.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{EncryptionContext, PaddedBlockEncryptingKey, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap, KeyWrapPadded};
use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey,
    PublicKeyComponents,
};
use cryptoki::mechanism::Mechanism as KeyGen;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::Session as RawSession;
use cryptoki::types::Ulong;
use cryptoki_sys::{
    CK_OBJECT_HANDLE, CK_ULONG, CKA_CLASS, CKA_DECRYPT, CKA_ENCRYPT, CKA_KEY_TYPE, CKA_PRIVATE, CKA_SIGN,
    CKA_TOKEN, CKA_UNWRAP, CKA_WRAP, CKF_DECRYPT, CKF_ENCRYPT, CKF_UNWRAP, CKF_WRAP, CKK_AES,
    CKK_GENERIC_SECRET, CKM_AES_CBC_PAD, CKM_AES_GCM, CKM_AES_KEY_WRAP, CKM_RSA_PKCS_OAEP, CKO_SECRET_KEY,
    CKR_FUNCTION_FAILED, CKR_GENERAL_ERROR,
};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::seal::backend::BackendError;
use crate::seal::envelope::{DEK_LEN, DEK_SLOT_LEN};
use crate::seal::key::{WrapMechanism, WrappedDek};
use crate::seal::pkcs11::error::fail;
use crate::seal::pkcs11::objects::Handles;
use crate::seal::pkcs11::token::{Entered, Token};
use crate::seal::pkcs11::wrap::{CKM_AES_KEY_WRAP_KWP, Wrapper, tagged, ulong};

const KNOWN_KEY: [u8; 32] = [0x42; 32];
const KNOWN_MAC_KEY: [u8; 32] = [0x24; 32];
const AAD: &[u8] = b"lacre/probe/v1";

/// The mechanism for new KEKs: configured, or the first candidate that gives the known answer.
pub(super) fn choose(
    token: &Token,
    entered: &Entered<'_>,
    session: &RawSession,
) -> Result<WrapMechanism, BackendError> {
    if let Some(configured) = token.selection.wrap {
        return Ok(configured);
    }
    let mut chosen = token.wrap_choice.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(known) = *chosen {
        return Ok(known);
    }
    for candidate in WrapMechanism::PREFERENCE {
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
    session: &RawSession,
    candidate: WrapMechanism,
) -> Result<bool, BackendError> {
    let mut answer = probe(token, entered, session, candidate);
    if answer.as_ref().is_err_and(|error| verdict(error) == Verdict::Unclear) {
        answer = probe(token, entered, session, candidate);
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
    session: &RawSession,
    candidate: WrapMechanism,
) -> Result<bool, BackendError> {
    let mut made = Vec::new();
    let answer = match keys(token, session, candidate, &mut made) {
        Ok((keys, public)) => {
            let wrapper = Wrapper { token, session: session.handle(), keys };
            known_answer(&wrapper, candidate, public.as_ref())
        }
        // A device that imports nothing may wrap all the same.
        Err(error @ BackendError::Refused { function: "C_CreateObject", .. })
            if verdict(&error) == Verdict::Unable =>
        {
            claims(token, entered, candidate)
        }
        Err(error) => Err(error),
    };
    for object in made {
        token.raw.destroy(session.handle(), object)?;
    }
    answer
}

/// The session keys of a probe; `made` has what is to be destroyed, also after an error.
fn keys(
    token: &Token,
    session: &RawSession,
    candidate: WrapMechanism,
    made: &mut Vec<CK_OBJECT_HANDLE>,
) -> Result<(Handles, Option<Numbers>), BackendError> {
    let mac = if candidate.has_tag() {
        Some(import(token, session, made, CKK_GENERIC_SECRET, &[CKA_SIGN])?)
    } else {
        None
    };
    if candidate.is_rsa() {
        let (public, private) = rsa_pair(session)?;
        made.extend([public.handle(), private.handle()]);
        let keys = Handles {
            main: private.handle(),
            public: public.handle(),
            mac: mac.unwrap_or_else(|| private.handle()),
        };
        return Ok((keys, Some(numbers(session, public)?)));
    }
    let roles = match candidate {
        WrapMechanism::AesKwObject => [CKA_WRAP, CKA_UNWRAP],
        _ => [CKA_ENCRYPT, CKA_DECRYPT],
    };
    let main = import(token, session, made, CKK_AES, &roles)?;
    Ok((Handles { main, public: main, mac: mac.unwrap_or(main) }, None))
}

fn import(
    token: &Token,
    session: &RawSession,
    made: &mut Vec<CK_OBJECT_HANDLE>,
    kind: CK_ULONG,
    roles: &[CK_ULONG],
) -> Result<CK_OBJECT_HANDLE, BackendError> {
    let mut template = vec![
        (CKA_CLASS, ulong(CKO_SECRET_KEY)),
        (CKA_KEY_TYPE, ulong(kind)),
        (CKA_TOKEN, vec![0]),
        (CKA_PRIVATE, vec![1]),
    ];
    template.extend(roles.iter().map(|role| (*role, vec![1])));
    let value = if kind == CKK_AES { &KNOWN_KEY } else { &KNOWN_MAC_KEY };
    let object = token.raw.create_secret(session.handle(), &template, value)?;
    made.push(object);
    Ok(object)
}

fn rsa_pair(session: &RawSession) -> Result<(ObjectHandle, ObjectHandle), BackendError> {
    let public = [
        Attribute::Token(false),
        Attribute::ModulusBits(Ulong::new(u64::from(WrapMechanism::RSA_BITS))),
        Attribute::PublicExponent(vec![1, 0, 1]),
        Attribute::Encrypt(true),
    ];
    let private = [Attribute::Token(false), Attribute::Private(true), Attribute::Decrypt(true)];
    session
        .generate_key_pair(&KeyGen::RsaPkcsKeyPairGen, &public, &private)
        .map_err(|error| fail("C_GenerateKeyPair", &error).into())
}

/// Modulus and exponent.
type Numbers = PublicKeyComponents<Vec<u8>>;

fn numbers(session: &RawSession, public: ObjectHandle) -> Result<Numbers, BackendError> {
    let found = session
        .get_attributes(public, &[AttributeType::Modulus, AttributeType::PublicExponent])
        .map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))?;
    let mut numbers = PublicKeyComponents { n: Vec::new(), e: Vec::new() };
    for attribute in found {
        match attribute {
            Attribute::Modulus(n) => numbers.n = n,
            Attribute::PublicExponent(e) => numbers.e = e,
            _ => {}
        }
    }
    // aws-lc takes no leading zeros.
    for number in [&mut numbers.n, &mut numbers.e] {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        number.drain(..zeros);
    }
    Ok(numbers)
}

/// Wraps in the device and opens in software, then the other way round.
fn known_answer(
    wrapper: &Wrapper<'_>,
    candidate: WrapMechanism,
    public: Option<&Numbers>,
) -> Result<bool, BackendError> {
    let mut dek = wrapper.token.buffer(DEK_LEN)?;
    dek.with_mut(|dek| dek.copy_from_slice(&Sha256::digest(b"lacre probe")));
    let wrapped = wrapper.wrap(candidate, &dek, AAD)?;
    let expected = dek.with(|dek| software_wrap(candidate, public, &wrapped.iv, dek));
    let Some(expected) = expected else { return Ok(false) };
    // Encryption with an RSA key is never twice the same: there the device opens both.
    if public.is_none() && expected != wrapped.bytes {
        return Ok(false);
    }
    for wrapped in [&wrapped, &WrappedDek { bytes: expected, ..wrapped.clone() }] {
        let mut back = wrapper.token.buffer(DEK_SLOT_LEN)?;
        wrapper.unwrap(wrapped, AAD, &mut back)?;
        if !back.with(|back| dek.with(|dek| back == dek)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the device should give. `None` if it cannot be made.
fn software_wrap(
    mechanism: WrapMechanism,
    public: Option<&Numbers>,
    iv: &[u8],
    dek: &[u8],
) -> Option<Vec<u8>> {
    let mut bound = dek.to_vec();
    bound.extend_from_slice(&Sha256::digest(AAD));
    let mut out = vec![0; mechanism.lengths().1];
    let kek = || AesKek::new(&AES_256, &KNOWN_KEY).ok();
    let written = match mechanism {
        WrapMechanism::AesGcm => {
            let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &KNOWN_KEY).ok()?);
            let nonce = Nonce::assume_unique_for_key(iv.try_into().ok()?);
            let mut bytes = dek.to_vec();
            cipher.seal_in_place_append_tag(nonce, Aad::from(AAD), &mut bytes).ok()?;
            return Some(bytes);
        }
        WrapMechanism::AesKw | WrapMechanism::AesKwObject => kek()?.wrap(&bound, &mut out).ok()?.len(),
        WrapMechanism::TpmSeal => return None,
        WrapMechanism::AesKwp => kek()?.wrap_with_padding(&bound, &mut out).ok()?.len(),
        WrapMechanism::RsaOaep256 | WrapMechanism::RsaOaep1 => {
            let sha256 = mechanism == WrapMechanism::RsaOaep256;
            let oaep = if sha256 { &OAEP_SHA256_MGF1SHA256 } else { &OAEP_SHA1_MGF1SHA1 };
            let key: PublicEncryptingKey = public?.clone().try_into().ok()?;
            OaepPublicEncryptingKey::new(key).ok()?.encrypt(oaep, &bound, &mut out, None).ok()?.len()
        }
        WrapMechanism::AesCbc => {
            let key = UnboundCipherKey::new(&aws_lc_rs::cipher::AES_256, &KNOWN_KEY).ok()?;
            let iv = EncryptionContext::Iv128(FixedLength::from(<[u8; 16]>::try_from(iv).ok()?));
            let cbc = PaddedBlockEncryptingKey::cbc_pkcs7(key).ok()?;
            cbc.less_safe_encrypt(&mut bound, iv).ok()?;
            out.get_mut(..bound.len())?.copy_from_slice(&bound);
            bound.len()
        }
    };
    out.truncate(written);
    if mechanism.has_tag() {
        let mut mac = Hmac::<Sha256>::new_from_slice(&KNOWN_MAC_KEY).ok()?;
        mac.update(&tagged(AAD, iv, &out));
        out.extend_from_slice(&mac.finalize().into_bytes());
    }
    Some(out)
}

fn claims(token: &Token, entered: &Entered<'_>, candidate: WrapMechanism) -> Result<bool, BackendError> {
    let crypt = CKF_ENCRYPT | CKF_DECRYPT;
    let (mechanism, wanted) = match candidate {
        WrapMechanism::AesGcm => (CKM_AES_GCM, crypt),
        WrapMechanism::AesKw => (CKM_AES_KEY_WRAP, crypt),
        WrapMechanism::AesKwp => (CKM_AES_KEY_WRAP_KWP, crypt),
        WrapMechanism::AesKwObject => (CKM_AES_KEY_WRAP, CKF_WRAP | CKF_UNWRAP),
        WrapMechanism::RsaOaep256 | WrapMechanism::RsaOaep1 => (CKM_RSA_PKCS_OAEP, crypt),
        WrapMechanism::AesCbc => (CKM_AES_CBC_PAD, crypt),
        WrapMechanism::TpmSeal => return Ok(false),
    };
    match token.raw.mechanism_info(entered.loaded().slot.id(), mechanism).map_err(BackendError::from) {
        Ok((_, _, flags)) => Ok(flags & wanted == wanted),
        // The list does not have it.
        Err(error) if verdict(&error) == Verdict::Unable => Ok(false),
        Err(error) => Err(error),
    }
}
