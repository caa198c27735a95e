//! Federated token sets: users, their accounts at other providers, the connectors to these, the tokens that came
//! from there, and their refresh.
//!
//! Promises: token values and connectors' secrets are stored only sealed, bound to tenant, user and connection, and are
//! released after a durable audit record. A set is refreshed by one at a time, over all daemons; the intent is durable
//! before the provider is called and the answer before anybody gets it. A read never deletes. Whatever takes away an
//! identity, a user, a connector or its storage takes the tokens along, parked ones too, and a refresh in
//! flight does not bring them back.
//!
//! `plan.rs` decides what a read does, `refresh.rs` is the protocol of a refresh, `providers/` what is particular to each
//! provider. The services for each kind of thing are in a file of its name; start reading at `read.rs`.

mod account;
mod connectors;
mod identities;
pub mod import;
mod logto_format;
mod model;
mod password;
mod plan;
pub mod providers;
mod read;
mod refresh;
mod sets;
mod spool;
mod status;
mod store;
mod sweep;
mod users;
mod verification;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::audit::{Action, AuditCode, AuditError, AuditLog, Event, Note, Outcome};
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope, Scope};
use crate::upstream::{Class, TokenFailure, Upstream};
use crate::vault::{Vault, VaultError};

pub use logto_format::{Kek as LogtoKek, NotOurs as NotLogtos};
pub use model::*;
pub use read::{Release, Released};
pub use status::Status;

/// Revocations that run at the same time: a connector that is deleted may have many thousand sets.
const REVOCATIONS: usize = 4;

