//! Tests of reading a configuration.

use secrecy::ExposeSecret;
use serde_json::json;

use super::*;
use crate::tokens::providers::{social_factories, social_factory, sso_provider, sso_providers};

fn factory(id: &str) -> &'static Factory {
    social_factory(id).or(sso_provider(id)).unwrap()
}

/// The least that the factory wants, and then `more`.
fn config(id: &str, more: Value) -> Value {
    let mut config = json!({ "clientId": "cid", "clientSecret": "s3cret" });
    let standard = match factory(id).provider {
        Provider::OAuth2 => json!({
            "authorizationEndpoint": "https://idp.example/auth", "tokenEndpoint": "https://idp.example/token",
            "userInfoEndpoint": "https://idp.example/me",
        }),
        Provider::Oidc => json!({
            "authorizationEndpoint": "https://idp.example/auth", "tokenEndpoint": "https://idp.example/token",
            "idTokenVerificationConfig": { "jwksUri": "https://idp.example/jwks" },
        }),
        Provider::SsoOidc | Provider::SsoEntra | Provider::SsoOkta => {
            json!({ "issuer": "https://idp.example" })
        }
        _ => json!({}),
    };
    for part in [standard, more] {
        config.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    }
    config
}

fn read(id: &str, more: Value) -> Result<Settings, BadConfig> {
    Settings::read(factory(id), &config(id, more))
}

fn refused(id: &str, more: Value) -> String {
    match read(id, more.clone()) {
        Ok(_) => panic!("{id} accepts {more}"),
        Err(bad) => bad.member,
    }
}

#[test]
fn every_factory_reads_its_least_configuration() {
    for factory in social_factories().iter().chain(sso_providers()) {
        let settings = read(factory.id, json!({})).unwrap();
        assert_eq!(settings.client_id, "cid", "{}", factory.id);
        assert_eq!(settings.client_secret.unwrap().expose_secret(), "s3cret");
        assert!(settings.uses_pkce && !settings.offline_access && settings.extra.is_empty());
    }
}

#[test]
fn defaults_are_those_of_the_contract() {
    let rows = [
        ("github-universal", AuthMethod::Post, AnswerFormat::Json),
        ("google-universal", AuthMethod::BasicRaw, AnswerFormat::Json),
        ("facebook-universal", AuthMethod::Post, AnswerFormat::Json),
        ("oauth2", AuthMethod::Post, AnswerFormat::Either),
        ("oidc", AuthMethod::Post, AnswerFormat::Json),
        ("OIDC", AuthMethod::BasicRaw, AnswerFormat::Json),
        ("AzureAdOidc", AuthMethod::BasicRaw, AnswerFormat::Json),
        ("Okta", AuthMethod::BasicRaw, AnswerFormat::Json),
        ("GoogleWorkspace", AuthMethod::BasicRaw, AnswerFormat::Json),
    ];
    for (id, method, format) in rows {
        let settings = read(id, json!({})).unwrap();
        assert_eq!((settings.auth_method, settings.format), (method, format), "{id}");
        assert_eq!(settings.jwt_alg, HmacAlg::Hs256);
    }
}

#[test]
fn choices_are_read_by_name() {
    let methods = [
        ("client_secret_post", AuthMethod::Post),
        ("client_secret_basic", AuthMethod::BasicRaw),
        ("client_secret_basic_encoded", AuthMethod::Basic),
        ("client_secret_jwt", AuthMethod::SecretJwt),
        ("none", AuthMethod::None),
    ];
    for (name, method) in methods {
        for id in ["oauth2", "oidc"] {
            assert_eq!(read(id, json!({ "tokenEndpointAuthMethod": name })).unwrap().auth_method, method);
        }
    }
    // Only the standard connectors have a choice.
    let github = read("github-universal", json!({ "tokenEndpointAuthMethod": "client_secret_jwt" })).unwrap();
    assert_eq!(github.auth_method, AuthMethod::Post);
    for (name, alg) in [("HS256", HmacAlg::Hs256), ("HS384", HmacAlg::Hs384), ("HS512", HmacAlg::Hs512)] {
        let more = json!({ "clientSecretJwtSigningAlgorithm": name });
        assert_eq!(read("oidc", more).unwrap().jwt_alg, alg);
    }
    for (name, format) in [("json", AnswerFormat::Json), ("query-string", AnswerFormat::QueryString)] {
        let more = json!({ "tokenEndpointResponseType": name });
        assert_eq!(read("oauth2", more).unwrap().format, format);
    }
}

