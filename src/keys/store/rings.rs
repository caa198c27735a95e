//! SQL of rings: keys that come and go, the rules they follow, and how many tokens they have out.
//!
//! A change reads the ring, decides, and writes what differs, in one transaction that is guarded by the
//! ring's version ([`claim`]): who was slower decides again on what is there now.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use diesel::prelude::*;

use super::Public;
use crate::clock::Timestamp;
use crate::db::schema::{clock_marks, installation, signing_key_tokens, signing_keys, signing_rings};
use crate::db::{Conn, DbError};
use crate::ids::{SigningKeyId, TenantId};
use crate::keys::jwk;
use crate::keys::model::{Choice, End, Origin, Phase, Policy, Use};
use crate::keys::plan::{Ring, Slot};
use crate::keys::time::Mark;
use crate::seal::{Alg, DeviceName, KeyRef, KeySpec};
use crate::with_conn;

/// What is known of a ring's key beyond its times.
#[derive(Clone)]
pub(in crate::keys) struct Entry {
    pub(in crate::keys) choice: Option<Choice>,
    pub(in crate::keys) origin: Origin,
    pub(in crate::keys) device: KeyRef,
    /// `None` for cookie keys.
    pub(in crate::keys) alg: Option<Alg>,
    /// The public half; `None` until the device has made the key, and for cookie keys.
    pub(in crate::keys) public: Option<Public>,
}

/// A ring with everything that is known of its keys.
#[derive(Clone)]
pub(in crate::keys) struct Stored {
    pub(in crate::keys) ring: Ring,
    pub(in crate::keys) entries: HashMap<SigningKeyId, Arc<Entry>>,
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = signing_keys)]
struct Row {
    id: String,
    alg: String,
    key_ref: Vec<u8>,
    kid: Option<String>,
    jwk: Option<String>,
    state: String,
    created_at: i64,
    device: String,
    choice: Option<String>,
    origin: String,
    grace: i64,
    published_at: Option<i64>,
    effective_at: Option<i64>,
    signs_from: Option<i64>,
    signs_until: Option<i64>,
    longest: i64,
    margin: i64,
    is_leaving: i64,
    ended: Option<String>,
}

/// The ring and all of its keys that are not destroyed; `None` if the tenant has no such ring yet.
pub(in crate::keys) fn load(
    conn: &mut Conn,
    tenant: &TenantId,
    used: Use,
) -> Result<Option<Stored>, DbError> {
    let ring = signing_rings::table
        .find((tenant.as_str(), used.name()))
        .select((signing_rings::version, signing_rings::policy));
    let found: Option<(i64, String)> = with_conn!(&mut *conn, |c| ring.first(c).optional())?;
    let Some((version, policy)) = found else { return Ok(None) };
    let policy: Policy = serde_json::from_str(&policy)
        .map_err(|_| DbError::impossible("signing_rings", &format!("{tenant} {}", used.name())))?;
    let query = signing_keys::table
        .filter(signing_keys::tenant_id.eq(tenant.as_str()))
        .filter(signing_keys::purpose.eq(used.name()))
        .filter(signing_keys::state.ne(Phase::Destroyed.name()))
        .order(signing_keys::created_at);
    let rows: Vec<Row> = with_conn!(conn, |c| query.select(Row::as_select()).load(c))?;
    let mut stored =
        Stored { ring: Ring { used, version, policy, slots: Vec::new() }, entries: HashMap::new() };
    for row in rows {
        let impossible = || DbError::impossible("signing_keys", &row.id);
        let slot = slot(&row).ok_or_else(impossible)?;
        let entry = entry(&row, used, slot.phase).ok_or_else(impossible)?;
        stored.entries.insert(slot.id.clone(), Arc::new(entry));
        stored.ring.slots.push(slot);
    }
    Ok(Some(stored))
}

