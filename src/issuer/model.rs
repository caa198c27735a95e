//! Types of the issuer.

use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::clock::Timestamp;
use crate::identity::ScopeSet;
use crate::ids::ClientId;
use crate::issuer::SigningPolicy;
use crate::tokens::Released;

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
    /// A JWT, or a user's opaque token.
    pub access_token: SecretString,
    /// Lifetime in seconds.
    pub expires_in: u64,
    /// What was granted.
    pub scope: String,
}

/// A token that stands for a user until it is exchanged.
pub struct SubjectToken {
    /// `sub_...`
    pub token: SecretString,
    /// Lifetime in seconds.
    pub expires_in: u64,
}

/// By which name a token exchange was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExchangeGrant {
    /// RFC 8693, section 2.1.
    #[default]
    Standard,
    /// Auth0's, for a provider's token only.
    Federated,
}

/// A request for a token exchange as the form has it (RFC 8693, section 2.1). Read after the client was
/// authenticated.
#[derive(Default)]
pub struct ExchangeRequest {
    /// From Basic or the form.
    pub client_id: String,
    /// From Basic or the form.
    pub client_secret: SecretString,
    /// Whether `grant_type` was Auth0's.
    pub grant: ExchangeGrant,
    /// `subject_token`.
    pub subject_token: Option<SecretString>,
    /// `subject_token_type`.
    pub subject_token_type: Option<String>,
    /// `requested_token_type`.
    pub requested_token_type: Option<String>,
    /// Whether there was `actor_token` or `actor_token_type`.
    pub has_actor: bool,
    /// `scope`.
    pub scope: Option<String>,
    /// `resource`.
    pub resource: Option<String>,
    /// `audience`.
    pub audience: Option<String>,
    /// `connection`, Auth0's name for the audience.
    pub connection: Option<String>,
    /// `reason`, for the audit log; Lacre's own.
    pub reason: Option<String>,
}

/// What an exchange brought.
pub enum Exchanged {
    /// A user's opaque token of this issuer.
    User(IssuedToken),
    /// A provider's token.
    ThirdParty {
        /// Its values.
        released: Released,
        /// `issued_token_type`: as it was asked for.
        kind: &'static str,
    },
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
    /// Whether it may exchange tokens (RFC 8693).
    pub allow_token_exchange: bool,
    /// What it may have signed; absent: nothing.
    pub signing: Option<SigningPolicy>,
    /// What decides nothing.
    pub extras: AppExtras,
}

/// What clients of Logto keep with an application. Nothing here decides anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AppExtras {
    /// Shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Where its users return to after they have signed out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub post_logout_redirect_uris: Vec<String>,
    /// Members of `customClientMetadata` that mean nothing here.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub client_metadata: Map<String, Value>,
    /// Whatever the application keeps there.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub custom_data: Map<String, Value>,
}

/// A change of an application; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct AppPatch {
    /// See [`NewApp`].
    pub name: Option<String>,
    /// See [`AppExtras`]; an inner `None` empties it.
    pub description: Option<Option<String>>,
    /// See [`NewApp`].
    pub redirect_uris: Option<Vec<String>>,
    /// See [`AppExtras`].
    pub post_logout_redirect_uris: Option<Vec<String>>,
    /// See [`NewApp`].
    pub allow_token_exchange: Option<bool>,
    /// Members to add or to replace.
    pub client_metadata: Map<String, Value>,
    /// Members to add or to replace.
    pub custom_data: Map<String, Value>,
}

impl AppPatch {
    /// What it changes, by the names that the audit log has.
    pub(super) fn members(&self) -> Vec<&'static str> {
        let members = [
            ("name", self.name.is_some()),
            ("description", self.description.is_some()),
            ("redirect_uris", self.redirect_uris.is_some()),
            ("post_logout_redirect_uris", self.post_logout_redirect_uris.is_some()),
            ("allow_token_exchange", self.allow_token_exchange.is_some()),
            ("client_metadata", !self.client_metadata.is_empty()),
            ("custom_data", !self.custom_data.is_empty()),
        ];
        members.into_iter().filter_map(|(name, is_there)| is_there.then_some(name)).collect()
    }

    /// The application as it will be.
    pub(super) fn apply(self, app: &mut AppInfo) {
        fn put<T>(new: Option<T>, place: &mut T) {
            if let Some(new) = new {
                *place = new;
            }
        }
        put(self.name, &mut app.name);
        put(self.redirect_uris, &mut app.redirect_uris);
        put(self.allow_token_exchange, &mut app.allow_token_exchange);
        put(self.description, &mut app.extras.description);
        put(self.post_logout_redirect_uris, &mut app.extras.post_logout_redirect_uris);
        app.extras.client_metadata.extend(self.client_metadata);
        app.extras.custom_data.extend(self.custom_data);
    }
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
            extras: AppExtras::default(),
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
    /// What decides nothing.
    pub extras: AppExtras,
    /// When it was made.
    pub created_at: Timestamp,
}
