//! The protocol of a refresh (reliability.md, section 6).
//!
//! One at a time for each set: within this daemon by [`Flights`], among daemons by a compare-and-set that takes the set
//! for as long as its lease. In this order: everything that can fail beforehand; the intent, durable; a look at the
//! steady clock; the provider; the answer sealed and stored, in the spool if the database does not take it; then only
//! the waiters. It runs in a task of its own: a client that goes away does not end it. What a crash leaves is an
//! intent whose lease runs out: then nobody knows whether the provider has seen the request, and `plan.rs`
//! grants one more try.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use secrecy::SecretString;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::connectors::{Definition, Endpoints};
use super::plan::{self, Phase};
use super::sets::{Bound, Brought, Values, jitter};
use super::spool;
use super::store::sets::{self as store, Failure, Set, Stored};
use super::{ProviderError, ProviderFault, Tokens, TokensError, fault_of};
use crate::audit::{Action, AuditCode, Event, Note, Outcome};
use crate::clock::Timestamp;
use crate::db::{Conn, DbError};
use crate::identity::Caller;
use crate::ids::{TenantId, TokenSetId};
use crate::upstream::{Class, TokenFailure};
use crate::vault::{SealedRecord, VaultError};

/// The part of a lease in which nothing is sent any more: what the provider's answer and its storing may take. Half of
/// a short lease.
const MARGIN: Duration = Duration::from_secs(15);
/// Between tries to seal or store an answer.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// `last_error` of a set that is not what was stored.
pub(super) const INTEGRITY: &str = "integrity";
/// First pause of a connector whose provider refuses it; doubles up to an hour.
const BREAKER: Duration = Duration::from_secs(60);

/// What whoever waits for a refresh is told; how it is with the set then, the row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The row says how.
    InTheRow,
    /// Device, log or database had no time for it, or the installation is in quarantine.
    NotHere,
    /// Something stored is not what was stored: an incident.
    Altered,
}

/// Refreshes that go on in this daemon.
#[derive(Default)]
pub(super) struct Flights(Mutex<HashMap<(TenantId, TokenSetId), watch::Receiver<Ended>>>);

impl Flights {
    /// Those that go on now.
    fn all(&self) -> Vec<watch::Receiver<Ended>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// A refresh that has all it needs and has not begun.
struct Prepared {
    definition: Definition,
    endpoints: Endpoints,
    refresh_token: SecretString,
}

/// A refresh whose intent is durable.
struct Begun<'a> {
    caller: &'a Caller,
    set: &'a Set,
    prepared: &'a Prepared,
    epoch: i64,
    /// By the database's clock: which of two answers is the newer one.
    since: Timestamp,
    /// Nothing is sent after it.
    send_until: Instant,
}

/// How a refresh ended.
enum End {
    Refreshed(u64),
    /// Somebody else has stored another answer, or the set is gone.
    Overtaken(&'static str),
}

impl Tokens {
    /// Refreshes a set as it was read, or joins whoever does; returns when that has ended, however it did. The
    /// caller looks at the set again.
    pub(super) fn refresh(
        &self,
        tenant: &TenantId,
        set: &Set,
    ) -> impl Future<Output = Ended> + Send + 'static {
        let key = (tenant.clone(), set.id.clone());
        let mut flights = self.inner.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut flight = match flights.get(&key) {
            Some(flight) => flight.clone(),
            None => {
                let (ended, flight) = watch::channel(Ended::InTheRow);
                flights.insert(key.clone(), flight.clone());
                let (tokens, set) = (self.clone(), set.clone());
                self.inner.background.spawn(async move {
                    let landing = Landing { tokens: &tokens, key: &key, ended };
                    let ended = tokens.fly(&landing.key.0, &set).await;
                    landing.ended.send_if_modified(|told| {
                        *told = ended;
                        false
                    });
                });
                flight
            }
        };
        // Closed when the task has ended, also by a panic.
        async move {
            while flight.changed().await.is_ok() {}
            *flight.borrow()
        }
    }

