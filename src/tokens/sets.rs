//! Token sets as they are kept: what is sealed, what is told of it, and how one goes.

use std::borrow::Cow;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

use super::connectors::Definition;
use super::model::{Connection, Identity, TokenSetInfo};
use super::plan::{self, Phase};
use super::status::{SetFacts, Status, status};
use super::store::connectors as connector_store;
use super::store::sets::{self as store, Set};
use super::store::verifications::{self, Which};
use super::{Config, Tokens, TokensError};
use crate::audit::{Action, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::{Conn, DbError};
use crate::identity::{Caller, Scope};
use crate::ids::{ConnectorId, TenantId, TokenSetId, UserId};
use crate::upstream::{ExpiresIn, RevokeRequest, TokenAnswer};
use crate::vault::{Plain, SealedRecord};

/// How often it is looked whether a refresh has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Longest scope and token type that are kept, in bytes.
const TEXT_MAX: usize = 4096;

/// The plaintext of a set. Connector and account are repeated in it, so that a row cannot point its tokens to another
/// provider.
#[derive(Serialize, Deserialize)]
struct Payload<'a> {
    #[serde(borrow)]
    access_token: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    id_token: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    refresh_token: Option<Cow<'a, str>>,
    #[serde(borrow)]
    connector: Cow<'a, str>,
    #[serde(borrow)]
    identity: Cow<'a, str>,
    /// The origin to which the refresh token may be sent, and no other.
    #[serde(borrow)]
    sends_to: Cow<'a, str>,
    /// The origin at which it may be revoked, if that is another one.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    revokes_at: Option<Cow<'a, str>>,
}

/// Whose tokens they are, and where they may be sent.
pub(super) struct Bound<'a> {
    pub(super) connector: &'a ConnectorId,
    pub(super) identity: &'a str,
    pub(super) sends_to: String,
    pub(super) revokes_at: Option<String>,
}

impl<'a> Bound<'a> {
    pub(super) fn new(definition: &'a Definition, identity: &'a str) -> Self {
        let (sends_to, revokes_at) = (definition.sends_to(), definition.revokes_at());
        Self { connector: &definition.connector.id, identity, sends_to, revokes_at }
    }
}

/// Tokens that a provider has just given. Neither Clone nor Debug: it holds secrets.
pub(super) struct Brought {
    pub(super) access_token: SecretString,
    pub(super) refresh_token: Option<SecretString>,
    pub(super) id_token: Option<SecretString>,
    pub(super) scope: Option<String>,
    pub(super) token_type: Option<String>,
    pub(super) expires_at: Option<i64>,
    /// Before the request was sent.
    pub(super) issued_at: Timestamp,
}

impl Brought {
    /// What an answer to a request that began at `issued_at` says. The lifetime counts from then: what the answer
    /// took on its way is gone already.
    pub(super) fn new(answer: TokenAnswer, issued_at: Timestamp, config: &Config) -> Self {
        let TokenAnswer { access_token, refresh_token, id_token, token_type, scope, expires_in } = answer;
        let seconds = match expires_in {
            ExpiresIn::Absent => None,
            ExpiresIn::Seconds(seconds) => Some(seconds),
            ExpiresIn::Unreadable => Some(config.default_lifetime.as_secs()),
        };
        let at = |seconds| issued_at.as_secs().saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX));
        // A row takes any text but a zero byte, and nobody needs a long one.
        let shown = |text: Option<String>| {
            text.filter(|text| text.len() <= TEXT_MAX && !text.chars().any(char::is_control))
        };
        let (scope, token_type) = (shown(scope), shown(token_type));
        // Zero stands for "never" in the contract; what has no life left is not that.
        let expires_at = seconds.map(|seconds: u64| at(seconds.max(1)));
        Self { access_token, refresh_token, id_token, scope, token_type, expires_at, issued_at }
    }

    /// The bytes to seal, in memory of their exact size.
    pub(super) fn payload(
        &self,
        bound: &Bound<'_>,
        kept_refresh_token: Option<&SecretString>,
    ) -> Zeroizing<Vec<u8>> {
        fn shown(secret: &SecretString) -> Cow<'_, str> {
            Cow::Borrowed(secret.expose_secret())
        }
        let payload = Payload {
            access_token: shown(&self.access_token),
            id_token: self.id_token.as_ref().map(shown),
            refresh_token: self.refresh_token.as_ref().or(kept_refresh_token).map(shown),
            connector: Cow::Borrowed(bound.connector.as_str()),
            identity: Cow::Borrowed(bound.identity),
            sends_to: Cow::Borrowed(&bound.sends_to),
            revokes_at: bound.revokes_at.as_deref().map(Cow::Borrowed),
        };
        let len = |text: &Option<Cow<'_, str>>| text.as_ref().map_or(0, |text| text.len());
        let room = payload.access_token.len() + len(&payload.id_token) + len(&payload.refresh_token);
        // Escapes may double what is in quotes; growing would leave a copy behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(2 * room + 1024));
        // Writing to memory does not fail.
        let _ = serde_json::to_writer(&mut *bytes, &payload);
        bytes
    }
}

