//! Keys that were lost with their device: given up, and others made in their place.
//!
//! For `lacre restore` only. A key that is not on a device which answers is lost; one whose device does not
//! answer is not: it may come back.

use std::collections::BTreeSet;
use std::sync::PoisonError;

use super::model::{End, Phase, Use};
use super::store::{self, Key};
use super::{Keys, KeysError, Purpose};
use crate::audit::{Action, Event};
use crate::clock::Timestamp;
use crate::identity::Caller;
use crate::ids::{SigningKeyId, TenantId};
use crate::seal::{DeviceName, KeyRef, SealError};

/// What [`Keys::replace_lost`] made anew.
#[derive(Clone, Copy, Debug, Default)]
pub struct Replaced {
    /// Keys that were given up.
    pub keys: u32,
}

impl Keys {
    /// Gives up the tenant's keys that `lost` devices held and do not hold any more, and makes others.
    /// What was signed with a lost key is not accepted any more, and client secrets that a lost key has
    /// authenticated cannot be checked. Repeatable.
    ///
    /// # Errors
    /// [`SealError::Unavailable`] if a device does not answer: then nobody knows whether a key is lost.
    pub async fn replace_lost(
        &self,
        tenant: &TenantId,
        lost: &BTreeSet<DeviceName>,
    ) -> Result<Replaced, KeysError> {
        let mut replaced = Replaced::default();
        for purpose in Purpose::ALL {
            let (owner, found) = (tenant.clone(), purpose);
            let stored = self.parts.db.read(move |conn| store::current(conn, &owner, found)).await?;
            if let Some(key) = stored
                && lost.contains(key.device.device())
                && self.is_lost(&key.device).await?
            {
                self.give_up_fixed(tenant, purpose, &key).await?;
                replaced.keys += 1;
            }
            self.current(tenant, purpose).await?;
        }
        for used in Use::ALL {
            replaced.keys += self.give_up_of_ring(tenant, used, lost).await?;
            self.replace(tenant, used).await?;
        }
        Ok(replaced)
    }

    async fn is_lost(&self, key: &KeyRef) -> Result<bool, KeysError> {
        match self.parts.admin.inspect(key).await {
            // Asked of a device that a person has given up: a key that is there and is not the one is no key.
            Ok(report) => Ok(!report.deviations.is_empty()),
            Err(SealError::KeyMissing { .. } | SealError::NoDevice { .. }) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    async fn give_up_fixed(&self, tenant: &TenantId, purpose: Purpose, key: &Key) -> Result<(), KeysError> {
        let caller = Caller::system("restore", tenant.clone());
        let event = lost_event(&key.id, purpose.name(), &key.device);
        let id = key.id.clone();
        let retired = self.parts.audit.around(&caller, event, async |_| {
            Ok::<_, KeysError>(self.parts.db.write(move |conn| store::retire(conn, &id)).await?)
        });
        retired.await?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.remove(&(tenant.clone(), purpose));
        Ok(())
    }

    async fn give_up_of_ring(
        &self,
        tenant: &TenantId,
        used: Use,
        lost: &BTreeSet<DeviceName>,
    ) -> Result<u32, KeysError> {
        let caller = Caller::system("restore", tenant.clone());
        let (view, mut count) = (self.look(tenant, used).await?, 0);
        for slot in &view.ring.slots {
            let device = &view.entry(slot)?.device;
            if !lost.contains(device.device()) || !self.is_gone(slot.phase, device).await? {
                continue;
            }
            let (id, event) = (slot.id.clone(), lost_event(&slot.id, used.name(), device));
            let given_up = self.parts.audit.around(&caller, event, async |_| {
                self.change(tenant, used, move |ring, _| {
                    ring.give_up(&id, End::Lost);
                    // Nothing is left of it that could be destroyed.
                    ring.destroyed(&id);
                    Ok(())
                })
                .await
            });
            given_up.await?;
            count += u32::from(slot.phase.is_published());
        }
        Ok(count)
    }

    /// What is not published is of no use, and on a lost device there is nothing to destroy or to go on with.
    async fn is_gone(&self, phase: Phase, device: &KeyRef) -> Result<bool, KeysError> {
        if phase.is_published() { self.is_lost(device).await } else { Ok(true) }
    }

    /// When the key that authenticates client secrets came into use: an application's secret that is older
    /// was authenticated by another one.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn client_secrets_since(&self, tenant: &TenantId) -> Result<Option<Timestamp>, KeysError> {
        let tenant = tenant.clone();
        let query = move |conn: &mut _| store::activated_at(conn, &tenant, Purpose::ClientSecret);
        Ok(self.parts.db.read(query).await?)
    }
}

fn lost_event(id: &SigningKeyId, purpose: &'static str, device: &KeyRef) -> Event {
    Event::new(Action::KeyRetire, "key", id.as_str())
        .detail("purpose", purpose)
        .detail("device", device.device().as_str())
        .detail("device_id", device.id().to_string())
        .detail("reason", "device-lost")
}
