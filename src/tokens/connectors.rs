//! Connectors: how each provider is spoken to. Whatever decides anything, also whether tokens are kept, is in a
//! sealed definition; columns only repeat it. So an address that somebody changes in the database is never called.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;
use zeroize::Zeroizing;

use super::model::{Connector, ConnectorPatch, Family, NewConnector, Shown, is_target};
use super::providers::{self, AnswerFormat, AuthMethod, Factory, HmacAlg, Settings};
use super::store::{connectors as store, verifications};
use super::{Tokens, TokensError, invalid};
use crate::audit::{Action, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::{Conn, DbError};
use crate::identity::{Caller, Scope};
use crate::ids::{ConnectorId, TenantId};
use crate::upstream;
use crate::vault::VaultError;

/// Longest time before expiry that a refresh may be set to, in seconds.
const AHEAD_MAX: u64 = 86_400;

/// What is sealed of a connector.
#[derive(Serialize, Deserialize)]
struct Sealed {
    family: Family,
    factory: String,
    target: String,
    stores_tokens: bool,
    config: Value,
}

/// A connector that was opened and is what its columns say.
pub(super) struct Definition {
    pub(super) connector: Connector,
    pub(super) version: u64,
    pub(super) breaker_failures: u64,
    pub(super) factory: &'static Factory,
    pub(super) settings: Settings,
    config: Value,
}

/// Where a provider is reached.
pub(super) struct Endpoints {
    pub(super) authorization: String,
    pub(super) token: Url,
    pub(super) userinfo: Option<Url>,
    pub(super) jwks: Option<Url>,
    pub(super) revocation: Option<Url>,
    pub(super) issuer: Option<String>,
    pub(super) supports_pkce: bool,
    pub(super) promises_iss: bool,
}

impl Definition {
    /// A request to the token endpoint with the client's credentials.
    pub(super) fn token_request(
        &self,
        endpoint: &Url,
        params: Vec<(String, secrecy::SecretString)>,
        now: Timestamp,
    ) -> upstream::TokenRequest {
        let settings = &self.settings;
        upstream::TokenRequest {
            endpoint: endpoint.clone(),
            client_id: settings.client_id.clone(),
            client_secret: settings.client_secret.clone(),
            auth: self.client_auth(),
            params,
            extra: Vec::new(),
            format: match settings.format {
                AnswerFormat::Json => upstream::AnswerFormat::Json,
                AnswerFormat::QueryString => upstream::AnswerFormat::QueryString,
                AnswerFormat::Either => upstream::AnswerFormat::Either,
            },
            timeout: Settings::timeout(self.factory).map(std::time::Duration::from_secs),
            now,
        }
    }

    /// The origin that tokens are sent to: of the issuer, behind which all else is discovered, or of the token endpoint.
    pub(super) fn sends_to(&self) -> String {
        sends_to(self.connector.family, self.factory, &self.settings)
    }

    /// The origin that revocations are sent to, where that is configured or built in.
    pub(super) fn revokes_at(&self) -> Option<String> {
        revokes_at(self.factory, &self.settings)
    }

    pub(super) fn client_auth(&self) -> upstream::ClientAuth {
        match self.settings.auth_method {
            AuthMethod::Post => upstream::ClientAuth::Post,
            AuthMethod::Basic => upstream::ClientAuth::Basic,
            AuthMethod::BasicRaw => upstream::ClientAuth::BasicRaw,
            AuthMethod::None => upstream::ClientAuth::None,
            AuthMethod::SecretJwt => upstream::ClientAuth::SecretJwt(match self.settings.jwt_alg {
                HmacAlg::Hs256 => upstream::HmacAlg::Hs256,
                HmacAlg::Hs384 => upstream::HmacAlg::Hs384,
                HmacAlg::Hs512 => upstream::HmacAlg::Hs512,
            }),
        }
    }

    /// The issuer of an SSO identity; social connectors have none.
    pub(super) fn issuer(&self) -> Option<String> {
        let issuer = self.settings.issuer(self.factory).map(str::to_owned);
        issuer.filter(|_| self.connector.family == Family::Sso)
    }
}

pub(super) fn sends_to(family: Family, factory: &Factory, settings: &Settings) -> String {
    origin(match family {
        Family::Sso => settings.issuer(factory),
        Family::Social => settings.token_endpoint(factory),
    })
}

fn revokes_at(factory: &Factory, settings: &Settings) -> Option<String> {
    settings.revocation_endpoint(factory).map(|at| origin(Some(at)))
}

/// Both, by what is shown of a connector: for tokens that are sealed without a call. If somebody has altered that, they
/// are sent nowhere, because the definition says something else.
pub(super) fn destinations(connector: &Connector) -> Option<(String, Option<String>)> {
    let factory = factory(connector.family, &connector.factory)?;
    let settings = Settings::read(factory, &connector.shown.config).ok()?;
    Some((sends_to(connector.family, factory, &settings), revokes_at(factory, &settings)))
}

fn origin(address: Option<&str>) -> String {
    let url = address.and_then(|address| Url::parse(address).ok());
    url.map_or_else(String::new, |url| url.origin().ascii_serialization())
}

pub(super) fn factory(family: Family, id: &str) -> Option<&'static Factory> {
    match family {
        Family::Social => providers::social_factory(id),
        Family::Sso => providers::sso_provider(id),
    }
}

