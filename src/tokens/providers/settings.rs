//! One connector's configuration, checked.
//!
//! Unknown members are left alone: they belong to somebody else's version. `null` and an empty text are an
//! absent member, as forms send them. What is additive to Logto: `revocationEndpoint`, `pkce`, the method
//! `none`, the method `client_secret_basic_encoded`, own endpoints for GitHub, Google and Facebook.

use std::fmt;

use secrecy::SecretString;
use serde_json::Value;

use crate::tokens::providers::reader::{
    BadConfig, MOST_PARAMETERS, Reader, bad, is_scope, no_reserved_query,
};
use crate::tokens::providers::{Factory, Provider};

/// How the client proves itself at the token endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// `client_secret_post`: in the body.
    Post,
    /// Basic, id and secret form-urlencoded first (RFC 6749, section 2.3.1).
    Basic,
    /// Basic as Logto sends it: not encoded first. The two differ for unusual characters only.
    BasicRaw,
    /// `client_secret_jwt`: an assertion with an HMAC under the secret.
    SecretJwt,
    /// A public client: only its id.
    None,
}

/// The HMAC of [`AuthMethod::SecretJwt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HmacAlg {
    /// HMAC with SHA-256.
    Hs256,
    /// HMAC with SHA-384.
    Hs384,
    /// HMAC with SHA-512.
    Hs512,
}

/// In which form the token endpoint answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFormat {
    /// JSON, as the standard wants.
    Json,
    /// `application/x-www-form-urlencoded`, and nothing else.
    QueryString,
    /// What the answer says it is. For `oauth2` connectors that do not say: Logto's default is the query
    /// string, and most servers answer JSON.
    Either,
}

/// Where an `oauth2` connector finds a user's data: paths such as `data.user.id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileMap {
    /// The account's id.
    pub id: String,
    /// The name.
    pub name: String,
    /// The e-mail address.
    pub email: String,
    /// The picture's URL.
    pub avatar: String,
}

/// A connector's configuration, checked. The endpoints are those that the configuration names; what a
/// provider has built in comes from the methods that take a [`Factory`].
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the configuration; none excludes another"
)]
pub struct Settings {
    /// Empty for factories that are known by name only.
    pub client_id: String,
    /// Absent for public clients.
    pub client_secret: Option<SecretString>,
    /// `authorizationEndpoint`.
    pub authorization_endpoint: Option<String>,
    /// `tokenEndpoint`.
    pub token_endpoint: Option<String>,
    /// `userInfoEndpoint`.
    pub userinfo_endpoint: Option<String>,
    /// `issuer` of enterprise SSO, `idTokenVerificationConfig.issuer` of `oidc`.
    pub issuer: Option<String>,
    /// `idTokenVerificationConfig.jwksUri`.
    pub jwks_uri: Option<String>,
    /// `revocationEndpoint` (RFC 7009).
    pub revocation_endpoint: Option<String>,
    /// `scope`, as written.
    pub scope: Option<String>,
    /// How the client proves itself.
    pub auth_method: AuthMethod,
    /// For [`AuthMethod::SecretJwt`].
    pub jwt_alg: HmacAlg,
    /// How the token endpoint answers.
    pub format: AnswerFormat,
    /// `customConfig`: parameters of token requests, in `snake_case`.
    pub extra: Vec<(String, String)>,
    /// More parameters of the authorization request, in `snake_case`.
    pub authorization_extra: Vec<(String, String)>,
    /// For `oauth2`.
    pub profile_map: ProfileMap,
    /// Whether the provider is asked for refresh tokens in its own way.
    pub offline_access: bool,
    /// Whether to use PKCE (RFC 7636). A server that does not know it ignores it (section 5), so it is off
    /// only where the configuration says so.
    pub uses_pkce: bool,
    /// Whether an address counts that the provider does not call verified.
    pub trust_unverified_email: bool,
    /// Whether `"true"` is true in claims.
    pub accept_string_booleans: bool,
}

/// Names the type and nothing in it: the secret may also be in the parameters.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Settings(..)")
    }
}

