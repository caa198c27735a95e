//! Reads of a stored access token: by the person, or for the person by a machine that may.
//!
//! A read decides by `plan.rs`, has the set refreshed if it must be, and releases the value between a durable intent and
//! its outcome. It deletes nothing.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use super::model::{Connection, Family};
use super::plan::{self, Plan};
use super::refresh::Ended;
use super::sets::Values;
use super::store::sets::{self as store, Found, Set};
use super::{ProviderError, ProviderFault, Tokens, TokensError, invalid};
use crate::audit::{Action, Event};
use crate::clock::Timestamp;
use crate::identity::{Caller, Scope, UserCaller, UserScope};
use crate::ids::UserId;
use crate::vault::VaultError;

/// How often a read looks for the end of another daemon's refresh.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Refreshes that one read begins: the second one is for a refresh that was overtaken.
const REFRESHES: u32 = 2;

/// A released access token: the value in guarded memory, and what may be told beside it.
pub struct Released {
    values: Values,
    scope: Option<String>,
    token_type: Option<String>,
    expires_in: Option<u64>,
}

impl Released {
    pub(super) fn new(values: Values, set: &Set, now: Timestamp) -> Self {
        let left = set.expires_at.filter(|at| *at != 0).map(|at| at.saturating_sub(now.as_secs()));
        Self {
            values,
            scope: set.scope.clone(),
            token_type: set.token_type.clone(),
            // None of an expired token is told (contract, section 14, point 8).
            expires_in: left.and_then(|left| u64::try_from(left).ok()).filter(|left| *left > 0),
        }
    }

    /// As the provider wrote it.
    pub fn scope(&self) -> Option<&str> {
        self.scope.as_deref()
    }

    /// As the provider wrote it.
    pub fn token_type(&self) -> Option<&str> {
        self.token_type.as_deref()
    }

    /// Seconds that are left.
    pub const fn expires_in(&self) -> Option<u64> {
        self.expires_in
    }

    /// Lets `read` see the token.
    pub fn with_access_token<T>(&self, read: impl FnOnce(&str) -> T) -> T {
        self.values.with_access_token(read)
    }
}

/// A release without the person's own request.
pub struct Release {
    /// Which right the caller needs for it.
    pub scope: Scope,
    /// `machine` or `exchange`.
    pub via: &'static str,
    /// Why: 1 to 256 characters for the audit log.
    pub reason: String,
}

impl Tokens {
    /// Releases the access token of one of the person's own connections.
    ///
    /// # Errors
    /// [`TokensError::MissingUserScope`], [`TokensError::NothingStored`], [`TokensError::NeedsReauthorization`],
    /// [`TokensError::Provider`], [`TokensError::Busy`], or what device, log and database say.
    pub async fn access_token(
        &self,
        person: &UserCaller,
        connection: &Connection,
    ) -> Result<Released, TokensError> {
        let event = read_event(&person.user, &connection.target, "user");
        if !person.scopes.contains(UserScope::Identities) {
            let missing = TokensError::MissingUserScope(UserScope::Identities.name());
            return self.deny(&person.caller, event, missing).await;
        }
        self.release(&person.caller, &person.user, connection, event).await
    }

    /// Releases the access token of any user's connection, named by target or SSO connector, to a machine.
    ///
    /// # Errors
    /// [`TokensError::Forbidden`], [`TokensError::Invalid`] for the reason, and as [`Tokens::access_token`].
    pub async fn access_token_for(
        &self,
        caller: &Caller,
        user: &UserId,
        connection: &str,
        release: Release,
    ) -> Result<Released, TokensError> {
        let Release { scope, via, reason } = release;
        let event = read_event(user, &cut(connection), via);
        if let Err(missing) = caller.require(scope) {
            return self.deny(caller, event, missing.into()).await;
        }
        let length = reason.chars().count();
        if !(1..=256).contains(&length) || reason.chars().any(char::is_control) {
            let why = invalid("reason", "must have 1 to 256 characters, no control characters");
            return self.deny(caller, event, why).await;
        }
        let event = event.detail("reason", reason);
        if !self.is_active_user(&caller.tenant, user).await? {
            return self.deny(caller, event, TokensError::NothingStored).await;
        }
        let social = Connection::parse(Family::Social, connection);
        let Some(social) = social else { return self.deny(caller, event, TokensError::NothingStored).await };
        let sso = Connection { family: Family::Sso, target: social.target.clone() };
        let named = match self.found_set(&caller.tenant, user, &social).await? {
            Some(_) => social,
            None => sso,
        };
        self.release(caller, user, &named, event).await
    }