#[test]
fn null_and_empty_are_absent() {
    for id in ["github-universal", "oauth2", "oidc", "OIDC"] {
        let more = json!({ "scope": "", "pkce": null, "tokenEndpointAuthMethod": "", "customConfig": null });
        assert!(read(id, more).unwrap().scope.is_none(), "{id}");
    }
    assert_eq!(refused("github-universal", json!({ "clientId": "" })), "clientId");
    assert_eq!(refused("github-universal", json!({ "clientSecret": null })), "clientSecret");
    let public = json!({ "clientSecret": null, "tokenEndpointAuthMethod": "none" });
    assert!(read("oidc", public).unwrap().client_secret.is_none());
}

#[test]
fn a_broken_member_is_named() {
    let long = "x".repeat(2049);
    let rows = [
        ("github-universal", json!({ "clientId": 7 }), "clientId"),
        ("github-universal", json!({ "clientId": long }), "clientId"),
        ("github-universal", json!({ "clientSecret": "a\nb" }), "clientSecret"),
        ("github-universal", json!({ "scope": "a\"b" }), "scope"),
        ("github-universal", json!({ "scope": "a\\b" }), "scope"),
        ("github-universal", json!({ "scope": "ä" }), "scope"),
        ("github-universal", json!({ "scope": ["a"] }), "scope"),
        ("github-universal", json!({ "scope": long }), "scope"),
        ("github-universal", json!({ "pkce": "false" }), "pkce"),
        ("google-universal", json!({ "prompts": "consent" }), "prompts"),
        ("google-universal", json!({ "prompts": ["a b"] }), "prompts"),
        ("google-universal", json!({ "prompts": [1] }), "prompts"),
        ("google-universal", json!({ "offlineAccess": 1 }), "offlineAccess"),
        ("oauth2", json!({ "tokenEndpointAuthMethod": "private_key_jwt" }), "tokenEndpointAuthMethod"),
        ("oauth2", json!({ "tokenEndpointResponseType": "xml" }), "tokenEndpointResponseType"),
        ("oauth2", json!({ "clientSecretJwtSigningAlgorithm": "none" }), "clientSecretJwtSigningAlgorithm"),
        ("oauth2", json!({ "userInfoEndpoint": null }), "userInfoEndpoint"),
        ("oauth2", json!({ "profileMap": { "id": "a..b" } }), "profileMap.id"),
        ("oauth2", json!({ "profileMap": "id" }), "profileMap"),
        ("oauth2", json!({ "customConfig": ["a"] }), "customConfig"),
        ("oauth2", json!({ "customConfig": { "a": {} } }), "customConfig.a"),
        ("oauth2", json!({ "customConfig": { "a": "\u{0}" } }), "customConfig.a"),
        ("oauth2", json!({ "customConfig": { "a b": "c" } }), "customConfig"),
        ("oauth2", json!({ "customConfig": { "maxAge": 1, "max_age": 2 } }), "customConfig.max_age"),
        ("oidc", json!({ "idTokenVerificationConfig": null }), "idTokenVerificationConfig"),
        ("oidc", json!({ "idTokenVerificationConfig": {} }), "idTokenVerificationConfig.jwksUri"),
        ("oidc", json!({ "idTokenVerificationConfig": [] }), "idTokenVerificationConfig"),
        (
            "oidc",
            json!({ "idTokenVerificationConfig": { "jwksUri": "https://a.example", "issuer": ["https://a.example", "https://b.example"] } }),
            "idTokenVerificationConfig.issuer",
        ),
        ("OIDC", json!({ "issuer": null }), "issuer"),
        ("Okta", json!({ "issuer": "https://idp.example?x=1" }), "issuer"),
        ("AzureAdOidc", json!({ "trustUnverifiedEmail": "yes" }), "trustUnverifiedEmail"),
        ("apple-universal", json!({ "clientId": 7 }), "clientId"),
    ];
    for (id, more, member) in rows {
        assert_eq!(refused(id, more.clone()), member, "{id}: {more}");
    }
    for config in [json!(null), json!([]), json!("{}")] {
        assert_eq!(Settings::read(factory("oidc"), &config).unwrap_err().member, "config");
    }
}

