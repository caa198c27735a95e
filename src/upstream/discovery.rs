//! A provider's metadata (OpenID Connect Discovery 1.0, RFC 8414).
//!
//! Metadata name the places that get client secrets and tokens, so they are believed only about the issuer that
//! was configured, and only about hosts that are its own or are known to be the provider's.

use url::Url;

use super::classify::{Class, TokenFailure};
use super::egress::Rules;
use super::strict::Members;

/// What is used of a provider's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// The issuer, exactly as configured.
    pub issuer: String,
    /// Where users authorise.
    pub authorization_endpoint: Url,
    /// Where tokens come from.
    pub token_endpoint: Url,
    /// Where the keys of ID tokens are.
    pub jwks_uri: Url,
    /// Where claims about a user are.
    pub userinfo_endpoint: Option<Url>,
    /// Where tokens are revoked.
    pub revocation_endpoint: Option<Url>,
    /// Whether PKCE with S256 is promised (RFC 7636).
    pub supports_pkce: bool,
    /// Whether every authorisation response says its issuer (RFC 9207).
    pub promises_iss: bool,
    /// How clients may authenticate at the token endpoint; empty if it was not said.
    pub auth_methods: Vec<String>,
}

/// Where an issuer's metadata are.
pub(super) fn location(rules: &Rules, issuer: &str) -> Result<Url, TokenFailure> {
    let bad = |_| TokenFailure::before(Class::Config, "issuer-url");
    let base = rules.parse(issuer).map_err(bad)?;
    if base.query().is_some() {
        return Err(TokenFailure::before(Class::Config, "issuer-url"));
    }
    let base = issuer.strip_suffix('/').unwrap_or(issuer);
    rules.parse(&format!("{base}/.well-known/openid-configuration")).map_err(bad)
}

impl Metadata {
    /// Reads the metadata of `issuer`.
    pub(super) fn read(rules: &Rules, issuer: &str, members: &Members) -> Result<Self, TokenFailure> {
        // RFC 8414, section 3.3: anything else is another issuer, however alike it looks.
        if members.read::<String>("issuer")?.as_deref() != Some(issuer) {
            return Err(TokenFailure::after(Class::Config, "issuer-mismatch"));
        }
        let optional = |name| {
            let text: Option<String> = members.read(name)?;
            let url = text.map(|text| rules.parse(&text)).transpose();
            url.map_err(|_| TokenFailure::after(Class::Config, "endpoint-url"))
        };
        let required = |name| {
            optional(name).and_then(|url| url.ok_or_else(|| TokenFailure::after(Class::Protocol, name)))
        };
        let methods: Option<Vec<String>> = members.read("code_challenge_methods_supported")?;
        Ok(Self {
            issuer: issuer.to_owned(),
            authorization_endpoint: required("authorization_endpoint")?,
            token_endpoint: required("token_endpoint")?,
            jwks_uri: required("jwks_uri")?,
            userinfo_endpoint: optional("userinfo_endpoint")?,
            revocation_endpoint: optional("revocation_endpoint")?,
            supports_pkce: methods.unwrap_or_default().iter().any(|method| method == "S256"),
            promises_iss: members.read("authorization_response_iss_parameter_supported")?.unwrap_or(false),
            auth_methods: members.read("token_endpoint_auth_methods_supported")?.unwrap_or_default(),
        })
    }

