//! SQL of sealed records: as jobs see them (walked in the order of an index, each wrap replaced where it was read),
//! and those that other parts keep.

use diesel::dsl::count_star;
use diesel::prelude::*;

use super::{signed, unsigned};
use crate::clock::Timestamp;
use crate::db::schema::secret_versions;
use crate::db::{Conn, DbError};
use crate::ids::TenantId;
use crate::vault::model::{Encoding, JobKind, KekRole, RecordKind};
use crate::with_conn;

/// Where a rewrap is: after this record. Ordered as the index of `secret_versions` is. Whatever stands
/// in the columns is a position: a row that cannot be must not keep the others from being moved.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::vault) struct Position {
    pub(in crate::vault) kek_version: i64,
    pub(in crate::vault) secret: String,
    pub(in crate::vault) version: i64,
}

impl Default for Position {
    /// Before every record.
    fn default() -> Self {
        Self { kek_version: i64::MIN, secret: String::new(), version: i64::MIN }
    }
}

impl Position {
    /// The form in the `position` column; empty for the beginning.
    pub(in crate::vault) fn to_text(&self) -> String {
        if *self == Self::default() {
            return String::new();
        }
        format!("{}/{}/{}", self.kek_version, self.secret, self.version)
    }

    /// Reads [`Position::to_text`].
    pub(in crate::vault) fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::default());
        }
        // Ids have no slash, but a row that somebody altered may.
        let (kek_version, rest) = text.split_once('/')?;
        let (secret, version) = rest.rsplit_once('/')?;
        Some(Self {
            kek_version: kek_version.parse().ok()?,
            secret: secret.to_owned(),
            version: version.parse().ok()?,
        })
    }
}

/// A record that is to be wrapped anew: its place and its wrapped DEKs as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::vault) struct ToRewrap {
    pub(in crate::vault) position: Position,
    /// What it is bound to; a false one does not open.
    pub(in crate::vault) kind: String,
    pub(in crate::vault) wrapped_dek: Vec<u8>,
    pub(in crate::vault) backup_dek: Option<Vec<u8>>,
}

impl JobKind {
    /// Which of a record's wraps the job writes.
    pub(in crate::vault) const fn writes(self) -> KekRole {
        match self {
            Self::Rewrap | Self::Restore => KekRole::Main,
            Self::Backup => KekRole::Backup,
        }
    }
}

/// The next records whose wrap of that role is under a KEK version below `target`, after `position`.
macro_rules! walk {
    ($conn:expr, $tenant:expr, $target:expr, $position:expr, $limit:expr, $column:ident) => {{
        use secret_versions as v;
        let (at, limit): (i64, i64) = ($position.kek_version, $limit);
        let after = v::secret_id
            .gt(&$position.secret)
            .or(v::secret_id.eq(&$position.secret).and(v::version.gt($position.version)));
        let of_tenant = v::tenant_id.eq($tenant.as_str()).and(v::$column.lt(i64::from($target)));
        let columns = (v::$column, v::secret_id, v::version, v::kind, v::wrapped_dek, v::backup_dek);
        // Two statements, because each walks the index in its order; one with OR would sort everything.
        let here = v::table
            .filter(of_tenant.and(v::$column.eq(at)).and(after))
            .order((v::secret_id, v::version))
            .limit(limit)
            .select(columns);
        let mut rows: Vec<Columns> = with_conn!(&mut *$conn, |c| here.load(c))?;
        if rows.len() < usize::try_from(limit).unwrap_or(0) {
            let beyond = v::table
                .filter(of_tenant.and(v::$column.gt(at)))
                .order((v::$column, v::secret_id, v::version))
                .limit(limit - i64::try_from(rows.len()).unwrap_or(0))
                .select(columns);
            let more: Vec<Columns> = with_conn!($conn, |c| beyond.load(c))?;
            rows.extend(more);
        }
        rows
    }};
}

type Columns = (i64, String, i64, String, Vec<u8>, Option<Vec<u8>>);

/// The next records whose wrap of that role is under a KEK version below `target`, after `position`, at
/// most `limit`.
pub(in crate::vault) fn to_rewrap(
    conn: &mut Conn,
    tenant: &TenantId,
    (role, target): (KekRole, u32),
    position: &Position,
    limit: i64,
) -> Result<Vec<ToRewrap>, DbError> {
    let rows = match role {
        KekRole::Main => walk!(conn, tenant, target, position, limit, kek_version),
        KekRole::Backup => walk!(conn, tenant, target, position, limit, backup_kek),
    };
    let record = |(kek_version, secret, version, kind, wrapped_dek, backup_dek)| ToRewrap {
        position: Position { kek_version, secret, version },
        kind,
        wrapped_dek,
        backup_dek,
    };
    Ok(rows.into_iter().map(record).collect())
}