#[test]
fn an_error_never_quotes_a_value() {
    let more = json!({ "customConfig": { "a": ["hush-hush"] } });
    let bad = read("oauth2", more).unwrap_err();
    assert_eq!(bad.to_string(), "`customConfig.a` must be a text");
    let bad = read("oauth2", json!({ "tokenEndpointAuthMethod": "hush-hush" })).unwrap_err();
    assert!(!bad.to_string().contains("hush"), "{bad}");
    assert_eq!(format!("{:?}", read("oauth2", json!({})).unwrap()), "Settings(..)");
}

#[test]
fn urls_are_http_and_nothing_but_an_address() {
    let bad = [
        "idp.example/token",
        "//idp.example/token",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "ftp://idp.example/",
        "https://user@idp.example/",
        "https://user:word@idp.example/",
        "https://idp.example/#part",
        "https://idp.example/a b",
        " https://idp.example/",
        "https://idp.exa\tmple/",
        "https://idp.example/ä",
        "https://",
    ];
    for url in bad {
        for member in ["authorizationEndpoint", "tokenEndpoint", "userInfoEndpoint", "revocationEndpoint"] {
            assert_eq!(refused("oauth2", json!({ member: url })), member, "{url}");
        }
        assert_eq!(refused("OIDC", json!({ "issuer": url })), "issuer", "{url}");
    }
    let own = json!({ "tokenEndpoint": "http://127.0.0.1:9/token?x=1" });
    assert!(read("github-universal", own).is_ok(), "which addresses may be called is for the egress check");
}

#[test]
fn urls_to_check_are_all_that_the_configuration_names() {
    let more = json!({
        "revocationEndpoint": "https://idp.example/revoke", "userInfoEndpoint": "https://idp.example/me",
        "idTokenVerificationConfig": { "jwksUri": "https://idp.example/jwks", "issuer": ["https://idp.example"] },
    });
    let settings = read("oidc", more).unwrap();
    let expected = [
        ("authorizationEndpoint", "https://idp.example/auth"),
        ("tokenEndpoint", "https://idp.example/token"),
        ("userInfoEndpoint", "https://idp.example/me"),
        ("jwksUri", "https://idp.example/jwks"),
        ("revocationEndpoint", "https://idp.example/revoke"),
    ];
    assert_eq!(settings.urls(), expected);
    assert_eq!(read("github-universal", json!({})).unwrap().urls(), []);
    assert_eq!(read("Okta", json!({})).unwrap().urls(), [("issuer", "https://idp.example")]);
}

#[test]
fn a_parameter_of_the_protocol_cannot_be_configured() {
    for name in [
        "redirect_uri",
        "redirectUri",
        "state",
        "nonce",
        "codeChallenge",
        "request_uri",
        "RequestUri",
        "clientId",
    ] {
        let parameter = json!({ name: "x" });
        assert_eq!(refused("oauth2", json!({ "customConfig": parameter })), format!("customConfig.{name}"));
        let member = format!("authRequestOptionalConfig.{name}");
        assert_eq!(refused("oidc", json!({ "authRequestOptionalConfig": parameter })), member);
    }
    for query in ["redirect_uri=https://evil.example", "a=b&%72edirect_uri=x", "state"] {
        let more = json!({ "authorizationEndpoint": format!("https://idp.example/auth?{query}") });
        assert_eq!(refused("oauth2", more), "authorizationEndpoint", "{query}");
    }
}

#[test]
fn more_parameters_are_sent_in_snake_case_and_in_their_order() {
    let more = json!({
        "authRequestOptionalConfig": { "prompt": "login", "maxAge": 60, "uiLocales": "pt" },
        "customConfig": {
            "resource-id": "r", "APIKey": "k", "someURLPart": true, "prompt": "consent", "tokenAccessType": "offline",
            "none": null,
        },
    });
    let settings = read("oidc", more).unwrap();
    let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let extra = [
        ("resource_id", "r"),
        ("api_key", "k"),
        ("some_url_part", "true"),
        ("prompt", "consent"),
        ("token_access_type", "offline"),
    ];
    assert_eq!(settings.extra, pairs(&extra));
    let shown = [
        ("prompt", "consent"),
        ("max_age", "60"),
        ("ui_locales", "pt"),
        ("resource_id", "r"),
        ("some_url_part", "true"),
        ("token_access_type", "offline"),
    ];
    assert_eq!(settings.authorization_extra, pairs(&shown), "no API key in an address");
}
