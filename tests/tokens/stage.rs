//! A daemon, a fake identity provider, and what an administrator, a user and a user's application do with them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::daemon::{Api, Options, Peer, TestDaemon};
use crate::ground;
use crate::idp::{CLIENT, FakeIdp, Mode};
use crate::postgres::Postgres;

pub use crate::ground::Engine;

/// The target of the connector that every stage has.
pub const ACME: &str = "acme";
/// Where the user's application takes codes.
pub const CALLBACK: &str = "http://127.0.0.1:8281/callback";
/// The connector's scope.
pub const SCOPE: &str = "read write";
/// The code of every answer to a set that is of no use without its user.
pub const EXPIRED: &str = "secrets.third_party_token_set.access_token_expired";
/// The code where nothing is stored.
pub const NOTHING: &str = "secrets.third_party_token_set.token_not_found";
/// The code of a record that is not there, not verified, used or somebody else's.
pub const USED: &str = "verification_record.not_found";

const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const IMPERSONATION: &str = "urn:logto:token-type:impersonation_token";

/// The daemon with everything around it.
pub struct Stage {
    pub ground: ground::Stage,
    pub peer: Option<Peer>,
    pub idp: FakeIdp,
    pub admin: Api,
    /// The id of the connector of [`ACME`].
    pub connector: String,
    /// The application that acts for users.
    pub app: App,
    client: Client,
}

/// An application's credentials.
#[derive(Clone)]
pub struct App {
    pub id: String,
    pub secret: String,
}

impl App {
    fn of(made: &Value) -> Self {
        let text = |name: &str| made[name].as_str().unwrap_or_else(|| panic!("no {name}: {made}")).to_owned();
        Self { id: text("client_id"), secret: text("client_secret") }
    }
}

/// A user, and a session in the user's name.
pub struct User {
    pub id: String,
    pub api: Api,
}

/// Seconds since the epoch.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed()
}

/// The path of a user's token for a target.
pub fn path(target: &str) -> String {
    format!("/api/my-account/identities/{target}/access-token")
}

/// The JSON of an answer of the given status.
pub async fn body(answer: Response, status: u16) -> Value {
    let now = answer.status().as_u16();
    let text = answer.text().await.unwrap();
    assert_eq!(now, status, "{text}");
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

/// Checks an error of the Logto family; its body.
pub async fn refused(answer: Response, status: u16, code: &str) -> Value {
    assert!(answer.headers().contains_key("Logto-Core-Request-Id"));
    let body = body(answer, status).await;
    assert_eq!(body["code"], code, "{body}");
    assert!(body["message"].is_string(), "{body}");
    body
}

/// The token in an answer, which nobody may keep.
pub async fn token_in(answer: Response) -> String {
    let headers = answer.headers().clone();
    let body = body(answer, 200).await;
    assert_eq!(headers["Cache-Control"], "no-store");
    assert_eq!(headers.get("ETag"), None);
    for member in ["refresh_token", "id_token"] {
        assert_eq!(body.get(member), None, "{member} was given out");
    }
    body["access_token"].as_str().expect("an access token").to_owned()
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}")).to_owned()
}