/// How many records have their wrap of that role under a KEK version below `target`, or none.
pub(in crate::vault) fn remaining(
    conn: &mut Conn,
    tenant: &TenantId,
    (role, target): (KekRole, u32),
) -> Result<u64, DbError> {
    use secret_versions as v;
    let of_tenant = v::tenant_id.eq(tenant.as_str());
    let target = i64::from(target);
    let count: i64 = match role {
        KekRole::Main => {
            let query = v::table.filter(of_tenant.and(v::kek_version.lt(target))).select(count_star());
            with_conn!(conn, |c| query.first(c))?
        }
        KekRole::Backup => {
            let query = v::table.filter(of_tenant.and(v::backup_kek.lt(target))).select(count_star());
            with_conn!(conn, |c| query.first(c))?
        }
    };
    unsigned("secret_versions", tenant.as_str(), count)
}

/// Puts the new wrap in the old one's place, if that is still there. The DEK of a record never changes,
/// so a backup is right whatever became of the main wrap meanwhile.
pub(in crate::vault) fn swap_wrap(
    conn: &mut Conn,
    tenant: &TenantId,
    role: KekRole,
    old: &ToRewrap,
    wrapped_dek: &[u8],
    kek_version: u32,
) -> Result<bool, DbError> {
    use secret_versions as v;
    let Position { secret, version, kek_version: before } = &old.position;
    let record = v::table
        .filter(v::secret_id.eq(secret).and(v::version.eq(version)))
        .filter(v::tenant_id.eq(tenant.as_str()));
    let kek_version = i64::from(kek_version);
    let changed = match role {
        KekRole::Main => {
            let update = diesel::update(record.filter(v::wrapped_dek.eq(&old.wrapped_dek)))
                .set((v::wrapped_dek.eq(wrapped_dek), v::kek_version.eq(kek_version)));
            with_conn!(conn, |c| update.execute(c))?
        }
        KekRole::Backup => {
            let update = diesel::update(record.filter(v::backup_kek.eq(before)))
                .set((v::backup_dek.eq(wrapped_dek), v::backup_kek.eq(kek_version)));
            with_conn!(conn, |c| update.execute(c))?
        }
    };
    Ok(changed == 1)
}

/// A record of another part as it is stored.
#[derive(Clone)]
pub(in crate::vault) struct StoredRecord {
    /// Wrapped DEK, IV, ciphertext, tag.
    pub(in crate::vault) columns: [Vec<u8>; 4],
    pub(in crate::vault) kek_version: i64,
    pub(in crate::vault) len: u64,
}

/// # Errors
/// [`DbError::Duplicate`] if that version is there.
pub(in crate::vault) fn insert(
    conn: &mut Conn,
    tenant: &TenantId,
    (kind, name, version): (RecordKind, &str, u64),
    record: &StoredRecord,
    now: Timestamp,
) -> Result<(), DbError> {
    use secret_versions as v;
    let [wrapped_dek, iv, ciphertext, tag] = &record.columns;
    let row = (
        (v::secret_id.eq(name), v::version.eq(signed(version)), v::tenant_id.eq(tenant.as_str())),
        (v::encoding.eq(Encoding::Utf8.name()), v::value_len.eq(signed(record.len))),
        (v::kind.eq(kind.name()), v::kek_version.eq(record.kek_version)),
        (v::wrapped_dek.eq(wrapped_dek), v::iv.eq(iv), v::ciphertext.eq(ciphertext), v::tag.eq(tag)),
        v::created_at.eq(now.as_micros()),
    );
    with_conn!(conn, |c| diesel::insert_into(v::table).values(row).execute(c))?;
    Ok(())
}

/// The record of that name in that version.
pub(in crate::vault) fn find(
    conn: &mut Conn,
    tenant: &TenantId,
    name: &str,
    version: u64,
) -> Result<Option<StoredRecord>, DbError> {
    use secret_versions as v;
    type Row = (Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>, i64, i64);
    let query = v::table
        .filter(v::secret_id.eq(name).and(v::version.eq(signed(version))))
        .filter(v::tenant_id.eq(tenant.as_str()))
        .select((v::wrapped_dek, v::iv, v::ciphertext, v::tag, v::kek_version, v::value_len));
    let row: Option<Row> = with_conn!(conn, |c| query.first(c).optional())?;
    let read = |(wrapped_dek, iv, ciphertext, tag, kek_version, len)| {
        let len = unsigned("secret_versions", name, len)?;
        Ok(StoredRecord { columns: [wrapped_dek, iv, ciphertext, tag], kek_version, len })
    };
    row.map(read).transpose()
}

/// Deletes every version of the record of that name.
pub(in crate::vault) fn delete(conn: &mut Conn, tenant: &TenantId, name: &str) -> Result<(), DbError> {
    use secret_versions as v;
    let rows = v::table.filter(v::secret_id.eq(name).and(v::tenant_id.eq(tenant.as_str())));
    with_conn!(conn, |c| diesel::delete(rows).execute(c))?;
    Ok(())
}
