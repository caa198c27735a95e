//! Users with tokens of a provider, as the API makes them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use serde_json::{Value, json};
use url::form_urlencoded;

use crate::TARGET;
use crate::idp::{CLIENT, FakeIdp};
use crate::installation::Daemon;
use crate::load;

/// Users that come at the same time.
const AT_ONCE: usize = 16;
const CALLBACK: &str = "http://127.0.0.1:8281/callback";
const STATE: &str = "s-1";

/// Makes a connector and so many users with an account there; their tokens, as values of `Authorization`.
pub async fn link(daemon: &Daemon, idp: &FakeIdp, users: u64) -> Vec<String> {
    let office = &Office::open(daemon, idp).await;
    futures_util::stream::iter(0..users)
        .map(|n| office.link(format!("user_{n:07}")))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await
}

/// Who may make users and act for them.
struct Office<'a> {
    daemon: &'a Daemon,
    idp: &'a FakeIdp,
    admin: String,
    /// The credentials of the application that acts for users.
    app: [String; 2],
    connector: String,
}

impl<'a> Office<'a> {
    async fn open(daemon: &'a Daemon, idp: &'a FakeIdp) -> Self {
        let admin = daemon.bearer().await;
        let mut this = Self { daemon, idp, admin, app: Default::default(), connector: String::new() };
        let center = json!({ "enabled": true, "fields": { "social": "Edit" } });
        this.ask("PATCH", "/api/account-center", &this.admin, &center).await;
        let app = json!({ "name": "the users'", "kind": "traditional", "scopes": [],
                          "redirect_uris": [CALLBACK], "allow_token_exchange": true });
        let app = this.ask("POST", "/v1/apps", &this.admin, &app).await;
        let connector = json!({ "connectorId": "oauth2", "config": this.config(), "enableTokenStorage": true,
                                "metadata": { "target": TARGET, "name": { "en": TARGET } } });
        let connector = this.ask("POST", "/api/connectors", &this.admin, &connector).await;
        this.app = [text(&app["client_id"]), text(&app["client_secret"])];
        this.connector = text(&connector["id"]);
        this
    }

    fn config(&self) -> Value {
        let at = |path: &str| format!("{}{path}", self.idp.url);
        json!({
            "authorizationEndpoint": at("/auth"),
            "tokenEndpoint": at("/token"),
            "userInfoEndpoint": at("/userinfo"),
            "tokenEndpointResponseType": "json",
            "tokenEndpointAuthMethod": "client_secret_basic",
            "clientId": CLIENT,
            "clientSecret": self.idp.client_secret,
            "scope": "read write",
            "profileMap": { "id": "id", "name": "name" },
        })
    }

    /// A new user who has signed in at the provider and linked the account.
    async fn link(&self, name: String) -> String {
        let user = self.ask("POST", "/api/users", &self.admin, &json!({ "username": name })).await;
        let bearer = self.session(&user["id"]).await;
        let asked = json!({ "connectorId": self.connector, "state": STATE, "redirectUri": CALLBACK });
        let begun = self.ask("POST", "/api/verifications/social", &bearer, &asked).await;
        let (code, state) = self.idp.authorize(begun["authorizationUri"].as_str().unwrap(), &name);
        let data = json!({ "code": code, "state": state, "redirectUri": CALLBACK });
        let record = &begun["verificationRecordId"];
        let asked = json!({ "verificationRecordId": record, "connectorData": data });
        self.ask("POST", "/api/verifications/social/verify", &bearer, &asked).await;
        let asked = json!({ "newIdentifierVerificationRecordId": record });
        self.ask("POST", "/api/my-account/identities", &bearer, &asked).await;
        bearer
    }

    /// A user's own token, by impersonation.
    async fn session(&self, user: &Value) -> String {
        let made = self.ask("POST", "/api/subject-tokens", &self.admin, &json!({ "userId": user })).await;
        let [id, secret] = &self.app;
        let form = form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
            .append_pair("subject_token", made["subjectToken"].as_str().unwrap())
            .append_pair("subject_token_type", "urn:logto:token-type:impersonation_token")
            .append_pair("scope", "openid identities")
            .finish();
        let basic = format!("Basic {}", STANDARD.encode(format!("{id}:{secret}")));
        let body = ("application/x-www-form-urlencoded", form.as_str());
        let token = self.send(&load::request("POST", "/oidc/token", &basic, Some(body))).await;
        format!("Bearer {}", token["access_token"].as_str().unwrap())
    }

    async fn ask(&self, method: &str, path: &str, authorization: &str, body: &Value) -> Value {
        let body = body.to_string();
        self.send(&load::request(method, path, authorization, Some(("application/json", &body)))).await
    }

    /// The answer to what must not fail; `Null` if it has no body.
    async fn send(&self, request: &[u8]) -> Value {
        let reply = load::ask(self.daemon.address, request).await.unwrap();
        let body = String::from_utf8(reply.body).unwrap();
        let asked = || String::from_utf8_lossy(request).lines().next().unwrap_or_default().to_owned();
        assert!((200..300).contains(&reply.status), "{}: {} {body}", asked(), reply.status);
        if body.is_empty() { Value::Null } else { serde_json::from_str(&body).unwrap() }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}")).to_owned()
}
