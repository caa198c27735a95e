//! One logged-in session as a [`Backend`]: find, choose, call, name the failure.
//!
//! Handles are found once per session and epoch and checked when they are found: one object only,
//! the rules of `objects`, the pin of the [`KeyRef`]. No retry and no recovery here.

use std::collections::HashMap;
use std::sync::Arc;

use cryptoki::session::Session as RawSession;
use cryptoki_sys::{
    CKM_ECDSA, CKM_EDDSA, CKM_RSA_PKCS, CKM_SHA256_HMAC, CKR_DEVICE_MEMORY, CKR_USER_NOT_LOGGED_IN,
};
use sha2::{Digest, Sha256};

use crate::seal::KeyReport;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::envelope::{DEK_LEN, DEK_SLOT_LEN};
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{
    Alg, Fingerprint, KeyId, KeyRef, KeySpec, Pin, PublicKey, Signature, WrapMechanism, WrappedDek,
};
use crate::seal::pkcs11::custody::{self, Found};
use crate::seal::pkcs11::objects::{self, Handles, Objects, Present};
use crate::seal::pkcs11::parts::{Make, Part};
use crate::seal::pkcs11::probe;
use crate::seal::pkcs11::raw::Mechanism;
use crate::seal::pkcs11::token::{Entered, OwnSession, Token};
use crate::seal::pkcs11::wrap::Wrapper;

/// DER of `DigestInfo` with SHA-256 (RFC 8017, section 9.2, note 1): the hash follows.
const DIGEST_INFO_SHA256: [u8; 19] = [
    0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00,
    0x04, 0x20,
];

/// What a canary's AAD and a MAC fingerprint's message are: fixed texts, never anything of a tenant.
const CANARY_AAD: &[u8] = b"lacre/canary/v1";
pub(super) const MAC_PIN_TEXT: &[u8] = b"lacre/pin/v1/mac";
/// Length of an Ed25519 signature.
const ED25519_LEN: usize = 64;

/// A session, its token, and the handles it has found.
#[expect(clippy::struct_field_names, reason = "it is cryptoki's session")]
pub(crate) struct Session {
    token: Arc<Token>,
    session: OwnSession,
    /// With the pin that each was checked by: the same id with another pin is another key.
    handles: HashMap<KeyId, (Arc<Pin>, Handles)>,
}

impl Session {
    /// Opens a session that is logged in.
    pub(crate) fn open(token: &Arc<Token>, read_write: bool) -> Result<Self, BackendError> {
        let session = token.open_session(read_write)?;
        Ok(Self { token: Arc::clone(token), session, handles: HashMap::new() })
    }

    /// Every key on the token that was made here.
    pub(super) fn list(&self) -> Result<Vec<KeyRef>, BackendError> {
        let _entered = self.session.enter(&self.token)?;
        objects::all(&self.session)
    }

    pub(super) fn token(&self) -> &Token {
        &self.token
    }

    pub(super) fn raw_session(&self) -> &RawSession {
        &self.session
    }

    /// The checked handles of a generated key.
    pub(super) fn handles(&mut self, entered: &Entered<'_>, key: &KeyRef) -> Result<Handles, BackendError> {
        if let Some((pin, handles)) = self.handles.get(&key.id)
            && (Arc::ptr_eq(pin, &key.pin) || *pin == key.pin)
        {
            return Ok(*handles);
        }
        let make = Make { spec: key.spec, wrap: pinned_mechanism(key) };
        let Some(objects) = objects::find_key(&self.session, make, key.id)? else {
            return Err(self.absent(entered));
        };
        let found = self.check(make, objects, key.is_imported())?;
        if !found.broken.is_empty() {
            return Err(BackendError::Unfit(found.broken.join(", ")));
        }
        let handles = objects.handles();
        self.check_pin(key, handles)?;
        if !self.token.has_passed(key.id) {
            self.tested(key, handles)?;
        }
        self.handles.insert(key.id, (Arc::clone(&key.pin), handles));
        Ok(handles)
    }

