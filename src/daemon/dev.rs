//! `lacre dev`: a device in software, a SQLite file and two applications in one directory, no
//! configuration. A second run on the same directory goes on with the same keys, data and secrets.
//!
//! `dev.json` (mode 0600) is a public contract: its shape is in the README, and tools build on it.

mod device;

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use zeroize::Zeroizing;

use device::{DevDevice, Token};

use super::listen::Listeners;
use super::{RunError, Services, serve};
use crate::config::Config;
use crate::identity::{Caller, Scope, ScopeSet};
use crate::ids::ClientId;
use crate::issuer::{AppExtras, AppKind, NewApp};
use crate::seal::{Arena, SealError};

pub use device::Kind;
pub(crate) use device::ensure_auth_file;

const CALLBACK: &str = "http://127.0.0.1:8281/callback";

/// What `lacre dev` was asked for.
pub struct DevOptions {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where it listens; loopback only.
    pub listen: SocketAddr,
    /// Start although memory cannot be locked.
    pub allow_unlocked_memory: bool,
    /// What keys are kept in.
    pub device: Kind,
    /// What is logged.
    pub log_level: String,
}

/// Why the development environment could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// The token could not be made.
    #[error("softhsm-setup.sh failed: {reason}")]
    Setup {
        /// Its last words.
        reason: String,
    },
    /// The software TPM does not run.
    #[error("{reason}")]
    Swtpm {
        /// Why.
        reason: String,
    },
    /// A file or directory cannot be used.
    #[error("{path}")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A dev.json that this program did not write, or that was damaged.
    #[error("{path} is not understood: remove it to get new applications")]
    Unreadable {
        /// Which file.
        path: PathBuf,
    },
    /// No random numbers.
    #[error("no random numbers")]
    NoRandom(#[source] SealError),
}

