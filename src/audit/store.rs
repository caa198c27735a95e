//! The log's tables.
//!
//! `audit_head` row 1 is the chain's end. Row 2 exists on SQLite only, where one daemon writes: all
//! intents up to its number have their outcome, so a start after a crash reads only what is newer.

use diesel::dsl::sql;
use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};
use diesel::sql_types::Bool;
use uuid::Uuid;

use crate::audit::model::Record;
use crate::audit::record::{Draft, GENESIS, Kind, hash_of, seal, step_of};
use crate::audit::verify::Checkpoint;
use crate::db::schema::{audit_head, audit_records};
use crate::db::{Conn, DbError};
use crate::with_conn;

const CHAIN: i64 = 1;
const SETTLED: i64 = 2;

/// Appends all drafts behind the `head` that [`lock_head`] gave, and returns their numbers, first to last.
pub(super) fn append<'a>(
    conn: &mut Conn,
    mut head: Checkpoint,
    drafts: impl Iterator<Item = &'a Draft>,
) -> Result<Vec<u64>, DbError> {
    let mut seqs = Vec::new();
    let mut rows = Vec::new();
    for draft in drafts {
        let seq = head.seq + 1;
        let (body, hash) = seal(draft, seq, &head.hash);
        rows.push((
            audit_records::seq.eq(signed(seq)),
            audit_records::at.eq(draft.at.as_micros()),
            audit_records::tenant_id.eq(draft.tenant.as_str()),
            audit_records::action.eq(draft.action),
            audit_records::body.eq(body),
        ));
        seqs.push(seq);
        head = Checkpoint { seq, hash };
    }
    match conn {
        // A row at a time through one cached statement is quicker here than a statement made per batch.
        Conn::Sqlite(c) => {
            for row in rows {
                diesel::insert_into(audit_records::table).values(row).execute(c)?;
            }
        }
        Conn::Postgres(c) => {
            diesel::insert_into(audit_records::table).values(rows).execute(c)?;
        }
    }
    let end = (audit_head::seq.eq(signed(head.seq)), audit_head::hash.eq(&head.hash[..]));
    with_conn!(conn, |c| diesel::update(audit_head::table.find(CHAIN)).set(end).execute(c))?;
    Ok(seqs)
}

/// The chain's end, locked until the transaction ends; makes the row on first use.
pub(super) fn lock_head(conn: &mut Conn) -> Result<Checkpoint, DbError> {
    let query = audit_head::table.find(CHAIN).select((audit_head::seq, audit_head::hash));
    let found: Option<(i64, Vec<u8>)> = match conn {
        // On SQLite the write transaction is the lock.
        Conn::Sqlite(c) => query.first(c).optional()?,
        Conn::Postgres(c) => query.for_update().first(c).optional()?,
    };
    if let Some(row) = found {
        return checkpoint(row);
    }
    let start = (audit_head::id.eq(CHAIN), audit_head::seq.eq(0), audit_head::hash.eq(&GENESIS[..]));
    let insert = diesel::insert_into(audit_head::table).values(start).on_conflict_do_nothing();
    with_conn!(conn, |c| insert.execute(c))?;
    // Another daemon may have been first and may have appended since: ask again, this time for its row.
    match conn {
        Conn::Sqlite(c) => checkpoint(query.first(c)?),
        Conn::Postgres(c) => checkpoint(query.for_update().first(c)?),
    }
}

/// The chain's end, for readers.
pub(super) fn head(conn: &mut Conn) -> Result<Checkpoint, DbError> {
    let query = audit_head::table.find(CHAIN).select((audit_head::seq, audit_head::hash));
    let found: Option<(i64, Vec<u8>)> = with_conn!(conn, |c| query.first(c).optional())?;
    found.map_or(Ok(Checkpoint::START), checkpoint)
}

fn checkpoint((seq, hash): (i64, Vec<u8>)) -> Result<Checkpoint, DbError> {
    let hash = hash.try_into().map_err(|_| DbError::impossible("audit_head", "1"))?;
    Ok(Checkpoint { seq: unsigned(seq), hash })
}

/// Up to which number all intents have their outcome.
pub(super) fn settled(conn: &mut Conn) -> Result<u64, DbError> {
    let query = audit_head::table.find(SETTLED).select(audit_head::seq);
    let found: Option<i64> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(found.map_or(0, unsigned))
}

/// Notes up to which number all intents have their outcome.
pub(super) fn set_settled(conn: &mut Conn, seq: u64) -> Result<(), DbError> {
    let row =
        (audit_head::id.eq(SETTLED), audit_head::seq.eq(signed(seq)), audit_head::hash.eq(&GENESIS[..]));
    let upsert = diesel::insert_into(audit_head::table)
        .values(row)
        .on_conflict(audit_head::id)
        .do_update()
        .set(audit_head::seq.eq(signed(seq)));
    with_conn!(conn, |c| upsert.execute(c))?;
    Ok(())
}

/// Records after `after`, oldest first, each with its action: one tenant's, or everybody's.
pub(super) fn page(
    conn: &mut Conn,
    tenant: Option<&str>,
    after: u64,
    limit: u32,
) -> Result<Vec<(String, Record)>, DbError> {
    let all = audit_records::table
        .filter(audit_records::seq.gt(signed(after)))
        .order(audit_records::seq)
        .limit(i64::from(limit))
        .select((audit_records::action, audit_records::seq, audit_records::body));
    let rows: Vec<(String, i64, String)> = match tenant {
        Some(tenant) => with_conn!(conn, |c| all.filter(audit_records::tenant_id.eq(tenant)).load(c))?,
        None => with_conn!(conn, |c| all.load(c))?,
    };
    Ok(rows.into_iter().map(|(action, seq, body)| (action, Record { seq: unsigned(seq), body })).collect())
}

/// A tenant's last record of the roll-back anchor.
pub(super) fn last_of_anchor(conn: &mut Conn, tenant: &str) -> Result<Option<Record>, DbError> {
    // Word for word as in the index: neither engine uses a partial one for values that are bound.
    let of_anchor = sql::<Bool>("action IN ('anchor.advance', 'anchor.accept')");
    let query = audit_records::table
        .filter(audit_records::tenant_id.eq(tenant))
        .filter(of_anchor)
        .order(audit_records::seq.desc())
        .select((audit_records::seq, audit_records::body));
    let row: Option<(i64, String)> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(row.map(|(seq, body)| Record { seq: unsigned(seq), body }))
}

/// The hash of the record with that number.
pub(super) fn hash_at(conn: &mut Conn, seq: u64) -> Result<Option<[u8; 32]>, DbError> {
    if seq == 0 {
        return Ok(Some(GENESIS));
    }
    let query = audit_records::table.find(signed(seq)).select(audit_records::body);
    let body: Option<String> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(body.as_deref().map(hash_of))
}

/// Which steps of the drafts' ids were written after `after`: for a commit whose answer was lost.
pub(super) fn steps_since(
    conn: &mut Conn,
    after: u64,
    drafts: &[Draft],
) -> Result<Vec<(Kind, Uuid)>, DbError> {
    let mut found = Vec::new();
    let mut from = after;
    loop {
        let records = page(conn, None, from, 4096)?;
        let Some((_, last)) = records.last() else { return Ok(found) };
        from = last.seq;
        let steps = records.iter().filter_map(|(_, record)| step_of(&record.body));
        found.extend(steps.filter(|(_, id)| drafts.iter().any(|draft| draft.id == *id)));
    }
}

fn signed(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

fn unsigned(seq: i64) -> u64 {
    u64::try_from(seq).unwrap_or(0)
}
