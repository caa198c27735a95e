//! What happens by itself: refreshes ahead of expiry, the spool, and the end of proofs that nobody used.

use std::collections::HashMap;
use std::future::ready;
use std::time::Duration;

use futures_util::stream::{self, FuturesUnordered, StreamExt};

use super::Tokens;
use super::model::Connector;
use super::plan;
use super::sets::jitter;
use super::store::sets::{self, Set};
use super::store::{connectors, verifications};
use crate::db::{Conn, DbError, Engine};
use crate::identity::Caller;
use crate::ids::{ConnectorId, TenantId};

/// How often it is looked for what is due.
const EVERY: Duration = Duration::from_secs(2);
/// Sets that are looked at in one go.
const PAGE: i64 = 200;
/// Proofs that are deleted in one transaction.
const PURGE: i64 = 500;

impl Tokens {
    /// Takes up what an earlier run has left, before anybody reads: answers in the spool, and on SQLite, which has one
    /// daemon, leases that nobody holds.
    pub async fn recover(&self, tenant: &TenantId) {
        if self.parts().db.engine() == Engine::Sqlite {
            let owner = tenant.clone();
            let ended = self.parts().db.write::<_, DbError, _>(move |conn| sets::end_leases(conn, &owner));
            if let Err(error) = ended.await {
                tracing::warn!(%error, "the leases of an earlier run end by themselves");
            }
        }
        self.clear_unfinished().await;
        self.replay_spool().await;
    }

    /// Runs until the task is dropped.
    pub async fn run(&self, tenant: &TenantId) {
        // Connectors whose sets are being refreshed. One that hangs takes minutes, for which no other waits.
        let (mut busy, mut under_way) = (Vec::new(), FuturesUnordered::new());
        loop {
            // Also what this run had to leave, because the database refused it.
            self.replay_spool().await;
            let pause = tokio::time::sleep(EVERY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    Some(done) = under_way.next() => busy.retain(|connector| *connector != done),
                }
            }
            if !matches!(self.parts().vault.quarantined_at().await, Ok(None)) {
                continue;
            }
            match self.due(tenant, &busy).await {
                Ok(due) => {
                    for (connector, sets) in due {
                        busy.push(connector.clone());
                        under_way.push(self.refresh_all(tenant, connector, sets));
                    }
                }
                Err(error) => tracing::warn!(%error, "due refreshes cannot be looked for"),
            }
            if let Err(error) = self.purge(tenant).await {
                tracing::warn!(%error, "proofs that are too late cannot be deleted");
            }
        }
    }

    /// What is due of connectors that are not busy, the soonest to expire first.
    async fn due(
        &self,
        tenant: &TenantId,
        busy: &[ConnectorId],
    ) -> Result<HashMap<ConnectorId, Vec<Set>>, DbError> {
        let (owner, now) = (tenant.clone(), self.now());
        let all = self.parts().db.read::<_, DbError, _>(move |conn| connectors::all(conn, &owner, now));
        let (mut busy, mut by_connector) = (busy.to_vec(), HashMap::<_, Vec<_>>::new());
        for (connector, stores_tokens, is_paused) in all.await? {
            if !stores_tokens {
                // Deleted when it was switched off; this is what a crash has left.
                let caller = Caller::system("token-upkeep", tenant.clone());
                if let Err(error) = self.delete_sets_of(&caller, &connector, "storage-off").await {
                    tracing::warn!(%error, "the token sets of a connector wait to be deleted");
                }
            } else if is_paused {
                busy.push(connector);
            }
        }
        let owner = tenant.clone();
        let due = move |conn: &mut Conn| sets::due(conn, &owner, &busy, now, PAGE);
        for set in self.parts().db.read::<_, DbError, _>(due).await? {
            by_connector.entry(set.connector.clone()).or_default().push(set);
        }
        Ok(by_connector)
    }

    /// Refreshes sets of one connector, in their order and some at a time: after a downtime they all are due.
    async fn refresh_all(&self, tenant: &TenantId, connector: ConnectorId, sets: Vec<Set>) -> ConnectorId {
        let at_once = self.parts().config.background_at_once.max(1);
        let flights = stream::iter(sets).map(|set| async move { self.refresh(tenant, &set).await });
        flights.buffer_unordered(at_once).for_each(|_| ready(())).await;
        connector
    }

    async fn purge(&self, tenant: &TenantId) -> Result<(), DbError> {
        let (owner, now) = (tenant.clone(), self.now());
        let late = move |conn: &mut Conn| verifications::late(conn, &owner, now);
        if !self.parts().db.read::<_, DbError, _>(late).await? {
            return Ok(());
        }
        let (owner, which) = (tenant.clone(), verifications::Which::Late(now));
        let work = move |conn: &mut Conn| verifications::purge(conn, &owner, &which, PURGE);
        self.parts().db.write::<_, DbError, _>(work).await.map(drop)
    }

    /// Computes anew when a connector's sets are refreshed by themselves.
    pub(super) async fn reschedule(&self, tenant: &TenantId, connector: &Connector) -> Result<(), DbError> {
        let mut after = String::new();
        loop {
            let (owner, id, from) = (tenant.clone(), connector.id.clone(), after.clone());
            let page = move |conn: &mut Conn| sets::of_connector(conn, &owner, &id, &from, PAGE);
            let page = self.parts().db.read::<_, DbError, _>(page).await?;
            let Some(last) = page.last() else { return Ok(()) };
            last.id.as_str().clone_into(&mut after);
            let (owner, ahead) = (tenant.clone(), connector.refresh_ahead);
            let work = move |conn: &mut Conn| {
                page.iter().try_for_each(|set| {
                    let spread = jitter(&set.id, set.version);
                    let has = set.has_refresh_token;
                    let at = plan::refresh_at(set.expires_at, set.issued_at, has, ahead, spread);
                    if at == set.refresh_at { Ok(()) } else { sets::schedule(conn, &owner, set, at) }
                })
            };
            self.parts().db.write::<_, DbError, _>(work).await?;
        }
    }
}
