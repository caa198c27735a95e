//! SQL of users and of their identities at other providers.

use diesel::prelude::*;
use serde_json::Value;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::{connectors, user_identities, users};
use crate::db::{Conn, DbError};
use crate::ids::{ConnectorId, IdentityId, TenantId, UserId};
use crate::tokens::model::{Connection, Family, Identity, User, UserQuery};
use crate::with_conn;

diesel::define_sql_function! {
    /// The text in lower case: SQLite's LIKE has no case for ASCII, PostgreSQL's has.
    fn lower(text: diesel::sql_types::Nullable<diesel::sql_types::Text>) -> diesel::sql_types::Nullable<diesel::sql_types::Text>;
}

/// A user with what proves the password.
#[derive(Clone)]
pub(in crate::tokens) struct Account {
    pub(in crate::tokens) user: User,
    /// Argon2id, PHC form.
    pub(in crate::tokens) password_hash: Option<String>,
}

#[derive(Queryable, Selectable, Insertable, AsChangeset)]
#[diesel(table_name = users)]
#[diesel(treat_none_as_null = true)]
struct Row {
    tenant_id: String,
    id: String,
    username: Option<String>,
    primary_email: Option<String>,
    primary_phone: Option<String>,
    name: Option<String>,
    avatar: Option<String>,
    profile: String,
    custom_data: String,
    password_hash: Option<String>,
    is_suspended: i64,
    created_at: i64,
    updated_at: i64,
}

impl Row {
    fn of(tenant: &TenantId, account: &Account) -> Self {
        let Account { user, password_hash } = account.clone();
        Self {
            tenant_id: tenant.as_str().to_owned(),
            id: user.id.into(),
            username: user.username,
            primary_email: user.primary_email,
            primary_phone: user.primary_phone,
            name: user.name,
            avatar: user.avatar,
            profile: user.profile.to_string(),
            custom_data: user.custom_data.to_string(),
            password_hash,
            is_suspended: user.is_suspended.into(),
            created_at: user.created_at.as_micros(),
            updated_at: user.updated_at.as_micros(),
        }
    }
}

impl TryFrom<Row> for Account {
    type Error = DbError;

    fn try_from(row: Row) -> Result<Self, DbError> {
        let impossible = || DbError::impossible("users", &row.id);
        let object = |text: &str| serde_json::from_str::<Value>(text).map_err(|_| impossible());
        let user = User {
            id: UserId::parse(&row.id).map_err(|_| impossible())?,
            profile: object(&row.profile)?,
            custom_data: object(&row.custom_data)?,
            username: row.username,
            primary_email: row.primary_email,
            primary_phone: row.primary_phone,
            name: row.name,
            avatar: row.avatar,
            has_password: row.password_hash.is_some(),
            is_suspended: row.is_suspended != 0,
            created_at: Timestamp::from_micros(row.created_at),
            updated_at: Timestamp::from_micros(row.updated_at),
        };
        Ok(Self { user, password_hash: row.password_hash })
    }
}

/// The user of that id.
pub(in crate::tokens) fn find(
    conn: &mut Conn,
    tenant: &TenantId,
    id: &UserId,
) -> Result<Option<Account>, DbError> {
    let query = users::table.filter(users::tenant_id.eq(tenant.as_str()).and(users::id.eq(id.as_str())));
    let row: Option<Row> = with_conn!(conn, |c| query.select(Row::as_select()).first(c).optional())?;
    row.map(Account::try_from).transpose()
}

/// Whether a user is there and not suspended.
pub(in crate::tokens) fn is_active(conn: &mut Conn, tenant: &TenantId, id: &UserId) -> Result<bool, DbError> {
    let query = users::table
        .filter(users::tenant_id.eq(tenant.as_str()).and(users::id.eq(id.as_str())))
        .select(users::is_suspended);
    let suspended: Option<i64> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(suspended == Some(0))
}

