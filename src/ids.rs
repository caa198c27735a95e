//! Names and identifiers: one type each, one constructor that can fail, made by the application.
//!
//! Row ids are UUIDv7 text, so that they sort by creation and no database sequence is needed.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

/// The text is not a valid name or id of the wanted kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {what}")]
pub struct BadName {
    /// Which kind of name was wanted.
    pub what: &'static str,
}

/// What every id has that is a text which its `parse` accepts.
macro_rules! text_form {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;
            fn try_from(text: String) -> Result<Self, BadName> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A fresh id (UUIDv7, RFC 9562).
            pub fn generate() -> Self {
                Self(Uuid::now_v7().to_string())
            }

            /// Accepts the canonical lower-case UUID form only, so that one id has one spelling.
            ///
            /// # Errors
            /// [`BadName`] for anything else.
            pub fn parse(text: &str) -> Result<Self, BadName> {
                match Uuid::try_parse(text) {
                    Ok(uuid) if uuid.to_string() == text => Ok(Self(text.to_owned())),
                    _ => Err(BadName { what: $what }),
                }
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        text_form!($name);
    };
}

uuid_id!(
    /// A secret in the vault.
    SecretId,
    "secret id"
);
uuid_id!(
    /// A background job.
    JobId,
    "job id"
);
/// Digits of `0-9a-z`, from a fresh UUIDv7: its random end, and of the time as much as fits.
fn base36(len: u32) -> String {
    let mut rest = 36_u128.checked_pow(len).map_or(u128::MAX, |range| Uuid::now_v7().as_u128() % range);
    let digit = |_| {
        let value = u32::try_from(rest % 36).unwrap_or(0);
        rest /= 36;
        char::from_digit(value, 36).unwrap_or('0')
    };
    (0..len).map(digit).collect()
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A fresh id of the length that clients of Logto expect.
            pub fn generate() -> Self {
                Self(base36($len))
            }

            /// 1 to 64 characters of `A-Z a-z 0-9 _ -`: what was imported keeps its id.
            ///
            /// # Errors
            /// [`BadName`] if the text breaks the rule.
            pub fn parse(text: &str) -> Result<Self, BadName> {
                let allowed = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
                if text.is_empty() || text.len() > 64 || !text.chars().all(allowed) {
                    return Err(BadName { what: $what });
                }
                Ok(Self(text.to_owned()))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        text_form!($name);
    };
}

text_id!(
    /// A person whose identities at other providers are kept.
    UserId,
    "user id",
    12
);
text_id!(
    /// A connector, social or enterprise.
    ConnectorId,
    "connector id",
    12
);
text_id!(
    /// A federated token set.
    TokenSetId,
    "secret id",
    21
);
text_id!(
    /// A proof with a short life.
    VerificationId,
    "verification record id",
    21
);
text_id!(
    /// The row of an identity.
    IdentityId,
    "identity id",
    21
);

/// A signing key's row; not its `kid`, which is a thumbprint. 21 characters of `0-9a-z`, as clients of Logto
/// expect; rows of the first versions have UUIDs and keep them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SigningKeyId(String);

impl SigningKeyId {
    const LEN: u32 = 21;

    /// A fresh id: 74 random bits and the end of the time.
    pub fn generate() -> Self {
        Self(base36(Self::LEN))
    }

    /// The id of no key: no time ends in so many zeros.
    pub fn of_nothing() -> Self {
        Self("0".repeat(Self::LEN as usize))
    }

    /// # Errors
    /// [`BadName`] if the text breaks the rule of the type.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let is_uuid = || Uuid::try_parse(text).is_ok_and(|uuid| uuid.to_string() == text);
        if (text.len() == 21 && text.chars().all(allowed)) || is_uuid() {
            return Ok(Self(text.to_owned()));
        }
        Err(BadName { what: "signing key id" })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SigningKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SigningKeyId {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        Self::parse(&text)
    }
}

impl From<SigningKeyId> for String {
    fn from(id: SigningKeyId) -> String {
        id.0
    }
}

/// A tenant: 1 to 64 characters of `a-z 0-9 -`, not beginning or ending with `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantId(String);

impl TenantId {
    /// # Errors
    /// [`BadName`] if the text breaks the rule of the type.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let edges = text.starts_with('-') || text.ends_with('-');
        if text.is_empty() || text.len() > 64 || edges || !text.chars().all(allowed) {
            return Err(BadName { what: "tenant id" });
        }
        Ok(Self(text.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for TenantId {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        Self::parse(&text)
    }
}

impl From<TenantId> for String {
    fn from(id: TenantId) -> String {
        id.0
    }
}

/// An application's client id: 1 to 64 characters of `A-Z a-z 0-9 . _ -` (a subset of RFC 6749, appendix A.1).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClientId(String);

impl ClientId {
    /// A fresh id of 20 characters.
    pub fn generate() -> Self {
        let simple = Uuid::now_v7().simple().to_string();
        Self(format!("app-{}", &simple[12..]))
    }

    /// # Errors
    /// [`BadName`] if the text breaks the rule of the type.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if text.is_empty() || text.len() > 64 || !text.chars().all(allowed) {
            return Err(BadName { what: "client id" });
        }
        Ok(Self(text.to_owned()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ClientId {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        Self::parse(&text)
    }
}

impl From<ClientId> for String {
    fn from(id: ClientId) -> String {
        id.0
    }
}

/// The id of one request, the same in log, audit, error body and `X-Request-Id`.
/// 1 to 64 characters of `A-Z a-z 0-9 . _ -`; anything else a client sends is replaced by a fresh one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct RequestId(String);

impl RequestId {
    /// A fresh id.
    pub fn generate() -> Self {
        Self(Uuid::now_v7().simple().to_string())
    }

    /// The client's own id where it is well formed, else a fresh one.
    pub fn accept_or_generate(offered: Option<&str>) -> Self {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        match offered {
            Some(text) if (1..=64).contains(&text.len()) && text.chars().all(allowed) => {
                Self(text.to_owned())
            }
            _ => Self::generate(),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A fresh client secret: 256 random bits, with a prefix by which secret scanners know it.
///
/// # Errors
/// If the operating system has no randomness to give.
pub fn generate_client_secret() -> Result<SecretString, getrandom::Error> {
    generate_token("lcs_")
}

/// 256 random bits behind a prefix of at most 8 characters that says what they are.
///
/// # Errors
/// If the operating system has no randomness to give.
pub fn generate_token(prefix: &str) -> Result<SecretString, getrandom::Error> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *bytes)?;
    // Sized before anything is written, so that no copy is left behind by a reallocation.
    let mut text = String::with_capacity(64);
    text.push_str(prefix);
    URL_SAFE_NO_PAD.encode_string(&bytes[..], &mut text);
    Ok(SecretString::from(text))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::generate_client_secret;

    #[test]
    fn a_client_secret_has_256_bits_behind_its_prefix_and_none_is_like_another() {
        let [one, other] = [generate_client_secret().unwrap(), generate_client_secret().unwrap()];

        assert!(one.expose_secret().starts_with("lcs_"));
        assert_eq!(one.expose_secret().len(), 4 + 43);
        assert_ne!(one.expose_secret(), other.expose_secret());
    }
}
