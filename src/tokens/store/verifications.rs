//! SQL of verification records. One that is used or too late is deleted with what is parked in it.

use diesel::prelude::*;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::verification_records as records;
use crate::db::{Conn, DbError};
use crate::ids::{ConnectorId, TenantId, UserId, VerificationId};
use crate::tokens::model::Connection;
use crate::vault::{self, Place, RecordKind, SealedRecord, UnopenedRecord};
use crate::with_conn;

/// What kind of proof it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tokens) enum Kind {
    Social,
    Sso,
    Password,
}

impl Kind {
    pub(in crate::tokens) const fn name(self) -> &'static str {
        match self {
            Self::Social => "social",
            Self::Sso => "sso",
            Self::Password => "password",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Social, Self::Sso, Self::Password].into_iter().find(|kind| kind.name() == name)
    }
}

/// A proof.
#[derive(Clone, Debug)]
pub(in crate::tokens) struct Verification {
    pub(in crate::tokens) id: VerificationId,
    pub(in crate::tokens) user: UserId,
    pub(in crate::tokens) kind: Kind,
    pub(in crate::tokens) connector: Option<ConnectorId>,
    pub(in crate::tokens) target: Option<String>,
    pub(in crate::tokens) is_verified: bool,
    pub(in crate::tokens) version: u64,
    pub(in crate::tokens) expires_at: Timestamp,
}

/// Where what belongs to a proof lies.
pub(in crate::tokens) fn place(tenant: &TenantId, user: &UserId, id: &VerificationId, version: u64) -> Place {
    Place::new(RecordKind::Verification, tenant, &[user.as_str(), id.as_str()], version)
}

#[derive(Queryable, Selectable, Insertable)]
#[diesel(table_name = records)]
struct Row {
    tenant_id: String,
    id: String,
    user_id: String,
    kind: String,
    connector_id: Option<String>,
    target: Option<String>,
    state: String,
    version: i64,
    expires_at: i64,
}

const PENDING: &str = "pending";
const VERIFIED: &str = "verified";

impl TryFrom<Row> for Verification {
    type Error = DbError;

    fn try_from(row: Row) -> Result<Self, DbError> {
        let read = |row: &Row| {
            let connector = row.connector_id.as_deref().map(ConnectorId::parse).transpose().ok()?;
            let (id, user) = (VerificationId::parse(&row.id).ok()?, UserId::parse(&row.user_id).ok()?);
            Some((id, user, Kind::parse(&row.kind)?, connector))
        };
        let parsed = read(&row).ok_or_else(|| DbError::impossible("verification_records", &row.id));
        let (id, user, kind, connector) = parsed?;
        Ok(Self {
            version: unsigned("verification_records", &row.id, row.version)?,
            id,
            user,
            kind,
            connector,
            target: row.target,
            is_verified: row.state == VERIFIED,
            expires_at: Timestamp::from_micros(row.expires_at),
        })
    }
}

/// Stores a new proof, and what belongs to it if there is anything.
pub(in crate::tokens) fn insert(
    conn: &mut Conn,
    tenant: &TenantId,
    new: &Verification,
    sealed: Option<&SealedRecord>,
    now: Timestamp,
) -> Result<(), DbError> {
    let row = Row {
        tenant_id: tenant.as_str().to_owned(),
        id: new.id.as_str().to_owned(),
        user_id: new.user.as_str().to_owned(),
        kind: new.kind.name().to_owned(),
        connector_id: new.connector.as_ref().map(|id| id.as_str().to_owned()),
        target: new.target.clone(),
        state: if new.is_verified { VERIFIED } else { PENDING }.to_owned(),
        version: signed(new.version),
        expires_at: new.expires_at.as_micros(),
    };
    with_conn!(&mut *conn, |c| diesel::insert_into(records::table).values(row).execute(c))?;
    sealed.map_or(Ok(()), |sealed| sealed.store(conn, now))
}

/// A user's proof that is not too late, with what belongs to it.
pub(in crate::tokens) fn find(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
    id: &VerificationId,
    now: Timestamp,
) -> Result<Option<(Verification, Option<UnopenedRecord>)>, DbError> {
    let query = records::table
        .filter(records::tenant_id.eq(tenant.as_str()).and(records::id.eq(id.as_str())))
        .filter(records::user_id.eq(user.as_str()).and(records::expires_at.gt(now.as_micros())));
    let row: Option<Row> = with_conn!(&mut *conn, |c| query.select(Row::as_select()).first(c).optional())?;
    let Some(row) = row else { return Ok(None) };
    let found = Verification::try_from(row)?;
    let sealed = vault::load_record(conn, &place(tenant, user, id, found.version))?;
    Ok(Some((found, sealed)))
}

