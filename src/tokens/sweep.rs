//! What happens by itself: refreshes ahead of expiry, the spool, and the end of proofs that nobody used.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;

use super::Tokens;
use super::model::Connector;
use super::plan;
use super::sets::jitter;
use super::store::{sets, verifications};
use crate::db::{Conn, DbError};
use crate::ids::TenantId;

/// How often it is looked for what is due.
const EVERY: Duration = Duration::from_secs(2);
/// Sets that are looked at in one go.
const PAGE: i64 = 200;
/// Proofs that are deleted in one transaction.
const PURGE: i64 = 500;

impl Tokens {
    /// Runs until the task is dropped.
    pub async fn run(&self, tenant: &TenantId) {
        self.replay_spool().await;
        loop {
            tokio::time::sleep(EVERY).await;
            if let Err(error) = self.sweep(tenant).await {
                tracing::warn!(%error, "due refreshes cannot be looked for");
            }
        }
    }

    async fn sweep(&self, tenant: &TenantId) -> Result<(), DbError> {
        if !matches!(self.parts().vault.quarantined_at().await, Ok(None)) {
            return Ok(());
        }
        let (owner, now) = (tenant.clone(), self.now());
        let due = move |conn: &mut Conn| sets::due(conn, &owner, now, PAGE);
        let due = self.parts().db.read::<_, DbError, _>(due).await?;
        let mut by_connector = HashMap::<_, Vec<_>>::new();
        for set in due {
            by_connector.entry(set.connector.clone()).or_default().push(set);
        }
        // The soonest to expire first, some at a time for each provider: after a downtime they all are due.
        let at_once = self.parts().config.background_at_once.max(1);
        let refreshes = by_connector.into_values().map(|sets| async move {
            for some in sets.chunks(at_once) {
                join_all(some.iter().map(|set| self.refresh(tenant, set))).await;
            }
        });
        join_all(refreshes).await;
        self.purge(tenant).await
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