    /// The refresh of a set that goes on in this daemon, if one does.
    pub(super) fn flight_of(&self, tenant: &TenantId, set: &TokenSetId) -> Option<watch::Receiver<Ended>> {
        let flights = self.inner.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.get(&(tenant.clone(), set.clone())).cloned()
    }

    /// Waits for what goes on, at most as long as a lease: an orderly end loses no answer.
    pub async fn close(&self) {
        let until = Instant::now() + self.parts().config.refresh_lease;
        for mut flight in self.inner.flights.all() {
            let _ = tokio::time::timeout_at(until, async { while flight.changed().await.is_ok() {} }).await;
        }
    }

    async fn fly(&self, tenant: &TenantId, set: &Set) -> Ended {
        let caller = Caller::system("token-refresh", tenant.clone());
        let ended = self.try_to_refresh(&caller, set).await;
        let outcome = match &ended {
            Ok(()) => "ok",
            Err(error) => error.audit_code(),
        };
        metrics::counter!("lacre_token_refreshes_total", "outcome" => outcome).increment(1);
        if let Err(error) = &ended {
            tracing::warn!(token_set = %set.id, code = error.audit_code(), %error, "a token set was not refreshed");
        }
        match ended {
            Err(TokensError::Vault(VaultError::Integrity)) => Ended::Altered,
            Err(
                TokensError::Vault(_) | TokensError::Audit(_) | TokensError::Db(_) | TokensError::Quarantined,
            ) => Ended::NotHere,
            _ => Ended::InTheRow,
        }
    }

    async fn try_to_refresh(&self, caller: &Caller, set: &Set) -> Result<(), TokensError> {
        // After a restore the newest refresh token may be another one: nothing is sent before the release.
        self.refuse_in_quarantine().await?;
        let prepared = match self.prepare(caller, set).await {
            Ok(prepared) => prepared,
            Err(error) => return self.not_begun(caller, set, error).await,
        };
        let Some(begun) = self.begin(caller, set, &prepared).await? else {
            // Another daemon was first: its answer is the answer.
            return Ok(());
        };
        let event = Event::new(Action::TokenSetRefresh, "token-set", set.id.as_str())
            .detail("user", set.user.as_str())
            .detail("connector", set.connector.as_str())
            .detail("version", set.version.to_string())
            .detail("repeats", (set.phase == Phase::Refreshing).to_string());
        let done = self.parts().audit.around(caller, event, async |note| {
            match self.call(&begun, &note).await? {
                End::Refreshed(version) => note.add("stored", version.to_string()),
                End::Overtaken(by) => note.add("overtaken", by),
            }
            Ok::<_, TokensError>(())
        });
        let done = done.await;
        if let Err(TokensError::Audit(_)) = &done {
            // Nothing was sent: without its record it must not be.
            self.back_to_idle(&begun, "audit-unavailable").await;
        }
        done
    }

    /// What can be known to fail fails before the intent: connector, device, addresses.
    async fn prepare(&self, caller: &Caller, set: &Set) -> Result<Prepared, TokensError> {
        let definition = match self.definition(caller, set.connection.family, &set.connector).await {
            Err(TokensError::NotFound(_)) => return Err(TokensError::UnknownConnector),
            definition => definition?,
        };
        if !definition.connector.stores_tokens {
            return Err(TokensError::NoTokenStorage);
        }
        if set.issuer != definition.issuer() {
            // The connector was moved: what one provider gave is not told to another.
            let kind = ProviderFault::Config;
            return Err(TokensError::Provider(ProviderError { kind, retry_after: None }));
        }
        if let Some((until, _)) = &definition.connector.breaker
            && *until > self.now()
        {
            // Its failures are the connector's, not each user's: nothing is noted about the set, and what is read next
            // has the breaker beside it.
            return Err(TokensError::Busy);
        }
        let found = self.found_set(&caller.tenant, &set.user, &set.connection).await?;
        let found = found.filter(|found| found.set.version == set.version && found.set.id == set.id);
        let found = found.ok_or(TokensError::Busy)?;
        if self.has_spooled(set).await {
            // Its answer is here already and waits for the database.
            return Err(TokensError::Busy);
        }
        let place = store::place(&caller.tenant, &set.user, &set.connection, set.version);
        let vault = &self.parts().vault;
        let Some(sealed) = found.sealed else { return Err(vault.altered_at(caller, &place).await.into()) };
        let plain = vault.open_record(caller, &place, sealed).await?;
        let Some(values) = Values::new(plain, set) else {
            return Err(vault.altered_at(caller, &place).await.into());
        };
        if !values.are_of(&definition) {
            // The connector sends tokens elsewhere now, and these came from another place.
            self.give_up(&caller.tenant, set, "provider-moved").await?;
            return Err(TokensError::NeedsReauthorization);
        }
        let Some(refresh_token) = values.refresh_token() else {
            self.give_up(&caller.tenant, set, "no-refresh-token").await?;
            return Err(TokensError::NeedsReauthorization);
        };
        let endpoints = self.endpoints(&definition).await;
        let endpoints = endpoints.map_err(|failure| provider_error(&failure))?;
        Ok(Prepared { definition, endpoints, refresh_token })
    }

