//! Types of the issuer.

use secrecy::SecretString;
use serde::Serialize;

use crate::clock::Timestamp;
use crate::identity::ScopeSet;
use crate::ids::ClientId;
use crate::issuer::SigningPolicy;

/// What an application is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AppKind {
    /// Acts for itself with client credentials.
    Machine,
    /// A web application with users; signs in through the issuer in a later version.
    Traditional,
}

impl AppKind {
    /// The name in API and database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Traditional => "traditional",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Machine, Self::Traditional].into_iter().find(|kind| kind.name() == name)
    }
}

/// A token request, parsed from form and Authorization header.
pub struct TokenRequest {
    /// `grant_type`.
    pub grant_type: String,
    /// From Basic or the form.
    pub client_id: String,
    /// From Basic or the form.
    pub client_secret: SecretString,
    /// `scope`; `all` and absent mean all that the application was granted.
    pub scope: Option<String>,
    /// `resource` (RFC 8707); absent means the API.
    pub resource: Option<String>,
}

/// A token response (RFC 6749, section 5.1).
pub struct IssuedToken {
    /// The JWT.
    pub access_token: SecretString,
    /// Lifetime in seconds.
    pub expires_in: u64,
    /// What was granted.
    pub scope: String,
}

/// An application to be made.
pub struct NewApp {
    /// 1 to 128 characters.
    pub name: String,
    /// What it is.
    pub kind: AppKind,
    /// What may be granted to it; never more than the creator holds.
    pub scopes: ScopeSet,
    /// Where a traditional application's users return to.
    pub redirect_uris: Vec<String>,
    /// Whether it may exchange tokens (RFC 8693), in a later version.
    pub allow_token_exchange: bool,
    /// What it may have signed; absent: nothing.
    pub signing: Option<SigningPolicy>,
}

impl NewApp {
    /// A machine application with these scopes and nothing else.
    pub fn machine(name: impl Into<String>, scopes: ScopeSet) -> Self {
        Self {
            name: name.into(),
            kind: AppKind::Machine,
            scopes,
            redirect_uris: Vec::new(),
            allow_token_exchange: false,
            signing: None,
        }
    }
}

/// An application as the API shows it: never its secret.
#[derive(Clone, Debug)]
pub struct AppInfo {
    /// Its client id.
    pub client_id: ClientId,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: AppKind,
    /// What may be granted to it.
    pub scopes: ScopeSet,
    /// Where its users return to.
    pub redirect_uris: Vec<String>,
    /// Whether it may exchange tokens.
    pub allow_token_exchange: bool,
    /// What it may have signed; absent: nothing.
    pub signing: Option<SigningPolicy>,
    /// When it was made.
    pub created_at: Timestamp,
}
