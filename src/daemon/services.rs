//! The services and what they stand on, made in one order and closed in the reverse one.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

use super::anchor::{self, Anchor, AnchorError};
use crate::audit::{Action, AuditError, AuditLog, Event, Options as AuditOptions, Outcome};
use crate::clock::{Clock, SystemClock};
use crate::config::{Config, LogFormat};
use crate::db::{Db, OpenError, OpenOptions};
use crate::http::{self, Gate};
use crate::identity::{Caller, Principal};
use crate::issuer::{self, Issuer, SigningPolicy};
use crate::keys::{self, Keys, KeysError, Purpose};
use crate::seal::{self, Arena, ArenaError, DeviceName, Devices, KeyId, SealError, Surroundings};
use crate::tokens::{self, Tokens};
use crate::upstream::{self, Upstream};
use crate::vault::{self, Vault, VaultError};

/// Everything a running daemon has.
pub struct Services {
    /// What it was told.
    pub config: Config,
    /// The database.
    pub db: Db,
    /// Guarded memory.
    pub arena: Arena,
    /// The devices.
    pub devices: Devices,
    /// The audit log.
    pub audit: AuditLog,
    /// Signing and MAC keys.
    pub keys: Keys,
    /// Secrets and KEKs.
    pub vault: Vault,
    /// Tokens and applications.
    pub issuer: Issuer,
    /// Federated token sets.
    pub tokens: Tokens,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// What tells an old copy of the database from the present one; `None` where it is not configured.
    pub(super) anchor: Option<Anchor>,
}