impl Settings {
    /// Reads a connector's `config`. Of factories that are known by name only nothing is required.
    ///
    /// # Errors
    /// [`BadConfig`] names the first member that breaks a rule.
    pub fn read(factory: &Factory, config: &Value) -> Result<Self, BadConfig> {
        let Value::Object(members) = config else { return Err(bad("config", "must be an object")) };
        let reader = Reader::new(members);
        let mut settings = Self::common(factory, &reader)?;
        match factory.provider {
            Provider::Github | Provider::Facebook => settings.read_endpoints(&reader)?,
            Provider::Google => {
                settings.read_endpoints(&reader)?;
                settings.read_google(&reader)?;
            }
            Provider::OAuth2 | Provider::Oidc => settings.read_standard(factory, &reader)?,
            Provider::SsoOidc | Provider::SsoEntra | Provider::SsoOkta => {
                settings.issuer = Some(reader.required("issuer", reader.issuer("issuer")?)?);
            }
            Provider::SsoGoogleWorkspace => {
                settings.issuer = reader.issuer("issuer")?;
                // Google remembers the last account otherwise, which need not be one of the workspace.
                let prompt =
                    if settings.offline_access { "consent select_account" } else { "select_account" };
                settings.authorization_extra.push(("prompt".into(), prompt.into()));
                settings.ask_google_for_refresh_tokens();
            }
            Provider::SsoSaml | Provider::Other => {}
        }
        Ok(settings)
    }

    /// Every URL of the configuration that will be called or shown, with its member, for the egress check.
    /// Those that are built in are not among them, nor those that are still to be discovered.
    pub fn urls(&self) -> Vec<(&'static str, &str)> {
        // Where the JWK set has an address of its own, the issuer is only compared.
        let issuer = if self.jwks_uri.is_some() { &None } else { &self.issuer };
        let all = [
            ("authorizationEndpoint", &self.authorization_endpoint),
            ("tokenEndpoint", &self.token_endpoint),
            ("userInfoEndpoint", &self.userinfo_endpoint),
            ("issuer", issuer),
            ("jwksUri", &self.jwks_uri),
            ("revocationEndpoint", &self.revocation_endpoint),
        ];
        all.into_iter().filter_map(|(member, url)| Some((member, url.as_deref()?))).collect()
    }

    fn common(factory: &Factory, reader: &Reader<'_>) -> Result<Self, BadConfig> {
        let auth_method = match factory.provider {
            Provider::OAuth2 | Provider::Oidc => reader.choice(
                "tokenEndpointAuthMethod",
                &[
                    ("client_secret_post", AuthMethod::Post),
                    // Connectors that come from Logto must go on working: it does not encode.
                    ("client_secret_basic", AuthMethod::BasicRaw),
                    ("client_secret_basic_encoded", AuthMethod::Basic),
                    ("client_secret_jwt", AuthMethod::SecretJwt),
                    ("none", AuthMethod::None),
                ],
            )?,
            Provider::Github | Provider::Facebook | Provider::Other => None,
            _ => Some(AuthMethod::BasicRaw),
        };
        let auth_method = auth_method.unwrap_or(AuthMethod::Post);
        let by_name_only = matches!(factory.provider, Provider::Other | Provider::SsoSaml);
        let mut client_id = reader.text("clientId")?;
        let mut client_secret = reader.text("clientSecret")?;
        if !by_name_only {
            client_id = Some(reader.required("clientId", client_id)?);
            if auth_method != AuthMethod::None {
                client_secret = Some(reader.required("clientSecret", client_secret)?);
            }
        }
        Ok(Self {
            client_id: client_id.unwrap_or_default(),
            client_secret: client_secret.map(SecretString::from),
            authorization_endpoint: None,
            token_endpoint: None,
            userinfo_endpoint: None,
            issuer: None,
            jwks_uri: None,
            revocation_endpoint: reader.url("revocationEndpoint")?,
            scope: reader.scope("scope")?,
            auth_method,
            jwt_alg: HmacAlg::Hs256,
            format: AnswerFormat::Json,
            extra: Vec::new(),
            authorization_extra: Vec::new(),
            profile_map: ProfileMap::same_names(),
            offline_access: reader.flag("offlineAccess")?.unwrap_or(false),
            uses_pkce: reader.flag("pkce")?.unwrap_or(true),
            trust_unverified_email: reader.flag("trustUnverifiedEmail")?.unwrap_or(false),
            accept_string_booleans: reader.flag("acceptStringTypedBooleanClaims")?.unwrap_or(false),
        })
    }

    fn read_endpoints(&mut self, reader: &Reader<'_>) -> Result<(), BadConfig> {
        self.authorization_endpoint = reader.url("authorizationEndpoint")?;
        if let Some(endpoint) = &self.authorization_endpoint {
            no_reserved_query("authorizationEndpoint", endpoint)?;
        }
        self.token_endpoint = reader.url("tokenEndpoint")?;
        self.userinfo_endpoint = reader.url("userInfoEndpoint")?;
        Ok(())
    }