fn slot(row: &Row) -> Option<Slot> {
    let created_at = Timestamp::from_micros(row.created_at);
    let span = |micros: i64| u64::try_from(micros).ok().map(Duration::from_micros);
    let at = |time: Option<i64>| time.map(Timestamp::from_micros);
    let phase = Phase::parse(&row.state)?;
    let published_at = at(row.published_at);
    if phase.is_published() && published_at.is_none() {
        return None;
    }
    Some(Slot {
        id: SigningKeyId::parse(&row.id).ok()?,
        phase,
        created_at,
        grace: span(row.grace)?,
        published_at: published_at.unwrap_or(created_at),
        effective_at: at(row.effective_at).unwrap_or(created_at),
        signs_from: at(row.signs_from).unwrap_or(created_at),
        signs_until: at(row.signs_until),
        longest: span(row.longest)?,
        margin: span(row.margin)?,
        is_leaving: row.is_leaving != 0,
        end: row.ended.as_deref().map(|end| End::parse(end).ok_or(())).transpose().ok()?,
    })
}

fn entry(row: &Row, used: Use, phase: Phase) -> Option<Entry> {
    let device = KeyRef::from_bytes(&row.key_ref)?.on(DeviceName::parse(&row.device)?);
    let choice = row.choice.as_deref().map(|name| Choice::parse(name).ok_or(())).transpose().ok()?;
    let alg = match used {
        Use::Jwt => Some(Alg::parse(&row.alg).filter(|alg| alg.fits(device.spec()))?),
        Use::Cookie if device.spec() == KeySpec::HmacSha256 => None,
        Use::Cookie => return None,
    };
    let public = match (&row.kid, &row.jwk, alg) {
        (Some(kid), Some(jwk), Some(alg)) => {
            // The columns are for people to read. Tokens are checked with the key that the pin is of.
            let key = jwk::public_key(&serde_json::from_str(jwk).ok()?, device.spec())?;
            let public = Public::of(&key, alg, choice);
            if !device.is_pinned_by(&key) || public.kid != *kid {
                return None;
            }
            Some(public)
        }
        (None, None, _) => None,
        _ => return None,
    };
    if phase.is_published() && (!device.is_pinned() || public.is_none() != alg.is_none()) {
        return None;
    }
    Some(Entry { choice, origin: Origin::parse(&row.origin)?, device, alg, public })
}

/// The ring's version; `None` if there is no such ring.
pub(in crate::keys) fn version(
    conn: &mut Conn,
    tenant: &TenantId,
    used: Use,
) -> Result<Option<i64>, DbError> {
    let query = signing_rings::table.find((tenant.as_str(), used.name())).select(signing_rings::version);
    Ok(with_conn!(conn, |c| query.first(c).optional())?)
}

/// Makes the tenant's ring. Does nothing if it is there.
pub(in crate::keys) fn create(
    conn: &mut Conn,
    tenant: &TenantId,
    used: Use,
    policy: &Policy,
) -> Result<(), DbError> {
    let row = (
        signing_rings::tenant_id.eq(tenant.as_str()),
        signing_rings::purpose.eq(used.name()),
        signing_rings::version.eq(1),
        signing_rings::policy.eq(json(policy)),
    );
    let insert = diesel::insert_into(signing_rings::table).values(row).on_conflict_do_nothing();
    with_conn!(conn, |c| insert.execute(c))?;
    Ok(())
}

fn json(policy: &Policy) -> String {
    // Names and numbers always serialise.
    serde_json::to_string(policy).unwrap_or_default()
}

/// Begins the change from `before`, as it was loaded in this transaction, to `after`. `false`: somebody else
/// has changed the ring, and nothing was written.
pub(in crate::keys) fn claim(
    conn: &mut Conn,
    tenant: &TenantId,
    before: &Ring,
    after: &Ring,
) -> Result<bool, DbError> {
    let row = signing_rings::table
        .find((tenant.as_str(), after.used.name()))
        .filter(signing_rings::version.eq(before.version));
    let next = (signing_rings::version.eq(before.version + 1), signing_rings::policy.eq(json(&after.policy)));
    Ok(with_conn!(conn, |c| diesel::update(row).set(next).execute(c))? == 1)
}

/// Writes the slots that differ. One that is new needs [`insert`] first.
pub(in crate::keys) fn save(conn: &mut Conn, before: &Ring, after: &Ring) -> Result<(), DbError> {
    let differs = |slot: &&Slot| before.slot(&slot.id) != Some(slot);
    let mut changed: Vec<_> = after.slots.iter().filter(differs).collect();
    // The one that stops first: two of one ring never sign.
    changed.sort_by_key(|slot| slot.phase == Phase::Current);
    changed.into_iter().try_for_each(|slot| update(conn, slot))
}

