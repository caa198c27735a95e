//! Looks at the keys on the device: at the start until they are found fit, then once a minute, and at
//! once when a request met a key that is missing or unfit.
//!
//! Found unfit right after the start, the process ends: somebody is there to read the message.
//! Found unfit later, only readiness fails; requests that do not need the key go on. A key that is
//! missing fails its own users and ends nothing (HS-9): the rest may be all that there is left to serve.
//! Readiness goes with a signing or MAC key, which everybody needs, and stays without a KEK version.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::health::Health;
use super::services::{Missing, ProvisionError, Services};
use crate::seal::KeyId;

/// How long after the start an unfit key still ends the process.
const START: Duration = Duration::from_secs(10);
const AGAIN_WHILE_FAILING: Duration = Duration::from_secs(1);
const AGAIN_WHILE_BAD: Duration = Duration::from_secs(5);
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
        let (problem, missing) = match &found {
            // A look that came to no end says nothing about the keys that it did not reach.
            Err(error) => (Some(super::health::chain(error)), last.1.clone()),
            Ok(Missing { keks, keys }) => {
                let lost =
                    || format!("signing and MAC keys are missing on the device: {}", names(keys).join(", "));
                ((!keys.is_empty()).then(lost), [names(keks), names(keys)].concat())
            }
        };
        if !std::mem::replace(&mut told, true) || (&problem, &missing) != (&last.0, &last.1) {
            match &problem {
                Some(problem) => tracing::error!(problem, "the keys on the device cannot be used"),
                None if missing.is_empty() => tracing::info!("the keys on the device are fit for use"),
                None => {
                    tracing::error!(
                        ?missing,
                        "KEKs are missing on the device, the other keys are fit for use"
                    );
                }
            }
        }
        // A key that is missing or weakened does not heal by itself.
        let is_whole = found.is_ok() || found.as_ref().is_err_and(ProvisionError::is_unfit);
        let wait = if is_whole { AGAIN } else { AGAIN_WHILE_FAILING };
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
        let failures = services.devices.key_failures();
        let looked = Instant::now();
        // Requests go on to meet a key that is known to be bad: then not at each of them.
        let pause = if is_fit { AGAIN_WHILE_FAILING } else { AGAIN_WHILE_BAD };
        while looked.elapsed() < wait {
            tokio::time::sleep(AGAIN_WHILE_FAILING.min(wait)).await;
            if looked.elapsed() >= pause && services.devices.key_failures() != failures {
                break;
            }
        }
    }
}

fn names(keys: &[KeyId]) -> Vec<String> {
    keys.iter().map(ToString::to_string).collect()
}