/// Why something with users, connectors or token sets was refused, sorted by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The caller lacks a machine's right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// The person's token lacks a scope.
    #[error("the scope `{0}` is needed")]
    MissingUserScope(&'static str),
    /// No such user, connector or token set in the caller's tenant; or it is another tenant's, which looks the same.
    #[error("no such {0}")]
    NotFound(&'static str),
    /// The user has no such identity.
    #[error("no such identity")]
    NoIdentity(Family),
    /// Nothing is stored for that connection.
    #[error("no token set is stored")]
    NothingStored,
    /// The access token is dead and nothing but the person can bring another.
    #[error("the person has to authorise again")]
    NeedsReauthorization,
    /// The account center is switched off.
    #[error("the account center is not enabled")]
    NotEnabled,
    /// That part of the account cannot be changed by its owner.
    #[error("the field cannot be edited")]
    NotEditable,
    /// No such proof: unknown, expired, used up, not verified, or of another kind.
    #[error("no such verification record")]
    NoVerification,
    /// The change needs a proof that the person is there.
    #[error("a verification record of the same person is needed")]
    ProofNeeded,
    /// The proof is of another connection.
    #[error("the verification is for another target")]
    WrongTarget {
        /// What the path names.
        expected: String,
        /// What the proof is of.
        actual: String,
    },
    /// The proof brought no tokens.
    #[error("the verification has no token set")]
    NoTokens,
    /// The proven account is not linked to this person.
    #[error("the identity is not linked to this user")]
    NotLinked,
    /// The account is linked to another user, or this user has that connection already.
    #[error("the identity is in use")]
    IdentityInUse {
        /// By this very user.
        by_caller: bool,
    },
    /// It is the only way in.
    #[error("the last way to sign in cannot be removed")]
    LastSignIn,
    /// The connector cannot keep or refresh tokens.
    #[error("the connector does not store tokens")]
    NoTokenStorage,
    /// A verification or refresh names a connector that is not there.
    #[error("no such connector")]
    UnknownConnector,
    /// The connector is of another kind.
    #[error("the connector is of another kind")]
    WrongConnector,
    /// `state` or `redirectUri` is missing.
    #[error("state and redirectUri are needed")]
    InsufficientInfo,
    /// The answer of a sign-in is not the one to what was asked: which part of it.
    #[error("`{0}` is not what was asked for")]
    Callback(&'static str),
    /// The password is wrong.
    #[error("wrong password")]
    WrongPassword,
    /// Too many wrong passwords: later.
    #[error("too many wrong passwords")]
    TooManyTries,
    /// The provider refused or failed.
    #[error("the provider failed")]
    Provider(#[source] ProviderError),
    /// A unique member is taken.
    #[error("{0} is in use")]
    Taken(&'static str),
    /// The input breaks a rule.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which member.
        field: String,
        /// Which rule; never the value.
        reason: String,
    },
    /// Somebody else is at it and does not end; try again later.
    #[error("another refresh does not end")]
    Busy,
    /// Restored and not released: nothing calls out.
    #[error("the installation is in quarantine after a restore")]
    Quarantined,
    /// Sealing or opening failed.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The audit log cannot take the record, so nothing was done.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The database failed.
    #[error("storage failed")]
    Db(#[from] DbError),
}

/// What a provider did, in words of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind:?}")]
pub struct ProviderError {
    /// What kind of failure it is.
    pub kind: ProviderFault,
    /// When the next call makes sense.
    pub retry_after: Option<Duration>,
}

/// Kinds of a provider's failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProviderFault {
    /// The connector's configuration or credentials are refused; a person has to mend them.
    Config,
    /// The code or grant is refused.
    GrantDead,
    /// It does not answer, or says later.
    Transient,
    /// Its answer is none.
    Protocol,
    /// It forbids it: consent, interaction, policy.
    Policy,
}

/// What a failure of a call means here. Whoever says 200 and names a passing trouble in the body does not keep to the
/// protocol, and an error that means nothing is an error (contract, section 8.3). Both are tried again.
fn fault_of(failure: &TokenFailure) -> ProviderFault {
    let is_ok = failure.status.is_some_and(|status| (200..300).contains(&status));
    let is_error = failure.status.is_some() && !is_ok;
    match failure.class {
        Class::Config => ProviderFault::Config,
        Class::GrantDead => ProviderFault::GrantDead,
        Class::Transient if is_ok => ProviderFault::Protocol,
        Class::Transient => ProviderFault::Transient,
        Class::Protocol if is_error => ProviderFault::Transient,
        Class::Protocol => ProviderFault::Protocol,
        Class::Policy => ProviderFault::Policy,
    }
}

impl ProviderFault {
    const ALL: [Self; 5] = [Self::Config, Self::GrantDead, Self::Transient, Self::Protocol, Self::Policy];

    /// The fault of that name.
    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// The name in audit records and `last_error`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Config => "provider-config",
            Self::GrantDead => "provider-grant",
            Self::Transient => "provider-transient",
            Self::Protocol => "provider-protocol",
            Self::Policy => "provider-policy",
        }
    }
}

impl AuditCode for TokensError {
    fn audit_code(&self) -> &'static str {
        match self {
            Self::Forbidden(_) | Self::MissingUserScope(_) => "forbidden",
            Self::NotFound(_) | Self::NoIdentity(_) | Self::NothingStored => "not-found",
            Self::NeedsReauthorization => "needs-reauthorization",
            Self::NotEnabled | Self::NotEditable => "not-enabled",
            Self::NoVerification => "no-verification",
            Self::ProofNeeded => "proof-needed",
            Self::WrongTarget { .. } | Self::NotLinked => "wrong-identity",
            Self::NoTokens => "no-tokens",
            Self::IdentityInUse { .. } => "identity-in-use",
            Self::LastSignIn => "last-sign-in",
            Self::NoTokenStorage => "no-token-storage",
            Self::UnknownConnector | Self::WrongConnector => "no-connector",
            Self::InsufficientInfo | Self::Invalid { .. } => "invalid",
            Self::Callback("state") => "wrong-state",
            Self::Callback("iss") => "wrong-issuer",
            Self::Callback(_) => "wrong-redirect-uri",
            Self::WrongPassword => "wrong-password",
            Self::TooManyTries => "too-many-tries",
            Self::Provider(error) => error.kind.name(),
            Self::Taken(_) => "taken",
            Self::Busy => "busy",
            Self::Quarantined => "quarantined",
            Self::Vault(error) => error.audit_code(),
            Self::Audit(_) => "audit-unavailable",
            Self::Db(error) => error.code(),
        }
    }

    fn is_unknown(&self) -> bool {
        match self {
            Self::Vault(error) => error.is_unknown(),
            Self::Db(error) => matches!(error, DbError::Unknown(_)),
            _ => false,
        }
    }
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> TokensError {
    TokensError::Invalid { field: field.into(), reason: reason.into() }
}

/// `[tokens]` in the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How long before expiry a read refreshes; never more than a tenth of the token's life.
    #[serde(with = "crate::config::seconds")]
    pub leeway: Duration,
    /// What a token whose provider gives an unreadable `expires_in` is taken to live.
    #[serde(with = "crate::config::seconds")]
    pub default_lifetime: Duration,
    /// How long a refresh may take from intent to commit before another daemon may take over.
    #[serde(with = "crate::config::seconds")]
    pub refresh_lease: Duration,
    /// How long a read waits for a refresh.
    #[serde(with = "crate::config::seconds")]
    pub read_deadline: Duration,
    /// Life of a verification record.
    #[serde(with = "crate::config::seconds")]
    pub verification_lifetime: Duration,
    /// Refreshes ahead of expiry that run at the same time for one connector.
    pub background_at_once: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            leeway: Duration::from_secs(60),
            default_lifetime: Duration::from_secs(3600),
            refresh_lease: Duration::from_secs(30),
            read_deadline: Duration::from_secs(20),
            verification_lifetime: Duration::from_secs(600),
            background_at_once: 4,
        }
    }
}

