//! Stands in for `tpm` where the program was built without tpm2-tss: the configuration is understood, and refused.

use crate::seal::StartError;
use crate::seal::driver::Driver;
use crate::seal::guarded::Arena;
use crate::seal::latch::Latch;

/// `[seal.tpm]`, unread.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
pub struct Config {
    /// systemd's `$CREDENTIALS_DIRECTORY`; filled by the configuration's reader, not by the file.
    #[serde(skip)]
    pub credentials_dir: Option<std::path::PathBuf>,
}

impl Config {
    /// Never: there is none.
    pub(crate) const fn is_simulated(&self) -> bool {
        false
    }
}

/// Says why there is none.
pub(crate) fn load(_: &Config, _: Latch, _: &Arena) -> Result<Box<dyn Driver>, StartError> {
    let reason = "this lacre was built without TPM support: build it with libtss2-dev and the feature `tpm`";
    Err(StartError::Selection(reason.to_owned()))
}