/// An opened set.
pub(super) struct Values(Plain);

impl Values {
    /// `None` if it is not what this program seals, or not of this connector and account.
    pub(super) fn new(plain: Plain, set: &Set) -> Option<Self> {
        let fits = |bytes: &[u8]| {
            serde_json::from_slice::<Payload<'_>>(bytes).is_ok_and(|payload| {
                payload.connector == set.connector.as_str() && payload.identity == set.identity_id
            })
        };
        plain.with(fits).then_some(Self(plain))
    }

    pub(super) fn with_access_token<T>(&self, read: impl FnOnce(&str) -> T) -> T {
        self.0.with(|bytes| {
            let payload: Option<Payload<'_>> = serde_json::from_slice(bytes).ok();
            // Checked when it was made.
            read(payload.as_ref().map_or("", |payload| &payload.access_token))
        })
    }

    /// Whether the connector sends tokens still to where these came from.
    pub(super) fn are_of(&self, definition: &Definition) -> bool {
        self.look(|payload| payload.sends_to == definition.sends_to())
    }

    /// Whether these may be revoked where the connector says.
    fn may_be_revoked(&self, definition: &Definition) -> bool {
        let revokes_at = definition.revokes_at();
        self.look(|payload| {
            payload.sends_to == definition.sends_to()
                && revokes_at
                    .is_none_or(|at| payload.revokes_at.as_deref() == Some(&at) || payload.sends_to == at)
        })
    }

    fn look(&self, is_so: impl FnOnce(&Payload<'_>) -> bool) -> bool {
        self.0.with(|bytes| serde_json::from_slice(bytes).is_ok_and(|payload| is_so(&payload)))
    }

    pub(super) fn refresh_token(&self) -> Option<SecretString> {
        self.0.with(|bytes| {
            let payload: Payload<'_> = serde_json::from_slice(bytes).ok()?;
            payload.refresh_token.map(|token| SecretString::from(token.as_ref().to_owned()))
        })
    }
}

/// Metadata as the API tells it.
pub(super) fn info(set: &Set, now: Timestamp) -> TokenSetInfo {
    let facts = SetFacts {
        expires_at: set.expires_at,
        needs_reauth: set.phase == Phase::NeedsReauth,
        has_refresh_token: set.has_refresh_token,
    };
    TokenSetInfo {
        id: set.id.clone(),
        user: set.user.clone(),
        family: set.connection.family,
        target: set.connection.target.clone(),
        connector: set.connector.clone(),
        issuer: set.issuer.clone(),
        identity_id: set.identity_id.clone(),
        has_refresh_token: set.has_refresh_token,
        scope: set.scope.clone(),
        token_type: set.token_type.clone(),
        expires_at: set.expires_at,
        created_at: set.created_at,
        updated_at: set.updated_at,
        status: status(true, Some(facts), now),
        next_refresh_at: set
            .refresh_at
            .filter(|_| set.phase != Phase::NeedsReauth)
            .map(|at| at.max(set.retry_at)),
        // An intent whose lease is over: nobody knows whether the provider has seen it.
        last_error: match set.phase {
            Phase::Refreshing if set.lease_until <= now => Some("uncertain".to_owned()),
            _ => set.last_error.clone(),
        },
        failures: set.failures,
    }
}

impl Tokens {
    /// What can be had of a connection's tokens: in the words of the contract, section 7.12.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn token_status(
        &self,
        tenant: &TenantId,
        connection: &Connection,
        set: Option<&TokenSetInfo>,
    ) -> Result<Status, TokensError> {
        if let Some(set) = set {
            return Ok(set.status);
        }
        let (tenant, family, target) = (tenant.clone(), connection.family, connection.target.clone());
        let look =
            move |conn: &mut Conn| connector_store::target_stores_tokens(conn, &tenant, family, &target);
        let stores_tokens = self.parts().db.read::<_, DbError, _>(look).await?;
        Ok(status(stores_tokens, None, self.now()))
    }
}

