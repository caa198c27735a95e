//! One logged-in session as a [`Backend`]: find, choose, call, name the failure.
//!
//! Handles are found once per session and epoch and checked when they are found: one object only,
//! the rules of `objects`, the pin of the [`KeyRef`]. No retry and no recovery here.

use std::collections::HashMap;
use std::sync::Arc;

use cryptoki::session::Session as RawSession;
use cryptoki_sys::{
    CK_OBJECT_HANDLE, CKM_ECDSA, CKM_RSA_PKCS, CKM_SHA256_HMAC, CKR_DEVICE_MEMORY, CKR_USER_NOT_LOGGED_IN,
};
use sha2::{Digest, Sha256};

use crate::seal::KeyReport;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::envelope::{DEK_LEN, DEK_SLOT_LEN};
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{
    Alg, Fingerprint, KeyId, KeyRef, KeySpec, Pin, PublicKey, Signature, WrapMechanism, WrappedDek,
};
use crate::seal::pkcs11::objects;
use crate::seal::pkcs11::raw::Mechanism;
use crate::seal::pkcs11::token::{Entered, OwnSession, Token};
use crate::seal::pkcs11::wrap::{self, Wrapper};

/// DER of `DigestInfo` with SHA-256 (RFC 8017, section 9.2, note 1): the hash follows.
const DIGEST_INFO_SHA256: [u8; 19] = [
    0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00,
    0x04, 0x20,
];

/// What a canary's AAD and a MAC fingerprint's message are: fixed texts, never anything of a tenant.
const CANARY_AAD: &[u8] = b"lacre/canary/v1";
const MAC_PIN_TEXT: &[u8] = b"lacre/pin/v1/mac";

/// A session, its token, and the handles it has found.
#[expect(clippy::struct_field_names, reason = "it is cryptoki's session")]
pub(crate) struct Session {
    token: Arc<Token>,
    session: OwnSession,
    handles: HashMap<KeyId, CK_OBJECT_HANDLE>,
}

impl Session {
    /// Opens a session that is logged in.
    pub(crate) fn open(token: &Arc<Token>, read_write: bool) -> Result<Self, BackendError> {
        let session = token.open_session(read_write)?;
        Ok(Self { token: Arc::clone(token), session, handles: HashMap::new() })
    }

    pub(super) fn token(&self) -> &Token {
        &self.token
    }

    pub(super) fn raw_session(&self) -> &RawSession {
        &self.session
    }

    /// The checked handle of a generated key.
    fn handle(&mut self, entered: &Entered<'_>, key: &KeyRef) -> Result<CK_OBJECT_HANDLE, BackendError> {
        if let Some(handle) = self.handles.get(&key.id) {
            return Ok(*handle);
        }
        let object = objects::find_one(&self.session, objects::class_of(key.spec), key.id)?;
        let Some(object) = object else { return Err(self.absent(entered)) };
        let (_, broken) = objects::check(&self.session, object, key.spec, pinned_mechanism(key))?;
        if !broken.is_empty() {
            return Err(BackendError::Unfit(broken.join(", ")));
        }
        self.check_pin(key, object.handle())?;
        if !self.token.has_passed(key.id) {
            self.tested(key, object.handle())?;
        }
        self.handles.insert(key.id, object.handle());
        Ok(object.handle())
    }

    /// Runs the self-test and keeps its result.
    fn tested(&self, key: &KeyRef, handle: CK_OBJECT_HANDLE) -> Result<(), BackendError> {
        let result = self.self_test(key, handle);
        self.token.note_test(key.id, result.is_ok());
        result
    }

    /// A token that is gone lists no objects either, and one that has forgotten the login lists no private
    /// ones; only a token that answers to its user can miss a key (F4).
    fn absent(&self, entered: &Entered<'_>) -> BackendError {
        match self.token.raw.is_user_session(self.session.handle()) {
            Err(fail) => fail.into(),
            Ok(false) => {
                BackendError::SessionLost { function: "C_GetSessionInfo", code: CKR_USER_NOT_LOGGED_IN }
            }
            Ok(true) if self.token.is_present(entered) => BackendError::Missing,
            Ok(true) => BackendError::Away { function: "C_GetTokenInfo", code: 0 },
        }
    }

    /// Compares the object with what was recorded when the key was made. A verdict against a key needs two
    /// looks: one failed call is no evidence.
    fn check_pin(&self, key: &KeyRef, handle: CK_OBJECT_HANDLE) -> Result<(), BackendError> {
        match self.compare_pin(key, handle) {
            Err(BackendError::Unfit(_)) => self.compare_pin(key, handle),
            other => other,
        }
    }

