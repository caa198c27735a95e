//! Configuration: one TOML file, the environment over it. Flags are put over both by `cli`.
//!
//! Variables are named `LACRE__SECTION__KEY`. An unknown key is an error wherever it comes from, so
//! a misspelt setting never means a silent default. Nothing secret is written here: PINs, client
//! secrets and TLS keys are named by file or credential. Each module owns its own section's type.

mod keys;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;

use crate::db;
use crate::http;
use crate::ids::TenantId;
use crate::seal::DeviceName;
use crate::{seal, tokens, upstream, vault};

pub use keys::KeysConfig;

/// Everything a daemon is told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the database and the PIN latch are kept unless they are configured elsewhere.
    pub data_dir: PathBuf,
    /// The tenant this daemon serves.
    pub tenant: TenantId,
    /// Listeners and limits.
    pub server: ServerConfig,
    /// The database.
    pub database: DatabaseConfig,
    /// The device named `default`. A daemon without any is refused at start; the command line works without.
    pub seal: Option<seal::DeviceConfig>,
    /// Whether the device is driven in a process of its own.
    pub sealer: seal::SealerConfig,
    /// Further devices by name.
    pub devices: BTreeMap<DeviceName, seal::DeviceConfig>,
    /// On which devices new keys are made.
    pub placement: Placement,
    /// The second wrap of every record, under a KEK on another device.
    pub backup: Option<BackupConfig>,
    /// Where the roll-back anchor is; `None`: roll-backs of the database are not detected.
    pub anchor: Option<AnchorConfig>,
    /// Guarded memory.
    pub memory: seal::guarded::Options,
    /// Limits of the vault.
    pub vault: vault::Config,
    /// The token issuer.
    pub issuer: IssuerConfig,
    /// Federated token sets.
    pub tokens: tokens::Config,
    /// What may be called outside.
    pub upstream: upstream::Config,
    /// Signing keys.
    pub keys: KeysConfig,
    /// The audit log.
    pub audit: AuditConfig,
    /// Log output.
    pub log: LogConfig,
}

/// `[placement]`: on which device new keys are made. Keys that are there stay where they are.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Key-encryption keys.
    pub keks: DeviceName,
    /// Signing and MAC keys.
    pub signing_keys: DeviceName,
}

/// `[backup]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// The device that holds the backup KEK, and no other key.
    pub device: DeviceName,
}

/// `[anchor]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorConfig {
    /// The device with the counter: a TPM.
    #[serde(default)]
    pub device: DeviceName,
    /// How often the counter goes on at the most, and what a roll-back has to exceed to be noticed.
    #[serde(default = "a_minute", with = "seconds")]
    pub period: Duration,
}

const fn a_minute() -> Duration {
    Duration::from_secs(60)
}

/// `[server]`: who can reach the daemon, and how.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// TCP address. Without `tls` only a loopback address is accepted.
    pub listen: SocketAddr,
    /// Path of a Unix socket; its peers are known by their user id (`local_users`).
    pub unix_socket: Option<PathBuf>,
    /// Mode of the socket, octal text.
    #[serde(deserialize_with = "octal")]
    pub unix_socket_mode: u32,
    /// What local users may do on the Unix socket without a token.
    pub local_users: Vec<http::LocalUser>,
    /// TLS on the TCP address.
    pub tls: Option<TlsConfig>,
    /// Requests per second and principal.
    pub rate_limit: http::RateLimit,
    /// Connections open at one time, over all threads.
    pub max_connections: usize,
    /// Threads that serve HTTP; the number of cores by default.
    pub workers: Option<usize>,
    /// How long running requests may take to finish after SIGTERM.
    #[serde(with = "seconds")]
    pub drain: Duration,
    /// Whether `/metrics` is open to everybody who reaches a listener, or needs a credential.
    pub metrics: http::MetricsAccess,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8280),
            unix_socket: None,
            unix_socket_mode: 0o660,
            local_users: Vec::new(),
            tls: None,
            rate_limit: http::RateLimit::default(),
            max_connections: 10_000,
            workers: None,
            drain: Duration::from_secs(20),
            metrics: http::MetricsAccess::default(),
        }
    }
}

