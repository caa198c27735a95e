//! Keys in a TPM as a [`Backend`].
//!
//! A KEK needs 32 bytes that only the chip has, in an index of its non-volatile memory: they are part of its
//! template, so the key is gone for good when the index is. What was sealed by it, in backups too, stays
//! shut then. Signing and MAC keys are blobs in their [`KeyRef`] and end with the last copy of it.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;
use tss_esapi::Context;
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{MaxBuffer, Private, Public, PublicBuffer, SensitiveData};
use tss_esapi::traits::Marshall;
use zeroize::Zeroize;

use super::error::Fail;
use super::link::{Id, Link, Origin};
use super::salt::{destroy_salt, make_salt, read_salt};
use super::scrub::{scrub, wipe_blocks};
use super::sign::{sign, test_pair};
use super::{Tpm, template};
use crate::seal::KeyReport;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::envelope::{DEK_LEN, DEK_SLOT_LEN};
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{
    Alg, Fingerprint, KeyId, KeyRef, KeySpec, Pin, PublicKey, Signature, WrapMechanism, WrappedDek,
};
use crate::seal::rsa_check::check_rsa;

/// The canary's context and the message of a MAC's fingerprint: fixed texts, never anything of a tenant.
const CANARY_AAD: &[u8] = b"lacre/canary/v1";
const MAC_PIN_TEXT: &[u8] = b"lacre/pin/v1/mac";
/// Of a key that is being made: nothing has this hash.
const UNPROVEN: Fingerprint = Fingerprint([0; 32]);
/// `DEK || SHA-256(context)`.
const SEALED_LEN: usize = DEK_LEN + 32;
/// SHA-256 is what a sealed object is named by.
const UNIQUE_LEN: usize = 32;
/// A thread's view of the TPM. All of them share one connection.
pub(super) struct Session {
    tpm: Arc<Tpm>,
}

impl Session {
    pub(super) fn new(tpm: Arc<Tpm>) -> Self {
        Self { tpm }
    }

    /// One call, and once more on another connection if its answer speaks against the key or a secret: the TPM
    /// proves its good answers and cannot prove the others, so one that was altered on the way is no evidence. It
    /// leaves a session behind that the TPM does not know in that state. A key that was found bad in this way is
    /// not asked twice again for a while: who asks for a missing key must not cost the others their connection.
    fn with_link<T>(
        &self,
        key: &KeyRef,
        mut call: impl FnMut(&mut Link) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let first = self.tpm.with_link(&mut call);
        if !speaks_against(&first) || self.tpm.is_known_bad(key.id) {
            return first;
        }
        self.tpm.hang_up();
        let second = self.tpm.with_link(call);
        if speaks_against(&second) {
            self.tpm.note_bad(key.id);
        }
        second
    }
}

/// Whether an answer is one that the TPM cannot prove, and that says something of a key or a secret.
fn speaks_against<T>(result: &Result<T, BackendError>) -> bool {
    match result {
        // Ours, not the TPM's.
        Err(BackendError::Refused { function, .. }) => *function != "guarded memory",
        Err(BackendError::Unfit(_) | BackendError::Missing | BackendError::Stopped(_)) => true,
        _ => false,
    }
}

pub(super) fn refused(function: &'static str) -> BackendError {
    BackendError::Refused { function, code: 0 }
}

/// The KEK's handle.
fn kek(link: &mut Link, id: KeyId) -> Result<KeyHandle, BackendError> {
    if let Some(handle) = link.loaded(*id.as_bytes()) {
        return Ok(handle);
    }
    let salt = read_salt(link, id)?.ok_or(BackendError::Missing)?;
    let unique = template::unique_of(id, &salt);
    let load =
        |link: &mut Link| link.load(*id.as_bytes(), None, &|| Ok(Origin::Primary(template::kek(&unique)?)));
    Ok(link.again(load)?)
}