    fn compare_pin(&self, key: &KeyRef, handle: CK_OBJECT_HANDLE) -> Result<(), BackendError> {
        match &*key.pin {
            Pin::Planned => Err(BackendError::Unfit("it was planned and never generated".to_owned())),
            Pin::Canary(canary) => match self.open_canary(key.id, handle, canary) {
                Err(BackendError::Rejected { function, code }) => {
                    // A device that opens nothing at all says the same of every key: ask whether this
                    // one opens what it has just wrapped.
                    match self.make_canary(key.id, handle, canary.mechanism) {
                        Ok(_) => Err(BackendError::Unfit(
                            "its canary does not open: another key under this id".to_owned(),
                        )),
                        Err(BackendError::Rejected { .. }) if code == 0 => {
                            Err(BackendError::SelfTest("what it wraps with a KEK does not open"))
                        }
                        Err(BackendError::Rejected { .. }) => Err(BackendError::Away { function, code }),
                        Err(other) => Err(other),
                    }
                }
                other => other,
            },
            Pin::Fingerprint(expected) if self.fingerprint(key, handle)? == *expected => Ok(()),
            Pin::Fingerprint(_) => Err(BackendError::Unfit("its fingerprint is another one".to_owned())),
            Pin::Blob { .. } => {
                Err(BackendError::Unfit("it was made on a device of another kind".to_owned()))
            }
        }
    }

    fn fingerprint(&self, key: &KeyRef, handle: CK_OBJECT_HANDLE) -> Result<Fingerprint, BackendError> {
        if key.spec == KeySpec::HmacSha256 {
            let mac = self.mac_with(handle, MAC_PIN_TEXT)?;
            return Ok(Fingerprint(Sha256::digest(mac).into()));
        }
        Ok(objects::public_key(&self.session, key.spec, key.id)?.fingerprint())
    }

    fn open_canary(
        &self,
        id: KeyId,
        handle: CK_OBJECT_HANDLE,
        canary: &WrappedDek,
    ) -> Result<(), BackendError> {
        let mut out = self.token.buffer(DEK_SLOT_LEN)?;
        self.wrapper(handle).unwrap(canary, CANARY_AAD, &mut out)?;
        let same = out.with(|out| out == canary_value(id));
        if same { Ok(()) } else { Err(BackendError::Rejected { function: "canary", code: 0 }) }
    }

    pub(super) fn mac_with(
        &self,
        handle: CK_OBJECT_HANDLE,
        message: &[u8],
    ) -> Result<[u8; 32], BackendError> {
        let mut mac = [0; 32];
        let hmac = Mechanism::Plain(CKM_SHA256_HMAC);
        let written = self.token.raw.sign(self.session.handle(), hmac, handle, message, &mut mac)?;
        if written == mac.len() {
            Ok(mac)
        } else {
            Err(BackendError::Refused { function: "C_Sign", code: 0 })
        }
    }

    pub(super) fn sign_with(
        &self,
        key: &KeyRef,
        handle: CK_OBJECT_HANDLE,
        alg: Alg,
        digest: &[u8],
    ) -> Result<Signature, BackendError> {
        let mut out = [0; 512];
        let (session, raw) = (self.session.handle(), &self.token.raw);
        let written = match alg {
            // Not every token has the hash-and-sign variants, so the digest is made outside.
            Alg::Es256 | Alg::Es384 => {
                raw.sign(session, Mechanism::Plain(CKM_ECDSA), handle, digest, &mut out)?
            }
            Alg::Rs256 => {
                let info = [&DIGEST_INFO_SHA256[..], digest].concat();
                raw.sign(session, Mechanism::Plain(CKM_RSA_PKCS), handle, &info, &mut out)?
            }
            Alg::Ps256 => raw.sign(session, Mechanism::PssSha256, handle, digest, &mut out)?,
        };
        let signature = match (key.spec.field_len(), key.spec.modulus_bits()) {
            (Some(field), _) => fixed_width(&out[..written], field),
            (None, Some(bits)) if written * 8 == usize::from(bits) => Some(out[..written].to_vec()),
            _ => None,
        };
        // A signature of a wrong length never leaves (HS-7).
        signature.map(Signature).ok_or(BackendError::Refused { function: "C_Sign", code: 0 })
    }

