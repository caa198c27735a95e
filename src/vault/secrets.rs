//! Stored secrets: create, list, show, reveal, replace, delete.

use crate::audit::{Action, Event};
use crate::db::DbError;
use crate::identity::{Caller, Scope};
use crate::ids::SecretId;
use crate::seal::{Context, Opened, Sealed};

use super::idempotency::Request;
use super::model::{
    Figures, IdempotencyKey, ListFilter, NewSecret, Page, Plain, PlainValue, Revealed, SecretInfo,
    VersionInfo,
};
use super::store::{self, NewVersion, StoredVersion};
use super::{Vault, VaultError, check};

/// Versions that are kept of a secret; the oldest beyond are deleted when a new one is stored.
const KEEP_VERSIONS: u64 = 10;
/// Longest page.
const PAGE: u32 = 200;
/// `Context::kind` of stored secrets: frozen, it is part of what every ciphertext is bound to.
const KIND: &str = "secret";

fn context<'a>(tenant: &'a str, id: &'a str, version: u64) -> Context<'a> {
    Context { tenant, kind: KIND, record: id, version }
}

impl Vault {
    /// Creates a secret with version 1.
    ///
    /// # Errors
    /// [`VaultError::Invalid`], [`VaultError::TooLarge`], [`VaultError::NameTaken`]; those of
    /// idempotency keys; or what the device, the log and the database say.
    pub async fn create(
        &self,
        caller: &Caller,
        new: NewSecret,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<SecretInfo, VaultError> {
        let id = SecretId::generate();
        let event = Event::new(Action::SecretCreate, "secret", id.as_str());
        if let Err(missing) = caller.require(Scope::SecretsWrite) {
            return self.deny(caller, event, missing.into()).await;
        }
        check::new_secret(&new, self.parts().clock.now(), self.parts().config.max_value_bytes)?;
        check::idempotency(idempotency.as_ref())?;
        let event = event.detail("name", new.name.as_str()).detail("kind", new.kind.name());
        let work = |note: crate::audit::Note| async move {
            let request = self.request(caller, Action::SecretCreate.name(), idempotency.as_ref()).await?;
            if let Request::Repeated(first) = request {
                return self.created_before(caller, &first, &note).await;
            }
            match self.store_new(caller, &id, new, &request, &note).await {
                // The same request came twice at once, and the other was faster.
                Err(VaultError::IdempotencyInFlight) => {
                    match self.request(caller, Action::SecretCreate.name(), idempotency.as_ref()).await? {
                        Request::Repeated(first) => self.created_before(caller, &first, &note).await,
                        Request::New(_) | Request::Plain => Err(VaultError::IdempotencyInFlight),
                    }
                }
                result => result,
            }
        };
        self.parts().audit.around(caller, event, work).await
    }

    async fn created_before(
        &self,
        caller: &Caller,
        id: &str,
        note: &crate::audit::Note,
    ) -> Result<SecretInfo, VaultError> {
        note.add("repeated", id);
        let id = SecretId::parse(id).map_err(|_| DbError::impossible("idempotency_keys", id))?;
        self.found(caller, &id).await
    }

    /// Seals first and stores then: a crash in between leaves nothing. The id is made before, because
    /// the value is sealed for it.
    async fn store_new(
        &self,
        caller: &Caller,
        id: &SecretId,
        new: NewSecret,
        request: &Request,
        note: &crate::audit::Note,
    ) -> Result<SecretInfo, VaultError> {
        let version = self.seal_version(caller, id, 1, &new.value).await?;
        note.add("kek_version", version.kek_version.to_string());
        let now = self.parts().clock.now();
        let info = SecretInfo {
            id: id.clone(),
            name: new.name,
            kind: new.kind,
            labels: new.labels,
            version: 1,
            expires_at: new.expires_at,
            created_at: now,
            updated_at: now,
            row_version: 1,
        };
        let (tenant, stored, row) = (caller.tenant.clone(), info.clone(), request.row(id.as_str()));
        let work = move |conn: &mut _| store::insert(conn, &tenant, &stored, version, row.as_ref());
        self.parts().db.write(work).await?;
        Ok(info)
    }

    async fn seal_version(
        &self,
        caller: &Caller,
        id: &SecretId,
        version: u64,
        value: &PlainValue,
    ) -> Result<NewVersion, VaultError> {
        let kek = self.kek_for_sealing(&caller.tenant).await?;
        let context = context(caller.tenant.as_str(), id.as_str(), version);
        let sealed =
            self.parts().sealer.seal(&kek, &context, &value.bytes).await.map_err(VaultError::Seal)?;
        Ok(NewVersion::new(version, value.encoding, value.bytes.len(), sealed))
    }

    /// Lists secrets by id, a page at a time.
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], or what the database says.
    pub async fn list(&self, caller: &Caller, filter: ListFilter) -> Result<Page<SecretInfo>, VaultError> {
        caller.require(Scope::SecretsMetadata)?;
        let limit = filter.limit.clamp(1, PAGE);
        let mut after = filter.after.as_ref().map(|id| id.as_str().to_owned());
        loop {
            let (tenant, filter, from) = (caller.tenant.clone(), filter.clone(), after.clone());
            let query = move |conn: &mut _| store::list(conn, &tenant, &filter, from.as_deref(), limit);
            let Page { items: rows, more } = page(self.parts().db.read::<_, DbError, _>(query).await?, limit);
            let last = rows.last().map(|(id, _)| id.clone());
            // However an altered id is ordered: never the same rows again.
            let more = more && last != after;
            after = last;
            let mut items = Vec::with_capacity(rows.len());
            for (id, info) in rows {
                match info {
                    Some(info) => items.push(info),
                    None => self.altered(caller, &id),
                }
            }
            // A page without a single sound row would have no item for a cursor to point to.
            if !items.is_empty() || !more {
                return Ok(Page { items, more });
            }
        }
    }

