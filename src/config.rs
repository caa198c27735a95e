//! Configuration: one TOML file, environment and flags over it (stub, being written).

/// Serde helper: a `Duration` written as seconds (number) or as text such as `"30s"`, `"4h"`.
pub mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, de::Error};

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
}
