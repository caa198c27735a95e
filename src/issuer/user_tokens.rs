//! Opaque tokens that stand for a person: `sub_...`, to be exchanged once, and `lut_...`, an access token.
//!
//! Both are 256 random bits, kept as SHA-256. A MAC by a device key covers the whole row, so that who writes the
//! database can neither make a token nor let one stand for another person, application or scope. An access
//! token is worth something while it has not expired, its application is there and its user is active; all
//! three are asked at every use, only the MAC is remembered. Exchanging is in `exchange.rs`.

use std::time::Duration;

use moka::sync::Cache;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::audit::{Action, Event, Outcome};
use crate::clock::Timestamp;
use crate::db::DbError;
use crate::identity::{Caller, MissingScope, Principal, Scope, ScopeSet, UserCaller, UserScopes};
use crate::ids::{ClientId, RequestId, TenantId, UserId, generate_token};
use crate::issuer::store::user_tokens as store;
use crate::issuer::{BearerError, Issuer, IssuerError, SubjectToken};

/// Logto's.
const SUBJECT_LIFETIME: Duration = Duration::from_secs(600);
/// How long a checked MAC is remembered.
const PROOF_TTL: Duration = Duration::from_mins(1);
/// How long a user's suspension or deletion may take to reach a token that is in use.
const ACTIVE_TTL: Duration = Duration::from_secs(2);
const ENTRIES: u64 = 10_000;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Access,
    Subject,
}

impl Kind {
    /// The name in the database.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Subject => "subject",
        }
    }

    const fn prefix(self) -> &'static str {
        match self {
            Self::Access => "lut_",
            Self::Subject => "sub_",
        }
    }

    /// The hash of a token of this kind; `None` for what cannot be one, such as a JWT.
    pub(super) fn hash(self, token: &str) -> Option<[u8; 32]> {
        let random = token.strip_prefix(self.prefix())?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        (random.len() == 43 && random.bytes().all(allowed)).then(|| Sha256::digest(token).into())
    }
}

/// A row as it is stored: nothing of it is true before its MAC was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) hash: [u8; 32],
    pub(super) kind: Kind,
    pub(super) user: String,
    /// Of access tokens only.
    pub(super) client: Option<String>,
    pub(super) scopes: String,
    /// Microseconds since the epoch.
    pub(super) expires_at: i64,
    pub(super) mac: Vec<u8>,
}

impl Row {
    /// What the MAC covers beside the tenant. No client's id is empty, so none is not like any.
    fn parts<'a>(&'a self, expires_at: &'a [u8; 8]) -> [&'a [u8]; 6] {
        let client = self.client.as_deref().unwrap_or("");
        let texts = [self.user.as_bytes(), client.as_bytes(), self.scopes.as_bytes()];
        let [user, client, scopes] = texts;
        [&self.hash, self.kind.name().as_bytes(), user, client, scopes, expires_at]
    }

    /// Reads a row whose MAC was checked; `None` if this program cannot have written it.
    fn standing(&self) -> Option<Standing> {
        let client = match (self.kind, &self.client) {
            (Kind::Access, Some(client)) => Some(ClientId::parse(client).ok()?),
            (Kind::Subject, None) => None,
            _ => return None,
        };
        Some(Standing {
            user: UserId::parse(&self.user).ok()?,
            client,
            scopes: UserScopes::parse(&self.scopes),
            expires: Timestamp::from_micros(self.expires_at),
        })
    }
}

/// What a token stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) user: UserId,
    /// Of access tokens only.
    pub(super) client: Option<ClientId>,
    pub(super) scopes: UserScopes,
    expires: Timestamp,
}

impl Standing {
    fn is_expired(&self, now: Timestamp) -> bool {
        self.expires <= now
    }
}

/// What a token is to stand for.
pub(super) struct Mold<'a> {
    pub(super) user: &'a UserId,
    /// Whose access token it is; without one it is a subject token.
    pub(super) client: Option<&'a ClientId>,
    pub(super) scopes: UserScopes,
    pub(super) lifetime: Duration,
}

