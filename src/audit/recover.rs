//! Closes what a crash left open, before the first new record.
//!
//! Exact and bounded: the appender moves a stored mark (`audit_head` row 2) behind the oldest intent
//! without outcome, so only records above it are read. SQLite has one daemon, so every intent found
//! open was left by a process that is gone.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::audit::record::{ClosedBy, Kind, closed_line, step_of};
use crate::audit::{AuditError, store};
use crate::clock::Timestamp;
use crate::db::{Db, DbError, Engine};

const PAGE: u32 = 4096;

/// Writes `unknown` outcomes for all open intents; returns the mark from which the appender goes on.
pub(super) async fn close_unfinished(db: &Db, now: Timestamp) -> Result<u64, AuditError> {
    if db.engine() != Engine::Sqlite {
        return Ok(db.read(store::head).await?.seq);
    }
    let mut at = db.read(store::settled).await?;
    // Ids are made in the order of time, so the outcomes keep the order of the intents.
    let mut open: BTreeMap<Uuid, String> = BTreeMap::new();
    loop {
        let records = db.read(move |conn| store::page(conn, None, at, PAGE)).await?;
        let Some((_, last)) = records.last() else { break };
        at = last.seq;
        for (_, record) in records {
            match step_of(&record.body) {
                Some((Kind::Intent, id)) => drop(open.insert(id, record.body)),
                Some((Kind::Outcome, id)) => drop(open.remove(&id)),
                _ => {}
            }
        }
    }
    let outcomes: Vec<_> =
        open.iter().filter_map(|(id, intent)| closed_line(intent, *id, ClosedBy::Restart, now)).collect();
    let settled = db.write(move |conn| {
        let head = store::lock_head(conn)?;
        let settled = store::append(conn, head, outcomes.iter())?.last().copied().unwrap_or(at);
        store::set_settled(conn, settled)?;
        Ok::<_, DbError>(settled)
    });
    Ok(settled.await?)
}
