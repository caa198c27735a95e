//! PKCS#11 (stub, being written).
use std::path::PathBuf;

/// `[seal.pkcs11]`; `hsm-config/` has annotated examples. One of `token`, `serial` and `uri` chooses the token.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Path of the vendor's library; may come from the URI's `module-path`.
    #[serde(default)]
    pub module: Option<PathBuf>,
    /// Token label. Slot numbers move; labels do not.
    #[serde(default)]
    pub token: Option<String>,
    /// Token serial number.
    #[serde(default)]
    pub serial: Option<String>,
    /// A `pkcs11:` URI (RFC 7512).
    #[serde(default)]
    pub uri: Option<String>,
    /// Where the PIN comes from: `file:/path` (mode 0400 or 0600), `credential:NAME` (systemd), `prompt`.
    /// May come from the URI's `pin-source`. Never the PIN itself.
    #[serde(default)]
    pub pin_source: Option<String>,
}