fn update(conn: &mut Conn, slot: &Slot) -> Result<(), DbError> {
    let row = signing_keys::table.find(slot.id.as_str());
    let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
    let times = (
        signing_keys::published_at.eq(Some(slot.published_at.as_micros())),
        signing_keys::effective_at.eq(Some(slot.effective_at.as_micros())),
        signing_keys::signs_from.eq(Some(slot.signs_from.as_micros())),
        signing_keys::signs_until.eq(slot.signs_until.map(Timestamp::as_micros)),
    );
    let rest = (
        signing_keys::state.eq(slot.phase.name()),
        signing_keys::longest.eq(micros(slot.longest)),
        signing_keys::margin.eq(micros(slot.margin)),
        signing_keys::is_leaving.eq(i64::from(slot.is_leaving)),
        signing_keys::ended.eq(slot.end.map(End::name)),
    );
    with_conn!(conn, |c| diesel::update(row).set((times, rest)).execute(c))?;
    Ok(())
}

/// Records a key that is to be made.
pub(in crate::keys) fn insert(
    conn: &mut Conn,
    tenant: &TenantId,
    used: Use,
    slot: &Slot,
    entry: &Entry,
) -> Result<(), DbError> {
    let row = (
        signing_keys::id.eq(slot.id.as_str()),
        signing_keys::tenant_id.eq(tenant.as_str()),
        signing_keys::purpose.eq(used.name()),
        signing_keys::alg.eq(entry.alg.map_or("HS256", Alg::name)),
        signing_keys::key_ref.eq(entry.device.to_bytes()),
        signing_keys::state.eq(slot.phase.name()),
        signing_keys::created_at.eq(slot.created_at.as_micros()),
        signing_keys::device.eq(entry.device.device().as_str()),
        signing_keys::choice.eq(entry.choice.map(Choice::name)),
        signing_keys::origin.eq(entry.origin.name()),
        signing_keys::grace.eq(i64::try_from(slot.grace.as_micros()).unwrap_or(i64::MAX)),
    );
    with_conn!(conn, |c| diesel::insert_into(signing_keys::table).values(row).execute(c))?;
    Ok(())
}

/// Keeps what the device gave for a planned key.
///
/// # Errors
/// [`DbError::Duplicate`] if the tenant has, or had, a key of that `kid`.
pub(in crate::keys) fn made(
    conn: &mut Conn,
    id: &SigningKeyId,
    pinned: &KeyRef,
    public: Option<&Public>,
) -> Result<(), DbError> {
    let row = signing_keys::table.find(id.as_str());
    let made = (
        signing_keys::key_ref.eq(pinned.to_bytes()),
        signing_keys::kid.eq(public.map(|public| public.kid.as_str())),
        signing_keys::jwk.eq(public.map(|public| public.jwk.to_string())),
    );
    with_conn!(conn, |c| diesel::update(row).set(made).execute(c))?;
    Ok(())
}

/// Takes note that a key will sign something that lives so long. `false` if the key is not published any more:
/// then it must not sign. It is a change of the ring like any other, so that nobody decides on a ring without it.
pub(in crate::keys) fn raise_longest(
    conn: &mut Conn,
    tenant: &TenantId,
    used: Use,
    id: &SigningKeyId,
    lifetime: Duration,
) -> Result<bool, DbError> {
    let micros = i64::try_from(lifetime.as_micros()).unwrap_or(i64::MAX);
    let published = Phase::ALL.into_iter().filter(|phase| phase.is_published()).map(Phase::name);
    let row = signing_keys::table
        .find(id.as_str())
        .filter(signing_keys::state.eq_any(published.collect::<Vec<_>>()));
    let longest = row.clone().select(signing_keys::longest);
    let found: Option<i64> = with_conn!(&mut *conn, |c| longest.first(c).optional())?;
    match found {
        None => return Ok(false),
        Some(longest) if longest >= micros => return Ok(true),
        Some(_) => {}
    }
    // The ring's row is locked from here on, and what is read now is what others will find.
    let ring = signing_rings::table.find((tenant.as_str(), used.name()));
    let next = signing_rings::version.eq(signing_rings::version + 1);
    with_conn!(&mut *conn, |c| diesel::update(ring).set(next).execute(c))?;
    let raised = signing_keys::longest.eq(micros);
    Ok(with_conn!(conn, |c| diesel::update(row).set(raised).execute(c))? == 1)
}

