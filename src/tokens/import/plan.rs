//! What each of Logto's rows becomes. Pure: a row in, something of ours or a reason out.

use std::collections::{HashMap, HashSet};

use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::report::{Kind, Skip, Told};
use crate::clock::Timestamp;
use crate::ids::{ConnectorId, IdentityId, TokenSetId, UserId};
use crate::tokens::connectors::{destinations, factory, target_of};
use crate::tokens::identities::check_account;
use crate::tokens::logto_format::{Kek, TokenSet};
use crate::tokens::model::{Connection, Connector, Family, Identity, Shown, User};
use crate::tokens::plan::{self, Phase};
use crate::tokens::sets::{Bound, Brought, jitter};
use crate::tokens::store::logto::{ConnectorRow, SecretRow, SsoIdentityRow, UserRow};
use crate::tokens::store::sets::Set;
use crate::tokens::store::users::Account;
use crate::tokens::{TokensError, password, users};

/// The one type of secrets that there is (contract, section 6.3).
pub(super) const TOKEN_SET: &str = "federated_token_set";

const BAD_ID: &str = "its id has a form that is not taken";
pub(super) const NO_USER: &str = "its user is not imported";
pub(super) const NOT_LINKED: &str = "its user has no such identity";
const NO_CONNECTOR: &str = "its connector is not there";

/// The connectors that are there, or come with this import.
pub(super) type Connectors = HashMap<ConnectorId, Connector>;

/// A connector to be checked and sealed with that configuration.
pub(super) fn connector(
    row: ConnectorRow,
    family: Family,
    now: Timestamp,
) -> Result<(Connector, Value), Skip> {
    let Some(factory) = factory(family, &row.factory) else {
        // E-mail and SMS are among them, and providers that Lacre does not know; none of these has tokens.
        let reason = "Lacre has no such kind of connector";
        return Err(if row.stores_tokens { Skip::loss(reason) } else { Skip::by_design(reason) });
    };
    let id = ConnectorId::parse(&row.id).map_err(|_| Skip::loss(BAD_ID))?;
    let metadata = json(&row.metadata, "metadata")?;
    let config = json(&row.config, "config")?;
    let connector = Connector {
        target: target_of(factory, family, &id, &metadata).map_err(|error| refused(&error))?,
        id,
        family,
        factory: row.factory,
        shown: Shown {
            config: Value::Null,
            metadata,
            sync_profile: row.sync_profile,
            connector_name: row.name,
            domains: json(&row.domains, "domains")?,
            branding: json(&row.branding, "branding")?,
        },
        stores_tokens: row.stores_tokens,
        refresh_ahead: 0,
        breaker: None,
        created_at: Timestamp::from_micros(row.created_at),
        updated_at: now,
    };
    Ok((connector, config))
}

/// What the program's own rules say, without the values: these errors have none.
pub(super) fn refused(error: &TokensError) -> Skip {
    Skip::loss(error.to_string())
}

fn json(text: &str, member: &'static str) -> Result<Value, Skip> {
    serde_json::from_str(text).map_err(|_| Skip::loss(format!("{member}: is not JSON")))
}

/// A user with what belongs to it.
pub(super) struct Person {
    pub(super) account: Account,
    /// Social ones first.
    pub(super) identities: Vec<Identity>,
    /// What stays behind of it.
    pub(super) told: Vec<Told>,
}

/// A user and the identities. A name or picture that is not taken is left out, because no one is known by it.
pub(super) fn person(
    row: UserRow,
    sso: &[SsoIdentityRow],
    connectors: &Connectors,
    now: Timestamp,
) -> Result<Person, Skip> {
    let id = UserId::parse(&row.id).map_err(|_| Skip::loss(BAD_ID))?;
    let mut told = Vec::new();
    let mut user = User {
        id: id.clone(),
        username: some(row.username),
        primary_email: some(row.primary_email),
        primary_phone: some(row.primary_phone),
        name: some(row.name),
        avatar: some(row.avatar),
        profile: json(&row.profile, "profile")?,
        custom_data: json(&row.custom_data, "customData")?,
        has_password: false,
        is_suspended: row.is_suspended,
        created_at: Timestamp::from_micros(row.created_at),
        updated_at: now,
    };
    while let Err(error) = users::check(&user) {
        match &error {
            TokensError::Invalid { field, .. } if field == "name" => user.name = None,
            TokensError::Invalid { field, .. } if field == "avatar" => user.avatar = None,
            error => return Err(refused(error)),
        }
    }
    let mut password_hash = some(row.password);
    if password_hash.as_deref().is_some_and(|hash| !password::is_usable(hash)) {
        let method = row.password_method.as_deref().unwrap_or("an unknown method");
        let reason = format!("its hash is made with {method}, not with Argon2");
        told.push(Told::new(Kind::Passwords, id.as_str(), Skip::loss(reason)));
        password_hash = None;
    }
    user.has_password = password_hash.is_some();
    let created_at = user.created_at;
    let mut identities = Vec::new();
    let mut take = |kind, id: &str, found: Result<Identity, Skip>| match found {
        Ok(identity) => identities.push(identity),
        Err(skip) => told.push(Told::new(kind, id, skip)),
    };
    for (target, account) in object(&row.identities, "identities")? {
        let label = format!("{id}/{target}");
        take(Kind::Identities, &label, social_identity(&id, &target, account, created_at));
    }
    for row in sso.iter().filter(|row| row.user_id == id.as_str()) {
        take(Kind::SsoIdentities, &row.id, sso_identity(&id, row, connectors));
    }
    Ok(Person { account: Account { user, password_hash }, identities, told })
}