impl Tokens {
    /// Makes a connector. Its configuration is sealed, and masked wherever it is shown.
    ///
    /// # Errors
    /// [`TokensError::NotFound`] for an unknown factory, [`TokensError::Invalid`], [`TokensError::NoTokenStorage`],
    /// [`TokensError::Taken`] for id and target.
    pub async fn create_connector(
        &self,
        caller: &Caller,
        new: NewConnector,
    ) -> Result<Connector, TokensError> {
        let id = new.id.clone().unwrap_or_else(ConnectorId::generate);
        let event = Event::new(Action::ConnectorCreate, "connector", id.as_str())
            .detail("family", new.family.name())
            .detail("factory", cut(&new.factory));
        self.audited(caller, Scope::ConnectorsAdmin, event, |note| async move {
            let factory =
                factory(new.family, &new.factory).ok_or(TokensError::NotFound("connector factory"))?;
            let target = target_of(factory, new.family, &id, &new.metadata)?;
            note.add("target", target.as_str());
            let now = self.now();
            let connector = Connector {
                id,
                family: new.family,
                factory: new.factory,
                target,
                shown: Shown {
                    config: Value::Null,
                    metadata: new.metadata,
                    sync_profile: new.sync_profile,
                    connector_name: new.connector_name,
                    domains: new.domains,
                    branding: new.branding,
                },
                stores_tokens: new.stores_tokens,
                refresh_ahead: new.refresh_ahead,
                breaker: None,
                created_at: now,
                updated_at: now,
            };
            let (connector, sealed) = self.sealed(&caller.tenant, connector, &new.config, 1).await?;
            let (tenant, row) = (caller.tenant.clone(), connector.clone());
            let work = move |conn: &mut Conn| store::insert(conn, &tenant, &row, &sealed);
            match self.parts().db.write(work).await {
                Ok(()) => Ok(connector),
                Err(DbError::Duplicate) => {
                    let same_id = self.found(&caller.tenant, &connector.id).await?.is_some();
                    Err(TokensError::Taken(if same_id { "id" } else { "target" }))
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    /// Checks a configuration and seals it with what the connector's columns repeat.
    pub(super) async fn sealed(
        &self,
        tenant: &TenantId,
        mut connector: Connector,
        config: &Value,
        version: u64,
    ) -> Result<(Connector, crate::vault::SealedRecord), TokensError> {
        let factory = factory(connector.family, &connector.factory)
            .ok_or(TokensError::NotFound("connector factory"))?;
        if connector.stores_tokens && !factory.stores_tokens {
            return Err(TokensError::NoTokenStorage);
        }
        if connector.refresh_ahead > AHEAD_MAX {
            return Err(invalid("refreshAhead", format!("must be at most {AHEAD_MAX} seconds")));
        }
        let settings = Settings::read(factory, config)
            .map_err(|bad| invalid(format!("config.{}", bad.member), bad.rule))?;
        for (member, url) in settings.urls() {
            if self.parts().upstream.check_url(url).is_err() {
                let rule = "is not an address that may be called: https, an allowed port, no literal private address";
                return Err(invalid(format!("config.{member}"), rule));
            }
        }
        connector.shown.config = providers::masked(config);
        let sealed = Sealed {
            family: connector.family,
            factory: connector.factory.clone(),
            target: connector.target.clone(),
            stores_tokens: connector.stores_tokens,
            config: config.clone(),
        };
        // Texts and JSON values always serialise.
        let bytes = Zeroizing::new(serde_json::to_vec(&sealed).unwrap_or_default());
        let place = store::place(tenant, &connector.id, version);
        let sealed = self.parts().vault.seal_record(place, &bytes).await;
        let sealed = sealed.map_err(|error| match error {
            VaultError::TooLarge { limit } => invalid("config", format!("must be at most {limit} bytes")),
            error => error.into(),
        })?;
        Ok((connector, sealed))
    }

    /// Changes a connector. Switching off its storage deletes what is stored, parked tokens too.
    ///
    /// # Errors
    /// As [`Tokens::create_connector`]; [`TokensError::NotFound`].
    pub async fn update_connector(
        &self,
        caller: &Caller,
        family: Family,
        id: &ConnectorId,
        patch: ConnectorPatch,
    ) -> Result<Connector, TokensError> {
        let event = Event::new(Action::ConnectorUpdate, "connector", id.as_str());
        let changed = self.audited(caller, Scope::ConnectorsAdmin, event, |note| async move {
            let before = self.definition(caller, family, id).await?;
            let mut connector = before.connector.clone();
            connector.updated_at = self.now();
            let config = match &patch.config {
                Some(config) => {
                    if let Some(member) = providers::would_move_secret(config, &before.config) {
                        let rule = "the client secret is needed again when the provider's address changes";
                        return Err(invalid(format!("config.{member}"), rule));
                    }
                    providers::unmasked(config, &before.config)
                }
                None => before.config.clone(),
            };
            apply(&mut connector, patch);
            note.add("stores_tokens", connector.stores_tokens.to_string());
            let (connector, sealed) =
                self.sealed(&caller.tenant, connector, &config, before.version + 1).await?;
            let (tenant, row) = (caller.tenant.clone(), connector.clone());
            let work = move |conn: &mut Conn| {
                let done = store::update(conn, &tenant, &row, before.version, &sealed)?;
                if done && !row.stores_tokens {
                    let which = verifications::Which::OfConnector(row.id);
                    while verifications::purge(conn, &tenant, &which, 500)? == 500 {}
                }
                Ok::<_, DbError>(done)
            };
            if !self.parts().db.write(work).await? {
                return Err(TokensError::Busy);
            }
            Ok(connector)
        });
        let changed = changed.await?;
        if changed.stores_tokens {
            self.reschedule(&caller.tenant, &changed).await?;
        } else {
            self.delete_sets_of(caller, id, "storage-off").await?;
        }
        Ok(changed)
    }

    /// The tenant's connectors, secrets masked.
    ///
    /// # Errors
    /// [`TokensError::Forbidden`] without `connectors:admin`.
    pub async fn connectors(
        &self,
        caller: &Caller,
        family: Family,
        target: Option<&str>,
    ) -> Result<Vec<Connector>, TokensError> {
        self.may(caller, Scope::ConnectorsAdmin, Action::ConnectorRead)?;
        let tenant = caller.tenant.clone();
        let found = self.parts().db.read::<_, DbError, _>(move |conn| store::list(conn, &tenant, family));
        let mut found = found.await?;
        found.retain(|connector| target.is_none_or(|target| connector.target == target));
        Ok(found)
    }

    /// One connector, secrets masked.
    ///
    /// # Errors
    /// [`TokensError::NotFound`].
    pub async fn connector(
        &self,
        caller: &Caller,
        family: Family,
        id: &ConnectorId,
    ) -> Result<Connector, TokensError> {
        self.may(caller, Scope::ConnectorsAdmin, Action::ConnectorRead)?;
        let found = self.found(&caller.tenant, id).await?;
        let found = found.filter(|found| found.connector.family == family);
        found.map(|found| found.connector).ok_or(TokensError::NotFound("connector"))
    }

    /// Deletes a connector with the token sets that came from it; identities of SSO go too, as in Logto.
    ///
    /// # Errors
    /// [`TokensError::NotFound`].
    pub async fn delete_connector(
        &self,
        caller: &Caller,
        family: Family,
        id: &ConnectorId,
    ) -> Result<(), TokensError> {
        let event = Event::new(Action::ConnectorDelete, "connector", id.as_str());
        self.audited(caller, Scope::ConnectorsAdmin, event, |_| async move {
            let found = self.found(&caller.tenant, id).await?;
            if found.is_none_or(|found| found.connector.family != family) {
                return Err(TokensError::NotFound("connector"));
            }
            // Its sets first: while the connector is there, they can be revoked at the provider.
            self.delete_sets_of(caller, id, "connector-deleted").await?;
            let (tenant, gone) = (caller.tenant.clone(), id.clone());
            let work = move |conn: &mut Conn| {
                let which = verifications::Which::OfConnector(gone.clone());
                while verifications::purge(conn, &tenant, &which, 500)? == 500 {}
                if family == Family::Sso {
                    super::store::users::delete_sso_identities(conn, &tenant, &gone)?;
                }
                store::delete(conn, &tenant, &gone)
            };
            let deleted = self.parts().db.write::<_, DbError, _>(work).await?;
            // What came in between the two.
            self.delete_sets_of(caller, id, "connector-deleted").await?;
            deleted.then_some(()).ok_or(TokensError::NotFound("connector"))
        })
        .await
    }

    async fn found(&self, tenant: &TenantId, id: &ConnectorId) -> Result<Option<store::Found>, DbError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.parts().db.read(move |conn| store::find(conn, &tenant, &id)).await
    }

    /// Opens a connector's definition.
    ///
    /// # Errors
    /// [`TokensError::NotFound`]; [`VaultError::Integrity`] if its row is not what was sealed.
    pub(super) async fn definition(
        &self,
        caller: &Caller,
        family: Family,
        id: &ConnectorId,
    ) -> Result<Definition, TokensError> {
        let found = self.found(&caller.tenant, id).await?;
        let found = found.filter(|found| found.connector.family == family);
        self.opened(caller, found.ok_or(TokensError::NotFound("connector"))?).await
    }

    async fn opened(&self, caller: &Caller, found: store::Found) -> Result<Definition, TokensError> {
        let store::Found { connector, version, breaker_failures, sealed } = found;
        let (vault, place) = (&self.parts().vault, store::place(&caller.tenant, &connector.id, version));
        let Some(sealed) = sealed else { return Err(vault.altered_at(caller, &place).await.into()) };
        let plain = vault.open_record(caller, &place, sealed).await?;
        let sealed: Option<Sealed> = plain.with(|bytes| serde_json::from_slice(bytes).ok());
        let is_same = |sealed: &Sealed| {
            sealed.family == connector.family
                && sealed.factory == connector.factory
                && sealed.target == connector.target
                && sealed.stores_tokens == connector.stores_tokens
        };
        let Some(sealed) = sealed.filter(is_same) else {
            return Err(vault.altered_at(caller, &place).await.into());
        };
        let known = factory(sealed.family, &sealed.factory);
        let factory = known.ok_or(TokensError::NotFound("connector factory"))?;
        let settings = Settings::read(factory, &sealed.config)
            .map_err(|bad| invalid(format!("config.{}", bad.member), bad.rule))?;
        Ok(Definition { connector, version, breaker_failures, factory, settings, config: sealed.config })
    }

    /// Where a connector's provider is reached: configured, built in, or discovered.
    pub(super) async fn endpoints(
        &self,
        definition: &Definition,
    ) -> Result<Endpoints, upstream::TokenFailure> {
        let Definition { settings, factory, .. } = definition;
        let upstream = &self.parts().upstream;
        let url = |text: &str| upstream.check_url(text).map_err(|_| unusable("blocked"));
        let optional = |text: Option<&str>| text.map(url).transpose();
        if definition.connector.family == Family::Sso {
            let issuer = settings.issuer(factory).unwrap_or_default();
            let found = upstream.discover(issuer, trusted_hosts(factory)).await?;
            let configured = optional(settings.revocation_endpoint(factory))?;
            return Ok(Endpoints {
                authorization: found.authorization_endpoint.to_string(),
                token: found.token_endpoint.clone(),
                userinfo: found.userinfo_endpoint.clone(),
                jwks: Some(found.jwks_uri.clone()),
                revocation: configured.or_else(|| found.revocation_endpoint.clone()),
                issuer: Some(found.issuer.clone()),
                supports_pkce: found.supports_pkce,
                promises_iss: found.promises_iss,
            });
        }
        let shown = settings.endpoints(factory);
        let token = settings.token_endpoint(factory).map(url).transpose()?;
        let (Some(shown), Some(token)) = (shown, token) else {
            return Err(unusable("no-endpoint"));
        };
        Ok(Endpoints {
            authorization: shown.authorization.to_owned(),
            token,
            userinfo: match settings.profile_source(factory) {
                Some(
                    providers::ProfileSource::UserInfo(at)
                    | providers::ProfileSource::IdTokenAndUserInfo(Some(at)),
                ) => Some(url(at)?),
                _ => None,
            },
            jwks: optional(settings.jwks_uri.as_deref())?,
            revocation: optional(settings.revocation_endpoint(factory))?,
            issuer: settings.issuer(factory).map(str::to_owned),
            supports_pkce: shown.supports_pkce,
            promises_iss: shown.promises_iss,
        })
    }

    /// Records, once, that a connector's provider refuses it, so that it is not asked for each of its users.
    pub(super) async fn trip(
        &self,
        caller: &Caller,
        definition: &Definition,
        until: Timestamp,
        reason: &'static str,
    ) {
        let (tenant, id) = (caller.tenant.clone(), definition.connector.id.clone());
        let (version, failures) = (definition.version, definition.breaker_failures.saturating_add(1));
        let open = move |conn: &mut Conn| {
            store::open_breaker(conn, &tenant, &id, version, (until, reason, failures))
        };
        match self.parts().db.write::<_, DbError, _>(open).await {
            Ok(true) => {
                tracing::error!(connector = %definition.connector.id, reason, "the provider refuses the connector");
                metrics::counter!("lacre_connector_breaker_total").increment(1);
                let event =
                    Event::new(Action::ConnectorBreaker, "connector", definition.connector.id.as_str())
                        .detail("until", until.to_rfc3339());
                self.parts().audit.record_soon(caller, event, Outcome::Failure(reason));
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the breaker of a connector could not be stored"),
        }
    }

    /// The provider has accepted the connector: its breaker is closed.
    pub(super) async fn untrip(&self, tenant: &TenantId, definition: &Definition) {
        if definition.connector.breaker.is_none() {
            return;
        }
        let (tenant, id) = (tenant.clone(), definition.connector.id.clone());
        let close = move |conn: &mut Conn| store::close_breaker(conn, &tenant, &id);
        if let Err(error) = self.parts().db.write::<_, DbError, _>(close).await {
            tracing::warn!(%error, "the breaker of a connector could not be closed");
        }
    }
}

/// A connector that cannot be used as it is.
pub(super) const fn unusable(reason: &'static str) -> upstream::TokenFailure {
    let class = upstream::Class::Config;
    upstream::TokenFailure { class, code: None, status: None, retry_after: None, reason, was_sent: false }
}

/// Hosts beside the issuer's own on which a provider is known to have endpoints.
fn trusted_hosts(factory: &Factory) -> &'static [&'static str] {
    match factory.provider {
        providers::Provider::SsoGoogleWorkspace => &["googleapis.com"],
        providers::Provider::SsoEntra => &["graph.microsoft.com", "login.microsoftonline.com"],
        _ => &[],
    }
}

/// What the connections of a new connector are called.
pub(super) fn target_of(
    factory: &Factory,
    family: Family,
    id: &ConnectorId,
    metadata: &Value,
) -> Result<String, TokensError> {
    let chosen = metadata.get("target").and_then(Value::as_str);
    let target = match (family, factory.target, chosen) {
        (Family::Sso, ..) => id.as_str(),
        (Family::Social, Some(fixed), _) => fixed,
        (Family::Social, None, Some(chosen)) => chosen,
        (Family::Social, None, None) => return Err(invalid("metadata.target", "Required")),
    };
    if is_target(target) {
        return Ok(target.to_owned());
    }
    Err(invalid("metadata.target", "must have 1 to 64 characters of A-Z a-z 0-9 . _ -"))
}

fn apply(connector: &mut Connector, patch: ConnectorPatch) {
    fn set<T>(place: &mut T, new: Option<T>) {
        if let Some(new) = new {
            *place = new;
        }
    }
    set(&mut connector.shown.metadata, patch.metadata);
    set(&mut connector.shown.sync_profile, patch.sync_profile);
    set(&mut connector.shown.connector_name, patch.connector_name);
    set(&mut connector.shown.domains, patch.domains);
    set(&mut connector.shown.branding, patch.branding);
    set(&mut connector.stores_tokens, patch.stores_tokens);
    set(&mut connector.refresh_ahead, patch.refresh_ahead);
}

/// A client's text, short enough for a record.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}
