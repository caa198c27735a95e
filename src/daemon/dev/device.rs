//! The device of a development environment: a SoftHSM token, or a software TPM that runs beside the daemon.

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::DevError;

const SETUP: &str = include_str!("../../../softhsm-setup.sh");
const LABEL: &str = "lacre-dev";
/// How long swtpm may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// What keys are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A token of `SoftHSM`, made by `softhsm-setup.sh`.
    SoftHsm,
    /// A TPM 2.0 in software (swtpm), started with the daemon and ended with it.
    Tpm,
}

/// A device that is there.
pub(super) enum DevDevice {
    Token(Token),
    Tpm(Swtpm),
}

impl DevDevice {
    /// Finds the token that `prepare` made, or starts the TPM.
    pub(super) fn find(kind: Kind, dir: &Path) -> Result<Self, DevError> {
        match kind {
            Kind::SoftHsm => Ok(Self::Token(Token::find(dir, &["--print-env"])?)),
            Kind::Tpm => Ok(Self::Tpm(Swtpm::start(&dir.join("tpm"))?)),
        }
    }

    /// The section `[seal]`.
    pub(super) fn seal(&self) -> Value {
        match self {
            Self::Token(token) => json!({ "pkcs11": {
                "module": token.module,
                "token": LABEL,
                "pin_source": format!("file:{}", token.pin_file.display()),
            }}),
            Self::Tpm(tpm) => json!({ "tpm": {
                "tcti": tpm.tcti(),
                "auth_source": format!("file:{}", tpm.auth_file.display()),
            }}),
        }
    }

    /// What dev.json says of it: its name there and its members.
    pub(super) fn description(&self) -> (&'static str, Value) {
        match self {
            Self::Token(token) => {
                let Token { module, pin_file, .. } = token;
                ("hsm", json!({ "module": module, "token_label": LABEL, "pin_file": pin_file }))
            }
            Self::Tpm(tpm) => ("tpm", json!({ "tcti": tpm.tcti(), "auth_file": tpm.auth_file })),
        }
    }
}

/// Where the token is.
pub(super) struct Token {
    pub(super) conf: PathBuf,
    pub(super) module: String,
    pub(super) pin_file: PathBuf,
}

impl Token {
    pub(super) fn find(dir: &Path, arguments: &[&str]) -> Result<Self, DevError> {
        let mut command = Command::new("bash");
        command.args(["-c", SETUP, "softhsm-setup.sh", "--label", LABEL, "--dir"]).arg(dir).args(arguments);
        let output = command.output().map_err(|error| DevError::Setup { reason: error.to_string() })?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(DevError::Setup { reason });
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let module = exported(&text, "LACRE_PKCS11_MODULE")
            .ok_or_else(|| DevError::Setup { reason: "it names no module".to_owned() })?;
        Ok(Self { conf: dir.join("softhsm2.conf"), module, pin_file: dir.join("pin") })
    }
}

/// The value of an `export NAME=value` line, without the shell's quoting.
fn exported(text: &str, name: &str) -> Option<String> {
    let line =
        text.lines().find_map(|line| line.strip_prefix("export ")?.strip_prefix(name)?.strip_prefix('='))?;
    let line = line.strip_prefix('\'').and_then(|line| line.strip_suffix('\'')).unwrap_or(line);
    Some(line.replace('\\', ""))
}

/// A running swtpm. Ends with this value, and with this process whatever ends it.
pub(super) struct Swtpm {
    port: u16,
    auth_file: PathBuf,
    process: Child,
}

impl Swtpm {
    /// Starts it on the state in `dir`, with the port of the run before where that is free.
    fn start(dir: &Path) -> Result<Self, DevError> {
        let failed = |source| DevError::File { path: dir.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let auth_file = dir.join("auth");
        ensure_auth_file(&auth_file).map_err(failed)?;
        let kept = fs::read_to_string(dir.join("port")).ok().and_then(|text| text.trim().parse().ok());
        let port = kept.filter(|port| is_free(*port)).map_or_else(free_port, Ok).map_err(failed)?;
        fs::write(dir.join("port"), port.to_string()).map_err(failed)?;
        let process = spawn(dir, port).map_err(|error| {
            let hint = "swtpm cannot be started; install it (apt-get install swtpm)";
            DevError::Swtpm { reason: format!("{hint}: {error}") }
        })?;
        let mut tpm = Self { port, auth_file, process };
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port + 1)).is_err() {
            let ended = tpm.process.try_wait().ok().flatten();
            if ended.is_some() || Instant::now() > until {
                return Err(DevError::Swtpm { reason: format!("swtpm does not listen on port {port}") });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(tpm)
    }

    fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        // SIGTERM lets it write its state; it has nothing else to do.
        let pid = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

/// `setpriv` has it die with its parent: a daemon that is killed must not leave a TPM behind that has the
/// state's files open.
fn spawn(dir: &Path, port: u16) -> io::Result<Child> {
    Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "swtpm", "socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
        .arg("--tpmstate")
        .arg(format!("dir={}", dir.display()))
        .args(["--server", &format!("type=tcp,port={port},bindaddr=127.0.0.1")])
        .args(["--ctrl", &format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
}

/// A server's port, and the control channel's after it.
fn is_free(port: u16) -> bool {
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    free(port) && port.checked_add(1).is_some_and(free)
}

fn free_port() -> io::Result<u16> {
    for _ in 0..100 {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        if is_free(port) {
            return Ok(port);
        }
    }
    Err(io::Error::other("no two free ports in a row"))
}

/// Makes the secret for keys in a TPM where it is missing: 256 random bits in hex, for their owner only.
pub(crate) fn ensure_auth_file(path: &Path) -> io::Result<bool> {
    if path.exists() {
        return Ok(false);
    }
    let mut secret = zeroize::Zeroizing::new([0; 32]);
    getrandom::fill(&mut *secret).map_err(|error| io::Error::other(error.to_string()))?;
    let staging = path.with_extension("new");
    let _ = fs::remove_file(&staging);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staging)?;
    file.write_all(zeroize::Zeroizing::new(hex::encode(*secret)).as_bytes())?;
    file.sync_all()?;
    fs::rename(&staging, path)?;
    // Keys are about to be made that are worth nothing without it.
    if let Some(dir) = path.parent() {
        fs::File::open(dir)?.sync_all()?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_shells_quoting_is_undone() {
        let text = "export A=/x\nexport LACRE_PKCS11_MODULE=/opt/my\\ dir/m.so\nexport B='c'\n";
        assert_eq!(exported(text, "LACRE_PKCS11_MODULE").as_deref(), Some("/opt/my dir/m.so"));
        assert_eq!(exported(text, "B").as_deref(), Some("c"));
        assert_eq!(exported(text, "LACRE_PKCS11"), None);
    }

    #[test]
    fn the_secret_of_a_tpm_is_made_once_and_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth");
        assert!(ensure_auth_file(&path).unwrap());
        let made = fs::read(&path).unwrap();
        assert!(!ensure_auth_file(&path).unwrap());
        assert_eq!((made.len(), fs::read(&path).unwrap()), (64, made));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
