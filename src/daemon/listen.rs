//! The listeners, the HTTP server on them, and how it is brought to its end.

#![expect(clippy::disallowed_types, reason = "the one place that listens")]

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpServer;
use actix_web::dev::{Server, ServerHandle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};

use super::RunError;
use super::health::Health;
use super::notify;
use super::services::{ProvisionError, Services};
use super::tls::{self, Certificates};
use crate::config::Config;
use crate::http::{self, Gate, Operations};

/// How long readiness is seen to fail before connections are refused.
const DRAIN_NOTICE: Duration = Duration::from_millis(250);
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const REQUEST_HEAD: Duration = Duration::from_secs(10);

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The TCP address.
    #[error("cannot listen on {address}")]
    Tcp {
        /// Which address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The Unix socket.
    #[error("cannot listen on {path}")]
    Unix {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Bound, not served yet.
pub(super) struct Listeners {
    tcp: TcpListener,
    unix: Option<UnixListener>,
}

impl Listeners {
    /// Binds what `config` names and writes back the port that port 0 became.
    pub(super) fn bind(config: &mut Config) -> Result<Self, RunError> {
        config.check()?;
        let address = config.server.listen;
        let failed = |source| ListenError::Tcp { address, source };
        let tcp = TcpListener::bind(address).map_err(failed)?;
        config.server.listen = tcp.local_addr().map_err(failed)?;
        let unix = match &config.server.unix_socket {
            Some(path) => {
                let bound = bind_unix(path, config.server.unix_socket_mode);
                Some(bound.map_err(|source| ListenError::Unix { path: path.clone(), source })?)
            }
            None => None,
        };
        Ok(Self { tcp, unix })
    }

    /// The server, ready to be awaited, and the certificates it shows.
    pub(super) fn server(
        self,
        services: &Services,
        health: &Arc<Health>,
        gate: &Arc<Gate>,
    ) -> Result<(Server, Option<Arc<Certificates>>), RunError> {
        let config = &services.config.server;
        let operations: Arc<dyn Operations> = Arc::clone(health) as _;
        let parts = http::Parts {
            vault: services.vault.clone(),
            issuer: services.issuer.clone(),
            tokens: services.tokens.clone(),
            keys: services.keys.clone(),
            rotation_grace: services.config.keys.rotation_grace,
            audit: services.audit.clone(),
            gate: Arc::clone(gate),
            operations,
            metrics: config.metrics,
            max_value_bytes: services.config.vault.max_value_bytes,
        };
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let workers = config.workers.unwrap_or(cores).max(1);
        let server = HttpServer::new(move || http::app(&parts))
            .workers(workers)
            .max_connections(config.max_connections.div_ceil(workers))
            .keep_alive(KEEP_ALIVE)
            .client_request_timeout(REQUEST_HEAD)
            .shutdown_timeout(config.drain.as_secs().max(1))
            .disable_signals()
            .on_connect(http::on_connect);
        let (server, certificates) = match &config.tls {
            Some(files) => {
                let (tls, certificates) = tls::configure(files)?;
                (server.listen_rustls_0_23(self.tcp, tls).map_err(RunError::Server)?, Some(certificates))
            }
            None => (server.listen(self.tcp).map_err(RunError::Server)?, None),
        };
        let server = match self.unix {
            Some(unix) => server.listen_uds(unix).map_err(RunError::Server)?,
            None => server,
        };
        Ok((server.run(), certificates))
    }
}

fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process answers there")),
        // Left behind by a process that was killed: nobody listens, so it may go.
        // A connection to a plain file is refused just so: that one stays.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
            std::fs::remove_file(path)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// Serves until a signal ends it. The first SIGTERM or SIGINT drains, a second one does not wait.
pub(super) async fn until_stopped(
    mut server: Server,
    health: &Arc<Health>,
    certificates: Option<Arc<Certificates>>,
    mut keys_unfit: oneshot::Receiver<ProvisionError>,
    on_ready: impl FnOnce(&str),
) -> Result<(), RunError> {
    let handle = server.handle();
    let [mut terminate, mut interrupt, mut hangup] = signals().map_err(RunError::Server)?;
    let mut ready = health.ready();
    let mut on_ready = Some(on_ready);
    let mut judged = false;
    loop {
        tokio::select! {
            ended = &mut server => return ended.map_err(RunError::Server),
            _ = terminate.recv() => stop(health, &handle),
            _ = interrupt.recv() => stop(health, &handle),
            _ = hangup.recv() => reload(certificates.as_deref()),
            verdict = &mut keys_unfit, if !judged => {
                // Polled once only: the sender goes when the keys are found fit.
                judged = true;
                if let Ok(unfit) = verdict {
                    drop(handle.stop(false));
                    let _ = (&mut server).await;
                    return Err(unfit.into());
                }
            }
            true = becomes_ready(&mut ready), if on_ready.is_some() => {
                notify::ready();
                if let Some(tell) = on_ready.take() {
                    tell(&health.base_url());
                }
            }
        }
    }
}

async fn becomes_ready(ready: &mut watch::Receiver<bool>) -> bool {
    ready.wait_for(|ready| *ready).await.is_ok()
}

fn signals() -> io::Result<[Signal; 3]> {
    Ok([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?])
}

fn stop(health: &Arc<Health>, handle: &ServerHandle) {
    let is_second = health.is_draining();
    tracing::info!(waiting = !is_second, "stopping");
    health.drain();
    notify::stopping();
    let handle = handle.clone();
    tokio::spawn(async move {
        if !is_second {
            tokio::time::sleep(DRAIN_NOTICE).await;
        }
        handle.stop(!is_second).await;
    });
}

fn reload(certificates: Option<&Certificates>) {
    let Some(certificates) = certificates else { return };
    match certificates.reload() {
        Ok(()) => tracing::info!("certificates read again"),
        Err(error) => tracing::error!(%error, "the old certificates stay in use"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");

        let first = bind_unix(&path, 0o600).unwrap();
        assert_eq!(bind_unix(&path, 0o600).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        let _second = bind_unix(&path, 0o660).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "precious").unwrap();

        assert!(bind_unix(&path, 0o600).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
