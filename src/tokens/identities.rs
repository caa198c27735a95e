//! Accounts at other providers: linked, replaced, renewed and unlinked by the person, or by an administrator. The
//! tokens go wherever the account goes, in the same transaction.

use serde_json::{Map, Value, json};

use super::model::{Connection, Family, Identity, LinkAs, TokenSetInfo, User};
use super::read::Released;
use super::sets::{self, Ready, Values};
use super::store::sets as set_store;
use super::store::users as store;
use super::store::verifications::{self, Which};
use super::verification::Proven;
use super::{Tokens, TokensError, invalid};
use crate::audit::{Action, Event};
use crate::db::{Conn, DbError};
use crate::identity::{Caller, Scope, UserCaller, UserScope};
use crate::ids::{ConnectorId, IdentityId, TenantId, UserId};

/// How often a write is tried that a refresh overtakes.
const TRIES: u32 = 4;

impl Tokens {
    /// One identity of a user, with the metadata of its tokens if they are asked for.
    ///
    /// # Errors
    /// [`TokensError::NotFound`] for the user, [`TokensError::NoIdentity`].
    pub async fn identity(
        &self,
        caller: &Caller,
        user: &UserId,
        connection: &Connection,
        with_set: bool,
    ) -> Result<(Identity, Option<TokenSetInfo>), TokensError> {
        self.may_see(caller, with_set)?;
        let (tenant, user, wanted) = (caller.tenant.clone(), user.clone(), connection.clone());
        let read = move |conn: &mut Conn| {
            if store::find(conn, &tenant, &user)?.is_none() {
                return Ok(Err(TokensError::NotFound("user")));
            }
            let Some(identity) = store::identity(conn, &tenant, &user, &wanted)? else {
                return Ok(Err(TokensError::NoIdentity(wanted.family)));
            };
            let set = if with_set { set_store::find(conn, &tenant, &user, &wanted)? } else { None };
            Ok::<_, DbError>(Ok((identity, set)))
        };
        let (identity, set) = self.parts().db.read(read).await??;
        Ok((identity, set.map(|set| sets::info(&set, self.now()))))
    }

    /// All identities of a user.
    ///
    /// # Errors
    /// [`TokensError::NotFound`].
    pub async fn identities(
        &self,
        caller: &Caller,
        user: &UserId,
        with_set: bool,
    ) -> Result<Vec<(Identity, Option<TokenSetInfo>)>, TokensError> {
        self.may_see(caller, with_set)?;
        let (_, identities) = self.account(&caller.tenant, user).await?;
        let mut sets = Vec::new();
        if with_set {
            let (tenant, user) = (caller.tenant.clone(), user.clone());
            let read = move |conn: &mut Conn| set_store::of_user(conn, &tenant, &user);
            sets = self.parts().db.read::<_, DbError, _>(read).await?;
        }
        let now = self.now();
        let set_of = |identity: &Identity| {
            let set = sets.iter().find(|set| set.connection == identity.connection());
            set.map(|set| sets::info(set, now))
        };
        Ok(identities.into_iter().map(|identity| (identity.clone(), set_of(&identity))).collect())
    }

    fn may_see(&self, caller: &Caller, with_set: bool) -> Result<(), TokensError> {
        self.may(caller, Scope::UsersAdmin, Action::UserRead)?;
        if with_set { self.may(caller, Scope::TokenSetsAdmin, Action::UserRead) } else { Ok(()) }
    }

    /// Writes a social identity of a user; another account's tokens go. Whether it is new, and all social identities.
    ///
    /// # Errors
    /// [`TokensError::NotFound`], [`TokensError::IdentityInUse`], [`TokensError::Invalid`].
    pub async fn put_identity(
        &self,
        caller: &Caller,
        user: &UserId,
        target: &str,
        identity_id: &str,
        details: Option<Value>,
    ) -> Result<(bool, Vec<Identity>), TokensError> {
        let event = Event::new(Action::IdentityLink, "user", user.as_str()).detail("by", "administrator");
        self.audited(caller, Scope::UsersAdmin, event, |note| async move {
            let connection =
                Connection::parse(Family::Social, target).ok_or_else(|| invalid("target", "is no target"))?;
            note.add("target", target);
            check_account(identity_id, details.as_ref())?;
            let (_, before) = self.account(&caller.tenant, user).await?;
            let before = before.into_iter().find(|identity| identity.connection() == connection);
            let is_new = before.is_none();
            let details = details.unwrap_or_else(|| json!({}));
            let new = self.identity_row(user, &connection, before.as_ref(), (identity_id, None, details));
            self.write_identity(caller, before, new, None, None).await?;
            let (_, identities) = self.account(&caller.tenant, user).await?;
            Ok((is_new, social(identities)))
        })
        .await
    }

