//! `[keys]`, and Logto's variable for it.

use std::collections::HashMap;
use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, seconds};
use crate::keys::Policy;

/// `[keys]`: what holds for the signing keys of every tenant; the rest is in each tenant's policy.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeysConfig {
    /// How long a new signing key is Next if a rotation does not say so.
    #[serde(with = "seconds")]
    pub rotation_grace: Duration,
    /// What a new tenant's policy says of the time in which daemons learn of a change.
    #[serde(with = "seconds")]
    pub propagation: Duration,
    /// What it says of the clocks of daemons and verifiers.
    #[serde(with = "seconds")]
    pub skew: Duration,
}

impl Default for KeysConfig {
    fn default() -> Self {
        let Policy { propagation, skew, .. } = Policy::default();
        Self { rotation_grace: Duration::ZERO, propagation, skew }
    }
}

impl KeysConfig {
    /// The policy of tenants that nobody has set another one for.
    pub fn policy(&self) -> Policy {
        Policy { propagation: self.propagation, skew: self.skew, ..Policy::default() }
    }
}

/// Logto's name for `keys.rotation_grace`: whole seconds. It wins over the file, and Lacre's own variable over it.
const GRACE_VARIABLE: &str = "PRIVATE_KEY_ROTATION_GRACE_PERIOD";

/// What Logto's variable says; blank is as good as absent. Logto's server takes a bad value for 0; a key that is
/// used earlier than somebody meant is worth an error.
pub(super) fn logto_grace(given: Option<&HashMap<String, String>>) -> Result<Option<u64>, ConfigError> {
    #[expect(clippy::disallowed_methods, reason = "a part of config.rs, where the environment is read")]
    let text = match given {
        Some(given) => given.get(GRACE_VARIABLE).cloned(),
        None => std::env::var_os(GRACE_VARIABLE).map(|text| text.to_string_lossy().into_owned()),
    };
    match text.as_deref().map(str::trim) {
        None | Some("") => Ok(None),
        Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => {
            text.parse().map(Some).map_err(|_| ConfigError::Grace(text.to_owned()))
        }
        Some(text) => Err(ConfigError::Grace(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::config::Config;

    fn grace(file: &str, environment: &[(&str, &str)]) -> Result<u64, ConfigError> {
        let mut on_disk = tempfile::NamedTempFile::new().unwrap();
        on_disk.write_all(file.as_bytes()).unwrap();
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let config = Config::from_sources(Some(on_disk.path()), Some(environment))?;
        Ok(config.keys.rotation_grace.as_secs())
    }

    #[test]
    fn the_grace_of_a_rotation_is_also_read_from_logtos_variable() {
        let file = "[keys]\nrotation_grace = '1h'\n";
        let ours = "LACRE__KEYS__ROTATION_GRACE";

        assert_eq!(grace("", &[]).unwrap(), 0);
        assert_eq!(grace(file, &[(GRACE_VARIABLE, " ")]).unwrap(), 3600);
        assert_eq!(grace(file, &[(GRACE_VARIABLE, "14400")]).unwrap(), 14_400);
        assert_eq!(grace(file, &[(GRACE_VARIABLE, "0")]).unwrap(), 0);
        assert_eq!(grace(file, &[(GRACE_VARIABLE, "14400"), (ours, "60")]).unwrap(), 60);
    }

    #[test]
    fn a_grace_that_is_no_number_of_seconds_is_refused() {
        for bad in ["4h", "-1", "1.5", "+1", "99999999999999999999", "31536001"] {
            assert!(grace("", &[(GRACE_VARIABLE, bad)]).is_err(), "{bad}");
        }
    }
}
