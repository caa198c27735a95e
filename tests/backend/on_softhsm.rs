//! SoftHSM.

use std::path::Path;

use serde_json::{Value, json};

use crate::softhsm_token::SoftHsm;
use crate::stage::Backend;

/// SoftHSM from the distribution, as most people develop with.
pub const BACKEND: Backend = Backend { title: "SoftHSM 2.6.1", install, deviations: &[], own_process: false };

const LABEL: &str = "backend";

fn install(_: &Path) -> Value {
    // It reads its configuration's path from the environment, so the token belongs to the process.
    let token = SoftHsm::in_process(LABEL);
    json!({ "pkcs11": {
        "module": token.module,
        "token": LABEL,
        "pin_source": format!("file:{}", token.pin_file.display()),
    }})
}