    /// Links the account that a code of a social connector leads to; its tokens are not kept (contract, section 7.9).
    ///
    /// # Errors
    /// [`TokensError::UnknownConnector`], [`TokensError::Provider`], and as [`Tokens::put_identity`].
    pub async fn link_by_connector(
        &self,
        caller: &Caller,
        user: &UserId,
        connector: &str,
        data: &Map<String, Value>,
    ) -> Result<Vec<Identity>, TokensError> {
        let event = Event::new(Action::IdentityLink, "user", user.as_str()).detail("by", "administrator");
        self.audited(caller, Scope::UsersAdmin, event, |note| async move {
            let (_, identities) = self.account(&caller.tenant, user).await?;
            let id = ConnectorId::parse(connector).map_err(|_| TokensError::UnknownConnector)?;
            let definition = match self.definition(caller, Family::Social, &id).await {
                Err(TokensError::NotFound(_)) => return Err(TokensError::UnknownConnector),
                definition => definition?,
            };
            note.add("target", definition.connector.target.as_str());
            let profile = self.account_by_code(&definition, data).await?;
            let connection =
                Connection { family: Family::Social, target: definition.connector.target.clone() };
            let before = identities.into_iter().find(|identity| identity.connection() == connection);
            let account = (profile.id.as_str(), None, profile.details());
            let new = self.identity_row(user, &connection, before.as_ref(), account);
            self.write_identity(caller, before, new, None, None).await?;
            let (_, identities) = self.account(&caller.tenant, user).await?;
            Ok(social(identities))
        })
        .await
    }

    /// Takes away an identity of a user with its tokens; the user as it is then.
    ///
    /// # Errors
    /// [`TokensError::NotFound`], [`TokensError::NoIdentity`].
    pub async fn remove_identity(
        &self,
        caller: &Caller,
        user: &UserId,
        connection: &Connection,
    ) -> Result<(User, Vec<Identity>), TokensError> {
        let event = Event::new(Action::IdentityUnlink, "user", user.as_str())
            .detail("target", connection.target.as_str());
        self.audited(caller, Scope::UsersAdmin, event, |_| async move {
            self.account(&caller.tenant, user).await?;
            self.unlink_now(caller, user, connection).await?;
            let (account, identities) = self.account(&caller.tenant, user).await?;
            Ok((account.user, identities))
        })
        .await
    }

    /// Links the account of a proof to the person, or puts it in another one's place.
    ///
    /// # Errors
    /// In the order of the contract, section 7.9: [`TokensError::NotEditable`], [`TokensError::MissingUserScope`],
    /// [`TokensError::ProofNeeded`], [`TokensError::NoVerification`], [`TokensError::IdentityInUse`].
    pub async fn link(
        &self,
        person: &UserCaller,
        family: Family,
        record: &str,
        proof: Option<&str>,
        how: LinkAs,
    ) -> Result<(), TokensError> {
        let caller = &person.caller;
        let event = Event::new(Action::IdentityLink, "user", person.user.as_str()).detail("by", "person");
        self.parts()
            .audit
            .around(caller, event, async |note| {
                self.may_change(person, proof).await?;
                let proven = self.proven(person, family, record).await?;
                let connection = connection_of(&proven, family)?;
                note.add("target", connection.target.as_str());
                self.link_proven(person, proven, &connection, how).await
            })
            .await
    }

    async fn may_change(&self, person: &UserCaller, proof: Option<&str>) -> Result<(), TokensError> {
        self.social_is_editable(person).await?;
        needs_identities(person)?;
        self.require_proof(person, proof).await
    }

