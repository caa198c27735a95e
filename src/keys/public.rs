//! What everybody may know of a tenant's signing keys: the JWKS.

use std::sync::PoisonError;
use std::time::Duration;

use serde_json::Value;

use super::model::Use;
use super::store::Public;
use super::store::rings::Entry;
use super::{Keys, KeysError};
use crate::db::DbError;
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::SealError;

/// A published signing key.
#[derive(Clone, Debug)]
pub struct SigningKey {
    /// RFC 7638 thumbprint.
    pub kid: String,
    /// JOSE name of the algorithm that it signs with.
    pub alg: &'static str,
    /// Public JWK members as JSON.
    pub jwk: Value,
}

impl SigningKey {
    pub(super) fn of(entry: &Entry) -> Option<Self> {
        let Public { kid, jwk } = entry.public.clone()?;
        Some(Self { kid, alg: entry.alg?.name(), jwk })
    }
}

/// The JWKS and how long it may be kept.
#[derive(Clone, Debug)]
pub struct Jwks {
    /// Current, Next, then Previous keys.
    pub keys: Vec<SigningKey>,
    /// For how long a verifier may use it without asking again.
    pub max_age: Duration,
}

impl Keys {
    /// The tenant's public signing keys: Current, Next, then Previous ones. Served from memory, and works while
    /// the device is away if the device has answered once for each key since the start.
    ///
    /// # Errors
    /// If the device has not shown that a key is its own, or if the ring cannot be known to be the present one.
    pub async fn public_keys(&self, tenant: &TenantId) -> Result<Vec<SigningKey>, KeysError> {
        Ok(self.jwks(tenant).await?.keys)
    }

    /// As [`Keys::public_keys`], with the time for which they may be kept.
    ///
    /// # Errors
    /// As [`Keys::public_keys`].
    pub async fn jwks(&self, tenant: &TenantId) -> Result<Jwks, KeysError> {
        let view = self.ring(tenant, Use::Jwt).await?;
        let mut keys = Vec::new();
        for slot in view.ring.published(self.parts.clock.now()) {
            let entry = view.entry(slot)?;
            match self.prove(&slot.id, entry).await {
                Ok(()) => {
                    let impossible = || DbError::impossible("signing_keys", slot.id.as_str());
                    keys.push(SigningKey::of(entry).ok_or_else(impossible)?);
                }
                // Not its own, lost, or on a device that has not answered since the start: nobody is to trust it, and
                // the others do not fail with it. The minute's look at the keys makes it an incident.
                Err(KeysError::Seal(error))
                    if view.ring.signer().is_none_or(|signer| signer.id != slot.id) =>
                {
                    tracing::debug!(key = %slot.id, %error, "a key is left out of the JWKS");
                }
                Err(error) => return Err(error),
            }
        }
        if keys.is_empty() {
            return Err(KeysError::NoSigner);
        }
        Ok(Jwks { keys, max_age: view.ring.policy.jwks_max_age })
    }

    /// Whether a key of that `kid` is published. In memory: cheap enough for every request.
    ///
    /// # Errors
    /// If the ring cannot be known to be the present one.
    pub async fn is_published(&self, tenant: &TenantId, kid: &str) -> Result<bool, KeysError> {
        let view = self.ring(tenant, Use::Jwt).await?;
        let is_it = |entry: &Entry| entry.public.as_ref().is_some_and(|public| public.kid == kid);
        let mut published = view.ring.slots.iter().filter(|slot| slot.phase.is_published());
        Ok(published.any(|slot| view.entries.get(&slot.id).is_some_and(|entry| is_it(entry))))
    }

    /// Whoever writes to the database could put a key of their own there, pin and all: the device has the
    /// last word, once after the start.
    pub(super) async fn prove(&self, id: &SigningKeyId, entry: &Entry) -> Result<(), KeysError> {
        if self.proven.read().unwrap_or_else(PoisonError::into_inner).contains(id) {
            return Ok(());
        }
        // The row's public key is the one of the pin. One answer is no evidence against a key.
        let mut is_its_own = false;
        for _ in 0..2 {
            if !is_its_own {
                let public = self.parts.sealer.public_key(&entry.device).await?;
                is_its_own = entry.device.is_pinned_by(&public);
            }
        }
        if !is_its_own {
            let reason = "it has another public key on the device".to_owned();
            return Err(SealError::KeyUnfit { key: entry.device.id(), reason }.into());
        }
        self.note_proven(id);
        Ok(())
    }

    pub(super) fn note_proven(&self, id: &SigningKeyId) {
        self.proven.write().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
    }
}
