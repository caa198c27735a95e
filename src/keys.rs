//! Signing and MAC keys in the device, and how signing keys come and go.
//!
//! A *ring* is a tenant's keys of one use (JWT, cookies): one signs, others are published before or after.
//! `plan.rs` decides what a ring becomes, purely; `rings.rs` keeps rings in memory and changes them; `make.rs`
//! and `upkeep.rs` do what was decided; `manage.rs` is for administrators, `sign.rs` for everybody who has
//! something signed. *Fixed* keys (`fixed.rs`) are Lacre's own HMAC keys; they do not rotate.
//!
//! Promises: a row is written before its device object is made and outlives it, so a crash anywhere leaves
//! something to go on from, never an object that nothing points to. `kid` is the RFC 7638 thumbprint. No
//! call returns a private key. Not here: who is an application and what it may sign (`issuer`).

mod fixed;
mod jwk;
mod lost;
mod make;
mod manage;
mod model;
mod orphans;
mod pkcs8;
mod plan;
mod public;
mod rings;
mod sign;
mod store;
mod time;
mod upkeep;
mod views;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Mutex;
use zeroize::Zeroizing;

use crate::audit::{Action, AuditCode, AuditError, AuditLog, Event, Outcome};
use crate::clock::Clock;
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope};
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::{DeviceName, Faults, KeyAdmin, KeyId, KeyRef, SealError, Sealer};

pub use model::*;
pub use orphans::Orphan;
pub use plan::Refusal;
pub use public::{Jwks, SigningKey};
pub use sign::{CookieCheck, JwsInput, SignedCookie, SignedToken};

use rings::Rings;
use store::Key;

/// What a fixed key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// HMAC of client secrets, of users' tokens, and of the roll-back anchor's records.
    ClientSecret,
    /// HMAC of idempotent request bodies.
    RequestBody,
}

impl Purpose {
    const ALL: [Self; 2] = [Self::ClientSecret, Self::RequestBody];

    const fn name(self) -> &'static str {
        match self {
            Self::ClientSecret => "client-secret",
            Self::RequestBody => "request-body",
        }
    }
}

/// Why a key operation failed.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The caller lacks a right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// The ring does not allow the change now.
    #[error("the keys do not allow it now: {}", .0.code())]
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
            Self::NotCurrent { .. } => "not-current",
            Self::ClockSuspect(_) => "clock-suspect",
            // A call whose end nobody knows is safe to repeat, as after an outage.
            Self::Seal(SealError::Unavailable { .. } | SealError::Unknown { .. }) => "device-unavailable",
            Self::Seal(SealError::Busy { .. }) => "busy",
            Self::NoSigner | Self::Seal(SealError::KeyMissing { .. } | SealError::NoDevice { .. }) => {
                "key-missing"
            }
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
    /// Fixed keys, once read: using one makes no query.
    known: Arc<RwLock<HashMap<(TenantId, Purpose), Key>>>,
    rings: Arc<Rings>,
    /// What the last look found wrong, so that each fault is one incident.
    faults: Arc<Faults>,
    /// Keys that the device has shown to be its own.
    proven: Arc<RwLock<HashSet<SigningKeyId>>>,
    /// One fixed key is made at a time, so two first uses do not race to the device.
    making: Arc<Mutex<()>>,
    /// The same for the keys of rings, whose making may take seconds.
    rotating: Arc<Mutex<()>>,
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
    /// The devices that are configured.
    pub devices: Vec<DeviceName>,
    /// The rules of rings that nobody has set others for.
    pub policy: Policy,
}

