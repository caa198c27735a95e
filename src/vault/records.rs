//! Records that other parts of the program keep sealed: token sets, connectors, proofs.
//!
//! Their owner decides who may, records it, and says in which transaction a record is written or deleted; how it is
//! sealed, where it lies and which KEK wraps it is the vault's business, so jobs move these records like
//! all others. A record opens only under the place that the caller names.

use crate::clock::Timestamp;
use crate::db::{Conn, DbError};
use crate::identity::Caller;
use crate::ids::TenantId;
use crate::seal::{Context, SealError, Sealed};

use super::model::{Plain, RecordKind};
use super::store::records::{self, StoredRecord};
use super::{Vault, VaultError};

/// Where a record lies: kind, tenant and the owner's own name for it; and which version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    kind: RecordKind,
    tenant: TenantId,
    name: String,
    version: u64,
}

impl Place {
    /// The place whose name in its tenant is made of `parts`. None of them may have a slash.
    pub fn new(kind: RecordKind, tenant: &TenantId, parts: &[&str], version: u64) -> Self {
        let name = format!("{}/{tenant}/{}", kind.name(), parts.join("/"));
        Self { kind, tenant: tenant.clone(), name, version }
    }

    /// The same record's other version.
    #[must_use]
    pub fn at(&self, version: u64) -> Self {
        Self { version, ..self.clone() }
    }

    /// Its version.
    pub const fn version(&self) -> u64 {
        self.version
    }

    fn context(&self) -> Context<'_> {
        let Self { kind, tenant, name, version } = self;
        Context { tenant: tenant.as_str(), kind: kind.name(), record: name, version: *version }
    }
}

/// A record that is sealed and not stored yet.
#[derive(Clone)]
pub struct SealedRecord {
    place: Place,
    row: StoredRecord,
}

impl SealedRecord {
    /// Writes the record, in the caller's transaction; earlier versions of it are deleted.
    ///
    /// # Errors
    /// [`DbError::Duplicate`] if this version is there already.
    pub fn store(&self, conn: &mut Conn, now: Timestamp) -> Result<(), DbError> {
        let Place { kind, tenant, name, version } = &self.place;
        records::delete(conn, tenant, name)?;
        records::insert(conn, tenant, (*kind, name, *version), &self.row, now)
    }

    /// Its bytes, for a place outside of the database. What is in them is sealed.
    pub fn to_parts(&self) -> (Vec<Vec<u8>>, u64) {
        (self.row.columns.to_vec(), self.row.len)
    }

    /// Takes back what [`SealedRecord::to_parts`] gave; `None` if that is not so.
    pub fn from_parts(place: Place, columns: Vec<Vec<u8>>, len: u64) -> Option<Self> {
        let columns: [Vec<u8>; 4] = columns.try_into().ok()?;
        let [wrapped_dek, iv, ciphertext, tag] = columns.clone();
        let sealed = Sealed::from_columns(&wrapped_dek, &iv, ciphertext, &tag).ok()?;
        let kek_version = i64::from(sealed.key().kek_version());
        Some(Self { place, row: StoredRecord { columns, kek_version, len } })
    }
}

/// A record as it was read: not believed before it is open.
pub struct UnopenedRecord(StoredRecord);

/// Reads a record, in the caller's transaction.
///
/// # Errors
/// If the database cannot be read.
pub fn load_record(conn: &mut Conn, place: &Place) -> Result<Option<UnopenedRecord>, DbError> {
    Ok(records::find(conn, &place.tenant, &place.name, place.version)?.map(UnopenedRecord))
}

/// Deletes a record in whatever version, in the caller's transaction.
///
/// # Errors
/// If the database cannot be written.
pub fn delete_record(conn: &mut Conn, place: &Place) -> Result<(), DbError> {
    records::delete(conn, &place.tenant, &place.name)
}

impl Vault {
    /// Seals a value for its place. Stores and records nothing.
    ///
    /// # Errors
    /// [`VaultError::TooLarge`], or what the device says.
    pub async fn seal_record(&self, place: Place, value: &[u8]) -> Result<SealedRecord, VaultError> {
        let limit = self.parts().config.max_value_bytes;
        if value.len() > limit {
            return Err(VaultError::TooLarge { limit });
        }
        let kek = self.kek_for_sealing(&place.tenant).await?;
        let sealed = self.parts().sealer.seal(&kek, &place.context(), value).await;
        let sealed = sealed.map_err(VaultError::Seal)?;
        let kek_version = i64::from(sealed.key().kek_version());
        let row = StoredRecord { columns: sealed.into_columns(), kek_version, len: value.len() as u64 };
        Ok(SealedRecord { place, row })
    }

    /// Opens a record at the place that was asked for. The owner has made its audit record durable before.
    ///
    /// # Errors
    /// [`VaultError::Integrity`] if it was altered or moved, which is also recorded; what the device says.
    pub async fn open_record(
        &self,
        caller: &Caller,
        place: &Place,
        stored: UnopenedRecord,
    ) -> Result<Plain, VaultError> {
        let StoredRecord { columns: [wrapped_dek, iv, ciphertext, tag], kek_version, len } = stored.0;
        let sealed = Sealed::from_columns(&wrapped_dek, &iv, ciphertext, &tag).ok();
        let sealed = sealed.filter(|sealed| i64::from(sealed.key().kek_version()) == kek_version);
        let kek = match &sealed {
            Some(sealed) => self.kek_for_opening(&place.tenant, sealed.key()).await?,
            None => None,
        };
        let (Some(sealed), Some(kek)) = (sealed, kek) else {
            return Err(self.altered_at(caller, place).await);
        };
        match self.parts().sealer.open(&kek, &place.context(), &sealed).await {
            Ok(opened) if opened.len() as u64 == len => Ok(Plain(opened)),
            Ok(_) => Err(self.altered_at(caller, place).await),
            Err(error @ SealError::Rejected) => {
                Err(self.sealing(caller, &place.name, place.version, error).await)
            }
            Err(error) => Err(VaultError::Seal(error)),
        }
    }

    /// Records that what stands at a place is not what its owner stored there; the error to go on with.
    pub async fn altered_at(&self, caller: &Caller, place: &Place) -> VaultError {
        self.incident(caller, &place.name, Some(place.version)).await;
        VaultError::Integrity
    }
}
