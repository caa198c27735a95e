//! Signing with a ring's current key: tokens and cookies. The caller has recorded the intent.

use std::time::Duration;

use serde_json::Value;

use super::{Keys, KeysError, SigningKey};
use crate::ids::{SigningKeyId, TenantId};

/// A signed token.
pub struct SignedToken {
    /// The compact JWS (RFC 7515, section 3.1).
    pub jws: String,
    /// The key that signed it.
    pub kid: String,
}

/// A token that somebody else has built: everything but the signature.
pub struct JwsInput<'a> {
    /// `BASE64URL(header) . BASE64URL(payload)`.
    pub signing_input: &'a str,
    /// The header's `kid`.
    pub kid: &'a str,
    /// The header's `alg`.
    pub alg: &'a str,
    /// How long the token lives from now on.
    pub lifetime: Duration,
}

/// The signature of a cookie.
pub struct SignedCookie {
    /// base64url of HMAC-SHA256 over `name=value`.
    pub signature: String,
    /// The key that made it.
    pub key: SigningKeyId,
}

/// What the check of a cookie gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CookieCheck {
    /// The newest key signed it.
    Valid,
    /// An older key signed it: sign it again.
    Stale,
    /// No key of the tenant did.
    Invalid,
}

impl Keys {
    /// The key that signs the tenant's tokens now.
    ///
    /// # Errors
    /// [`KeysError::NoSigner`].
    pub async fn signer(&self, tenant: &TenantId) -> Result<SigningKey, KeysError> {
        self.public_keys(tenant).await?.into_iter().next().ok_or(KeysError::NoSigner)
    }

    /// Signs a token that was built elsewhere, if it names the key in use.
    ///
    /// # Errors
    /// [`KeysError::NotCurrent`] if it names another key or algorithm.
    pub async fn sign_jws(&self, tenant: &TenantId, input: JwsInput<'_>) -> Result<SignedToken, KeysError> {
        let _ = (tenant, input.signing_input, input.kid, input.alg, input.lifetime);
        Err(KeysError::NoSigner)
    }

    /// Signs a cookie that lives for `max_age`.
    ///
    /// # Errors
    /// If the device cannot.
    pub async fn sign_cookie(
        &self,
        tenant: &TenantId,
        name: &str,
        value: &str,
        max_age: Duration,
    ) -> Result<SignedCookie, KeysError> {
        let _ = (tenant, name, value, max_age);
        Err(KeysError::NoSigner)
    }

    /// Checks a cookie's signature with all keys that may have signed it, in constant time each.
    ///
    /// # Errors
    /// If the device cannot.
    pub async fn verify_cookie(
        &self,
        tenant: &TenantId,
        name: &str,
        value: &str,
        signature: &str,
    ) -> Result<CookieCheck, KeysError> {
        let _ = (tenant, name, value, signature);
        Err(KeysError::NoSigner)
    }
}

#[expect(dead_code, reason = "until sign_jwt moves here")]
fn unused(_: &Value) {}
