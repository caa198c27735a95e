//! What is sent to a provider, and where to.
//!
//! Addresses that a provider has built in give way to those of the configuration, for servers of one's own.
//! The client's own credentials are not among the parameters here: they depend on
//! [`AuthMethod`](crate::tokens::providers::AuthMethod), and whoever posts adds them.

use secrecy::SecretString;
use url::form_urlencoded;

use crate::tokens::providers::reader::{bad, check_url, is_scope, is_text, no_reserved_query};
use crate::tokens::providers::{BadConfig, Factory, ProfileSource, Provider, Settings};

/// What enterprise SSO always asks for.
const SSO_SCOPES: [&str; 3] = ["openid", "profile", "email"];

/// Where users are sent, and what the server says of itself there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoints<'a> {
    /// The authorization endpoint.
    pub authorization: &'a str,
    /// Whether it lists S256 in `code_challenge_methods_supported`. Unknown counts as yes.
    pub supports_pkce: bool,
    /// Whether it promises `iss` in its answers (RFC 9207).
    pub promises_iss: bool,
}

/// One user's way to the provider.
#[derive(Clone, Copy, Debug)]
pub struct AuthorizationRequest<'a> {
    /// Of the configuration, or discovered.
    pub authorization_endpoint: &'a str,
    /// What comes back with the code.
    pub state: &'a str,
    /// Where the code goes.
    pub redirect_uri: &'a str,
    /// Replaces the configured scope.
    pub scope: Option<&'a str>,
    /// For the ID token.
    pub nonce: Option<&'a str>,
    /// SHA-256 of the verifier in base64url (RFC 7636).
    pub code_challenge: Option<&'a str>,
}

struct BuiltIn {
    authorization: &'static str,
    token: &'static str,
    userinfo: &'static str,
    revocation: Option<&'static str>,
    scope: &'static str,
}

const GITHUB: BuiltIn = BuiltIn {
    authorization: "https://github.com/login/oauth/authorize",
    token: "https://github.com/login/oauth/access_token",
    userinfo: "https://api.github.com/user",
    // GitHub revokes by a DELETE with Basic, which RFC 7009 does not know.
    revocation: None,
    scope: "read:user user:email",
};
const GOOGLE: BuiltIn = BuiltIn {
    authorization: "https://accounts.google.com/o/oauth2/v2/auth",
    token: "https://oauth2.googleapis.com/token",
    userinfo: "https://openidconnect.googleapis.com/v1/userinfo",
    revocation: Some("https://oauth2.googleapis.com/revoke"),
    scope: "openid profile email",
};
const FACEBOOK: BuiltIn = BuiltIn {
    authorization: "https://www.facebook.com/v13.0/dialog/oauth",
    token: "https://graph.facebook.com/v13.0/oauth/access_token",
    userinfo: "https://graph.facebook.com/v13.0/me?fields=id,name,email,picture",
    revocation: None,
    scope: "email public_profile",
};

const fn built_in(provider: Provider) -> Option<&'static BuiltIn> {
    match provider {
        Provider::Github => Some(&GITHUB),
        Provider::Google => Some(&GOOGLE),
        Provider::Facebook => Some(&FACEBOOK),
        _ => None,
    }
}

impl Endpoints<'_> {
    /// Whether an answer that names `found` as its issuer is from `expected`: an answer of another server is a
    /// mix-up, and so is none where one was promised (RFC 9207, section 2.4).
    pub fn accepts_iss(&self, expected: Option<&str>, found: Option<&str>) -> bool {
        match (found, expected) {
            (None, _) => !self.promises_iss,
            (Some(found), Some(expected)) => found == expected,
            (Some(_), None) => true,
        }
    }
}

