//! One connection to a TPM: its session, the objects that are loaded through it, and their slots.
//!
//! A TPM without a resource manager has three slots for objects. Two may be taken between calls, the third
//! is for what one call needs; everything is flushed on every path. What was loaded once is kept as a saved
//! context as well, which loads without its parent and faster than its blob. When the TPM says that it is
//! full, because another program left something behind, all of it is flushed and the call repeated once.

mod sessions;

use std::collections::{HashMap, HashSet};

use aws_lc_rs::hmac;
use tss_esapi::Context;
use tss_esapi::constants::{CapabilityType, PropertyTag, StartupType};
use tss_esapi::handles::{KeyHandle, ObjectHandle, TpmHandle};
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{Auth, CapabilityData, Private, Public};
use tss_esapi::utils::TpmsContext;

use super::error::Fail;
use super::template;
use super::{BackendError, Tpm};
use crate::seal::guarded::SecretBuf;

/// Objects that stay loaded between calls.
const CACHED: usize = 2;
/// What makes a primary; that the owner refuses it, shows here first.
const MAKE_PRIMARY: &str = "TPM2_CreatePrimary";
/// The first handle of loaded objects (part 2, section 7.2).
const TRANSIENT_FIRST: u32 = 0x8000_0000;

/// What an object is known by here: the key's id, or zeros for the root.
pub(super) type Id = [u8; 16];
pub(super) const ROOT: Id = [0; 16];

/// How an object comes into the TPM.
pub(super) enum Origin {
    /// It is computed from the owner's seed and this template.
    Primary(Public),
    /// It is a child of the root.
    Child(Private, Public),
}

struct Loaded {
    id: Id,
    handle: KeyHandle,
}

/// The connection.
pub(super) struct Link {
    pub(super) context: Context,
    /// The epoch in which it was opened.
    pub(super) since: u64,
    /// Salted to the root; encrypts parameters both ways.
    session: Option<AuthSession>,
    /// What authorises for the owner: nothing to prove, or a secret that is not sent. That is `session`, once
    /// there is one.
    owner: Option<AuthSession>,
    /// The policy session of the present call.
    policy: Option<PolicySession>,
    /// Whether a resource manager shares the TPM: what is saved in it then belongs to programs that run.
    is_shared: bool,
    /// The most recently used last.
    loaded: Vec<Loaded>,
    /// Contexts of what was loaded before.
    saved: HashMap<Id, TpmsContext>,
    /// Objects with an authorisation value, and the key whose it is.
    authorised: HashMap<Id, Id>,
    /// Pins of KEKs that were found to be theirs since the connection was opened.
    checked: HashSet<Id>,
    /// What authorisation values are made of.
    secret: Option<SecretBuf>,
    /// Whether the session has been accepted once: then a refused authorisation may be the session's fault.
    proven: bool,
}

/// How often somebody may still fail before the TPM locks itself for what is under its protection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lockout {
    pub(super) is_locked: bool,
    pub(super) failed_tries: u32,
    pub(super) max_tries: u32,
    /// Seconds after which one failed try is forgiven.
    pub(super) interval: u32,
    /// Seconds after which the lockout authorisation itself may be tried again.
    pub(super) recovery: u32,
}

impl Lockout {
    /// Told only when there is something to tell. Lacre's keys are not under this protection and go on working.
    pub(super) fn notice(self) -> Option<String> {
        let Self { is_locked, failed_tries, max_tries, interval, recovery } = self;
        if is_locked {
            return Some(format!(
                "tpm_lockout: {failed_tries} of {max_tries} tries with wrong authorisations were made by others; \
                 it ends by itself within {interval} seconds (the lockout authority's own pause is {recovery} \
                 seconds), or by tpm2_dictionarylockout --clear-lockout. Lacre makes no try; its keys are not \
                 affected"
            ));
        }
        (failed_tries > 0).then(|| {
            format!("{failed_tries} of {max_tries} tries before the TPM's lockout are used up; one is forgiven each {interval} seconds")
        })
    }
}

impl Link {
    /// Opens the connection, makes the root and a session salted to it.
    ///
    /// What needs no key of the installation works then; the rest after [`Link::unlock`].
    pub(super) fn open(tpm: &Tpm) -> Result<Self, BackendError> {
        let context = Context::new(tpm.tcti.clone()).map_err(|error| Fail::new("open TCTI", error))?;
        let mut link = Self {
            context,
            since: tpm.epoch(),
            session: None,
            owner: Some(AuthSession::Password),
            policy: None,
            is_shared: ["device:/dev/tpmrm", "tabrmd"].iter().any(|kind| tpm.address.starts_with(kind)),
            loaded: Vec::new(),
            saved: HashMap::new(),
            authorised: HashMap::new(),
            checked: HashSet::new(),
            secret: None,
            proven: false,
        };
        // A TPM that runs answers INITIALIZE; one that was just switched on needs this.
        let _ = link.context.startup(StartupType::Clear);
        link.authorise_owner(tpm)?;
        link.again(Self::begin).map_err(|fail| sessions::owner_or(tpm, fail))?;
        Ok(link)
    }

