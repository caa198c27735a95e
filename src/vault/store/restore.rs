//! SQL of the quarantine: one flag for the whole installation.

use diesel::prelude::*;

use crate::clock::Timestamp;
use crate::db::schema::installation;
use crate::db::{Conn, DbError};
use crate::with_conn;

/// The row that there is.
const ROW: i64 = 1;

/// Since when the installation is in quarantine, if it is.
pub(in crate::vault) fn quarantined_at(conn: &mut Conn) -> Result<Option<Timestamp>, DbError> {
    let query = installation::table.find(ROW).select(installation::quarantined_at);
    let at: Option<Option<i64>> = with_conn!(conn, |c| query.first(c).optional())?;
    // Without its row nobody can say: then nothing goes on by itself.
    let at = at.ok_or_else(|| DbError::impossible("installation", "1"))?;
    Ok(at.map(Timestamp::from_micros))
}

/// Begins the quarantine, unless it has begun already; since when it is.
pub(in crate::vault) fn begin(conn: &mut Conn, now: Timestamp) -> Result<Timestamp, DbError> {
    if let Some(since) = quarantined_at(conn)? {
        return Ok(since);
    }
    let update = diesel::update(installation::table.find(ROW))
        .set(installation::quarantined_at.eq(Some(now.as_micros())));
    with_conn!(conn, |c| update.execute(c))?;
    Ok(now)
}

/// Ends the quarantine; `false` if there was none.
pub(in crate::vault) fn release(conn: &mut Conn) -> Result<bool, DbError> {
    let update = diesel::update(installation::table.find(ROW))
        .filter(installation::quarantined_at.is_not_null())
        .set(installation::quarantined_at.eq(None::<i64>));
    Ok(with_conn!(conn, |c| update.execute(c))? == 1)
}
