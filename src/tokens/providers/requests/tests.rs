//! Tests of what is sent, byte by byte.

use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::*;
use crate::tokens::providers::{social_factories, social_factory, sso_provider, sso_providers};

fn factory(id: &str) -> &'static Factory {
    social_factory(id).or(sso_provider(id)).unwrap()
}

fn settings(id: &str, more: Value) -> Settings {
    let mut config = json!({ "clientId": "cid", "clientSecret": "cs" });
    let standard = match factory(id).provider {
        Provider::OAuth2 | Provider::Oidc => json!({
            "authorizationEndpoint": "http://idp/auth", "tokenEndpoint": "http://idp/token",
            "userInfoEndpoint": "http://idp/me", "idTokenVerificationConfig": { "jwksUri": "http://idp/jwks" },
        }),
        Provider::SsoOidc | Provider::SsoEntra | Provider::SsoOkta => json!({ "issuer": "http://idp" }),
        _ => json!({}),
    };
    for part in [standard, more] {
        config.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    }
    Settings::read(factory(id), &config).unwrap()
}

fn request(endpoint: &str) -> AuthorizationRequest<'_> {
    AuthorizationRequest {
        authorization_endpoint: endpoint,
        state: "s1",
        redirect_uri: "https://app/cb",
        scope: None,
        nonce: None,
        code_challenge: None,
    }
}

fn secret(text: &str) -> SecretString {
    SecretString::from(text)
}

fn plain(form: &[(String, SecretString)]) -> String {
    let pairs: Vec<_> =
        form.iter().map(|(name, value)| format!("{name}={}", value.expose_secret())).collect();
    pairs.join("&")
}

#[test]
fn the_contracts_example_is_met_to_the_byte() {
    let settings = settings("oauth2", json!({ "scope": "read" }));
    let request =
        AuthorizationRequest { scope: Some("read write offline_access"), ..request("http://idp/auth") };
    let uri = settings.authorization_uri(factory("oauth2"), &request).unwrap();
    assert_eq!(
        uri,
        "http://idp/auth?response_type=code&client_id=cid&scope=read+write+offline_access\
         &redirect_uri=https%3A%2F%2Fapp%2Fcb&state=s1"
    );
}

#[test]
fn the_uri_of_each_provider() {
    let tail = "redirect_uri=https%3A%2F%2Fapp%2Fcb&state=s1";
    let optional =
        json!({ "authRequestOptionalConfig": { "maxAge": "5" }, "customConfig": { "audience": "a&b" } });
    let google = json!({ "offlineAccess": true, "prompts": ["consent", "select_account"] });
    let rows = [
        (
            "github-universal",
            json!({}),
            format!(
                "https://github.com/login/oauth/authorize?response_type=code&client_id=cid&scope=read%3Auser+user%3Aemail&{tail}"
            ),
        ),
        (
            "google-universal",
            google,
            format!(
                "https://accounts.google.com/o/oauth2/v2/auth?response_type=code&client_id=cid&scope=openid+profile+email&{tail}&prompt=consent+select_account&access_type=offline"
            ),
        ),
        (
            "facebook-universal",
            json!({}),
            format!(
                "https://www.facebook.com/v13.0/dialog/oauth?response_type=code&client_id=cid&scope=email+public_profile&{tail}"
            ),
        ),
        ("oauth2", json!({}), format!("http://idp/auth?response_type=code&client_id=cid&{tail}")),
        (
            "oidc",
            optional,
            format!(
                "http://idp/auth?response_type=code&client_id=cid&scope=openid&{tail}&max_age=5&audience=a%26b"
            ),
        ),
        (
            "github-universal",
            json!({ "authorizationEndpoint": "https://ghe.example/login/oauth/authorize", "scope": "repo" }),
            format!(
                "https://ghe.example/login/oauth/authorize?response_type=code&client_id=cid&scope=repo&{tail}"
            ),
        ),
    ];
    for (id, more, expected) in rows {
        let settings = settings(id, more);
        let endpoint = settings.endpoints(factory(id)).unwrap().authorization;
        assert_eq!(settings.authorization_uri(factory(id), &request(endpoint)).unwrap(), expected, "{id}");
    }
}

