//! The sessions of a connection: which there are, what each is for, and how they are told from other programs'.
//!
//! One HMAC session, salted to the root, serves for everything; another one comes before it where the owner has an
//! authorisation, and a policy session beside it for as long as a sealed secret is opened.

use tss_esapi::Context;
use tss_esapi::attributes::SessionAttributesBuilder;
use tss_esapi::constants::{PropertyTag, SessionType};
use tss_esapi::handles::{KeyHandle, ObjectHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{Auth, SymmetricDefinition};

use super::{BackendError, Fail, Link, MAKE_PRIMARY, Tpm, template};

/// The first handles of sessions (part 2, section 7.2).
const LOADED_SESSION_FIRST: u32 = 0x0200_0000;
const SAVED_SESSION_FIRST: u32 = 0x0300_0000;
/// What is left of a session's handle without its kind, which not every list shows alike.
const SESSION_NUMBER: u32 = 0x00FF_FFFF;

impl Link {
    /// With an owner authorisation the root is made in an HMAC session: it is proven, not sent. There is no root
    /// yet to salt this first session to, and without a salt a listener could try guesses on its HMACs. So it is
    /// salted to a key that needs no authorisation.
    pub(super) fn authorise_owner(&mut self, tpm: &Tpm) -> Result<(), BackendError> {
        let Some(source) = &tpm.owner_auth else { return Ok(()) };
        if !self.owner_has_auth()? {
            // As after a clear, and then it is the root that tells. From here on it is not sent either.
            tracing::warn!("the TPM's owner has no authorisation, although `owner_auth_source` gives one");
            return Ok(());
        }
        let auth = tpm
            .secret(source)?
            .with(|secret| Auth::try_from(secret))
            .map_err(|_| BackendError::Stopped("`owner_auth_source` gives more than 64 bytes".to_owned()))?;
        let owner = ObjectHandle::from(Hierarchy::Owner);
        self.context.tr_set_auth(owner, auth).map_err(|error| Fail::new("owner auth", error))?;
        let public = template::root()?;
        self.owner = self.again(|link| {
            let public = public.clone();
            let create = |context: &mut Context| {
                context.create_primary(Hierarchy::Null, public, None, None, None, None)
            };
            let made = link.command(MAKE_PRIMARY, (Some(AuthSession::Password), None), create)?;
            let session = link.start_session(Some(made.key_handle), "TPM2_StartAuthSession");
            // Flushed on every path, and the first thing that went wrong is told.
            let flushed = link.flush(made.key_handle.into());
            session.and_then(|session| flushed.map(|()| session))
        })?;
        Ok(())
    }

    /// Whether the owner hierarchy has an authorisation: `TPMA_PERMANENT`, bit 0 (part 2, section 8.6).
    fn owner_has_auth(&mut self) -> Result<bool, Fail> {
        let found = self.properties(PropertyTag::Permanent, 1)?;
        Ok(found.get(&PropertyTag::Permanent).is_some_and(|attributes| attributes & 1 != 0))
    }

    /// Makes the root, and the session that is salted to it.
    pub(super) fn begin(&mut self) -> Result<(), Fail> {
        let root = self.root()?;
        let session = self.start_session(Some(root), "TPM2_StartAuthSession")?;
        self.session = session;
        // It authorises for the owner as well: one session is as good as two, and takes one place.
        if let Some(first @ AuthSession::HmacSession(_)) = self.owner {
            self.owner = session;
            self.flush(SessionHandle::from(first).into())?;
        }
        Ok(())
    }

    fn start_session(
        &mut self,
        salt: Option<KeyHandle>,
        function: &'static str,
    ) -> Result<Option<AuthSession>, Fail> {
        let fail = |error| Fail::new(function, error);
        self.context.clear_sessions();
        let aes = SymmetricDefinition::AES_128_CFB;
        let sha = HashingAlgorithm::Sha256;
        let session = self.context.start_auth_session(salt, None, None, SessionType::Hmac, aes, sha);
        let Some(session) = session.map_err(fail)? else { return Err(Fail { function, code: 0 }) };
        let (attributes, mask) = SessionAttributesBuilder::new()
            .with_continue_session(true)
            .with_decrypt(true)
            .with_encrypt(true)
            .build();
        self.context.tr_sess_set_attributes(session, attributes, mask).map_err(fail)?;
        Ok(Some(session))
    }

    /// Has the session vouch for a command that has nothing to authorise and nothing to encrypt.
    pub(super) fn audit(&mut self, is_on: bool) -> Result<(), Fail> {
        let Some(session) = self.session else { return Ok(()) };
        let (attributes, mask) = SessionAttributesBuilder::new()
            .with_audit(is_on)
            .with_decrypt(!is_on)
            .with_encrypt(!is_on)
            .build();
        let set = self.context.tr_sess_set_attributes(session, attributes, mask);
        set.map_err(|error| Fail::new("session attributes", error))
    }

    /// The sessions in the TPM that are not ours; none, where it cannot be told which ones are ours.
    pub(super) fn foreign_sessions(&mut self, with_saved: bool) -> Vec<TpmHandle> {
        let Some(own) = self.own_sessions() else { return Vec::new() };
        let mut sessions = self.handles(LOADED_SESSION_FIRST).unwrap_or_default();
        if with_saved {
            sessions.extend(self.handles(SAVED_SESSION_FIRST).unwrap_or_default());
        }
        sessions.retain(|session| !own.contains(&(u32::from(*session) & SESSION_NUMBER)));
        sessions
    }

    /// The numbers that our sessions have in the TPM. A session's name is its handle (part 1, section 16).
    fn own_sessions(&mut self) -> Option<Vec<u32>> {
        let policy = self.policy.map(AuthSession::from);
        let sessions = [self.session, self.owner, policy].into_iter().flatten();
        let mut own = Vec::new();
        for session in sessions.filter(|session| !matches!(session, AuthSession::Password)) {
            let name = self.context.tr_get_name(SessionHandle::from(session).into()).ok()?;
            own.push(u32::from_be_bytes(name.value().try_into().ok()?) & SESSION_NUMBER);
        }
        Some(own)
    }

    /// Starts a policy session whose answers are encrypted. Until [`Link::end_policy`] it is the only one.
    pub(in crate::seal::tpm) fn start_policy(&mut self) -> Result<PolicySession, Fail> {
        let function = "TPM2_StartAuthSession";
        let fail = |error| Fail::new(function, error);
        let started = self.again(|link| {
            let root = link.root()?;
            let (aes, sha) = (SymmetricDefinition::AES_128_CFB, HashingAlgorithm::Sha256);
            link.command(function, (None, None), |context| {
                context.start_auth_session(Some(root), None, None, SessionType::Policy, aes, sha)
            })
        })?;
        let session = started.ok_or(Fail { function, code: 0 })?;
        let policy = PolicySession::try_from(session).map_err(fail)?;
        self.policy = Some(policy);
        let (attributes, mask) = SessionAttributesBuilder::new().with_encrypt(true).build();
        self.context.tr_sess_set_attributes(session, attributes, mask).map_err(fail)?;
        Ok(policy)
    }

    /// Ends the policy session.
    pub(in crate::seal::tpm) fn end_policy(&mut self) {
        if let Some(session) = self.policy.take() {
            // A session that was used up is gone already.
            let _ = self.flush(SessionHandle::from(AuthSession::from(session)).into());
        }
    }
}

/// The owner is under no dictionary attack protection, so a wrong authorisation costs no try; but it does not
/// become right by itself.
pub(super) fn owner_or(tpm: &Tpm, fail: Fail) -> BackendError {
    if !(fail.is_auth() && fail.function == MAKE_PRIMARY) {
        return fail.into();
    }
    BackendError::Stopped(match tpm.owner_auth {
        Some(_) => "the TPM's owner has another authorisation than `owner_auth_source` gives".to_owned(),
        None => "the TPM's owner has an authorisation: `owner_auth_source` has to give it".to_owned(),
    })
}