/// A set that a person has brought, sealed and ready to be stored with the rest of what happens.
pub(super) struct Ready {
    pub(super) set: Set,
    sealed: SealedRecord,
    before: Option<Set>,
}

impl Ready {
    /// Stores it; `false` if the set that it was made over is another one now, or its connector keeps none any more.
    pub(super) fn store(&self, conn: &mut Conn, tenant: &TenantId) -> Result<bool, DbError> {
        if !connector_store::stores_tokens(conn, tenant, &self.set.connector)? {
            return Ok(false);
        }
        if let Some(before) = self.before.as_ref().filter(|before| before.id != self.set.id) {
            store::delete(conn, tenant, before)?;
            return store::put(conn, tenant, &self.set, &self.sealed, None);
        }
        store::put(conn, tenant, &self.set, &self.sealed, self.before.as_ref())
    }
}

/// Sixteen levels and more of spread, from an id that is as good as random.
pub(super) fn jitter(id: &TokenSetId, version: u64) -> u8 {
    let mut sum = u8::try_from(version % 251).unwrap_or(0);
    for byte in id.as_str().bytes() {
        sum = sum.wrapping_mul(31).wrapping_add(byte);
    }
    sum
}

impl Tokens {
    /// Seals tokens that came by a person's sign-in, over what is there for that connection. Of the same account id,
    /// date, and what the provider left out stay (contract, section 2).
    pub(super) async fn ready(
        &self,
        caller: &Caller,
        definition: &Definition,
        identity: &Identity,
        brought: &Brought,
    ) -> Result<Ready, TokensError> {
        let (tenant, connection) = (&caller.tenant, identity.connection());
        let mut found = self.found_set(tenant, &identity.user, &connection).await?;
        // A refresh that goes on may bring the refresh token that is to be kept.
        let until = Instant::now() + self.parts().config.read_deadline;
        while brought.refresh_token.is_none()
            && found
                .as_ref()
                .is_some_and(|found| found.set.phase == Phase::Refreshing && !found.lease_is_over)
            && Instant::now() < until
        {
            sleep(LOOK_EVERY).await;
            found = self.found_set(tenant, &identity.user, &connection).await?;
        }
        let (before, sealed) = found.map_or((None, None), |found| (Some(found.set), found.sealed));
        let same = before.as_ref().filter(|set| {
            set.identity_id == identity.identity_id
                && set.issuer == identity.issuer
                && set.connector == definition.connector.id
        });
        let mut kept = None;
        if let (Some(set), Some(sealed), None) = (same, sealed, &brought.refresh_token)
            && set.has_refresh_token
            // What nobody can use any more is not kept as if it could.
            && set.phase != Phase::NeedsReauth
        {
            let place = store::place(tenant, &set.user, &connection, set.version);
            let plain = self.parts().vault.open_record(caller, &place, sealed).await?;
            kept = Values::new(plain, set).and_then(|values| values.refresh_token());
        }
        let now = self.now();
        let version = before.as_ref().map_or(1, |set| set.version + 1);
        let id = same.map_or_else(TokenSetId::generate, |set| set.id.clone());
        let has_refresh_token = brought.refresh_token.is_some() || kept.is_some();
        let set = Set {
            refresh_at: plan::refresh_at(
                brought.expires_at,
                brought.issued_at,
                has_refresh_token,
                definition.connector.refresh_ahead,
                jitter(&id, version),
            ),
            id,
            user: identity.user.clone(),
            connector: definition.connector.id.clone(),
            issuer: identity.issuer.clone(),
            identity_id: identity.identity_id.clone(),
            has_refresh_token,
            scope: brought.scope.clone().or_else(|| same.and_then(|set| set.scope.clone())),
            token_type: brought.token_type.clone().or_else(|| same.and_then(|set| set.token_type.clone())),
            expires_at: brought.expires_at,
            issued_at: now,
            version,
            phase: Phase::Idle,
            epoch: before.as_ref().map_or(0, |set| set.epoch + 1),
            lease_until: Timestamp::from_micros(0),
            spent: false,
            failures: 0,
            last_error: None,
            retry_at: Timestamp::from_micros(0),
            created_at: same.map_or(now, |set| set.created_at),
            updated_at: now,
            connection,
        };
        let place = store::place(tenant, &set.user, &set.connection, version);
        let payload = brought.payload(&Bound::new(definition, &set.identity_id), kept.as_ref());
        let sealed = self.parts().vault.seal_record(place, &payload).await?;
        Ok(Ready { set, sealed, before })
    }

