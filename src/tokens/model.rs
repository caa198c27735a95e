//! Types of users, connectors, identities and token sets.

use std::collections::BTreeMap;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::clock::Timestamp;
use crate::ids::{ConnectorId, IdentityId, TokenSetId, UserId, VerificationId};

use super::status::Status;

/// By which way a person's account elsewhere is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// A social connector; the connection is named by the connector's target.
    Social,
    /// An enterprise's single sign-on; the connection is named by the connector's id.
    Sso,
}

impl Family {
    /// The name in the database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Social => "social",
            Self::Sso => "sso",
        }
    }

    /// The family of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Social, Self::Sso].into_iter().find(|family| family.name() == name)
    }
}

/// One of a user's connections: `github`, or an SSO connector's id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// Which kind of name follows.
    pub family: Family,
    /// 1 to 64 characters of `A-Z a-z 0-9 . _ -`.
    pub target: String,
}

impl Connection {
    /// The connection of that name; `None` if no connector can have it.
    pub fn parse(family: Family, target: &str) -> Option<Self> {
        is_target(target).then(|| Self { family, target: target.to_owned() })
    }
}

/// Whether a connector can have that target: it becomes part of a record's place, which is split at slashes.
pub(super) fn is_target(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=64).contains(&text.len()) && text.chars().all(allowed)
}

/// A person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// `[A-Za-z_][A-Za-z0-9_]*`, unique in the tenant.
    pub username: Option<String>,
    /// Unique in the tenant.
    pub primary_email: Option<String>,
    /// Digits with country code, unique in the tenant.
    pub primary_phone: Option<String>,
    /// Shown.
    pub name: Option<String>,
    /// A picture's address.
    pub avatar: Option<String>,
    /// Claims of OpenID Connect Core, section 5.1.
    pub profile: Value,
    /// Whatever the application keeps there.
    pub custom_data: Value,
    /// Whether there is a password.
    pub has_password: bool,
    /// Whether its tokens are refused.
    pub is_suspended: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
}

/// A user to be made. Checked by the service.
#[derive(Default)]
pub struct NewUser {
    /// See [`User`].
    pub username: Option<String>,
    /// See [`User`].
    pub primary_email: Option<String>,
    /// See [`User`].
    pub primary_phone: Option<String>,
    /// See [`User`].
    pub name: Option<String>,
    /// See [`User`].
    pub avatar: Option<String>,
    /// Kept as an Argon2id hash.
    pub password: Option<SecretString>,
    /// An object.
    pub profile: Option<Value>,
    /// An object.
    pub custom_data: Option<Value>,
}

/// A change of a user: an outer `None` leaves the member as it is, an inner one empties it.
#[derive(Default)]
pub struct UserPatch {
    /// See [`User`].
    pub username: Option<Option<String>>,
    /// See [`User`].
    pub primary_email: Option<Option<String>>,
    /// See [`User`].
    pub primary_phone: Option<Option<String>>,
    /// See [`User`].
    pub name: Option<Option<String>>,
    /// See [`User`].
    pub avatar: Option<Option<String>>,
    /// Replaces the whole object.
    pub profile: Option<Value>,
    /// Replaces the whole object.
    pub custom_data: Option<Value>,
    /// A new password.
    pub password: Option<SecretString>,
    /// Suspends or readmits.
    pub is_suspended: Option<bool>,
}

/// Which users.
#[derive(Clone, Debug)]
pub struct UserQuery {
    /// 1, 2, ...
    pub page: u64,
    /// 1 to 100.
    pub page_size: u64,
    /// A part of id, name, username, e-mail or phone; `%` stands for anything, as in Logto.
    pub search: Option<String>,
}

/// A page of users with how many there are in all.
pub struct UserPage {
    /// Newest first.
    pub users: Vec<(User, Vec<Identity>)>,
    /// On all pages.
    pub total: u64,
}

/// A person's account at another provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Whose.
    pub user: UserId,
    /// By which way it is known.
    pub family: Family,
    /// The connector's target, or its id for SSO.
    pub target: String,
    /// The row's id.
    pub id: IdentityId,
    /// The provider, for SSO.
    pub issuer: Option<String>,
    /// The account's id there (`sub`).
    pub identity_id: String,
    /// The profile as the provider gave it: an object.
    pub details: Value,
    /// When it was linked.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
}

impl Identity {
    /// Its name among the user's connections.
    pub fn connection(&self) -> Connection {
        Connection { family: self.family, target: self.target.clone() }
    }
}