    fn read_standard(&mut self, factory: &Factory, reader: &Reader<'_>) -> Result<(), BadConfig> {
        self.read_endpoints(reader)?;
        reader.required("authorizationEndpoint", self.authorization_endpoint.as_ref())?;
        reader.required("tokenEndpoint", self.token_endpoint.as_ref())?;
        let algs = [("HS256", HmacAlg::Hs256), ("HS384", HmacAlg::Hs384), ("HS512", HmacAlg::Hs512)];
        self.jwt_alg = reader.choice("clientSecretJwtSigningAlgorithm", &algs)?.unwrap_or(HmacAlg::Hs256);
        self.extra = reader.parameters("customConfig")?;
        if factory.provider == Provider::OAuth2 {
            reader.required("userInfoEndpoint", self.userinfo_endpoint.as_ref())?;
            let formats = [("json", AnswerFormat::Json), ("query-string", AnswerFormat::QueryString)];
            let format = reader.choice("tokenEndpointResponseType", &formats)?;
            self.format = format.unwrap_or(AnswerFormat::Either);
            self.profile_map = ProfileMap::read(reader)?;
        } else {
            self.authorization_extra = reader.parameters("authRequestOptionalConfig")?;
            let Some(rules) = reader.inner("idTokenVerificationConfig", "idTokenVerificationConfig.")? else {
                return Err(bad("idTokenVerificationConfig", "is required"));
            };
            self.jwks_uri = Some(rules.required("jwksUri", rules.url("jwksUri")?)?);
            self.issuer = rules.issuer("issuer")?;
        }
        // As Logto does; but a browser's history is no place for an API key.
        for (name, value) in self.extra.iter().filter(|(name, _)| !is_credential(name)) {
            put(&mut self.authorization_extra, name, value);
        }
        Ok(())
    }

    fn read_google(&mut self, reader: &Reader<'_>) -> Result<(), BadConfig> {
        let prompts = match reader.value("prompts") {
            None => Vec::new(),
            Some(Value::Array(prompts)) => prompts.iter().map(Value::as_str).collect(),
            Some(_) => vec![None],
        };
        let is_prompt = |text: &&str| !text.contains(' ') && is_scope(text);
        let prompts: Option<Vec<_>> = prompts.into_iter().map(|text| text.filter(is_prompt)).collect();
        let Some(prompts) = prompts.filter(|prompts| prompts.len() <= MOST_PARAMETERS) else {
            return Err(bad("prompts", "must be an array of prompts, such as \"consent\""));
        };
        if !prompts.is_empty() {
            self.authorization_extra.push(("prompt".into(), prompts.join(" ")));
        }
        self.ask_google_for_refresh_tokens();
        Ok(())
    }

    fn ask_google_for_refresh_tokens(&mut self) {
        if self.offline_access {
            self.authorization_extra.push(("access_type".into(), "offline".into()));
        }
    }
}

impl ProfileMap {
    fn read(reader: &Reader<'_>) -> Result<Self, BadConfig> {
        let mut map = Self::same_names();
        let Some(paths) = reader.inner("profileMap", "profileMap.")? else { return Ok(map) };
        let targets = [
            ("id", &mut map.id),
            ("name", &mut map.name),
            ("email", &mut map.email),
            ("avatar", &mut map.avatar),
        ];
        for (name, target) in targets {
            let Some(path) = paths.text(name)? else { continue };
            if path.split('.').any(str::is_empty) {
                return Err(paths.bad(name, "must be names with dots between them"));
            }
            *target = path;
        }
        Ok(map)
    }

    fn same_names() -> Self {
        Self { id: "id".into(), name: "name".into(), email: "email".into(), avatar: "avatar".into() }
    }
}

/// Narrower than what is masked: some providers want a `client_key` or a `token_access_type` in the address.
fn is_credential(name: &str) -> bool {
    ["secret", "password", "api_key", "apikey", "private_key"].iter().any(|word| name.contains(word))
}

fn put(parameters: &mut Vec<(String, String)>, name: &str, value: &str) {
    match parameters.iter_mut().find(|(there, _)| there == name) {
        Some((_, old)) => value.clone_into(old),
        None => parameters.push((name.to_owned(), value.to_owned())),
    }
}

#[cfg(test)]
mod tests;
