//! Where the secret that a device wants comes from: a file, a systemd credential, a prompt.

use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::seal::StartError;
use crate::seal::guarded::{Arena, SecretBuf};

/// Where the PIN is read from, each time it is needed: a changed PIN needs no restart.
pub(crate) enum PinSource {
    /// A file; one trailing line end is not part of the PIN.
    File(PathBuf),
    /// Typed at start; kept in guarded memory.
    Typed(Arc<SecretBuf>),
}

/// The source that is a person.
pub(crate) const PROMPT: &str = "prompt";

/// A PIN that was typed, in guarded memory.
#[derive(Clone)]
pub struct TypedPin(pub(crate) Arc<SecretBuf>);

impl fmt::Debug for TypedPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TypedPin")
    }
}

impl TypedPin {
    /// Asks for it at the terminal.
    pub(crate) fn ask(arena: &Arena) -> Result<Self, StartError> {
        let typed = rpassword::prompt_password("User PIN of the token: ");
        let typed = zeroize::Zeroizing::new(typed.map_err(|error| pin_error(PROMPT, error))?);
        let mut pin = arena.try_take(typed.len()).map_err(|error| pin_error(PROMPT, error))?;
        pin.with_mut(|pin| pin.copy_from_slice(typed.as_bytes()));
        Ok(Self(Arc::new(pin)))
    }
}

impl PinSource {
    /// Reads `file:/path`, `credential:NAME` or `prompt`, and checks that nobody else can read the file.
    ///
    /// # Errors
    /// [`StartError`] says what is wrong with the source; what it holds is not looked at yet.
    pub(crate) fn parse(source: &str, credentials: Option<&Path>, arena: &Arena) -> Result<Self, StartError> {
        if source == PROMPT {
            return Ok(Self::Typed(TypedPin::ask(arena)?.0));
        }
        let path = if let Some(name) = source.strip_prefix("credential:") {
            let dir = credentials.ok_or_else(|| {
                let hint = "run it with `systemd-run -p LoadCredentialEncrypted=...` (README, On a real HSM)";
                pin_error(source, format!("systemd passed no credentials to this process; {hint}"))
            })?;
            if name.is_empty() || name.contains('/') {
                return Err(pin_error(source, "not a credential name"));
            }
            dir.join(name)
        } else if let Some(path) = source.strip_prefix("file://").or_else(|| source.strip_prefix("file:")) {
            PathBuf::from(path)
        } else {
            return Err(StartError::Selection(
                "`pin_source` must be file:/path, credential:NAME or prompt".to_owned(),
            ));
        };
        let mode = fs::metadata(&path).map_err(|error| pin_error(source, error))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(pin_error(
                source,
                format!("mode {:o} lets others read it; use 0400 or 0600", mode & 0o777),
            ));
        }
        Ok(PinSource::File(path))
    }

    /// The PIN as its source gives it now.
    ///
    /// # Errors
    /// [`StartError::Pin`].
    pub(crate) fn read(&self, arena: &Arena) -> Result<SecretBuf, StartError> {
        let (origin, reason) = match self {
            Self::Typed(pin) => {
                let mut copy = arena.try_take(pin.len()).map_err(|error| pin_error(PROMPT, error))?;
                pin.with(|pin| copy.with_mut(|copy| copy.copy_from_slice(pin)));
                return Ok(copy);
            }
            Self::File(path) => match read_file(path, arena) {
                Ok(pin) => return Ok(pin),
                Err(reason) => (path.display().to_string(), reason),
            },
        };
        Err(StartError::Pin { origin, reason })
    }
}

fn pin_error(origin: &str, error: impl fmt::Display) -> StartError {
    StartError::Pin { origin: origin.to_owned(), reason: error.to_string() }
}

/// Reads straight into a guarded slot, so that the PIN never lies in ordinary memory.
fn read_file(path: &Path, arena: &Arena) -> Result<SecretBuf, String> {
    use std::io::Read;
    let mut file = fs::File::open(path).map_err(|error| error.to_string())?;
    let mut pin = arena.try_take(512).map_err(|error| error.to_string())?;
    let read = pin.with_mut(|room| {
        let mut filled = 0;
        loop {
            match file.read(&mut room[filled..]) {
                Ok(0) => return Ok(filled),
                Ok(count) => filled += count,
                Err(error) => return Err(error.to_string()),
            }
        }
    })?;
    let end = pin.with(|bytes| match &bytes[..read] {
        [.., b'\r', b'\n'] => read - 2,
        [.., b'\n'] => read - 1,
        _ => read,
    });
    if end == 0 || read == 512 {
        return Err("empty, or longer than a PIN can be".to_owned());
    }
    pin.truncate(end);
    Ok(pin)
}