    /// Notes why a refresh was not begun, so that the next read does not try at once.
    async fn not_begun(&self, caller: &Caller, set: &Set, error: TokensError) -> Result<(), TokensError> {
        let code = match &error {
            TokensError::Provider(failed) => failed.kind.name(),
            TokensError::NoTokenStorage | TokensError::UnknownConnector => ProviderFault::Config.name(),
            // Looked at again after a pause; each look is an incident.
            TokensError::Vault(VaultError::Integrity) => INTEGRITY,
            // Of this host, not of the set: nothing is noted about it.
            _ => return Err(error),
        };
        if let TokensError::Provider(_) = &error {
            let event = Event::new(Action::TokenSetRefresh, "token-set", set.id.as_str())
                .detail("user", set.user.as_str())
                .detail("connector", set.connector.as_str());
            self.parts().audit.record_soon(caller, event, Outcome::Failure(code));
        }
        let failures = set.failures.saturating_add(1);
        let retry_at = self.now().plus(plan::pause(failures, None, jitter(&set.id, failures)));
        let failure = Failure { phase: set.phase, error: code, failures, retry_at, spent: set.spent };
        let (tenant, row) = (caller.tenant.clone(), set.clone());
        let work = move |conn: &mut Conn| store::fail_refresh(conn, &tenant, &row, row.epoch, &failure);
        self.parts().db.write::<_, DbError, _>(work).await?;
        Err(error)
    }

