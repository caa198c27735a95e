//! SQL of token sets. Each write of a refresh is a compare-and-set on what the refresh began with.

use diesel::prelude::*;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::{connectors, token_sets};
use crate::db::{self, Conn, DbError};
use crate::ids::{ConnectorId, TenantId, TokenSetId, UserId};
use crate::tokens::model::{Connection, Family};
use crate::tokens::plan::{Facts, Phase};
use crate::tokens::refresh::INTEGRITY;
use crate::vault::{self, Place, RecordKind, SealedRecord, UnopenedRecord};
use crate::with_conn;

/// A token set's row.
#[derive(Clone, Debug)]
pub(in crate::tokens) struct Set {
    pub(in crate::tokens) id: TokenSetId,
    pub(in crate::tokens) user: UserId,
    pub(in crate::tokens) connection: Connection,
    pub(in crate::tokens) connector: ConnectorId,
    pub(in crate::tokens) issuer: Option<String>,
    pub(in crate::tokens) identity_id: String,
    pub(in crate::tokens) has_refresh_token: bool,
    pub(in crate::tokens) scope: Option<String>,
    pub(in crate::tokens) token_type: Option<String>,
    pub(in crate::tokens) expires_at: Option<i64>,
    pub(in crate::tokens) issued_at: Timestamp,
    pub(in crate::tokens) version: u64,
    pub(in crate::tokens) phase: Phase,
    pub(in crate::tokens) epoch: i64,
    pub(in crate::tokens) lease_until: Timestamp,
    pub(in crate::tokens) spent: bool,
    pub(in crate::tokens) failures: u64,
    pub(in crate::tokens) last_error: Option<String>,
    pub(in crate::tokens) retry_at: Timestamp,
    pub(in crate::tokens) refresh_at: Option<Timestamp>,
    pub(in crate::tokens) created_at: Timestamp,
    pub(in crate::tokens) updated_at: Timestamp,
}

/// Where the values of a user's connection lie. Made of what was asked for, not of a row.
pub(in crate::tokens) fn place(
    tenant: &TenantId,
    user: &UserId,
    connection: &Connection,
    version: u64,
) -> Place {
    let parts = [user.as_str(), connection.family.name(), &connection.target];
    Place::new(RecordKind::TokenSet, tenant, &parts, version)
}

/// `last_error` of a set whose last request at the provider may have been received: the answer was lost.
pub(in crate::tokens) const LOST: &str = "provider-lost";
/// The same of an answer that came and says nothing.
pub(in crate::tokens) const UNREADABLE: &str = "provider-unreadable";

/// A set with all that a read needs, of one moment.
pub(in crate::tokens) struct Found {
    pub(in crate::tokens) set: Set,
    /// `None`: the row is there and its values are not, which no crash leaves.
    pub(in crate::tokens) sealed: Option<UnopenedRecord>,
    /// Whether its connector is there and keeps tokens; else the set is about to be deleted.
    pub(in crate::tokens) is_kept: bool,
    pub(in crate::tokens) lease_is_over: bool,
    pub(in crate::tokens) breaker_until: Timestamp,
    pub(in crate::tokens) breaker_reason: Option<String>,
}

impl Found {
    /// What a decision goes by.
    pub(in crate::tokens) fn facts(&self) -> Facts {
        let set = &self.set;
        Facts {
            phase: set.phase,
            has_refresh_token: set.has_refresh_token,
            expires_at: set.expires_at,
            issued_at: set.issued_at,
            lease_is_over: self.lease_is_over,
            spent: set.spent,
            is_doubtful: matches!(set.last_error.as_deref(), Some(LOST | UNREADABLE)),
            wait_until: match set.last_error.as_deref() {
                // The pause is for the upkeep: who reads is told what it is.
                Some(INTEGRITY) => self.breaker_until,
                _ => set.retry_at.max(self.breaker_until),
            },
        }
    }
}

