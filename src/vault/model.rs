//! Types of the vault and the decisions that need no I/O.

use std::collections::BTreeMap;

use serde::Serialize;
use zeroize::Zeroizing;

use crate::clock::Timestamp;
use crate::ids::{JobId, SecretId};
use crate::seal::{DeviceName, Opened};

/// What a secret is; decides how its value is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecretKind {
    /// Any bytes.
    Opaque,
    /// UTF-8 text that is one JSON value.
    Json,
    /// UTF-8 text, not empty.
    Password,
    /// UTF-8 text, not empty, no white space.
    ApiKey,
}

impl SecretKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Opaque, Self::Json, Self::Password, Self::ApiKey];

    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opaque => "opaque",
            Self::Json => "json",
            Self::Password => "password",
            Self::ApiKey => "api-key",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What a record of another part is. The names are frozen: ciphertexts are bound to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// A user's tokens of another provider.
    TokenSet,
    /// How a provider is spoken to, with the client's secret.
    Connector,
    /// A proof with a short life, and the tokens parked in it.
    Verification,
    /// What users may do with their own account.
    AccountCenter,
}

impl RecordKind {
    /// `Context::kind`, and the value in the database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TokenSet => "token-set",
            Self::Connector => "connector",
            Self::Verification => "verification",
            Self::AccountCenter => "account-center",
        }
    }
}

/// How a value was given and is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As text.
    Utf8,
    /// As standard base64 with padding (RFC 4648, section 4).
    Base64,
}

impl Encoding {
    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Utf8 => "utf8",
            Self::Base64 => "base64",
        }
    }

    /// The encoding of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Utf8, Self::Base64].into_iter().find(|encoding| encoding.name() == name)
    }
}

/// A plaintext value on its way in. Wiped on drop; no `Clone`, `Debug` or `Serialize`.
pub struct PlainValue {
    /// How the client gave it.
    pub encoding: Encoding,
    /// The value itself, decoded.
    pub bytes: Zeroizing<Vec<u8>>,
}

/// A plaintext value on its way out: guarded memory, readable through a closure.
pub struct Plain(pub(crate) Opened);

impl Plain {
    /// Lets `read` see the value.
    pub fn with<T>(&self, read: impl FnOnce(&[u8]) -> T) -> T {
        self.0.with(read)
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A secret to be created. Checked by the service (`VaultError::Invalid` names the member).
pub struct NewSecret {
    /// 1 to 128 characters of `A-Z a-z 0-9 . _ - /`, unique in the tenant.
    pub name: String,
    /// What it is.
    pub kind: SecretKind,
    /// Its value.
    pub value: PlainValue,
    /// At most 32 labels; keys like names, values up to 256 characters.
    pub labels: BTreeMap<String, String>,
    /// When the value stops being released.
    pub expires_at: Option<Timestamp>,
}

impl NewSecret {
    /// Reads `expires_at` as RFC 3339 text; `None` if it is not such a text.
    pub fn parse_expiry(text: &str) -> Option<Timestamp> {
        Timestamp::parse_rfc3339(text)
    }
}

/// Metadata of a secret. Never the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretInfo {
    /// Its id.
    pub id: SecretId,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: SecretKind,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The newest version's number.
    pub version: u64,
    /// When the value stops being released.
    pub expires_at: Option<Timestamp>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Changes with every change of the row: the ETag.
    pub row_version: i64,
}

/// Metadata of one version of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionInfo {
    /// 1, 2, ...
    pub version: u64,
    /// How the value was given.
    pub encoding: Encoding,
    /// Its length in bytes.
    pub len: u64,
    /// The KEK version that wraps its DEK.
    pub kek_version: u32,
    /// When it was stored.
    pub created_at: Timestamp,
}

/// A released value.
pub struct Revealed {
    /// The secret's metadata.
    pub info: SecretInfo,
    /// Which version this is.
    pub version: u64,
    /// How the client gave it.
    pub encoding: Encoding,
    /// The value.
    pub value: Plain,
}

/// Which secrets to list.
#[derive(Clone, Debug, Default)]
pub struct ListFilter {
    /// Only after this id (from the cursor).
    pub after: Option<SecretId>,
    /// At most so many, 1 to 200.
    pub limit: u32,
    /// Only of this kind.
    pub kind: Option<SecretKind>,
    /// Only of this name.
    pub name: Option<String>,
}

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Whether more follow.
    pub more: bool,
}