    async fn begin<'a>(
        &self,
        caller: &'a Caller,
        set: &'a Set,
        prepared: &'a Prepared,
    ) -> Result<Option<Begun<'a>>, TokensError> {
        let lease = self.parts().config.refresh_lease;
        // From before the write: the database's clock starts the lease later than this.
        let send_until = Instant::now() + lease.saturating_sub(margin(lease));
        let (tenant, row, now) = (caller.tenant.clone(), set.clone(), self.now());
        let work = move |conn: &mut Conn| store::begin_refresh(conn, &tenant, &row, lease, now);
        let begun = self.parts().db.write::<_, DbError, _>(work).await?;
        Ok(begun.map(|(epoch, since)| Begun { caller, set, prepared, epoch, since, send_until }))
    }

    /// Calls the provider and stores what it says.
    async fn call(&self, begun: &Begun<'_>, note: &Note) -> Result<End, TokensError> {
        let Prepared { definition, endpoints, refresh_token } = begun.prepared;
        let Some(params) = definition.settings.refresh(definition.factory, refresh_token) else {
            self.end_badly(begun, Phase::NeedsReauth, ProviderFault::Config, None).await?;
            return Err(TokensError::NoTokenStorage);
        };
        let issued_at = self.now();
        let request = definition.token_request(&endpoints.token, params, issued_at);
        // Who was stopped for a while may have lost the set to another daemon, which has sent its own request.
        if Instant::now() >= begun.send_until {
            self.back_to_idle(begun, "too-late").await;
            return Ok(End::Overtaken("lease"));
        }
        let margin = margin(self.parts().config.refresh_lease);
        let answer = timeout(margin, self.parts().upstream.token(request)).await;
        match answer.unwrap_or_else(|_| Err(out_of_time())) {
            Ok(answer) => {
                self.untrip(&begun.caller.tenant, definition).await;
                let brought = Brought::new(answer, issued_at, &self.parts().config);
                self.keep(begun, brought).await
            }
            Err(failure) => {
                note.add("reason", failure.reason);
                Err(self.failed(begun, &failure).await?)
            }
        }
    }

    /// Stores what was brought, however long device and database take: it is the only copy there is.
    async fn keep(&self, begun: &Begun<'_>, mut brought: Brought) -> Result<End, TokensError> {
        let tenant = &begun.caller.tenant;
        let mut base = begun.set.version;
        loop {
            let set = refreshed(begun, &brought, base + 1, self.now());
            let sealed = match self.seal_again(begun, &brought, &set).await {
                Err(VaultError::TooLarge { .. }) if brought.id_token.take().is_some() => continue,
                Err(error) => {
                    self.end_badly(begun, Phase::NeedsReauth, ProviderFault::Protocol, None).await?;
                    return Err(error.into());
                }
                Ok(sealed) => sealed,
            };
            match self.store_answer(tenant, base, &set, &sealed).await? {
                Stored::Done => return Ok(End::Refreshed(set.version)),
                // The newer answer wins, if it can go on by itself; the provider may have ended what older ones brought.
                Stored::Overtaken { version, issued_at }
                    if begun.since > issued_at && brought.refresh_token.is_some() =>
                {
                    base = version;
                }
                Stored::Overtaken { .. } => return Ok(End::Overtaken("answer")),
                Stored::Gone => {
                    // Deleted meanwhile: what the provider has just given is to be worth nothing.
                    self.revoke_brought(begun, &brought);
                    return Ok(End::Overtaken("deleted"));
                }
            }
        }
    }

    /// # Errors
    /// [`VaultError::TooLarge`]: the one that waiting does not end.
    async fn seal_again(
        &self,
        begun: &Begun<'_>,
        brought: &Brought,
        set: &Set,
    ) -> Result<SealedRecord, VaultError> {
        let bound = Bound::new(&begun.prepared.definition, &set.identity_id);
        let payload = brought.payload(&bound, Some(&begun.prepared.refresh_token));
        let place = store::place(&begun.caller.tenant, &set.user, &set.connection, set.version);
        loop {
            match self.parts().vault.seal_record(place.clone(), &payload).await {
                Ok(sealed) => return Ok(sealed),
                Err(error @ VaultError::TooLarge { .. }) => return Err(error),
                Err(error) => {
                    tracing::error!(token_set = %set.id, code = error.audit_code(), "a refreshed token set waits to be sealed");
                    sleep(TRY_AGAIN).await;
                }
            }
        }
    }

    /// Stores an answer; in the spool first, if the database does not take it at once.
    ///
    /// # Errors
    /// If the database refuses it for good: it stays in the spool.
    async fn store_answer(
        &self,
        tenant: &TenantId,
        base: u64,
        set: &Set,
        sealed: &SealedRecord,
    ) -> Result<Stored, DbError> {
        let mut spooled: Option<PathBuf> = None;
        loop {
            match self.finish(tenant, base, set, sealed).await {
                Ok(stored) => {
                    if let Some(path) = &spooled {
                        spool::remove(path).await;
                    }
                    return Ok(stored);
                }
                Err(error @ (DbError::Refused(_) | DbError::Impossible { .. })) if spooled.is_some() => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::error!(token_set = %set.id, %error, "a refreshed token set waits to be stored");
                    if spooled.is_none() {
                        spooled = self.spool(tenant, base, set, sealed).await;
                    }
                    sleep(TRY_AGAIN).await;
                }
            }
        }
    }

    pub(super) async fn finish(
        &self,
        tenant: &TenantId,
        base: u64,
        set: &Set,
        sealed: &SealedRecord,
    ) -> Result<Stored, DbError> {
        let (tenant, set, sealed) = (tenant.clone(), set.clone(), sealed.clone());
        let work = move |conn: &mut Conn| {
            // After a commit that nobody confirmed, it may be there already.
            match store::find_by_id(conn, &tenant, &set.id)? {
                Some(now) if now.version == set.version && now.issued_at == set.issued_at => Ok(Stored::Done),
                _ => store::finish_refresh(conn, &tenant, base, &set, &sealed),
            }
        };
        self.parts().db.write(work).await
    }

    /// Writes down how a refresh failed; the error for whoever waits.
    async fn failed(&self, begun: &Begun<'_>, failure: &TokenFailure) -> Result<TokensError, TokensError> {
        let Prepared { definition, .. } = begun.prepared;
        let fault = match fault_of(failure) {
            // The person has to do something there, which nobody but the person can.
            ProviderFault::Policy if needs_person(failure) => ProviderFault::GrantDead,
            fault => fault,
        };
        match fault {
            ProviderFault::GrantDead => {
                self.end_badly(begun, Phase::NeedsReauth, fault, None).await?;
                return Ok(TokensError::NeedsReauthorization);
            }
            ProviderFault::Config if refuses_client(failure) => {
                let doubled = BREAKER.saturating_mul(1 << definition.breaker_failures.min(6));
                let pause =
                    doubled.max(failure.retry_after.unwrap_or_default()).min(Duration::from_secs(3600));
                let until = self.now().plus(pause);
                self.trip(begun.caller, definition, until, fault.name()).await;
            }
            _ => {}
        }
        let phase = match begun.set.phase {
            // The one more try after a crash: there is no third one.
            Phase::Refreshing if failure.was_sent => Phase::NeedsReauth,
            phase => phase,
        };
        let is_ok = failure.status.is_some_and(|status| (200..300).contains(&status));
        let error = match failure.status {
            None if failure.was_sent => store::LOST,
            Some(_) if is_ok && failure.class == Class::Protocol => store::UNREADABLE,
            _ => fault.name(),
        };
        self.end_with(begun, phase, error, failure.retry_after).await?;
        Ok(provider_error(failure))
    }

    async fn end_badly(
        &self,
        begun: &Begun<'_>,
        phase: Phase,
        fault: ProviderFault,
        asked: Option<Duration>,
    ) -> Result<(), TokensError> {
        self.end_with(begun, phase, fault.name(), asked).await
    }

    async fn end_with(
        &self,
        begun: &Begun<'_>,
        phase: Phase,
        error: &'static str,
        asked: Option<Duration>,
    ) -> Result<(), TokensError> {
        let set = begun.set;
        let failures = set.failures.saturating_add(1);
        let retry_at = self.now().plus(plan::pause(failures, asked, jitter(&set.id, failures)));
        let failure = Failure { phase, error, failures, retry_at, spent: set.spent };
        let written = self.write_failure(begun, failure).await?;
        // Not this refresh's to say any more: a peer has stored an answer, which whoever waits will find.
        if written && phase == Phase::NeedsReauth {
            self.record_dead(begun.caller, set, error);
        }
        Ok(())
    }

    /// Gives the set back: nothing was sent.
    async fn back_to_idle(&self, begun: &Begun<'_>, why: &'static str) {
        let set = begun.set;
        // What was uncertain before is so still.
        let phase = set.phase;
        let retry_at = self.now().plus(Duration::from_secs(1));
        let failure = Failure { phase, error: why, failures: set.failures, retry_at, spent: set.spent };
        if let Err(error) = self.write_failure(begun, failure).await {
            tracing::warn!(%error, "a refresh that was not sent counts as uncertain");
        }
    }

    async fn write_failure(&self, begun: &Begun<'_>, failure: Failure) -> Result<bool, DbError> {
        let (tenant, row, epoch) = (begun.caller.tenant.clone(), begun.set.clone(), begun.epoch);
        let work = move |conn: &mut Conn| store::fail_refresh(conn, &tenant, &row, epoch, &failure);
        self.parts().db.write(work).await
    }

    /// A set of which nothing more is to be had: its one more try was lost too, or its connector has moved.
    pub(super) async fn give_up(
        &self,
        tenant: &TenantId,
        set: &Set,
        why: &'static str,
    ) -> Result<(), TokensError> {
        let failure = Failure {
            phase: Phase::NeedsReauth,
            error: why,
            failures: set.failures.saturating_add(1),
            retry_at: set.retry_at,
            spent: true,
        };
        let (owner, row) = (tenant.clone(), set.clone());
        let work = move |conn: &mut Conn| store::fail_refresh(conn, &owner, &row, row.epoch, &failure);
        if self.parts().db.write::<_, DbError, _>(work).await? {
            let caller = Caller::system("token-refresh", tenant.clone());
            self.record_dead(&caller, set, why);
        }
        Ok(())
    }

    fn record_dead(&self, caller: &Caller, set: &Set, why: &'static str) {
        let event = Event::new(Action::TokenSetDead, "token-set", set.id.as_str())
            .detail("user", set.user.as_str())
            .detail("target", set.connection.target.as_str());
        self.parts().audit.record_soon(caller, event, Outcome::Failure(why));
    }

    fn revoke_brought(&self, begun: &Begun<'_>, brought: &Brought) {
        let Prepared { definition, endpoints, .. } = begun.prepared;
        let Some(endpoint) = endpoints.revocation.clone() else { return };
        let (token, hint) = match &brought.refresh_token {
            Some(token) => (token, "refresh_token"),
            None => (&brought.access_token, "access_token"),
        };
        let grant = self.revocation(definition, endpoint, token.clone(), hint);
        self.revoke_soon(begun.caller, vec![grant]);
    }
}