#[derive(Queryable, Selectable, Insertable, AsChangeset)]
#[diesel(table_name = token_sets)]
#[diesel(treat_none_as_null = true)]
struct Row {
    tenant_id: String,
    id: String,
    user_id: String,
    family: String,
    target: String,
    connector_id: String,
    issuer: Option<String>,
    identity_id: String,
    has_refresh_token: i64,
    scope: Option<String>,
    token_type: Option<String>,
    expires_at: Option<i64>,
    issued_at: i64,
    version: i64,
    state: String,
    epoch: i64,
    lease_until: i64,
    spent: i64,
    failures: i64,
    last_error: Option<String>,
    retry_at: i64,
    refresh_at: Option<i64>,
    created_at: i64,
    updated_at: i64,
}

impl Row {
    fn of(tenant: &TenantId, set: &Set) -> Self {
        let set = set.clone();
        Self {
            tenant_id: tenant.as_str().to_owned(),
            id: set.id.into(),
            user_id: set.user.into(),
            family: set.connection.family.name().to_owned(),
            target: set.connection.target,
            connector_id: set.connector.into(),
            issuer: set.issuer,
            identity_id: set.identity_id,
            has_refresh_token: set.has_refresh_token.into(),
            scope: set.scope,
            token_type: set.token_type,
            expires_at: set.expires_at,
            issued_at: set.issued_at.as_micros(),
            version: signed(set.version),
            state: set.phase.name().to_owned(),
            epoch: set.epoch,
            lease_until: set.lease_until.as_micros(),
            spent: set.spent.into(),
            failures: signed(set.failures),
            last_error: set.last_error,
            retry_at: set.retry_at.as_micros(),
            refresh_at: set.refresh_at.map(Timestamp::as_micros),
            created_at: set.created_at.as_micros(),
            updated_at: set.updated_at.as_micros(),
        }
    }
}

impl TryFrom<Row> for Set {
    type Error = DbError;

    fn try_from(row: Row) -> Result<Self, DbError> {
        let read = |row: &Row| {
            Some((
                TokenSetId::parse(&row.id).ok()?,
                UserId::parse(&row.user_id).ok()?,
                Connection::parse(Family::parse(&row.family)?, &row.target)?,
                ConnectorId::parse(&row.connector_id).ok()?,
                Phase::parse(&row.state)?,
            ))
        };
        let parsed = read(&row).ok_or_else(|| DbError::impossible("token_sets", &row.id));
        let (id, user, connection, connector, phase) = parsed?;
        Ok(Self {
            version: unsigned("token_sets", &row.id, row.version)?,
            failures: unsigned("token_sets", &row.id, row.failures)?,
            id,
            user,
            connection,
            connector,
            phase,
            issuer: row.issuer,
            identity_id: row.identity_id,
            has_refresh_token: row.has_refresh_token != 0,
            scope: row.scope,
            token_type: row.token_type,
            expires_at: row.expires_at,
            issued_at: Timestamp::from_micros(row.issued_at),
            epoch: row.epoch,
            lease_until: Timestamp::from_micros(row.lease_until),
            spent: row.spent != 0,
            last_error: row.last_error,
            retry_at: Timestamp::from_micros(row.retry_at),
            refresh_at: row.refresh_at.map(Timestamp::from_micros),
            created_at: Timestamp::from_micros(row.created_at),
            updated_at: Timestamp::from_micros(row.updated_at),
        })
    }
}

/// The clock that leases go by.
fn clock(conn: &mut Conn, own: Timestamp) -> Result<Timestamp, DbError> {
    db::now(conn, own.as_micros()).map(Timestamp::from_micros)
}

/// The set of a user's connection, without its values.
pub(in crate::tokens) fn find(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
    connection: &Connection,
) -> Result<Option<Set>, DbError> {
    let query = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::user_id.eq(user.as_str())))
        .filter(token_sets::family.eq(connection.family.name()))
        .filter(token_sets::target.eq(&connection.target));
    let row: Option<Row> = with_conn!(conn, |c| query.select(Row::as_select()).first(c).optional())?;
    row.map(Set::try_from).transpose()
}

