//! How the daemon is: readiness checks, the status object, metrics. Reading any of it never waits
//! for the device or the database; what needs them is refreshed by [`upkeep`].

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::anchor::Anchor;
use super::metrics::Metrics;
use super::services::Services;
use crate::clock::Timestamp;
use crate::http::{Check, Gate, Operations};
use crate::identity::Caller;
use crate::seal::{DeviceState, DeviceStatus};

const UPKEEP: Duration = Duration::from_secs(5);
/// In beats of the upkeep: counting all records is not for every beat.
const FIGURES_EVERY: u64 = 12;
/// In beats: five minutes. What has expired is worth nothing before it is removed.
const PURGE_EVERY: u64 = 60;

/// See the module's text.
pub(super) struct Health {
    services: Arc<Services>,
    started: Instant,
    draining: AtomicBool,
    /// `Some(problem)`: what the last look at the keys found.
    keys: RwLock<Option<String>>,
    /// Ids of keys that the last look did not find.
    missing: RwLock<Vec<String>>,
    /// What the last look at the schema found.
    schema: RwLock<Option<String>>,
    /// Since when there is a quarantine, when it was last asked for.
    quarantine: RwLock<Option<Timestamp>>,
    ready: watch::Sender<bool>,
    metrics: Metrics,
}

impl Health {
    pub(super) fn new(services: Arc<Services>) -> Self {
        Self {
            services,
            started: Instant::now(),
            draining: AtomicBool::new(false),
            keys: RwLock::new(Some("not looked at yet".to_owned())),
            missing: RwLock::default(),
            schema: RwLock::default(),
            quarantine: RwLock::default(),
            ready: watch::Sender::new(false),
            metrics: Metrics::install(),
        }
    }

    /// Takes note of a look at the keys.
    pub(super) fn attested(&self, problem: Option<String>, missing: Vec<String>) {
        *self.missing.write().unwrap_or_else(PoisonError::into_inner) = missing;
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = problem;
        self.refresh();
    }

    /// From now on the daemon is not ready, whatever else is well.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.refresh();
    }

    /// Becomes true when all checks pass.
    pub(super) fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    pub(super) fn base_url(&self) -> String {
        self.services.config.public_url()
    }

    pub(super) fn refresh(&self) {
        let is_ready = self.checks().iter().all(Check::is_passed);
        self.ready.send_replace(is_ready);
    }

    /// Takes note of whether there is a quarantine.
    fn quarantined(&self, since: Option<Timestamp>) {
        let before =
            std::mem::replace(&mut *self.quarantine.write().unwrap_or_else(PoisonError::into_inner), since);
        match (before, since) {
            (None, Some(since)) => {
                tracing::warn!(%since, "QUARANTINE after a restore: nothing scheduled runs");
            }
            (Some(_), None) => tracing::info!("the quarantine was ended"),
            _ => {}
        }
    }

    /// One check for each device. The daemon is not ready without those that seal, sign or will make the
    /// next key; one that only holds old versions or backups fails its own users.
    fn device_checks(&self) -> impl Iterator<Item = Check> {
        let Services { config, keys, vault, devices, .. } = &*self.services;
        let mut needed = vec![config.placement.keks.clone(), config.placement.signing_keys.clone()];
        needed.extend(keys.devices(&config.tenant));
        needed.extend(vault.sealing_device(&config.tenant));
        devices.status().into_iter().map(move |DeviceStatus { name, state, .. }| Check {
            is_needed: needed.contains(&name),
            name: if name.is_default() { "device".into() } else { format!("device/{name}").into() },
            problem: match state {
                DeviceState::Ready => None,
                DeviceState::Away(reason) | DeviceState::Stopped(reason) => Some(reason),
            },
        })
    }
}

impl Operations for Health {
    fn checks(&self) -> Vec<Check> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        let schema = self.schema.read().unwrap_or_else(PoisonError::into_inner).clone();
        let audit = self.services.audit.is_refusing().then(|| "the audit log takes no records".to_owned());
        let draining = self.is_draining().then(|| "the daemon is stopping".to_owned());
        let mut checks = vec![
            Check::needed("database", self.services.db.status().problem),
            // A database with pending or unknown migrations is not opened at all; it may be migrated later.
            Check::needed("migrations", schema),
            Check::needed("audit", audit),
        ];
        checks.extend(self.device_checks());
        checks.extend([Check::needed("keys", keys), Check::needed("serving", draining)]);
        checks.push(Check::needed("clock", self.services.keys.suspended()));
        checks.extend(self.services.anchor.as_ref().map(Anchor::check));
        // Values are served in quarantine: it is shown, and keeps nobody away.
        let quarantine = *self.quarantine.read().unwrap_or_else(PoisonError::into_inner);
        checks.extend(quarantine.map(|since| Check {
            name: "quarantine".into(),
            problem: Some(format!("restored at {since}; `lacre restore release` ends it")),
            is_needed: false,
        }));
        checks
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn status(&self) -> Value {
        let checks = self.checks();
        let failing = checks.iter().filter_map(|check| Some((check.name.as_ref(), check.problem.as_ref()?)));
        let devices = self.services.devices.status();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "ready": checks.iter().all(Check::is_passed),
            "failing": failing.collect::<std::collections::BTreeMap<_, _>>(),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "device": devices.iter().find(|device| device.name.is_default()),
            "devices": devices,
            "missing_keys": *self.missing.read().unwrap_or_else(PoisonError::into_inner),
            "memory": self.services.arena.status(),
            "process": crate::process::hardening(),
            "database": self.services.db.status(),
            "anchor": self.services.anchor.as_ref().map(Anchor::status),
        })
    }

    fn metrics(&self) -> String {
        let is_ready = self.checks().iter().all(Check::is_passed);
        let quarantine = *self.quarantine.read().unwrap_or_else(PoisonError::into_inner);
        let missing = self.missing.read().unwrap_or_else(PoisonError::into_inner).len();
        self.metrics.set_state(
            (is_ready, quarantine.is_some()),
            self.services.anchor.as_ref().map(|anchor| (anchor.generation(), anchor.agrees())),
            missing,
            &self.services.arena.status(),
            &self.services.devices.status(),
        );
        self.metrics.render()
    }
}

/// Repeated work: what ages in memory, and figures that cost a query.
pub(super) async fn upkeep(services: Arc<Services>, health: Arc<Health>, gate: Arc<Gate>) {
    let caller = Caller::system("metrics", services.config.tenant.clone());
    for beat in 0_u64.. {
        gate.forget_idle();
        health.metrics.upkeep();
        match services.vault.quarantined_at().await {
            Ok(since) => health.quarantined(since),
            Err(error) => tracing::debug!(%error, "whether there is a quarantine is not known now"),
        }
        health.refresh();
        if beat.is_multiple_of(FIGURES_EVERY) {
            let schema = services.db.schema_problem().await;
            *health.schema.write().unwrap_or_else(PoisonError::into_inner) = schema;
            match services.vault.figures(&caller).await {
                Ok(figures) => health.metrics.set_figures(&figures),
                Err(error) => tracing::debug!(%error, "no figures for the metrics"),
            }
        }
        if beat.is_multiple_of(PURGE_EVERY) {
            match services.issuer.purge_user_tokens().await {
                Ok(count) => tracing::debug!(count, "expired tokens of users are removed"),
                Err(error) => tracing::debug!(%error, "expired tokens of users are not removed now"),
            }
        }
        tokio::time::sleep(UPKEEP).await;
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