/// A page of users, newest first, and how many there are on all pages.
pub(in crate::tokens) fn list(
    conn: &mut Conn,
    tenant: &TenantId,
    query: &UserQuery,
) -> Result<(Vec<Account>, u64), DbError> {
    let pattern = query.search.as_deref().map(pattern);
    let offset = signed(query.page.saturating_sub(1).saturating_mul(query.page_size));
    let (rows, total): (Vec<Row>, i64) = with_conn!(conn, |c| {
        let mut rows = users::table
            .filter(users::tenant_id.eq(tenant.as_str()))
            .order((users::created_at.desc(), users::id.desc()))
            .limit(signed(query.page_size))
            .offset(offset)
            .select(Row::as_select())
            .into_boxed();
        let mut count = users::table
            .filter(users::tenant_id.eq(tenant.as_str()))
            .select(diesel::dsl::count_star())
            .into_boxed();
        if let Some(pattern) = &pattern {
            let matches = || {
                lower(users::id.nullable())
                    .like(pattern)
                    .escape('\\')
                    .or(lower(users::name).like(pattern).escape('\\').assume_not_null())
                    .or(lower(users::username).like(pattern).escape('\\').assume_not_null())
                    .or(lower(users::primary_email).like(pattern).escape('\\').assume_not_null())
                    .or(lower(users::primary_phone).like(pattern).escape('\\').assume_not_null())
            };
            rows = rows.filter(matches());
            count = count.filter(matches());
        }
        let found = rows.load(c)?;
        Ok::<_, diesel::result::Error>((found, count.first(c)?))
    })?;
    let accounts = rows.into_iter().map(Account::try_from).collect::<Result<_, _>>()?;
    Ok((accounts, unsigned("users", tenant.as_str(), total)?))
}

/// `%` stands for anything; without one the text may be anywhere. An underscore is no wildcard.
fn pattern(search: &str) -> String {
    let escaped = search.to_lowercase().replace('\\', "\\\\").replace('_', "\\_");
    if escaped.contains('%') { escaped } else { format!("%{escaped}%") }
}

/// # Errors
/// [`DbError::Duplicate`] if id, username, e-mail or phone is taken.
pub(in crate::tokens) fn insert(
    conn: &mut Conn,
    tenant: &TenantId,
    account: &Account,
) -> Result<(), DbError> {
    let row = Row::of(tenant, account);
    with_conn!(conn, |c| diesel::insert_into(users::table).values(row).execute(c))?;
    Ok(())
}

/// Which unique member of a user somebody else has.
pub(in crate::tokens) fn taken(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &User,
) -> Result<Option<&'static str>, DbError> {
    type Members = (Option<String>, Option<String>, Option<String>);
    let others = users::table
        .filter(users::tenant_id.eq(tenant.as_str()).and(users::id.ne(user.id.as_str())))
        .select((users::username, users::primary_email, users::primary_phone));
    let same = users::username
        .eq(user.username.as_deref())
        .or(users::primary_email.eq(user.primary_email.as_deref()))
        .or(users::primary_phone.eq(user.primary_phone.as_deref()));
    let found: Option<Members> = with_conn!(conn, |c| others.filter(same).first(c).optional())?;
    let Some((username, email, _)) = found else { return Ok(None) };
    Ok(Some(match () {
        () if username.is_some() && username == user.username => "username",
        () if email.is_some() && email == user.primary_email => "primaryEmail",
        () => "primaryPhone",
    }))
}

/// Writes a user that may be there already; `false` if id, username, e-mail or phone is taken.
pub(in crate::tokens) fn insert_missing(
    conn: &mut Conn,
    tenant: &TenantId,
    account: &Account,
) -> Result<bool, DbError> {
    let insert = diesel::insert_into(users::table).values(Row::of(tenant, account)).on_conflict_do_nothing();
    Ok(with_conn!(conn, |c| insert.execute(c))? == 1)
}

/// Holds a user's row until the transaction ends, so that nobody deletes it meanwhile; `false` if it is gone.
pub(in crate::tokens) fn hold(conn: &mut Conn, tenant: &TenantId, id: &UserId) -> Result<bool, DbError> {
    let rows = users::table.filter(users::tenant_id.eq(tenant.as_str()).and(users::id.eq(id.as_str())));
    let update = diesel::update(rows).set(users::updated_at.eq(users::updated_at));
    Ok(with_conn!(conn, |c| update.execute(c))? == 1)
}

