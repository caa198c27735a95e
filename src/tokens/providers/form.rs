//! The members of each configuration, as a form asks for them.

use serde_json::{Map, Value, json};

use crate::tokens::providers::Provider;

enum Kind {
    Text,
    Secret,
    Switch,
    Choice(&'static [&'static str]),
    Json,
}

struct Member {
    key: &'static str,
    label: &'static str,
    kind: Kind,
    required: bool,
}

const fn must(key: &'static str, label: &'static str, kind: Kind) -> Member {
    Member { key, label, kind, required: true }
}

const fn may(key: &'static str, label: &'static str, kind: Kind) -> Member {
    Member { key, label, kind, required: false }
}

const METHODS: &[&str] = &[
    "client_secret_post",
    "client_secret_basic",
    "client_secret_basic_encoded",
    "client_secret_jwt",
    "none",
];

const CLIENT: &[Member] = &[
    must("clientId", "Client ID", Kind::Text),
    must("clientSecret", "Client secret", Kind::Secret),
    may("scope", "Scope", Kind::Text),
];
const ENDPOINTS: &[Member] = &[
    must("authorizationEndpoint", "Authorization endpoint", Kind::Text),
    must("tokenEndpoint", "Token endpoint", Kind::Text),
];
const TOKEN_REQUEST: &[Member] = &[
    may("tokenEndpointAuthMethod", "Token endpoint authentication method", Kind::Choice(METHODS)),
    may(
        "clientSecretJwtSigningAlgorithm",
        "Client secret JWT signing algorithm",
        Kind::Choice(&["HS256", "HS384", "HS512"]),
    ),
    may("customConfig", "More parameters", Kind::Json),
    may("revocationEndpoint", "Revocation endpoint", Kind::Text),
    may("pkce", "Use PKCE", Kind::Switch),
];
const OWN_SERVER: &[Member] = &[
    may("authorizationEndpoint", "Authorization endpoint of your own server", Kind::Text),
    may("tokenEndpoint", "Token endpoint of your own server", Kind::Text),
    may("userInfoEndpoint", "User info endpoint of your own server", Kind::Text),
];
const GOOGLE: &[Member] = &[
    may("prompts", "Prompts", Kind::Json),
    may("offlineAccess", "Offline access (refresh tokens)", Kind::Switch),
];
const OAUTH2: &[Member] = &[
    must("userInfoEndpoint", "User info endpoint", Kind::Text),
    may("tokenEndpointResponseType", "Token endpoint response type", Kind::Choice(&["query-string", "json"])),
    may("profileMap", "Profile map", Kind::Json),
];
const OIDC: &[Member] = &[
    must("idTokenVerificationConfig", "ID token verification", Kind::Json),
    may("userInfoEndpoint", "User info endpoint", Kind::Text),
    may("authRequestOptionalConfig", "Authentication request parameters", Kind::Json),
    may("acceptStringTypedBooleanClaims", "Accept booleans as strings", Kind::Switch),
    may("trustUnverifiedEmail", "Trust unverified e-mail addresses", Kind::Switch),
];
const ISSUER: &[Member] = &[must("issuer", "Issuer", Kind::Text)];
const SSO: &[Member] = &[may("trustUnverifiedEmail", "Trust unverified e-mail addresses", Kind::Switch)];
const OFFLINE: &[Member] = &[may("offlineAccess", "Offline access (refresh tokens)", Kind::Switch)];

fn members(provider: Provider) -> &'static [&'static [Member]] {
    match provider {
        Provider::Github | Provider::Facebook => &[CLIENT, OWN_SERVER],
        Provider::Google => &[CLIENT, GOOGLE, OWN_SERVER],
        Provider::OAuth2 => &[ENDPOINTS, CLIENT, OAUTH2, TOKEN_REQUEST],
        Provider::Oidc => &[ENDPOINTS, CLIENT, OIDC, TOKEN_REQUEST],
        Provider::SsoOidc | Provider::SsoEntra | Provider::SsoOkta => &[ISSUER, CLIENT, SSO],
        Provider::SsoGoogleWorkspace => &[CLIENT, OFFLINE, SSO],
        Provider::SsoSaml | Provider::Other => &[],
    }
}