/// `[server.tls]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificate chain, PEM. Read again on SIGHUP.
    pub cert: PathBuf,
    /// Private key, PEM. Read again on SIGHUP.
    pub key: PathBuf,
    /// Authorities whose client certificates are accepted, PEM. Certificates stay optional.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// What a client with a certificate may do without a token.
    #[serde(default)]
    pub client_rules: Vec<http::CertificateRule>,
}

/// `[database]`.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatabaseConfig {
    /// `sqlite:/path` or `postgres://...`; `lacre.db` in the data directory by default. A PostgreSQL
    /// password belongs in a `passfile`, not here.
    pub url: Option<String>,
    /// Threads with a reading connection.
    pub connections: usize,
}

impl Default for DatabaseConfig {
    fn default() -> Self {
        Self { url: None, connections: 4 }
    }
}

// By hand: a URL may carry a password against all advice, and configurations get printed.
impl fmt::Debug for DatabaseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url.as_deref().map(|url| url.rsplit_once('@').map_or(url, |(_, place)| place));
        f.debug_struct("DatabaseConfig").field("url", &url).field("connections", &self.connections).finish()
    }
}

/// `[issuer]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IssuerConfig {
    /// Public base URL; made of the listener's address if absent. `iss` is this plus `/oidc`.
    pub url: Option<String>,
    /// Lifetime of access tokens.
    #[serde(with = "seconds")]
    pub token_lifetime: Duration,
}

impl Default for IssuerConfig {
    fn default() -> Self {
        Self { url: None, token_lifetime: Duration::from_secs(3600) }
    }
}

/// `[audit]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// How long an intent may take to become durable before the work is refused.
    #[serde(with = "seconds")]
    pub deadline: Duration,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(2) }
    }
}

/// `[log]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// A level, or directives such as `info,lacre::seal=debug`. Read again on SIGHUP.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
    /// Where a running daemon is told of another level; filled by whoever reads it again, not by the file.
    #[serde(skip)]
    pub changes: Option<watch::Receiver<String>>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text, changes: None }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/lacre"),
            #[expect(clippy::expect_used, reason = "a constant")]
            tenant: TenantId::parse("default").expect("a constant that keeps the rule"),
            server: ServerConfig::default(),
            database: DatabaseConfig::default(),
            seal: None,
            sealer: seal::SealerConfig::default(),
            devices: BTreeMap::new(),
            placement: Placement::default(),
            backup: None,
            anchor: None,
            memory: seal::guarded::Options::default(),
            vault: vault::Config::default(),
            issuer: IssuerConfig::default(),
            tokens: tokens::Config::default(),
            upstream: upstream::Config::default(),
            keys: KeysConfig::default(),
            audit: AuditConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// Why the configuration was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or a value in file or environment is not understood.
    #[error("configuration: {0}")]
    Unreadable(#[from] config::ConfigError),
    /// Plain HTTP beyond the host.
    #[error(
        "server.listen is {listen}, which other hosts can reach, and server.tls is not set: \
         plain HTTP is served on loopback addresses only"
    )]
    PlainHttp {
        /// The address.
        listen: SocketAddr,
    },
    /// Devices that are named and not there, or named twice.
    #[error("{key} is `{device}`: {reason}")]
    Device {
        /// The key.
        key: &'static str,
        /// What it names.
        device: DeviceName,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// Rules for client certificates without an authority that could vouch for one.
    #[error("server.tls.client_rules need server.tls.client_ca")]
    RulesWithoutAuthority,
    /// Logto's variable for the grace of a rotation is not a number of seconds.
    #[error("PRIVATE_KEY_ROTATION_GRACE_PERIOD is `{0}`; it must be a whole number of seconds")]
    Grace(String),
    /// A limit outside of what the program can keep.
    #[error("{key} is {value}; it must be {allowed}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// What it was set to.
        value: u64,
        /// What is possible.
        allowed: &'static str,
    },
}

