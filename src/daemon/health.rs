//! How the daemon is: readiness checks, the status object, metrics. Reading any of it never waits
//! for the device or the database; what needs them is refreshed by [`upkeep`].

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::metrics::Metrics;
use super::services::Services;
use crate::http::{Check, Gate, Operations};
use crate::identity::Caller;
use crate::seal::DeviceState;

const UPKEEP: Duration = Duration::from_secs(5);
/// In beats of the upkeep: counting all records is not for every beat.
const FIGURES_EVERY: u64 = 12;

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

    fn refresh(&self) {
        let is_ready = self.checks().iter().all(|check| check.problem.is_none());
        self.ready.send_replace(is_ready);
    }

    fn device_problem(&self) -> Option<String> {
        match self.services.device.status().state {
            DeviceState::Ready => None,
            DeviceState::Away(reason) | DeviceState::Stopped(reason) => Some(reason),
        }
    }
}

impl Operations for Health {
    fn checks(&self) -> Vec<Check> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        let schema = self.schema.read().unwrap_or_else(PoisonError::into_inner).clone();
        let audit = self.services.audit.is_refusing().then(|| "the audit log takes no records".to_owned());
        let draining = self.is_draining().then(|| "the daemon is stopping".to_owned());
        vec![
            Check { name: "database", problem: self.services.db.status().problem },
            // A database with pending or unknown migrations is not opened at all; it may be migrated later.
            Check { name: "migrations", problem: schema },
            Check { name: "audit", problem: audit },
            Check { name: "device", problem: self.device_problem() },
            Check { name: "keys", problem: keys },
            Check { name: "serving", problem: draining },
        ]
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn status(&self) -> Value {
        let checks = self.checks();
        let failing = checks.iter().filter_map(|check| Some((check.name, check.problem.as_ref()?)));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "ready": checks.iter().all(|check| check.problem.is_none()),
            "failing": failing.collect::<std::collections::BTreeMap<_, _>>(),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "device": self.services.device.status(),
            "missing_keys": *self.missing.read().unwrap_or_else(PoisonError::into_inner),
            "memory": self.services.arena.status(),
            "process": crate::process::hardening(),
            "database": self.services.db.status(),
        })
    }

    fn metrics(&self) -> String {
        let is_ready = self.checks().iter().all(|check| check.problem.is_none());
        let missing = self.missing.read().unwrap_or_else(PoisonError::into_inner).len();
        self.metrics.set_state(
            is_ready,
            missing,
            &self.services.arena.status(),
            &self.services.device.status(),
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
        health.refresh();
        if beat.is_multiple_of(FIGURES_EVERY) {
            let schema = services.db.schema_problem().await;
            *health.schema.write().unwrap_or_else(PoisonError::into_inner) = schema;
            match services.vault.figures(&caller).await {
                Ok(figures) => health.metrics.set_figures(&figures),
                Err(error) => tracing::debug!(%error, "no figures for the metrics"),
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
