//! Looks at the keys on the device: at the start until they are found fit, then once a minute, and at
//! once when a request met a key that is missing or unfit.
//!
//! Found unfit right after the start, the process ends: somebody is there to read the message.
//! Found unfit later, only readiness fails; requests that do not need the key go on. A key that is
//! missing fails its own users and nothing else (HS-9): the rest may be all that there is left to serve.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::health::Health;
use super::services::{ProvisionError, Services};

/// How long after the start an unfit key still ends the process.
const START: Duration = Duration::from_secs(10);
const AGAIN_WHILE_FAILING: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_secs(60);

pub(super) async fn run(
    services: Arc<Services>,
    health: Arc<Health>,
    fatal: oneshot::Sender<ProvisionError>,
) {
    let started = Instant::now();
    let mut fatal = Some(fatal);
    let mut last = (None, Vec::new());
    // So that the first look is told, whatever it finds.
    let mut told = false;
    loop {
        let found = services.provision().await;
        let problem = found.as_ref().err().map(|error| super::health::chain(error));
        let missing: Vec<_> =
            found.as_ref().map_or(&[][..], Vec::as_slice).iter().map(ToString::to_string).collect();
        if !std::mem::replace(&mut told, true) || (&problem, &missing) != (&last.0, &last.1) {
            match &problem {
                Some(problem) => tracing::error!(problem, "the keys on the device cannot be used"),
                None if missing.is_empty() => tracing::info!("the keys on the device are fit for use"),
                None => {
                    tracing::error!(?missing, "keys are missing on the device, the others are fit for use");
                }
            }
        }
        // Each look at a key that is missing or weakened is an incident in the audit log, and such a key
        // does not heal by itself: looking every second would only fill the log.
        let is_unfit = found.as_ref().is_err_and(ProvisionError::is_unfit);
        let wait = if problem.is_none() || is_unfit { AGAIN } else { AGAIN_WHILE_FAILING };
        health.attested(problem.clone(), missing.clone());
        last = (problem, missing);
        match found {
            Err(error) if error.is_unfit() && started.elapsed() < START => {
                if let Some(fatal) = fatal.take() {
                    // The receiver is gone only when the process is ending anyway.
                    let _ = fatal.send(error);
                }
            }
            // Passed once: from now on the process stays.
            Ok(_) => fatal = None,
            Err(_) => {}
        }
        let is_fit = last.0.is_none() && last.1.is_empty();
        let failures = services.device.status().key_failures;
        let until = Instant::now() + wait;
        while Instant::now() < until {
            tokio::time::sleep(AGAIN_WHILE_FAILING.min(wait)).await;
            // Only while all is well: a key that is known to be unfit has its incident.
            if is_fit && services.device.status().key_failures != failures {
                break;
            }
        }
    }
}
