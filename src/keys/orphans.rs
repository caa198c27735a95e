//! Objects on the devices that no row knows. Rows are written before objects are made and outlive them, so there
//! are none, unless rows were lost: an older copy of the database, or a person with SQL. They may also belong to
//! another installation that shares the token, so a person says which of them goes.

use std::collections::BTreeSet;

use super::plan::Refusal;
use super::store;
use super::{Keys, KeysError};
use crate::audit::{Action, Event, Outcome};
use crate::db::DbError;
use crate::identity::{Caller, Scope};
use crate::seal::KeyRef;

/// An object that no row knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Its id on the device, in hex.
    pub id: String,
    /// What kind of key it is.
    pub kind: &'static str,
    /// Where it is.
    pub device: String,
}

impl Keys {
    /// Keys on the devices that bear Lacre's label and that no row knows.
    ///
    /// # Errors
    /// [`KeysError::Forbidden`] without `signing-keys:admin`; if a device does not answer.
    pub async fn orphans(&self, caller: &Caller) -> Result<Vec<Orphan>, KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyList, "orphans")?;
        let found = self.unknown().await?;
        let event = Event::new(Action::KeyList, "orphans", "").detail("count", found.len().to_string());
        self.parts.audit.record_soon(caller, event, Outcome::Success);
        let orphan = |key: &KeyRef| Orphan {
            id: key.id().to_string(),
            kind: key.spec().name(),
            device: key.device().as_str().to_owned(),
        };
        Ok(found.iter().map(orphan).collect())
    }

    /// Destroys one of them, if it is one still.
    ///
    /// # Errors
    /// [`KeysError::Refused`] if there is no such orphan.
    pub async fn destroy_orphan(&self, caller: &Caller, id: &str) -> Result<(), KeysError> {
        self.admit(caller, Scope::SigningKeysAdmin, Action::KeyDestroy, id)?;
        // Nothing is made meanwhile, so that no key is taken for an orphan whose row is about to be written.
        let _one_at_a_time = self.rotating.lock().await;
        let found = self.unknown().await?.into_iter().find(|key| key.id().to_string() == id);
        let key = found.ok_or(KeysError::Refused(Refusal::NotFound))?;
        let event = Event::new(Action::KeyDestroy, "key", "")
            .detail("reason", "orphan")
            .detail("device", key.device().as_str())
            .detail("device_id", id);
        let destroyed = self.parts.audit.around(caller, event, async |_| {
            self.parts.admin.destroy(&key).await?;
            Ok::<_, KeysError>(())
        });
        destroyed.await
    }

    async fn unknown(&self) -> Result<Vec<KeyRef>, KeysError> {
        let mut found = Vec::new();
        for device in &self.parts.devices {
            let keys = self.parts.admin.list(device).await?;
            found.extend(keys.into_iter().map(|key| key.on(device.clone())));
        }
        // Rows after objects: one that is written in between is known.
        let known = self.parts.db.read::<_, DbError, _>(store::device_ids).await?;
        let known: BTreeSet<_> = known.into_iter().collect();
        Ok(found.into_iter().filter(|key| !known.contains(&key.id())).collect())
    }
}