    async fn release(
        &self,
        caller: &Caller,
        user: &UserId,
        connection: &Connection,
        event: Event,
    ) -> Result<Released, TokensError> {
        let deadline = Instant::now() + self.parts().config.read_deadline;
        let (mut refreshes, mut waits, mut ended) = (0, 0_u32, Ended::InTheRow);
        let mut failures = u64::MAX;
        loop {
            let found = self.found_set(&caller.tenant, user, connection).await?;
            let Some(found) = found else {
                return self.deny(caller, event, TokensError::NothingStored).await;
            };
            if !found.is_kept {
                return self.deny(caller, event, TokensError::NothingStored).await;
            }
            let now = self.now();
            let mut planned = plan::decide(&found.facts(), now, self.parts().config.leeway);
            // Failed just now: one read asks the provider once.
            let has_failed = found.set.failures > failures;
            let is_over = ended != Ended::InTheRow || refreshes == REFRESHES || deadline <= Instant::now();
            if planned == Plan::Refresh && has_failed && ended == Ended::InTheRow {
                planned = if plan::is_valid(found.set.expires_at, now) { Plan::Serve } else { Plan::Later };
            }
            if planned == Plan::Refresh && is_over {
                if !plan::is_valid(found.set.expires_at, now) {
                    let why = match ended {
                        Ended::Altered => VaultError::Integrity.into(),
                        Ended::InTheRow | Ended::NotHere => TokensError::Busy,
                    };
                    return self.deny(caller, event, why).await;
                }
                planned = Plan::Serve;
            }
            match planned {
                Plan::Serve => return self.serve(caller, found, event).await,
                Plan::Refresh => {
                    (refreshes, failures) = (refreshes + 1, found.set.failures);
                    let flight = self.refresh(&caller.tenant, &found.set);
                    // Late: the flight goes on without this read.
                    ended = timeout_at(deadline, flight).await.unwrap_or(Ended::InTheRow);
                }
                Plan::Wait if Instant::now() < deadline => {
                    waits = waits.saturating_add(1);
                    match self.flight_of(&caller.tenant, &found.set.id) {
                        Some(mut flight) => {
                            let landed = async { while flight.changed().await.is_ok() {} };
                            let _ = timeout_at(deadline, landed).await;
                        }
                        // Another daemon's: looked for less often as it takes longer.
                        None => {
                            sleep_until((Instant::now() + LOOK_EVERY * waits.min(10)).min(deadline)).await;
                        }
                    }
                }
                Plan::Wait => return self.deny(caller, event, TokensError::Busy).await,
                Plan::Later => {
                    let error = TokensError::Provider(later(&found, now));
                    return self.deny(caller, event, error).await;
                }
                Plan::Dead { mark } => {
                    if mark {
                        self.give_up(&caller.tenant, &found.set, "uncertain").await?;
                    }
                    return self.deny(caller, event, TokensError::NeedsReauthorization).await;
                }
            }
        }
    }

    /// Opens and releases what was found.
    async fn serve(&self, caller: &Caller, found: Found, event: Event) -> Result<Released, TokensError> {
        let Found { set, sealed, .. } = found;
        let event = event.detail("token_set", set.id.as_str()).detail("version", set.version.to_string());
        let set = &set;
        self.parts()
            .audit
            .around(caller, event, async move |_| {
                let place = store::place(&caller.tenant, &set.user, &set.connection, set.version);
                let vault = &self.parts().vault;
                let Some(sealed) = sealed else { return Err(vault.altered_at(caller, &place).await.into()) };
                let plain = vault.open_record(caller, &place, sealed).await?;
                match Values::new(plain, set) {
                    Some(values) => Ok(Released::new(values, set, self.now())),
                    None => Err(vault.altered_at(caller, &place).await.into()),
                }
            })
            .await
    }
}

/// What the last failure was, and when the next try is.
fn later(found: &Found, now: Timestamp) -> ProviderError {
    let until = found.facts().wait_until;
    let retry_after = Some(until.since(now)).filter(|wait| !wait.is_zero());
    let named = found.breaker_reason.as_deref().filter(|_| found.breaker_until > now);
    let named = named.or(found.set.last_error.as_deref()).unwrap_or_default();
    let kind = match named {
        store::UNREADABLE => ProviderFault::Protocol,
        named => ProviderFault::parse(named).unwrap_or(ProviderFault::Transient),
    };
    ProviderError { kind, retry_after }
}

fn read_event(user: &UserId, target: &str, via: &'static str) -> Event {
    Event::new(Action::TokenSetRead, "user", user.as_str()).detail("target", target).detail("via", via)
}

/// A client's name for a connection, short enough for a record.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}
