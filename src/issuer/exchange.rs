//! Token exchange (RFC 8693): a subject token for a user's opaque token, and a user's token for the token that the
//! user has at another provider.
//!
//! What a request asks for is decided in [`Wanted::read`], purely and after the client was authenticated. A
//! subject token is used up in the transaction that stores what it was exchanged for.

use secrecy::{ExposeSecret, SecretString};

use crate::audit::{Action, AuditCode, Event, Outcome};
use crate::db::DbError;
use crate::identity::{Principal, Scope, ScopeSet, UserCaller, UserScope, UserScopes};
use crate::ids::{ClientId, RequestId};
use crate::issuer::store::user_tokens as store;
use crate::issuer::user_tokens::{Mold, Row, Standing, told};
use crate::issuer::{
    BearerError, ExchangeGrant, ExchangeRequest, Exchanged, IssuedToken, Issuer, IssuerError,
};
use crate::tokens::Release;

/// RFC 8693, section 2.1.
pub(super) const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const FEDERATED_EXCHANGE: &str =
    "urn:auth0:params:oauth:grant-type:token-exchange:federated-connection-access-token";
/// RFC 8693, section 3.
pub(super) const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
/// Logto's.
const IMPERSONATION: &str = "urn:logto:token-type:impersonation_token";
const THIRD_PARTY: &str = "urn:lacre:params:oauth:token-type:third-party-access-token";
/// Auth0's name for the same.
const FEDERATED: &str = "http://auth0.com/oauth/token-type/federated-connection-access-token";

const REASON: &str = "token exchange";

impl ExchangeGrant {
    /// The exchange of that `grant_type`; `None` if it is another grant.
    pub fn parse(grant_type: &str) -> Option<Self> {
        match grant_type {
            TOKEN_EXCHANGE => Some(Self::Standard),
            FEDERATED_EXCHANGE => Some(Self::Federated),
            _ => None,
        }
    }
}

impl IssuedToken {
    /// Its `issued_token_type`, where it was exchanged for another one.
    pub const EXCHANGED_TYPE: &str = ACCESS_TOKEN;
}

/// What a well-formed request asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// A user's token for a subject token.
    User(UserScopes),
    /// A provider's token for a user's token.
    ThirdParty { connection: String, kind: &'static str },
}

impl Wanted {
    fn read(request: &ExchangeRequest) -> Result<Self, IssuerError> {
        if request.has_actor {
            return Err(invalid("actor_token", "delegation is not offered"));
        }
        // Neither users' JWTs nor a provider's resources can be asked for.
        if request.resource.is_some() {
            return Err(IssuerError::InvalidTarget);
        }
        match (request.subject_token_type.as_deref(), request.grant) {
            (None, _) => Err(invalid("subject_token_type", "is needed")),
            (Some(IMPERSONATION), ExchangeGrant::Standard) => Self::user(request),
            (Some(ACCESS_TOKEN), _) => Self::third_party(request),
            (Some(_), _) => Err(invalid("subject_token_type", "is not offered")),
        }
    }

    fn user(request: &ExchangeRequest) -> Result<Self, IssuerError> {
        if request.requested_token_type.as_deref().is_some_and(|kind| kind != ACCESS_TOKEN) {
            return Err(invalid("requested_token_type", "is not offered for this subject_token_type"));
        }
        if request.audience.is_some() || request.connection.is_some() {
            return Err(IssuerError::InvalidTarget);
        }
        // A token that is good for nothing is a mistake worth telling.
        match UserScopes::parse(request.scope.as_deref().unwrap_or("")) {
            none if none == UserScopes::default() => Err(IssuerError::InvalidScope),
            scopes => Ok(Self::User(scopes)),
        }
    }

    fn third_party(request: &ExchangeRequest) -> Result<Self, IssuerError> {
        let kind = match (request.requested_token_type.as_deref(), request.grant) {
            (Some(THIRD_PARTY), _) => THIRD_PARTY,
            (Some(FEDERATED), _) | (None, ExchangeGrant::Federated) => FEDERATED,
            (None, ExchangeGrant::Standard) => return Err(invalid("requested_token_type", "is needed")),
            (Some(_), _) => return Err(invalid("requested_token_type", "is not offered")),
        };
        let connection = match (&request.connection, &request.audience) {
            (Some(one), Some(other)) if one != other => {
                return Err(invalid("audience", "differs from connection"));
            }
            (Some(name), _) | (None, Some(name)) => name.clone(),
            (None, None) => return Err(invalid("connection", "is needed")),
        };
        Ok(Self::ThirdParty { connection, kind })
    }
}

/// A request that may go on: everything it brought was checked.
struct Admitted {
    client: ClientId,
    /// Of the application.
    scopes: ScopeSet,
    trade: Trade,
}

