//! Sealed records of every secret type, the tenants' KEKs, and the jobs that move records between
//! KEK versions.
//!
//! Promises: a value is stored only sealed, under the context (tenant, kind, record, version) that
//! the request names; a revealed value left its audit record behind first; a deleted secret's bytes
//! are gone from the database file. A crash at any point leaves what was acknowledged and nothing
//! half visible; planned KEKs and interrupted rewraps go on at the next start.

mod keyring;
mod model;
mod rewrap;
mod store;

use std::sync::Arc;
use std::time::Duration;

use crate::audit::{AuditCode, AuditError, AuditLog};
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope};
use crate::ids::{JobId, SecretId};
use crate::seal::{KeyAdmin, KeyRef, SealError, Sealer};

pub use model::*;

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
    /// The caller lacks a right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// The job has ended, so it cannot be cancelled.
    #[error("the job has already ended")]
    JobEnded,
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
            Self::Forbidden(_) => "forbidden",
            Self::JobEnded => "job-ended",
            Self::Seal(SealError::Unavailable { .. }) => "device-unavailable",
            Self::Seal(SealError::Busy { .. }) => "busy",
            Self::Seal(_) => "sealing-failed",
            Self::Audit(_) => "audit-unavailable",
            Self::Db(_) => "storage-failed",
        }
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
#[derive(Clone)]
pub struct Vault {
    parts: Arc<Parts>,
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
}

impl Vault {
    /// Makes the service. Does not touch the device.
    pub fn new(parts: Parts) -> Self {
        todo!()
    }

    /// Makes the tenant and its first KEK where they are missing, finishes planned KEKs, and inspects
    /// every live KEK on the device (attributes, ambiguity, fingerprint). Repeatable.
    ///
    /// # Errors
    /// [`VaultError::Seal`] with `KeyUnfit` or `KeyMissing` names the key that must not be used.
    pub async fn provision(&self, tenant: &crate::ids::TenantId) -> Result<(), VaultError> {
        todo!()
    }

    /// Goes on with jobs that a crash or stop interrupted, and takes new ones. Runs until the process ends.
    pub async fn run_jobs(&self) {
        todo!()
    }

    /// Creates a secret with version 1.
    pub async fn create(
        &self,
        caller: &Caller,
        new: NewSecret,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<SecretInfo, VaultError> {
        todo!()
    }

    /// Lists secrets by id, a page at a time.
    pub async fn list(&self, caller: &Caller, filter: ListFilter) -> Result<Page<SecretInfo>, VaultError> {
        todo!()
    }

    /// Metadata of one secret.
    pub async fn show(&self, caller: &Caller, id: &SecretId) -> Result<SecretInfo, VaultError> {
        todo!()
    }

    /// Releases a value: the newest version, or the given one.
    pub async fn reveal(
        &self,
        caller: &Caller,
        id: &SecretId,
        version: Option<u64>,
    ) -> Result<Revealed, VaultError> {
        todo!()
    }

    /// Stores a new version. `expected` is the row version of If-Match.
    pub async fn replace(
        &self,
        caller: &Caller,
        id: &SecretId,
        expected: i64,
        value: PlainValue,
    ) -> Result<SecretInfo, VaultError> {
        todo!()
    }

    /// Deletes a secret and all its versions, for real. `expected` is the row version of If-Match, if given.
    pub async fn delete(
        &self,
        caller: &Caller,
        id: &SecretId,
        expected: Option<i64>,
    ) -> Result<(), VaultError> {
        todo!()
    }

    /// The versions of a secret, newest first, a page at a time (`before` is exclusive).
    pub async fn versions(
        &self,
        caller: &Caller,
        id: &SecretId,
        before: Option<u64>,
        limit: u32,
    ) -> Result<Page<VersionInfo>, VaultError> {
        todo!()
    }

    /// The tenant's KEK versions, newest first, with how many records each wraps.
    pub async fn keks(&self, caller: &Caller) -> Result<Vec<KekInfo>, VaultError> {
        todo!()
    }

    /// Makes a new KEK version, which seals from now on.
    pub async fn rotate_kek(
        &self,
        caller: &Caller,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<KekInfo, VaultError> {
        todo!()
    }

    /// Starts a job that moves every record of the tenant to the newest KEK version.
    pub async fn rewrap(
        &self,
        caller: &Caller,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<JobInfo, VaultError> {
        todo!()
    }

    /// A job's progress.
    pub async fn job(&self, caller: &Caller, id: &JobId) -> Result<JobInfo, VaultError> {
        todo!()
    }

    /// Asks a job to stop after the batch it is at.
    pub async fn cancel_job(&self, caller: &Caller, id: &JobId) -> Result<JobInfo, VaultError> {
        todo!()
    }

    /// A fresh data key: plaintext once, and sealed for `context`.
    pub async fn data_key(
        &self,
        caller: &Caller,
        context: &ExternalContext,
        len: usize,
    ) -> Result<DataKey, VaultError> {
        todo!()
    }

    /// Seals values whose ciphertext the caller keeps, one result per item.
    pub async fn seal_external(
        &self,
        caller: &Caller,
        items: Vec<SealItem>,
    ) -> Result<Vec<Result<Vec<u8>, VaultError>>, VaultError> {
        todo!()
    }

    /// Opens what [`Vault::seal_external`] or [`Vault::data_key`] made, one result per item.
    pub async fn open_external(
        &self,
        caller: &Caller,
        items: Vec<OpenItem>,
    ) -> Result<Vec<Result<Plain, VaultError>>, VaultError> {
        todo!()
    }

    /// Figures for `GET /v1/status` and metrics: secrets by kind, records per KEK version.
    pub async fn figures(&self, caller: &Caller) -> Result<Figures, VaultError> {
        todo!()
    }
}
