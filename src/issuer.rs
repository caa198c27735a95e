//! The OAuth issuer: client credentials in, access token out, and the check of such tokens on the way back in;
//! token exchange (`exchange`), and the opaque tokens of persons (`user_tokens`).
//!
//! Client secrets are 256 random bits and are kept as HMAC under a device key. Every issued token
//! has an audit record before it is signed or stored. A machine's tokens are `at+jwt` (RFC 9068).

mod apps;
mod clients;
mod exchange;
mod model;
mod published;
mod signing;
mod store;
mod user_tokens;
mod verify;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::audit::{Action, AuditCode, AuditError, AuditLog, Event, Outcome, Refusals};
use crate::clock::{Clock, Timestamp};
use crate::db::{Db, DbError};
use crate::identity::{Caller, MissingScope, Principal, ScopeSet};
use crate::ids::{ClientId, RequestId, TenantId};
use crate::keys::{Jwks, Keys, KeysError};
use crate::tokens::{Tokens, TokensError};

use clients::Clients;
use store::App;
use user_tokens::UserTokens;
use verify::{ALL_SCOPES, Expected, TOKEN_MAX, TYP};

pub use model::*;
pub use published::Published;
pub use signing::*;

/// Why the token endpoint or the application API refused.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// Unknown client or wrong secret (RFC 6749, section 5.2: `invalid_client`).
    #[error("client authentication failed")]
    InvalidClient,
    /// The grant type is not offered (`unsupported_grant_type`).
    #[error("unsupported grant type")]
    UnsupportedGrantType,
    /// A scope is unknown or not granted to the application (`invalid_scope`).
    #[error("scope not granted")]
    InvalidScope,
    /// The resource is not one of this issuer's (RFC 8707, section 2: `invalid_target`).
    #[error("unknown resource")]
    InvalidTarget,
    /// The application may not exchange tokens (`unauthorized_client`).
    #[error("the application may not exchange tokens")]
    UnauthorizedClient,
    /// A token to be exchanged is not accepted (`invalid_grant`).
    #[error("{0}")]
    InvalidGrant(&'static str),
    /// No such application in the caller's tenant.
    #[error("no such application")]
    NotFound,
    /// No such user in the caller's tenant, or it is suspended.
    #[error("no such user")]
    NoSuchUser,
    /// The input breaks a rule.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which member.
        field: &'static str,
        /// Which rule.
        reason: String,
    },
    /// The caller lacks a right.
    #[error(transparent)]
    Forbidden(#[from] MissingScope),
    /// This is not signed for this caller.
    #[error(transparent)]
    Refused(#[from] NotSigned),
    /// What the token sets' service said of a user or a token set.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// Signing or hashing failed.
    #[error("key operation failed")]
    Keys(#[from] KeysError),
    /// The audit log cannot take the record.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The database failed.
    #[error("storage failed")]
    Db(#[from] DbError),
}

impl AuditCode for IssuerError {
    fn audit_code(&self) -> &'static str {
        match self {
            Self::InvalidClient => "invalid-client",
            Self::UnsupportedGrantType => "unsupported-grant-type",
            Self::InvalidScope => "invalid-scope",
            Self::InvalidTarget => "invalid-target",
            Self::UnauthorizedClient => "unauthorized-client",
            Self::InvalidGrant(_) => "invalid-grant",
            Self::NotFound | Self::NoSuchUser => "not-found",
            Self::Tokens(tokens) => tokens.audit_code(),
            Self::Invalid { .. } => "invalid",
            Self::Forbidden(_) => "forbidden",
            Self::Refused(refusal) => refusal.code(),
            Self::Keys(keys) => keys.audit_code(),
            Self::Audit(_) => "audit-unavailable",
            Self::Db(error) => error.code(),
        }
    }

    fn audit_outcome(&self) -> Outcome {
        match self {
            Self::InvalidClient
            | Self::UnsupportedGrantType
            | Self::InvalidScope
            | Self::InvalidTarget
            | Self::UnauthorizedClient
            | Self::InvalidGrant(_)
            | Self::Forbidden(_)
            | Self::Refused(_)
            | Self::Keys(KeysError::NotCurrent { .. }) => Outcome::Denied(self.audit_code()),
            Self::Tokens(tokens) => tokens.audit_outcome(),
            _ if self.is_unknown() => Outcome::Unknown,
            _ => Outcome::Failure(self.audit_code()),
        }
    }

    fn is_unknown(&self) -> bool {
        match self {
            Self::Keys(keys) => keys.is_unknown(),
            Self::Tokens(tokens) => tokens.is_unknown(),
            Self::Db(db) => matches!(db, DbError::Unknown(_)),
            _ => false,
        }
    }
}

/// Why a bearer token was not accepted. The client learns `invalid_token` only.
#[derive(Debug, thiserror::Error)]
pub enum BearerError {
    /// Not a token of this issuer, altered, for another audience, or expired.
    #[error("invalid token: {0}")]
    Invalid(&'static str),
    /// The check itself failed (storage).
    #[error("the token cannot be checked now")]
    Unavailable(#[source] IssuerError),
}

/// What an issuer is made of.
pub struct Parts {
    /// Storage.
    pub db: Db,
    /// Signs and hashes.
    pub keys: Keys,
    /// Says which users are active, and holds what is traded for their tokens.
    pub tokens: Tokens,
    /// Where every token is recorded.
    pub audit: AuditLog,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// Addresses and lifetimes.
    pub config: Config,
}

/// How the issuer presents itself.
#[derive(Clone, Debug)]
pub struct Config {
    /// `iss`: the public base URL plus `/oidc`.
    pub issuer: String,
    /// The tenant that `/oidc` serves (one per daemon address in this version).
    pub tenant: TenantId,
    /// Lifetime of access tokens, 1 h by default (`[issuer] token_lifetime`).
    pub token_lifetime: Duration,
    /// What callers that are no applications may have signed.
    pub peers: HashMap<Principal, SigningPolicy>,
}

impl Config {
    /// The Management and native API's resource indicator: `https://<tenant>.lacre.local/api`.
    pub fn api_resource(&self) -> String {
        format!("https://{}.lacre.local/api", self.tenant)
    }
}

/// The issuer. Cheap to clone.
#[derive(Clone)]
pub struct Issuer {
    inner: Arc<Inner>,
}

struct Inner {
    db: Db,
    keys: Keys,
    tokens: Tokens,
    audit: AuditLog,
    refusals: Refusals,
    clock: Arc<dyn Clock>,
    config: Config,
    /// [`Config::api_resource`].
    api: String,
    clients: Clients,
    users: UserTokens,
}

/// What a token request may have.
struct Grant {
    app: Arc<App>,
    scopes: ScopeSet,
    /// The token's `scope`: as it was asked for, where that was `all`.
    scope: String,
}

impl Issuer {
    /// Makes the service.
    pub fn new(parts: Parts) -> Self {
        let Parts { db, keys, tokens, audit, clock, config } = parts;
        let (clients, users) = (Clients::new(db.clone()), UserTokens::new());
        let refusals = Refusals::new(audit.clone());
        let api = config.api_resource();
        let inner = Inner { db, keys, tokens, audit, refusals, clock, config, api, clients, users };
        Self { inner: Arc::new(inner) }
    }

    /// Whether there is an application of that id; `false` also while that cannot be told.
    pub async fn knows(&self, client: &ClientId) -> bool {
        let found = self.inner.clients.find(&self.inner.config.tenant, client).await;
        found.is_ok_and(|app| app.is_some())
    }

    /// The token endpoint: authenticates the client, grants scopes, records, signs.
    ///
    /// # Errors
    /// The errors of RFC 6749, section 5.2, and RFC 8707, section 2, each recorded as a refusal;
    /// else what kept the token from being signed.
    pub async fn token(&self, request: TokenRequest, id: &RequestId) -> Result<IssuedToken, IssuerError> {
        let grant = match self.grant(&request).await {
            Ok(grant) => grant,
            Err(error) => {
                self.record_refusal(Action::TokenIssue, &request.client_id, id, &error).await;
                return Err(error);
            }
        };
        let client = &grant.app.info.client_id;
        let caller = self.caller(Principal::Application(client.clone()), grant.scopes, id.clone());
        let (jti, scope) = (Uuid::now_v7().to_string(), grant.scope);
        let claims = self.claims(client, &scope, &jti, self.inner.clock.now());
        let event =
            Event::new(Action::TokenIssue, "token", jti.as_str()).detail("scope", grant.scopes.to_string());
        let event = event.detail("exp", claims["exp"].to_string());
        let (tenant, lifetime) = (&self.inner.config.tenant, self.inner.config.token_lifetime);
        let signed = self.inner.audit.around(&caller, event, async |note| {
            let signed = self.inner.keys.sign_jwt(tenant, TYP, &claims, lifetime).await?;
            note.add("kid", signed.kid.as_str());
            Ok::<_, IssuerError>(signed)
        });
        let access_token = SecretString::from(signed.await?.jws);
        Ok(IssuedToken { access_token, expires_in: self.inner.config.token_lifetime.as_secs(), scope })
    }

    /// Checks a bearer token and says who calls. The rights are those that the token was given and
    /// the application still has.
    ///
    /// # Errors
    /// [`BearerError::Invalid`] for a bad token, [`BearerError::Unavailable`] if that cannot be told.
    pub async fn authenticate(&self, bearer: &str, request: RequestId) -> Result<Caller, BearerError> {
        if bearer.len() > TOKEN_MAX {
            return Err(BearerError::Invalid("too long"));
        }
        let now = self.inner.clock.now();
        let verified = match self.inner.clients.checked(bearer) {
            Some(verified) if verified.is_expired(now) => return Err(BearerError::Invalid("expired")),
            // Its key may have been revoked since.
            Some(verified) if !self.publishes(&verified.kid).await? => {
                return Err(BearerError::Invalid("unknown key"));
            }
            Some(verified) => verified,
            None => self.verify(bearer, now).await?,
        };
        let app = self.inner.clients.find(&self.inner.config.tenant, &verified.client).await;
        let app = app.map_err(|error| BearerError::Unavailable(error.into()))?;
        let app = app.ok_or(BearerError::Invalid("the application is gone"))?;
        let scopes = verified.scopes.iter().filter(|scope| app.info.scopes.contains(*scope)).collect();
        Ok(self.caller(Principal::Application(verified.client), scopes, request))
    }

    /// What verifiers of tokens are told: the keys, and what the issuer offers.
    ///
    /// # Errors
    /// If the tenant has no key yet and it cannot be made now.
    pub async fn published(&self) -> Result<Published, IssuerError> {
        let Config { issuer, tenant, .. } = &self.inner.config;
        let Jwks { keys, max_age } = self.inner.keys.jwks(tenant).await?;
        Ok(Published { issuer: issuer.clone(), keys, max_age })
    }

    /// Whether a key is among the published ones now.
    async fn publishes(&self, kid: &str) -> Result<bool, BearerError> {
        let found = self.inner.keys.is_published(&self.inner.config.tenant, kid).await;
        found.map_err(|error| BearerError::Unavailable(error.into()))
    }

    async fn verify(&self, bearer: &str, now: Timestamp) -> Result<verify::Verified, BearerError> {
        let Config { issuer, tenant, .. } = &self.inner.config;
        let keys = self.inner.keys.public_keys(tenant).await;
        let keys = keys.map_err(|error| BearerError::Unavailable(error.into()))?;
        let expected = Expected { issuer, audience: &self.inner.api, now };
        let verified = verify::verify(bearer, &keys, &expected).map_err(BearerError::Invalid)?;
        self.inner.clients.remember(bearer, verified.clone());
        Ok(verified)
    }

    /// Decides what to issue; signs and records nothing. The client is authenticated before anything
    /// is said about its scopes.
    async fn grant(&self, request: &TokenRequest) -> Result<Grant, IssuerError> {
        if request.grant_type != "client_credentials" {
            return Err(IssuerError::UnsupportedGrantType);
        }
        let Inner { clients, keys, config, api, .. } = &*self.inner;
        let app =
            clients.authenticate(keys, &config.tenant, &request.client_id, &request.client_secret).await?;
        if app.info.kind != AppKind::Machine {
            return Err(IssuerError::UnsupportedGrantType);
        }
        let (scopes, scope) = granted(request.scope.as_deref(), app.info.scopes)?;
        // An empty parameter counts as an absent one (RFC 6749, section 3.1).
        match request.resource.as_deref() {
            None | Some("") => Ok(Grant { app, scopes, scope }),
            Some(resource) if resource == api => Ok(Grant { app, scopes, scope }),
            Some(_) => Err(IssuerError::InvalidTarget),
        }
    }

    /// RFC 9068, section 2.2.
    fn claims(&self, client: &ClientId, scope: &str, jti: &str, now: Timestamp) -> Value {
        let config = &self.inner.config;
        json!({
            "iss": config.issuer,
            "sub": client.as_str(),
            "client_id": client.as_str(),
            "aud": self.inner.api,
            "scope": scope,
            "iat": now.as_secs(),
            "exp": now.plus(config.token_lifetime).as_secs(),
            "jti": jti,
        })
    }

    async fn record_refusal(&self, action: Action, client: &str, id: &RequestId, error: &IssuerError) {
        // Only an id that exists is recorded: people paste secrets into the wrong field.
        let known = match ClientId::parse(client) {
            Ok(client) => self.inner.clients.find(&self.inner.config.tenant, &client).await.ok().flatten(),
            Err(_) => None,
        };
        let client = known.as_ref().map_or("unknown", |app| app.info.client_id.as_str());
        let event = Event::new(action, "application", client);
        let caller = self.caller(Principal::Anonymous, ScopeSet::NONE, id.clone());
        self.inner.refusals.record(&caller, event, error.audit_outcome());
    }

    fn caller(&self, principal: Principal, scopes: ScopeSet, request: RequestId) -> Caller {
        Caller { principal, tenant: self.inner.config.tenant.clone(), scopes, request }
    }
}

/// The scopes that were asked for, and what they are called in answer and token. An absent parameter and `all`
/// give all of the application's; who asks for `all` gets `all`, as clients of Logto insist on.
fn granted(asked: Option<&str>, of_app: ScopeSet) -> Result<(ScopeSet, String), IssuerError> {
    let scopes = match asked.map(str::trim) {
        Some(ALL_SCOPES) => return Ok((of_app, ALL_SCOPES.to_owned())),
        None | Some("") => of_app,
        Some(asked) => ScopeSet::parse(asked)
            .filter(|asked| of_app.contains_all(*asked))
            .ok_or(IssuerError::InvalidScope)?,
    };
    Ok((scopes, scopes.to_string()))
}

#[cfg(test)]
mod tests {
    use super::{IssuerError, granted};
    use crate::identity::{Scope, ScopeSet};

    #[test]
    fn scopes_are_granted_as_asked_and_never_beyond_the_application() {
        let of_app: ScopeSet = [Scope::SecretsMetadata, Scope::AuditRead].into_iter().collect();

        for all in [None, Some("")] {
            assert_eq!(granted(all, of_app).unwrap(), (of_app, "secrets:metadata audit:read".to_owned()));
        }
        assert_eq!(granted(Some("all"), of_app).unwrap(), (of_app, "all".to_owned()));
        assert_eq!(granted(Some("audit:read"), of_app).unwrap().1, "audit:read");
        for more in ["audit:read apps:admin", "all apps:admin", "nonsense", "AUDIT:READ"] {
            assert!(matches!(granted(Some(more), of_app), Err(IssuerError::InvalidScope)), "{more}");
        }
    }
}
