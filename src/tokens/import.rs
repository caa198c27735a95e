//! Takes over what a Logto database has: connectors, users with identities, token sets. Keys are for the caller.
//!
//! In this order, page by page; a page is one transaction with one record. What is there already stays as it is, so
//! an import that was killed goes on when it is run again. Token sets are decrypted with Logto's KEK and sealed for
//! their place before they are written. A dry run does all of that and rolls back, without records.
//!
//! `import/plan.rs` says what becomes of each row, `store/logto.rs` reads them. Nothing is written to Logto.

mod plan;
mod report;

use std::collections::HashSet;

use futures_util::{StreamExt, stream};
use zeroize::Zeroizing;

use super::logto_format::Kek;
use super::model::{Connector, Family, Identity};
use super::store::logto::{self as rows, SecretRow};
use super::store::sets::{self, Set};
use super::store::{connectors, users};
use super::{Tokens, TokensError};
use crate::audit::{Action, Event};
use crate::db::{Conn, DbError, Foreign, OpenError, Url};
use crate::identity::{Caller, Scope};
use crate::ids::TenantId;
use crate::vault::{SealedRecord, VaultError};

use plan::{Connectors, Person};
use report::Told;

pub use plan::{KeyStatus, PrivateKey};
pub use report::{Counts, Fate, Kind, Loss, Report, Skip};

/// Rows of one transaction.
const PAGE: usize = 100;
/// Values that are sealed at the same time.
const AT_ONCE: usize = 8;