/// What a pin is known by in a connection.
fn tag(id: KeyId, pin: &[u8]) -> Id {
    let sum = Sha256::digest([&id.as_bytes()[..], pin].concat());
    std::array::from_fn(|at| sum[at])
}

/// Checks that the KEK is the one of the pin, once for each connection: a KEK made anew under the same id is
/// another one.
fn check_kek(tpm: &Tpm, link: &mut Link, key: &KeyRef) -> Result<(), BackendError> {
    let canary = canary_of(key)?;
    let tag = tag(key.id, &canary.bytes);
    if link.is_checked(tag) {
        return Ok(());
    }
    match open_canary(tpm, link, key.id, canary) {
        Ok(()) => {
            link.note_checked(tag);
            Ok(())
        }
        Err(BackendError::Rejected { code, .. }) if is_auth(code) => Err(wrong_secret()),
        Err(BackendError::Rejected { .. }) => {
            Err(BackendError::Unfit("its canary does not open: another key under this id".to_owned()))
        }
        Err(other) => Err(other),
    }
}

fn is_auth(code: u64) -> bool {
    u32::try_from(code).is_ok_and(|code| Fail { function: "", code }.is_auth())
}

fn wrong_secret() -> BackendError {
    BackendError::Stopped(
        "the TPM refuses the authorisation of a key: the secret of `auth_source` is not the one it was made with"
            .to_owned(),
    )
}

/// What a signing or MAC key is loaded from.
pub(super) fn blob_of(key: &KeyRef) -> Result<&[u8], BackendError> {
    match &*key.pin {
        Pin::Blob { blob, .. } => Ok(blob),
        Pin::Planned => Err(BackendError::Unfit("it was planned and never generated".to_owned())),
        Pin::Fingerprint(_) | Pin::Imported(_) | Pin::Canary(_) => {
            Err(BackendError::Unfit("it was made on a device of another kind".to_owned()))
        }
    }
}

/// The rules and the pin, on the public area in the blob: the TPM loads it with its own private part or not at
/// all. A MAC key has no public half; its fingerprint is checked when it is inspected.
fn check_public(key: &KeyRef, public: &Public) -> Result<(), BackendError> {
    let wanted = template::leaf(key.spec)?.ok_or_else(|| refused("TPM template"))?;
    let (_, broken) = template::check(public, &wanted);
    if !broken.is_empty() {
        return Err(BackendError::Unfit(broken.join(", ")));
    }
    let Pin::Blob { fingerprint, .. } = &*key.pin else { return Ok(()) };
    let is_other = |found: PublicKey| found.fingerprint() != *fingerprint && *fingerprint != UNPROVEN;
    if template::public_key(key.spec, public).is_some_and(is_other) {
        return Err(BackendError::Unfit("its fingerprint is another one".to_owned()));
    }
    Ok(())
}

/// The handle of a signing or MAC key, from its blob. Another blob under the same id is another object.
pub(super) fn leaf(link: &mut Link, key: &KeyRef) -> Result<(Id, KeyHandle), BackendError> {
    let blob = blob_of(key)?;
    let at = tag(key.id, blob);
    let (private, public) = read_blob(blob)?;
    if link.loaded(at).is_none() {
        check_public(key, &public)?;
    }
    let origin = || Ok(Origin::Child(private.clone(), public.clone()));
    let loaded = link.again(|link| link.load(at, Some(*key.id.as_bytes()), &origin));
    loaded.map(|handle| (at, handle)).map_err(|fail| match fail {
        fail if fail.is_bad_blob() => BackendError::Unfit("this TPM did not make it".to_owned()),
        fail => fail.into(),
    })
}

/// Length of the private part, private part, public area.
fn write_blob(private: &Private, public: &Public) -> Result<Vec<u8>, BackendError> {
    let public = public.marshall().map_err(|_| refused("public area"))?;
    let len = u16::try_from(private.value().len()).map_err(|_| refused("private part"))?;
    Ok([&len.to_be_bytes(), private.value(), &public].concat())
}