    pub(super) async fn found_set(
        &self,
        tenant: &TenantId,
        user: &UserId,
        connection: &Connection,
    ) -> Result<Option<store::Found>, DbError> {
        let (tenant, user, connection, now) = (tenant.clone(), user.clone(), connection.clone(), self.now());
        let read = move |conn: &mut Conn| store::find_with_values(conn, &tenant, &user, &connection, now);
        self.parts().db.read(read).await
    }

    /// Deletes a token set by its id.
    ///
    /// # Errors
    /// [`TokensError::NotFound`].
    pub async fn delete_set(&self, caller: &Caller, id: &TokenSetId) -> Result<(), TokensError> {
        let event = Event::new(Action::TokenSetDelete, "token-set", id.as_str());
        self.audited(caller, Scope::TokenSetsAdmin, event, |_| async move {
            let (tenant, wanted) = (caller.tenant.clone(), id.clone());
            let find = move |conn: &mut Conn| store::find_by_id(conn, &tenant, &wanted);
            let found = self.parts().db.read::<_, DbError, _>(find).await?;
            let set = found.ok_or(TokensError::NotFound("secret"))?;
            // Local only, as the contract has it (section 7.4): the provider is not told.
            let (tenant, gone) = (caller.tenant.clone(), set);
            let work = move |conn: &mut Conn| {
                // What is parked would bring it back.
                let which = Which::OfUser(gone.user.clone(), Some(gone.connection.clone()));
                while verifications::purge(conn, &tenant, &which, 500)? == 500 {}
                store::delete(conn, &tenant, &gone)
            };
            let deleted = self.parts().db.write::<_, DbError, _>(work).await?;
            deleted.then_some(()).ok_or(TokensError::NotFound("secret"))
        })
        .await
    }

    /// Deletes all sets of a connector, some at a time. What a crash leaves of them, the upkeep deletes.
    pub(super) async fn delete_sets_of(
        &self,
        caller: &Caller,
        connector: &ConnectorId,
        why: &'static str,
    ) -> Result<(), TokensError> {
        loop {
            let (tenant, of) = (caller.tenant.clone(), connector.clone());
            let read = move |conn: &mut Conn| store::of_connector(conn, &tenant, &of, "", 200);
            let page = self.parts().db.read::<_, DbError, _>(read).await?;
            if page.is_empty() {
                return Ok(());
            }
            let mut grants = Vec::new();
            for set in &page {
                grants.extend(self.grant_of(caller, set).await);
            }
            let (tenant, gone) = (caller.tenant.clone(), page.clone());
            let work = move |conn: &mut Conn| {
                gone.iter().try_for_each(|set| store::delete(conn, &tenant, set).map(drop))
            };
            self.parts().db.write::<_, DbError, _>(work).await?;
            self.deleted(caller, page, grants, why);
        }
    }

    /// Records sets that went with something else, and has their grants revoked.
    pub(super) fn deleted(
        &self,
        caller: &Caller,
        gone: Vec<Set>,
        grants: Vec<RevokeRequest>,
        why: &'static str,
    ) {
        for set in gone {
            let event = Event::new(Action::TokenSetDelete, "token-set", set.id.as_str())
                .detail("user", set.user.as_str())
                .detail("target", set.connection.target.as_str())
                .detail("why", why);
            self.parts().audit.record_soon(caller, event, Outcome::Success);
        }
        self.revoke_soon(caller, grants);
    }

