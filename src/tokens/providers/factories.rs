//! The kinds of connectors, as the API lists them.

use serde_json::{Map, Value, json};

use crate::tokens::providers::form;

/// Which of the two lists a factory is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `/api/connectors`.
    Social,
    /// `/api/sso-connectors`.
    EnterpriseSso,
}

/// Whose rules apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// GitHub, also as Enterprise Server.
    Github,
    /// Google accounts.
    Google,
    /// Facebook Login.
    Facebook,
    /// Any OAuth 2.0 server.
    OAuth2,
    /// Any OpenID Connect provider.
    Oidc,
    /// Enterprise SSO: any OpenID Connect provider.
    SsoOidc,
    /// Enterprise SSO: Microsoft Entra ID by OpenID Connect.
    SsoEntra,
    /// Enterprise SSO: Okta.
    SsoOkta,
    /// Enterprise SSO: Google Workspace.
    SsoGoogleWorkspace,
    /// Enterprise SSO by SAML: known by name; has no tokens.
    SsoSaml,
    /// A social connector that is known by name and never stores tokens.
    Other,
}

/// A kind of connector.
#[derive(Debug)]
pub struct Factory {
    /// `connectorId` of social connectors, `providerName` of enterprise SSO.
    pub id: &'static str,
    /// Which list it is in.
    pub family: Family,
    /// Whose rules apply.
    pub provider: Provider,
    /// The stable name of its identities; absent: chosen per connector, in its metadata.
    pub target: Option<&'static str>,
    /// In English.
    pub name: &'static str,
    /// In English.
    pub description: &'static str,
    /// URL path of a picture; empty: none.
    pub logo: &'static str,
    /// Whether it stands for a protocol and not for a company.
    pub is_standard: bool,
    /// Whether its token sets can be stored.
    pub stores_tokens: bool,
    /// `Universal`: browsers and native applications.
    pub platform: Option<&'static str>,
}

const fn social(id: &'static str, provider: Provider, target: Option<&'static str>) -> Factory {
    Factory {
        id,
        family: Family::Social,
        provider,
        target,
        name: id,
        description: "",
        logo: "",
        is_standard: target.is_none(),
        stores_tokens: !matches!(provider, Provider::Other),
        platform: Some("Universal"),
    }
}

const fn sso(id: &'static str, provider: Provider) -> Factory {
    Factory {
        id,
        family: Family::EnterpriseSso,
        provider,
        target: None,
        name: id,
        description: "",
        logo: "",
        is_standard: false,
        stores_tokens: !matches!(provider, Provider::SsoSaml),
        platform: None,
    }
}

const SOCIAL: &[Factory] = &[
    Factory {
        name: "GitHub",
        description: "Sign in with GitHub, and call its API for the user.",
        ..social("github-universal", Provider::Github, Some("github"))
    },
    Factory {
        name: "Google",
        description: "Sign in with a Google account, and call Google's APIs for the user.",
        ..social("google-universal", Provider::Google, Some("google"))
    },
    Factory {
        name: "Facebook",
        description: "Sign in with Facebook, and call the Graph API for the user.",
        ..social("facebook-universal", Provider::Facebook, Some("facebook"))
    },
    Factory {
        name: "OAuth 2.0",
        description: "Any server that speaks OAuth 2.0 (RFC 6749).",
        ..social("oauth2", Provider::OAuth2, None)
    },
    Factory {
        name: "OIDC",
        description: "Any provider that speaks OpenID Connect 1.0.",
        ..social("oidc", Provider::Oidc, None)
    },
    Factory {
        name: "Microsoft",
        description: "Sign in with a Microsoft account; tokens are not stored.",
        ..social("azuread-universal", Provider::Other, Some("azuread"))
    },
    Factory {
        name: "Discord",
        description: "Sign in with Discord; tokens are not stored.",
        ..social("discord-universal", Provider::Other, Some("discord"))
    },
    Factory {
        name: "Slack",
        description: "Sign in with Slack; tokens are not stored.",
        ..social("slack-universal", Provider::Other, Some("slack"))
    },
    Factory {
        name: "Apple",
        description: "Sign in with Apple; tokens are not stored.",
        ..social("apple-universal", Provider::Other, Some("apple"))
    },
];

const SSO: &[Factory] = &[
    Factory {
        name: "OIDC",
        description: "Any provider that speaks OpenID Connect 1.0.",
        is_standard: true,
        ..sso("OIDC", Provider::SsoOidc)
    },
    Factory { name: "Okta", description: "Okta by OpenID Connect.", ..sso("Okta", Provider::SsoOkta) },
    Factory {
        name: "Microsoft Entra ID (OIDC)",
        description: "Microsoft Entra ID by OpenID Connect.",
        ..sso("AzureAdOidc", Provider::SsoEntra)
    },
    Factory {
        name: "Google Workspace",
        description: "Google Workspace by OpenID Connect.",
        ..sso("GoogleWorkspace", Provider::SsoGoogleWorkspace)
    },
    Factory {
        name: "SAML",
        description: "Any provider that speaks SAML 2.0; there are no tokens to store.",
        is_standard: true,
        ..sso("SAML", Provider::SsoSaml)
    },
    Factory {
        name: "Microsoft Entra ID (SAML)",
        description: "Microsoft Entra ID by SAML 2.0; there are no tokens to store.",
        ..sso("AzureAD", Provider::SsoSaml)
    },
];

/// What `GET /api/connector-factories` lists.
pub fn social_factories() -> &'static [Factory] {
    SOCIAL
}

