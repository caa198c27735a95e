//! The daemon: puts the services together, serves, watches, and ends in order.
//!
//! Order of a start: memory, database, audit log, device, services, listeners. It serves before the
//! device answers (not ready, but alive), because a device that is away must not end the process:
//! a supervisor's restarts would try the PIN again and again. Order of an end: readiness fails,
//! requests finish, the audit log is closed, then device and database.

pub mod anchor;
mod attest;
pub mod dev;
mod health;
mod listen;
mod metrics;
mod notify;
mod restore;
mod services;
mod tls;

use std::io;
use std::sync::Arc;

use secrecy::SecretString;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::audit::AuditError;
use crate::config::{Config, ConfigError};
use crate::identity::{Caller, ScopeSet};
use crate::ids::ClientId;
use crate::issuer::{IssuerError, NewApp};

pub use restore::{RestoreReport, restore};
pub use services::{ProvisionError, Services, StartError};

use health::Health;
use listen::Listeners;

/// Why the daemon ended or did not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration breaks a rule.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A part could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The keys could not be made, or must not be used.
    #[error("the keys on the device are not usable")]
    Keys(#[from] ProvisionError),
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] listen::ListenError),
    /// Certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// An application could not be made.
    #[error("the application could not be made")]
    App(#[from] IssuerError),
    /// The start could not be recorded.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The development environment could not be made.
    #[error(transparent)]
    Dev(#[from] dev::DevError),
    /// New secrets cannot be kept.
    #[error("the applications' new secrets cannot be written")]
    Secrets(#[source] io::Error),
    /// The HTTP server or the signal handling failed.
    #[error("the server failed")]
    Server(#[source] io::Error),
}

/// What [`init`] made.
pub struct InitReport {
    /// The first application.
    pub client_id: ClientId,
    /// Its secret; empty if it was not made now.
    pub client_secret: SecretString,
    /// Whether it was made now.
    pub created: bool,
}

/// Runs the daemon until it is told to stop. `on_ready` is called once, with the base URL, when all
/// readiness checks pass for the first time.
///
/// # Errors
/// [`RunError`]; keys that must not be used end a daemon that has just started.
pub async fn run(mut config: Config, on_ready: impl FnOnce(&str)) -> Result<(), RunError> {
    let listeners = Listeners::bind(&mut config)?;
    let services = Services::start(config).await?;
    serve(services, listeners, on_ready).await
}

/// Makes schema, keys, tenant and the first application, which holds all rights. Repeatable.
///
/// # Errors
/// [`RunError`]; what was made stays, and the next run goes on from there.
pub async fn init(config: Config, app_name: &str) -> Result<InitReport, RunError> {
    let services = Services::init(config).await?;
    let made = first_app(&services, app_name).await;
    services.close().await;
    made
}

async fn first_app(services: &Services, name: &str) -> Result<InitReport, RunError> {
    let caller = Caller::system("init", services.config.tenant.clone());
    let apps = services.issuer.list_apps(&caller).await?;
    if let Some(app) = apps.into_iter().find(|app| app.name == name) {
        let client_secret = SecretString::default();
        return Ok(InitReport { client_id: app.client_id, client_secret, created: false });
    }
    let new = NewApp::machine(name, ScopeSet::all());
    let (app, client_secret) = services.issuer.create_app(&caller, new).await?;
    Ok(InitReport { client_id: app.client_id, client_secret, created: true })
}

async fn serve(
    services: Services,
    listeners: Listeners,
    on_ready: impl FnOnce(&str),
) -> Result<(), RunError> {
    let services = Arc::new(services);
    let health = Arc::new(Health::new(Arc::clone(&services)));
    let gate = Arc::new(services.gate());
    let (server, certificates) = listeners.server(&services, &health, &gate)?;
    services.record_start().await?;
    services.tokens.recover(&services.config.tenant).await;

    let (fatal, keys_unfit) = oneshot::channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(attest::run(Arc::clone(&services), Arc::clone(&health), fatal));
    tasks.spawn(health::upkeep(Arc::clone(&services), Arc::clone(&health), gate));
    tasks.spawn(notify::watchdog());
    tasks.spawn(anchor::run(Arc::clone(&services), Arc::clone(&health)));
    let (vault, keys, tokens) = (services.vault.clone(), services.keys.clone(), services.tokens.clone());
    let tenant = services.config.tenant.clone();
    tasks.spawn(
        async move { tokio::join!(vault.run_jobs(&tenant), keys.run(&tenant), tokens.run(&tenant)).0 },
    );

    notify::started();
    let ended = listen::until_stopped(server, &health, certificates, keys_unfit, on_ready).await;
    tasks.shutdown().await;
    services.record_stop().await;
    services.close().await;
    ended
}