impl Settings {
    /// Where users are sent, if that need not be discovered.
    pub fn endpoints(&self, factory: &Factory) -> Option<Endpoints<'_>> {
        let built_in = built_in(factory.provider).map(|built_in| built_in.authorization);
        let authorization = self.authorization_endpoint.as_deref().or(built_in)?;
        Some(Endpoints { authorization, supports_pkce: true, promises_iss: false })
    }

    /// Where codes and refresh tokens are turned in; `None`: to be discovered.
    pub fn token_endpoint(&self, factory: &Factory) -> Option<&str> {
        self.token_endpoint.as_deref().or(built_in(factory.provider).map(|built_in| built_in.token))
    }

    /// Where a token is revoked (RFC 7009); `None`: nowhere, or to be discovered.
    pub fn revocation_endpoint(&self, factory: &Factory) -> Option<&str> {
        let built_in = built_in(factory.provider).and_then(|built_in| built_in.revocation);
        // A server of one's own has no part of the provider's: a token must not go from one to the other.
        let built_in = built_in.filter(|_| self.token_endpoint.is_none());
        self.revocation_endpoint.as_deref().or(built_in)
    }

    /// The issuer to discover and to expect.
    pub fn issuer(&self, factory: &Factory) -> Option<&str> {
        let workspace = factory.provider == Provider::SsoGoogleWorkspace;
        self.issuer.as_deref().or(workspace.then_some("https://accounts.google.com"))
    }

    /// Where the profile comes from; `None` for factories that are known by name only.
    pub fn profile_source(&self, factory: &Factory) -> Option<ProfileSource<'_>> {
        let userinfo = self.userinfo_endpoint.as_deref();
        match factory.provider {
            Provider::Oidc => Some(match userinfo {
                Some(url) => ProfileSource::IdTokenAndUserInfo(Some(url)),
                None => ProfileSource::IdToken,
            }),
            provider if provider.is_sso_oidc() => Some(ProfileSource::IdTokenAndUserInfo(None)),
            provider => {
                let built_in = built_in(provider).map(|built_in| built_in.userinfo);
                userinfo.or(built_in).map(ProfileSource::UserInfo)
            }
        }
    }

    /// Whether the request has a nonce, and the ID token must repeat it.
    pub fn needs_nonce(&self, factory: &Factory) -> bool {
        factory.provider == Provider::Oidc || factory.provider.is_sso_oidc()
    }

    /// Whether the request has a code challenge.
    pub fn wants_pkce(&self, factory: &Factory, endpoints: &Endpoints<'_>) -> bool {
        // Entra knows PKCE and does not say so in its metadata.
        self.uses_pkce && (endpoints.supports_pkce || factory.provider == Provider::SsoEntra)
    }

    /// The scope of the next request; `custom` replaces the configured one.
    pub fn scope_to_ask(&self, factory: &Factory, custom: Option<&str>) -> Option<String> {
        let given = |text: &&str| !text.trim().is_empty();
        let asked = custom.filter(given).or(self.scope.as_deref().filter(given)).map(str::trim);
        if factory.provider.is_sso_oidc() {
            return Some(with_scopes(&SSO_SCOPES, asked.unwrap_or_default().split(' ')));
        }
        match (factory.provider, asked) {
            (Provider::Oidc, Some(asked)) if asked.split(' ').any(|scope| scope == "openid") => {
                Some(asked.to_owned())
            }
            (Provider::Oidc, asked) => {
                let asked: Vec<_> = asked.unwrap_or_default().split(' ').collect();
                Some(with_scopes(&asked, ["openid"].into_iter()))
            }
            (_, Some(asked)) => Some(asked.to_owned()),
            (provider, None) => built_in(provider).map(|built_in| built_in.scope.to_owned()),
        }
    }

    /// The address to send the user to.
    ///
    /// # Errors
    /// [`BadConfig`] names what in the request, or in a discovered endpoint, breaks a rule.
    pub fn authorization_uri(
        &self,
        factory: &Factory,
        request: &AuthorizationRequest<'_>,
    ) -> Result<String, BadConfig> {
        let endpoint = request.authorization_endpoint;
        check_url("authorizationEndpoint", endpoint)?;
        no_reserved_query("authorizationEndpoint", endpoint)?;
        for (member, text) in [("state", request.state), ("redirectUri", request.redirect_uri)] {
            if !is_text(text) {
                return Err(bad(member, "must be a text of 1 to 2048 characters without control characters"));
            }
        }
        if request.scope.is_some_and(|scope| !scope.is_empty() && !is_scope(scope)) {
            return Err(bad("scope", "must be printable ASCII without quotes and backslashes"));
        }
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("response_type", "code").append_pair("client_id", &self.client_id);
        if let Some(scope) = self.scope_to_ask(factory, request.scope) {
            query.append_pair("scope", &scope);
        }
        query.append_pair("redirect_uri", request.redirect_uri).append_pair("state", request.state);
        if let Some(nonce) = request.nonce {
            query.append_pair("nonce", nonce);
        }
        if let Some(challenge) = request.code_challenge {
            query.append_pair("code_challenge", challenge).append_pair("code_challenge_method", "S256");
        }
        query.extend_pairs(&self.authorization_extra);
        let joint = match endpoint.split_once('?') {
            None => "?",
            Some((_, there)) if there.is_empty() || there.ends_with('&') => "",
            Some(_) => "&",
        };
        Ok(format!("{endpoint}{joint}{}", query.finish()))
    }

    /// The parameters that turn in a code; so far they are the same for every factory.
    pub fn code_exchange(
        &self,
        _factory: &Factory,
        code: &str,
        redirect_uri: &str,
        verifier: Option<&SecretString>,
    ) -> Vec<(String, SecretString)> {
        let mut form = vec![
            parameter("grant_type", "authorization_code"),
            parameter("code", code),
            parameter("redirect_uri", redirect_uri),
        ];
        form.extend(verifier.map(|verifier| ("code_verifier".to_owned(), verifier.clone())));
        form.extend(self.extra.iter().map(|(name, value)| parameter(name, value)));
        form
    }

    /// The parameters that turn in a refresh token; `None`: the provider has none.
    pub fn refresh(
        &self,
        factory: &Factory,
        refresh_token: &SecretString,
    ) -> Option<Vec<(String, SecretString)>> {
        if matches!(factory.provider, Provider::Facebook | Provider::SsoSaml | Provider::Other) {
            return None;
        }
        let mut form = vec![
            parameter("grant_type", "refresh_token"),
            ("refresh_token".to_owned(), refresh_token.clone()),
        ];
        // Entra answers with tokens for its default resource, or not at all, unless told again. Elsewhere a
        // scope could only shrink what was granted (RFC 6749, section 6).
        if factory.provider == Provider::SsoEntra {
            form.extend(self.scope_to_ask(factory, None).map(|scope| parameter("scope", &scope)));
        }
        form.extend(self.extra.iter().map(|(name, value)| parameter(name, value)));
        Some(form)
    }

    /// What the token endpoint's answer must have besides `access_token`.
    pub fn must_have(&self, factory: &Factory) -> &'static [&'static str] {
        match factory.provider {
            Provider::Github => &["scope", "token_type"],
            Provider::OAuth2 => &["token_type"],
            Provider::Facebook => &["expires_in"],
            _ => &[],
        }
    }

    /// Seconds to wait for an answer, where that is known better than the general rule.
    pub fn timeout(factory: &Factory) -> Option<u64> {
        (factory.provider == Provider::Github).then_some(5)
    }
}

/// The URL parameters, for a GET of the token endpoint, by which Facebook swaps the token of a code, which
/// lives for an hour or two, for one of about 60 days.
pub fn facebook_swap(settings: &Settings, short_token: &SecretString) -> Vec<(String, SecretString)> {
    let secret = settings.client_secret.clone().unwrap_or_default();
    vec![
        parameter("grant_type", "fb_exchange_token"),
        parameter("client_id", &settings.client_id),
        ("client_secret".to_owned(), secret),
        ("fb_exchange_token".to_owned(), short_token.clone()),
    ]
}

fn parameter(name: &str, value: &str) -> (String, SecretString) {
    (name.to_owned(), SecretString::from(value))
}

/// `first` and then what of `more` is not among it, each once.
fn with_scopes<'a>(first: &[&'a str], more: impl Iterator<Item = &'a str>) -> String {
    let mut scopes: Vec<&str> = Vec::new();
    for scope in first.iter().copied().chain(more) {
        if !scope.is_empty() && !scopes.contains(&scope) {
            scopes.push(scope);
        }
    }
    scopes.join(" ")
}

#[cfg(test)]
mod tests;