impl<'a> Mold<'a> {
    fn subject(user: &'a UserId) -> Self {
        Self { user, client: None, scopes: UserScopes::default(), lifetime: SUBJECT_LIFETIME }
    }
}

/// A token that was just made, and the row to be stored for it.
pub(super) struct Minted {
    pub(super) token: SecretString,
    pub(super) row: Row,
}

/// What is remembered of tokens, by their hashes.
pub(super) struct UserTokens {
    proven: Cache<[u8; 32], Standing>,
    /// Rows that were altered: one incident a minute is enough.
    broken: Cache<[u8; 32], ()>,
    active: Cache<UserId, bool>,
}

impl UserTokens {
    pub(super) fn new() -> Self {
        Self {
            proven: Cache::builder().max_capacity(ENTRIES).time_to_live(PROOF_TTL).build(),
            broken: Cache::builder().max_capacity(ENTRIES).time_to_live(PROOF_TTL).build(),
            active: Cache::builder().max_capacity(ENTRIES).time_to_live(ACTIVE_TTL).build(),
        }
    }
}

impl Issuer {
    /// Makes a token that stands for a user and can be exchanged once, within ten minutes.
    ///
    /// # Errors
    /// [`IssuerError::NoSuchUser`], also for a suspended one; [`IssuerError::Forbidden`].
    pub async fn issue_subject_token(
        &self,
        caller: &Caller,
        user: &UserId,
    ) -> Result<SubjectToken, IssuerError> {
        let event = Event::new(Action::SubjectTokenIssue, "user", user.as_str());
        if let Err(missing @ MissingScope(scope)) = caller.require(Scope::UsersImpersonate) {
            let event = event.detail("missing", scope.name());
            self.inner.audit.record_soon(caller, event, Outcome::Denied("forbidden"));
            return Err(missing.into());
        }
        let minted = self.inner.audit.around(caller, event, async |note| {
            if !self.inner.tokens.is_active_user(&caller.tenant, user).await? {
                return Err(IssuerError::NoSuchUser);
            }
            let minted = self.mint(&caller.tenant, Mold::subject(user)).await?;
            note.add("token", told(&minted.row.hash));
            let (tenant, row) = (caller.tenant.clone(), minted.row.clone());
            self.inner.db.write(move |conn| store::insert(conn, &tenant, &row)).await?;
            Ok::<_, IssuerError>(minted)
        });
        Ok(SubjectToken { token: minted.await?.token, expires_in: SUBJECT_LIFETIME.as_secs() })
    }

    /// Checks a person's opaque access token and says who it is. A JWT is never one.
    ///
    /// # Errors
    /// [`BearerError::Invalid`] for a bad token, [`BearerError::Unavailable`] if that cannot be told.
    pub async fn authenticate_user(
        &self,
        bearer: &str,
        request: RequestId,
    ) -> Result<UserCaller, BearerError> {
        let hash = Kind::Access.hash(bearer).ok_or(BearerError::Invalid("not a user's token"))?;
        let standing = match self.inner.users.proven.get(&hash) {
            Some(known) => known,
            None => {
                let (standing, _) = self.prove(Kind::Access, hash, &request).await?;
                self.inner.users.proven.insert(hash, standing.clone());
                standing
            }
        };
        if standing.is_expired(self.inner.clock.now()) {
            return Err(BearerError::Invalid("expired"));
        }
        let Standing { user, client: Some(client), scopes, .. } = standing else {
            return Err(BearerError::Invalid("no application"));
        };
        let app = self.inner.clients.find(&self.inner.config.tenant, &client).await;
        let app = app.map_err(|error| BearerError::Unavailable(error.into()))?;
        app.ok_or(BearerError::Invalid("the application is gone"))?;
        if !self.is_active(&user).await.map_err(BearerError::Unavailable)? {
            return Err(BearerError::Invalid("the user is gone or suspended"));
        }
        let principal = Principal::User(user.clone(), client.clone());
        let caller = self.caller(principal, ScopeSet::NONE, request);
        Ok(UserCaller { caller, user, client, scopes })
    }