pub(super) fn read_blob(blob: &[u8]) -> Result<(Private, Public), BackendError> {
    let unfit = || BackendError::Unfit("its blob cannot be read".to_owned());
    let (len, rest) = blob.split_first_chunk::<2>().ok_or_else(unfit)?;
    let (private, public) = rest.split_at_checked(usize::from(u16::from_be_bytes(*len))).ok_or_else(unfit)?;
    let private = Private::try_from(private).map_err(|_| unfit())?;
    // By the buffer type: the crate reads past the end of a short slice otherwise.
    let public = PublicBuffer::try_from(public).and_then(Public::try_from).map_err(|_| unfit())?;
    Ok((private, public))
}

/// What a KEK seals: the DEK, and a hash that ties it to its place.
fn wrap(
    tpm: &Tpm,
    link: &mut Link,
    id: KeyId,
    dek: &SecretBuf,
    aad: &[u8],
) -> Result<WrappedDek, BackendError> {
    kek(link, id)?;
    let auth = link.auth(*id.as_bytes()).map_err(|error| Fail::new("auth value", error))?;
    let mut bound = tpm.buffer(SEALED_LEN)?;
    dek.with(|dek| {
        bound.with_mut(|bound| {
            bound[..DEK_LEN].copy_from_slice(dek);
            bound[DEK_LEN..].copy_from_slice(&Sha256::digest(aad));
        });
    });
    let sessions = link.under_parent();
    let made = link.again(|link| {
        let parent = link.load_again(*id.as_bytes())?;
        let data = bound
            .with(|bound| SensitiveData::try_from(bound))
            .map_err(|error| Fail::new("TPM2_Create", error))?;
        let public = template::sealed(&[]).map_err(|_| Fail { function: "TPM template", code: 0 })?;
        let auth = auth.clone();
        link.command("TPM2_Create", sessions, |context| {
            context.create(parent, public, Some(auth), Some(data), None, None)
        })
    });
    scrub(link);
    let made = made?;
    link.prove();
    let Public::KeyedHash { unique, .. } = &made.out_public else { return Err(refused("sealed object")) };
    let bytes = [made.out_private.value(), unique.value()].concat();
    if unique.value().len() != UNIQUE_LEN || !WrapMechanism::TpmSeal.accepts(0, bytes.len()) {
        return Err(refused("size of a sealed object"));
    }
    Ok(WrappedDek { mechanism: WrapMechanism::TpmSeal, iv: Vec::new(), bytes })
}

/// Leaves the DEK in `out`, or `out` wiped after an error.
fn unwrap(
    link: &mut Link,
    id: KeyId,
    bytes: &[u8],
    aad: &[u8],
    out: &mut SecretBuf,
) -> Result<(), BackendError> {
    kek(link, id)?;
    let rejected = |code: u32| BackendError::Rejected { function: "TPM2_Unseal", code: code.into() };
    let at = bytes.len().checked_sub(UNIQUE_LEN).ok_or_else(|| rejected(0))?;
    let (private, unique) = bytes.split_at(at);
    let public = template::sealed(unique)?;
    let private = Private::try_from(private).map_err(|_| rejected(0))?;
    let auth = link.auth(*id.as_bytes()).map_err(|error| Fail::new("auth value", error))?;
    let unsealed = link.again(|link| {
        let parent = link.load_again(*id.as_bytes())?;
        let sessions = (Some(AuthSession::Password), None);
        let load = |context: &mut Context| context.load(parent, private.clone(), public.clone());
        let leaf = link.command("TPM2_Load", sessions, load)?;
        let unsealed = match link.context.tr_set_auth(leaf.into(), auth.clone()) {
            Ok(()) => {
                let sessions = link.secretly();
                link.command("TPM2_Unseal", sessions, |context| context.unseal(leaf.into()))
            }
            Err(error) => Err(Fail::new("auth value", error)),
        };
        wipe_blocks();
        // Flushed on every path, and the first thing that went wrong is told.
        let flushed = link.flush(leaf.into());
        unsealed.and_then(|data| flushed.map(|()| data))
    });
    let bound = unsealed.as_ref().is_ok_and(|data| {
        data.value().len() == SEALED_LEN && bool::from(data.value()[DEK_LEN..].ct_eq(&Sha256::digest(aad)))
    });
    if let (Ok(data), true) = (&unsealed, bound) {
        out.with_mut(|out| out[..DEK_LEN].copy_from_slice(&data.value()[..DEK_LEN]));
        out.truncate(DEK_LEN);
    }
    let result = unsealed.map(drop);
    scrub(link);
    match result {
        Ok(()) if bound => {
            link.prove();
            Ok(())
        }
        Ok(()) => Err(rejected(0)),
        Err(fail) if fail.is_bad_blob() => Err(rejected(fail.code)),
        // In a session that worked before, it may be the session; a sealed object with another
        // authorisation is one that somebody else made.
        Err(fail) if fail.is_auth() && !link.is_proven() => Err(rejected(fail.code)),
        Err(fail) => Err(fail.into()),
    }
}