impl Config {
    /// Reads `file`, then the environment's `LACRE__SECTION__KEY` over it.
    ///
    /// # Errors
    /// [`ConfigError`] names the key and what is wrong with it.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        Self::from_sources(file, None)
    }

    fn from_sources(
        file: Option<&Path>,
        environment: Option<HashMap<String, String>>,
    ) -> Result<Self, ConfigError> {
        let mut builder = config::Config::builder();
        if let Some(path) = file {
            builder = builder.add_source(config::File::from(path).format(config::FileFormat::Toml));
        }
        if let Some(seconds) = keys::logto_grace(environment.as_ref())? {
            let one = config::Config::builder().set_override("keys.rotation_grace", seconds)?;
            builder = builder.add_source(one.build()?);
        }
        let variables = config::Environment::with_prefix("LACRE")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .source(environment);
        let mut config: Self = builder.add_source(variables).build()?.try_deserialize()?;
        #[expect(clippy::disallowed_methods, reason = "this is where the environment is read")]
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        for device in config.seal.iter_mut().chain(config.devices.values_mut()) {
            if let Some(pkcs11) = &mut device.pkcs11 {
                pkcs11.credentials_dir.clone_from(&credentials);
            }
            if let Some(tpm) = &mut device.tpm {
                tpm.credentials_dir.clone_from(&credentials);
            }
        }
        config.check()?;
        Ok(config)
    }

    /// Rules that span several keys.
    ///
    /// # Errors
    /// [`ConfigError`] names the rule. `cli` calls it again after it has put flags over the file.
    pub fn check(&self) -> Result<(), ConfigError> {
        let listen = self.server.listen;
        if self.server.tls.is_none() && !listen.ip().is_loopback() {
            return Err(ConfigError::PlainHttp { listen });
        }
        if let Some(tls) = &self.server.tls
            && tls.client_ca.is_none()
            && !tls.client_rules.is_empty()
        {
            return Err(ConfigError::RulesWithoutAuthority);
        }
        self.check_devices()?;
        let bounds = [
            ("vault.max_value_bytes", self.vault.max_value_bytes as u64, 1, 1 << 20, "1 to 1048576"),
            ("vault.wrap_budget", self.vault.wrap_budget, 1, 1 << 31, "1 to 2147483648"),
            ("database.connections", self.database.connections as u64, 1, 512, "1 to 512"),
            (
                "anchor.period",
                self.anchor.as_ref().map_or(60, |anchor| anchor.period.as_secs()),
                1,
                86_400,
                "1 second to 1 day",
            ),
            ("keys.rotation_grace", self.keys.rotation_grace.as_secs(), 0, 31_536_000, "0 to 1 year"),
            ("keys.propagation", self.keys.propagation.as_secs(), 2, 3600, "2 seconds to 1 hour"),
            ("keys.skew", self.keys.skew.as_secs(), 0, 3600, "0 to 1 hour"),
            ("tokens.leeway", self.tokens.leeway.as_secs(), 0, 3600, "0 to 1 hour"),
            ("tokens.refresh_lease", self.tokens.refresh_lease.as_secs(), 2, 600, "2 seconds to 10 minutes"),
            ("tokens.read_deadline", self.tokens.read_deadline.as_secs(), 1, 120, "1 second to 2 minutes"),
            ("tokens.background_at_once", self.tokens.background_at_once as u64, 1, 256, "1 to 256"),
            ("server.max_connections", self.server.max_connections as u64, 1, 1 << 20, "1 to 1048576"),
        ];
        match bounds.into_iter().find(|(_, value, min, max, _)| !(min..=max).contains(&value)) {
            Some((key, value, _, _, allowed)) => Err(ConfigError::OutOfRange { key, value, allowed }),
            None => Ok(()),
        }
    }

    fn check_devices(&self) -> Result<(), ConfigError> {
        let fail = |key, device: &DeviceName, reason| {
            Err(ConfigError::Device { key, device: device.clone(), reason })
        };
        if let Some(name) = self.devices.keys().find(|name| name.is_default()) {
            return fail("devices", name, "the device of that name is the section [seal]");
        }
        if self.seal.is_none() && self.devices.is_empty() {
            // The command line works without any.
            return Ok(());
        }
        let is_there =
            |name: &DeviceName| self.devices.contains_key(name) || (name.is_default() && self.seal.is_some());
        let backup = self.backup.as_ref().map(|backup| ("backup.device", &backup.device));
        let placement = &self.placement;
        let placed =
            [("placement.keks", &placement.keks), ("placement.signing_keys", &placement.signing_keys)];
        let anchor = self.anchor.as_ref().map(|anchor| ("anchor.device", &anchor.device));
        for (key, device) in placed.into_iter().chain(backup).chain(anchor) {
            if !is_there(device) {
                return fail(key, device, "no device of that name is configured");
            }
        }
        if let Some((key, device)) = anchor
            && self.all_devices().get(device).is_some_and(|device| device.tpm.is_none())
        {
            return fail(key, device, "only a TPM has a counter that an anchor can be made of");
        }
        match backup {
            // One loss would take both wraps.
            Some((key, device)) if placed.iter().any(|(_, placed)| *placed == device) => {
                fail(key, device, "new keys are made on that device; a backup has to be on another one")
            }
            _ => Ok(()),
        }
    }

    /// Every configured device by name, with the place of its PIN latch.
    pub fn all_devices(&self) -> BTreeMap<DeviceName, seal::DeviceConfig> {
        let default = self.seal.clone().map(|seal| (DeviceName::default(), seal));
        let mut all: BTreeMap<_, _> = default.into_iter().chain(self.devices.clone()).collect();
        for device in all.values_mut() {
            device.latch_dir.get_or_insert_with(|| self.data_dir.join("latch"));
        }
        all
    }

    /// The database: the configured one, or `lacre.db` in the data directory.
    ///
    /// # Errors
    /// If the configured URL is not one.
    pub fn database_url(&self) -> Result<db::Url, db::OpenError> {
        match &self.database.url {
            Some(text) => db::Url::parse(text),
            None => Ok(db::Url::sqlite(self.data_dir.join("lacre.db"))),
        }
    }

    /// The public base URL, without a slash at its end.
    pub fn public_url(&self) -> String {
        let scheme = if self.server.tls.is_some() { "https" } else { "http" };
        let made = || format!("{scheme}://{}", self.server.listen);
        self.issuer.url.as_ref().map_or_else(made, |url| url.trim_end_matches('/').to_owned())
    }
}

