//! Keys that a tenant has one of for each purpose, and that do not rotate: HMAC keys for Lacre's own use.
//!
//! The row is written before the device object is made, so a crash in between is repaired by making it
//! again under the same id.

use std::sync::{Arc, PoisonError};

use super::store::{self, Key};
use super::{Keys, KeysError, Purpose};
use crate::audit::{Action, Event};
use crate::db::{DbError, Turn, TurnName};
use crate::identity::Caller;
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::{KeyRef, KeySpec};

impl Keys {
    /// The active key, made on first use: a daemon that started while the device was away catches up.
    pub(super) async fn current(&self, tenant: &TenantId, purpose: Purpose) -> Result<Key, KeysError> {
        if let Some(key) = self.known(tenant, purpose) {
            return Ok(key);
        }
        let _one_at_a_time = self.making.lock().await;
        if let Some(key) = self.known(tenant, purpose) {
            return Ok(key);
        }
        let mut key = self.planned(tenant, purpose).await?;
        if !key.is_made {
            let turn = Arc::new(self.parts.db.turn(TurnName::DeviceKeys).await?);
            // Once more: whose turn it was before may have made it.
            key = self.planned(tenant, purpose).await?;
            if !key.is_made {
                key = self.make_fixed(tenant, purpose, key, &turn).await?;
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
        let device = KeyRef::plan(KeySpec::HmacSha256).map_err(|_| DbError::Unavailable(None))?;
        let device = device.on(self.parts.placement.clone());
        let (row, now) = ((tenant.clone(), id.clone(), device.clone()), self.parts.clock.now());
        let insert = move |conn: &mut _| store::insert_planned(conn, &row.0, purpose, &row.1, &row.2, now);
        match self.parts.db.write(insert).await {
            Ok(()) => Ok(Key { id, device, is_made: false }),
            // Another daemon was first: its key is the key.
            Err(DbError::Duplicate) => {
                let stored = self.stored(tenant, purpose).await?;
                stored.ok_or_else(|| DbError::impossible("signing_keys", id.as_str()).into())
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn stored(&self, tenant: &TenantId, purpose: Purpose) -> Result<Option<Key>, DbError> {
        let tenant = tenant.clone();
        self.parts.db.read(move |conn| store::current(conn, &tenant, purpose)).await
    }

    /// Makes a planned key on the device and takes it into use. The turn lasts until the device has ended
    /// its call, also where that is long after this gave up.
    async fn make_fixed(
        &self,
        tenant: &TenantId,
        purpose: Purpose,
        planned: Key,
        turn: &Arc<Turn>,
    ) -> Result<Key, KeysError> {
        let caller = Caller::system("keys", tenant.clone());
        let event = Event::new(Action::KeyCreate, "key", planned.id.as_str())
            .detail("purpose", purpose.name())
            .detail("alg", "HS256")
            .detail("device", planned.device.device().as_str())
            .detail("device_id", planned.device.id().to_string());
        let made = self.parts.audit.around(&caller, event, async |_| {
            // Repeating this after a crash finds the object that was made then.
            let device = self.parts.admin.generate_holding(&planned.device, Arc::clone(turn)).await?;
            let (row, now) = ((planned.id.clone(), device.clone()), self.parts.clock.now());
            let activate = move |conn: &mut _| store::activate(conn, &row.0, &row.1, now);
            self.parts.db.write(activate).await?;
            Ok::<_, KeysError>(Key { id: planned.id.clone(), device, is_made: true })
        });
        made.await
    }
}