#[test]
fn workspace_asks_which_account_and_for_consent_only_when_it_must() {
    for (offline, end) in [
        (true, "&state=s1&prompt=consent+select_account&access_type=offline"),
        (false, "&state=s1&prompt=select_account"),
    ] {
        let settings = settings("GoogleWorkspace", json!({ "offlineAccess": offline }));
        let uri = settings.authorization_uri(factory("GoogleWorkspace"), &request("https://g/auth")).unwrap();
        assert!(uri.ends_with(end), "{uri}");
    }
}

#[test]
fn nonce_and_challenge_stand_between_state_and_the_rest() {
    let settings = settings("oidc", json!({ "customConfig": { "x": "y" } }));
    let request = AuthorizationRequest {
        nonce: Some("n-1"),
        code_challenge: Some("ch-1"),
        ..request("http://idp/auth")
    };
    let uri = settings.authorization_uri(factory("oidc"), &request).unwrap();
    assert!(uri.ends_with("&state=s1&nonce=n-1&code_challenge=ch-1&code_challenge_method=S256&x=y"), "{uri}");
}

#[test]
fn a_query_in_the_endpoint_is_kept() {
    let settings = settings("oauth2", json!({}));
    for (endpoint, start) in [
        ("http://idp/auth?", "http://idp/auth?response_type=code&"),
        ("http://idp/auth?p=b2c_1", "http://idp/auth?p=b2c_1&response_type=code&"),
        ("http://idp/auth?p=b2c_1&", "http://idp/auth?p=b2c_1&response_type=code&"),
    ] {
        let uri = settings.authorization_uri(factory("oauth2"), &request(endpoint)).unwrap();
        assert!(uri.starts_with(start), "{uri}");
    }
}

#[test]
fn nothing_can_be_smuggled_into_the_uri() {
    let settings = settings("oauth2", json!({}));
    let hostile = "x&redirect_uri=https://evil#?%26 \u{e4}";
    let request1 =
        AuthorizationRequest { state: hostile, nonce: Some(hostile), ..request("http://idp/auth") };
    let uri = settings.authorization_uri(factory("oauth2"), &request1).unwrap();
    let url = url::Url::parse(&uri).unwrap();
    let found =
        |name: &str| url.query_pairs().filter(|(n, _)| n == name).map(|(_, v)| v.into_owned()).collect();
    let (states, targets): (Vec<_>, Vec<_>) = (found("state"), found("redirect_uri"));
    assert_eq!((states, targets), (vec![hostile.to_owned()], vec!["https://app/cb".to_owned()]));

    let long = "x".repeat(2049);
    let base = request("http://idp/auth");
    let rows = [
        (
            AuthorizationRequest { authorization_endpoint: "javascript:alert(1)//", ..base },
            "authorizationEndpoint",
        ),
        (
            AuthorizationRequest { authorization_endpoint: "http://idp/?state=x", ..base },
            "authorizationEndpoint",
        ),
        (AuthorizationRequest { state: "", ..base }, "state"),
        (AuthorizationRequest { state: &long, ..base }, "state"),
        (AuthorizationRequest { redirect_uri: "a\r\nb", ..base }, "redirectUri"),
        (AuthorizationRequest { scope: Some("a\"b"), ..base }, "scope"),
        (AuthorizationRequest { scope: Some(&long), ..base }, "scope"),
    ];
    for (request, member) in rows {
        let bad = settings.authorization_uri(factory("oauth2"), &request).unwrap_err();
        assert_eq!(bad.member, member);
    }
}

