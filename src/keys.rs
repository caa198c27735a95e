//! Signing and MAC keys in the device: one current key per tenant and purpose.
//!
//! In this version a key is made once; phases and rotation come with their own planner. The row is
//! written before the device object is made, so a crash in between is repaired by making it again
//! under the same id. `kid` is the RFC 7638 thumbprint.

mod jwk;
mod lost;
mod manage;
mod model;
mod plan;
mod sign;
mod store;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use crate::audit::{Action, AuditCode, AuditError, AuditLog, Event, Outcome};
use crate::clock::Clock;
use crate::db::{Db, DbError, Turn, TurnName};
use crate::identity::{Caller, MissingScope};
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::{Alg, DeviceName, Faults, KeyAdmin, KeyId, KeyRef, KeySpec, SealError, Sealer};

use store::{Key, Phase, Public};

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Signs access tokens (ES256).
    Jwt,
    /// HMAC of client secrets, and of the roll-back anchor's records.
    ClientSecret,
    /// HMAC of idempotent request bodies.
    RequestBody,
}

impl Purpose {
    const ALL: [Self; 3] = [Self::Jwt, Self::ClientSecret, Self::RequestBody];

    const fn name(self) -> &'static str {
        match self {
            Self::Jwt => "jwt",
            Self::ClientSecret => "client-secret",
            Self::RequestBody => "request-body",
        }
    }

    const fn spec(self) -> KeySpec {
        match self {
            Self::Jwt => KeySpec::EcP256,
            Self::ClientSecret | Self::RequestBody => KeySpec::HmacSha256,
        }
    }

    /// The JOSE name of what the key does (RFC 7518, section 3.1).
    const fn alg_name(self) -> &'static str {
        match self {
            Self::Jwt => TOKEN_ALG.name(),
            Self::ClientSecret | Self::RequestBody => "HS256",
        }
    }
}

const TOKEN_ALG: Alg = Alg::Es256;

pub use model::*;
pub use plan::Refusal;
pub use sign::{CookieCheck, JwsInput, SignedCookie, SignedToken};

/// Why a key operation failed.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The caller lacks a right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// The ring does not allow the change now.
    #[error("refused: {0:?}")]
    Refused(Refusal),
    /// The input breaks a rule.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which member.
        field: &'static str,
        /// Which rule.
        reason: String,
    },
    /// The installation was restored and is in quarantine: no key rotates before its release.
    #[error("the installation is in quarantine after a restore")]
    Quarantined,
    /// No key signs now; one is being made. Retry.
    #[error("no key signs now")]
    NoSigner,
    /// A token to be signed names another key or algorithm than those in use.
    #[error("the key that signs is {kid} ({alg})")]
    NotCurrent {
        /// The `kid` in use.
        kid: String,
        /// Its `alg`.
        alg: &'static str,
    },
    /// The host's clock has jumped further than can be dealt with: nothing is signed.
    #[error("signing is suspended: {0}")]
    ClockSuspect(String),
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
            Self::Forbidden(_) => "forbidden",
            Self::Refused(refusal) => refusal.code(),
            Self::Invalid { .. } => "invalid",
            Self::Quarantined => "quarantined",
            Self::NoSigner => "key-missing",
            Self::NotCurrent { .. } => "not-current",
            Self::ClockSuspect(_) => "clock-suspect",
            // A call whose end nobody knows is safe to repeat, as after an outage.
            Self::Seal(SealError::Unavailable { .. } | SealError::Unknown { .. }) => "device-unavailable",
            Self::Seal(SealError::Busy { .. }) => "busy",
            Self::Seal(SealError::KeyMissing { .. } | SealError::NoDevice { .. }) => "key-missing",
            Self::Seal(SealError::KeyUnfit { .. }) => "key-unfit",
            Self::Seal(_) => "device-failed",
            Self::Db(error) => error.code(),
            Self::Audit(_) => "audit-unavailable",
        }
    }

    fn is_unknown(&self) -> bool {
        matches!(self, Self::Seal(SealError::Unknown { .. }) | Self::Db(DbError::Unknown(_)))
    }
}

/// The key service. Cheap to clone.
#[derive(Clone)]
pub struct Keys {
    parts: Arc<Parts>,
    /// Active keys, once read: signing and the JWKS make no query and need no device for it.
    known: Arc<RwLock<HashMap<(TenantId, Purpose), Key>>>,
    /// What the last look found wrong, so that each fault is one incident.
    faults: Arc<Faults>,
    /// Keys that the device has shown to be its own.
    proven: Arc<RwLock<HashSet<SigningKeyId>>>,
    /// One key is made at a time, so two first uses do not race to the device.
    making: Arc<Mutex<()>>,
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
    /// The device on which new keys are made.
    pub placement: DeviceName,
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

#[derive(Serialize)]
struct JwsHeader<'a> {
    alg: &'static str,
    typ: &'a str,
    kid: &'a str,
}