/// The canary's plaintext: known to everybody, useful to nobody, different for each key.
fn canary_value(id: KeyId) -> [u8; 32] {
    let mut sum = Sha256::new();
    sum.update(CANARY_AAD);
    sum.update(id.as_bytes());
    sum.finalize().into()
}

fn open_canary(tpm: &Tpm, link: &mut Link, id: KeyId, canary: &WrappedDek) -> Result<(), BackendError> {
    let mut out = tpm.buffer(DEK_SLOT_LEN)?;
    unwrap(link, id, &canary.bytes, CANARY_AAD, &mut out)?;
    let same = out.with(|out| out == canary_value(id));
    if same { Ok(()) } else { Err(BackendError::Rejected { function: "canary", code: 0 }) }
}

/// Seals the canary and proves the KEK with it: opens, and not under another context, nor altered.
fn make_canary(tpm: &Tpm, link: &mut Link, id: KeyId) -> Result<Pin, BackendError> {
    let mut value = tpm.buffer(DEK_LEN)?;
    value.with_mut(|value| value.copy_from_slice(&canary_value(id)));
    let canary = wrap(tpm, link, id, &value, CANARY_AAD)?;
    open_canary(tpm, link, id, &canary)?;
    let mut flipped = canary.clone();
    flipped.bytes[40] ^= 1;
    for (bytes, aad) in [(&canary, &b"lacre/other/v1"[..]), (&flipped, CANARY_AAD)] {
        let mut out = tpm.buffer(DEK_SLOT_LEN)?;
        if !matches!(unwrap(link, id, &bytes.bytes, aad, &mut out), Err(BackendError::Rejected { .. })) {
            return Err(BackendError::Unfit("the TPM opens altered bytes".to_owned()));
        }
    }
    Ok(Pin::Canary(canary))
}

/// What the canary says of a KEK that refused something: nothing if the TPM is well.
fn judge(tpm: &Tpm, link: &mut Link, kek: &KeyRef) -> Result<(), BackendError> {
    open_canary(tpm, link, kek.id, canary_of(kek)?).map_err(|error| match error {
        // It opened before in this connection.
        BackendError::Rejected { function, code } => BackendError::SessionLost { function, code },
        other => other,
    })
}

fn mac(link: &mut Link, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], BackendError> {
    let (at, _) = leaf(link, key)?;
    let made = link.again(|link| {
        let buffer = MaxBuffer::try_from(message).map_err(|error| Fail::new("TPM2_HMAC", error))?;
        let handle = link.load_again(at)?;
        let sessions = link.secretly();
        link.command("TPM2_HMAC", sessions, |context| {
            context.hmac(handle.into(), buffer, HashingAlgorithm::Sha256)
        })
    });
    let made = made.map_err(|fail| auth_or(link, fail))?;
    link.prove();
    made.value().try_into().map_err(|_| refused("TPM2_HMAC"))
}

