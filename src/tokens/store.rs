//! SQL of users, identities, connectors, token sets and proofs. Every statement names the tenant. Sealed values lie
//! in the vault's records, which are written and deleted in the same transactions.

pub(super) mod connectors;
pub(super) mod logto;
pub(super) mod sets;
pub(super) mod users;
pub(super) mod verifications;

use crate::db::DbError;

/// A number from the database that cannot be negative.
fn unsigned(table: &'static str, id: &str, number: i64) -> Result<u64, DbError> {
    u64::try_from(number).map_err(|_| DbError::impossible(table, id))
}

/// A number on its way to the database.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