    async fn link_proven(
        &self,
        person: &UserCaller,
        proven: Proven,
        connection: &Connection,
        how: LinkAs,
    ) -> Result<(), TokensError> {
        let caller = &person.caller;
        let (tenant, user, wanted) = (caller.tenant.clone(), person.user.clone(), connection.clone());
        let (issuer, account) = (proven.issuer.clone(), proven.identity_id.clone());
        let owner = move |conn: &mut Conn| {
            store::owner_of(conn, &tenant, &user, &wanted, (issuer.as_deref(), &account))
        };
        if self.parts().db.read::<_, DbError, _>(owner).await?.is_some() {
            return Err(TokensError::IdentityInUse { by_caller: false });
        }
        let (_, identities) = self.account(&caller.tenant, &person.user).await?;
        let before = identities.into_iter().find(|identity| identity.connection() == *connection);
        if before.is_some() && how == LinkAs::New {
            return Err(TokensError::IdentityInUse { by_caller: true });
        }
        let account = (proven.identity_id.as_str(), proven.issuer.clone(), proven.details.clone());
        let new = self.identity_row(&person.user, connection, before.as_ref(), account);
        let ready = self.ready_of(caller, &proven, &new).await?;
        self.write_identity(caller, before, new, ready, Some(proven)).await
    }

    /// The tokens of a proof, sealed for their place; `None` if it brought none or the connector keeps none any more.
    async fn ready_of(
        &self,
        caller: &Caller,
        proven: &Proven,
        identity: &Identity,
    ) -> Result<Option<Ready>, TokensError> {
        let (Some(brought), Some(connector)) = (&proven.brought, &proven.verification.connector) else {
            return Ok(None);
        };
        let definition = match self.definition(caller, identity.family, connector).await {
            Err(TokensError::NotFound(_)) => return Err(TokensError::NoVerification),
            definition => definition?,
        };
        if !definition.connector.stores_tokens {
            return Ok(None);
        }
        self.ready(caller, &definition, identity, brought).await.map(Some)
    }

    fn identity_row(
        &self,
        user: &UserId,
        connection: &Connection,
        before: Option<&Identity>,
        (identity_id, issuer, details): (&str, Option<String>, Value),
    ) -> Identity {
        let now = self.now();
        let same = before.filter(|before| before.identity_id == identity_id);
        Identity {
            user: user.clone(),
            family: connection.family,
            target: connection.target.clone(),
            id: same.map_or_else(IdentityId::generate, |same| same.id.clone()),
            issuer: issuer.or_else(|| same.and_then(|same| same.issuer.clone())),
            identity_id: identity_id.to_owned(),
            details,
            created_at: same.map_or(now, |same| same.created_at),
            updated_at: now,
        }
    }

    /// Stores an identity with its tokens, uses up the proof, and takes away what another account had left there.
    async fn write_identity(
        &self,
        caller: &Caller,
        before: Option<Identity>,
        new: Identity,
        ready: Option<Ready>,
        proven: Option<Proven>,
    ) -> Result<(), TokensError> {
        let is_other = before.as_ref().is_some_and(|before| before.identity_id != new.identity_id);
        let mut grants = Vec::new();
        if is_other {
            let found = self.found_set(&caller.tenant, &new.user, &new.connection()).await?;
            if let Some(found) = &found {
                grants.extend(self.grant_of(caller, &found.set).await);
            }
        }
        let verification = proven.map(|proven| proven.verification);
        let stored = ready.as_ref().map(|ready| ready.set.clone());
        let tenant = caller.tenant.clone();
        let work = move |conn: &mut Conn| write(conn, &tenant, &new, ready.as_ref(), verification.as_ref());
        let written = self.parts().db.write(work).await;
        match written {
            Ok(()) => {}
            Err(TokensError::Db(DbError::Duplicate)) => {
                return Err(TokensError::IdentityInUse { by_caller: false });
            }
            Err(error) => return Err(error),
        }
        self.revoke_soon(caller, grants);
        if let Some(set) = stored {
            self.record_stored(caller, &set);
        }
        Ok(())
    }

