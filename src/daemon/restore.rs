//! `lacre restore`: an installation whose devices were lost, made usable again.
//!
//! Each step can be repeated: killed anywhere, the command goes on when it is run again. Nothing is
//! changed before it is known that what is needed is there: the new device, the backup KEK on its token.

use std::collections::BTreeSet;

use secrecy::SecretString;

use super::RunError;
use super::services::{ProvisionError, Services, StartError};
use crate::clock::Timestamp;
use crate::config::Config;
use crate::identity::Caller;
use crate::ids::ClientId;
use crate::seal::{DeviceName, DeviceState};
use crate::vault::{JobInfo, Restored};

/// What a restore has done.
#[derive(Debug)]
pub struct RestoreReport {
    /// Since when the installation is in quarantine.
    pub quarantined_at: Timestamp,
    /// Signing and MAC keys that were made in the place of lost ones, in this run.
    pub replaced_keys: u32,
    /// Records that are readable again, in this run.
    pub restored: u64,
    /// Records that are not.
    pub failed: u64,
    /// Applications that got a new secret, in this run.
    pub reissued: usize,
}

/// Puts the installation into quarantine, and replaces what the `lost` devices held: keys by new ones, the
/// records' wraps by way of the backup KEK, the applications' secrets by those that `keep` gives: the same
/// one again when it is asked again. `tell` hears how far the records are.
///
/// # Errors
/// [`RunError`]; what was done stays, and the next run goes on from there.
pub async fn restore(
    config: Config,
    lost: &BTreeSet<DeviceName>,
    keep: impl Fn(&ClientId) -> std::io::Result<SecretString>,
    tell: impl Fn(&JobInfo),
) -> Result<RestoreReport, RunError> {
    let services = Services::open_for_restore(config).await?;
    let report = run(&services, lost, keep, tell).await;
    services.close().await;
    report
}

async fn run(
    services: &Services,
    lost: &BTreeSet<DeviceName>,
    keep: impl Fn(&ClientId) -> std::io::Result<SecretString>,
    tell: impl Fn(&JobInfo),
) -> Result<RestoreReport, RunError> {
    let tenant = &services.config.tenant;
    let caller = Caller::system("restore", tenant.clone());
    let vault = |error| RunError::Keys(ProvisionError::Vault(error));
    if !lost.is_empty() {
        answering(services)?;
        services.vault.check_restore(tenant, lost).await.map_err(vault)?;
    }
    let quarantined_at = services.vault.quarantine(&caller, lost).await.map_err(vault)?;
    let mut report = RestoreReport { quarantined_at, replaced_keys: 0, restored: 0, failed: 0, reissued: 0 };
    if lost.is_empty() {
        return Ok(report);
    }
    let keys = |error| RunError::Keys(ProvisionError::Keys(error));
    report.replaced_keys = services.keys.replace_lost(tenant, lost).await.map_err(keys)?.keys;
    let Restored { done, failed } = services.vault.restore(tenant, lost, tell).await.map_err(vault)?;
    (report.restored, report.failed) = (done, failed);
    let since = services.keys.client_secrets_since(tenant).await.map_err(keys)?;
    if since.is_some_and(|since| since >= quarantined_at) {
        report.reissued = reissue(services, &caller, keep).await?;
    }
    let restored = Restored { done, failed };
    services.vault.restore_ended(&caller, &restored, report.reissued).await.map_err(vault)?;
    Ok(report)
}

/// Every configured device has to answer: one that does not may hold what is believed lost.
fn answering(services: &Services) -> Result<(), RunError> {
    for status in services.devices.status() {
        match status.state {
            DeviceState::Ready => {}
            DeviceState::Away(reason) | DeviceState::Stopped(reason) => {
                return Err(StartError::Away { device: status.name, reason }.into());
            }
        }
    }
    Ok(())
}

async fn reissue(
    services: &Services,
    caller: &Caller,
    keep: impl Fn(&ClientId) -> std::io::Result<SecretString>,
) -> Result<usize, RunError> {
    let mut count = 0;
    for app in services.issuer.list_apps(caller).await? {
        // Kept first: a secret that nobody has would be worth nothing.
        let secret = keep(&app.client_id).map_err(RunError::Secrets)?;
        if services.issuer.reissue(caller, &app.client_id, &secret).await? {
            count += 1;
        }
    }
    Ok(count)
}