    pub(super) fn wrapper(&self, kek: CK_OBJECT_HANDLE) -> Wrapper<'_> {
        Wrapper { token: &self.token, session: self.session.handle(), kek }
    }

    /// What is on the token under the planned id: a whole key, or nothing. A half pair that a crash
    /// left behind was never used, so it is removed.
    fn existing(&self, planned: &KeyRef) -> Result<bool, BackendError> {
        let class = objects::class_of(planned.spec);
        let found = objects::find_one(&self.session, class, planned.id)?.is_some();
        let pair = planned.spec.field_len().is_some() || planned.spec.modulus_bits().is_some();
        if !pair {
            return Ok(found);
        }
        let public = objects::find_one(&self.session, cryptoki::object::ObjectClass::PUBLIC_KEY, planned.id)?;
        if found != public.is_some() {
            objects::destroy(&self.session, planned.spec, planned.id)?;
            return Ok(false);
        }
        Ok(found)
    }

    /// Seals the canary and proves the KEK with it: opens, and not under another AAD, nor altered.
    fn make_canary(
        &self,
        id: KeyId,
        handle: CK_OBJECT_HANDLE,
        mechanism: WrapMechanism,
    ) -> Result<Pin, BackendError> {
        let wrapper = self.wrapper(handle);
        let mut value = self.token.buffer(DEK_LEN)?;
        value.with_mut(|value| value.copy_from_slice(&canary_value(id)));
        let canary = wrapper.wrap(mechanism, &value, CANARY_AAD)?;
        self.open_canary(id, handle, &canary)?;
        let mut flipped = canary.clone();
        flipped.bytes[0] ^= 1;
        for (bytes, aad) in [(&canary, &b"lacre/other/v1"[..]), (&flipped, CANARY_AAD)] {
            let mut out = self.token.buffer(DEK_SLOT_LEN)?;
            match wrapper.unwrap(bytes, aad, &mut out) {
                Err(BackendError::Rejected { .. }) => {}
                Ok(()) => return Err(BackendError::Unfit("the token opens altered bytes".to_owned())),
                // The call failed in another way, which says nothing about the key.
                Err(other) => return Err(other),
            }
        }
        Ok(Pin::Canary(canary))
    }

    /// The mechanism of a KEK: by its roles if it is on the token already (a repeated generation, with
    /// another configuration perhaps), else by configuration or probe.
    fn mechanism_for(
        &self,
        entered: &Entered<'_>,
        planned: &KeyRef,
    ) -> Result<Option<WrapMechanism>, BackendError> {
        if planned.spec != KeySpec::Kek {
            return Ok(None);
        }
        let chosen = wrap::choose(&self.token, entered, self.session.handle())?;
        if let Some(object) = objects::find_one(&self.session, objects::class_of(planned.spec), planned.id)? {
            for mechanism in [chosen, WrapMechanism::AesGcm, WrapMechanism::AesKwObject, WrapMechanism::AesKw]
            {
                let (_, broken) = objects::check(&self.session, object, planned.spec, Some(mechanism))?;
                if broken.is_empty() {
                    return Ok(Some(mechanism));
                }
            }
        }
        Ok(Some(chosen))
    }
}

/// The canary's plaintext: known to everybody, useful to nobody, different for each key.
pub(super) fn canary_value(id: KeyId) -> [u8; 32] {
    let mut sum = Sha256::new();
    sum.update(CANARY_AAD);
    sum.update(id.as_bytes());
    sum.finalize().into()
}

fn pinned_mechanism(key: &KeyRef) -> Option<WrapMechanism> {
    match &*key.pin {
        Pin::Canary(canary) => Some(canary.mechanism),
        _ => None,
    }
}

/// `r || s` at full width: some modules drop leading zeros of both halves (hsm.md 3.2).
fn fixed_width(raw: &[u8], field: usize) -> Option<Vec<u8>> {
    if raw.is_empty() || !raw.len().is_multiple_of(2) || raw.len() > 2 * field {
        return None;
    }
    let (r, s) = raw.split_at(raw.len() / 2);
    let mut out = vec![0; 2 * field];
    out[field - r.len()..field].copy_from_slice(r);
    out[2 * field - s.len()..].copy_from_slice(s);
    Some(out)
}

/// A token without room for another object is well: what is there can be used.
fn full(error: BackendError) -> BackendError {
    match error {
        BackendError::Away { function, code: CKR_DEVICE_MEMORY } => {
            BackendError::Refused { function, code: CKR_DEVICE_MEMORY }
        }
        other => other,
    }
}