    fn record_stored(&self, caller: &Caller, set: &set_store::Set) {
        let event = Event::new(Action::TokenSetStore, "token-set", set.id.as_str())
            .detail("user", set.user.as_str())
            .detail("target", set.connection.target.as_str())
            .detail("version", set.version.to_string())
            .detail("refreshable", set.has_refresh_token.to_string());
        self.parts().audit.record_soon(caller, event, crate::audit::Outcome::Success);
    }

    /// Stores the tokens of a proof for an account that the person has linked, and releases the access token.
    ///
    /// # Errors
    /// In the order of the contract, section 7.6.
    pub async fn renew(
        &self,
        person: &UserCaller,
        connection: &Connection,
        record: &str,
    ) -> Result<Released, TokensError> {
        let caller = &person.caller;
        let event = Event::new(Action::TokenSetStore, "user", person.user.as_str())
            .detail("target", connection.target.as_str());
        self.parts()
            .audit
            .around(caller, event, async |note| {
                needs_identities(person)?;
                let proven = self.proven(person, connection.family, record).await?;
                let actual = proven.verification.target.clone().unwrap_or_default();
                if actual != connection.target {
                    let expected = connection.target.clone();
                    return Err(TokensError::WrongTarget { expected, actual });
                }
                let (_, identities) = self.account(&caller.tenant, &person.user).await?;
                let identity = identities.into_iter().find(|one| one.connection() == *connection);
                // Another account at the same provider never takes this one's place (ID-13).
                let identity = identity
                    .filter(|one| one.identity_id == proven.identity_id && one.issuer == proven.issuer);
                let identity = identity.ok_or(TokensError::NotLinked)?;
                let set = self.renew_linked(caller, &proven, &identity).await?;
                note.add("token_set", set.id.as_str());
                note.add("version", set.version.to_string());
                self.renewed(caller, &set).await
            })
            .await
    }

    async fn renew_linked(
        &self,
        caller: &Caller,
        proven: &Proven,
        identity: &Identity,
    ) -> Result<set_store::Set, TokensError> {
        for _ in 0..TRIES {
            let ready = self.ready_of(caller, proven, identity).await?.ok_or(TokensError::NoTokens)?;
            let (tenant, set) = (caller.tenant.clone(), ready.set.clone());
            let (used, linked) = (proven.verification.clone(), identity.clone());
            let work = move |conn: &mut Conn| {
                if !store::hold(conn, &tenant, &linked.user)? {
                    return Err(TokensError::NotFound("user"));
                }
                // It may have been unlinked since it was looked at.
                let now = store::identity(conn, &tenant, &linked.user, &linked.connection())?;
                if now.is_none_or(|now| now.identity_id != linked.identity_id) {
                    return Err(TokensError::NotLinked);
                }
                if !ready.store(conn, &tenant)? {
                    return Ok(false);
                }
                match verifications::consume(conn, &tenant, &used)? {
                    true => Ok(true),
                    false => Err(TokensError::NoVerification),
                }
            };
            if self.parts().db.write(work).await? {
                return Ok(set);
            }
        }
        Err(TokensError::Busy)
    }

    async fn renewed(&self, caller: &Caller, set: &set_store::Set) -> Result<Released, TokensError> {
        let found = self.found_set(&caller.tenant, &set.user, &set.connection).await?;
        let found = found.filter(|found| found.set.id == set.id);
        let Some(set_store::Found { set, sealed: Some(sealed), .. }) = found else {
            return Err(TokensError::NothingStored);
        };
        let place = set_store::place(&caller.tenant, &set.user, &set.connection, set.version);
        let plain = self.parts().vault.open_record(caller, &place, sealed).await?;
        match Values::new(plain, &set) {
            Some(values) => Ok(Released::new(values, &set, self.now())),
            None => Err(self.parts().vault.altered_at(caller, &place).await.into()),
        }
    }