    /// Metadata of one secret.
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], [`VaultError::NotFound`], or what the database says.
    pub async fn show(&self, caller: &Caller, id: &SecretId) -> Result<SecretInfo, VaultError> {
        caller.require(Scope::SecretsMetadata)?;
        self.found(caller, id).await
    }

    async fn found(&self, caller: &Caller, id: &SecretId) -> Result<SecretInfo, VaultError> {
        let (tenant, id) = (caller.tenant.clone(), id.clone());
        let wanted = id.clone();
        let query = move |conn: &mut _| store::find(conn, &tenant, &wanted);
        let found = self.parts().db.read::<_, DbError, _>(query).await;
        self.sound(caller, &id, None, found).await?.ok_or(VaultError::NotFound("secret"))
    }

    /// Sorts what the database says of a secret: a row that this program cannot have written was altered.
    async fn sound<T>(
        &self,
        caller: &Caller,
        id: &SecretId,
        version: Option<u64>,
        found: Result<T, DbError>,
    ) -> Result<T, VaultError> {
        if let Err(DbError::Impossible { .. }) = found {
            self.incident(caller, id.as_str(), version).await;
            return Err(VaultError::Integrity);
        }
        Ok(found?)
    }

    /// Releases a value: the newest version, or the given one. The row is read before the intent is
    /// recorded, so that the record names the version; nothing is opened before the record is durable.
    ///
    /// # Errors
    /// [`VaultError::NotFound`], [`VaultError::Expired`], [`VaultError::Integrity`], or what the
    /// device, the log and the database say.
    pub async fn reveal(
        &self,
        caller: &Caller,
        id: &SecretId,
        version: Option<u64>,
    ) -> Result<Revealed, VaultError> {
        let event = Event::new(Action::SecretReveal, "secret", id.as_str());
        if let Err(missing) = caller.require(Scope::SecretsRead) {
            return self.deny(caller, event, missing.into()).await;
        }
        let (tenant, wanted) = (caller.tenant.clone(), id.clone());
        let query = move |conn: &mut _| store::find_version(conn, &tenant, &wanted, version);
        let found = self.parts().db.read::<_, DbError, _>(query).await;
        let (info, stored) = match self.sound(caller, id, version, found).await? {
            Some((info, Some(stored))) => (info, stored),
            Some((info, None)) if version.is_none() => {
                self.incident(caller, id.as_str(), Some(info.version)).await;
                return self.deny(caller, event, VaultError::Integrity).await;
            }
            Some((_, None)) => return self.deny(caller, event, VaultError::NotFound("version")).await,
            None => return self.deny(caller, event, VaultError::NotFound("secret")).await,
        };
        let event = event.detail("version", stored.version.to_string());
        if info.expires_at.is_some_and(|at| at <= self.parts().clock.now()) {
            return self.deny(caller, event, VaultError::Expired).await;
        }
        let number = version.unwrap_or(info.version);
        let encoding = stored.encoding;
        let work = |note| async move { self.open_version(caller, id, number, stored, note).await };
        let opened = self.parts().audit.around(caller, event, work).await?;
        Ok(Revealed { info, version: number, encoding, value: Plain(opened) })
    }

    /// Opens a stored version under the context that was asked for; what the row says about itself
    /// decides nothing.
    async fn open_version(
        &self,
        caller: &Caller,
        id: &SecretId,
        number: u64,
        stored: StoredVersion,
        note: crate::audit::Note,
    ) -> Result<Opened, VaultError> {
        let [wrapped_dek, iv, ciphertext, tag] = stored.columns;
        let sealed = Sealed::from_columns(&wrapped_dek, &iv, ciphertext, &tag).ok();
        let kek = match &sealed {
            Some(sealed) => self.kek_for_opening(&caller.tenant, sealed.key()).await?,
            None => None,
        };
        // A row that the rewrap would pass over, or count under another version.
        let fits = |sealed: &Sealed| i64::from(sealed.key().kek_version()) == stored.kek_version;
        let (Some(sealed), Some(kek)) = (sealed.filter(fits), kek) else {
            self.incident(caller, id.as_str(), Some(number)).await;
            return Err(VaultError::Integrity);
        };
        note.add("kek_version", kek.version.to_string());
        let context = context(caller.tenant.as_str(), id.as_str(), number);
        let opened = match self.parts().sealer.open(&kek, &context, &sealed).await {
            Ok(opened) => opened,
            Err(error) => return Err(self.sealing(caller, id.as_str(), number, error).await),
        };
        if opened.len() as u64 != stored.len {
            self.incident(caller, id.as_str(), Some(number)).await;
            return Err(VaultError::Integrity);
        }
        Ok(opened)
    }

    /// Stores a new version. `expected` is the row version of If-Match; without it the new version
    /// follows whatever is there now. The ten newest versions are kept; an older one is deleted with
    /// the write that pushes it out.
    ///
    /// # Errors
    /// [`VaultError::NotFound`], [`VaultError::VersionConflict`], [`VaultError::Expired`],
    /// [`VaultError::Invalid`], or what the device, the log and the database say.
    pub async fn replace(
        &self,
        caller: &Caller,
        id: &SecretId,
        expected: Option<i64>,
        value: PlainValue,
    ) -> Result<SecretInfo, VaultError> {
        let event = Event::new(Action::SecretReplace, "secret", id.as_str());
        if let Err(missing) = caller.require(Scope::SecretsWrite) {
            return self.deny(caller, event, missing.into()).await;
        }
        let info = match self.found(caller, id).await {
            Err(error @ VaultError::NotFound(_)) => return self.deny(caller, event, error).await,
            found => found?,
        };
        check::value(info.kind, &value, self.parts().config.max_value_bytes)?;
        let expected = expected.unwrap_or(info.row_version);
        if info.row_version != expected {
            let conflict = VaultError::VersionConflict { current: info.row_version };
            return self.deny(caller, event, conflict).await;
        }
        // A new version would expire with the secret: it could be stored and never be read.
        if info.expires_at.is_some_and(|at| at <= self.parts().clock.now()) {
            return self.deny(caller, event, VaultError::Expired).await;
        }
        let work = |note: crate::audit::Note| async move {
            let version = self.seal_version(caller, id, info.version + 1, &value).await?;
            note.add("version", version.version.to_string());
            note.add("kek_version", version.kek_version.to_string());
            let (tenant, id, now) = (caller.tenant.clone(), id.clone(), self.parts().clock.now());
            let work =
                move |conn: &mut _| store::replace(conn, &tenant, &id, expected, version, KEEP_VERSIONS, now);
            self.parts().db.write(work).await
        };
        self.parts().audit.around(caller, event, work).await
    }

    /// Deletes a secret and all its versions, for real. `expected` is the row version of If-Match, if given.
    ///
    /// # Errors
    /// [`VaultError::NotFound`], [`VaultError::VersionConflict`], or what the log and the database say.
    pub async fn delete(
        &self,
        caller: &Caller,
        id: &SecretId,
        expected: Option<i64>,
    ) -> Result<(), VaultError> {
        let event = Event::new(Action::SecretDelete, "secret", id.as_str());
        if let Err(missing) = caller.require(Scope::SecretsWrite) {
            return self.deny(caller, event, missing.into()).await;
        }
        let name = match self.found(caller, id).await {
            Err(error @ VaultError::NotFound(_)) => return self.deny(caller, event, error).await,
            // A row that was altered can be deleted, and nothing else.
            Err(VaultError::Integrity) => None,
            found => Some(found?.name),
        };
        let event = name.into_iter().fold(event, |event, name| event.detail("name", name));
        let work = |_| async move {
            let (tenant, id) = (caller.tenant.clone(), id.clone());
            self.parts().db.write(move |conn| store::delete(conn, &tenant, &id, expected)).await
        };
        self.parts().audit.around(caller, event, work).await
    }

    /// The versions of a secret, newest first, a page at a time (`before` is exclusive).
    ///
    /// # Errors
    /// [`VaultError::Forbidden`], [`VaultError::NotFound`], or what the database says.
    pub async fn versions(
        &self,
        caller: &Caller,
        id: &SecretId,
        before: Option<u64>,
        limit: u32,
    ) -> Result<Page<VersionInfo>, VaultError> {
        caller.require(Scope::SecretsMetadata)?;
        self.found(caller, id).await?;
        let (tenant, wanted, limit) = (caller.tenant.clone(), id.clone(), limit.clamp(1, PAGE));
        let query = move |conn: &mut _| store::versions(conn, &tenant, &wanted, before, limit);
        let found = self.parts().db.read::<_, DbError, _>(query).await;
        Ok(page(self.sound(caller, id, None, found).await?, limit))
    }

    /// Figures for `GET /v1/status` and metrics: secrets by kind, records per KEK version. Counts of
    /// the caller's own tenant only, so no scope is asked for.
    ///
    /// # Errors
    /// What the database says.
    pub async fn figures(&self, caller: &Caller) -> Result<Figures, VaultError> {
        let tenant = caller.tenant.clone();
        let figures =
            self.parts().db.read::<_, DbError, _>(move |conn| store::figures(conn, &tenant)).await?;
        Ok(figures)
    }
}

/// Cuts off the item that was asked for beyond the limit, to know whether more follow.
fn page<T>(mut items: Vec<T>, limit: u32) -> Page<T> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = items.len() > limit;
    items.truncate(limit);
    Page { items, more }
}

#[cfg(test)]
mod tests {
    use super::page;

    #[test]
    fn a_page_tells_whether_more_follow() {
        assert!(page(vec![1, 2, 3], 2).more);
        assert_eq!(page(vec![1, 2, 3], 2).items, [1, 2]);
        assert!(!page(vec![1, 2], 2).more);
        assert!(!page(Vec::<u8>::new(), 2).more);
    }
}