/// Adds to the counts of tokens by key and time of expiry.
pub(in crate::keys) fn count_tokens(
    conn: &mut Conn,
    counts: &[(SigningKeyId, Timestamp, i64)],
) -> Result<(), DbError> {
    for (id, expires, tokens) in counts {
        let row = (
            signing_key_tokens::key_id.eq(id.as_str()),
            signing_key_tokens::expires_at.eq(expires.as_micros()),
            signing_key_tokens::tokens.eq(tokens),
        );
        let insert = diesel::insert_into(signing_key_tokens::table)
            .values(row)
            .on_conflict((signing_key_tokens::key_id, signing_key_tokens::expires_at))
            .do_update()
            .set(signing_key_tokens::tokens.eq(signing_key_tokens::tokens + *tokens));
        with_conn!(&mut *conn, |c| insert.execute(c))?;
    }
    Ok(())
}

/// How many tokens of the key are alive.
pub(in crate::keys) fn live_tokens(
    conn: &mut Conn,
    id: &SigningKeyId,
    now: Timestamp,
) -> Result<u64, DbError> {
    let query = signing_key_tokens::table
        .filter(signing_key_tokens::key_id.eq(id.as_str()))
        .filter(signing_key_tokens::expires_at.gt(now.as_micros()))
        .select(signing_key_tokens::tokens);
    let counts: Vec<i64> = with_conn!(conn, |c| query.load(c))?;
    Ok(counts.into_iter().filter_map(|count| u64::try_from(count).ok()).sum())
}

/// Forgets tokens that are dead since `before`.
pub(in crate::keys) fn forget_tokens(conn: &mut Conn, before: Timestamp) -> Result<(), DbError> {
    let dead = signing_key_tokens::table.filter(signing_key_tokens::expires_at.le(before.as_micros()));
    with_conn!(conn, |c| diesel::delete(dead).execute(c))?;
    Ok(())
}

/// Whether the installation is in quarantine after a restore. The column is `vault`'s.
pub(in crate::keys) fn is_quarantined(conn: &mut Conn) -> Result<bool, DbError> {
    let query = installation::table.find(1).select(installation::quarantined_at);
    let since: Option<Option<i64>> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(since.flatten().is_some())
}

/// What daemons have seen of the wall clock.
pub(in crate::keys) fn mark(conn: &mut Conn) -> Result<Option<Mark>, DbError> {
    let query = clock_marks::table.find(1).select((
        clock_marks::high,
        clock_marks::doubt,
        clock_marks::lag,
        clock_marks::doubt_until,
    ));
    let row: Option<(i64, i64, i64, i64)> = with_conn!(conn, |c| query.first(c).optional())?;
    let span = |micros| Duration::from_micros(u64::try_from(micros).unwrap_or(0));
    Ok(row.map(|(high, doubt, lag, until)| Mark {
        high: Timestamp::from_micros(high),
        doubt: span(doubt),
        lag: span(lag),
        doubt_until: Timestamp::from_micros(until),
    }))
}

/// Keeps what a daemon has seen, together with what others have.
pub(in crate::keys) fn add_mark(conn: &mut Conn, new: Mark) -> Result<(), DbError> {
    let kept = mark(conn)?;
    set_mark(conn, kept.map_or(new, |kept| new.with(kept)))
}

/// Replaces what daemons have seen.
pub(in crate::keys) fn set_mark(conn: &mut Conn, mark: Mark) -> Result<(), DbError> {
    let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
    let columns = (
        clock_marks::high.eq(mark.high.as_micros()),
        clock_marks::doubt.eq(micros(mark.doubt)),
        clock_marks::lag.eq(micros(mark.lag)),
        clock_marks::doubt_until.eq(mark.doubt_until.as_micros()),
    );
    let insert = diesel::insert_into(clock_marks::table)
        .values((clock_marks::id.eq(1), columns))
        .on_conflict(clock_marks::id)
        .do_update()
        .set(columns);
    with_conn!(conn, |c| insert.execute(c))?;
    Ok(())
}