/// Makes the token where it is missing and returns the path of its `softhsm2.conf`; `None` for a device that
/// does not need one. SoftHSM reads
/// `SOFTHSM2_CONF` when it is loaded, so the process must have been started with it: the command
/// line compares and starts itself again.
///
/// # Errors
/// [`DevError`], mostly because SoftHSM is not installed.
pub fn prepare(options: &DevOptions) -> Result<Option<PathBuf>, RunError> {
    let dir = &options.data_dir;
    let failed = |source| DevError::File { path: dir.clone(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let dir = dir.canonicalize().map_err(failed)?;
    match options.device {
        Kind::SoftHsm => Ok(Some(Token::find(&dir, &[])?.conf)),
        Kind::Tpm => Ok(None),
    }
}

/// Runs until it is told to stop.
///
/// # Errors
/// [`RunError`].
pub async fn run(options: DevOptions) -> Result<(), RunError> {
    let failed = |source| DevError::File { path: options.data_dir.clone(), source };
    let dir = options.data_dir.canonicalize().map_err(failed)?;
    // Lives until the daemon has ended.
    let device = DevDevice::find(options.device, &dir)?;
    let mut config = configuration(&dir, &options, &device)?;
    let listeners = Listeners::bind(&mut config)?;
    let services = Services::init(config).await?;
    let apps = Apps::ensure(&services, &dir.join("dev.json")).await?;
    let description = describe(&services.config, &device, &apps);
    serve(services, listeners, |url| {
        let written = write_private(&dir.join("dev.json"), &description);
        match written {
            // Whether somebody reads this line or not, the daemon works.
            Ok(()) => drop(writeln!(io::stdout().lock(), "lacre ready url={url} data={}", dir.display())),
            Err(error) => tracing::error!(%error, "dev.json cannot be written"),
        }
    })
    .await
}

fn configuration(dir: &Path, options: &DevOptions, device: &DevDevice) -> Result<Config, DevError> {
    let mut config = Config { data_dir: dir.to_owned(), ..Config::default() };
    config.server.listen = options.listen;
    config.memory.allow_unlocked |= options.allow_unlocked_memory;
    config.log.level.clone_from(&options.log_level);
    // Providers of a developer are programs on the same host.
    config.upstream.loopback_http = true;
    // One daemon, one clock: who tries a rotation sees its key sign within seconds.
    config.keys.propagation = Duration::from_secs(2);
    config.keys.skew = Duration::from_secs(3);
    let seal = serde_json::from_value(device.seal());
    let seal = seal.map_err(|error| DevError::Setup { reason: error.to_string() })?;
    config.seal = Some(seal);
    Ok(config)
}

/// The applications of a development environment. The secrets are kept in dev.json only.
struct Apps {
    management: App,
    application: App,
}

struct App {
    id: ClientId,
    secret: SecretString,
}

#[derive(Deserialize)]
struct Kept {
    management: KeptApp,
    application: KeptApp,
}

#[derive(Deserialize)]
struct KeptApp {
    client_id: ClientId,
    client_secret: SecretString,
}

impl From<KeptApp> for App {
    fn from(kept: KeptApp) -> Self {
        Self { id: kept.client_id, secret: kept.client_secret }
    }
}

impl App {
    async fn generate(arena: &Arena) -> Result<Self, DevError> {
        let bytes = arena.random(32).await.map_err(DevError::NoRandom)?;
        let secret = bytes.with(|bytes| URL_SAFE_NO_PAD.encode(bytes));
        Ok(Self { id: ClientId::generate(), secret: secret.into() })
    }
}

impl Apps {
    /// Reads the applications of an earlier run, or thinks of new ones.
    async fn load(path: &Path, arena: &Arena) -> Result<Self, DevError> {
        match fs::read(path) {
            Ok(bytes) => {
                let bytes = Zeroizing::new(bytes);
                let kept: Kept = serde_json::from_slice(&bytes)
                    .map_err(|_| DevError::Unreadable { path: path.to_owned() })?;
                Ok(Self { management: kept.management.into(), application: kept.application.into() })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (management, application) = (App::generate(arena).await?, App::generate(arena).await?);
                Ok(Self { management, application })
            }
            Err(source) => Err(DevError::File { path: path.to_owned(), source }),
        }
    }

    async fn ensure(services: &Services, path: &Path) -> Result<Self, RunError> {
        let apps = Self::load(path, &services.arena).await?;
        let caller = Caller::system("dev", services.config.tenant.clone());
        let wanted = [(&apps.management, management()), (&apps.application, application())];
        for (app, settings) in wanted {
            services.issuer.ensure_app(&caller, &app.id, &app.secret, settings).await?;
        }
        Ok(apps)
    }
}

fn management() -> NewApp {
    NewApp::machine("dev management", ScopeSet::all())
}

fn application() -> NewApp {
    let scopes = [
        Scope::SecretsMetadata,
        Scope::SecretsRead,
        Scope::SecretsWrite,
        Scope::CryptoUse,
        Scope::TokenSetsExchange,
    ];
    NewApp {
        name: "dev application".to_owned(),
        kind: AppKind::Traditional,
        scopes: scopes.into_iter().collect(),
        redirect_uris: vec![CALLBACK.to_owned()],
        allow_token_exchange: true,
        signing: None,
        extras: AppExtras::default(),
    }
}

fn describe(config: &Config, device: &DevDevice, apps: &Apps) -> Zeroizing<Vec<u8>> {
    let url = config.public_url();
    let (device_name, device) = device.description();
    let text = json!({
        "url": url,
        "tenant": config.tenant,
        "pid": std::process::id(),
        "management": {
            "client_id": apps.management.id,
            "client_secret": apps.management.secret.expose_secret(),
            "token_endpoint": format!("{url}/oidc/token"),
            "resource": format!("https://{}.lacre.local/api", config.tenant),
            "scope": "all",
        },
        "application": {
            "client_id": apps.application.id,
            "client_secret": apps.application.secret.expose_secret(),
            "redirect_uris": [CALLBACK],
            "allow_token_exchange": true,
        },
        device_name: device,
        "database": format!("sqlite:{}", config.data_dir.join("lacre.db").display()),
    });
    Zeroizing::new(format!("{text:#}\n").into_bytes())
}

/// Readers see the old file or the new one, never half of it, and nobody else reads it.
fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let staging = path.with_extension("json.new");
    if let Err(error) = fs::remove_file(&staging)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staging)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&staging, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn arena() -> Arena {
        Arena::new(&crate::seal::guarded::Options { allow_unlocked: true, ..Default::default() }).unwrap()
    }

    #[tokio::test]
    async fn a_second_run_finds_the_applications_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dev.json");
        let first = Apps::load(&path, &arena()).await.unwrap();
        let config = Config { data_dir: dir.path().to_owned(), ..Config::default() };
        let (conf, pin_file) = (dir.path().join("c"), dir.path().join("pin"));
        let token = DevDevice::Token(Token { conf, module: "m".to_owned(), pin_file });
        write_private(&path, &describe(&config, &token, &first)).unwrap();

        let second = Apps::load(&path, &arena()).await.unwrap();
        assert_eq!(second.management.id, first.management.id);
        assert_eq!(second.application.secret.expose_secret(), first.application.secret.expose_secret());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_damaged_dev_json_is_not_overwritten_in_silence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dev.json");
        fs::write(&path, "{}").unwrap();
        assert!(matches!(Apps::load(&path, &arena()).await, Err(DevError::Unreadable { .. })));
    }
}