fn some(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

fn object(text: &str, member: &'static str) -> Result<Map<String, Value>, Skip> {
    match json(text, member)? {
        Value::Object(members) => Ok(members),
        _ => Err(Skip::loss(format!("{member}: must be an object"))),
    }
}

/// Logto does not know when it was linked: not before the user was made.
fn social_identity(user: &UserId, target: &str, account: Value, at: Timestamp) -> Result<Identity, Skip> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Account {
        user_id: String,
        details: Option<Value>,
    }
    let Account { user_id, details } =
        serde_json::from_value(account).map_err(|_| Skip::loss("userId: must be a text"))?;
    let connection = Connection::parse(Family::Social, target);
    let connection = connection.ok_or_else(|| Skip::loss("target: has a form that is not taken"))?;
    let details = details.filter(|details| !details.is_null()).unwrap_or_else(|| Value::Object(Map::new()));
    check_account(&user_id, Some(&details)).map_err(|error| refused(&error))?;
    Ok(Identity {
        user: user.clone(),
        family: Family::Social,
        target: connection.target,
        id: IdentityId::generate(),
        issuer: None,
        identity_id: user_id,
        details,
        created_at: at,
        updated_at: at,
    })
}

fn sso_identity(user: &UserId, row: &SsoIdentityRow, connectors: &Connectors) -> Result<Identity, Skip> {
    let connector = ConnectorId::parse(&row.connector_id).map_err(|_| Skip::loss(NO_CONNECTOR))?;
    // Why the connector is not there was told with it; without one the identity is nothing (section 6.2).
    if connectors.get(&connector).is_none_or(|found| found.family != Family::Sso) {
        return Err(Skip::by_design(NO_CONNECTOR));
    }
    let details = json(&row.detail, "detail")?;
    check_account(&row.identity_id, Some(&details)).map_err(|error| refused(&error))?;
    Ok(Identity {
        user: user.clone(),
        family: Family::Sso,
        target: connector.into(),
        id: IdentityId::parse(&row.id).map_err(|_| Skip::loss(BAD_ID))?,
        issuer: Some(row.issuer.clone()),
        identity_id: row.identity_id.clone(),
        details,
        created_at: Timestamp::from_micros(row.created_at),
        updated_at: Timestamp::from_micros(row.updated_at),
    })
}

/// Whether a secret is a token set, and which.
pub(super) fn set_id(row: &SecretRow) -> Result<TokenSetId, Skip> {
    if row.kind != TOKEN_SET {
        return Err(Skip::by_design("secrets of that type are not known"));
    }
    TokenSetId::parse(&row.id).map_err(|_| Skip::loss(BAD_ID))
}

/// What a token set is kept by, and the bytes to seal.
pub(super) fn set(
    row: &SecretRow,
    kek: &Kek,
    connectors: &Connectors,
    missing_users: &HashSet<String>,
) -> Result<(Set, Zeroizing<Vec<u8>>), Skip> {
    let id = set_id(row)?;
    let user = UserId::parse(&row.user_id).ok().filter(|_| !missing_users.contains(&row.user_id));
    let user = user.ok_or_else(|| Skip::loss(NO_USER))?;
    let (connection, connector) = connection_of(row, connectors)?;
    let identity_id = row.identity_id.as_deref().filter(|_| row.is_linked);
    let identity_id = identity_id.ok_or_else(|| Skip::loss(NOT_LINKED))?;
    if !connector.stores_tokens {
        return Err(Skip::loss("its connector does not store tokens"));
    }
    let plain = kek.open(&row.encrypted_dek, &row.iv, &row.auth_tag, &row.ciphertext);
    let plain = plain.map_err(|_| Skip::loss("does not decrypt under the KEK"))?;
    let tokens = TokenSet::from_json(&plain).map_err(|_| Skip::loss("is not a token set inside"))?;
    let brought = brought(tokens, row)?;
    let has_refresh_token = brought.refresh_token.is_some();
    let destinations = destinations(connector);
    let (sends_to, revokes_at) =
        destinations.ok_or_else(|| Skip::loss("its connector has no configuration"))?;
    let bound = Bound { connector: &connector.id, identity: identity_id, sends_to, revokes_at };
    let payload = brought.payload(&bound, None);
    let Brought { scope, token_type, expires_at, issued_at, .. } = brought;
    let ahead = connector.refresh_ahead;
    let set = Set {
        refresh_at: plan::refresh_at(expires_at, issued_at, has_refresh_token, ahead, jitter(&id, 1)),
        id,
        user,
        connector: connector.id.clone(),
        issuer: row.issuer.clone().filter(|_| connection.family == Family::Sso),
        connection,
        identity_id: identity_id.to_owned(),
        has_refresh_token,
        scope,
        token_type,
        expires_at,
        issued_at,
        version: 1,
        phase: Phase::Idle,
        epoch: 0,
        lease_until: Timestamp::from_micros(0),
        spent: false,
        failures: 0,
        last_error: None,
        retry_at: Timestamp::from_micros(0),
        created_at: Timestamp::from_micros(row.created_at),
        updated_at: Timestamp::from_micros(row.updated_at),
    };
    Ok((set, payload))
}