/// `breaker_until`, `breaker_reason` and `stores_tokens` of the connector, if that is there.
type OfConnector = (Option<i64>, Option<String>, Option<i64>);

/// The set of a user's connection with all that a read needs.
pub(in crate::tokens) fn find_with_values(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
    connection: &Connection,
    now: Timestamp,
) -> Result<Option<Found>, DbError> {
    let on = connectors::tenant_id.eq(token_sets::tenant_id).and(connectors::id.eq(token_sets::connector_id));
    let query = token_sets::table
        .left_join(connectors::table.on(on))
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::user_id.eq(user.as_str())))
        .filter(token_sets::family.eq(connection.family.name()))
        .filter(token_sets::target.eq(&connection.target));
    let of_connector = (
        connectors::breaker_until.nullable(),
        connectors::breaker_reason.nullable(),
        connectors::stores_tokens.nullable(),
    );
    let row: Option<(Row, OfConnector)> =
        with_conn!(&mut *conn, |c| query.select((Row::as_select(), of_connector)).first(c).optional())?;
    let Some((row, (breaker, breaker_reason, stores_tokens))) = row else { return Ok(None) };
    let mut set = Set::try_from(row)?;
    let mut sealed = vault::load_record(conn, &place(tenant, user, connection, set.version))?;
    if sealed.is_none() {
        // Each statement sees a moment of its own: the set may have been refreshed in between.
        let Some(now) = find(conn, tenant, user, connection)? else { return Ok(None) };
        sealed = vault::load_record(conn, &place(tenant, user, connection, now.version))?;
        set = now;
    }
    // The database's clock is asked only where it decides.
    let lease_is_over = set.phase == Phase::Refreshing && set.lease_until <= clock(conn, now)?;
    let breaker_until = Timestamp::from_micros(breaker.unwrap_or(0));
    let is_kept = stores_tokens.is_some_and(|stores| stores != 0);
    Ok(Some(Found { set, sealed, is_kept, lease_is_over, breaker_until, breaker_reason }))
}

/// The set of that id.
pub(in crate::tokens) fn find_by_id(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &TokenSetId,
) -> Result<Option<Set>, DbError> {
    let query = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(id.as_str())));
    let row: Option<Row> = with_conn!(conn, |c| query.select(Row::as_select()).first(c).optional())?;
    row.map(Set::try_from).transpose()
}

/// All sets of a user.
pub(in crate::tokens) fn of_user(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
) -> Result<Vec<Set>, DbError> {
    let query = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::user_id.eq(user.as_str())));
    let rows: Vec<Row> = with_conn!(conn, |c| query.select(Row::as_select()).load(c))?;
    rows.into_iter().map(Set::try_from).collect()
}

/// Sets of a connector, by id, after `after`, at most `limit`.
pub(in crate::tokens) fn of_connector(
    conn: &mut Conn,
    tenant: &TenantId,
    connector: &ConnectorId,
    after: &str,
    limit: i64,
) -> Result<Vec<Set>, DbError> {
    let query = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()))
        .filter(token_sets::connector_id.eq(connector.as_str()).and(token_sets::id.gt(after)))
        .order(token_sets::id)
        .limit(limit);
    let rows: Vec<Row> = with_conn!(conn, |c| query.select(Row::as_select()).load(c))?;
    rows.into_iter().map(Set::try_from).collect()
}

/// Sets whose refresh is due, but for those of some connectors, the soonest to expire first, at most `limit`.
pub(in crate::tokens) fn due(
    conn: &mut Conn,
    tenant: &TenantId,
    without: &[ConnectorId],
    now: Timestamp,
    limit: i64,
) -> Result<Vec<Set>, DbError> {
    let query = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()))
        .filter(token_sets::refresh_at.le(now.as_micros()).and(token_sets::retry_at.le(now.as_micros())))
        .filter(token_sets::state.eq(Phase::Idle.name()))
        // Nobody knows whether the provider has taken their refresh tokens: they wait for a reader.
        .filter(token_sets::last_error.is_null().or(token_sets::last_error.ne_all([LOST, UNREADABLE])))
        .filter(token_sets::connector_id.ne_all(without.iter().map(ConnectorId::as_str)))
        .order(token_sets::expires_at)
        .limit(limit);
    let rows: Vec<Row> = with_conn!(conn, |c| query.select(Row::as_select()).load(c))?;
    rows.into_iter().map(Set::try_from).collect()
}