/// Why a part could not be started. A device that is away is not an error.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No device is configured.
    #[error("no device is configured: the section [seal.pkcs11] is missing")]
    NoDevice,
    /// A device that is needed now does not answer.
    #[error("the device `{device}` does not answer: {reason}")]
    Away {
        /// Its name.
        device: DeviceName,
        /// What is wrong.
        reason: String,
    },
    /// Keys were given up for new ones that are not made yet.
    #[error("a restore was interrupted: run `lacre restore run` again")]
    RestoreUnfinished,
    /// Keys were never made for this database.
    #[error("this installation has no keys yet: run `lacre init` first")]
    NotInitialised,
    /// Guarded memory.
    #[error(transparent)]
    Memory(#[from] ArenaError),
    /// The database.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The device's module, selection or PIN source.
    #[error(transparent)]
    Device(#[from] seal::StartError),
    /// What calls out.
    #[error(transparent)]
    Upstream(#[from] upstream::StartError),
    /// The audit log.
    #[error("the audit log cannot be opened")]
    Audit(#[from] AuditError),
    /// The roll-back anchor.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// The record of the keys.
    #[error("the keys cannot be looked up")]
    Keys(#[source] KeysError),
    /// The keys could not be made.
    #[error("the keys could not be made")]
    Provision(#[from] ProvisionError),
}

/// What is wrong with the keys on the device.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// A signing or MAC key.
    #[error("signing and MAC keys")]
    Keys(#[from] KeysError),
    /// A KEK.
    #[error("key-encryption keys")]
    Vault(#[from] VaultError),
}

impl ProvisionError {
    /// Whether a key is ambiguous or weakened: waiting does not heal that.
    pub fn is_unfit(&self) -> bool {
        let (Self::Keys(KeysError::Seal(error)) | Self::Vault(VaultError::Seal(error))) = self else {
            return false;
        };
        matches!(error, SealError::KeyUnfit { .. })
    }
}

/// Keys that were made and are not on the device any more.
pub struct Missing {
    /// KEK versions: what they wrap does not open.
    pub keks: Vec<KeyId>,
    /// Signing and MAC keys, which every token needs.
    pub keys: Vec<KeyId>,
}

/// What the services stand on.
struct Ground {
    db: Db,
    arena: Arena,
    devices: Devices,
    audit: AuditLog,
    keys: Keys,
    clock: Arc<dyn Clock>,
}

impl Ground {
    async fn open(config: &Config) -> Result<Self, StartError> {
        let configs = config.all_devices();
        if configs.is_empty() {
            return Err(StartError::NoDevice);
        }
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let arena = Arena::new(&config.memory)?;
        let options = OpenOptions { connections: config.database.connections, migrate: false };
        let db = Db::open(&config.database_url()?, &options)?;
        let audit_options = AuditOptions { deadline: config.audit.deadline };
        let audit = AuditLog::open(db.clone(), Arc::clone(&clock), audit_options).await?;
        let json = config.log.format == LogFormat::Json;
        let mut surroundings = Surroundings::new(&config.memory, &config.log.level, json);
        if let Some(changes) = &config.log.changes {
            surroundings.log_filter = changes.clone();
        }
        let devices = Devices::start(&configs, &config.sealer, &surroundings, &arena)?;
        let keys = Keys::new(keys::Parts {
            db: db.clone(),
            sealer: devices.sealer.clone(),
            admin: devices.admin.clone(),
            audit: audit.clone(),
            clock: Arc::clone(&clock),
            placement: config.placement.signing_keys.clone(),
            devices: config.all_devices().into_keys().collect(),
            policy: config.keys.policy(),
        });
        Ok(Self { db, arena, devices, audit, keys, clock })
    }

    async fn build(self, config: Config) -> Result<Services, StartError> {
        let body_key = self.keys.key_ref(&config.tenant, Purpose::RequestBody).await;
        let body_key = body_key.map_err(StartError::Keys)?;
        let vault = Vault::new(vault::Parts {
            db: self.db.clone(),
            sealer: self.devices.sealer.clone(),
            admin: self.devices.admin.clone(),
            audit: self.audit.clone(),
            clock: Arc::clone(&self.clock),
            body_key,
            config: config.vault.clone(),
            devices: config.all_devices().into_keys().collect(),
            placement: config.placement.keks.clone(),
            backup: config.backup.as_ref().map(|backup| backup.device.clone()),
        });
        let tokens = Tokens::new(tokens::Parts {
            db: self.db.clone(),
            vault: vault.clone(),
            upstream: Upstream::new(&config.upstream)?,
            audit: self.audit.clone(),
            clock: Arc::clone(&self.clock),
            config: config.tokens.clone(),
            spool: config.data_dir.join("spool"),
        });
        let issuer = Issuer::new(issuer::Parts {
            db: self.db.clone(),
            keys: self.keys.clone(),
            tokens: tokens.clone(),
            audit: self.audit.clone(),
            clock: Arc::clone(&self.clock),
            config: issuer::Config {
                issuer: format!("{}/oidc", config.public_url()),
                tenant: config.tenant.clone(),
                token_lifetime: config.issuer.token_lifetime,
                peers: peers(&config),
            },
        });
        let Self { db, arena, devices, audit, keys, clock } = self;
        Ok(Services { config, db, arena, devices, audit, keys, vault, issuer, tokens, clock, anchor: None })
    }
}

impl Services {
    /// Opens an initialised installation. The device may be away.
    ///
    /// # Errors
    /// [`StartError::NotInitialised`] if `lacre init` never ran on this database: keys are made on
    /// purpose, never because a daemon was pointed at an empty place.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let ground = Ground::open(&config).await?;
        if !ground.keys.are_made(&config.tenant).await.map_err(StartError::Keys)? {
            let were_made = ground.keys.were_made(&config.tenant).await.map_err(StartError::Keys)?;
            return Err(if were_made { StartError::RestoreUnfinished } else { StartError::NotInitialised });
        }
        ground.keys.remember_time().await.map_err(StartError::Keys)?;
        let mut services = ground.build(config).await?;
        match anchor::Parts::of(&services) {
            Some(parts) => match Anchor::open(parts).await {
                Ok(anchor) => services.anchor = Some(anchor),
                Err(error) => {
                    services.close().await;
                    return Err(error.into());
                }
            },
            None => tracing::info!("roll-back detection is off: there is no [anchor]"),
        }
        Ok(services)
    }

    /// Opens an installation of which devices may be lost. Makes no key, unless an earlier restore was
    /// interrupted.
    ///
    /// # Errors
    /// [`StartError::NotInitialised`] if `lacre init` never ran on this database.
    pub async fn open_for_restore(config: Config) -> Result<Self, StartError> {
        let ground = Ground::open(&config).await?;
        // A restore that was killed has given up keys whose successors are not made yet.
        let was_made = ground.keys.were_made(&config.tenant).await.map_err(StartError::Keys)?;
        if !was_made {
            return Err(StartError::NotInitialised);
        }
        ground.build(config).await
    }

    /// Opens an installation and makes what it lacks. Needs the device. Repeatable.
    ///
    /// # Errors
    /// [`StartError`]; what was made stays.
    pub async fn init(config: Config) -> Result<Self, StartError> {
        if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(&config.data_dir) {
            tracing::debug!(%error, "the data directory is not made here");
        }
        let ground = Ground::open(&config).await?;
        ground.keys.provision(&config.tenant).await.map_err(ProvisionError::from)?;
        let services = ground.build(config).await?;
        let Missing { keks, keys } = services.provision().await?;
        for key in keks.into_iter().chain(keys) {
            tracing::error!(%key, "made before and not on the device any more; nothing is made in its place");
        }
        Ok(services)
    }

    /// Makes what is planned and missing, and inspects every live key on the device. Returns those that
    /// were made and are not there any more.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub async fn provision(&self) -> Result<Missing, ProvisionError> {
        let keys = self.keys.provision(&self.config.tenant).await;
        let keks = self.vault.provision(&self.config.tenant).await?;
        Ok(Missing { keks, keys: keys? })
    }

    pub(super) async fn record_start(&self) -> Result<(), AuditError> {
        let detection = match &self.anchor {
            Some(anchor) => format!("generation {}", anchor.generation()),
            None => "off".to_owned(),
        };
        self.record(event(Action::DaemonStart).detail("rollback_detection", detection)).await
    }

    pub(super) async fn record_stop(&self) {
        if let Err(error) = self.record(event(Action::DaemonStop)).await {
            tracing::warn!(%error, "the stop is not in the audit log");
        }
        if let Some(anchor) = &self.anchor {
            anchor.advance_at_last().await;
        }
    }

    async fn record(&self, event: Event) -> Result<(), AuditError> {
        let caller = Caller::system("daemon", self.config.tenant.clone());
        self.audit.record(&caller, event, Outcome::Success).await
    }

    pub(super) fn gate(&self) -> Gate {
        let server = &self.config.server;
        let certificates = server.tls.as_ref().map_or_else(Vec::new, |tls| tls.client_rules.clone());
        Gate::new(
            self.issuer.clone(),
            self.audit.clone(),
            self.config.tenant.clone(),
            (server.local_users.clone(), certificates),
            server.rate_limit,
        )
    }

    /// Ends in order: what was accepted is recorded before device and database go.
    pub async fn close(&self) {
        self.tokens.close().await;
        self.audit.close().await;
        self.devices.close();
        self.db.close();
    }
}

/// What local users and holders of certificates may have signed.
fn peers(config: &Config) -> HashMap<Principal, SigningPolicy> {
    let certificates = config.server.tls.as_ref().map_or(&[][..], |tls| &tls.client_rules);
    http::signing_policies(&config.server.local_users, certificates)
}

fn event(action: Action) -> Event {
    Event::new(action, "daemon", env!("CARGO_PKG_VERSION"))
}