fn connection_of<'a>(
    row: &SecretRow,
    connectors: &'a Connectors,
) -> Result<(Connection, &'a Connector), Skip> {
    let (family, id, target) = match (&row.social_connector, &row.sso_connector) {
        (Some(id), None) => (Family::Social, id, row.target.as_ref()),
        (None, Some(id)) => (Family::Sso, id, Some(id)),
        _ => return Err(Skip::loss("it is not related to one connector")),
    };
    let connector = ConnectorId::parse(id).ok().and_then(|id| connectors.get(&id));
    let connector = connector.ok_or_else(|| Skip::loss(NO_CONNECTOR))?;
    let connection = target.and_then(|target| Connection::parse(family, target));
    let fits = |found: &Connection| connector.family == family && connector.target == found.target;
    let connection = connection.filter(fits).ok_or_else(|| Skip::loss("its connector has another target"))?;
    Ok((connection, connector))
}

/// The tokens with what Logto says of them. When they were issued it does not say: at their last change.
fn brought(tokens: TokenSet, row: &SecretRow) -> Result<Brought, Skip> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        scope: Option<String>,
        token_type: Option<String>,
        expires_at: Option<i64>,
    }
    let metadata: Metadata =
        serde_json::from_str(&row.metadata).map_err(|_| Skip::loss("metadata: has another form"))?;
    let TokenSet { access_token, id_token, refresh_token } = tokens;
    if secrecy::ExposeSecret::expose_secret(&access_token).is_empty() {
        return Err(Skip::loss("has no access token"));
    }
    Ok(Brought {
        access_token,
        refresh_token,
        id_token,
        scope: metadata.scope,
        token_type: metadata.token_type,
        expires_at: metadata.expires_at,
        issued_at: Timestamp::from_micros(row.updated_at),
    })
}

/// What a private key is to Logto.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum KeyStatus {
    /// Published, not in use yet.
    Next,
    /// Signs.
    Current,
    /// Has signed what may be alive.
    Previous,
}

/// A private key of Logto's.
pub struct PrivateKey {
    /// Logto's id of it; not the `kid`.
    pub id: String,
    /// PKCS#8.
    pub pem: SecretString,
    /// What it is.
    pub status: KeyStatus,
}

/// The private keys in `oidc.privateKeys` (contract, section 9.1), Previous ones first: if one of them is refused,
/// nothing has taken over yet. Without statuses the first is Current. `None`: not such a list.
pub(super) fn private_keys(value: &str) -> Option<Vec<PrivateKey>> {
    #[derive(Deserialize)]
    struct Entry {
        id: String,
        value: SecretString,
        status: Option<KeyStatus>,
    }
    let entries: Vec<Entry> = serde_json::from_str(value).ok()?;
    let has_statuses = entries.iter().any(|entry| entry.status.is_some());
    let status_of = |at, status: Option<KeyStatus>| match status {
        Some(status) => status,
        None if at == 0 && !has_statuses => KeyStatus::Current,
        None => KeyStatus::Previous,
    };
    let keys = entries.into_iter().enumerate();
    let keys = keys.map(|(at, Entry { id, value, status })| PrivateKey {
        id,
        pem: value,
        status: status_of(at, status),
    });
    let mut keys: Vec<_> = keys.collect();
    keys.sort_by_key(|key| key.status == KeyStatus::Current);
    Some(keys)
}

/// How many cookie keys are in `oidc.cookieKeys`.
pub(super) fn cookie_keys(value: &str) -> Vec<String> {
    #[derive(Deserialize)]
    struct Entry {
        id: String,
    }
    serde_json::from_str::<Vec<Entry>>(value)
        .map_or_else(|_| Vec::new(), |keys| keys.into_iter().map(|key| key.id).collect())
}

#[cfg(test)]
mod tests;
