//! The OAuth issuer for machine applications: client credentials in, ES256 access token out; and the
//! check of such tokens on the way back in.
//!
//! Client secrets are 256 random bits and are kept as HMAC under a device key. Every issued token
//! has an audit record with its `jti` before it is signed. Tokens are `at+jwt` (RFC 9068).

mod model;
mod store;
mod verify;

use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;

use crate::audit::{AuditCode, AuditError, AuditLog};
use crate::clock::Clock;
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope};
use crate::ids::{ClientId, RequestId, TenantId};
use crate::keys::{Keys, KeysError};

pub use model::*;

/// Why the token endpoint or the application API refused.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// Unknown client or wrong secret (RFC 6749, section 5.2: `invalid_client`).
    #[error("client authentication failed")]
    InvalidClient,
    /// The grant type is not offered (`unsupported_grant_type`).
    #[error("unsupported grant type")]
    UnsupportedGrantType,
    /// A scope is unknown or not granted to the application (`invalid_scope`).
    #[error("scope not granted")]
    InvalidScope,
    /// The resource is not one of this issuer's (RFC 8707, section 2: `invalid_target`).
    #[error("unknown resource")]
    InvalidTarget,
    /// No such application in the caller's tenant.
    #[error("no such application")]
    NotFound,
    /// The input breaks a rule.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which member.
        field: &'static str,
        /// Which rule.
        reason: String,
    },
    /// The caller lacks a right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// Signing or hashing failed.
    #[error("key operation failed")]
    Keys(#[from] KeysError),
    /// The audit log cannot take the record.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The database failed.
    #[error("storage failed")]
    Db(#[from] DbError),
}

impl AuditCode for IssuerError {
    fn audit_code(&self) -> &'static str {
        match self {
            Self::InvalidClient => "invalid-client",
            Self::UnsupportedGrantType => "unsupported-grant-type",
            Self::InvalidScope => "invalid-scope",
            Self::InvalidTarget => "invalid-target",
            Self::NotFound => "not-found",
            Self::Invalid { .. } => "invalid",
            Self::Forbidden(_) => "forbidden",
            Self::Keys(keys) => keys.audit_code(),
            Self::Audit(_) => "audit-unavailable",
            Self::Db(_) => "storage-failed",
        }
    }
}

/// Why a bearer token was not accepted. The client learns `invalid_token` only.
#[derive(Debug, thiserror::Error)]
pub enum BearerError {
    /// Not a token of this issuer, altered, for another audience, or expired.
    #[error("invalid token: {0}")]
    Invalid(&'static str),
    /// The check itself failed (storage).
    #[error("the token cannot be checked now")]
    Unavailable(#[source] IssuerError),
}

/// What an issuer is made of.
pub struct Parts {
    /// Storage.
    pub db: Db,
    /// Signs and hashes.
    pub keys: Keys,
    /// Where every token is recorded.
    pub audit: AuditLog,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// Addresses and lifetimes.
    pub config: Config,
}

/// How the issuer presents itself.
#[derive(Clone, Debug)]
pub struct Config {
    /// `iss`: the public base URL plus `/oidc`.
    pub issuer: String,
    /// The tenant that `/oidc` serves (one per daemon address in this version).
    pub tenant: TenantId,
    /// Lifetime of access tokens, 1 h by default (`[issuer] token_lifetime`).
    pub token_lifetime: Duration,
}

impl Config {
    /// The Management and native API's resource indicator: `https://<tenant>.lacre.local/api`.
    pub fn api_resource(&self) -> String {
        format!("https://{}.lacre.local/api", self.tenant)
    }
}

/// The issuer. Cheap to clone.
#[derive(Clone)]
pub struct Issuer {
    parts: Arc<Parts>,
}

impl Issuer {
    /// Makes the service.
    pub fn new(parts: Parts) -> Self {
        todo!()
    }

    /// The token endpoint: authenticates the client, grants scopes, records, signs.
    pub async fn token(&self, request: TokenRequest, id: &RequestId) -> Result<IssuedToken, IssuerError> {
        todo!()
    }

    /// Checks a bearer token and says who calls.
    pub async fn authenticate(&self, bearer: &str, request: RequestId) -> Result<Caller, BearerError> {
        todo!()
    }

    /// The JWKS document (RFC 7517, section 5).
    pub async fn jwks(&self) -> Result<serde_json::Value, IssuerError> {
        todo!()
    }

    /// Makes an application; its secret is in the answer and nowhere else.
    pub async fn create_app(
        &self,
        caller: &Caller,
        new: NewApp,
    ) -> Result<(AppInfo, SecretString), IssuerError> {
        todo!()
    }

    /// Makes the application with this id and secret, or gives the one of that id these settings.
    pub async fn ensure_app(
        &self,
        caller: &Caller,
        id: &ClientId,
        secret: &SecretString,
        new: NewApp,
    ) -> Result<AppInfo, IssuerError> {
        todo!()
    }

    /// The tenant's applications.
    pub async fn list_apps(&self, caller: &Caller) -> Result<Vec<AppInfo>, IssuerError> {
        todo!()
    }

    /// Deletes an application: its secret and its tokens stop working.
    pub async fn delete_app(&self, caller: &Caller, id: &ClientId) -> Result<(), IssuerError> {
        todo!()
    }
}