/// Replaces a user that has not changed since `before`; `false` if it has, or is gone.
///
/// # Errors
/// [`DbError::Duplicate`] as [`insert`].
pub(in crate::tokens) fn update(
    conn: &mut Conn,
    tenant: &TenantId,
    account: &Account,
    before: Timestamp,
) -> Result<bool, DbError> {
    let update = diesel::update(users::table)
        .filter(users::tenant_id.eq(tenant.as_str()).and(users::id.eq(account.user.id.as_str())))
        .filter(users::updated_at.eq(before.as_micros()))
        .set(Row::of(tenant, account));
    Ok(with_conn!(conn, |c| update.execute(c))? == 1)
}

/// Deletes a user and the identities; `false` if there was none. Token sets and proofs are the caller's to delete, after
/// this: whoever adds one holds the row.
pub(in crate::tokens) fn delete(conn: &mut Conn, tenant: &TenantId, id: &UserId) -> Result<bool, DbError> {
    let rows = users::table.filter(users::tenant_id.eq(tenant.as_str()).and(users::id.eq(id.as_str())));
    let found = with_conn!(&mut *conn, |c| diesel::delete(rows).execute(c))? == 1;
    let identities = user_identities::table
        .filter(user_identities::tenant_id.eq(tenant.as_str()).and(user_identities::user_id.eq(id.as_str())));
    with_conn!(conn, |c| diesel::delete(identities).execute(c))?;
    Ok(found)
}

#[derive(Queryable, Selectable, Insertable, AsChangeset)]
#[diesel(table_name = user_identities)]
#[diesel(treat_none_as_null = true)]
struct IdentityRow {
    tenant_id: String,
    user_id: String,
    family: String,
    target: String,
    id: String,
    issuer: Option<String>,
    identity_id: String,
    details: String,
    created_at: i64,
    updated_at: i64,
}

impl IdentityRow {
    fn of(tenant: &TenantId, identity: &Identity) -> Self {
        Self {
            tenant_id: tenant.as_str().to_owned(),
            user_id: identity.user.as_str().to_owned(),
            family: identity.family.name().to_owned(),
            target: identity.target.clone(),
            id: identity.id.as_str().to_owned(),
            issuer: identity.issuer.clone(),
            identity_id: identity.identity_id.clone(),
            details: identity.details.to_string(),
            created_at: identity.created_at.as_micros(),
            updated_at: identity.updated_at.as_micros(),
        }
    }
}

impl TryFrom<IdentityRow> for Identity {
    type Error = DbError;

    fn try_from(row: IdentityRow) -> Result<Self, DbError> {
        let impossible = || DbError::impossible("user_identities", &row.id);
        Ok(Self {
            user: UserId::parse(&row.user_id).map_err(|_| impossible())?,
            family: Family::parse(&row.family).ok_or_else(impossible)?,
            id: IdentityId::parse(&row.id).map_err(|_| impossible())?,
            details: serde_json::from_str(&row.details).map_err(|_| impossible())?,
            target: row.target,
            issuer: row.issuer,
            identity_id: row.identity_id,
            created_at: Timestamp::from_micros(row.created_at),
            updated_at: Timestamp::from_micros(row.updated_at),
        })
    }
}

/// A user's identities, by connection.
pub(in crate::tokens) fn identities(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
) -> Result<Vec<Identity>, DbError> {
    let query = user_identities::table
        .filter(user_identities::tenant_id.eq(tenant.as_str()))
        .filter(user_identities::user_id.eq(user.as_str()))
        .order((user_identities::family.desc(), user_identities::target));
    let rows: Vec<IdentityRow> = with_conn!(conn, |c| query.select(IdentityRow::as_select()).load(c))?;
    rows.into_iter().map(Identity::try_from).collect()
}

/// The identities of several users.
pub(in crate::tokens) fn identities_of(
    conn: &mut Conn,
    tenant: &TenantId,
    of: &[UserId],
) -> Result<Vec<Identity>, DbError> {
    let ids: Vec<&str> = of.iter().map(UserId::as_str).collect();
    let query = user_identities::table
        .filter(user_identities::tenant_id.eq(tenant.as_str()))
        .filter(user_identities::user_id.eq_any(ids))
        .order((user_identities::family.desc(), user_identities::target));
    let rows: Vec<IdentityRow> = with_conn!(conn, |c| query.select(IdentityRow::as_select()).load(c))?;
    rows.into_iter().map(Identity::try_from).collect()
}

