//! The database's own clock: the one that all daemons on it share.

use diesel::prelude::*;
use diesel::sql_types::BigInt;

use super::{Conn, DbError};

#[derive(QueryableByName)]
struct Now {
    #[diesel(sql_type = BigInt)]
    now: i64,
}

/// The time by which leases are judged, in microseconds since the epoch. On SQLite there is one daemon, and `own` is
/// its clock's.
///
/// # Errors
/// If the database does not answer.
pub fn now(conn: &mut Conn, own: i64) -> Result<i64, DbError> {
    match conn {
        Conn::Sqlite(_) => Ok(own),
        Conn::Postgres(conn) => {
            let query = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS INT8) AS now";
            let now: Now = diesel::sql_query(query).get_result(conn)?;
            Ok(now.now)
        }
    }
}
