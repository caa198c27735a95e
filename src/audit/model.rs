//! What a record says.

use std::sync::{Arc, Mutex, PoisonError};

/// Everything that is recorded. The names are part of `docs/formats/audit-v1.md`; add, never rename.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The daemon came up.
    DaemonStart,
    /// The daemon went down in order.
    DaemonStop,
    /// The schema was changed.
    DbMigrate,
    /// A token was asked for at the token endpoint.
    TokenIssue,
    /// A request was refused for want of a valid credential (counted, rate-limited).
    AuthFail,
    /// An application was made.
    AppCreate,
    /// An application was deleted.
    AppDelete,
    /// Applications were listed.
    AppList,
    /// A secret was created.
    SecretCreate,
    /// Secrets' metadata were read.
    SecretList,
    /// A secret's metadata were read.
    SecretShow,
    /// A secret's value was released.
    SecretReveal,
    /// A new version was stored.
    SecretReplace,
    /// A secret was deleted.
    SecretDelete,
    /// Values were sealed for a caller that keeps them.
    SealExternal,
    /// Values were opened for a caller that keeps them.
    OpenExternal,
    /// A data key was made.
    DataKeyCreate,
    /// A KEK version was made.
    KekRotate,
    /// KEKs were listed.
    KekList,
    /// A rewrap was started.
    RewrapStart,
    /// A rewrap ended.
    RewrapEnd,
    /// A job was asked to stop.
    JobCancel,
    /// A signing or MAC key was made.
    KeyCreate,
    /// A signing or MAC key was retired: nothing it signed lives, it was deleted or cancelled, or its device was
    /// lost.
    KeyRetire,
    /// Signing or cookie keys were listed, or their policy was read.
    KeyList,
    /// A new signing or cookie key was asked for.
    KeyRotate,
    /// A signing or cookie key began to sign, and the one before it stopped.
    KeyActivate,
    /// A pending signing key was cancelled.
    KeyCancel,
    /// A signing key that had been in use was taken back into use.
    KeyRevert,
    /// A signing or cookie key was deleted by an administrator.
    KeyDelete,
    /// A signing or cookie key was revoked: whatever it signed is worth nothing any more.
    KeyRevoke,
    /// A private key was brought into the device.
    KeyImport,
    /// A retired key was destroyed on its device.
    KeyDestroy,
    /// The rules of a tenant's signing or cookie keys were changed.
    KeyPolicy,
    /// A token was signed for an application.
    JwtSign,
    /// A token that an application had built was signed.
    JwsSign,
    /// A cookie was signed for an application.
    CookieSign,
    /// What an application may have signed was changed.
    AppPolicy,
    /// An application got another secret, because the old one cannot be checked any more.
    AppReissue,
    /// Users or identities were asked for without the right.
    UserRead,
    /// A user was made.
    UserCreate,
    /// A user was changed.
    UserUpdate,
    /// A user was deleted, with identities and token sets.
    UserDelete,
    /// An account at a provider was linked to a user, or replaced.
    IdentityLink,
    /// An account at a provider was taken away from a user.
    IdentityUnlink,
    /// Connectors were asked for without the right.
    ConnectorRead,
    /// A connector was made.
    ConnectorCreate,
    /// A connector was changed.
    ConnectorUpdate,
    /// A connector was deleted.
    ConnectorDelete,
    /// A provider refuses a connector, and is not asked for a while.
    ConnectorBreaker,
    /// The account center's settings were changed.
    AccountCenterUpdate,
    /// A sign-in at a provider was begun.
    VerificationStart,
    /// A proof was given.
    VerificationVerify,
    /// Tokens of a provider were stored by a person's sign-in.
    TokenSetStore,
    /// A provider's access token was released.
    TokenSetRead,
    /// Tokens were refreshed at their provider.
    TokenSetRefresh,
    /// A grant is dead: the person has to authorise again.
    TokenSetDead,
    /// A token set was deleted.
    TokenSetDelete,
    /// A deleted token set was revoked at its provider.
    TokenSetRevoke,
    /// Records of a Logto database were imported.
    LogtoImport,
    /// An application's name, addresses or switches were changed.
    AppUpdate,
    /// A token was traded for another one.
    TokenExchange,
    /// A token that stands for a user was made, to be exchanged once.
    SubjectTokenIssue,
    /// A restore began, and with it the quarantine.
    RestoreBegin,
    /// A restore has done what it could.
    RestoreEnd,
    /// The quarantine was ended.
    RestoreRelease,
    /// The roll-back anchor goes on to the next generation.
    AnchorAdvance,
    /// The database is not the one that is anchored.
    AnchorIncident,
    /// Persons took the database as the present one.
    AnchorAccept,
    /// A stored value failed its integrity check.
    IntegrityIncident,
    /// A key on the device is missing or unfit.
    KeyIncident,
    /// The audit log was read.
    AuditRead,
    /// The audit log could not be written for a while.
    AuditOutage,
}