/// A user's identity of one connection.
pub(in crate::tokens) fn identity(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
    connection: &Connection,
) -> Result<Option<Identity>, DbError> {
    let query = user_identities::table.find((
        tenant.as_str(),
        user.as_str(),
        connection.family.name(),
        connection.target.as_str(),
    ));
    let row: Option<IdentityRow> =
        with_conn!(conn, |c| query.select(IdentityRow::as_select()).first(c).optional())?;
    row.map(Identity::try_from).transpose()
}

/// Writes an identity in the place of the user's own of that connection.
///
/// # Errors
/// [`DbError::Duplicate`] if the account is linked to another user.
pub(in crate::tokens) fn put_identity(
    conn: &mut Conn,
    tenant: &TenantId,
    identity: &Identity,
) -> Result<(), DbError> {
    let place = user_identities::table.find((
        tenant.as_str(),
        identity.user.as_str(),
        identity.family.name(),
        identity.target.as_str(),
    ));
    with_conn!(&mut *conn, |c| diesel::delete(place).execute(c))?;
    let row = IdentityRow::of(tenant, identity);
    with_conn!(conn, |c| diesel::insert_into(user_identities::table).values(row).execute(c))?;
    Ok(())
}

/// Writes an identity that may be there already; `false` if the user has that connection, or another user the account.
pub(in crate::tokens) fn insert_missing_identity(
    conn: &mut Conn,
    tenant: &TenantId,
    identity: &Identity,
) -> Result<bool, DbError> {
    let row = IdentityRow::of(tenant, identity);
    let insert = diesel::insert_into(user_identities::table).values(row).on_conflict_do_nothing();
    Ok(with_conn!(conn, |c| insert.execute(c))? == 1)
}

/// Whose the account is that a connection leads to, by that one or by another to the same issuer; somebody else than
/// `user`, if there is one.
pub(in crate::tokens) fn owner_of(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
    connection: &Connection,
    (issuer, identity_id): (Option<&str>, &str),
) -> Result<Option<UserId>, DbError> {
    // By their names, which the index on accounts begins with.
    let others = connectors::table
        .filter(connectors::tenant_id.eq(tenant.as_str()).and(connectors::family.eq(Family::Sso.name())))
        .select(connectors::target);
    let mut targets: Vec<String> = match issuer {
        Some(_) => with_conn!(&mut *conn, |c| others.load(c))?,
        None => Vec::new(),
    };
    targets.push(connection.target.clone());
    let query = user_identities::table
        .filter(user_identities::tenant_id.eq(tenant.as_str()))
        .filter(user_identities::family.eq(connection.family.name()))
        .filter(user_identities::target.eq_any(targets).and(user_identities::identity_id.eq(identity_id)))
        // Without an issuer the second comparison is with NULL, which nothing equals.
        .filter(user_identities::target.eq(&connection.target).or(user_identities::issuer.eq(issuer)))
        .filter(user_identities::user_id.ne(user.as_str()))
        .select(user_identities::user_id);
    let owner: Option<String> = with_conn!(conn, |c| query.first(c).optional())?;
    owner.map(|id| UserId::parse(&id).map_err(|_| DbError::impossible("user_identities", &id))).transpose()
}

/// Deletes an identity; `false` if there was none.
pub(in crate::tokens) fn delete_identity(
    conn: &mut Conn,
    tenant: &TenantId,
    user: &UserId,
    connection: &Connection,
) -> Result<bool, DbError> {
    let place = user_identities::table.find((
        tenant.as_str(),
        user.as_str(),
        connection.family.name(),
        connection.target.as_str(),
    ));
    Ok(with_conn!(conn, |c| diesel::delete(place).execute(c))? == 1)
}

/// Deletes the identities of an SSO connector, as Logto's cascade does; how many.
pub(in crate::tokens) fn delete_sso_identities(
    conn: &mut Conn,
    tenant: &TenantId,
    connector: &ConnectorId,
) -> Result<usize, DbError> {
    let rows = user_identities::table
        .filter(user_identities::tenant_id.eq(tenant.as_str()))
        .filter(user_identities::family.eq(Family::Sso.name()))
        .filter(user_identities::target.eq(connector.as_str()));
    Ok(with_conn!(conn, |c| diesel::delete(rows).execute(c))?)
}