fn octal<'de, D: serde::Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    // Not a number: TOML and the environment would read 0660 as decimal.
    let text = String::deserialize(input)?;
    match u32::from_str_radix(text.trim_start_matches("0o"), 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(serde::de::Error::custom("not an octal file mode such as \"0660\"")),
    }
}

/// Serde helper: a `Duration` written as seconds (number) or as text such as `"30s"`, `"4h"`.
pub mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Seconds(u64),
        Text(String),
    }

    /// # Errors
    /// If it is neither a whole number nor a duration text.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        match Form::deserialize(input)? {
            Form::Seconds(seconds) => Ok(Duration::from_secs(seconds)),
            Form::Text(text) => humantime::parse_duration(&text).map_err(D::Error::custom),
        }
    }

    /// Writes the text that [`deserialize`] reads.
    ///
    /// # Errors
    /// As the serializer.
    pub fn serialize<S: Serializer>(time: &Duration, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(&humantime::format_duration(*time))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn load(file: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let mut on_disk = tempfile::NamedTempFile::new().unwrap();
        on_disk.write_all(file.as_bytes()).unwrap();
        let environment: HashMap<_, _> =
            environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Config::from_sources(Some(on_disk.path()), Some(environment))
    }

    #[test]
    fn nothing_said_means_loopback_and_the_default_tenant() {
        let config = load("", &[]).unwrap();

        assert_eq!(config.server.listen.to_string(), "127.0.0.1:8280");
        assert_eq!(config.tenant.as_str(), "default");
        assert_eq!(config.public_url(), "http://127.0.0.1:8280");
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let file = "[server]\nlisten = '127.0.0.1:1'\ndrain = '1m'\n[log]\nlevel = 'warn'";
        let config = load(file, &[("LACRE__SERVER__LISTEN", "127.0.0.1:2"), ("LACRE__AUDIT__DEADLINE", "3")]);

        let config = config.unwrap();
        assert_eq!(config.server.listen.port(), 2);
        assert_eq!(config.server.drain, Duration::from_secs(60));
        assert_eq!(config.audit.deadline, Duration::from_secs(3));
        assert_eq!(config.log.level, "warn");
    }

    #[test]
    fn unknown_keys_are_refused_in_the_file_and_in_the_environment() {
        assert!(load("[server]\nlisen = '127.0.0.1:1'", &[]).is_err());
        assert!(load("", &[("LACRE__SERVER__LISEN", "127.0.0.1:1")]).is_err());
        assert!(load("", &[("LACRE_ADDR", "http://127.0.0.1:1")]).is_ok());
    }

    #[test]
    fn plain_http_stays_on_the_host() {
        let error = load("[server]\nlisten = '0.0.0.0:8280'", &[]).unwrap_err();
        assert!(error.to_string().contains("server.tls"), "{error}");

        let tls = "[server]\nlisten = '0.0.0.0:8280'\ntls = { cert = 'a', key = 'b' }";
        assert!(load(tls, &[]).is_ok());
    }

    #[test]
    fn devices_are_named_once_and_before_they_are_used() {
        let seal = "[seal]\n[seal.pkcs11]\ntoken = 'a'\n";
        let two = format!("{seal}[devices.b.pkcs11]\ntoken = 'b'\n");
        let config = load(&format!("{two}[placement]\nsigning_keys = 'b'\n"), &[]).unwrap();
        let names: Vec<_> = config.all_devices().into_keys().map(String::from).collect();
        assert_eq!(names, ["b", "default"]);
        assert!(config.placement.keks.is_default() && !config.placement.signing_keys.is_default());
        assert!(load(&format!("{two}[backup]\ndevice = 'b'\n"), &[]).is_ok());

        for (text, said) in [
            (format!("{seal}[devices.default.pkcs11]\ntoken = 'b'\n"), "[seal]"),
            (format!("{two}[placement]\nkeks = 'c'\n"), "placement.keks"),
            (format!("{two}[placement]\nkeks = 'b'\n[backup]\ndevice = 'b'\n"), "backup.device"),
            (format!("{two}[backup]\ndevice = 'default'\n"), "backup.device"),
            (format!("{seal}[devices.B.pkcs11]\ntoken = 'b'\n"), "32 characters"),
        ] {
            let error = load(&text, &[]).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_password_in_the_database_url_is_not_printed() {
        let config = load("[database]\nurl = 'postgres://lacre:hunter2@db/lacre'", &[]).unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn rules_name_scopes_by_their_oauth_names() {
        let file = "[[server.local_users]]\nuid = 0\nscopes = ['audit:read']\n";
        let config = load(file, &[]).unwrap();
        assert_eq!(config.server.local_users[0].scopes.to_string(), "audit:read");

        assert!(load("[[server.local_users]]\nuid = 0\nscopes = ['root']\n", &[]).is_err());
    }
}