enum Trade {
    Impersonation { standing: Standing, used: Row, scopes: UserScopes },
    ThirdParty { user: UserCaller, connection: String, kind: &'static str },
}

impl Issuer {
    /// The token endpoint's other grant: authenticates the client, checks the token that it brings, records,
    /// and trades it.
    ///
    /// # Errors
    /// The errors of RFC 6749, section 5.2, and RFC 8693, section 2.2.2, each recorded as a refusal; else what
    /// kept the token from being made or released.
    pub async fn exchange(&self, request: ExchangeRequest, id: &RequestId) -> Result<Exchanged, IssuerError> {
        let Admitted { client, scopes, trade } = match self.admit_exchange(&request, id).await {
            Ok(admitted) => admitted,
            Err(error) => {
                self.record_refusal(Action::TokenExchange, &request.client_id, id, &error).await;
                return Err(error);
            }
        };
        match trade {
            Trade::Impersonation { standing, used, scopes } => {
                self.impersonate(client, (standing, used), scopes, id).await.map(Exchanged::User)
            }
            Trade::ThirdParty { user, connection, kind } => {
                let scopes = scopes.iter().filter(|scope| *scope == Scope::TokenSetsExchange).collect();
                let caller = self.caller(Principal::Application(client), scopes, id.clone());
                let reason = request.reason.unwrap_or_else(|| REASON.to_owned());
                let release = Release { scope: Scope::TokenSetsExchange, via: "exchange", reason };
                let found =
                    self.inner.tokens.access_token_for(&caller, &user.user, &connection, release).await;
                // Whose token it was; the release itself was recorded before it was done.
                let event = Event::new(Action::TokenExchange, "user", user.user.as_str())
                    .detail("kind", "third-party")
                    .detail("subject_client", user.client.as_str());
                let (event, outcome) = match &found {
                    // Only a name that exists is recorded: people paste secrets into the wrong field.
                    Ok(_) => (event.detail("connection", connection), Outcome::Success),
                    Err(error) => (event, error.audit_outcome()),
                };
                self.inner.audit.record_soon(&caller, event, outcome);
                Ok(Exchanged::ThirdParty { released: found?, kind })
            }
        }
    }

    /// Decides; changes nothing. The client is authenticated before anything is said about its request.
    async fn admit_exchange(
        &self,
        request: &ExchangeRequest,
        id: &RequestId,
    ) -> Result<Admitted, IssuerError> {
        let (clients, tenant) = (&self.inner.clients, &self.inner.config.tenant);
        let (client, secret) = (&request.client_id, &request.client_secret);
        let app = clients.authenticate(&self.inner.keys, tenant, client, secret).await?;
        if !app.info.allow_token_exchange {
            return Err(IssuerError::UnauthorizedClient);
        }
        let wanted = Wanted::read(request)?;
        let token = request.subject_token.as_ref().map(SecretString::expose_secret);
        let token = token.ok_or_else(|| invalid("subject_token", "is needed"))?;
        let trade = match wanted {
            Wanted::User(scopes) => {
                let (standing, used) = self.subject(token, id).await.map_err(refused)?;
                Trade::Impersonation { standing, used, scopes }
            }
            Wanted::ThirdParty { connection, kind } => {
                let user = self.authenticate_user(token, id.clone()).await.map_err(refused)?;
                if !user.scopes.contains(UserScope::Identities) {
                    return Err(IssuerError::InvalidGrant("the subject token lacks the scope `identities`"));
                }
                Trade::ThirdParty { user, connection, kind }
            }
        };
        Ok(Admitted { client: app.info.client_id.clone(), scopes: app.info.scopes, trade })
    }

