//! Requests that may be repeated: the same key and body give the same result, once made.
//!
//! Only an HMAC of the body is kept, made with a key in the device, so that the table tells nothing
//! about values. The key is written in the transaction that makes the result, so there is no moment
//! in which one exists without the other.

use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::db::DbError;
use crate::identity::Caller;

use super::model::IdempotencyKey;
use super::store::{self, IdempotencyRow};
use super::{Vault, VaultError};

/// How long a key is remembered.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// A body of up to so many bytes goes to the device as it is. Of a longer one goes its hash: devices take
/// 1 KiB at a time (TPMs) or charge by the round trip.
const WHOLE: usize = 1024;
/// No body begins like this: they are JSON.
const LONG: &[u8] = b"\0lacre/long-body/v1";

/// What is known about a request.
pub(super) enum Request {
    /// It came without a key.
    Plain,
    /// Its key is new: to be written with the result.
    New(IdempotencyRow),
    /// It was done before, with this result.
    Repeated(String),
}

impl Request {
    /// The row to be written with a result of this id.
    pub(super) fn row(&self, result_id: &str) -> Option<IdempotencyRow> {
        match self {
            Self::New(row) => Some(IdempotencyRow { result_id: result_id.to_owned(), ..row.clone() }),
            Self::Plain | Self::Repeated(_) => None,
        }
    }
}

impl Vault {
    /// Looks up the key of a request.
    pub(super) async fn request(
        &self,
        caller: &Caller,
        operation: &'static str,
        key: Option<&IdempotencyKey>,
    ) -> Result<Request, VaultError> {
        let Some(key) = key else { return Ok(Request::Plain) };
        let parts = self.parts();
        let mac = match key.body.len() {
            0..=WHOLE => parts.sealer.mac(&parts.body_key, &key.body).await,
            _ => parts.sealer.mac(&parts.body_key, &[LONG, &Sha256::digest(&key.body)].concat()).await,
        };
        let mac = mac.map_err(VaultError::Seal)?;
        let now = parts.clock.now();
        let row = IdempotencyRow {
            tenant_id: caller.tenant.as_str().to_owned(),
            principal: caller.principal.to_string(),
            key: key.key.clone(),
            operation: operation.to_owned(),
            body_mac: mac.to_vec(),
            result_id: String::new(),
            expires_at: now.plus(KEPT).as_micros(),
        };
        let (tenant, principal, name) = (caller.tenant.clone(), row.principal.clone(), row.key.clone());
        let find = move |conn: &mut _| store::find_key(conn, &tenant, &principal, &name, now);
        let found = parts.db.read::<_, DbError, _>(find).await?;
        compare(row, found)
    }
}

/// Decides what a request is, given what is stored under its key.
fn compare(row: IdempotencyRow, found: Option<IdempotencyRow>) -> Result<Request, VaultError> {
    match found {
        None => Ok(Request::New(row)),
        Some(found) if found.operation == row.operation && found.body_mac == row.body_mac => {
            Ok(Request::Repeated(found.result_id))
        }
        Some(_) => Err(VaultError::IdempotencyMismatch),
    }
}

#[cfg(test)]
mod tests {
    use super::{IdempotencyRow, Request, compare};
    use crate::vault::VaultError;

    fn row(operation: &str, mac: u8, result: &str) -> IdempotencyRow {
        IdempotencyRow {
            tenant_id: "t".to_owned(),
            principal: "app:a".to_owned(),
            key: "k".to_owned(),
            operation: operation.to_owned(),
            body_mac: vec![mac; 32],
            result_id: result.to_owned(),
            expires_at: 1,
        }
    }

    #[test]
    fn a_key_repeats_its_own_request_only() {
        let request = row("secret.create", 1, "");

        assert!(matches!(compare(request.clone(), None), Ok(Request::New(_))));
        let same = compare(request.clone(), Some(row("secret.create", 1, "id")));
        assert!(matches!(same, Ok(Request::Repeated(id)) if id == "id"));
        for other in [row("secret.create", 2, "id"), row("kek.rotate", 1, "id")] {
            assert!(matches!(compare(request.clone(), Some(other)), Err(VaultError::IdempotencyMismatch)));
        }
    }
}
