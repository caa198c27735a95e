//! The account center: whether there is an Account API, and what people may change there.

use std::collections::BTreeMap;
use std::time::Duration;

use moka::sync::Cache;
use zeroize::Zeroizing;

use super::model::{AccountCenter, FieldAccess, Identity, User};
use super::store::connectors as store;
use super::{Tokens, TokensError};
use crate::audit::{Action, Event};
use crate::db::{Conn, DbError};
use crate::identity::{Caller, Scope, UserCaller, UserScope};
use crate::ids::TenantId;

/// How long another daemon's change may go unnoticed.
const KNOWN_FOR: Duration = Duration::from_secs(2);

/// Settings that were read lately; nothing in them is secret.
pub(super) struct Known(Cache<TenantId, AccountCenter>);

impl Known {
    pub(super) fn new() -> Self {
        Self(Cache::builder().max_capacity(1000).time_to_live(KNOWN_FOR).build())
    }
}

impl Tokens {
    /// The settings.
    ///
    /// # Errors
    /// [`TokensError::Forbidden`] without `connectors:admin`.
    pub async fn account_center(&self, caller: &Caller) -> Result<AccountCenter, TokensError> {
        self.may(caller, Scope::ConnectorsAdmin, Action::AccountCenterUpdate)?;
        Ok(self.settings(caller).await?.1)
    }

    /// Changes the settings; fields that are not named stay.
    ///
    /// # Errors
    /// [`TokensError::Forbidden`]; [`TokensError::Busy`] if somebody else changes them now.
    pub async fn set_account_center(
        &self,
        caller: &Caller,
        enabled: Option<bool>,
        fields: Option<BTreeMap<String, FieldAccess>>,
    ) -> Result<AccountCenter, TokensError> {
        let event = Event::new(Action::AccountCenterUpdate, "account-center", caller.tenant.as_str());
        let changed = self.audited(caller, Scope::ConnectorsAdmin, event, |note| async move {
            let (version, mut center) = self.settings(caller).await?;
            center.enabled = enabled.unwrap_or(center.enabled);
            center.fields.extend(fields.unwrap_or_default());
            note.add("enabled", center.enabled.to_string());
            // A flag and texts always serialise.
            let bytes = Zeroizing::new(serde_json::to_vec(&center).unwrap_or_default());
            let place = store::settings_place(&caller.tenant, version + 1);
            let sealed = self.parts().vault.seal_record(place, &bytes).await?;
            let (tenant, now) = (caller.tenant.clone(), self.now());
            let work = move |conn: &mut Conn| store::put_settings(conn, &tenant, version, &sealed, now);
            match self.parts().db.write::<_, DbError, _>(work).await? {
                true => Ok(center),
                false => Err(TokensError::Busy),
            }
        });
        let changed = changed.await;
        self.inner.known.0.invalidate(&caller.tenant);
        changed
    }

    /// Lets a person in.
    ///
    /// # Errors
    /// [`TokensError::MissingUserScope`] without `openid`; [`TokensError::NotEnabled`].
    pub async fn account_is_open(&self, person: &UserCaller) -> Result<(), TokensError> {
        if !person.scopes.contains(UserScope::OpenId) {
            return Err(TokensError::MissingUserScope(UserScope::OpenId.name()));
        }
        match self.center_for(&person.caller).await?.enabled {
            true => Ok(()),
            false => Err(TokensError::NotEnabled),
        }
    }

    /// The person's own account.
    ///
    /// # Errors
    /// [`TokensError::NotFound`] if it was deleted meanwhile.
    pub async fn me(&self, person: &UserCaller) -> Result<(User, Vec<Identity>), TokensError> {
        let (account, identities) = self.account(&person.caller.tenant, &person.user).await?;
        let may_see = person.scopes.contains(UserScope::Identities);
        Ok((account.user, if may_see { identities } else { Vec::new() }))
    }

    /// Whether a person may change the identities of the own account.
    pub(super) async fn social_is_editable(&self, person: &UserCaller) -> Result<(), TokensError> {
        let center = self.center_for(&person.caller).await?;
        match center.fields.get("social") {
            Some(FieldAccess::Edit) => Ok(()),
            _ => Err(TokensError::NotEditable),
        }
    }

    async fn center_for(&self, caller: &Caller) -> Result<AccountCenter, TokensError> {
        if let Some(known) = self.inner.known.0.get(&caller.tenant) {
            return Ok(known);
        }
        let (_, center) = self.settings(caller).await?;
        self.inner.known.0.insert(caller.tenant.clone(), center.clone());
        Ok(center)
    }

    /// The settings and their version; 0 where nobody has set any.
    async fn settings(&self, caller: &Caller) -> Result<(u64, AccountCenter), TokensError> {
        let tenant = caller.tenant.clone();
        let read = move |conn: &mut Conn| store::settings(conn, &tenant);
        let Some((version, sealed)) = self.parts().db.read::<_, DbError, _>(read).await? else {
            return Ok((0, AccountCenter::default()));
        };
        let (vault, place) = (&self.parts().vault, store::settings_place(&caller.tenant, version));
        let Some(sealed) = sealed else { return Err(vault.altered_at(caller, &place).await.into()) };
        let plain = vault.open_record(caller, &place, sealed).await?;
        match plain.with(|bytes| serde_json::from_slice(bytes).ok()) {
            Some(center) => Ok((version, center)),
            None => Err(vault.altered_at(caller, &place).await.into()),
        }
    }
}