    /// Uses up a subject token and stores the access token in one transaction: a crash leaves one of them.
    async fn impersonate(
        &self,
        client: ClientId,
        (standing, used): (Standing, Row),
        scopes: UserScopes,
        id: &RequestId,
    ) -> Result<IssuedToken, IssuerError> {
        let (tenant, lifetime) = (&self.inner.config.tenant, self.inner.config.token_lifetime);
        let caller = self.caller(Principal::Application(client.clone()), ScopeSet::NONE, id.clone());
        let event = Event::new(Action::TokenExchange, "user", standing.user.as_str())
            .detail("kind", "impersonation")
            .detail("scope", scopes.to_string())
            .detail("subject", told(&used.hash));
        let made = self.inner.audit.around(&caller, event, async |note| {
            let mold = Mold { user: &standing.user, client: Some(&client), scopes, lifetime };
            let minted = self.mint(tenant, mold).await?;
            note.add("token", told(&minted.row.hash));
            note.add("exp", (minted.row.expires_at / 1_000_000).to_string());
            let (tenant, row) = (tenant.clone(), minted.row);
            let trade = move |conn: &mut _| store::exchange(conn, &tenant, &used, &row);
            match self.inner.db.write::<_, DbError, _>(trade).await? {
                true => Ok(minted.token),
                false => Err(NOT_ACCEPTED),
            }
        });
        Ok(IssuedToken {
            access_token: made.await?,
            expires_in: lifetime.as_secs(),
            scope: scopes.to_string(),
        })
    }
}

/// One text for every reason.
const NOT_ACCEPTED: IssuerError = IssuerError::InvalidGrant("the subject token is not accepted");

fn refused(error: BearerError) -> IssuerError {
    match error {
        BearerError::Invalid(reason) => {
            tracing::debug!(reason, "subject token refused");
            NOT_ACCEPTED
        }
        BearerError::Unavailable(error) => error,
    }
}

fn invalid(field: &'static str, reason: &str) -> IssuerError {
    IssuerError::Invalid { field, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request of `name=value` pairs.
    fn request(pairs: &str) -> ExchangeRequest {
        let mut request = ExchangeRequest::default();
        for (name, value) in pairs.split_whitespace().filter_map(|pair| pair.split_once('=')) {
            let text = Some(value.to_owned());
            match name {
                "grant" => request.grant = ExchangeGrant::parse(value).unwrap(),
                "type" => request.subject_token_type = text,
                "want" => request.requested_token_type = text,
                "actor" => request.has_actor = true,
                "scope" => request.scope = Some(value.replace('+', " ")),
                "resource" => request.resource = text,
                "audience" => request.audience = text,
                "connection" => request.connection = text,
                _ => panic!("{name}"),
            }
        }
        request
    }

    /// What is wanted, or the code of the refusal with the member that it names.
    fn read(pairs: &str) -> String {
        match Wanted::read(&request(pairs)) {
            Ok(Wanted::User(scopes)) => format!("user {scopes}"),
            Ok(Wanted::ThirdParty { connection, kind }) => format!("{connection} {kind}"),
            Err(IssuerError::Invalid { field, .. }) => format!("invalid {field}"),
            Err(error) => error.audit_code().to_owned(),
        }
    }

    #[test]
    fn a_subject_token_brings_a_users_token_with_the_known_scopes() {
        for (rest, wanted) in [
            ("scope=openid+identities", "user openid identities"),
            ("scope=identities+openid+email+offline_access", "user openid identities"),
            ("scope=openid want=urn:ietf:params:oauth:token-type:access_token", "user openid"),
            ("scope=openid want=urn:ietf:params:oauth:token-type:jwt", "invalid requested_token_type"),
            ("scope=all", "invalid-scope"),
            ("", "invalid-scope"),
            ("scope=openid resource=https://default.lacre.local/api", "invalid-target"),
            ("scope=openid audience=github", "invalid-target"),
            ("scope=openid connection=github", "invalid-target"),
            ("scope=openid actor=1", "invalid actor_token"),
            (&format!("scope=openid grant={FEDERATED_EXCHANGE}"), "invalid subject_token_type"),
        ] {
            assert_eq!(read(&format!("type={IMPERSONATION} {rest}")), wanted, "{rest}");
        }
    }

    #[test]
    fn a_users_token_brings_a_providers_token() {
        let ours = format!("github {THIRD_PARTY}");
        let theirs = format!("github {FEDERATED}");
        for (rest, wanted) in [
            (format!("want={THIRD_PARTY} connection=github"), ours.as_str()),
            (format!("want={THIRD_PARTY} audience=github"), &ours),
            (format!("want={THIRD_PARTY} audience=github connection=github scope=x"), &ours),
            (format!("want={FEDERATED} connection=github"), &theirs),
            (format!("want={FEDERATED} connection=github grant={FEDERATED_EXCHANGE}"), &theirs),
            (format!("connection=github grant={FEDERATED_EXCHANGE}"), &theirs),
            (format!("want={THIRD_PARTY} audience=a connection=b"), "invalid audience"),
            (format!("want={THIRD_PARTY}"), "invalid connection"),
            ("connection=github".to_owned(), "invalid requested_token_type"),
            (format!("want={ACCESS_TOKEN} connection=github"), "invalid requested_token_type"),
            (format!("want={THIRD_PARTY} connection=github resource=https://a"), "invalid-target"),
        ] {
            assert_eq!(read(&format!("type={ACCESS_TOKEN} {rest}")), wanted, "{rest}");
        }
    }

    #[test]
    fn other_tokens_are_not_exchanged() {
        assert_eq!(read(""), "invalid subject_token_type");
        for kind in ["refresh_token", "id_token", "jwt", "saml2"] {
            let pairs = format!("type=urn:ietf:params:oauth:token-type:{kind} scope=openid");
            assert_eq!(read(&pairs), "invalid subject_token_type", "{kind}");
        }
    }

    #[test]
    fn the_grant_has_two_names() {
        assert_eq!(ExchangeGrant::parse(TOKEN_EXCHANGE), Some(ExchangeGrant::Standard));
        assert_eq!(ExchangeGrant::parse(FEDERATED_EXCHANGE), Some(ExchangeGrant::Federated));
        assert_eq!(ExchangeGrant::parse("client_credentials"), None);
    }
}
