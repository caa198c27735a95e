//! The `user_tokens` table. What it gives out is not to be believed before its MAC was checked.

use diesel::prelude::{ExpressionMethods, OptionalExtension, QueryDsl, RunQueryDsl};

use crate::clock::Timestamp;
use crate::db::schema::user_tokens;
use crate::db::{Conn, DbError};
use crate::ids::{TenantId, UserId};
use crate::issuer::user_tokens::{Kind, Row};
use crate::with_conn;

type Found = (String, Option<String>, String, i64, Vec<u8>);

/// The tenant's token of that kind and hash.
pub(in crate::issuer) fn find(
    conn: &mut Conn,
    tenant: &TenantId,
    kind: Kind,
    hash: &[u8; 32],
) -> Result<Option<Row>, DbError> {
    let query = user_tokens::table
        .find(&hash[..])
        .filter(user_tokens::tenant_id.eq(tenant.as_str()))
        .filter(user_tokens::kind.eq(kind.name()))
        .select((
            user_tokens::user_id,
            user_tokens::client_id,
            user_tokens::scopes,
            user_tokens::expires_at,
            user_tokens::mac,
        ));
    let found: Option<Found> = with_conn!(conn, |c| query.first(c).optional())?;
    Ok(found.map(|(user, client, scopes, expires_at, mac)| Row {
        hash: *hash,
        kind,
        user,
        client,
        scopes,
        expires_at,
        mac,
    }))
}

pub(in crate::issuer) fn insert(conn: &mut Conn, tenant: &TenantId, row: &Row) -> Result<(), DbError> {
    let row = (
        user_tokens::hash.eq(&row.hash[..]),
        user_tokens::tenant_id.eq(tenant.as_str()),
        user_tokens::kind.eq(row.kind.name()),
        user_tokens::user_id.eq(row.user.as_str()),
        user_tokens::client_id.eq(row.client.as_deref()),
        user_tokens::scopes.eq(row.scopes.as_str()),
        user_tokens::expires_at.eq(row.expires_at),
        user_tokens::mac.eq(&row.mac[..]),
    );
    with_conn!(conn, |c| diesel::insert_into(user_tokens::table).values(row).execute(c))?;
    Ok(())
}

/// Puts `made` in the place of `used`; `false`, and nothing is changed, if that is not there as it was proven.
pub(in crate::issuer) fn exchange(
    conn: &mut Conn,
    tenant: &TenantId,
    used: &Row,
    made: &Row,
) -> Result<bool, DbError> {
    let row = user_tokens::table
        .find(&used.hash[..])
        .filter(user_tokens::tenant_id.eq(tenant.as_str()))
        .filter(user_tokens::kind.eq(used.kind.name()))
        .filter(user_tokens::mac.eq(&used.mac[..]));
    // Of two transactions that delete one row, the database lets one find it.
    if with_conn!(conn, |c| diesel::delete(row).execute(c))? != 1 {
        return Ok(false);
    }
    insert(conn, tenant, made)?;
    Ok(true)
}

/// Removes what has expired; how many.
pub(in crate::issuer) fn purge(conn: &mut Conn, now: Timestamp) -> Result<usize, DbError> {
    let dead = user_tokens::table.filter(user_tokens::expires_at.le(now.as_micros()));
    Ok(with_conn!(conn, |c| diesel::delete(dead).execute(c))?)
}

/// Removes a user's tokens; how many.
pub(in crate::issuer) fn forget(conn: &mut Conn, tenant: &TenantId, user: &UserId) -> Result<usize, DbError> {
    let theirs = user_tokens::table
        .filter(user_tokens::tenant_id.eq(tenant.as_str()))
        .filter(user_tokens::user_id.eq(user.as_str()));
    Ok(with_conn!(conn, |c| diesel::delete(theirs).execute(c))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::{Db, OpenOptions, Url};

    const NOW: Timestamp = Timestamp::from_micros(1_800_000_000_000_000);

    fn row(kind: Kind, hash: u8, user: &str) -> Row {
        Row {
            hash: [hash; 32],
            kind,
            user: user.to_owned(),
            client: (kind == Kind::Access).then(|| "app".to_owned()),
            scopes: "openid".to_owned(),
            expires_at: NOW.as_micros() + i64::from(hash),
            mac: vec![hash; 32],
        }
    }

    /// Runs `work` in a transaction that is rolled back.
    async fn trial(work: impl FnOnce(&mut Conn, &TenantId) -> Result<(), DbError> + Send + 'static) {
        let directory = tempfile::tempdir().unwrap();
        let url = Url::sqlite(directory.path().join("lacre.db"));
        let db = Db::open(&url, &OpenOptions { connections: 1, migrate: true }).unwrap();
        let tenant = TenantId::parse("default").unwrap();
        let work = move |conn: &mut Conn| -> Result<(), DbError> {
            work(conn, &tenant)?;
            Err(DbError::Duplicate)
        };
        assert!(matches!(db.write(work).await, Err(DbError::Duplicate)));
    }

    #[tokio::test]
    async fn a_token_is_found_by_tenant_kind_and_hash_together() {
        let work = |conn: &mut Conn, tenant: &TenantId| {
            let wanted = row(Kind::Access, 7, "u");
            insert(conn, tenant, &wanted)?;
            let other = TenantId::parse("other").unwrap();

            assert_eq!(find(conn, tenant, Kind::Access, &[7; 32])?.unwrap(), wanted);
            assert!(find(conn, tenant, Kind::Subject, &[7; 32])?.is_none());
            assert!(find(conn, &other, Kind::Access, &[7; 32])?.is_none());
            assert!(find(conn, tenant, Kind::Access, &[8; 32])?.is_none());
            Ok(())
        };
        trial(work).await;
    }

    #[tokio::test]
    async fn a_subject_token_is_used_up_once_and_only_as_it_was_proven() {
        let work = |conn: &mut Conn, tenant: &TenantId| {
            let (used, made) = (row(Kind::Subject, 1, "u"), row(Kind::Access, 2, "u"));
            insert(conn, tenant, &used)?;
            let altered = Row { mac: vec![9; 32], ..used.clone() };
            assert!(!exchange(conn, tenant, &altered, &made)?);
            assert!(find(conn, tenant, Kind::Access, &[2; 32])?.is_none());

            assert!(exchange(conn, tenant, &used, &made)?);
            assert!(!exchange(conn, tenant, &used, &row(Kind::Access, 3, "u"))?);

            assert!(find(conn, tenant, Kind::Subject, &[1; 32])?.is_none());
            assert!(find(conn, tenant, Kind::Access, &[2; 32])?.is_some());
            assert!(find(conn, tenant, Kind::Access, &[3; 32])?.is_none());
            Ok(())
        };
        trial(work).await;
    }

    #[tokio::test]
    async fn the_expired_and_the_users_own_go_and_nothing_else() {
        let work = |conn: &mut Conn, tenant: &TenantId| {
            for (hash, user) in [(1, "u"), (2, "u"), (3, "v"), (4, "u")] {
                insert(conn, tenant, &row(Kind::Access, hash, user))?;
            }
            assert_eq!(purge(conn, Timestamp::from_micros(NOW.as_micros() + 1))?, 1);
            assert_eq!(forget(conn, tenant, &UserId::parse("u").unwrap())?, 2);
            assert!(find(conn, tenant, Kind::Access, &[3; 32])?.is_some());
            Ok(())
        };
        trial(work).await;
    }
}