/// What the service is made of.
pub struct Parts {
    /// Storage.
    pub db: Db,
    /// Seals and opens.
    pub vault: Vault,
    /// Calls out.
    pub upstream: Upstream,
    /// Where every release and change is recorded.
    pub audit: AuditLog,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// Limits and times.
    pub config: Config,
    /// Where answers of providers lie, sealed, while the database does not take them.
    pub spool: PathBuf,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct Tokens {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    flights: refresh::Flights,
    known: account::Known,
    tries: password::Tries,
    /// Revocations that run at the same time.
    revocations: Semaphore,
    /// Where what outlives a request runs: not on the thread that serves it.
    background: Handle,
}

impl Tokens {
    /// Makes the service; calls nothing. Needs a tokio runtime, which its tasks run on.
    pub fn new(parts: Parts) -> Self {
        let (flights, known) = (refresh::Flights::default(), account::Known::new());
        let (tries, revocations) = (password::Tries::new(), Semaphore::new(REVOCATIONS));
        let background = Handle::current();
        Self { inner: Arc::new(Inner { parts, flights, known, tries, revocations, background }) }
    }

    fn parts(&self) -> &Parts {
        &self.inner.parts
    }

    fn now(&self) -> Timestamp {
        self.parts().clock.now()
    }

    /// Runs `work` between intent and outcome, if the caller holds `scope`; records the refusal if not.
    async fn audited<T, F, Fut>(
        &self,
        caller: &Caller,
        scope: Scope,
        event: Event,
        work: F,
    ) -> Result<T, TokensError>
    where
        F: FnOnce(Note) -> Fut,
        Fut: Future<Output = Result<T, TokensError>>,
    {
        if let Err(missing) = caller.require(scope) {
            return self.deny(caller, event, missing.into()).await;
        }
        self.parts().audit.around(caller, event, work).await
    }

    /// Records a refusal and returns it.
    async fn deny<T>(&self, caller: &Caller, event: Event, why: TokensError) -> Result<T, TokensError> {
        self.parts().audit.record(caller, event, Outcome::Denied(why.audit_code())).await?;
        Err(why)
    }

    /// Whether the caller may see metadata; a refusal is recorded soon.
    fn may(&self, caller: &Caller, scope: Scope, action: Action) -> Result<(), TokensError> {
        let Err(missing) = caller.require(scope) else { return Ok(()) };
        let event = Event::new(action, "tokens", "").detail("missing", missing.0.name());
        self.parts().audit.record_soon(caller, event, Outcome::Denied("forbidden"));
        Err(missing.into())
    }

    async fn refuse_in_quarantine(&self) -> Result<(), TokensError> {
        match self.parts().vault.quarantined_at().await? {
            Some(_) => Err(TokensError::Quarantined),
            None => Ok(()),
        }
    }
}