impl Keys {
    /// Makes the service. Does not touch the device.
    pub fn new(parts: Parts) -> Self {
        Self {
            parts: Arc::new(parts),
            known: Arc::default(),
            faults: Arc::default(),
            proven: Arc::default(),
            making: Arc::default(),
        }
    }

    /// Makes the tenant's keys where they are missing, finishes planned ones, inspects all on the device. Repeatable.
    /// Returns those that were made and are not on the device any more. What is found wrong and was not the
    /// time before is also recorded as an incident.
    ///
    /// # Errors
    /// [`SealError::KeyUnfit`] for a key that must not be used, also an incident. Everything else heals
    /// by calling this again.
    pub async fn provision(&self, tenant: &TenantId) -> Result<Vec<KeyId>, KeysError> {
        // All of them, also after a bad one: each has its own incident.
        let (mut first_bad, mut missing) = (Ok(()), Vec::new());
        for purpose in Purpose::ALL {
            let key = self.current(tenant, purpose).await?;
            match self.inspect(tenant, purpose, &key).await {
                Err(KeysError::Seal(SealError::KeyMissing { key } | SealError::NoDevice { key, .. })) => {
                    missing.push(key);
                }
                found => first_bad = first_bad.and(found),
            }
        }
        first_bad.map(|()| missing)
    }