    /// Removes expired tokens; how many. They are worth nothing before, too.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn purge_user_tokens(&self) -> Result<usize, IssuerError> {
        let now = self.inner.clock.now();
        Ok(self.inner.db.write::<_, DbError, _>(move |conn| store::purge(conn, now)).await?)
    }

    /// Removes all tokens of a user; how many. Nobody has to: those of a user who is gone are refused.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn forget_user(&self, user: &UserId) -> Result<usize, IssuerError> {
        let (tenant, wanted) = (self.inner.config.tenant.clone(), user.clone());
        let forget = move |conn: &mut _| store::forget(conn, &tenant, &wanted);
        let gone = self.inner.db.write::<_, DbError, _>(forget).await?;
        let users = &self.inner.users;
        users.active.invalidate(user);
        let theirs = users.proven.iter().filter(|(_, standing)| standing.user == *user);
        theirs.for_each(|(hash, _)| users.proven.invalidate(&*hash));
        Ok(gone)
    }

    /// Makes a token; stores nothing.
    pub(super) async fn mint(&self, tenant: &TenantId, wanted: Mold<'_>) -> Result<Minted, IssuerError> {
        let kind = if wanted.client.is_some() { Kind::Access } else { Kind::Subject };
        // Without randomness nothing can be made now, as without storage.
        let token = generate_token(kind.prefix()).map_err(|_| DbError::Unavailable(None))?;
        let mut row = Row {
            hash: Sha256::digest(token.expose_secret()).into(),
            kind,
            user: wanted.user.to_string(),
            client: wanted.client.map(ClientId::to_string),
            scopes: wanted.scopes.to_string(),
            expires_at: self.inner.clock.now().plus(wanted.lifetime).as_micros(),
            mac: Vec::new(),
        };
        row.mac = self.mac(tenant, &row).await?.to_vec();
        Ok(Minted { token, row })
    }

    /// Finds a subject token that may be used up now, and whom it stands for.
    pub(super) async fn subject(
        &self,
        token: &str,
        request: &RequestId,
    ) -> Result<(Standing, Row), BearerError> {
        let hash = Kind::Subject.hash(token).ok_or(BearerError::Invalid("not a subject token"))?;
        let (standing, row) = self.prove(Kind::Subject, hash, request).await?;
        if standing.is_expired(self.inner.clock.now()) {
            return Err(BearerError::Invalid("expired"));
        }
        let active = self.inner.tokens.is_active_user(&self.inner.config.tenant, &standing.user).await;
        match active.map_err(|error| BearerError::Unavailable(error.into()))? {
            true => Ok((standing, row)),
            false => Err(BearerError::Invalid("the user is gone or suspended")),
        }
    }

    /// Reads a row and checks its MAC.
    async fn prove(
        &self,
        kind: Kind,
        hash: [u8; 32],
        request: &RequestId,
    ) -> Result<(Standing, Row), BearerError> {
        if self.inner.users.broken.contains_key(&hash) {
            return Err(BearerError::Invalid("altered"));
        }
        let tenant = self.inner.config.tenant.clone();
        let found = self.inner.db.read(move |conn| store::find(conn, &tenant, kind, &hash)).await;
        let found = found.map_err(|error: DbError| BearerError::Unavailable(error.into()))?;
        let row = found.ok_or(BearerError::Invalid("unknown"))?;
        let mac = self.mac(&self.inner.config.tenant, &row).await.map_err(BearerError::Unavailable)?;
        if bool::from(mac[..].ct_eq(&row.mac))
            && let Some(standing) = row.standing()
        {
            return Ok((standing, row));
        }
        self.record_altered(&row, request).await;
        Err(BearerError::Invalid("altered"))
    }

    async fn mac(&self, tenant: &TenantId, row: &Row) -> Result<[u8; 32], IssuerError> {
        let expires_at = row.expires_at.to_be_bytes();
        Ok(self.inner.keys.mac_user_token(tenant, &row.parts(&expires_at)).await?)
    }

    async fn record_altered(&self, row: &Row, request: &RequestId) {
        self.inner.users.broken.insert(row.hash, ());
        let (kind, hash) = (row.kind.name(), hex::encode(row.hash));
        tracing::error!(kind, hash, "the stored row of a user's token fails its integrity check");
        let event = Event::new(Action::IntegrityIncident, "user-token", hash).detail("kind", kind);
        let nobody = self.caller(Principal::Anonymous, ScopeSet::NONE, request.clone());
        // The token is refused in any case; a log that takes nothing now must not hide that.
        if self.inner.audit.record(&nobody, event, Outcome::Failure("integrity")).await.is_err() {
            tracing::error!("the integrity incident could not be recorded");
        }
    }

    async fn is_active(&self, user: &UserId) -> Result<bool, IssuerError> {
        if let Some(known) = self.inner.users.active.get(user) {
            return Ok(known);
        }
        let active = self.inner.tokens.is_active_user(&self.inner.config.tenant, user).await?;
        self.inner.users.active.insert(user.clone(), active);
        Ok(active)
    }
}

