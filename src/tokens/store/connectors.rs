//! SQL of connectors and of the account center's settings.

use diesel::prelude::*;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::{account_centers, connectors};
use crate::db::{Conn, DbError};
use crate::ids::{ConnectorId, TenantId};
use crate::tokens::model::{Connector, Family, Shown};
use crate::vault::{self, Place, RecordKind, SealedRecord, UnopenedRecord};
use crate::with_conn;

/// A connector's row with its sealed definition.
pub(in crate::tokens) struct Found {
    pub(in crate::tokens) connector: Connector,
    pub(in crate::tokens) version: u64,
    pub(in crate::tokens) breaker_failures: u64,
    pub(in crate::tokens) sealed: Option<UnopenedRecord>,
}

/// Where a connector's definition lies.
pub(in crate::tokens) fn place(tenant: &TenantId, id: &ConnectorId, version: u64) -> Place {
    Place::new(RecordKind::Connector, tenant, &[id.as_str()], version)
}

#[derive(Queryable, Selectable, Insertable, AsChangeset)]
#[diesel(table_name = connectors)]
#[diesel(treat_none_as_null = true)]
struct Row {
    tenant_id: String,
    id: String,
    family: String,
    factory: String,
    target: String,
    shown: String,
    stores_tokens: i64,
    refresh_ahead: i64,
    version: i64,
    breaker_until: i64,
    breaker_reason: Option<String>,
    breaker_failures: i64,
    created_at: i64,
    updated_at: i64,
}

impl Row {
    fn of(tenant: &TenantId, connector: &Connector, version: u64) -> Self {
        let Connector { id, family, factory, target, shown, stores_tokens, refresh_ahead, .. } = connector;
        Self {
            tenant_id: tenant.as_str().to_owned(),
            id: id.as_str().to_owned(),
            family: family.name().to_owned(),
            factory: factory.clone(),
            target: target.clone(),
            // JSON values and texts always serialise.
            shown: serde_json::to_string(shown).unwrap_or_default(),
            stores_tokens: (*stores_tokens).into(),
            refresh_ahead: signed(*refresh_ahead),
            version: signed(version),
            // What was wrong may be mended by this very change.
            breaker_until: 0,
            breaker_reason: None,
            breaker_failures: 0,
            created_at: connector.created_at.as_micros(),
            updated_at: connector.updated_at.as_micros(),
        }
    }

    fn read(self) -> Result<(Connector, u64, u64), DbError> {
        let impossible = || DbError::impossible("connectors", &self.id);
        let version = unsigned("connectors", &self.id, self.version)?;
        let failures = unsigned("connectors", &self.id, self.breaker_failures)?;
        let until = Timestamp::from_micros(self.breaker_until);
        let connector = Connector {
            id: ConnectorId::parse(&self.id).map_err(|_| impossible())?,
            family: Family::parse(&self.family).ok_or_else(impossible)?,
            shown: serde_json::from_str::<Shown>(&self.shown).map_err(|_| impossible())?,
            refresh_ahead: unsigned("connectors", &self.id, self.refresh_ahead)?,
            factory: self.factory,
            target: self.target,
            stores_tokens: self.stores_tokens != 0,
            breaker: self.breaker_reason.map(|reason| (until, reason)),
            created_at: Timestamp::from_micros(self.created_at),
            updated_at: Timestamp::from_micros(self.updated_at),
        };
        Ok((connector, version, failures))
    }
}

fn found(conn: &mut Conn, tenant: &TenantId, row: Option<Row>) -> Result<Option<Found>, DbError> {
    let Some((connector, version, breaker_failures)) = row.map(Row::read).transpose()? else {
        return Ok(None);
    };
    let sealed = vault::load_record(conn, &place(tenant, &connector.id, version))?;
    Ok(Some(Found { connector, version, breaker_failures, sealed }))
}

/// The connector of that id. Each statement sees a moment of its own: one that was changed between row and definition
/// is read again.
pub(in crate::tokens) fn find(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &ConnectorId,
) -> Result<Option<Found>, DbError> {
    match find_once(conn, tenant, id)? {
        Some(Found { sealed: None, .. }) => find_once(conn, tenant, id),
        found => Ok(found),
    }
}

