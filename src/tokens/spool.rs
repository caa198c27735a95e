//! Answers of providers that the database did not take: sealed, in files, until it does. A crash in between would else
//! lose the only copy of a refresh token that the provider has already put in the old one's place.

use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use tokio::fs;
use tokio::io::AsyncWriteExt;

use super::Tokens;
use super::model::{Connection, Family};
use super::plan::Phase;
use super::store::sets::{self as store, Set, Stored};
use crate::clock::Timestamp;
use crate::ids::{ConnectorId, TenantId, TokenSetId, UserId};
use crate::vault::SealedRecord;

/// A file of the spool. Nothing in it is secret but what is sealed.
#[derive(Serialize, Deserialize)]
struct Spooled {
    tenant: TenantId,
    base: u64,
    id: TokenSetId,
    user: UserId,
    family: Family,
    target: String,
    connector: ConnectorId,
    issuer: Option<String>,
    identity_id: String,
    scope: Option<String>,
    token_type: Option<String>,
    expires_at: Option<i64>,
    issued_at: Timestamp,
    version: u64,
    refresh_at: Option<Timestamp>,
    created_at: Timestamp,
    updated_at: Timestamp,
    /// Wrapped DEK, IV, ciphertext, tag, in base64.
    columns: Vec<String>,
    len: u64,
}

impl Spooled {
    fn new(tenant: &TenantId, base: u64, set: &Set, sealed: &SealedRecord) -> Self {
        let (columns, len) = sealed.to_parts();
        let set = set.clone();
        Self {
            tenant: tenant.clone(),
            base,
            id: set.id,
            user: set.user,
            family: set.connection.family,
            target: set.connection.target,
            connector: set.connector,
            issuer: set.issuer,
            identity_id: set.identity_id,
            scope: set.scope,
            token_type: set.token_type,
            expires_at: set.expires_at,
            issued_at: set.issued_at,
            version: set.version,
            refresh_at: set.refresh_at,
            created_at: set.created_at,
            updated_at: set.updated_at,
            columns: columns.iter().map(|column| STANDARD.encode(column)).collect(),
            len,
        }
    }

    /// `None` if this program cannot have written it.
    fn read(self) -> Option<(TenantId, u64, Set, SealedRecord)> {
        let connection = Connection::parse(self.family, &self.target)?;
        let place = store::place(&self.tenant, &self.user, &connection, self.version);
        let columns =
            self.columns.iter().map(|column| STANDARD.decode(column).ok()).collect::<Option<_>>()?;
        let sealed = SealedRecord::from_parts(place, columns, self.len)?;
        let set = Set {
            id: self.id,
            user: self.user,
            connection,
            connector: self.connector,
            issuer: self.issuer,
            identity_id: self.identity_id,
            has_refresh_token: true,
            scope: self.scope,
            token_type: self.token_type,
            expires_at: self.expires_at,
            issued_at: self.issued_at,
            version: self.version,
            phase: Phase::Idle,
            epoch: 0,
            lease_until: Timestamp::from_micros(0),
            spent: false,
            failures: 0,
            last_error: None,
            retry_at: Timestamp::from_micros(0),
            refresh_at: self.refresh_at,
            created_at: self.created_at,
            updated_at: self.updated_at,
        };
        Some((self.tenant, self.base, set, sealed))
    }
}

impl Tokens {
    /// Writes an answer to the spool, durable when this returns; `None` if that failed too.
    pub(super) async fn spool(
        &self,
        tenant: &TenantId,
        base: u64,
        set: &Set,
        sealed: &SealedRecord,
    ) -> Option<PathBuf> {
        let path = self.spool_of(set, set.version);
        // Texts and numbers always serialise.
        let bytes = serde_json::to_vec(&Spooled::new(tenant, base, set, sealed)).unwrap_or_default();
        match write(&path, &bytes).await {
            Ok(()) => Some(path),
            Err(error) => {
                tracing::error!(%error, path = %path.display(), "an answer cannot be spooled");
                None
            }
        }
    }

    fn spool_of(&self, set: &Set, version: u64) -> PathBuf {
        self.parts().spool.join(format!("{}-{version}.json", set.id))
    }

    /// Whether the next version of a set lies in the spool.
    pub(super) async fn has_spooled(&self, set: &Set) -> bool {
        fs::try_exists(self.spool_of(set, set.version + 1)).await.unwrap_or(false)
    }

    /// Removes files that were being written when the process ended: their answers are lost. Before anything is written.
    pub(super) async fn clear_unfinished(&self) {
        let Ok(mut entries) = fs::read_dir(&self.parts().spool).await else { return };
        while let Ok(Some(entry)) = entries.next_entry().await {
            if entry.path().extension().is_some_and(|ending| ending == "new") {
                remove(&entry.path()).await;
            }
        }
    }

    /// Stores what lies in the spool; what the database does not take stays there.
    pub(super) async fn replay_spool(&self) {
        let Ok(mut entries) = fs::read_dir(&self.parts().spool).await else { return };
        while let Ok(Some(entry)) = entries.next_entry().await {
            let path = entry.path();
            if path.extension().is_none_or(|ending| ending != "json") {
                continue;
            }
            let read = fs::read(&path).await.ok();
            let spooled = read.and_then(|bytes| serde_json::from_slice::<Spooled>(&bytes).ok()?.read());
            let Some((tenant, base, set, sealed)) = spooled else {
                tracing::error!(path = %path.display(), "a file of the spool is not understood and is put aside");
                if let Err(error) = fs::rename(&path, path.with_extension("bad")).await {
                    tracing::warn!(%error, "it cannot be put aside");
                }
                continue;
            };
            match self.finish(&tenant, base, &set, &sealed).await {
                Ok(stored) => {
                    let stored = if stored == Stored::Done { "stored" } else { "overtaken" };
                    tracing::info!(token_set = %set.id, stored, "an answer came out of the spool");
                    remove(&path).await;
                }
                Err(error) => tracing::warn!(%error, "the spool waits for the database"),
            }
        }
    }
}

async fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).await?;
    let staging = path.with_extension("new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&staging).await?;
    file.write_all(bytes).await?;
    file.sync_all().await?;
    fs::rename(&staging, path).await?;
    // The name is durable with its directory.
    fs::File::open(dir).await?.sync_all().await
}

/// Removes a file of the spool; one that stays is found to be stored already at the next start.
pub(super) async fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path).await
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "a file stays in the spool");
    }
}