/// Why an import has ended. What was imported stays.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Logto's database does not answer, or is not what it should be.
    #[error("Logto's database cannot be read")]
    Source(#[source] DbError),
    /// A setting of Logto's has another form.
    #[error("`{0}` in logto_configs has a form that is not known")]
    Setting(&'static str),
    /// There are token sets, and no KEK was given.
    #[error("there are {0} token sets, which need Logto's KEK")]
    NoKek(u64),
    /// The KEK opens none of the first token sets.
    #[error("the KEK opens none of the first {0} token sets; nothing was imported")]
    WrongKek(usize),
    /// This installation refused or failed.
    #[error(transparent)]
    Here(#[from] TokensError),
}

/// A Logto tenant's rows.
pub struct Logto {
    database: Foreign,
    tenant: String,
}

impl Logto {
    /// Connects. Everything is read as of now.
    ///
    /// # Errors
    /// [`OpenError`] if there is no such server.
    pub async fn open(url: &Url, tenant: String) -> Result<Self, OpenError> {
        Ok(Self { database: Foreign::open(url).await?, tenant })
    }

    /// Which tenant of Logto's.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Its private keys that sign tokens, in the order in which they are to be imported.
    ///
    /// # Errors
    /// [`ImportError::Source`], [`ImportError::Setting`].
    pub async fn private_keys(&self) -> Result<Vec<PrivateKey>, ImportError> {
        let key = "oidc.privateKeys";
        let Some(value) = self.setting(key).await? else { return Ok(Vec::new()) };
        plan::private_keys(&value).ok_or(ImportError::Setting(key))
    }

    /// The ids of its cookie keys.
    ///
    /// # Errors
    /// [`ImportError::Source`].
    pub async fn cookie_keys(&self) -> Result<Vec<String>, ImportError> {
        let value = self.setting("oidc.cookieKeys").await?;
        Ok(value.map_or_else(Vec::new, |value| plan::cookie_keys(&value)))
    }

    async fn setting(&self, key: &'static str) -> Result<Option<Zeroizing<String>>, ImportError> {
        let tenant = self.tenant.clone();
        let found = self.database.read(move |conn| rows::setting(conn, &tenant, key)).await;
        Ok(found.map_err(ImportError::Source)?.map(Zeroizing::new))
    }

    async fn counts(&self) -> Result<(u64, u64), ImportError> {
        let tenant = self.tenant.clone();
        let found = self.database.read(move |conn| rows::counts(conn, &tenant, plan::TOKEN_SET)).await;
        let (all, sets) = found.map_err(ImportError::Source)?;
        Ok((all.unsigned_abs(), sets.unsigned_abs()))
    }

    async fn connectors(&self, family: Family, after: &str) -> Result<Vec<rows::ConnectorRow>, ImportError> {
        let (tenant, after) = (self.tenant.clone(), after.to_owned());
        let page = self.database.read(move |conn| match family {
            Family::Social => rows::connectors(conn, &tenant, &after, LIMIT),
            Family::Sso => rows::sso_connectors(conn, &tenant, &after, LIMIT),
        });
        page.await.map_err(ImportError::Source)
    }

    async fn users(
        &self,
        after: &str,
    ) -> Result<(Vec<rows::UserRow>, Vec<rows::SsoIdentityRow>), ImportError> {
        let (tenant, after) = (self.tenant.clone(), after.to_owned());
        let page = self.database.read(move |conn| {
            let users = rows::users(conn, &tenant, &after, LIMIT)?;
            let ids: Vec<_> = users.iter().map(|user| user.id.clone()).collect();
            Ok((users, rows::sso_identities(conn, &tenant, &ids)?))
        });
        page.await.map_err(ImportError::Source)
    }

    async fn secrets(&self, after: &str) -> Result<Vec<SecretRow>, ImportError> {
        let (tenant, after) = (self.tenant.clone(), after.to_owned());
        let page = self.database.read(move |conn| rows::secrets(conn, &tenant, &after, LIMIT));
        page.await.map_err(ImportError::Source)
    }
}

#[expect(clippy::cast_possible_wrap, reason = "a small constant")]
const LIMIT: i64 = PAGE as i64;

/// One import and how far it is.
struct Import<'a, Tell> {
    tokens: &'a Tokens,
    caller: &'a Caller,
    logto: &'a Logto,
    dry_run: bool,
    report: Report,
    connectors: Connectors,
    /// Users that stay behind, by Logto's id.
    missing: HashSet<String>,
    tell: Tell,
}

/// A batch that was rolled back, on purpose or not.
enum Undone {
    Rehearsed(Vec<Told>),
    Failed(DbError),
}

impl From<DbError> for Undone {
    fn from(error: DbError) -> Self {
        Self::Failed(error)
    }
}

impl Tokens {
    /// Imports everything but keys. `tell` hears how far it is after each page.
    ///
    /// # Errors
    /// [`ImportError`]; a row that cannot be taken over is none, but told in the report.
    pub async fn import_logto(
        &self,
        caller: &Caller,
        logto: &Logto,
        kek: Option<&Kek>,
        dry_run: bool,
        tell: impl Fn(&Report),
    ) -> Result<Report, ImportError> {
        for scope in [Scope::UsersAdmin, Scope::ConnectorsAdmin, Scope::TokenSetsAdmin] {
            caller.require(scope).map_err(TokensError::from)?;
        }
        let (total, sets) = logto.counts().await?;
        if kek.is_none() && sets > 0 {
            return Err(ImportError::NoKek(sets));
        }
        if let Some(kek) = kek {
            try_kek(logto, kek).await?;
        }
        let connectors = self.known_connectors(&caller.tenant).await?;
        let (report, missing) = (Report::of_rows(total), HashSet::new());
        let mut run = Import { tokens: self, caller, logto, dry_run, report, connectors, missing, tell };
        (run.tell)(&run.report);
        run.connectors(Family::Social).await?;
        run.connectors(Family::Sso).await?;
        run.users().await?;
        run.sets(kek).await?;
        Ok(run.report)
    }

    async fn known_connectors(&self, tenant: &TenantId) -> Result<Connectors, TokensError> {
        let tenant = tenant.clone();
        let read = move |conn: &mut Conn| {
            let mut found = connectors::list(conn, &tenant, Family::Social)?;
            found.extend(connectors::list(conn, &tenant, Family::Sso)?);
            Ok::<_, DbError>(found)
        };
        let found = self.parts().db.read(read).await?;
        Ok(found.into_iter().map(|connector| (connector.id.clone(), connector)).collect())
    }
}

/// Before anything is written. One that does not open is told with its id; if none does, it is another KEK.
async fn try_kek(logto: &Logto, kek: &Kek) -> Result<(), ImportError> {
    let mut first = logto.secrets("").await?;
    first.retain(|row| row.kind == plan::TOKEN_SET);
    let opens =
        |row: &SecretRow| kek.open(&row.encrypted_dek, &row.iv, &row.auth_tag, &row.ciphertext).is_ok();
    if first.is_empty() || first.iter().any(opens) { Ok(()) } else { Err(ImportError::WrongKek(first.len())) }
}

impl<Tell: Fn(&Report)> Import<'_, Tell> {
    async fn connectors(&mut self, family: Family) -> Result<(), ImportError> {
        let kind = if family == Family::Social { Kind::Connectors } else { Kind::SsoConnectors };
        let mut after = String::new();
        loop {
            let page = self.logto.connectors(family, &after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.id);
            let (mut sealed, mut told) = (Vec::new(), Vec::new());
            for row in page {
                let id = row.id.clone();
                match self.connector(row, family).await? {
                    Ok(ready) => sealed.push(ready),
                    Err(fate) => told.push(Told::new(kind, &id, fate)),
                }
            }
            let (tenant, batch) = (self.caller.tenant.clone(), sealed.clone());
            let told = self.batch(kind, told, move |conn| {
                batch.iter().map(|ready| write_connector(conn, &tenant, kind, ready)).collect()
            });
            let told = told.await?;
            let taken = |connector: &Connector| {
                told.iter().any(|told| told.id == connector.id.as_str() && told.fate == Fate::Imported)
            };
            let new = sealed.into_iter().map(|(connector, _)| connector).filter(taken);
            let new: Vec<_> = new.map(|connector| (connector.id.clone(), connector)).collect();
            self.connectors.extend(new);
            self.done(told);
        }
    }

    /// What is there already is not looked at closer: it may have been changed here.
    async fn connector(
        &self,
        row: rows::ConnectorRow,
        family: Family,
    ) -> Result<Result<(Connector, SealedRecord), Fate>, ImportError> {
        let (connector, config) = match plan::connector(row, family, self.tokens.now()) {
            Ok(planned) => planned,
            Err(skip) => return Ok(Err(skip.into())),
        };
        if self.connectors.contains_key(&connector.id) {
            return Ok(Err(Fate::Present));
        }
        match self.tokens.sealed(&self.caller.tenant, connector, &config, 1).await {
            Ok(ready) => Ok(Ok(ready)),
            Err(error @ (TokensError::Invalid { .. } | TokensError::NoTokenStorage)) => {
                Ok(Err(plan::refused(&error).into()))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn users(&mut self) -> Result<(), ImportError> {
        let mut after = String::new();
        loop {
            let (page, sso) = self.logto.users(&after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.id);
            let (mut people, mut told) = (Vec::new(), Vec::new());
            for row in page {
                let id = row.id.clone();
                match plan::person(row, &sso, &self.connectors, self.tokens.now()) {
                    Ok(person) => people.push(person),
                    Err(skip) => told.push(Told::new(Kind::Users, &id, skip)),
                }
            }
            let tenant = self.caller.tenant.clone();
            let told = self.batch(Kind::Users, told, move |conn| {
                let mut told = Vec::new();
                for person in people {
                    write_person(conn, &tenant, person, &mut told)?;
                }
                Ok(told)
            });
            let told = told.await?;
            let is_missing = |told: &&Told| told.kind == Kind::Users && matches!(told.fate, Fate::Skipped(_));
            self.missing.extend(told.iter().filter(is_missing).map(|told| told.id.clone()));
            self.done(told);
        }
    }

    async fn sets(&mut self, kek: Option<&Kek>) -> Result<(), ImportError> {
        let mut after = String::new();
        loop {
            let page = self.logto.secrets(&after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.id);
            let (ready, told) = self.sealed(page, kek).await?;
            let (tenant, is_rehearsal) = (self.caller.tenant.clone(), self.dry_run);
            let told = self.batch(Kind::TokenSets, told, move |conn| {
                ready.iter().map(|ready| write_set(conn, &tenant, ready, is_rehearsal)).collect()
            });
            let told = told.await?;
            self.done(told);
        }
    }

    /// Decrypts and seals what of a page is not there yet.
    async fn sealed(
        &self,
        page: Vec<SecretRow>,
        kek: Option<&Kek>,
    ) -> Result<(Vec<(Set, SealedRecord)>, Vec<Told>), ImportError> {
        let (tenant, ids) = (self.caller.tenant.clone(), page.iter().map(plan::set_id).collect::<Vec<_>>());
        let find = move |conn: &mut Conn| {
            let find = |id| Ok(sets::find_by_id(conn, &tenant, &id)?.map(|set| String::from(set.id)));
            ids.into_iter().flatten().map(find).filter_map(Result::transpose).collect::<Result<_, DbError>>()
        };
        let there: HashSet<String> = self.tokens.parts().db.read(find).await.map_err(TokensError::from)?;
        let (mut told, mut planned) = (Vec::new(), Vec::new());
        for row in page {
            let fate = match (plan::set_id(&row), kek) {
                (Err(skip), _) => skip.into(),
                (Ok(id), _) if there.contains(id.as_str()) => Fate::Present,
                // There was none when they were counted, and what is read is of one moment.
                (Ok(_), None) => Skip::loss("there is no KEK").into(),
                (Ok(_), Some(kek)) => match plan::set(&row, kek, &self.connectors, &self.missing) {
                    Ok(ready) => {
                        planned.push(ready);
                        continue;
                    }
                    Err(skip) => skip.into(),
                },
            };
            told.push(Told::new(Kind::TokenSets, &row.id, fate));
        }
        let (vault, tenant) = (&self.tokens.parts().vault, &self.caller.tenant);
        let seal = async |(set, payload): (Set, Zeroizing<Vec<u8>>)| {
            let place = sets::place(tenant, &set.user, &set.connection, set.version);
            let sealed = vault.seal_record(place, &payload).await;
            (set, sealed)
        };
        let (mut ready, mut sealing) = (Vec::new(), stream::iter(planned).map(seal).buffered(AT_ONCE));
        while let Some((set, sealed)) = sealing.next().await {
            match sealed {
                Ok(sealed) => ready.push((set, sealed)),
                Err(VaultError::TooLarge { .. }) => {
                    let skip = Skip::loss("it is larger than a value may be");
                    told.push(Told::new(Kind::TokenSets, set.id.as_str(), skip));
                }
                Err(error) => return Err(TokensError::from(error).into()),
            }
        }
        Ok((ready, told))
    }

    /// Writes a page in one transaction, between intent and outcome; or, in a dry run, not. `told` is what of the
    /// page needs no writing.
    async fn batch<F>(&self, kind: Kind, mut told: Vec<Told>, work: F) -> Result<Vec<Told>, TokensError>
    where
        F: FnOnce(&mut Conn) -> Result<Vec<Told>, DbError> + Send + 'static,
    {
        let (db, audit) = (&self.tokens.parts().db, &self.tokens.parts().audit);
        if self.dry_run {
            match db.write(move |conn| Err::<(), _>(Undone::Rehearsed(work(conn)?))).await {
                Ok(()) => {}
                Err(Undone::Rehearsed(rehearsed)) => told.extend(rehearsed),
                Err(Undone::Failed(error)) => return Err(error.into()),
            }
            return Ok(told);
        }
        let event = Event::new(Action::LogtoImport, "logto-tenant", self.logto.tenant.as_str())
            .detail("kind", kind.name());
        let written = audit.around(self.caller, event, async |note| {
            told.extend(db.write::<_, DbError, _>(work).await?);
            let count = |of: &[Kind], is: fn(&Fate) -> bool| {
                let counted = told.iter().filter(|told| of.contains(&told.kind) && is(&told.fate));
                counted.count().to_string()
            };
            note.add("kind", kind.name());
            note.add("imported", count(&[kind], |fate| *fate == Fate::Imported));
            note.add("present", count(&[kind], |fate| *fate == Fate::Present));
            note.add("skipped", count(&[kind], |fate| matches!(fate, Fate::Skipped(_))));
            if kind == Kind::Users {
                let both = [Kind::Identities, Kind::SsoIdentities];
                note.add("identities", count(&both, |fate| *fate == Fate::Imported));
            }
            Ok::<_, TokensError>(told)
        });
        written.await
    }

    fn done(&mut self, told: Vec<Told>) {
        self.report.add_all(told);
        (self.tell)(&self.report);
    }
}

fn write_connector(
    conn: &mut Conn,
    tenant: &TenantId,
    kind: Kind,
    (connector, sealed): &(Connector, SealedRecord),
) -> Result<Told, DbError> {
    let fate = if connectors::insert_missing(conn, tenant, connector, sealed)? {
        Fate::Imported
    } else if connectors::find(conn, tenant, &connector.id)?.is_some() {
        Fate::Present
    } else {
        Skip::loss("metadata.target: another connector has it").into()
    };
    Ok(Told::new(kind, connector.id.as_str(), fate))
}

fn write_person(
    conn: &mut Conn,
    tenant: &TenantId,
    person: Person,
    told: &mut Vec<Told>,
) -> Result<(), DbError> {
    let Person { account, identities, told: before } = person;
    let id = &account.user.id;
    let fate = if users::insert_missing(conn, tenant, &account)? {
        Fate::Imported
    } else if users::find(conn, tenant, id)?.is_some() {
        Fate::Present
    } else {
        let member = users::taken(conn, tenant, &account.user)?.unwrap_or("id");
        Skip::loss(format!("{member}: another user has it")).into()
    };
    told.extend(before);
    if account.password_hash.is_some() {
        let fate = match &fate {
            Fate::Skipped(_) => Skip::loss(plan::NO_USER).into(),
            fate => fate.clone(),
        };
        told.push(Told::new(Kind::Passwords, id.as_str(), fate));
    }
    for identity in identities {
        let (kind, label) = match identity.family {
            Family::Social => (Kind::Identities, format!("{id}/{}", identity.target)),
            Family::Sso => (Kind::SsoIdentities, identity.id.as_str().to_owned()),
        };
        let fate = match &fate {
            Fate::Skipped(_) => Skip::loss(plan::NO_USER).into(),
            _ => write_identity(conn, tenant, &identity)?,
        };
        told.push(Told::new(kind, &label, fate));
    }
    told.push(Told::new(Kind::Users, id.as_str(), fate));
    Ok(())
}

fn write_identity(conn: &mut Conn, tenant: &TenantId, identity: &Identity) -> Result<Fate, DbError> {
    if users::insert_missing_identity(conn, tenant, identity)? {
        return Ok(Fate::Imported);
    }
    Ok(match users::identity(conn, tenant, &identity.user, &identity.connection())? {
        Some(there) if there.identity_id == identity.identity_id => Fate::Present,
        Some(_) => Skip::loss("its user has another account of that connection").into(),
        None => Skip::loss("another user has the account").into(),
    })
}

/// In a rehearsal the users that come with it are not there; their identities were looked at in Logto.
fn write_set(
    conn: &mut Conn,
    tenant: &TenantId,
    (set, sealed): &(Set, SealedRecord),
    is_rehearsal: bool,
) -> Result<Told, DbError> {
    let told = |fate| Ok(Told::new(Kind::TokenSets, set.id.as_str(), fate));
    let identity = users::identity(conn, tenant, &set.user, &set.connection)?;
    let is_linked = match identity {
        Some(identity) => identity.identity_id == set.identity_id,
        None => is_rehearsal,
    };
    if !is_linked {
        return told(Skip::loss(plan::NOT_LINKED).into());
    }
    if sets::put(conn, tenant, set, sealed, None)? {
        return told(Fate::Imported);
    }
    match sets::find_by_id(conn, tenant, &set.id)? {
        Some(_) => told(Fate::Present),
        None => told(Skip::loss("there is another token set of that connection").into()),
    }
}