#[test]
fn the_scope_to_ask() {
    let rows = [
        // factory, configured, custom, asked
        ("github-universal", "", None, Some("read:user user:email")),
        ("github-universal", "repo", None, Some("repo")),
        ("github-universal", "repo", Some("gist"), Some("gist")),
        ("github-universal", "repo", Some(""), Some("repo")),
        ("google-universal", "", None, Some("openid profile email")),
        ("facebook-universal", "email,public_profile", None, Some("email,public_profile")),
        ("oauth2", "", None, None),
        ("oauth2", "a b", None, Some("a b")),
        ("oidc", "", None, Some("openid")),
        ("oidc", "profile email", None, Some("profile email openid")),
        ("oidc", "profile openid", None, Some("profile openid")),
        ("oidc", "openid2", None, Some("openid2 openid")),
        ("oidc", "profile", Some("offline_access"), Some("offline_access openid")),
        ("OIDC", "", None, Some("openid profile email")),
        ("Okta", "offline_access email groups", None, Some("openid profile email offline_access groups")),
        ("SAML", "", None, None),
    ];
    for (id, configured, custom, asked) in rows {
        let settings = settings(id, json!({ "scope": configured }));
        assert_eq!(
            settings.scope_to_ask(factory(id), custom).as_deref(),
            asked,
            "{id} {configured} {custom:?}"
        );
    }
}

#[test]
fn a_code_is_turned_in_with_its_verifier() {
    let settings = settings("oauth2", json!({ "customConfig": { "realmName": "r" } }));
    let verifier = secret("v");
    let form = |verifier| plain(&settings.code_exchange(factory("oauth2"), "c", "https://app/cb", verifier));
    let start = "grant_type=authorization_code&code=c&redirect_uri=https://app/cb";
    assert_eq!(form(Some(&verifier)), format!("{start}&code_verifier=v&realm_name=r"));
    assert_eq!(form(None), format!("{start}&realm_name=r"));
}

#[test]
fn a_refresh_names_a_scope_for_entra_only() {
    let start = "grant_type=refresh_token&refresh_token=rt";
    let custom = json!({ "scope": "a offline_access", "customConfig": { "tenantHint": "t" } });
    let rows = [
        ("github-universal", Some(start.to_owned())),
        ("google-universal", Some(start.to_owned())),
        ("facebook-universal", None),
        ("oauth2", Some(format!("{start}&tenant_hint=t"))),
        ("oidc", Some(format!("{start}&tenant_hint=t"))),
        ("OIDC", Some(start.to_owned())),
        ("Okta", Some(start.to_owned())),
        ("GoogleWorkspace", Some(start.to_owned())),
        ("AzureAdOidc", Some(format!("{start}&scope=openid profile email a offline_access"))),
        ("SAML", None),
        ("slack-universal", None),
    ];
    for (id, expected) in rows {
        let form = settings(id, custom.clone()).refresh(factory(id), &secret("rt"));
        assert_eq!(form.as_deref().map(plain), expected, "{id}");
    }
}

#[test]
fn facebook_swaps_the_short_token() {
    let form = facebook_swap(&settings("facebook-universal", json!({})), &secret("short"));
    assert_eq!(
        plain(&form),
        "grant_type=fb_exchange_token&client_id=cid&client_secret=cs&fb_exchange_token=short"
    );
}

#[test]
fn addresses_are_built_in_configured_or_discovered() {
    let rows = [
        ("github-universal", Some("https://github.com/login/oauth/access_token")),
        ("google-universal", Some("https://oauth2.googleapis.com/token")),
        ("facebook-universal", Some("https://graph.facebook.com/v13.0/oauth/access_token")),
        ("oauth2", Some("http://idp/token")),
        ("oidc", Some("http://idp/token")),
        ("OIDC", None),
        ("GoogleWorkspace", None),
        ("apple-universal", None),
    ];
    for (id, expected) in rows {
        assert_eq!(settings(id, json!({})).token_endpoint(factory(id)), expected, "{id}");
    }
    let own = settings("google-universal", json!({ "tokenEndpoint": "http://own/token" }));
    let google = factory("google-universal");
    assert_eq!(own.token_endpoint(google), Some("http://own/token"));
    assert_eq!(own.revocation_endpoint(google), None, "a token of one's own server does not go to Google");
    let plain = settings("google-universal", json!({}));
    assert_eq!(plain.revocation_endpoint(google), Some("https://oauth2.googleapis.com/revoke"));
    let workspace = factory("GoogleWorkspace");
    assert_eq!(settings("GoogleWorkspace", json!({})).issuer(workspace), Some("https://accounts.google.com"));
    assert_eq!(settings("Okta", json!({})).issuer(factory("Okta")), Some("http://idp"));
}