    /// Takes the secret that authorisation values are made of. Only from a TPM whose identity was checked: a
    /// sealed one is for that TPM alone.
    pub(super) fn unlock(&mut self, tpm: &Tpm) -> Result<(), BackendError> {
        let secret = tpm.auth.read(tpm, self)?;
        self.secret = Some(secret);
        Ok(())
    }

    /// Repeats `call` once after everything was flushed, if the TPM has no room.
    pub(super) fn again<T>(&mut self, call: impl Fn(&mut Self) -> Result<T, Fail>) -> Result<T, Fail> {
        match call(self) {
            Err(fail) if fail.is_full() => {
                self.make_room(fail);
                call(self)
            }
            other => other,
        }
    }

    /// One command in the given sessions.
    pub(super) fn command<T>(
        &mut self,
        function: &'static str,
        sessions: (Option<AuthSession>, Option<AuthSession>),
        command: impl FnOnce(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, Fail> {
        self.context.set_sessions((sessions.0, sessions.1, None));
        let result = command(&mut self.context);
        self.context.clear_sessions();
        result.map_err(|error| Fail::new(function, error))
    }

    /// The sessions for an object whose authorisation is a secret, and whose parameters are.
    pub(super) fn secretly(&self) -> (Option<AuthSession>, Option<AuthSession>) {
        (self.session, None)
    }

    /// The sessions for a parent, whose authorisation is empty, where the parameters are secret.
    pub(super) fn under_parent(&self) -> (Option<AuthSession>, Option<AuthSession>) {
        (Some(AuthSession::Password), self.session)
    }

    /// The sessions for what the owner allows.
    pub(super) fn as_owner(&self) -> (Option<AuthSession>, Option<AuthSession>) {
        match self.owner {
            Some(AuthSession::Password) => (self.owner, self.session),
            owner => (owner, None),
        }
    }

    /// The handle of an object, which is brought into the TPM where it is not there. `auth_of` is the key whose
    /// authorisation value it has.
    pub(super) fn load(
        &mut self,
        id: Id,
        auth_of: Option<Id>,
        origin: &dyn Fn() -> Result<Origin, BackendError>,
    ) -> Result<KeyHandle, Fail> {
        if let Some(at) = self.loaded.iter().position(|loaded| loaded.id == id) {
            let loaded = self.loaded.remove(at);
            let handle = loaded.handle;
            self.loaded.push(loaded);
            return Ok(handle);
        }
        self.evict(CACHED)?;
        let handle = match self.restore(id) {
            Some(restored) => restored,
            None => self.make(id, origin)?,
        };
        self.loaded.push(Loaded { id, handle });
        self.evict(CACHED)?;
        if let Some(key) = auth_of {
            self.authorised.insert(id, key);
            let auth = self.auth(key).map_err(|error| Fail::new("auth value", error))?;
            self.context.tr_set_auth(handle.into(), auth).map_err(|error| Fail::new("auth value", error))?;
        }
        Ok(handle)
    }

    /// The handle of an object that was loaded a moment ago. After everything was flushed to make room it comes
    /// back from its saved context, under another handle.
    pub(super) fn load_again(&mut self, id: Id) -> Result<KeyHandle, Fail> {
        let auth_of = self.authorised.get(&id).copied();
        self.load(id, auth_of, &|| Err(BackendError::SessionLost { function: "saved context", code: 0 }))
    }

    /// The root's handle.
    pub(super) fn root(&mut self) -> Result<KeyHandle, Fail> {
        self.load(ROOT, None, &|| Ok(Origin::Primary(template::root()?)))
    }

    /// The handle of an object that is loaded now.
    pub(super) fn loaded(&self, id: Id) -> Option<KeyHandle> {
        self.loaded.iter().find(|loaded| loaded.id == id).map(|loaded| loaded.handle)
    }

    fn restore(&mut self, id: Id) -> Option<KeyHandle> {
        let saved = self.saved.get(&id)?.clone();
        match self.context.context_load(saved) {
            Ok(handle) => Some(KeyHandle::from(handle)),
            // After a reset of the TPM it is worth nothing.
            Err(_) => {
                self.saved.remove(&id);
                None
            }
        }
    }

    fn make(&mut self, id: Id, origin: &dyn Fn() -> Result<Origin, BackendError>) -> Result<KeyHandle, Fail> {
        let origin = origin().map_err(|_| Fail { function: "TPM template", code: 0 })?;
        let handle = match origin {
            Origin::Primary(public) => {
                let sessions = self.as_owner();
                let create = |context: &mut Context| {
                    context.create_primary(Hierarchy::Owner, public, None, None, None, None)
                };
                self.command(MAKE_PRIMARY, sessions, create)?.key_handle
            }
            Origin::Child(private, public) => {
                let root = self.root()?;
                // The root and one other; this object is the third.
                let sessions = (Some(AuthSession::Password), None);
                self.command("TPM2_Load", sessions, |context| context.load(root, private, public))?
            }
        };
        if let Ok(saved) = self.context.context_save(handle.into()) {
            self.saved.insert(id, saved);
        }
        Ok(handle)
    }

    /// Flushes the least recently used objects until `keep` are loaded.
    fn evict(&mut self, keep: usize) -> Result<(), Fail> {
        while self.loaded.len() > keep {
            let oldest = self.loaded.remove(0);
            self.flush(oldest.handle.into())?;
        }
        Ok(())
    }

    /// Flushes one object of a call.
    pub(super) fn flush(&mut self, handle: ObjectHandle) -> Result<(), Fail> {
        self.command("TPM2_FlushContext", (None, None), |context| context.flush_context(handle))
    }

    /// Forgets an object that was destroyed.
    pub(super) fn forget(&mut self, id: Id) -> Result<(), Fail> {
        self.saved.remove(&id);
        // Which of them were this key's is not known here; asking again costs one canary each.
        self.checked.clear();
        match self.loaded.iter().position(|loaded| loaded.id == id) {
            Some(at) => {
                let loaded = self.loaded.remove(at);
                self.flush(loaded.handle.into())
            }
            None => Ok(()),
        }
    }

    /// Flushes all loaded objects, and sessions that are not ours: those that another program, or a process of
    /// ours that was killed, left in a TPM without a resource manager.
    fn make_room(&mut self, full: Fail) {
        let own = self.loaded.len();
        if let Err(fail) = self.evict(0) {
            tracing::debug!(?fail, "a loaded object cannot be flushed");
        }
        self.loaded.clear();
        let objects = self.handles(TRANSIENT_FIRST).unwrap_or_default();
        // Saved ones take no room, but there are numbers for some dozens only.
        let with_saved = full.is_out_of_sessions() && !self.is_shared;
        let foreign = objects.into_iter().chain(self.foreign_sessions(with_saved));
        let mut flushed = 0;
        for handle in foreign.collect::<Vec<_>>() {
            if let Ok(object) = self.context.tr_from_tpm_public(handle) {
                // The crate calls it an error to have flushed a policy session; the TPM has flushed it.
                let _ = self.context.flush_context(object);
                flushed += 1;
            }
        }
        tracing::warn!(own, flushed, "the TPM had no room; what was left behind in it was flushed");
    }

    /// Handles that are in use, from `first` on.
    pub(super) fn handles(&mut self, first: u32) -> Result<Vec<TpmHandle>, Fail> {
        let ask = |context: &mut Context| context.get_capability(CapabilityType::Handles, first, 32);
        match self.command("TPM2_GetCapability", (None, None), ask)?.0 {
            CapabilityData::Handles(list) => Ok(list.into_inner()),
            _ => Err(Fail { function: "TPM2_GetCapability", code: 0 }),
        }
    }

    /// The same, proven by the session to be the TPM's own answer: what is not in it, is not there.
    pub(super) fn handles_for_sure(&mut self, first: u32) -> Result<Vec<TpmHandle>, Fail> {
        self.audit(true)?;
        let ask = |context: &mut Context| context.get_capability(CapabilityType::Handles, first, 32);
        let listed = self.command("TPM2_GetCapability", (self.session, None), ask);
        self.audit(false)?;
        match listed?.0 {
            CapabilityData::Handles(list) => Ok(list.into_inner()),
            _ => Err(Fail { function: "TPM2_GetCapability", code: 0 }),
        }
    }

    /// The authorisation value of a key.
    pub(super) fn auth(&self, id: Id) -> tss_esapi::Result<Auth> {
        let Some(secret) = &self.secret else {
            return Err(tss_esapi::Error::WrapperError(tss_esapi::WrapperErrorKind::MissingAuthSession));
        };
        let key = secret.with(|secret| hmac::Key::new(hmac::HMAC_SHA256, secret));
        let mut sum = hmac::Context::with_key(&key);
        sum.update(b"lacre/tpm-auth/v1");
        sum.update(&id);
        Auth::try_from(sum.sign().as_ref())
    }

    /// Takes note that a KEK opens its canary.
    pub(super) fn note_checked(&mut self, pin: Id) {
        self.checked.insert(pin);
    }

    pub(super) fn is_checked(&self, pin: Id) -> bool {
        self.checked.contains(&pin)
    }

    /// Takes note that the TPM has accepted the session.
    pub(super) fn prove(&mut self) {
        self.proven = true;
    }

    pub(super) fn is_proven(&self) -> bool {
        self.proven
    }

    /// What the TPM calls the root: a hash of its public area.
    pub(super) fn root_name(&mut self) -> Result<Vec<u8>, BackendError> {
        let root = self.again(Self::root)?;
        let name =
            self.context.tr_get_name(root.into()).map_err(|error| Fail::new("name of the root", error))?;
        Ok(name.value().to_vec())
    }

    /// The public area of a loaded object, from the TPM.
    pub(super) fn read_public(&mut self, handle: KeyHandle) -> Result<Public, Fail> {
        let read = self.command("TPM2_ReadPublic", (None, None), |context| context.read_public(handle));
        read.map(|(public, _, _)| public)
    }

    pub(super) fn properties(
        &mut self,
        first: PropertyTag,
        count: u32,
    ) -> Result<HashMap<PropertyTag, u32>, Fail> {
        let ask = |context: &mut Context| {
            context.get_capability(CapabilityType::TpmProperties, first.into(), count)
        };
        match self.command("TPM2_GetCapability", (None, None), ask)?.0 {
            CapabilityData::TpmProperties(list) => {
                Ok(list.into_iter().map(|property| (property.property(), property.value())).collect())
            }
            _ => Err(Fail { function: "TPM2_GetCapability", code: 0 }),
        }
    }

    /// The state of the dictionary attack protection.
    pub(super) fn lockout(&mut self) -> Result<Lockout, Fail> {
        let found = self.properties(PropertyTag::Permanent, 32)?;
        let value = |tag| found.get(&tag).copied().unwrap_or(0);
        Ok(Lockout {
            // TPMA_PERMANENT, bit 9: inLockout (part 2, section 8.6).
            is_locked: value(PropertyTag::Permanent) & (1 << 9) != 0,
            failed_tries: value(PropertyTag::LockoutCounter),
            max_tries: value(PropertyTag::MaxAuthFail),
            interval: value(PropertyTag::LockoutInterval),
            recovery: value(PropertyTag::LockoutRecovery),
        })
    }

    /// Manufacturer, its text and the firmware, as the chip says.
    pub(super) fn description(&mut self) -> Result<String, BackendError> {
        let found = self.properties(PropertyTag::FamilyIndicator, 32)?;
        let text = |tags: &[PropertyTag]| {
            let words = tags.iter().filter_map(|tag| found.get(tag)).flat_map(|word| word.to_be_bytes());
            let bytes: Vec<u8> = words.filter(|byte| byte.is_ascii_graphic() || *byte == b' ').collect();
            String::from_utf8_lossy(&bytes).trim().to_owned()
        };
        let vendor = [
            PropertyTag::VendorString1,
            PropertyTag::VendorString2,
            PropertyTag::VendorString3,
            PropertyTag::VendorString4,
        ];
        let firmware = found.get(&PropertyTag::FirmwareVersion1).copied().unwrap_or(0);
        let vendor = [text(&[PropertyTag::Manufacturer]), text(&vendor)].join(" ");
        Ok(format!("TPM 2.0 {} {}.{}", vendor.trim(), firmware >> 16, firmware & 0xFFFF))
    }

    /// An answer of other bytes in the place where the last one was.
    pub(super) fn overwrite_answer(&mut self) {
        self.context.clear_sessions();
        let _ = self.context.get_random(48);
    }

    /// Ends in order, so that a power cut after this is not one in the middle of something.
    pub(super) fn close(mut self) {
        if let Err(fail) = self.evict(0) {
            tracing::debug!(?fail, "a loaded object cannot be flushed");
        }
        self.context.clear_sessions();
        if let Err(error) = self.context.shutdown(StartupType::Clear) {
            tracing::debug!(%error, "TPM2_Shutdown failed");
        }
        // Dropping the context flushes the session.
    }
}
