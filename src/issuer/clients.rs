//! Applications as the token endpoint and the bearer check see them: cached for seconds.
//!
//! An application is looked up at most every [`APP_TTL`] per daemon, so a deletion by another daemon
//! takes that long to reach this one (one made here works at once). A proven secret is remembered
//! for [`PROOF_TTL`] to keep the device free for signing. What is remembered is SHA-256 of id and
//! secret: client secrets are 256 random bits, so the hash cannot be searched for its input.

use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::db::{Db, DbError};
use crate::ids::{ClientId, TenantId};
use crate::issuer::IssuerError;
use crate::issuer::store::{self, App};
use crate::issuer::verify::Verified;
use crate::keys::Keys;

const APP_TTL: Duration = Duration::from_secs(5);
const PROOF_TTL: Duration = Duration::from_mins(1);
const ENTRIES: u64 = 10_000;
/// Longer texts are no secret of this issuer, and are not sent to the device.
const SECRET_MAX: usize = 256;

pub(super) struct Clients {
    db: Db,
    apps: Cache<ClientId, Option<Arc<App>>>,
    /// SHA-256(id, 0, secret) to the stored MAC it was proven against, so a changed secret ends it.
    proofs: Cache<[u8; 32], [u8; 32]>,
    /// SHA-256(token) to what it says; expiry and application are checked on every use.
    tokens: Cache<[u8; 32], Verified>,
}

impl Clients {
    pub(super) fn new(db: Db) -> Self {
        Self {
            db,
            apps: Cache::builder().max_capacity(ENTRIES).time_to_live(APP_TTL).build(),
            proofs: Cache::builder().max_capacity(ENTRIES).time_to_live(PROOF_TTL).build(),
            tokens: Cache::builder().max_capacity(ENTRIES).time_to_live(PROOF_TTL).build(),
        }
    }

    /// The tenant's application of that id. That there is none is remembered as well: both answers
    /// cost the same, so the time tells nobody which ids exist.
    pub(super) async fn find(&self, tenant: &TenantId, id: &ClientId) -> Result<Option<Arc<App>>, DbError> {
        if let Some(known) = self.apps.get(id) {
            return Ok(known.filter(|app| app.tenant == *tenant));
        }
        let wanted = id.clone();
        let found = self.db.read(move |conn| store::find(conn, &wanted)).await?.map(Arc::new);
        self.apps.insert(id.clone(), found.clone());
        Ok(found.filter(|app| app.tenant == *tenant))
    }

    /// Forgets an application that was changed here.
    pub(super) fn forget(&self, id: &ClientId) {
        self.apps.invalidate(id);
    }

    /// The application whose id and secret these are. An unknown id costs the same HMAC in the
    /// device as a wrong secret and fails alike; ids are no secrets (RFC 6749, section 2.2), though.
    pub(super) async fn authenticate(
        &self,
        keys: &Keys,
        tenant: &TenantId,
        id: &str,
        secret: &SecretString,
    ) -> Result<Arc<App>, IssuerError> {
        let secret = secret.expose_secret().as_bytes();
        if secret.is_empty() || secret.len() > SECRET_MAX {
            return Err(IssuerError::InvalidClient);
        }
        let app = match ClientId::parse(id) {
            Ok(id) => self.find(tenant, &id).await?,
            Err(_) => None,
        };
        let proof = proof_of(id, secret);
        if let (Some(app), Some(mac)) = (&app, self.proofs.get(&proof))
            && bool::from(mac.ct_eq(&app.secret_mac))
        {
            return Ok(Arc::clone(app));
        }
        let mac = keys.mac_client_secret(tenant, id, secret).await?;
        let stored = app.as_ref().map_or([0; 32], |app| app.secret_mac);
        match app {
            Some(app) if bool::from(mac.ct_eq(&stored)) => {
                self.proofs.insert(proof, mac);
                Ok(app)
            }
            _ => Err(IssuerError::InvalidClient),
        }
    }

    /// What a token said when it was checked within the last minute.
    pub(super) fn checked(&self, token: &str) -> Option<Verified> {
        self.tokens.get(&<[u8; 32]>::from(Sha256::digest(token)))
    }

    pub(super) fn remember(&self, token: &str, verified: Verified) {
        self.tokens.insert(Sha256::digest(token).into(), verified);
    }
}

fn proof_of(id: &str, secret: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(id.as_bytes());
    // A client id with a zero byte does not exist, so the boundary cannot be shifted.
    hash.update([0]);
    hash.update(secret);
    hash.finalize().into()
}