impl Action {
    /// Every action, for the documentation.
    pub const ALL: [Self; 73] = [
        Self::DaemonStart,
        Self::DaemonStop,
        Self::DbMigrate,
        Self::TokenIssue,
        Self::AuthFail,
        Self::AppCreate,
        Self::AppDelete,
        Self::AppList,
        Self::SecretCreate,
        Self::SecretList,
        Self::SecretShow,
        Self::SecretReveal,
        Self::SecretReplace,
        Self::SecretDelete,
        Self::SealExternal,
        Self::OpenExternal,
        Self::DataKeyCreate,
        Self::KekRotate,
        Self::KekList,
        Self::RewrapStart,
        Self::RewrapEnd,
        Self::JobCancel,
        Self::KeyCreate,
        Self::KeyRetire,
        Self::KeyList,
        Self::KeyRotate,
        Self::KeyActivate,
        Self::KeyCancel,
        Self::KeyRevert,
        Self::KeyDelete,
        Self::KeyRevoke,
        Self::KeyImport,
        Self::KeyDestroy,
        Self::KeyPolicy,
        Self::JwtSign,
        Self::JwsSign,
        Self::CookieSign,
        Self::AppPolicy,
        Self::AppReissue,
        Self::UserRead,
        Self::UserCreate,
        Self::UserUpdate,
        Self::UserDelete,
        Self::IdentityLink,
        Self::IdentityUnlink,
        Self::ConnectorRead,
        Self::ConnectorCreate,
        Self::ConnectorUpdate,
        Self::ConnectorDelete,
        Self::ConnectorBreaker,
        Self::AccountCenterUpdate,
        Self::VerificationStart,
        Self::VerificationVerify,
        Self::TokenSetStore,
        Self::TokenSetRead,
        Self::TokenSetRefresh,
        Self::TokenSetDead,
        Self::TokenSetDelete,
        Self::TokenSetRevoke,
        Self::LogtoImport,
        Self::AppUpdate,
        Self::TokenExchange,
        Self::SubjectTokenIssue,
        Self::RestoreBegin,
        Self::RestoreEnd,
        Self::RestoreRelease,
        Self::AnchorAdvance,
        Self::AnchorAccept,
        Self::AnchorIncident,
        Self::IntegrityIncident,
        Self::KeyIncident,
        Self::AuditRead,
        Self::AuditOutage,
    ];