    /// Whether all of the tenant's keys have been made. Makes none and does not touch the device, so
    /// that a daemon can tell an installation that was never initialised from one whose device is away.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn are_made(&self, tenant: &TenantId) -> Result<bool, KeysError> {
        for purpose in Purpose::ALL {
            match self.stored(tenant, purpose).await? {
                Some(Key { phase: Phase::Active { .. }, .. }) => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether a key of each purpose was ever made for the tenant, be it current or given up.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn were_made(&self, tenant: &TenantId) -> Result<bool, KeysError> {
        let tenant = tenant.clone();
        let query = move |conn: &mut _| {
            for purpose in Purpose::ALL {
                if !store::was_made(conn, &tenant, purpose)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        Ok(self.parts.db.read::<_, DbError, _>(query).await?)
    }

    /// The devices that hold the tenant's current keys, as far as they were asked for since the start.
    pub fn devices(&self, tenant: &TenantId) -> Vec<DeviceName> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let of_tenant = known.iter().filter(|((owner, _), _)| owner == tenant);
        of_tenant.map(|(_, key)| key.device.device().clone()).collect()
    }

    /// The key of that purpose, for a service that uses it through its own `Sealer`.
    ///
    /// # Errors
    /// If there is none yet and it cannot be made now.
    pub async fn key_ref(&self, tenant: &TenantId, purpose: Purpose) -> Result<KeyRef, KeysError> {
        Ok(self.current(tenant, purpose).await?.device)
    }

    /// Signs a compact JWS (RFC 7515, section 3.1) with the tenant's token key. `typ` goes into the
    /// header; `claims` is the payload, which expires after `lifetime`. The caller has recorded the intent.
    ///
    /// # Errors
    /// If the device cannot sign.
    pub async fn sign_jwt(
        &self,
        tenant: &TenantId,
        typ: &str,
        claims: &serde_json::Value,
        lifetime: Duration,
    ) -> Result<SignedToken, KeysError> {
        let key = self.current(tenant, Purpose::Jwt).await?;
        let mut jws = signing_input(typ, key.public()?, &claims.to_string());
        let signature = self.parts.sealer.sign(&key.device, TOKEN_ALG, jws.as_bytes()).await?;
        jws.push('.');
        URL_SAFE_NO_PAD.encode_string(signature.as_bytes(), &mut jws);
        let _ = lifetime;
        Ok(SignedToken { jws, kid: key.public()?.kid.clone() })
    }

    /// HMAC of a client secret, bound to its tenant and client: in another row it is worth nothing.
    ///
    /// # Errors
    /// If the device does not answer.
    pub async fn mac_client_secret(
        &self,
        tenant: &TenantId,
        client: &str,
        secret: &[u8],
    ) -> Result<[u8; 32], KeysError> {
        self.mac_parts(tenant, b"lacre/client-secret/v1", &[client.as_bytes(), secret]).await
    }

    /// HMAC of what the roll-back anchor says of a database, bound to its tenant. No client's secret has it.
    ///
    /// # Errors
    /// If the device does not answer.
    pub async fn mac_anchor(&self, tenant: &TenantId, parts: &[&[u8]]) -> Result<[u8; 32], KeysError> {
        self.mac_parts(tenant, b"lacre/anchor/v1", parts).await
    }

    /// HMAC of parts, of which none can run into the next one, for one use that `what` names.
    async fn mac_parts(
        &self,
        tenant: &TenantId,
        what: &[u8],
        parts: &[&[u8]],
    ) -> Result<[u8; 32], KeysError> {
        let key = self.current(tenant, Purpose::ClientSecret).await?;
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let mut message = Zeroizing::new(Vec::with_capacity(128 + len));
        for part in [what, tenant.as_str().as_bytes()].iter().chain(parts) {
            message.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            message.extend_from_slice(part);
        }
        Ok(self.parts.sealer.mac(&key.device, &message).await?)
    }

    /// The tenant's public signing keys, newest first. Served from memory, and works while the device is away
    /// if the device has answered once since the start.
    ///
    /// # Errors
    /// If there is none yet and it cannot be made now, or if the device has not shown that the key is its own.
    pub async fn public_keys(&self, tenant: &TenantId) -> Result<Vec<SigningKey>, KeysError> {
        let key = self.current(tenant, Purpose::Jwt).await?;
        self.prove(&key).await?;
        let Public { kid, jwk } = key.public()?.clone();
        Ok(vec![SigningKey { kid, alg: TOKEN_ALG.name(), jwk }])
    }

    /// Whoever writes to the database could put a key of their own there, pin and all: the device has the
    /// last word, once after the start.
    async fn prove(&self, key: &Key) -> Result<(), KeysError> {
        if self.proven.read().unwrap_or_else(PoisonError::into_inner).contains(&key.id) {
            return Ok(());
        }
        // The row's public key is the one of the pin.
        if !key.device.is_pinned_by(&self.parts.sealer.public_key(&key.device).await?) {
            let reason = "it has another public key on the device".to_owned();
            return Err(SealError::KeyUnfit { key: key.device.id(), reason }.into());
        }
        self.proven.write().unwrap_or_else(PoisonError::into_inner).insert(key.id.clone());
        Ok(())
    }

    /// The active key, made on first use: a daemon that started while the device was away catches up.
    async fn current(&self, tenant: &TenantId, purpose: Purpose) -> Result<Key, KeysError> {
        if let Some(key) = self.known(tenant, purpose) {
            return Ok(key);
        }
        let _one_at_a_time = self.making.lock().await;
        if let Some(key) = self.known(tenant, purpose) {
            return Ok(key);
        }
        let mut key = self.planned(tenant, purpose).await?;
        if matches!(key.phase, Phase::Planned) {
            let turn = Arc::new(self.parts.db.turn(TurnName::DeviceKeys).await?);
            // Once more: whose turn it was before may have made it.
            key = self.planned(tenant, purpose).await?;
            if matches!(key.phase, Phase::Planned) {
                key = self.make(tenant, purpose, key, &turn).await?;
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.insert((tenant.clone(), purpose), key.clone());
        Ok(key)
    }

    fn known(&self, tenant: &TenantId, purpose: Purpose) -> Option<Key> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&(tenant.clone(), purpose)).cloned()
    }

    /// The stored key; where there is none, its row is written first. A crash after that leaves a row
    /// without an object, which the next call repairs. The other order would leave an object on the
    /// token that nothing points to.
    async fn planned(&self, tenant: &TenantId, purpose: Purpose) -> Result<Key, KeysError> {
        if let Some(key) = self.stored(tenant, purpose).await? {
            return Ok(key);
        }
        let id = SigningKeyId::generate();
        let device = KeyRef::plan(purpose.spec()).map_err(|_| DbError::Unavailable(None))?;
        let device = device.on(self.parts.placement.clone());
        let (row, now) = ((tenant.clone(), id.clone(), device.clone()), self.parts.clock.now());
        let insert = move |conn: &mut _| store::insert_planned(conn, &row.0, purpose, &row.1, &row.2, now);
        match self.parts.db.write(insert).await {
            Ok(()) => Ok(Key { id, device, phase: Phase::Planned }),
            // Another daemon was first: its key is the key.
            Err(DbError::Duplicate) => {
                let stored = self.stored(tenant, purpose).await?;
                stored.ok_or_else(|| DbError::impossible("signing_keys", id.as_str()).into())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn stored(&self, tenant: &TenantId, purpose: Purpose) -> Result<Option<Key>, DbError> {
        let tenant = tenant.clone();
        self.parts.db.read(move |conn| store::current(conn, &tenant, purpose)).await
    }

    /// Makes a planned key on the device and takes it into use. The turn lasts until the device has ended
    /// its call, also where that is long after this gave up.
    async fn make(
        &self,
        tenant: &TenantId,
        purpose: Purpose,
        planned: Key,
        turn: &Arc<Turn>,
    ) -> Result<Key, KeysError> {
        let caller = Caller::system("keys", tenant.clone());
        let event = Event::new(Action::KeyCreate, "key", planned.id.as_str())
            .detail("purpose", purpose.name())
            .detail("alg", purpose.alg_name())
            .detail("device", planned.device.device().as_str())
            .detail("device_id", planned.device.id().to_string());
        let made = self.parts.audit.around(&caller, event, async |note| {
            // Repeating this after a crash finds the object that was made then.
            let device = self.parts.admin.generate_holding(&planned.device, Arc::clone(turn)).await?;
            let public = match purpose {
                Purpose::Jwt => Some(self.public_half(&device).await?),
                Purpose::ClientSecret | Purpose::RequestBody => None,
            };
            if let Some(public) = &public {
                note.add("kid", public.kid.as_str());
            }
            let (row, now) = ((planned.id.clone(), device.clone(), public.clone()), self.parts.clock.now());
            let activate = move |conn: &mut _| store::activate(conn, &row.0, &row.1, row.2.as_ref(), now);
            self.parts.db.write(activate).await?;
            Ok::<_, KeysError>(Key { id: planned.id.clone(), device, phase: Phase::Active { public } })
        });
        made.await
    }

    async fn public_half(&self, key: &KeyRef) -> Result<Public, SealError> {
        Ok(Public::of(&self.parts.sealer.public_key(key).await?))
    }

    async fn inspect(&self, tenant: &TenantId, purpose: Purpose, key: &Key) -> Result<(), KeysError> {
        let error = match self.parts.admin.inspect(&key.device).await {
            Ok(report) if report.deviations.is_empty() => {
                self.faults.clear(key.device.id());
                return Ok(());
            }
            Ok(report) => SealError::KeyUnfit { key: key.device.id(), reason: report.deviations.join("; ") },
            Err(error) => error,
        };
        let error = KeysError::from(error);
        let code = error.audit_code();
        if !["key-missing", "key-unfit"].contains(&code) {
            return Err(error);
        }
        if code == "key-unfit" {
            self.proven.write().unwrap_or_else(PoisonError::into_inner).remove(&key.id);
        }
        if !self.faults.note(key.device.id(), code) {
            return Err(error);
        }
        let event = Event::new(Action::KeyIncident, "key", key.id.as_str())
            .detail("purpose", purpose.name())
            .detail("device", key.device.device().as_str())
            .detail("device_id", key.device.id().to_string());
        let caller = Caller::system("keys", tenant.clone());
        self.parts.audit.record_soon(&caller, event, Outcome::Failure(code));
        Err(error)
    }
}

impl Key {
    fn public(&self) -> Result<&Public, DbError> {
        match &self.phase {
            Phase::Active { public: Some(public) } => Ok(public),
            _ => Err(DbError::impossible("signing_keys", self.id.as_str())),
        }
    }
}

/// `BASE64URL(header) . BASE64URL(payload)`, with room for the signature.
fn signing_input(typ: &str, key: &Public, claims: &str) -> String {
    let header = JwsHeader { alg: TOKEN_ALG.name(), typ, kid: &key.kid };
    // Three texts always serialise.
    let header = serde_json::to_string(&header).unwrap_or_default();
    let mut jws = String::with_capacity((header.len() + claims.len() + 64) * 4 / 3 + 8);
    URL_SAFE_NO_PAD.encode_string(header, &mut jws);
    jws.push('.');
    URL_SAFE_NO_PAD.encode_string(claims, &mut jws);
    jws
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Public, signing_input};

    #[test]
    fn the_signing_input_is_that_of_a_compact_jws() {
        let key = Public { kid: "k-1".to_owned(), jwk: Value::Null };
        let input = signing_input("at+jwt", &key, &json!({ "iss": "i" }).to_string());

        // printf '{"alg":"ES256","typ":"at+jwt","kid":"k-1"}' | basenc --base64url
        assert_eq!(input, "eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCIsImtpZCI6ImstMSJ9.eyJpc3MiOiJpIn0");
    }
}
