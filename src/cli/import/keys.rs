//! Logto's signing keys: into the device, through the service that makes and rotates them.

use std::time::Duration;

use crate::audit::{Action, AuditCode, Event, Outcome};
use crate::cli::error::CliError;
use crate::daemon::Services;
use crate::identity::Caller;
use crate::keys::{ImportAs, KeysError};
use crate::tokens::import::{Fate, KeyStatus, Kind, Logto, PrivateKey, Report, Skip};

/// How keys are imported.
#[derive(Clone, Copy)]
pub(super) struct How {
    /// The longest lifetime of a token that they have signed.
    pub(super) lifetime: Duration,
    /// Only look.
    pub(super) dry_run: bool,
}

/// Imports the private keys; cookie keys have no way into the device.
pub(super) async fn import(
    services: &Services,
    caller: &Caller,
    logto: &Logto,
    how: How,
    report: &mut Report,
) -> Result<(), CliError> {
    for key in logto.private_keys().await.map_err(super::refused)? {
        let fate = one(services, caller, &key, how).await?;
        report.add(Kind::SigningKeys, &key.id, fate);
    }
    for id in logto.cookie_keys().await.map_err(super::refused)? {
        let skip = Skip::by_design("Lacre has its own; cookies of Logto are not valid here");
        report.add(Kind::CookieKeys, &id, skip.into());
    }
    if how.dry_run {
        return Ok(());
    }
    let counts = report.of(Kind::SigningKeys);
    let event = Event::new(Action::LogtoImport, "logto-tenant", logto.tenant())
        .detail("kind", Kind::SigningKeys.name())
        .detail("imported", counts.imported.to_string())
        .detail("present", counts.present.to_string())
        .detail("skipped", counts.skipped.to_string());
    let recorded = services.audit.record(caller, event, Outcome::Success).await;
    recorded.map_err(|e| CliError::local("the end of the import is not in the audit log", e))
}

async fn one(services: &Services, caller: &Caller, key: &PrivateKey, how: How) -> Result<Fate, CliError> {
    let How { lifetime, dry_run } = how;
    let into = match key.status {
        KeyStatus::Next => {
            return Ok(Skip::by_design("it has signed nothing; Lacre makes its own next key").into());
        }
        KeyStatus::Current => ImportAs::Current { lifetime },
        KeyStatus::Previous => ImportAs::Previous { lifetime },
    };
    let imported = match services.keys.has(caller, &key.pem).await {
        Ok(true) => return Ok(Fate::Present),
        Ok(false) if dry_run => return Ok(Fate::Imported),
        Ok(false) => services.keys.import(caller, key.pem.clone(), into, false).await,
        Err(error) => Err(error),
    };
    match imported {
        Ok(_) => Ok(Fate::Imported),
        Err(KeysError::Invalid { field, reason }) => Ok(Skip::loss(format!("{field}: {reason}")).into()),
        Err(KeysError::Refused(refusal)) => Ok(Skip::loss(refusal.code()).into()),
        Err(error) => {
            let what = format!("cannot import the signing key {} ({})", key.id, error.audit_code());
            Err(CliError::local(what, error))
        }
    }
}