fn find_once(conn: &mut Conn, tenant: &TenantId, id: &ConnectorId) -> Result<Option<Found>, DbError> {
    let query = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::id.eq(id.as_str())));
    let row: Option<Row> = with_conn!(&mut *conn, |c| query.select(Row::as_select()).first(c).optional())?;
    found(conn, tenant, row)
}

/// Whether a connector is there and keeps tokens.
pub(in crate::tokens) fn stores_tokens(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &ConnectorId,
) -> Result<bool, DbError> {
    let query = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::id.eq(id.as_str())))
        .select(connectors::stores_tokens);
    let stores: Option<i64> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(stores == Some(1))
}

/// Whether the connector of a connection is there and keeps tokens.
pub(in crate::tokens) fn target_stores_tokens(
    conn: &mut Conn,
    tenant: &TenantId,
    family: Family,
    target: &str,
) -> Result<bool, DbError> {
    let query = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::target.eq(target)))
        .filter(connectors::family.eq(family.name()))
        .select(connectors::stores_tokens);
    let stores: Option<i64> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(stores == Some(1))
}

/// Connectors of which the upkeep has to know: `(id, whether it keeps tokens, whether its provider is left alone)`.
pub(in crate::tokens) fn all(
    conn: &mut Conn,
    tenant: &TenantId,
    now: Timestamp,
) -> Result<Vec<(ConnectorId, bool, bool)>, DbError> {
    let query = connectors::table.filter(connectors::tenant_id.eq(tenant.as_str())).select((
        connectors::id,
        connectors::stores_tokens,
        connectors::breaker_until,
    ));
    let rows: Vec<(String, i64, i64)> = with_conn!(conn, |c| query.load(c))?;
    let read = |(id, stores, until): (String, i64, i64)| {
        let id = ConnectorId::parse(&id).map_err(|_| DbError::impossible("connectors", &id))?;
        Ok((id, stores != 0, until > now.as_micros()))
    };
    rows.into_iter().map(read).collect()
}

/// The tenant's connectors of a family, oldest first.
pub(in crate::tokens) fn list(
    conn: &mut Conn,
    tenant: &TenantId,
    family: Family,
) -> Result<Vec<Connector>, DbError> {
    let query = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::family.eq(family.name())))
        .order((connectors::created_at, connectors::id));
    let rows: Vec<Row> = with_conn!(conn, |c| query.select(Row::as_select()).load(c))?;
    rows.into_iter().map(|row| row.read().map(|(connector, ..)| connector)).collect()
}

/// # Errors
/// [`DbError::Duplicate`] if id or target is taken.
pub(in crate::tokens) fn insert(
    conn: &mut Conn,
    tenant: &TenantId,
    connector: &Connector,
    sealed: &SealedRecord,
) -> Result<(), DbError> {
    let row = Row::of(tenant, connector, 1);
    with_conn!(&mut *conn, |c| diesel::insert_into(connectors::table).values(row).execute(c))?;
    sealed.store(conn, connector.created_at)
}

/// Writes a connector that may be there already; `false` if id or target is taken.
pub(in crate::tokens) fn insert_missing(
    conn: &mut Conn,
    tenant: &TenantId,
    connector: &Connector,
    sealed: &SealedRecord,
) -> Result<bool, DbError> {
    let row = Row::of(tenant, connector, 1);
    let insert = diesel::insert_into(connectors::table).values(row).on_conflict_do_nothing();
    let written = with_conn!(&mut *conn, |c| insert.execute(c))? == 1;
    if written {
        sealed.store(conn, connector.created_at)?;
    }
    Ok(written)
}

/// Replaces a connector that is still at version `before`, and closes its breaker; `false` if it is not.
pub(in crate::tokens) fn update(
    conn: &mut Conn,
    tenant: &TenantId,
    connector: &Connector,
    before: u64,
    sealed: &SealedRecord,
) -> Result<bool, DbError> {
    let update = diesel::update(connectors::table)
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::id.eq(connector.id.as_str())))
        .filter(connectors::version.eq(signed(before)))
        .set(Row::of(tenant, connector, before + 1));
    let done = with_conn!(&mut *conn, |c| update.execute(c))? == 1;
    if done {
        sealed.store(conn, connector.updated_at)?;
    }
    Ok(done)
}

