//! The device itself: one start, one login under the latch, its status and its capabilities.

use serde_json::Value;

use super::Finding;
use crate::seal::guarded::Options;
use crate::seal::{self, Arena, Device, DeviceConfig, DeviceState, StartError};

/// Starts the device, adds what was found, and returns the token's capabilities.
pub(crate) async fn ask(config: &DeviceConfig, memory: &Options, findings: &mut Vec<Finding>) -> Value {
    const CHECK: &str = "token";
    // The canary is all that passes through guarded memory here.
    let options = Options { allow_unlocked: true, require_secretmem: false, ..memory.clone() };
    let Ok(arena) = Arena::new(&options) else {
        findings.push(Finding::fail(
            CHECK,
            "not asked: no guarded memory",
            "see the check of guarded memory",
        ));
        return Value::Null;
    };
    let device = match seal::start(config, &arena) {
        Ok(device) => device,
        Err(error) => {
            findings.push(Finding::fail(CHECK, error.to_string(), start_hint(&error)));
            return Value::Null;
        }
    };
    let report = examine(&device, findings).await;
    device.close();
    report
}

fn start_hint(error: &StartError) -> &'static str {
    match error {
        StartError::Module { .. } => "check the module's path, processor and rights",
        StartError::Pin { .. } => "check pin_source; the PIN was not tried",
        StartError::Selection(_) => {
            "set one of token, serial and uri in [seal.pkcs11], or tcti in [seal.tpm]"
        }
        StartError::Threads { .. } => "raise the limit on threads of the daemon's user",
        StartError::Sealer { .. } => "see the section [sealer] in hsm-config/lacre.toml",
        StartError::Latch { .. } => "give the latch directory to the daemon's user",
    }
}

async fn examine(device: &Device, findings: &mut Vec<Finding>) -> Value {
    const CHECK: &str = "token";
    let status = device.status();
    if let Some(notice) = &status.notice {
        findings.push(Finding::warn("device", notice.clone(), "find out who guesses, and clear the lockout"));
    }
    match status.state {
        DeviceState::Ready => {
            let found = format!("{} ({}), {}", status.token_label, status.token_serial, status.library);
            findings.push(Finding::ok(CHECK, found));
        }
        DeviceState::Away(reason) => {
            let todo = "check the device, its network and the token's name; the daemon keeps trying";
            findings.push(Finding::fail(CHECK, reason, todo));
            return Value::Null;
        }
        DeviceState::Stopped(reason) => {
            let todo =
                "put the right PIN in place (or name the right token); a running daemon tries it by itself";
            findings.push(Finding::fail(CHECK, reason, todo));
            return Value::Null;
        }
    }
    if !status.without_evidence.is_empty() {
        let found = format!("keys are used without {}", status.without_evidence.join(", "));
        let todo =
            "that is what without_evidence asks for; nobody but you can say that the keys were made there";
        findings.push(Finding::warn("custody", found, todo));
    }
    match device.capabilities().await {
        Ok(report) => {
            if report["refuses_to_export"] == false {
                let todo = "whoever has the PIN can take the keys out: use another device";
                findings.push(Finding::warn(
                    "custody",
                    "the token exports keys that are not extractable",
                    todo,
                ));
            }
            report
        }
        Err(error) => {
            findings.push(Finding::fail("capabilities", error.to_string(), "see the daemon's log"));
            Value::Null
        }
    }
}
