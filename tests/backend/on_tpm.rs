//! A TPM 2.0, in software.

use std::path::Path;

use serde_json::{Value, json};

use crate::stage::Backend;
use crate::swtpm::Swtpm;

/// swtpm from the distribution.
pub const BACKEND: Backend =
    Backend { title: "TPM 2.0 (swtpm 0.7.1)", install, deviations: &[], own_process: false };

fn install(_: &Path) -> Value {
    let (tcti, auth_file) = Swtpm::companion();
    // A call is some milliseconds here, and sixty-four wait for each other.
    json!({
        "tpm": { "tcti": tcti, "auth_source": format!("file:{}", auth_file.display()) },
        "slow_threads": 1,
        "deadline": 10,
    })
}