    /// Checks the objects that hold secrets.
    pub(super) fn check(
        &self,
        make: Make,
        objects: Objects,
        is_imported: bool,
    ) -> Result<Found, BackendError> {
        let configured = self.token.selection.without_evidence.as_slice();
        let mut imported = Vec::new();
        if is_imported {
            imported.extend(custody::NEVER_IMPORTED.map(str::to_owned));
            imported.extend_from_slice(configured);
        }
        let without = if is_imported { imported.as_slice() } else { configured };
        let mut found = custody::check(&self.session, objects.main, (make, Part::Main), without)?;
        if let Some(mac) = objects.mac {
            let beside = custody::check(&self.session, mac, (make, Part::Mac), without)?;
            found.broken.extend(beside.broken.into_iter().map(|rule| format!("HMAC key: {rule}")));
            found.accepted.extend(beside.accepted.into_iter().map(|rule| format!("HMAC key: {rule}")));
        }
        Ok(found)
    }

    /// Runs the self-test and keeps its result.
    pub(super) fn tested(&self, key: &KeyRef, keys: Handles) -> Result<(), BackendError> {
        let result = self.self_test(key, keys);
        self.token.note_test(key.id, result.is_ok());
        result
    }

    /// A token that is gone lists no objects either, and one that has forgotten the login lists no private
    /// ones; only a token that answers to its user can miss a key (F4).
    pub(super) fn absent(&self, entered: &Entered<'_>) -> BackendError {
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
    pub(super) fn check_pin(&self, key: &KeyRef, keys: Handles) -> Result<(), BackendError> {
        match self.compare_pin(key, keys) {
            Err(BackendError::Unfit(_)) => self.compare_pin(key, keys),
            other => other,
        }
    }

    fn compare_pin(&self, key: &KeyRef, keys: Handles) -> Result<(), BackendError> {
        match &*key.pin {
            Pin::Planned => Err(BackendError::Unfit("it was planned and never generated".to_owned())),
            Pin::Canary(canary) => match self.open_canary(key.id, keys, canary) {
                Err(BackendError::Rejected { function, code }) => {
                    // A device that opens nothing at all says the same of every key: ask whether this
                    // one opens what it has just wrapped.
                    match self.make_canary(key.id, keys, canary.mechanism) {
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
                // Values would go to whoever put another public half there.
                Ok(()) if canary.mechanism.is_rsa() => {
                    match self.make_canary(key.id, keys, canary.mechanism) {
                        Err(BackendError::Rejected { .. }) => {
                            Err(BackendError::Unfit("its public half belongs to another key".to_owned()))
                        }
                        other => other.map(|_| ()),
                    }
                }
                other => other,
            },
            Pin::Fingerprint(expected) | Pin::Imported(expected)
                if self.fingerprint(key, keys)? == *expected =>
            {
                Ok(())
            }
            Pin::Fingerprint(_) | Pin::Imported(_) => {
                Err(BackendError::Unfit("its fingerprint is another one".to_owned()))
            }
            Pin::Blob { .. } => {
                Err(BackendError::Unfit("it was made on a device of another kind".to_owned()))
            }
        }
    }

    pub(super) fn fingerprint(&self, key: &KeyRef, keys: Handles) -> Result<Fingerprint, BackendError> {
        if key.spec == KeySpec::HmacSha256 {
            let mac = self.mac_with(keys, MAC_PIN_TEXT)?;
            return Ok(Fingerprint(Sha256::digest(mac).into()));
        }
        Ok(objects::public_key(&self.session, key.spec, key.id)?.fingerprint())
    }

    fn open_canary(&self, id: KeyId, keys: Handles, canary: &WrappedDek) -> Result<(), BackendError> {
        let mut out = self.token.buffer(DEK_SLOT_LEN)?;
        self.wrapper(keys).unwrap(canary, CANARY_AAD, &mut out)?;
        let same = out.with(|out| out == canary_value(id));
        if same { Ok(()) } else { Err(BackendError::Rejected { function: "canary", code: 0 }) }
    }

    pub(super) fn mac_with(&self, keys: Handles, message: &[u8]) -> Result<[u8; 32], BackendError> {
        let mut mac = [0; 32];
        let hmac = Mechanism::Plain(CKM_SHA256_HMAC);
        let written = self.token.raw.sign(self.session.handle(), hmac, keys.mac, message, &mut mac)?;
        if written == mac.len() {
            Ok(mac)
        } else {
            Err(BackendError::Refused { function: "C_Sign", code: 0 })
        }
    }

    pub(super) fn sign_with(
        &self,
        key: &KeyRef,
        keys: Handles,
        alg: Alg,
        digest: &[u8],
    ) -> Result<Signature, BackendError> {
        let mut out = [0; 512];
        let (session, raw) = (self.session.handle(), &self.token.raw);
        let written = match alg {
            // Not every token has the hash-and-sign variants, so the digest is made outside.
            Alg::Es256 | Alg::Es384 => {
                raw.sign(session, Mechanism::Plain(CKM_ECDSA), keys.main, digest, &mut out)?
            }
            Alg::Rs256 => {
                let info = [&DIGEST_INFO_SHA256[..], digest].concat();
                raw.sign(session, Mechanism::Plain(CKM_RSA_PKCS), keys.main, &info, &mut out)?
            }
            Alg::Ps256 => raw.sign(session, Mechanism::PssSha256, keys.main, digest, &mut out)?,
            Alg::EdDsa => raw.sign(session, Mechanism::Plain(CKM_EDDSA), keys.main, digest, &mut out)?,
        };
        let signature = match (key.spec.field_len(), key.spec.modulus_bits()) {
            (Some(field), _) => fixed_width(&out[..written], field),
            (None, Some(bits)) if written * 8 == usize::from(bits) => Some(out[..written].to_vec()),
            (None, None) if alg == Alg::EdDsa && written == ED25519_LEN => Some(out[..written].to_vec()),
            _ => None,
        };
        // A signature of a wrong length never leaves (HS-7).
        signature.map(Signature).ok_or(BackendError::Refused { function: "C_Sign", code: 0 })
    }

    pub(super) fn wrapper(&self, keys: Handles) -> Wrapper<'_> {
        Wrapper { token: &self.token, session: self.session.handle(), keys }
    }

    /// Seals the canary and proves the KEK with it: opens, and not under another AAD, nor altered.
    fn make_canary(&self, id: KeyId, keys: Handles, mechanism: WrapMechanism) -> Result<Pin, BackendError> {
        let wrapper = self.wrapper(keys);
        let mut value = self.token.buffer(DEK_LEN)?;
        value.with_mut(|value| value.copy_from_slice(&canary_value(id)));
        let canary = wrapper.wrap(mechanism, &value, CANARY_AAD)?;
        self.open_canary(id, keys, &canary)?;
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

    /// Every shape that the planned key may have on the token, the one that would be made now first.
    fn shapes(&self, entered: &Entered<'_>, spec: KeySpec) -> Result<Vec<Make>, BackendError> {
        if spec != KeySpec::Kek {
            return Ok(vec![Make { spec, wrap: None }]);
        }
        let chosen = probe::choose(&self.token, entered, &self.session)?;
        let others = WrapMechanism::PREFERENCE.into_iter().filter(|other| *other != chosen);
        Ok([chosen].into_iter().chain(others).map(|wrap| Make { spec, wrap: Some(wrap) }).collect())
    }

    /// Finds the planned key or makes it. What a crash left behind was never used, so it is removed. A
    /// key that is there keeps the mechanism it was made for (a repeated generation, with another
    /// configuration perhaps): all that its attributes allow are given back, the likeliest first.
    fn find_or_make(
        &self,
        entered: &Entered<'_>,
        planned: &KeyRef,
    ) -> Result<(Vec<Make>, Objects), BackendError> {
        let (spec, id) = (planned.spec, planned.id);
        let mut shapes = self.shapes(entered, spec)?;
        let mut is_made_now = false;
        match objects::present(&self.session, &shapes, id)? {
            Present::Whole(found) => shapes.retain(|shape| shape.parts() == found.parts()),
            present => {
                shapes.truncate(1);
                if present == Present::Remnant {
                    objects::destroy(&self.session, spec, id)?;
                }
                for make in &shapes {
                    objects::generate(&self.session, *make, id).map_err(full)?;
                }
                is_made_now = true;
            }
        }
        let (mut fitting, mut broken, mut objects) = (Vec::new(), Vec::new(), None);
        for make in shapes {
            let there = objects::find_key(&self.session, make, id)?.ok_or_else(|| self.absent(entered))?;
            let found = self.check(make, there, false)?;
            if found.broken.is_empty() {
                fitting.push(make);
                objects = objects.or(Some(there));
            } else if broken.is_empty() {
                broken = found.broken;
            }
        }
        if objects.is_none() && is_made_now {
            // Nobody has used it, and left there it would be found unfit at every further try.
            objects::destroy(&self.session, spec, id)?;
        }
        objects.map(|objects| (fitting, objects)).ok_or_else(|| BackendError::Unfit(broken.join(", ")))
    }

    /// What the new key is recognised by, and for a KEK the proof that it wraps.
    fn first_pin(&self, planned: &KeyRef, make: Make, keys: Handles) -> Result<Pin, BackendError> {
        objects::check_modulus(&self.session, make, planned.id)?;
        match make.wrap {
            Some(mechanism) => self.make_canary(planned.id, keys, mechanism),
            None => Ok(Pin::Fingerprint(self.fingerprint(planned, keys)?)),
        }
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
pub(super) fn full(error: BackendError) -> BackendError {
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
        let keys = self.handles(&entered, kek)?;
        let mechanism = pinned_mechanism(kek).ok_or_else(|| BackendError::Unfit("not a KEK".to_owned()))?;
        self.wrapper(keys).wrap(mechanism, dek, aad)
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
        let keys = self.handles(&entered, kek)?;
        let result = self.wrapper(keys).unwrap(wrapped, aad, out);
        if let (Err(rejected @ BackendError::Rejected { .. }), Pin::Canary(canary)) = (&result, &*kek.pin) {
            // F3: the return value cannot tell a bad row from a bad device. The canary can.
            return match self.open_canary(kek.id, keys, canary) {
                // A row is blamed when a well device has refused it twice: a fault may have been over before
                // the canary was opened.
                Ok(()) => match self.wrapper(keys).unwrap(wrapped, aad, out) {
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
        let keys = self.handles(&entered, key)?;
        self.sign_with(key, keys, alg, digest)
    }

    fn mac(&mut self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        let keys = self.handles(&entered, key)?;
        self.mac_with(keys, message)
    }

    fn public_key(&mut self, key: &KeyRef) -> Result<PublicKey, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        self.handles(&entered, key)?;
        objects::public_key(&self.session, key.spec, key.id)
    }

    fn generate(&mut self, planned: &KeyRef, given: Option<&SecretBuf>) -> Result<KeyRef, BackendError> {
        let token = Arc::clone(&self.token);
        let entered = self.session.enter(&token)?;
        if let Some(given) = given {
            return given.with(|private| self.import(&entered, planned, private));
        }
        let (makes, objects) = self.find_or_make(&entered, planned)?;
        let mut first = None;
        for make in makes {
            match self.first_pin(planned, make, objects.handles()) {
                Ok(pin) => {
                    // The canary's own proof was as much as a self-test.
                    self.token.note_test(planned.id, planned.spec == KeySpec::Kek);
                    return Ok(planned.pinned(pin));
                }
                // Its attributes allow this way of wrapping, and it was made for another one.
                Err(error @ (BackendError::Refused { .. } | BackendError::Unfit(_))) => {
                    first = first.or(Some(error));
                }
                Err(other) => return Err(other),
            }
        }
        Err(first.unwrap_or_else(|| self.absent(&entered)))
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
        let make = Make { spec: key.spec, wrap: pinned_mechanism(key) };
        let objects = match objects::find_key(&self.session, make, key.id) {
            Ok(Some(objects)) => objects,
            Ok(None) => return Err(self.absent(&entered)),
            Err(BackendError::Unfit(reason)) => {
                self.token.bump_epoch();
                return Ok(KeyReport { deviations: vec![reason], ..KeyReport::default() });
            }
            Err(other) => return Err(other),
        };
        let Found { attributes, broken: mut deviations, accepted } =
            self.check(make, objects, key.is_imported())?;
        match self.check_pin(key, objects.handles()) {
            // A KEK's test uses up two of its IVs, so once is enough.
            Ok(()) if key.spec == KeySpec::Kek && self.token.has_passed(key.id) => {}
            Ok(()) => self.tested(key, objects.handles())?,
            Err(BackendError::Unfit(reason)) => deviations.push(reason),
            Err(BackendError::Missing) => deviations.push("its public half is missing".to_owned()),
            Err(other) => return Err(other),
        }
        if !deviations.is_empty() {
            // No session may go on with the handle it found before the key was weakened.
            self.token.bump_epoch();
        }
        Ok(KeyReport { attributes, deviations, accepted })
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
