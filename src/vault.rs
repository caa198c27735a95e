//! Sealed records of every secret type, the tenants' KEKs, and the jobs that move records between
//! KEK versions.
//!
//! Promises: a value is stored only sealed, under the context (tenant, kind, record, version) that
//! the request names; a revealed value left its audit record behind first; a deleted secret's bytes
//! are gone from the database file. A crash at any point leaves what was acknowledged and nothing
//! half visible; planned KEKs and interrupted rewraps go on at the next start.

mod check;
mod external;
mod idempotency;
mod keyring;
mod model;
mod records;
mod restore;
mod rewrap;
mod secrets;
mod store;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::Notify;

use crate::audit::{Action, AuditCode, AuditError, AuditLog, Event, Note, Outcome};
use crate::clock::Clock;
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope, Scope};
use crate::seal::{KeyAdmin, KeyRef, SealError, Sealer};

use keyring::Keyring;

pub use crate::seal::DeviceName;
pub use model::*;
pub use records::{Place, SealedRecord, UnopenedRecord, delete_record, load_record};
pub use restore::Restored;

/// Why the vault refused, sorted by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// No such secret, version or job in the caller's tenant; or it is another tenant's, which looks the same.
    #[error("no such {0}")]
    NotFound(&'static str),
    /// The name is taken in this tenant.
    #[error("a secret of that name exists")]
    NameTaken,
    /// The row changed since the caller read it (If-Match did not match).
    #[error("the secret has version tag {current} now")]
    VersionConflict {
        /// The present row version (ETag).
        current: i64,
    },
    /// The input breaks a rule of its type.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which member of the request.
        field: &'static str,
        /// Which rule; never the value.
        reason: String,
    },
    /// The value is longer than the configured limit.
    #[error("the value has more than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The secret's `expires_at` has passed: its metadata stays, its value is not released.
    #[error("the secret has expired")]
    Expired,
    /// The idempotency key was used with another request.
    #[error("the idempotency key was used for another request")]
    IdempotencyMismatch,
    /// A request with this idempotency key is still being worked on.
    #[error("a request with this idempotency key is in flight")]
    IdempotencyInFlight,
    /// The stored bytes do not open where they are kept: altered, or moved from another place. An incident.
    #[error("stored value fails its integrity check")]
    Integrity,
    /// A sealed value that the caller keeps does not open under the context it gave: not ours, altered,
    /// or another context.
    #[error("it is no sealed value of this tenant, or not of this context")]
    DoesNotOpen,
    /// The caller lacks a right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// The job has ended, so it cannot be cancelled.
    #[error("the job has already ended")]
    JobEnded,
    /// The installation was restored and is in quarantine: what rotates keys waits for its release.
    #[error("the installation is in quarantine after a restore")]
    Quarantined,
    /// The sealing layer failed.
    #[error("sealing failed")]
    Seal(#[source] SealError),
    /// The audit log cannot take the record, so nothing was done.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The database failed.
    #[error("storage failed")]
    Db(#[from] DbError),
}

impl AuditCode for VaultError {
    fn audit_code(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "not-found",
            Self::NameTaken => "name-taken",
            Self::VersionConflict { .. } => "version-conflict",
            Self::Invalid { .. } => "invalid",
            Self::TooLarge { .. } => "too-large",
            Self::Expired => "expired",
            Self::IdempotencyMismatch => "idempotency-mismatch",
            Self::IdempotencyInFlight => "idempotency-in-flight",
            Self::Integrity => "integrity",
            Self::DoesNotOpen => "does-not-open",
            Self::Forbidden(_) => "forbidden",
            Self::JobEnded => "job-ended",
            Self::Quarantined => "quarantined",
            // A call whose end nobody knows is safe to repeat, as after an outage.
            Self::Seal(SealError::Unavailable { .. } | SealError::Unknown { .. }) => "device-unavailable",
            Self::Seal(SealError::Busy { .. }) => "busy",
            Self::Seal(SealError::KeyMissing { .. } | SealError::NoDevice { .. }) => "key-missing",
            Self::Seal(SealError::KeyUnfit { .. }) => "key-unfit",
            Self::Seal(_) => "sealing-failed",
            Self::Audit(_) => "audit-unavailable",
            Self::Db(error) => error.code(),
        }
    }

    fn is_unknown(&self) -> bool {
        matches!(self, Self::Seal(SealError::Unknown { .. }) | Self::Db(DbError::Unknown(_)))
    }
}

/// Limits and budgets of the vault (`[vault]` in the configuration).
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Longest value in bytes; 64 KiB by default, at most 1 MiB.
    pub max_value_bytes: usize,
    /// Wraps under one KEK version before a new version is made. At most 2^31 (SP 800-38D allows 2^32).
    pub wrap_budget: u64,
    /// How long a lease on a job lives without a sign of life.
    #[serde(with = "crate::config::seconds")]
    pub job_lease: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_value_bytes: 64 << 10, wrap_budget: 1 << 31, job_lease: Duration::from_secs(30) }
    }
}