    /// Refuses metadata with an endpoint that is neither on the issuer's host nor on a trusted one, or below it.
    pub(super) fn check_hosts(&self, trusted: &[&str]) -> Result<(), TokenFailure> {
        let issuer = Url::parse(&self.issuer).ok();
        let own = issuer.as_ref().and_then(Url::host_str).unwrap_or_default();
        let below = |host: &str, name: &str| {
            let rest = host.strip_suffix(&name.to_ascii_lowercase());
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let required = [&self.authorization_endpoint, &self.token_endpoint, &self.jwks_uri];
        let optional = [&self.userinfo_endpoint, &self.revocation_endpoint].into_iter().flatten();
        let mut hosts = required.into_iter().chain(optional).map(|url| url.host_str().unwrap_or_default());
        if hosts.all(|host| host == own || trusted.iter().any(|name| below(host, name))) {
            return Ok(());
        }
        Err(TokenFailure::after(Class::Config, "endpoint-host"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Config;
    use super::*;

    const ISSUER: &str = "https://idp.example.com/tenant/";

    fn rules() -> Rules {
        Rules::new(&Config::default(), None).unwrap()
    }

    /// The provider's metadata, with one member replaced.
    fn read(name: &str, value: Value) -> Result<Metadata, TokenFailure> {
        let mut all = json!({
            "issuer": ISSUER,
            "authorization_endpoint": "https://idp.example.com/authorize",
            "token_endpoint": "https://idp.example.com/token",
            "jwks_uri": "https://idp.example.com/jwks",
        });
        all[name] = value;
        let members = Members::from_json(all.to_string().as_bytes()).unwrap();
        Metadata::read(&rules(), ISSUER, &members)
    }

    #[test]
    fn only_the_configured_issuer_is_believed() {
        for (name, value, reason) in [
            ("issuer", json!("https://idp.example.com/tenant"), "issuer-mismatch"),
            ("issuer", json!("https://idp.example.com/Tenant/"), "issuer-mismatch"),
            ("issuer", json!("https://evil.example.com/tenant/"), "issuer-mismatch"),
            ("issuer", Value::Null, "issuer-mismatch"),
            ("issuer", json!(1), "issuer"),
            ("token_endpoint", Value::Null, "token_endpoint"),
            ("token_endpoint", json!("http://idp.example.com/token"), "endpoint-url"),
            ("token_endpoint", json!("https://10.0.0.1/token"), "endpoint-url"),
            ("jwks_uri", json!("file:///etc/passwd"), "endpoint-url"),
            ("userinfo_endpoint", json!("https://idp.example.com:22/"), "endpoint-url"),
        ] {
            let found = read(name, value.clone()).map_err(|failure| failure.reason);
            assert_eq!(found.err(), Some(reason), "{name} {value}");
        }
    }

    #[test]
    fn endpoints_are_on_the_issuers_host_or_on_a_trusted_one() {
        let at = |host: &str| read("token_endpoint", json!(format!("https://{host}/token"))).unwrap();
        for (host, trusted, accepted) in [
            ("idp.example.com", [].as_slice(), true),
            ("oauth2.googleapis.com", &[], false),
            ("oauth2.googleapis.com", &["googleapis.com"], true),
            ("googleapis.com", &["GoogleAPIs.com"], true),
            ("evilgoogleapis.com", &["googleapis.com"], false),
            ("googleapis.com.evil.com", &["googleapis.com"], false),
            ("example.com", &[], false),
            ("sub.idp.example.com", &[], false),
        ] {
            assert_eq!(at(host).check_hosts(trusted).is_ok(), accepted, "{host} {trusted:?}");
        }
    }

    #[test]
    fn abilities_are_what_the_metadata_promise() {
        let plain = read("scopes_supported", json!(["openid"])).unwrap();
        assert!(!plain.supports_pkce && !plain.promises_iss && plain.auth_methods.is_empty());

        let pkce = |methods| read("code_challenge_methods_supported", methods).unwrap().supports_pkce;
        assert!(pkce(json!(["plain", "S256"])) && !pkce(json!(["plain"])));
        let promise = read("authorization_response_iss_parameter_supported", json!(true));
        assert!(promise.unwrap().promises_iss);
    }

    #[test]
    fn metadata_are_at_the_well_known_place() {
        let at =
            |issuer: &str| location(&rules(), issuer).map(String::from).map_err(|failure| failure.reason);
        let expected = "https://a.example/t/.well-known/openid-configuration";
        assert_eq!(at("https://a.example/t").as_deref(), Ok(expected));
        assert_eq!(at("https://a.example/t/").as_deref(), Ok(expected));
        for issuer in ["http://a.example", "https://a.example/?a=b", "https://127.0.0.1", "a.example"] {
            assert_eq!(at(issuer), Err("issuer-url"), "{issuer}");
        }
    }
}