/// A refused authorisation in a session that was never accepted is the secret's fault: nothing else differs.
pub(super) fn auth_or(link: &Link, fail: Fail) -> BackendError {
    if fail.is_auth() && !link.is_proven() { wrong_secret() } else { fail.into() }
}

fn public_key(link: &mut Link, key: &KeyRef) -> Result<PublicKey, BackendError> {
    let (_, handle) = leaf(link, key)?;
    let public = link.read_public(handle)?;
    template::public_key(key.spec, &public)
        .ok_or_else(|| BackendError::Unfit("its public key cannot be read".to_owned()))
}

fn fingerprint(link: &mut Link, key: &KeyRef) -> Result<Fingerprint, BackendError> {
    if key.spec == KeySpec::HmacSha256 {
        return Ok(Fingerprint(Sha256::digest(mac(link, key, MAC_PIN_TEXT)?).into()));
    }
    Ok(public_key(link, key)?.fingerprint())
}

/// Makes a child of the root and pins it.
fn generate_leaf(link: &mut Link, planned: &KeyRef) -> Result<KeyRef, BackendError> {
    let id = *planned.id.as_bytes();
    if template::leaf(planned.spec)?.is_none() {
        return Err(refused(planned.spec.making()));
    }
    let made = link.again(|link| {
        let unable = |_| Fail { function: "TPM template", code: 0 };
        let public = template::leaf(planned.spec).map_err(unable)?;
        let public = public.ok_or(Fail { function: "TPM template", code: 0 })?;
        let root = link.root()?;
        let auth = link.auth(id).map_err(|error| Fail::new("auth value", error))?;
        let sessions = link.under_parent();
        link.command("TPM2_Create", sessions, |context| {
            context.create(root, public, Some(auth), None, None, None)
        })
    });
    let made = made.map_err(|fail| match BackendError::from(fail) {
        // Which sizes and curves a TPM has is its own affair.
        BackendError::Refused { code, .. } => BackendError::Refused { function: planned.spec.making(), code },
        other => other,
    })?;
    let blob = write_blob(&made.out_private, &made.out_public)?;
    let unproven = planned.pinned(Pin::Blob { fingerprint: UNPROVEN, blob: blob.clone() });
    let fingerprint = fingerprint(link, &unproven)?;
    if let Some(PublicKey::Rsa { n, e }) = template::public_key(planned.spec, &made.out_public) {
        check_rsa(&n, &e).map_err(|weak| BackendError::Unfit(weak.to_string()))?;
    }
    Ok(planned.pinned(Pin::Blob { fingerprint, blob }))
}

impl Backend for Session {
    fn wrap(&mut self, kek: &KeyRef, dek: &SecretBuf, aad: &[u8]) -> Result<WrappedDek, BackendError> {
        self.with_link(kek, |link| {
            check_kek(&self.tpm, link, kek)?;
            wrap(&self.tpm, link, kek.id, dek, aad)
        })
    }

    fn unwrap(
        &mut self,
        kek: &KeyRef,
        wrapped: &WrappedDek,
        aad: &[u8],
        out: &mut SecretBuf,
    ) -> Result<(), BackendError> {
        let result = self.with_link(kek, |link| {
            check_kek(&self.tpm, link, kek)?;
            match unwrap(link, kek.id, &wrapped.bytes, aad, out) {
                Err(BackendError::Rejected { .. }) => {
                    judge(&self.tpm, link, kek)?;
                    // The TPM is well, and says it again or takes it back.
                    unwrap(link, kek.id, &wrapped.bytes, aad, out)
                }
                other => other,
            }
        });
        if result.is_err() {
            out.with_mut(Zeroize::zeroize);
        }
        result
    }

    fn sign(&mut self, key: &KeyRef, alg: Alg, digest: &[u8]) -> Result<Signature, BackendError> {
        self.with_link(key, |link| sign(link, key, alg, digest))
    }

