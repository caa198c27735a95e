//! Signing and MAC keys in the device: one current key per tenant and purpose.
//!
//! In this version a key is made once; phases and rotation come with their own planner. The row is
//! written before the device object is made, so a crash in between is repaired by making it again
//! under the same id. `kid` is the RFC 7638 thumbprint.

mod jwk;
mod store;

use std::sync::Arc;

use crate::audit::{AuditCode, AuditError, AuditLog};
use crate::clock::Clock;
use crate::db::{Db, DbError};
use crate::ids::TenantId;
use crate::seal::{KeyAdmin, KeyRef, SealError, Sealer};

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Signs access tokens (ES256).
    Jwt,
    /// HMAC of client secrets.
    ClientSecret,
    /// HMAC of idempotent request bodies.
    RequestBody,
}

/// Why a key operation failed.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The device failed.
    #[error("the device failed")]
    Seal(#[from] SealError),
    /// The database failed.
    #[error("storage failed")]
    Db(#[from] DbError),
    /// The audit log cannot take the record.
    #[error(transparent)]
    Audit(#[from] AuditError),
}

impl AuditCode for KeysError {
    fn audit_code(&self) -> &'static str {
        match self {
            Self::Seal(SealError::Unavailable { .. }) => "device-unavailable",
            Self::Seal(_) => "device-failed",
            Self::Db(_) => "storage-failed",
            Self::Audit(_) => "audit-unavailable",
        }
    }
}

/// The key service. Cheap to clone.
#[derive(Clone)]
pub struct Keys {
    parts: Arc<Parts>,
}

/// What the key service is made of.
pub struct Parts {
    /// Storage.
    pub db: Db,
    /// Uses keys.
    pub sealer: Sealer,
    /// Makes keys.
    pub admin: KeyAdmin,
    /// Where every change is recorded.
    pub audit: AuditLog,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
}

/// The key that signs a tenant's tokens.
#[derive(Clone, Debug)]
pub struct SigningKey {
    /// RFC 7638 thumbprint.
    pub kid: String,
    /// JOSE algorithm name.
    pub alg: &'static str,
    /// Public JWK members as JSON.
    pub jwk: serde_json::Value,
}

impl Keys {
    /// Makes the service. Does not touch the device.
    pub fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    /// Makes the tenant's keys where they are missing, finishes planned ones, inspects all on the device. Repeatable.
    pub async fn provision(&self, tenant: &TenantId) -> Result<(), KeysError> {
        todo!()
    }

    /// The key of that purpose, for a service that uses it through its own `Sealer`.
    pub async fn key_ref(&self, tenant: &TenantId, purpose: Purpose) -> Result<KeyRef, KeysError> {
        todo!()
    }

    /// Signs a compact JWS (RFC 7515, section 3.1) with the tenant's token key. `typ` goes into the
    /// header; `claims` is the payload. The caller has recorded the intent.
    pub async fn sign_jwt(
        &self,
        tenant: &TenantId,
        typ: &str,
        claims: &serde_json::Value,
    ) -> Result<String, KeysError> {
        todo!()
    }

    /// HMAC of a client secret.
    pub async fn mac_client_secret(&self, tenant: &TenantId, secret: &[u8]) -> Result<[u8; 32], KeysError> {
        todo!()
    }

    /// The tenant's public signing keys, newest first. Served from memory: works while the device is away.
    pub async fn public_keys(&self, tenant: &TenantId) -> Result<Vec<SigningKey>, KeysError> {
        todo!()
    }
}