/// Writes a set that a person has just brought, with its values. One that is there keeps id and date.
pub(in crate::tokens) fn put(
    conn: &mut Conn,
    tenant: &TenantId,
    set: &Set,
    sealed: &SealedRecord,
    before: Option<&Set>,
) -> Result<bool, DbError> {
    let mut row = Row::of(tenant, set);
    // By this a refresh that began earlier knows that it was overtaken, by a person.
    row.issued_at = clock(conn, set.updated_at)?.as_micros();
    let written = match before {
        Some(before) => {
            let update = diesel::update(token_sets::table)
                .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(before.id.as_str())))
                .filter(token_sets::version.eq(signed(before.version)))
                .set(row);
            with_conn!(&mut *conn, |c| update.execute(c))?
        }
        None => {
            let insert = diesel::insert_into(token_sets::table).values(row).on_conflict_do_nothing();
            with_conn!(&mut *conn, |c| insert.execute(c))?
        }
    };
    if written == 1 {
        sealed.store(conn, set.updated_at)?;
    }
    Ok(written == 1)
}

/// The intent of a refresh: this daemon does it, until `lease` from now by the database's clock. `None`: somebody
/// else was first, or the set is another one now. Else the epoch, and when it began by that clock.
pub(in crate::tokens) fn begin_refresh(
    conn: &mut Conn,
    tenant: &TenantId,
    set: &Set,
    lease: std::time::Duration,
    now: Timestamp,
) -> Result<Option<(i64, Timestamp)>, DbError> {
    let now = clock(conn, now)?;
    let epoch = set.epoch.saturating_add(1);
    let repeats = set.phase == Phase::Refreshing;
    let update = diesel::update(token_sets::table)
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(set.id.as_str())))
        .filter(token_sets::version.eq(signed(set.version)).and(token_sets::epoch.eq(set.epoch)))
        .filter(token_sets::state.eq(set.phase.name()))
        // Of an idle set the old lease is over, whatever it says.
        .filter(token_sets::lease_until.le(now.as_micros()).or(token_sets::state.eq(Phase::Idle.name())))
        .set((
            token_sets::state.eq(Phase::Refreshing.name()),
            token_sets::epoch.eq(epoch),
            token_sets::lease_until.eq(now.plus(lease).as_micros()),
            token_sets::spent.eq(i64::from(repeats)),
        ));
    Ok((with_conn!(conn, |c| update.execute(c))? == 1).then_some((epoch, now)))
}

/// What came of storing an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tokens) enum Stored {
    Done,
    /// Another answer is stored already, of this version.
    Overtaken {
        version: u64,
        issued_at: Timestamp,
    },
    /// The set is gone, or belongs to another account now.
    Gone,
}

/// Stores what a refresh brought. Only over the version that it began with: who took over meanwhile and has not
/// stored anything either does not hold this up, since its own write is held to the same version.
pub(in crate::tokens) fn finish_refresh(
    conn: &mut Conn,
    tenant: &TenantId,
    base: u64,
    set: &Set,
    sealed: &SealedRecord,
) -> Result<Stored, DbError> {
    let update = diesel::update(token_sets::table)
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(set.id.as_str())))
        .filter(token_sets::version.eq(signed(base)))
        .filter(token_sets::identity_id.eq(&set.identity_id))
        .set((
            token_sets::has_refresh_token.eq(i64::from(set.has_refresh_token)),
            token_sets::scope.eq(set.scope.as_deref()),
            token_sets::token_type.eq(set.token_type.as_deref()),
            token_sets::expires_at.eq(set.expires_at),
            token_sets::issued_at.eq(set.issued_at.as_micros()),
            token_sets::version.eq(signed(set.version)),
            token_sets::state.eq(Phase::Idle.name()),
            token_sets::epoch.eq(token_sets::epoch + 1),
            (
                token_sets::spent.eq(0),
                token_sets::failures.eq(0),
                token_sets::last_error.eq(None::<String>),
                token_sets::retry_at.eq(0),
                token_sets::refresh_at.eq(set.refresh_at.map(Timestamp::as_micros)),
                token_sets::updated_at.eq(set.updated_at.as_micros()),
            ),
        ));
    if with_conn!(&mut *conn, |c| update.execute(c))? == 1 {
        sealed.store(conn, set.updated_at)?;
        return Ok(Stored::Done);
    }
    Ok(match find_by_id(conn, tenant, &set.id)? {
        Some(now) if now.identity_id == set.identity_id => {
            Stored::Overtaken { version: now.version, issued_at: now.issued_at }
        }
        _ => Stored::Gone,
    })
}