impl Keys {
    /// Makes the service. Does not touch the device.
    pub fn new(parts: Parts) -> Self {
        let now = parts.clock.now();
        Self {
            parts: Arc::new(parts),
            known: Arc::default(),
            rings: Arc::new(Rings::new(now)),
            faults: Arc::default(),
            proven: Arc::default(),
            making: Arc::default(),
            rotating: Arc::default(),
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
        let mut live = Vec::new();
        // Those that sign first: their public half tells a device that computes wrongly from a wrong key, and a
        // MAC alone does not.
        for used in Use::ALL {
            self.ensure(tenant, used).await?;
            let view = self.look(tenant, used).await?;
            for slot in view.ring.slots.iter().filter(|slot| slot.phase.is_published()) {
                live.push((slot.id.clone(), used.name(), view.entry(slot)?.device.clone()));
            }
        }
        for purpose in Purpose::ALL {
            let key = self.current(tenant, purpose).await?;
            live.push((key.id, purpose.name(), key.device));
        }
        // All of them, also after a bad one: each has its own incident.
        let (mut first_bad, mut missing) = (Ok(()), Vec::new());
        for (id, what, device) in live {
            match self.inspect(tenant, what, &id, &device).await {
                Err(KeysError::Seal(SealError::KeyMissing { key } | SealError::NoDevice { key, .. })) => {
                    missing.push(key);
                }
                found => first_bad = first_bad.and(found),
            }
        }
        first_bad.map(|()| missing)
    }

    /// Whether the tenant's keys have been made, as far as nothing works without them. Makes none and does not
    /// touch the device, so that a daemon can tell an installation that was never initialised from one whose
    /// device is away.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn are_made(&self, tenant: &TenantId) -> Result<bool, KeysError> {
        for purpose in Purpose::ALL {
            if !self.stored(tenant, purpose).await?.is_some_and(|key| key.is_made) {
                return Ok(false);
            }
        }
        Ok(self.peek(tenant, Use::Jwt).await?.is_some_and(|ring| ring.signer().is_some()))
    }

    /// Whether the tenant ever had keys, be they in use or given up.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn were_made(&self, tenant: &TenantId) -> Result<bool, KeysError> {
        let tenant = tenant.clone();
        let query = move |conn: &mut _| {
            let names = Purpose::ALL.map(Purpose::name).into_iter().chain([Use::Jwt.name()]);
            for name in names {
                if !store::was_made(conn, &tenant, name)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        Ok(self.parts.db.read::<_, DbError, _>(query).await?)
    }

    /// The devices that hold the tenant's keys in use, as far as they were asked for since the start.
    pub fn devices(&self, tenant: &TenantId) -> Vec<DeviceName> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let fixed = known.iter().filter(|((owner, _), _)| owner == tenant);
        let fixed = fixed.map(|(_, key)| key.device.device().clone());
        let signing = self.rings.signers(tenant).into_iter().map(|entry| entry.device.device().clone());
        fixed.chain(signing).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The fixed key of that purpose, for a service that uses it through its own `Sealer`.
    ///
    /// # Errors
    /// If there is none yet and it cannot be made now.
    pub async fn key_ref(&self, tenant: &TenantId, purpose: Purpose) -> Result<KeyRef, KeysError> {
        Ok(self.current(tenant, purpose).await?.device)
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

    /// HMAC of the row of a token that stands for a user, bound to its tenant: who writes the database can neither
    /// make such a token nor let one stand for somebody else.
    ///
    /// # Errors
    /// If the device does not answer.
    pub async fn mac_user_token(&self, tenant: &TenantId, parts: &[&[u8]]) -> Result<[u8; 32], KeysError> {
        self.mac_parts(tenant, b"lacre/user-token/v1", parts).await
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

    async fn inspect(
        &self,
        tenant: &TenantId,
        what: &'static str,
        id: &SigningKeyId,
        device: &KeyRef,
    ) -> Result<(), KeysError> {
        let error = match self.parts.admin.inspect(device).await {
            Ok(report) if report.deviations.is_empty() => {
                self.faults.clear(device.id());
                return Ok(());
            }
            Ok(report) => SealError::KeyUnfit { key: device.id(), reason: report.deviations.join("; ") },
            Err(error) => error,
        };
        let error = KeysError::from(error);
        let code = error.audit_code();
        if !["key-missing", "key-unfit"].contains(&code) {
            return Err(error);
        }
        if code == "key-unfit" {
            self.proven.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        }
        if !self.faults.note(device.id(), code) {
            return Err(error);
        }
        let event = Event::new(Action::KeyIncident, "key", id.as_str())
            .detail("purpose", what)
            .detail("device", device.device().as_str())
            .detail("device_id", device.id().to_string());
        let caller = Caller::system("keys", tenant.clone());
        self.parts.audit.record_soon(&caller, event, Outcome::Failure(code));
        Err(error)
    }
}