    /// The name in the record.
    #[expect(clippy::too_many_lines, reason = "one line for each action")]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DaemonStart => "daemon.start",
            Self::DaemonStop => "daemon.stop",
            Self::DbMigrate => "db.migrate",
            Self::TokenIssue => "token.issue",
            Self::AuthFail => "auth.fail",
            Self::AppCreate => "app.create",
            Self::AppDelete => "app.delete",
            Self::AppList => "app.list",
            Self::SecretCreate => "secret.create",
            Self::SecretList => "secret.list",
            Self::SecretShow => "secret.show",
            Self::SecretReveal => "secret.reveal",
            Self::SecretReplace => "secret.replace",
            Self::SecretDelete => "secret.delete",
            Self::SealExternal => "external.seal",
            Self::OpenExternal => "external.open",
            Self::DataKeyCreate => "datakey.create",
            Self::KekRotate => "kek.rotate",
            Self::KekList => "kek.list",
            Self::RewrapStart => "rewrap.start",
            Self::RewrapEnd => "rewrap.end",
            Self::JobCancel => "job.cancel",
            Self::KeyCreate => "key.create",
            Self::KeyRetire => "key.retire",
            Self::KeyList => "key.list",
            Self::KeyRotate => "key.rotate",
            Self::KeyActivate => "key.activate",
            Self::KeyCancel => "key.cancel",
            Self::KeyRevert => "key.revert",
            Self::KeyDelete => "key.delete",
            Self::KeyRevoke => "key.revoke",
            Self::KeyImport => "key.import",
            Self::KeyDestroy => "key.destroy",
            Self::KeyPolicy => "key.policy",
            Self::JwtSign => "jwt.sign",
            Self::JwsSign => "jws.sign",
            Self::CookieSign => "cookie.sign",
            Self::AppPolicy => "app.policy",
            Self::AppReissue => "app.reissue",
            Self::UserRead => "user.read",
            Self::UserCreate => "user.create",
            Self::UserUpdate => "user.update",
            Self::UserDelete => "user.delete",
            Self::IdentityLink => "identity.link",
            Self::IdentityUnlink => "identity.unlink",
            Self::ConnectorRead => "connector.read",
            Self::ConnectorCreate => "connector.create",
            Self::ConnectorUpdate => "connector.update",
            Self::ConnectorDelete => "connector.delete",
            Self::ConnectorBreaker => "connector.breaker",
            Self::AccountCenterUpdate => "account-center.update",
            Self::VerificationStart => "verification.start",
            Self::VerificationVerify => "verification.verify",
            Self::TokenSetStore => "token-set.store",
            Self::TokenSetRead => "token-set.read",
            Self::TokenSetRefresh => "token-set.refresh",
            Self::TokenSetDead => "token-set.needs-reauthorization",
            Self::TokenSetDelete => "token-set.delete",
            Self::TokenSetRevoke => "token-set.revoke",
            Self::LogtoImport => "logto.import",
            Self::AppUpdate => "app.update",
            Self::TokenExchange => "token.exchange",
            Self::SubjectTokenIssue => "subject-token.issue",
            Self::RestoreBegin => "restore.begin",
            Self::RestoreEnd => "restore.end",
            Self::RestoreRelease => "restore.release",
            Self::AnchorAdvance => "anchor.advance",
            Self::AnchorIncident => "incident.anchor",
            Self::AnchorAccept => "anchor.accept",
            Self::IntegrityIncident => "incident.integrity",
            Self::KeyIncident => "incident.key",
            Self::AuditRead => "audit.read",
            Self::AuditOutage => "audit.outage",
        }
    }
}

/// What is about to happen, or has happened.
#[derive(Clone, Debug)]
pub struct Event {
    pub(super) action: Action,
    pub(super) object_kind: &'static str,
    pub(super) object_id: String,
    pub(super) details: Vec<(&'static str, String)>,
}

impl Event {
    /// An action on an object, for example `(SecretReveal, "secret", id)`.
    pub fn new(action: Action, object_kind: &'static str, object_id: impl Into<String>) -> Self {
        Self { action, object_kind, object_id: object_id.into(), details: Vec::new() }
    }

    /// Adds a detail: a name or a number, never a value.
    #[must_use]
    pub fn detail(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.details.push((key, value.into()));
        self
    }
}

/// Collects what the work learns for the outcome record.
#[derive(Clone, Debug, Default)]
pub struct Note(Arc<Mutex<Vec<(&'static str, String)>>>);

impl Note {
    /// Adds a detail: a name or a number, never a value. Different values of one key, as the parts of
    /// a batch may have, stand side by side with a comma: a record has every key once.
    pub fn add(&self, key: &'static str, value: impl Into<String>) {
        let (mut details, value) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), value.into());
        match details.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) if known.split(',').any(|one| one == value) => {}
            Some((_, known)) => *known = format!("{known},{value}"),
            None => details.push((key, value)),
        }
    }

    pub(super) fn take(&self) -> Vec<(&'static str, String)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Success,
    /// Refused before anything was done; the code says why.
    Denied(&'static str),
    /// Failed; the code says why.
    Failure(&'static str),
    /// Nobody knows: the process died or the caller went away in between.
    Unknown,
}

/// A record as it is served: its number and its exact bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// 1, 2, ... without gaps over all tenants.
    pub seq: u64,
    /// One line of JSON, without the line end.
    pub body: String,
}