/// What a failed refresh leaves.
#[derive(Clone, Debug)]
pub(in crate::tokens) struct Failure {
    pub(in crate::tokens) phase: Phase,
    pub(in crate::tokens) error: &'static str,
    pub(in crate::tokens) failures: u64,
    pub(in crate::tokens) retry_at: Timestamp,
    pub(in crate::tokens) spent: bool,
}

/// Ends a refresh that brought nothing; `false` if it is not this refresh's to say any more.
pub(in crate::tokens) fn fail_refresh(
    conn: &mut Conn,
    tenant: &TenantId,
    set: &Set,
    epoch: i64,
    failure: &Failure,
) -> Result<bool, DbError> {
    let update = diesel::update(token_sets::table)
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(set.id.as_str())))
        .filter(token_sets::version.eq(signed(set.version)).and(token_sets::epoch.eq(epoch)))
        .set((
            token_sets::state.eq(failure.phase.name()),
            token_sets::last_error.eq(failure.error),
            token_sets::failures.eq(signed(failure.failures)),
            token_sets::retry_at.eq(failure.retry_at.as_micros()),
            token_sets::spent.eq(i64::from(failure.spent)),
            token_sets::lease_until.eq(0),
        ));
    let written = with_conn!(&mut *conn, |c| update.execute(c))? == 1;
    if written && failure.phase == Phase::NeedsReauth {
        schedule(conn, tenant, set, None)?;
    }
    Ok(written)
}

/// Ends the leases that an earlier run of the only daemon has left.
pub(in crate::tokens) fn end_leases(conn: &mut Conn, tenant: &TenantId) -> Result<(), DbError> {
    let left = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()))
        .filter(token_sets::state.eq(Phase::Refreshing.name()));
    with_conn!(conn, |c| diesel::update(left).set(token_sets::lease_until.eq(0)).execute(c))?;
    Ok(())
}

/// Deletes a set and its values; the set that was there.
pub(in crate::tokens) fn delete(conn: &mut Conn, tenant: &TenantId, set: &Set) -> Result<bool, DbError> {
    let rows = token_sets::table
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(set.id.as_str())));
    let deleted = with_conn!(&mut *conn, |c| diesel::delete(rows).execute(c))? == 1;
    if deleted {
        // Else another set may stand there by now.
        vault::delete_record(conn, &place(tenant, &set.user, &set.connection, set.version))?;
    }
    Ok(deleted)
}

/// Sets when a set is refreshed by itself.
pub(in crate::tokens) fn schedule(
    conn: &mut Conn,
    tenant: &TenantId,
    set: &Set,
    refresh_at: Option<Timestamp>,
) -> Result<(), DbError> {
    let update = diesel::update(token_sets::table)
        .filter(token_sets::tenant_id.eq(tenant.as_str()).and(token_sets::id.eq(set.id.as_str())))
        .filter(token_sets::version.eq(signed(set.version)))
        .set(token_sets::refresh_at.eq(refresh_at.map(Timestamp::as_micros)));
    with_conn!(conn, |c| update.execute(c))?;
    Ok(())
}