/// Takes a flight off the list when its task ends, however it does.
struct Landing<'a> {
    tokens: &'a Tokens,
    key: &'a (TenantId, TokenSetId),
    /// Dropped after the entry: who joins then finds no flight and begins one.
    ended: watch::Sender<Ended>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.tokens.inner.flights.0.lock().unwrap_or_else(PoisonError::into_inner).remove(self.key);
    }
}

/// The row of a set as the answer makes it. What the provider leaves out stays, but its expiry.
fn refreshed(begun: &Begun<'_>, brought: &Brought, version: u64, now: Timestamp) -> Set {
    let set = begun.set;
    let ahead = begun.prepared.definition.connector.refresh_ahead;
    let spread = jitter(&set.id, version);
    Set {
        has_refresh_token: true,
        scope: brought.scope.clone().or_else(|| set.scope.clone()),
        token_type: brought.token_type.clone().or_else(|| set.token_type.clone()),
        expires_at: brought.expires_at,
        issued_at: begun.since,
        version,
        refresh_at: plan::refresh_at(brought.expires_at, brought.issued_at, true, ahead, spread),
        updated_at: now,
        ..set.clone()
    }
}

/// The part of a lease that is left for answer and storing when a request is sent at the last moment.
fn margin(lease: Duration) -> Duration {
    MARGIN.min(lease / 2)
}

const fn out_of_time() -> TokenFailure {
    let class = Class::Transient;
    TokenFailure { class, code: None, status: None, retry_after: None, reason: "lease", was_sent: true }
}

/// Whether it is the client that the provider refuses, and so each of its users.
fn refuses_client(failure: &TokenFailure) -> bool {
    let codes = ["invalid_client", "unauthorized_client", "incorrect_client_credentials"];
    failure.code.as_deref().is_some_and(|code| codes.contains(&code))
}

fn needs_person(failure: &TokenFailure) -> bool {
    let codes = ["interaction_required", "consent_required", "login_required"];
    failure.code.as_deref().is_some_and(|code| codes.contains(&code))
}

pub(super) fn provider_error(failure: &TokenFailure) -> TokensError {
    TokensError::Provider(ProviderError { kind: fault_of(failure), retry_after: failure.retry_after })
}