/// The vault service. Cheap to clone.
///
/// Every call checks its scope first. Changes, releases and uses of keys run inside
/// [`AuditLog::around`]; reads of metadata are not recorded in this version. Secrets are in
/// `secrets.rs`, records that other parts keep in `records.rs`, ciphertext that callers keep in `external.rs`, KEKs in `keyring.rs`, jobs in `rewrap.rs`, the
/// quarantine in `restore.rs`.
#[derive(Clone)]
pub struct Vault {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    keyring: Keyring,
    /// A job was queued.
    job_queued: Notify,
    /// Records that the last backup job could not wrap.
    hopeless: AtomicU64,
}

/// What a vault is made of.
pub struct Parts {
    /// Storage.
    pub db: Db,
    /// Uses keys.
    pub sealer: Sealer,
    /// Makes and destroys KEKs.
    pub admin: KeyAdmin,
    /// Where every release and change is recorded.
    pub audit: AuditLog,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// HMAC key in the device: fingerprints of idempotent request bodies.
    pub body_key: KeyRef,
    /// Limits.
    pub config: Config,
    /// The devices that are configured.
    pub devices: BTreeSet<DeviceName>,
    /// The one on which new KEK versions are made.
    pub placement: DeviceName,
    /// The one that holds the backup KEK.
    pub backup: Option<DeviceName>,
}

impl Vault {
    /// Makes the service. Does not touch the device.
    pub fn new(parts: Parts) -> Self {
        let (keyring, job_queued, hopeless) = (Keyring::default(), Notify::new(), AtomicU64::new(0));
        Self { inner: Arc::new(Inner { parts, keyring, job_queued, hopeless }) }
    }

    fn parts(&self) -> &Parts {
        &self.inner.parts
    }

    /// Runs `work` between intent and outcome, if the caller holds `scope`; records the refusal if not.
    async fn audited<T, F, Fut>(
        &self,
        caller: &Caller,
        scope: Scope,
        event: Event,
        work: F,
    ) -> Result<T, VaultError>
    where
        F: FnOnce(Note) -> Fut,
        Fut: Future<Output = Result<T, VaultError>>,
    {
        if let Err(missing) = caller.require(scope) {
            return self.deny(caller, event, missing.into()).await;
        }
        self.parts().audit.around(caller, event, work).await
    }

    /// Records a refusal and returns it.
    async fn deny<T>(&self, caller: &Caller, event: Event, why: VaultError) -> Result<T, VaultError> {
        self.parts().audit.record(caller, event, Outcome::Denied(why.audit_code())).await?;
        Err(why)
    }

    /// Sorts a failure to seal or open a stored record. Bytes that the device rejects although it is
    /// well were altered or moved: that is recorded, with their address.
    async fn sealing(&self, caller: &Caller, id: &str, version: u64, error: SealError) -> VaultError {
        if !matches!(error, SealError::Rejected) {
            return VaultError::Seal(error);
        }
        self.incident(caller, id, Some(version)).await;
        VaultError::Integrity
    }

    /// Records that something stored was altered: a version's value, or with `None` a secret's metadata.
    async fn incident(&self, caller: &Caller, id: &str, version: Option<u64>) {
        let event = incident_event(caller, id, version);
        // The caller gets the error in any case; a log that takes nothing now must not hide it.
        if self.parts().audit.record(caller, event, Outcome::Failure("integrity")).await.is_err() {
            tracing::error!("the integrity incident could not be recorded");
        }
    }

    /// The same for metadata in a list, which waits for no record: there may be many.
    fn altered(&self, caller: &Caller, id: &str) {
        let event = incident_event(caller, id, None);
        self.parts().audit.record_soon(caller, event, Outcome::Failure("integrity"));
    }
}

fn incident_event(caller: &Caller, id: &str, version: Option<u64>) -> Event {
    tracing::error!(tenant = %caller.tenant, secret = id, version, "stored value fails its integrity check");
    let event = Event::new(Action::IntegrityIncident, "secret", id);
    match version {
        Some(version) => event.detail("version", version.to_string()),
        None => event.detail("part", "metadata"),
    }
}

#[cfg(test)]
mod tests {
    use super::{ExternalContext, OpenItem, Plain, PlainValue, Vault};
    use crate::identity::Caller;
    use crate::ids::SecretId;

    fn sent<T: Send>(_: T) {}

    /// Compiles, which is all it is for: the daemon and handlers run these on other threads.
    #[expect(dead_code, reason = "checked by the compiler, never called")]
    fn calls_can_move_between_threads(vault: &Vault, caller: &Caller, id: &SecretId, value: PlainValue) {
        sent(vault.run_jobs(&caller.tenant));
        sent(vault.provision(&caller.tenant));
        sent(vault.rotate_kek(caller, None, None));
        sent(vault.rewrap(caller, None));
        sent(vault.reveal(caller, id, None));
        sent(vault.replace(caller, id, Some(1), value));
        sent(vault.open_external(caller, Vec::<OpenItem>::new(), Plain::len));
        sent(vault.seal_external(caller, Vec::new()));
        sent(vault.data_key(caller, &ExternalContext(String::new()), 32));
    }
}