/// Waits until it is so.
pub async fn until(what: &str, patience: Duration, look: impl AsyncFn() -> bool) {
    let begun = Instant::now();
    while !look().await {
        assert!(begun.elapsed() < patience, "{what} does not come to be");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Stage {
    /// `lacre dev`.
    pub async fn dev(mode: Mode) -> Self {
        let daemon = TestDaemon::dev().await;
        Self::with(ground::Stage::of(daemon, Engine::Sqlite, String::new()), mode).await
    }

    /// One `lacre serve`, always on the same port.
    pub async fn serve(engine: Engine, mode: Mode, more: &str) -> Self {
        let more = format!("[upstream]\nloopback_http = true\n{more}");
        Self::with(ground::Stage::on(engine, &more).await, mode).await
    }

    /// Two daemons on one PostgreSQL.
    pub async fn pair(mode: Mode) -> Self {
        let url = Postgres::shared().database();
        let text = ground::config(
            "",
            &format!(
                "[issuer]\nurl = \"http://127.0.0.1:{{port}}\"\n[database]\nurl = \"{url}\"\n\
                 [keys]\npropagation = \"2s\"\nskew = \"0s\"\n[upstream]\nloopback_http = true\n"
            ),
        );
        let daemon = TestDaemon::start(Options { config: Some(text.clone()), ..Options::default() }).await;
        let peer = Peer::start(&daemon, &text);
        Self::of(ground::Stage::of(daemon, Engine::Postgres, url), Some(peer), mode).await
    }

    /// One `lacre serve` as it is configured by default: no provider on this machine. It has no connector.
    pub async fn closed() -> Self {
        Self::without_connector(ground::Stage::on(Engine::Sqlite, "").await, None, Mode::Strict).await
    }

    /// On a daemon that runs already.
    pub async fn with(ground: ground::Stage, mode: Mode) -> Self {
        Self::of(ground, None, mode).await
    }

    async fn of(ground: ground::Stage, peer: Option<Peer>, mode: Mode) -> Self {
        let mut stage = Self::without_connector(ground, peer, mode).await;
        stage.connector = stage.connect(ACME).await;
        stage
    }

    async fn without_connector(ground: ground::Stage, peer: Option<Peer>, mode: Mode) -> Self {
        let daemon = &ground.daemon;
        let idp = FakeIdp::start(mode, &daemon.canary);
        let admin = daemon.api().await;
        let center = json!({ "enabled": true, "fields": { "social": "Edit" } });
        patch(&admin, "/api/account-center", &center).await;
        let app = Self::application(&ground, &admin).await;
        let client = Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        Self { ground, peer, idp, admin, connector: String::new(), app, client }
    }

    /// An application that may exchange tokens: that of `lacre dev`, or a new one where `lacre dev` never was.
    async fn application(ground: &ground::Stage, admin: &Api) -> App {
        let is_dev =
            ground.texts("SELECT name AS t FROM applications").contains(&"dev application".to_owned());
        if is_dev {
            return App::of(&ground.daemon.dev_json()["application"]);
        }
        let asked = json!({ "name": "the users'", "kind": "traditional", "scopes": [],
                            "redirect_uris": [CALLBACK], "allow_token_exchange": true });
        App::of(&body(admin.post("/v1/apps", &asked).await, 201).await)
    }

    /// The daemon.
    pub const fn daemon(&self) -> &TestDaemon {
        &self.ground.daemon
    }

    /// The configuration of an OAuth 2.0 connector to the fake provider.
    pub fn config(&self) -> Value {
        let at = |path: &str| format!("{}{path}", self.idp.url);
        json!({
            "authorizationEndpoint": at("/auth"),
            "tokenEndpoint": at("/token"),
            "userInfoEndpoint": at("/userinfo"),
            "revocationEndpoint": at("/revoke"),
            "tokenEndpointResponseType": "json",
            "tokenEndpointAuthMethod": "client_secret_basic",
            "clientId": CLIENT,
            "clientSecret": self.idp.client_secret,
            "scope": SCOPE,
            "profileMap": { "id": "id", "name": "name", "email": "email" },
        })
    }

    /// Makes a connector for another target at the same provider; its id.
    pub async fn connect(&self, target: &str) -> String {
        self.connect_with("oauth2", target, self.config()).await
    }

    /// Makes a connector with token storage; its id.
    pub async fn connect_with(&self, factory: &str, target: &str, config: Value) -> String {
        text(&body(self.try_connect(factory, target, config).await, 200).await["id"])
    }

    /// The same, whatever comes of it.
    pub async fn try_connect(&self, factory: &str, target: &str, config: Value) -> Response {
        let asked = json!({ "connectorId": factory, "config": config, "enableTokenStorage": true,
                            "metadata": { "target": target, "name": { "en": target } } });
        self.admin.post("/api/connectors", &asked).await
    }

    /// Makes a user and signs in as one.
    pub async fn user(&self, name: &str) -> User {
        let made = body(self.admin.post("/api/users", &json!({ "username": name })).await, 200).await;
        let id = text(&made["id"]);
        let api = self.session(&id, "openid identities").await;
        User { id, api }
    }

    /// A user's session with those scopes, by impersonation (contract, section 4.4).
    pub async fn session(&self, user: &str, scope: &str) -> Api {
        let subject = self.subject_token(user).await;
        let token = text(&body(self.exchange(&self.app, &subject, scope).await, 200).await["access_token"]);
        self.daemon().hide(&token);
        self.daemon().api_of(&token)
    }

    /// A token that stands for the user, once.
    pub async fn subject_token(&self, user: &str) -> String {
        let made = self.admin.post("/api/subject-tokens", &json!({ "userId": user })).await;
        let token = text(&body(made, 201).await["subjectToken"]);
        self.daemon().hide(&token);
        token
    }

    /// Has a subject token exchanged for the user's own.
    pub async fn exchange(&self, app: &App, subject: &str, scope: &str) -> Response {
        let form = [
            ("grant_type", TOKEN_EXCHANGE),
            ("subject_token", subject),
            ("subject_token_type", IMPERSONATION),
            ("scope", scope),
        ];
        self.ask(app, &form).await
    }

    /// A request at the daemon's token endpoint.
    pub async fn ask(&self, app: &App, form: &[(&str, &str)]) -> Response {
        let request = self.client.post(format!("{}/oidc/token", self.daemon().url));
        request.basic_auth(&app.id, Some(&app.secret)).form(form).send().await.unwrap()
    }

    /// Begins a verification: its record's id and where the browser goes.
    pub async fn begin(&self, user: &User, connector: &str, scope: Option<&str>) -> (String, String) {
        let mut asked = json!({ "connectorId": connector, "state": "s-1", "redirectUri": CALLBACK });
        if let Some(scope) = scope {
            asked["scope"] = json!(scope);
        }
        let begun = body(user.api.post("/api/verifications/social", &asked).await, 201).await;
        (text(&begun["verificationRecordId"]), text(&begun["authorizationUri"]))
    }

    /// Brings back what the provider gave the browser.
    pub async fn verify(&self, user: &User, record: &str, code: &str) -> Response {
        let data = json!({ "code": code, "state": "s-1", "redirectUri": CALLBACK });
        let asked = json!({ "verificationRecordId": record, "connectorData": data });
        user.api.post("/api/verifications/social/verify", &asked).await
    }

    /// Signs in at the provider as `subject`; the id of the verified record.
    pub async fn verified(&self, user: &User, subject: &str, scope: Option<&str>) -> String {
        self.verified_at(user, &self.connector, subject, scope).await
    }

    /// The same, through another connector.
    pub async fn verified_at(
        &self,
        user: &User,
        connector: &str,
        subject: &str,
        scope: Option<&str>,
    ) -> String {
        let (record, uri) = self.begin(user, connector, scope).await;
        let (code, state) = self.idp.authorize(&uri, subject);
        assert_eq!(state, "s-1");
        let verified = body(self.verify(user, &record, &code).await, 200).await;
        assert_eq!(verified["verificationRecordId"], record.as_str());
        record
    }

    /// Links what was verified.
    pub async fn link(&self, user: &User, record: &str) -> Response {
        let asked = json!({ "newIdentifierVerificationRecordId": record });
        user.api.post("/api/my-account/identities", &asked).await
    }

    /// A new user with an identity at the provider and its tokens; the subject there is the user's name.
    pub async fn linked(&self, name: &str) -> User {
        let connector = self.connector.clone();
        self.linked_at(&connector, name).await
    }

    /// The same, through another connector.
    pub async fn linked_at(&self, connector: &str, name: &str) -> User {
        let user = self.user(name).await;
        let record = self.verified_at(&user, connector, name, None).await;
        let linked = self.link(&user, &record).await;
        assert_eq!(linked.status(), 204, "{}", linked.text().await.unwrap());
        user
    }

    /// Writes a new set by `PUT`, after the user has been to the provider again.
    pub async fn reauthorise(&self, user: &User, subject: &str) -> Response {
        let record = self.verified(user, subject, None).await;
        put_token(user, ACME, &record).send().await.unwrap()
    }

    /// The token of [`ACME`], which there is.
    pub async fn token(&self, user: &User) -> String {
        token_in(self.read(user).await).await
    }

    /// Reads the token of [`ACME`].
    pub async fn read(&self, user: &User) -> Response {
        user.api.get(&path(ACME)).await
    }

    /// The metadata of a user's set, as an administrator sees it; `Null` if there is none.
    pub async fn metadata(&self, user: &User, target: &str) -> Value {
        let path = format!("/api/users/{}/identities/{target}?includeTokenSecret=true", user.id);
        body(self.admin.get(&path).await, 200).await["tokenSecret"].clone()
    }

    /// Every stored access token ends then, as far as the daemon knows, after a life of an hour.
    pub fn ends_in(&self, seconds: i64) {
        self.ends_where("1 = 1", seconds);
    }

    /// The same for some of them. How early a token is replaced goes by how long it lives.
    pub fn ends_where(&self, rule: &str, seconds: i64) {
        let at = now() + seconds;
        let set = format!("expires_at = {at}, issued_at = {}", (at - 3600) * 1_000_000);
        self.ground.run(&format!("UPDATE token_sets SET {set} WHERE {rule}"));
    }

    /// Every stored access token has ended.
    pub fn expire(&self) {
        self.ends_in(-10);
    }

    /// The states of the sets, in the order in which they were made.
    pub fn states(&self) -> Vec<String> {
        self.ground.texts("SELECT state AS t FROM token_sets ORDER BY id")
    }

    /// How many sets there are.
    pub fn sets(&self) -> usize {
        self.states().len()
    }

    /// Waits until the leases of refreshes have run out whose holders are gone.
    pub async fn leases_have_ended(&self) {
        let longest = "SELECT CAST(COALESCE(MAX(lease_until), 0) AS TEXT) AS t FROM token_sets";
        let ends: i64 = self.ground.texts(longest)[0].parse().unwrap();
        let left = (ends / 1_000_000 + 2 - now()).clamp(0, 120);
        tokio::time::sleep(Duration::from_secs(left.cast_unsigned())).await;
    }

    /// What the tenant's log has.
    pub async fn records(&self) -> Vec<Value> {
        let lines = self.admin.audit_lines().await;
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Goes on after the daemon was started again, which may be at another address.
    pub async fn found_again(&mut self) {
        self.admin = self.daemon().api().await;
    }

    /// A user's session with the daemon as it is now.
    pub fn again(&self, user: User) -> User {
        User { api: self.daemon().api_of(&user.api.token), ..user }
    }

    /// A user's session at the other daemon.
    pub fn at_peer(&self, user: &User) -> Api {
        user.api.at(&self.peer.as_ref().expect("a second daemon").url)
    }

    /// Ends the daemons; nothing secret is left lying about, and the log is whole.
    pub async fn finish(self) {
        let Self { ground, peer, .. } = self;
        assert!(!ground.daemon.log().contains("panicked"), "{}", ground.daemon.log());
        drop(peer);
        ground.daemon.finish().await;
    }
}

/// The request that writes what was verified over the stored set.
pub fn put_token(user: &User, target: &str, record: &str) -> RequestBuilder {
    user.api.request(Method::PUT, &path(target)).json(&json!({ "verificationRecordId": record }))
}

/// A change that is accepted; the whole.
pub async fn patch(api: &Api, path: &str, change: &Value) -> Value {
    body(api.request(Method::PATCH, path).json(change).send().await.unwrap(), 200).await
}