/// Deletes a connector and its definition.
pub(in crate::tokens) fn delete(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &ConnectorId,
) -> Result<bool, DbError> {
    let rows = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::id.eq(id.as_str())));
    let deleted = with_conn!(&mut *conn, |c| diesel::delete(rows).execute(c))? == 1;
    vault::delete_record(conn, &place(tenant, id, 0))?;
    Ok(deleted)
}

/// Opens the breaker: the provider is not called until then. `true` if it was closed.
pub(in crate::tokens) fn open_breaker(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &ConnectorId,
    version: u64,
    (until, reason, failures): (Timestamp, &str, u64),
) -> Result<bool, DbError> {
    let rows = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::id.eq(id.as_str())))
        // A definition that was changed meanwhile is not to blame.
        .filter(connectors::version.eq(signed(version)));
    let was_closed = rows.filter(connectors::breaker_reason.is_null());
    let open = (
        connectors::breaker_until.eq(until.as_micros()),
        connectors::breaker_reason.eq(reason),
        connectors::breaker_failures.eq(signed(failures)),
    );
    if with_conn!(&mut *conn, |c| diesel::update(was_closed).set(open).execute(c))? == 1 {
        return Ok(true);
    }
    let later = (
        connectors::breaker_until.eq(until.as_micros()),
        connectors::breaker_reason.eq(reason),
        connectors::breaker_failures.eq(signed(failures)),
    );
    with_conn!(conn, |c| diesel::update(rows).set(later).execute(c))?;
    Ok(false)
}

/// Closes the breaker, if it is open.
pub(in crate::tokens) fn close_breaker(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &ConnectorId,
) -> Result<(), DbError> {
    let rows = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::id.eq(id.as_str())))
        .filter(connectors::breaker_reason.is_not_null());
    let closed = (
        connectors::breaker_until.eq(0),
        connectors::breaker_reason.eq(None::<String>),
        connectors::breaker_failures.eq(0),
    );
    with_conn!(conn, |c| diesel::update(rows).set(closed).execute(c))?;
    Ok(())
}

/// Where the account center's settings lie.
pub(in crate::tokens) fn settings_place(tenant: &TenantId, version: u64) -> Place {
    Place::new(RecordKind::AccountCenter, tenant, &["settings"], version)
}

/// Settings as they were read.
type Settings = Option<(u64, Option<UnopenedRecord>)>;

/// The account center's settings and their version; `None` if nobody has set them.
pub(in crate::tokens) fn settings(conn: &mut Conn, tenant: &TenantId) -> Result<Settings, DbError> {
    match settings_once(conn, tenant)? {
        Some((_, None)) => settings_once(conn, tenant),
        found => Ok(found),
    }
}

fn settings_once(conn: &mut Conn, tenant: &TenantId) -> Result<Settings, DbError> {
    let query = account_centers::table.find(tenant.as_str()).select(account_centers::version);
    let version: Option<i64> = with_conn!(&mut *conn, |c| query.first(c).optional())?;
    let Some(version) = version else { return Ok(None) };
    let version = unsigned("account_centers", tenant.as_str(), version)?;
    Ok(Some((version, vault::load_record(conn, &settings_place(tenant, version))?)))
}

/// Replaces the account center's settings of version `before` (0: none yet); `false` if they changed meanwhile.
pub(in crate::tokens) fn put_settings(
    conn: &mut Conn,
    tenant: &TenantId,
    before: u64,
    sealed: &SealedRecord,
    now: Timestamp,
) -> Result<bool, DbError> {
    use account_centers as a;
    let written = if before == 0 {
        let row = (a::tenant_id.eq(tenant.as_str()), a::version.eq(1));
        let insert = diesel::insert_into(a::table).values(row).on_conflict_do_nothing();
        with_conn!(&mut *conn, |c| insert.execute(c))?
    } else {
        let update = diesel::update(a::table.find(tenant.as_str()))
            .filter(a::version.eq(signed(before)))
            .set(a::version.eq(signed(before + 1)));
        with_conn!(&mut *conn, |c| update.execute(c))?
    };
    if written == 1 {
        sealed.store(conn, now)?;
    }
    Ok(written == 1)
}