/// How the audit log names a token: enough to find it again, and no help in guessing it.
pub(super) fn told(hash: &[u8; 32]) -> String {
    hex::encode(&hash[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: Kind, client: Option<&str>) -> Row {
        Row {
            hash: [1; 32],
            kind,
            user: "user00000001".to_owned(),
            client: client.map(str::to_owned),
            scopes: "openid identities".to_owned(),
            expires_at: 1_000_000,
            mac: Vec::new(),
        }
    }

    #[test]
    fn only_text_of_the_form_of_a_token_is_looked_up() {
        let random = "A".repeat(43);
        let good = format!("lut_{random}");
        assert_eq!(Kind::Access.hash(&good), Some(Sha256::digest(&good).into()));
        assert!(Kind::Subject.hash(&format!("sub_{random}")).is_some());
        for bad in [
            "",
            "lut_",
            &format!("sub_{random}"),
            &format!("LUT_{random}"),
            &format!("lut_{random}A"),
            &format!("lut_{}", &random[1..]),
            &format!("lut_{}=", &random[1..]),
            &format!("lut_{}é", &random[2..]),
            &format!(" {good}"),
            "eyJhbGciOiJFUzI1NiJ9.e30.AAAA",
        ] {
            assert_eq!(Kind::Access.hash(bad), None, "{bad}");
        }
    }

    #[test]
    fn generated_tokens_are_of_their_kind_and_of_no_other() {
        for (kind, other) in [(Kind::Access, Kind::Subject), (Kind::Subject, Kind::Access)] {
            let token = generate_token(kind.prefix()).unwrap();
            assert!(kind.hash(token.expose_secret()).is_some());
            assert!(other.hash(token.expose_secret()).is_none());
        }
    }

    #[test]
    fn the_mac_covers_every_column() {
        let good = row(Kind::Access, Some("app"));
        let covered = |row: &Row| row.parts(&row.expires_at.to_be_bytes()).map(<[u8]>::to_vec).to_vec();
        let text = str::to_owned;
        for changed in [
            Row { hash: [2; 32], ..good.clone() },
            Row { kind: Kind::Subject, ..good.clone() },
            Row { user: text("user00000002"), ..good.clone() },
            Row { client: Some(text("other")), ..good.clone() },
            Row { client: None, ..good.clone() },
            Row { scopes: text("openid"), ..good.clone() },
            Row { expires_at: 1_000_001, ..good.clone() },
        ] {
            assert_ne!(covered(&changed), covered(&good), "{changed:?}");
        }
    }

    #[test]
    fn an_access_token_has_an_application_and_a_subject_token_has_none() {
        for (kind, client, is_good) in [
            (Kind::Access, Some("app"), true),
            (Kind::Access, None, false),
            (Kind::Access, Some(""), false),
            (Kind::Subject, None, true),
            (Kind::Subject, Some("app"), false),
        ] {
            assert_eq!(row(kind, client).standing().is_some(), is_good, "{kind:?} {client:?}");
        }
    }

    #[test]
    fn a_token_is_dead_in_the_moment_in_which_it_expires() {
        let standing = row(Kind::Subject, None).standing().unwrap();
        assert!(!standing.is_expired(Timestamp::from_micros(999_999)));
        assert!(standing.is_expired(Timestamp::from_micros(1_000_000)));
    }
}