/// Takes a pending proof, so that nobody else answers it; `false` if somebody has.
pub(in crate::tokens) fn take(
    conn: &mut Conn,
    tenant: &TenantId,
    pending: &Verification,
) -> Result<bool, DbError> {
    let update = diesel::update(records::table)
        .filter(records::tenant_id.eq(tenant.as_str()).and(records::id.eq(pending.id.as_str())))
        .filter(records::state.eq(PENDING).and(records::version.eq(signed(pending.version))))
        .set(records::version.eq(signed(pending.version + 1)));
    let taken = with_conn!(&mut *conn, |c| update.execute(c))? == 1;
    if taken {
        // State, nonce and code verifier are good for one answer.
        vault::delete_record(conn, &place(tenant, &pending.user, &pending.id, pending.version))?;
    }
    Ok(taken)
}

/// Marks a proof that was taken as good and parks what it brought; `false` if it is gone.
pub(in crate::tokens) fn verified(
    conn: &mut Conn,
    tenant: &TenantId,
    taken: &Verification,
    sealed: &SealedRecord,
    now: Timestamp,
) -> Result<bool, DbError> {
    let update = diesel::update(records::table)
        .filter(records::tenant_id.eq(tenant.as_str()).and(records::id.eq(taken.id.as_str())))
        .filter(records::state.eq(PENDING).and(records::version.eq(signed(taken.version))))
        .set((records::state.eq(VERIFIED), records::version.eq(signed(taken.version + 1))));
    let done = with_conn!(&mut *conn, |c| update.execute(c))? == 1;
    if done {
        sealed.store(conn, now)?;
    }
    Ok(done)
}

/// Deletes a proof and what is parked in it; `false` if it was gone, used by somebody else.
pub(in crate::tokens) fn consume(
    conn: &mut Conn,
    tenant: &TenantId,
    used: &Verification,
) -> Result<bool, DbError> {
    let rows = records::table
        .filter(records::tenant_id.eq(tenant.as_str()).and(records::id.eq(used.id.as_str())))
        .filter(records::version.eq(signed(used.version)));
    let deleted = with_conn!(&mut *conn, |c| diesel::delete(rows).execute(c))? == 1;
    if deleted {
        vault::delete_record(conn, &place(tenant, &used.user, &used.id, used.version))?;
    }
    Ok(deleted)
}

/// Which proofs a cascade takes along.
#[derive(Clone, Debug)]
pub(in crate::tokens) enum Which {
    /// Too late.
    Late(Timestamp),
    /// A user's, or only those of one connection.
    OfUser(UserId, Option<Connection>),
    /// A connector's.
    OfConnector(ConnectorId),
}

/// Whether any proof is too late.
pub(in crate::tokens) fn late(conn: &mut Conn, tenant: &TenantId, now: Timestamp) -> Result<bool, DbError> {
    let query = records::table
        .filter(records::tenant_id.eq(tenant.as_str()).and(records::expires_at.le(now.as_micros())))
        .select(records::expires_at);
    let first: Option<i64> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(first.is_some())
}

/// Deletes proofs and what is parked in them, at most `limit`; how many.
pub(in crate::tokens) fn purge(
    conn: &mut Conn,
    tenant: &TenantId,
    which: &Which,
    limit: i64,
) -> Result<usize, DbError> {
    let rows: Vec<Row> = with_conn!(&mut *conn, |c| {
        let mut query = records::table
            .filter(records::tenant_id.eq(tenant.as_str()))
            .limit(limit)
            .select(Row::as_select())
            .into_boxed();
        match which {
            Which::Late(now) => query = query.filter(records::expires_at.le(now.as_micros())),
            Which::OfUser(user, connection) => {
                query = query.filter(records::user_id.eq(user.as_str()));
                if let Some(Connection { family, target }) = connection {
                    query = query.filter(records::kind.eq(family.name()).and(records::target.eq(target)));
                }
            }
            Which::OfConnector(id) => query = query.filter(records::connector_id.eq(id.as_str())),
        }
        query.load(c)
    })?;
    for row in &rows {
        let gone = records::table.find((tenant.as_str(), row.id.as_str()));
        with_conn!(&mut *conn, |c| diesel::delete(gone).execute(c))?;
        let (Ok(user), Ok(id)) = (UserId::parse(&row.user_id), VerificationId::parse(&row.id)) else {
            continue;
        };
        vault::delete_record(conn, &place(tenant, &user, &id, 0))?;
    }
    Ok(rows.len())
}