    /// Takes away one of the person's own identities with its tokens.
    ///
    /// # Errors
    /// In the order of the contract, section 7.9: as [`Tokens::link`], [`TokensError::NoIdentity`],
    /// [`TokensError::LastSignIn`].
    pub async fn unlink(
        &self,
        person: &UserCaller,
        connection: &Connection,
        proof: Option<&str>,
    ) -> Result<(), TokensError> {
        let caller = &person.caller;
        let event = Event::new(Action::IdentityUnlink, "user", person.user.as_str())
            .detail("target", connection.target.as_str());
        self.parts()
            .audit
            .around(caller, event, async |_| {
                self.may_change(person, proof).await?;
                let (account, identities) = self.account(&caller.tenant, &person.user).await?;
                if !identities.iter().any(|identity| identity.connection() == *connection) {
                    return Err(TokensError::NoIdentity(connection.family));
                }
                let user = &account.user;
                let has_identifier =
                    user.username.is_some() || user.primary_email.is_some() || user.primary_phone.is_some();
                if !has_identifier && identities.len() == 1 {
                    return Err(TokensError::LastSignIn);
                }
                self.unlink_now(caller, &person.user, connection).await
            })
            .await
    }

    async fn unlink_now(
        &self,
        caller: &Caller,
        user: &UserId,
        connection: &Connection,
    ) -> Result<(), TokensError> {
        let found = self.found_set(&caller.tenant, user, connection).await?;
        let grant = match &found {
            Some(found) => self.grant_of(caller, &found.set).await,
            None => None,
        };
        let (tenant, user, gone) = (caller.tenant.clone(), user.clone(), connection.clone());
        let work = move |conn: &mut Conn| {
            let set = set_store::find(conn, &tenant, &user, &gone)?;
            if let Some(set) = &set {
                set_store::delete(conn, &tenant, set)?;
            }
            let which = Which::OfUser(user.clone(), Some(gone.clone()));
            while verifications::purge(conn, &tenant, &which, 500)? == 500 {}
            Ok::<_, DbError>((store::delete_identity(conn, &tenant, &user, &gone)?, set))
        };
        let (deleted, set) = self.parts().db.write(work).await?;
        let (gone, grants) = (set.into_iter().collect(), grant.into_iter().collect());
        self.deleted(caller, gone, grants, "identity-unlinked");
        deleted.then_some(()).ok_or(TokensError::NoIdentity(connection.family))
    }
}

/// The one transaction of a link.
fn write(
    conn: &mut Conn,
    tenant: &TenantId,
    new: &Identity,
    ready: Option<&Ready>,
    used: Option<&verifications::Verification>,
) -> Result<(), TokensError> {
    if let Some(used) = used
        && !verifications::consume(conn, tenant, used)?
    {
        return Err(TokensError::NoVerification);
    }
    if !store::hold(conn, tenant, &new.user)? {
        return Err(TokensError::NotFound("user"));
    }
    store::put_identity(conn, tenant, new)?;
    match ready {
        Some(ready) if !ready.store(conn, tenant)? => Err(TokensError::Busy),
        Some(_) => Ok(()),
        None => {
            // Tokens of another account are not this one's.
            let there = set_store::find(conn, tenant, &new.user, &new.connection())?;
            if let Some(set) = there.filter(|set| set.identity_id != new.identity_id) {
                set_store::delete(conn, tenant, &set)?;
            }
            Ok(())
        }
    }
}

fn needs_identities(person: &UserCaller) -> Result<(), TokensError> {
    match person.scopes.contains(UserScope::Identities) {
        true => Ok(()),
        false => Err(TokensError::MissingUserScope(UserScope::Identities.name())),
    }
}

fn connection_of(proven: &Proven, family: Family) -> Result<Connection, TokensError> {
    let target = proven.verification.target.as_deref().unwrap_or_default();
    Connection::parse(family, target).ok_or(TokensError::NoVerification)
}

fn social(identities: Vec<Identity>) -> Vec<Identity> {
    identities.into_iter().filter(|identity| identity.family == Family::Social).collect()
}

pub(super) fn check_account(identity_id: &str, details: Option<&Value>) -> Result<(), TokensError> {
    if identity_id.is_empty() || identity_id.len() > 128 || identity_id.chars().any(char::is_control) {
        return Err(invalid("userId", "must have 1 to 128 characters, no control characters"));
    }
    match details {
        Some(details) if !details.is_object() || details.to_string().len() > 32 << 10 => {
            Err(invalid("details", "must be an object of at most 32 KiB"))
        }
        _ => Ok(()),
    }
}