/// The kinds of enterprise SSO.
pub fn sso_providers() -> &'static [Factory] {
    SSO
}

/// The social factory of that `connectorId`.
pub fn social_factory(id: &str) -> Option<&'static Factory> {
    SOCIAL.iter().find(|factory| factory.id == id)
}

/// The kind of enterprise SSO of that `providerName`.
pub fn sso_provider(name: &str) -> Option<&'static Factory> {
    SSO.iter().find(|factory| factory.id == name)
}

impl Provider {
    /// Whether it is enterprise SSO by OpenID Connect: its endpoints are discovered.
    pub const fn is_sso_oidc(self) -> bool {
        matches!(self, Self::SsoOidc | Self::SsoEntra | Self::SsoOkta | Self::SsoGoogleWorkspace)
    }
}

impl Factory {
    /// The factory as the API shows it, each family in its own shape.
    pub fn json(&self) -> Value {
        let shown = match self.family {
            Family::Social => self.social_json(),
            Family::EnterpriseSso => self.sso_json(),
        };
        Value::Object(shown)
    }

    /// A configuration to begin with, as JSON text; absent for kinds that are only known by name.
    pub fn config_template(&self) -> Option<String> {
        let template = form::template(self.provider)?;
        Some(format!("{template:#}"))
    }

    fn social_json(&self) -> Map<String, Value> {
        let mut shown = Map::new();
        let mut put = |name: &str, value| shown.insert(name.to_owned(), value);
        put("id", json!(self.id));
        put("type", json!("Social"));
        // Where the target is chosen per connector, the id stands in its place.
        put("target", json!(self.target.unwrap_or(self.id)));
        put("name", json!({ "en": self.name }));
        put("description", json!({ "en": self.description }));
        put("logo", json!(self.logo));
        put("logoDark", Value::Null);
        put("readme", json!(""));
        if let Some(template) = self.config_template() {
            put("configTemplate", json!(template));
            put("formItems", form::items(self.provider));
        }
        put("platform", json!(self.platform));
        // Clients test for presence: `false` is never written.
        if self.is_standard {
            put("isStandard", json!(true));
        }
        if self.stores_tokens {
            put("isTokenStorageSupported", json!(true));
        }
        shown
    }

    fn sso_json(&self) -> Map<String, Value> {
        let mut shown = Map::new();
        let mut put = |name: &str, value| shown.insert(name.to_owned(), value);
        put("providerName", json!(self.id));
        put("providerType", json!(self.provider_type()));
        put("name", json!(self.name));
        put("logo", json!(self.logo));
        put("logoDark", json!(self.logo));
        put("description", json!(self.description));
        if self.stores_tokens {
            put("isTokenStorageSupported", json!(true));
        }
        shown
    }

    /// `providerType` of enterprise SSO.
    pub fn provider_type(&self) -> &'static str {
        if self.provider == Provider::SsoSaml { "saml" } else { "oidc" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_store_tokens_are_the_documented_ones() {
        let storing = |list: &'static [Factory]| -> Vec<_> {
            list.iter().filter(|factory| factory.stores_tokens).map(|factory| factory.id).collect()
        };
        let social = ["github-universal", "google-universal", "facebook-universal", "oauth2", "oidc"];
        assert_eq!(storing(social_factories()), social);
        assert_eq!(storing(sso_providers()), ["OIDC", "Okta", "AzureAdOidc", "GoogleWorkspace"]);
    }

    #[test]
    fn ids_are_found_within_their_family_only() {
        assert_eq!(social_factory("github-universal").unwrap().target, Some("github"));
        assert_eq!(sso_provider("AzureAdOidc").unwrap().provider, Provider::SsoEntra);
        for unknown in ["", "github", "OIDC", "Oidc"] {
            assert!(social_factory(unknown).is_none(), "{unknown}");
        }
        for unknown in ["", "oidc", "okta"] {
            assert!(sso_provider(unknown).is_none(), "{unknown}");
        }
        for list in [social_factories(), sso_providers()] {
            for (at, factory) in list.iter().enumerate() {
                assert!(list[..at].iter().all(|other| other.id != factory.id), "{}", factory.id);
            }
        }
    }

    #[test]
    fn a_social_factory_is_shown_as_logto_shows_it() {
        let oauth2 = social_factory("oauth2").unwrap().json();
        let names: Vec<_> = oauth2.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = [
            "id",
            "type",
            "target",
            "name",
            "description",
            "logo",
            "logoDark",
            "readme",
            "configTemplate",
            "formItems",
            "platform",
            "isStandard",
            "isTokenStorageSupported",
        ];
        assert_eq!(names, expected);
        assert_eq!(oauth2["target"], "oauth2");
        assert_eq!(oauth2["name"], json!({ "en": "OAuth 2.0" }));

        let slack = social_factory("slack-universal").unwrap().json();
        for absent in ["configTemplate", "formItems", "isStandard", "isTokenStorageSupported"] {
            assert!(slack.get(absent).is_none(), "{absent}");
        }
        let github = social_factory("github-universal").unwrap().json();
        assert_eq!(github["isTokenStorageSupported"], true);
        assert!(github.get("isStandard").is_none());
    }

    #[test]
    fn enterprise_sso_has_its_own_shape() {
        let saml = sso_provider("SAML").unwrap().json();
        assert_eq!((&saml["providerName"], &saml["providerType"]), (&json!("SAML"), &json!("saml")));
        assert!(saml.get("isTokenStorageSupported").is_none());
        assert_eq!(sso_provider("Okta").unwrap().json()["providerType"], "oidc");
    }
}
