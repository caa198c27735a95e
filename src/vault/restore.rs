//! After a disaster: the quarantine, and the way back from the backup KEK.
//!
//! A restored database may be older than what the world has seen, so nothing rotates and nothing runs by
//! itself until somebody has looked and released it. The flag is in the database and is set by `lacre
//! restore` only; a file that was copied back by hand looks like any other start. A restore takes the
//! records from their second wraps to a new KEK version on the device where new ones are placed.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::audit::{Action, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::{DbError, TurnName};
use crate::identity::{Caller, Scope};
use crate::ids::TenantId;
use crate::seal::{DeviceName, Kek, SealError};

use super::idempotency::Request;
use super::model::{JobInfo, JobKind, KekRole};
use super::store::restore;
use super::{Vault, VaultError};

/// How a restore of records ended.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Records that are under a KEK of a present device now.
    pub done: u64,
    /// Records that are not: they had no second wrap, or it does not open.
    pub failed: u64,
}

impl Vault {
    /// Since when the installation is in quarantine, if it is.
    ///
    /// # Errors
    /// What the database says.
    pub async fn quarantined_at(&self) -> Result<Option<Timestamp>, VaultError> {
        Ok(self.parts().db.read::<_, DbError, _>(restore::quarantined_at).await?)
    }

    pub(super) async fn refuse_in_quarantine(&self) -> Result<(), VaultError> {
        match self.quarantined_at().await? {
            Some(_) => Err(VaultError::Quarantined),
            None => Ok(()),
        }
    }

    /// Begins the quarantine, and records what is believed lost. Since when it is.
    ///
    /// # Errors
    /// What the log and the database say.
    pub async fn quarantine(
        &self,
        caller: &Caller,
        lost: &BTreeSet<DeviceName>,
    ) -> Result<Timestamp, VaultError> {
        let lost: Vec<_> = lost.iter().map(DeviceName::as_str).collect();
        let event = Event::new(Action::RestoreBegin, "installation", "").detail("lost", lost.join(","));
        let now = self.parts().clock.now();
        let work = |_| async move {
            Ok(self.parts().db.write::<_, DbError, _>(move |conn| restore::begin(conn, now)).await?)
        };
        self.parts().audit.around(caller, event, work).await
    }

    /// Ends the quarantine. `false` if there was none.
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], or what the log and the database say.
    pub async fn release(&self, caller: &Caller) -> Result<bool, VaultError> {
        let event = Event::new(Action::RestoreRelease, "installation", "");
        let released = self.audited(caller, Scope::KeysAdmin, event, |note| async move {
            let released = self.parts().db.write::<_, DbError, _>(restore::release).await?;
            note.add("released", released.to_string());
            Ok(released)
        });
        let released = released.await?;
        self.inner.job_queued.notify_one();
        Ok(released)
    }

    /// Whether a restore can be made: if the KEK was lost, the backup KEK is there and fit. Changes nothing.
    ///
    /// # Errors
    /// [`VaultError::NotFound`] if there is no backup KEK, [`VaultError::Seal`] if it is not on its device.
    pub async fn check_restore(
        &self,
        tenant: &TenantId,
        lost: &BTreeSet<DeviceName>,
    ) -> Result<(), VaultError> {
        match self.active_in(tenant, KekRole::Main).await? {
            Some(kek) if !self.is_lost(&kek, lost).await? => return Ok(()),
            _ => {}
        }
        let backup = self.active_in(tenant, KekRole::Backup).await?;
        let backup = backup.ok_or(VaultError::NotFound("backup key-encryption key"))?;
        let report = self.parts().admin.inspect(&backup.key).await.map_err(VaultError::Seal)?;
        if !report.deviations.is_empty() {
            let reason = report.deviations.join("; ");
            return Err(VaultError::Seal(SealError::KeyUnfit { key: backup.key.id(), reason }));
        }
        Ok(())
    }

    /// Brings the tenant's records back after `lost` devices took their KEK with them: makes a new version
    /// where new ones are placed, unless the present one is there, and moves every record to it.
    /// Repeatable: killed anywhere, the next call goes on. `tell` hears how far it is.
    ///
    /// # Errors
    /// What the devices, the log and the database say.
    pub async fn restore(
        &self,
        tenant: &TenantId,
        lost: &BTreeSet<DeviceName>,
        tell: impl Fn(&JobInfo),
    ) -> Result<Restored, VaultError> {
        let needs_kek = match self.active_in(tenant, KekRole::Main).await? {
            Some(present) => self.is_lost(&present, lost).await?,
            None => true,
        };
        if needs_kek {
            let turn = Arc::new(self.parts().db.turn(TurnName::DeviceKeys).await?);
            self.make_unasked(tenant, KekRole::Main, "restore", &turn).await?;
        }
        let job = self.queue_job(tenant, JobKind::Restore, &Request::Plain).await?;
        let job = self.run_restore(tenant, &job.id, tell).await?;
        Ok(Restored { done: job.done, failed: job.failed })
    }

    /// Records how a restore ended.
    ///
    /// # Errors
    /// If the log takes no record.
    pub async fn restore_ended(
        &self,
        caller: &Caller,
        restored: &Restored,
        reissued: usize,
    ) -> Result<(), VaultError> {
        let event = Event::new(Action::RestoreEnd, "installation", "")
            .detail("done", restored.done.to_string())
            .detail("failed", restored.failed.to_string())
            .detail("reissued", reissued.to_string());
        let outcome = match restored.failed {
            0 => Outcome::Success,
            _ => Outcome::Failure("records-failed"),
        };
        Ok(self.parts().audit.record(caller, event, outcome).await?)
    }

    async fn is_lost(&self, kek: &Kek, lost: &BTreeSet<DeviceName>) -> Result<bool, VaultError> {
        if !lost.contains(kek.key.device()) {
            return Ok(false);
        }
        match self.parts().admin.inspect(&kek.key).await {
            // Another device under the name of the one that was given up, or that one after it was cleared.
            Ok(report) => Ok(!report.deviations.is_empty()),
            Err(SealError::KeyMissing { .. } | SealError::NoDevice { .. }) => Ok(true),
            Err(error) => Err(VaultError::Seal(error)),
        }
    }
}