    fn mac(&mut self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], BackendError> {
        self.with_link(key, |link| mac(link, key, message))
    }

    fn public_key(&mut self, key: &KeyRef) -> Result<PublicKey, BackendError> {
        self.with_link(key, |link| public_key(link, key))
    }

    fn generate(&mut self, planned: &KeyRef, given: Option<&SecretBuf>) -> Result<KeyRef, BackendError> {
        if given.is_some() {
            return Err(refused("TPM2_Import: keys from outside are not taken into a TPM"));
        }
        self.tpm.with_link(|link| {
            if planned.spec != KeySpec::Kek {
                return generate_leaf(link, planned);
            }
            make_salt(link, planned.id)?;
            Ok(planned.pinned(make_canary(&self.tpm, link, planned.id)?))
        })
    }

    fn destroy(&mut self, key: &KeyRef) -> Result<(), BackendError> {
        let done = self.tpm.with_link(|link| {
            if key.spec == KeySpec::Kek {
                destroy_salt(link, key.id)?;
            }
            let at = blob_of(key).map_or(*key.id.as_bytes(), |blob| tag(key.id, blob));
            Ok(link.forget(at)?)
        });
        // Saved contexts of other connections must not outlive it.
        self.tpm.bump_epoch();
        done
    }

    fn inspect(&mut self, key: &KeyRef) -> Result<KeyReport, BackendError> {
        let look = || self.with_link(key, |link| inspect(&self.tpm, link, key));
        let mut report = look()?;
        if !report.deviations.is_empty() {
            let again = look()?;
            report.deviations.retain(|deviation| again.deviations.contains(deviation));
        }
        Ok(report)
    }
}

fn canary_of(kek: &KeyRef) -> Result<&WrappedDek, BackendError> {
    match &*kek.pin {
        Pin::Canary(canary) if canary.mechanism == WrapMechanism::TpmSeal => Ok(canary),
        Pin::Planned => Err(BackendError::Unfit("it was planned and never generated".to_owned())),
        _ => Err(BackendError::Unfit("it was made on a device of another kind".to_owned())),
    }
}

/// Reads the public areas of the key and of what it hangs on, and proves the pin.
fn inspect(tpm: &Tpm, link: &mut Link, key: &KeyRef) -> Result<KeyReport, BackendError> {
    tpm.look_at_lockout(link)?;
    let root = link.again(Link::root)?;
    let (_, mut deviations) = template::check(&link.read_public(root)?, &template::root()?);
    for deviation in &mut deviations {
        *deviation = format!("the root: {deviation}");
    }
    let proven = (|| {
        let (handle, wanted) = match key.spec {
            KeySpec::Kek => (kek(link, key.id)?, template::kek(&[0; 32])?),
            _ if *key.pin == Pin::Planned => return Err(BackendError::Missing),
            spec => (leaf(link, key)?.1, template::leaf(spec)?.ok_or_else(|| refused("TPM template"))?),
        };
        let (attributes, broken) = template::check(&link.read_public(handle)?, &wanted);
        deviations.extend(broken);
        match &*key.pin {
            Pin::Canary(_) => check_kek(tpm, link, key)?,
            Pin::Planned => deviations.push("it was planned and never generated".to_owned()),
            Pin::Blob { fingerprint: pinned, .. } if fingerprint(link, key)? != *pinned => {
                deviations.push("its fingerprint is another one".to_owned());
            }
            // A MAC key's fingerprint is a MAC.
            Pin::Blob { .. } => test_pair(link, key)?,
            Pin::Fingerprint(_) | Pin::Imported(_) => {}
        }
        Ok(attributes)
    })();
    match proven {
        Ok(attributes) => Ok(KeyReport { attributes, deviations, accepted: Vec::new() }),
        Err(BackendError::Unfit(reason)) => {
            deviations.push(reason);
            Ok(KeyReport { deviations, ..KeyReport::default() })
        }
        Err(other) => Err(other),
    }
}