/// Metadata of a token set. Never its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSetInfo {
    /// Stays over re-authorisation.
    pub id: TokenSetId,
    /// Whose.
    pub user: UserId,
    /// Of which connection.
    pub family: Family,
    /// See [`Connection`].
    pub target: String,
    /// From which connector.
    pub connector: ConnectorId,
    /// The provider, for SSO.
    pub issuer: Option<String>,
    /// The account at the provider.
    pub identity_id: String,
    /// Whether there is a refresh token.
    pub has_refresh_token: bool,
    /// As the provider wrote it.
    pub scope: Option<String>,
    /// As the provider wrote it.
    pub token_type: Option<String>,
    /// Seconds since the epoch; `None`: the provider did not say.
    pub expires_at: Option<i64>,
    /// When it was first stored.
    pub created_at: Timestamp,
    /// When its values last changed.
    pub updated_at: Timestamp,
    /// What can be had of it now.
    pub status: Status,
    /// When it will be refreshed by itself.
    pub next_refresh_at: Option<Timestamp>,
    /// The class of the last refresh's failure, until one succeeds.
    pub last_error: Option<String>,
    /// Failures in a row.
    pub failures: u64,
}

/// A connector as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connector {
    /// Its id.
    pub id: ConnectorId,
    /// Social or SSO.
    pub family: Family,
    /// Its factory's id (`github-universal`), or the provider's name (`Okta`).
    pub factory: String,
    /// The name of its connections.
    pub target: String,
    /// What it was made with, secrets masked.
    pub shown: Shown,
    /// Whether tokens are kept.
    pub stores_tokens: bool,
    /// How many seconds before expiry tokens are refreshed by themselves; 0: only when they are read.
    pub refresh_ahead: u64,
    /// Until when the provider is not called, and why.
    pub breaker: Option<(Timestamp, String)>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
}

/// The part of a connector that decides nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shown {
    /// The configuration, secrets masked.
    pub config: Value,
    /// Name, logo and such: an object.
    pub metadata: Value,
    /// Whether a sign-in updates the profile.
    pub sync_profile: bool,
    /// SSO: its name.
    pub connector_name: String,
    /// SSO: the e-mail domains.
    pub domains: Value,
    /// SSO: an object.
    pub branding: Value,
}

/// A connector to be made.
pub struct NewConnector {
    /// Its id, if the caller chooses it.
    pub id: Option<ConnectorId>,
    /// Social or SSO.
    pub family: Family,
    /// The factory's id, or the provider's name.
    pub factory: String,
    /// With secrets.
    pub config: Value,
    /// May name the `target` of a standard connector.
    pub metadata: Value,
    /// See [`Shown`].
    pub sync_profile: bool,
    /// SSO only.
    pub connector_name: String,
    /// SSO only.
    pub domains: Value,
    /// SSO only.
    pub branding: Value,
    /// See [`Connector`].
    pub stores_tokens: bool,
    /// See [`Connector`].
    pub refresh_ahead: u64,
}

/// A change of a connector; what is `None` stays.
#[derive(Default)]
pub struct ConnectorPatch {
    /// A masked secret in it stays as it is.
    pub config: Option<Value>,
    /// See [`NewConnector`].
    pub metadata: Option<Value>,
    /// See [`NewConnector`].
    pub sync_profile: Option<bool>,
    /// See [`NewConnector`].
    pub connector_name: Option<String>,
    /// See [`NewConnector`].
    pub domains: Option<Value>,
    /// See [`NewConnector`].
    pub branding: Option<Value>,
    /// Switching it off deletes what is stored.
    pub stores_tokens: Option<bool>,
    /// See [`NewConnector`].
    pub refresh_ahead: Option<u64>,
}

/// What a person may do with a part of the own account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FieldAccess {
    /// Not even see it.
    #[default]
    Off,
    /// See it.
    ReadOnly,
    /// Change it.
    Edit,
}

/// The account center's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AccountCenter {
    /// Whether there is an Account API at all.
    pub enabled: bool,
    /// `social` guards link, replace and unlink; other names are kept and guard nothing yet.
    pub fields: BTreeMap<String, FieldAccess>,
}

/// A sign-in at a provider that is to begin.
pub struct StartVerification {
    /// By which way.
    pub family: Family,
    /// At which connector.
    pub connector: String,
    /// The client's; it comes back and is compared.
    pub state: String,
    /// Where the provider sends the person.
    pub redirect_uri: String,
    /// Instead of the connector's own.
    pub scope: Option<String>,
}

/// A sign-in that has begun.
pub struct StartedVerification {
    /// The proof's id.
    pub id: VerificationId,
    /// Where the person goes.
    pub authorization_uri: String,
    /// When it is too late.
    pub expires_at: Timestamp,
}

/// A link or a replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkAs {
    /// Refused if the connection is there already.
    New,
    /// Instead of what is there, if anything is.
    Replacement,
}