#[test]
fn profiles_come_from_where_the_provider_has_them() {
    let github = ProfileSource::UserInfo("https://api.github.com/user");
    let rows = [
        ("github-universal", json!({}), Some(github)),
        ("oauth2", json!({}), Some(ProfileSource::UserInfo("http://idp/me"))),
        ("oidc", json!({}), Some(ProfileSource::IdTokenAndUserInfo(Some("http://idp/me")))),
        ("oidc", json!({ "userInfoEndpoint": null }), Some(ProfileSource::IdToken)),
        ("AzureAdOidc", json!({}), Some(ProfileSource::IdTokenAndUserInfo(None))),
        ("SAML", json!({}), None),
        ("discord-universal", json!({}), None),
    ];
    for (id, more, expected) in rows {
        assert_eq!(settings(id, more).profile_source(factory(id)), expected, "{id}");
    }
}

#[test]
fn small_rules_of_each_provider() {
    let with_nonce = ["oidc", "OIDC", "Okta", "AzureAdOidc", "GoogleWorkspace"];
    for factory in social_factories().iter().chain(sso_providers()) {
        let id = factory.id;
        let settings = settings(id, json!({}));
        assert_eq!(settings.needs_nonce(factory), with_nonce.contains(&id), "{id}");
        assert_eq!(Settings::timeout(factory), (id == "github-universal").then_some(5), "{id}");
        let must_have: &[&str] = match id {
            "github-universal" => &["scope", "token_type"],
            "oauth2" => &["token_type"],
            "facebook-universal" => &["expires_in"],
            _ => &[],
        };
        assert_eq!(settings.must_have(factory), must_have, "{id}");
    }
}

#[test]
fn pkce_is_on_unless_switched_off_or_known_to_be_missing() {
    let says =
        |supports_pkce| Endpoints { authorization: "http://idp/auth", supports_pkce, promises_iss: false };
    let rows = [
        ("oauth2", json!({}), true, true),
        ("oauth2", json!({ "pkce": false }), true, false),
        ("OIDC", json!({}), true, true),
        ("OIDC", json!({}), false, false),
        ("AzureAdOidc", json!({}), false, true),
        ("AzureAdOidc", json!({ "pkce": false }), true, false),
    ];
    for (id, more, supported, expected) in rows {
        let settings = settings(id, more.clone());
        assert_eq!(settings.wants_pkce(factory(id), &says(supported)), expected, "{id} {more} {supported}");
    }
}

#[test]
fn an_answer_of_another_issuer_is_not_accepted() {
    let rows = [
        // promised, expected, found, accepted
        (false, Some("https://a"), None, true),
        (true, Some("https://a"), None, false),
        (true, None, None, false),
        (false, Some("https://a"), Some("https://a"), true),
        (false, Some("https://a"), Some("https://a/"), false),
        (true, Some("https://a"), Some("https://b"), false),
        (false, None, Some("https://b"), true),
    ];
    for (promises_iss, expected, found, accepted) in rows {
        let endpoints = Endpoints { authorization: "http://idp/auth", supports_pkce: true, promises_iss };
        assert_eq!(endpoints.accepts_iss(expected, found), accepted, "{promises_iss} {expected:?} {found:?}");
    }
}