impl Backend for Session {
    fn wrap(&mut self, kek: &KeyRef, dek: &SecretBuf, aad: &[u8]) -> Result<WrappedDek, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let handle = self.handle(&entered, kek)?;
        let mechanism = pinned_mechanism(kek).ok_or_else(|| BackendError::Unfit("not a KEK".to_owned()))?;
        self.wrapper(handle).wrap(mechanism, dek, aad)
    }

    fn unwrap(
        &mut self,
        kek: &KeyRef,
        wrapped: &WrappedDek,
        aad: &[u8],
        out: &mut SecretBuf,
    ) -> Result<(), BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let handle = self.handle(&entered, kek)?;
        let result = self.wrapper(handle).unwrap(wrapped, aad, out);
        if let (Err(rejected @ BackendError::Rejected { .. }), Pin::Canary(canary)) = (&result, &*kek.pin) {
            // F3: the return value cannot tell a bad row from a bad device. The canary can.
            return match self.open_canary(kek.id, handle, canary) {
                // A row is blamed when a well device has refused it twice: a fault may have been over before
                // the canary was opened.
                Ok(()) => match self.wrapper(handle).unwrap(wrapped, aad, out) {
                    Err(BackendError::Rejected { .. }) => Err(rejected.clone()),
                    other => other,
                },
                Err(BackendError::Rejected { function, code }) => {
                    Err(BackendError::SessionLost { function, code })
                }
                Err(other) => Err(other),
            };
        }
        result
    }

    fn sign(&mut self, key: &KeyRef, alg: Alg, digest: &[u8]) -> Result<Signature, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let handle = self.handle(&entered, key)?;
        self.sign_with(key, handle, alg, digest)
    }

    fn mac(&mut self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let handle = self.handle(&entered, key)?;
        self.mac_with(handle, message)
    }

    fn public_key(&mut self, key: &KeyRef) -> Result<PublicKey, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        self.handle(&entered, key)?;
        objects::public_key(&self.session, key.spec, key.id)
    }

    fn generate(&mut self, planned: &KeyRef) -> Result<KeyRef, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let mechanism = self.mechanism_for(&entered, planned)?;
        let is_made_now = !self.existing(planned)?;
        if is_made_now {
            objects::generate(&self.session, planned.spec, planned.id, mechanism).map_err(full)?;
        }
        let object = objects::find_one(&self.session, objects::class_of(planned.spec), planned.id)?;
        let object = object.ok_or_else(|| self.absent(&entered))?;
        let (_, broken) = objects::check(&self.session, object, planned.spec, mechanism)?;
        if !broken.is_empty() {
            if is_made_now {
                // Nobody has used it, and left there it would be found unfit at every further try.
                objects::destroy(&self.session, planned.spec, planned.id)?;
            }
            return Err(BackendError::Unfit(broken.join(", ")));
        }
        let pin = match mechanism {
            Some(mechanism) => self.make_canary(planned.id, object.handle(), mechanism)?,
            None => Pin::Fingerprint(self.fingerprint(planned, object.handle())?),
        };
        // The canary's own proof was as much as a self-test.
        self.token.note_test(planned.id, planned.spec == KeySpec::Kek);
        Ok(planned.pinned(pin))
    }

    fn destroy(&mut self, key: &KeyRef) -> Result<(), BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        if !self.token.is_present(&entered) {
            return Err(BackendError::Away { function: "C_GetTokenInfo", code: 0 });
        }
        objects::destroy(&self.session, key.spec, key.id)?;
        // Other sessions must not go on with a handle that may be given to another object.
        self.token.bump_epoch();
        Ok(())
    }

    fn inspect(&mut self, key: &KeyRef) -> Result<KeyReport, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let class = objects::class_of(key.spec);
        let object = match objects::find_one(&self.session, class, key.id) {
            Ok(Some(object)) => object,
            Ok(None) => return Err(self.absent(&entered)),
            Err(BackendError::Unfit(reason)) => {
                self.token.bump_epoch();
                return Ok(KeyReport { attributes: Vec::new(), deviations: vec![reason] });
            }
            Err(other) => return Err(other),
        };
        let (attributes, mut deviations) =
            objects::check(&self.session, object, key.spec, pinned_mechanism(key))?;
        match self.check_pin(key, object.handle()) {
            // A KEK's test uses up two of its IVs, so once is enough.
            Ok(()) if key.spec == KeySpec::Kek && self.token.has_passed(key.id) => {}
            Ok(()) => self.tested(key, object.handle())?,
            Err(BackendError::Unfit(reason)) => deviations.push(reason),
            Err(BackendError::Missing) => deviations.push("its public half is missing".to_owned()),
            Err(other) => return Err(other),
        }
        if !deviations.is_empty() {
            // No session may go on with the handle it found before the key was weakened.
            self.token.bump_epoch();
        }
        Ok(KeyReport { attributes, deviations })
    }
}

#[cfg(test)]
mod tests {
    use super::fixed_width;

    #[test]
    fn short_halves_are_padded_and_odd_or_long_ones_refused() {
        assert_eq!(fixed_width(&[1, 2], 3).unwrap(), [0, 0, 1, 0, 0, 2]);
        assert_eq!(fixed_width(&[1; 6], 3).unwrap(), [1; 6]);
        assert!(fixed_width(&[1; 5], 3).is_none());
        assert!(fixed_width(&[1; 8], 3).is_none());
        assert!(fixed_width(&[], 3).is_none());
    }
}