/// A KEK version's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KekState {
    /// Recorded, not made on the device yet.
    Planned,
    /// Seals and opens.
    Active,
    /// Opens only.
    Retired,
    /// Gone from the device.
    Destroyed,
    /// Shown for a version that should seal or open and was not found on the device; never stored.
    Missing,
}

impl KekState {
    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Destroyed => "destroyed",
            Self::Missing => "missing",
        }
    }

    /// The stored state of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Planned, Self::Active, Self::Retired, Self::Destroyed]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

/// What a KEK version wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KekRole {
    /// What is in use.
    Main,
    /// Second wraps, on a device of its own.
    Backup,
}

impl KekRole {
    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Backup => "backup",
        }
    }

    /// The role of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Main, Self::Backup].into_iter().find(|role| role.name() == name)
    }
}

/// A KEK version as the API shows it.
#[derive(Clone, Debug)]
pub struct KekInfo {
    /// The tenant's KEK, in hex.
    pub kek_id: String,
    /// 1, 2, ...
    pub version: u32,
    /// The device object's id, in hex.
    pub key_id: String,
    /// The device that it is on.
    pub device: DeviceName,
    /// What it wraps.
    pub role: KekRole,
    /// How it wraps (`A256GCM`, ...); empty while planned.
    pub mechanism: &'static str,
    /// Its state.
    pub state: KekState,
    /// Upper bound of the wraps made under it.
    pub wraps: u64,
    /// How many wraps it may make.
    pub wrap_budget: u64,
    /// How many stored records it wraps now, in its role.
    pub records: u64,
    /// When it was planned.
    pub created_at: Timestamp,
    /// When it began to seal.
    pub activated_at: Option<Timestamp>,
}

/// A job's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for a daemon.
    Queued,
    /// A daemon works on it.
    Running,
    /// Done, without failures.
    Succeeded,
    /// Ended with failures (see `failed` and `last_error`).
    Failed,
    /// Stopped on request.
    Cancelled,
}

impl JobState {
    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled]
            .into_iter()
            .find(|state| state.name() == name)
    }

    /// Whether nothing more will happen.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// What a job does with records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Moves them to the newest KEK version.
    Rewrap,
    /// Gives them a second wrap under the backup KEK.
    Backup,
    /// Moves them to the newest KEK version, by their second wrap where they have one.
    Restore,
}

impl JobKind {
    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rewrap => "rewrap",
            Self::Backup => "backup",
            Self::Restore => "restore",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Rewrap, Self::Backup, Self::Restore].into_iter().find(|kind| kind.name() == name)
    }
}

/// A job as the API shows it.
#[derive(Clone, Debug)]
pub struct JobInfo {
    /// Its id.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// Its state.
    pub state: JobState,
    /// The KEK version it moves records to.
    pub target_version: u32,
    /// Records to move, as counted at the start.
    pub total: u64,
    /// Records moved.
    pub done: u64,
    /// Records that could not be moved.
    pub failed: u64,
    /// The last failure's code.
    pub last_error: Option<String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it last moved.
    pub updated_at: Timestamp,
}

/// A client's Idempotency-Key (1 to 128 visible ASCII characters) and the canonical bytes of its request.
pub struct IdempotencyKey {
    /// The header's value.
    pub key: String,
    /// The request body; only its HMAC is kept.
    pub body: Zeroizing<Vec<u8>>,
}

/// A caller-given context for ciphertext that the caller keeps: 1 to 512 bytes of text.
#[derive(Clone, Debug)]
pub struct ExternalContext(pub String);

/// A value to be sealed for the caller.
pub struct SealItem {
    /// Bound to the ciphertext.
    pub context: ExternalContext,
    /// The value.
    pub value: PlainValue,
}

/// A ciphertext to be opened for the caller.
pub struct OpenItem {
    /// Must be the context it was sealed with.
    pub context: ExternalContext,
    /// What sealing returned.
    pub sealed: Vec<u8>,
}

/// A fresh data key.
pub struct DataKey {
    /// The key, once.
    pub plain: Plain,
    /// The same key, sealed.
    pub sealed: Vec<u8>,
}

/// Figures for status and metrics.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Secrets by kind.
    pub secrets: BTreeMap<&'static str, u64>,
    /// Records by KEK version.
    pub records_by_kek_version: BTreeMap<u32, u64>,
    /// Jobs that have not ended.
    pub open_jobs: u64,
    /// Records without a wrap under the newest backup KEK; `None` if there is none.
    pub without_backup: Option<u64>,
}