    /// What revokes a set at its provider, if its connector says where that is. Only to be had while the set is there.
    pub(super) async fn grant_of(&self, caller: &Caller, set: &Set) -> Option<RevokeRequest> {
        let definition = self.definition(caller, set.connection.family, &set.connector).await.ok()?;
        let wants = definition.settings.revocation_endpoint(definition.factory).is_some()
            || definition.connector.family == super::Family::Sso;
        // A connector that was moved leads to another provider, to which these tokens are not told.
        if !wants || set.issuer != definition.issuer() {
            return None;
        }
        let endpoint = self.endpoints(&definition).await.ok()?.revocation?;
        let found = self.found_set(&caller.tenant, &set.user, &set.connection).await.ok()??;
        let place = store::place(&caller.tenant, &set.user, &set.connection, found.set.version);
        let plain = self.parts().vault.open_record(caller, &place, found.sealed?).await.ok()?;
        let values = Values::new(plain, &found.set).filter(|values| values.may_be_revoked(&definition))?;
        let (token, token_type_hint) = match values.refresh_token() {
            Some(token) => (token, "refresh_token"),
            None => (SecretString::from(values.with_access_token(str::to_owned)), "access_token"),
        };
        Some(self.revocation(&definition, endpoint, token, token_type_hint))
    }

    pub(super) fn revocation(
        &self,
        definition: &Definition,
        endpoint: url::Url,
        token: SecretString,
        token_type_hint: &'static str,
    ) -> RevokeRequest {
        RevokeRequest {
            endpoint,
            client_id: definition.settings.client_id.clone(),
            client_secret: definition.settings.client_secret.clone(),
            auth: definition.client_auth(),
            token,
            token_type_hint,
            now: self.now(),
        }
    }

    pub(super) async fn grants_of_user(
        &self,
        caller: &Caller,
        user: &UserId,
    ) -> Result<Vec<RevokeRequest>, TokensError> {
        let (tenant, user) = (caller.tenant.clone(), user.clone());
        let read = move |conn: &mut Conn| store::of_user(conn, &tenant, &user);
        let mut grants = Vec::new();
        for set in self.parts().db.read::<_, DbError, _>(read).await? {
            grants.extend(self.grant_of(caller, &set).await);
        }
        Ok(grants)
    }

    /// Revokes grants at their providers (RFC 7009), behind the answer: best effort, one try, recorded.
    pub(super) fn revoke_soon(&self, caller: &Caller, grants: Vec<RevokeRequest>) {
        for grant in grants {
            let (tokens, caller) = (self.clone(), caller.clone());
            self.inner.background.spawn(async move {
                let _place = tokens.inner.revocations.acquire().await;
                let host = grant.endpoint.host_str().unwrap_or_default().to_owned();
                let event = Event::new(Action::TokenSetRevoke, "provider", host);
                let outcome = match tokens.refuse_in_quarantine().await {
                    // The grant may be in use elsewhere: this may be a copy.
                    Err(_) => Outcome::Denied("quarantined"),
                    Ok(()) => match tokens.parts().upstream.revoke(grant).await {
                        Ok(()) => Outcome::Success,
                        Err(failure) => Outcome::Failure(super::fault_of(&failure).name()),
                    },
                };
                tokens.parts().audit.record_soon(&caller, event, outcome);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brought(expires_in: ExpiresIn) -> Brought {
        let answer = TokenAnswer {
            access_token: SecretString::from("a\"t".to_owned()),
            refresh_token: None,
            id_token: None,
            token_type: None,
            scope: None,
            expires_in,
        };
        Brought::new(answer, Timestamp::from_micros(5_900_000), &Config::default())
    }

    #[test]
    fn a_lifetime_counts_from_before_the_request_and_is_never_endless_by_mistake() {
        assert_eq!(brought(ExpiresIn::Absent).expires_at, None);
        assert_eq!(brought(ExpiresIn::Seconds(10)).expires_at, Some(15));
        assert_eq!(brought(ExpiresIn::Seconds(0)).expires_at, Some(6));
        assert_eq!(brought(ExpiresIn::Seconds(u64::MAX)).expires_at, Some(i64::MAX));
        assert_eq!(brought(ExpiresIn::Unreadable).expires_at, Some(3605));
    }

    #[test]
    fn a_payload_says_whose_it_is_and_keeps_the_old_refresh_token() {
        let connector = ConnectorId::generate();
        let kept = SecretString::from("rt".to_owned());
        let sends_to = "https://idp.example".to_owned();
        let bound = Bound { connector: &connector, identity: "sub", sends_to, revokes_at: None };
        let bytes = brought(ExpiresIn::Absent).payload(&bound, Some(&kept));
        let payload: Payload<'_> = serde_json::from_slice(&bytes).unwrap();

        assert_eq!(payload.access_token, "a\"t");
        assert_eq!(payload.refresh_token.as_deref(), Some("rt"));
        assert_eq!((payload.connector.as_ref(), payload.identity.as_ref()), (connector.as_str(), "sub"));
    }
}
