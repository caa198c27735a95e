//! Who is calling, for which tenant, with which rights.
//!
//! A [`Caller`] is made by the HTTP extractor after authentication, or by the daemon for its own
//! background work; a service that takes `&Caller` cannot be reached without one. The tenant comes
//! from here and never from a path, a query or a body.

use std::fmt;

use crate::ids::{ClientId, RequestId, TenantId, UserId};

/// One right. Metadata and values are separate on purpose: an administrator sees that a secret
/// exists without being able to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// List secrets and read their metadata.
    SecretsMetadata,
    /// Read secret values.
    SecretsRead,
    /// Create, replace and delete secrets.
    SecretsWrite,
    /// Seal, open and make data keys for ciphertext that the caller keeps.
    CryptoUse,
    /// See, rotate and rewrap key-encryption keys; see and cancel jobs.
    KeysAdmin,
    /// Read the audit log.
    AuditRead,
    /// Create, list and delete applications.
    AppsAdmin,
    /// See, rotate, cancel, revert, delete and import signing and cookie keys, and set their policy.
    SigningKeysAdmin,
    /// Revoke a signing or cookie key at once, with every token that it signed.
    SigningKeysRevoke,
    /// Have tokens signed, within the application's signing policy.
    TokensSign,
    /// Have cookies signed and verified, within the application's signing policy.
    CookiesSign,
    /// Create, see, search, change and delete users and their identities.
    UsersAdmin,
    /// Create, see, change and delete connectors, and the account center's settings.
    ConnectorsAdmin,
    /// See the metadata of token sets, and delete them.
    TokenSetsAdmin,
    /// Read any user's third-party access tokens, without the user.
    TokenSetsRead,
    /// Trade a user's own token for the user's third-party access tokens.
    TokenSetsExchange,
    /// Have subject tokens made, which stand for a user.
    UsersImpersonate,
}

impl Scope {
    /// Every scope, in the order of the documentation.
    pub const ALL: [Self; 17] = [
        Self::SecretsMetadata,
        Self::SecretsRead,
        Self::SecretsWrite,
        Self::CryptoUse,
        Self::KeysAdmin,
        Self::AuditRead,
        Self::AppsAdmin,
        Self::SigningKeysAdmin,
        Self::SigningKeysRevoke,
        Self::TokensSign,
        Self::CookiesSign,
        Self::UsersAdmin,
        Self::ConnectorsAdmin,
        Self::TokenSetsAdmin,
        Self::TokenSetsRead,
        Self::TokenSetsExchange,
        Self::UsersImpersonate,
    ];

    /// The scope's token in OAuth (RFC 6749, section 3.3).
    pub const fn name(self) -> &'static str {
        match self {
            Self::SecretsMetadata => "secrets:metadata",
            Self::SecretsRead => "secrets:read",
            Self::SecretsWrite => "secrets:write",
            Self::CryptoUse => "crypto:use",
            Self::KeysAdmin => "keys:admin",
            Self::AuditRead => "audit:read",
            Self::AppsAdmin => "apps:admin",
            Self::SigningKeysAdmin => "signing-keys:admin",
            Self::SigningKeysRevoke => "signing-keys:revoke",
            Self::TokensSign => "tokens:sign",
            Self::CookiesSign => "cookies:sign",
            Self::UsersAdmin => "users:admin",
            Self::ConnectorsAdmin => "connectors:admin",
            Self::TokenSetsAdmin => "token-sets:admin",
            Self::TokenSetsRead => "token-sets:read",
            Self::TokenSetsExchange => "token-sets:exchange",
            Self::UsersImpersonate => "users:impersonate",
        }
    }

    /// The scope of that name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// A set of scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScopeSet(u32);

impl ScopeSet {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Every scope there is.
    pub fn all() -> Self {
        Scope::ALL.into_iter().collect()
    }

    /// Whether `scope` is in the set.
    pub const fn contains(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }

    /// Whether every scope of `other` is in the set.
    pub const fn contains_all(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The members, in the order of [`Scope::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }

    /// Reads a space-separated list (RFC 6749, section 3.3); `None` names an unknown scope.
    pub fn parse(text: &str) -> Option<Self> {
        text.split_ascii_whitespace().map(Scope::parse).collect()
    }
}

impl FromIterator<Scope> for ScopeSet {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | scope.bit()))
    }
}

impl fmt::Display for ScopeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(Scope::name).collect();
        f.write_str(&names.join(" "))
    }
}

/// Who acts: the audit log's `actor`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Principal {
    /// A machine application, authenticated by a token of Lacre's issuer.
    Application(ClientId),
    /// A person, by an opaque token that an application obtained.
    User(UserId, ClientId),
    /// A local process, authenticated by the Unix socket's peer credentials.
    LocalUser(u32),
    /// A service, authenticated by its TLS client certificate (the name its rule gives it).
    Certificate(String),
    /// The daemon itself: start, background jobs, command line on the daemon's host.
    System(&'static str),
    /// Nobody yet: a failed or pending authentication.
    Anonymous,
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Application(id) => write!(f, "app:{id}"),
            Self::User(user, client) => write!(f, "user:{user}@{client}"),
            Self::LocalUser(uid) => write!(f, "uid:{uid}"),
            Self::Certificate(name) => write!(f, "cert:{name}"),
            Self::System(part) => write!(f, "system:{part}"),
            Self::Anonymous => f.write_str("anonymous"),
        }
    }
}

/// The caller does not hold the right that the operation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the scope `{}` is needed", .0.name())]
pub struct MissingScope(pub Scope);

/// An authenticated caller and the request it makes.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who acts.
    pub principal: Principal,
    /// For which tenant; every row a service touches is of this tenant.
    pub tenant: TenantId,
    /// With which rights.
    pub scopes: ScopeSet,
    /// In which request.
    pub request: RequestId,
}

impl Caller {
    /// The daemon's own work for a tenant.
    pub fn system(part: &'static str, tenant: TenantId) -> Self {
        Self {
            principal: Principal::System(part),
            tenant,
            scopes: ScopeSet::all(),
            request: RequestId::generate(),
        }
    }

    /// # Errors
    /// [`MissingScope`] if the caller does not hold `scope`.
    pub fn require(&self, scope: Scope) -> Result<(), MissingScope> {
        if self.scopes.contains(scope) { Ok(()) } else { Err(MissingScope(scope)) }
    }
}

/// What a person's token is good for, at the Account API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UserScope {
    /// Every call needs it (OpenID Connect Core, section 3.1.2.1).
    OpenId,
    /// The person's name and picture.
    Profile,
    /// Identities at other providers and their tokens.
    Identities,
}

impl UserScope {
    const ALL: [Self; 3] = [Self::OpenId, Self::Profile, Self::Identities];

    /// The scope's token in OAuth.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OpenId => "openid",
            Self::Profile => "profile",
            Self::Identities => "identities",
        }
    }
}

/// A set of user scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserScopes(u32);

impl UserScopes {
    /// Whether `scope` is in the set.
    pub const fn contains(self, scope: UserScope) -> bool {
        self.0 & (1 << scope as u32) != 0
    }

    /// Reads a space-separated list; what is not known is left out, as OpenID Connect has it.
    pub fn parse(text: &str) -> Self {
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        let known = UserScope::ALL.into_iter().filter(|scope| words.contains(&scope.name()));
        Self(known.fold(0, |set, scope| set | 1 << scope as u32))
    }
}

impl fmt::Display for UserScopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            UserScope::ALL.into_iter().filter(|scope| self.contains(*scope)).map(UserScope::name).collect();
        f.write_str(&names.join(" "))
    }
}

/// A person, authenticated by an opaque token, and the request.
#[derive(Clone, Debug)]
pub struct UserCaller {
    /// The person as a principal, without any right of a machine.
    pub caller: Caller,
    /// Who.
    pub user: UserId,
    /// Through which application.
    pub client: ClientId,
    /// What the token is good for.
    pub scopes: UserScopes,
}
