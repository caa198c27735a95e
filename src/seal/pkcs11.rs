//! The PKCS#11 device: any module that a vendor ships, driven by its token's label, serial or URI.
//!
//! `select` decides which module, token and PIN source are meant; `library` loads and initialises a module
//! for all tokens in it; `token` finds one, logs in and recovers;
//! `session` is the [`Backend`]; `parts` says what a key consists of,
//! `objects` makes and finds it, `import` takes it from outside, `custody` checks it; `wrap` wraps DEKs, `probe` chooses how; `raw` is
//! the C interface; `error` says what return values mean; `report` measures what the token can do. Read `hsm.md` of the project before changing any.

mod custody;
mod error;
mod import;
mod library;
mod objects;
mod parts;
mod probe;
mod raw;
mod report;
mod select;
mod selftest;
mod session;
mod token;
mod wrap;

use std::path::PathBuf;
use std::sync::Arc;

use crate::seal::StartError;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::driver::{Driver, Known, Problem};
use crate::seal::guarded::Arena;
use crate::seal::key::KeyRef;
use crate::seal::latch::Latch;

pub use crate::seal::pin::TypedPin;
pub(crate) use library::Modules;

use select::Selection;
use session::Session;
use token::Token;

/// `[seal.pkcs11]`; `hsm-config/` has annotated examples. One of `token`, `serial` and `uri` chooses
/// the token.
#[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
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
    /// Where the PIN comes from: `file:/path` (readable by its owner only), `credential:NAME`
    /// (systemd), `prompt`. May come from the URI's `pin-source`. Never the PIN itself.
    #[serde(default)]
    pub pin_source: Option<String>,
    /// How new KEKs wrap: `auto` (by probe, the default) or the name of a mechanism
    /// (`docs/formats/sealed-v1.md`).
    #[serde(default)]
    pub wrap: Option<String>,
    /// The text that a module wants when it is initialised; NSS: `configdir='sql:/path' ...`.
    #[serde(default)]
    pub init_parameters: Option<String>,
    /// Evidence of a key's custody that this token cannot give and that is done without: `CKA_LOCAL`,
    /// `CKA_ALWAYS_SENSITIVE`, `CKA_NEVER_EXTRACTABLE`, and `CKA_COPYABLE` if it does not know that one. Shown
    /// in `lacre status` and in every report.
    #[serde(default)]
    pub without_evidence: Vec<String>,
    /// Who makes the IV of GCM: `host` (default) or `device`, for devices that refuse a given one.
    #[serde(default)]
    pub gcm_iv: GcmIv,
    /// systemd's `$CREDENTIALS_DIRECTORY`; filled by the configuration's reader, not by the file.
    #[serde(skip)]
    pub credentials_dir: Option<PathBuf>,
    /// The answer where `pin_source` is `prompt` and somebody was asked already.
    #[serde(skip)]
    pub typed_pin: Option<TypedPin>,
}

/// Who makes the IV of AES-GCM. The IV is read back after the call in both cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GcmIv {
    /// Random from the operating system; a device that writes its own over it is believed.
    #[default]
    Host,
    /// The buffer is handed over as zeros and must come back changed.
    Device,
}

/// Loads the library that the configuration means, unless `modules` has it. Initialises nothing and sends no
/// PIN.
pub(crate) fn load(
    config: &Config,
    latch: Latch,
    arena: &Arena,
    modules: &Modules,
) -> Result<Box<dyn Driver>, StartError> {
    Ok(Box::new(Module(Token::load(Selection::new(config, arena)?, latch, arena, modules)?)))
}

/// Asks for the PIN where the configuration says so; `None` where the PIN comes from elsewhere.
///
/// # Errors
/// [`StartError`] if the configuration is not understood or nobody can be asked.
pub(crate) fn ask_pin(config: &Config, arena: &Arena) -> Result<Option<TypedPin>, StartError> {
    select::ask_pin(config, arena)
}

/// A token in a loaded library, as a driver.
struct Module(Arc<Token>);

impl Driver for Module {
    fn open(&self, read_write: bool) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(Session::open(&self.0, read_write)?))
    }

    fn bring_up(&self) -> Result<(), Problem> {
        self.0.bring_up()
    }

    fn reinitialise(&self) -> Result<(), Problem> {
        self.0.reinitialise()
    }

    fn take_down(&self) -> Result<(), Problem> {
        self.0.take_down()
    }

    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    fn bump_epoch(&self) {
        self.0.bump_epoch();
    }

    fn known(&self) -> Known {
        self.0.known()
    }

    fn address(&self) -> String {
        self.0.module()
    }

    fn unlatch(&self, force: bool) -> Result<bool, String> {
        self.0.unlatch(force)
    }

    fn capabilities(&self) -> Result<serde_json::Value, BackendError> {
        report::capabilities(&mut Session::open(&self.0, true)?)
    }

    fn list(&self) -> Result<Vec<KeyRef>, BackendError> {
        Session::open(&self.0, false)?.list()
    }
}