/// The form, in the words of Logto's Console.
pub(super) fn items(provider: Provider) -> Value {
    members(provider).iter().copied().flatten().map(Member::item).collect()
}

/// The members that must be there, with something to overwrite; absent if nothing is known of them.
pub(super) fn template(provider: Provider) -> Option<Value> {
    let required = members(provider).iter().copied().flatten().filter(|member| member.required);
    let template: Map<_, _> = required.map(|member| (member.key.to_owned(), member.example())).collect();
    (!template.is_empty()).then_some(Value::Object(template))
}

impl Member {
    fn item(&self) -> Value {
        let kind = match self.kind {
            Kind::Text | Kind::Secret => "Text",
            Kind::Switch => "Switch",
            Kind::Choice(_) => "Select",
            Kind::Json => "Json",
        };
        let mut item = Map::new();
        item.insert("key".into(), json!(self.key));
        item.insert("type".into(), json!(kind));
        item.insert("label".into(), json!(self.label));
        item.insert("required".into(), json!(self.required));
        match self.kind {
            Kind::Secret => item.insert("isConfidential".into(), json!(true)),
            Kind::Choice(values) => {
                let choice = |value: &&str| json!({ "title": value, "value": value });
                item.insert("selectItems".into(), values.iter().map(choice).collect())
            }
            Kind::Json => item.insert("defaultValue".into(), self.example()),
            Kind::Text | Kind::Switch => None,
        };
        Value::Object(item)
    }

    fn example(&self) -> Value {
        match (self.key, &self.kind) {
            ("idTokenVerificationConfig", _) => json!({ "jwksUri": "<jwksUri>" }),
            ("prompts", _) => json!([]),
            (_, Kind::Json) => json!({}),
            (key, _) => json!(format!("<{key}>")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::providers::{Settings, social_factories, sso_providers};

    #[test]
    fn a_template_that_is_filled_in_is_a_configuration() {
        for factory in social_factories().iter().chain(sso_providers()) {
            let Some(text) = factory.config_template() else { continue };
            let mut config: Value = serde_json::from_str(&text).unwrap();
            for (name, value) in config.as_object_mut().unwrap() {
                match value {
                    Value::Object(inner) => inner["jwksUri"] = json!("https://idp.example/jwks"),
                    _ if name.starts_with("client") => {}
                    url => *url = json!("https://idp.example/x"),
                }
            }
            assert!(Settings::read(factory, &config).is_ok(), "{}: {config}", factory.id);
        }
    }

    #[test]
    fn what_the_form_requires_is_what_reading_requires() {
        for factory in social_factories().iter().chain(sso_providers()) {
            let Some(Value::Object(template)) = template(factory.provider) else { continue };
            for missing in template.keys() {
                let mut config = template.clone();
                config.remove(missing);
                for (_, value) in config.iter_mut().filter(|(_, value)| value.is_string()) {
                    *value = json!("https://idp.example/x");
                }
                if let Some(inner) = config.get_mut("idTokenVerificationConfig") {
                    inner["jwksUri"] = json!("https://idp.example/jwks");
                }
                let bad = Settings::read(factory, &Value::Object(config)).err().unwrap();
                assert!(bad.member.starts_with(missing.as_str()), "{}: {bad}", factory.id);
            }
        }
    }

    #[test]
    fn only_secrets_are_confidential() {
        let items = items(Provider::OAuth2);
        let items = items.as_array().unwrap();
        let hidden: Vec<_> = items.iter().filter(|item| item["isConfidential"] == true).collect();
        assert_eq!(hidden.len(), 1);
        assert_eq!(hidden[0]["key"], "clientSecret");
        let method = items.iter().find(|item| item["key"] == "tokenEndpointAuthMethod").unwrap();
        assert_eq!(method["selectItems"][0]["value"], "client_secret_post");
    }
}
