//! The whole with a real OpenID provider (npm `oidc-provider`), whose refresh tokens rotate and whose tokens live for
//! seconds: link, read, expire, refresh, re-authorise, revoke, unlink, with `lacre dev` and nothing in between.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::idp::Mode;
use crate::scripts;
use crate::stage::{EXPIRED, NOTHING, Stage, User, body, path, put_token, refused, text, token_in, until};

/// Seconds for which an access token lives there.
const LIFETIME: u64 = 6;
const TARGET: &str = "real";

struct Provider {
    child: Child,
    facts: Vec<(String, String)>,
}

impl Provider {
    fn start() -> Self {
        let mut command = scripts::node("upstream.mjs");
        // It ends when its input does, however this process ends.
        command.env("IDP_DIE_WITH_STDIN", "1").env("IDP_ACCESS_TOKEN_TTL", LIFETIME.to_string());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("idp ready "), "the provider did not start: {line:?}");
        let words = line.split_whitespace().filter_map(|word| word.split_once('='));
        let facts = words.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { child, facts }
    }

    fn fact(&self, name: &str) -> &str {
        &self.facts.iter().find(|(known, _)| known == name).unwrap().1
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.fact("issuer"))
    }

    async fn report(&self) -> Value {
        reqwest::get(self.at("/test/report")).await.unwrap().json().await.unwrap()
    }

    /// Refreshes that it granted; it has refused nothing and found no token used twice.
    async fn refreshes(&self) -> u64 {
        let report = self.report().await;
        assert_eq!((&report["refused"], &report["reused"]), (&json!([]), &json!(0)), "{report}");
        report["granted"]["refresh_token"].as_u64().unwrap_or(0)
    }

    /// Every consent is taken back.
    async fn end(&self) {
        reqwest::Client::new().post(self.at("/test/end")).send().await.unwrap().error_for_status().unwrap();
    }

    /// Whether the token opens its user's account.
    async fn accepts(&self, token: &str) -> bool {
        let answer = reqwest::Client::new().get(self.at("/me")).bearer_auth(token).send().await.unwrap();
        match answer.status().as_u16() {
            200 => answer.json::<Value>().await.unwrap()["sub"] == self.fact("account"),
            401 => false,
            other => panic!("the provider answers {other}"),
        }
    }

    fn config(&self) -> Value {
        json!({
            "authorizationEndpoint": self.at("/auth"),
            "tokenEndpoint": self.at("/token"),
            "userInfoEndpoint": self.at("/me"),
            "revocationEndpoint": self.at("/token/revocation"),
            "clientId": self.fact("client_id"),
            "clientSecret": self.fact("client_secret"),
            "tokenEndpointAuthMethod": "client_secret_basic",
            "scope": "openid profile email offline_access",
            "authRequestOptionalConfig": { "prompt": "consent" },
            "idTokenVerificationConfig": { "jwksUri": self.at("/jwks"), "issuer": self.fact("issuer") },
        })
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Goes to the provider and comes back, as the user's browser does; the id of the verified record.
async fn verified(stage: &Stage, user: &User, connector: &str) -> String {
    let (record, uri) = stage.begin(user, connector, None).await;
    let visit = scripts::run(&mut scripts::node("visit.mjs"), &uri);
    assert!(visit.status.success(), "{}", String::from_utf8_lossy(&visit.stderr));
    let mut data: Value = serde_json::from_slice(&visit.stdout).unwrap();
    assert_eq!(data["state"], "s-1");
    data["redirectUri"] = json!(crate::stage::CALLBACK);
    let asked = json!({ "verificationRecordId": record, "connectorData": data });
    body(user.api.post("/api/verifications/social/verify", &asked).await, 200).await;
    record
}

async fn read(stage: &Stage, user: &User) -> String {
    let token = token_in(user.api.get(&path(TARGET)).await).await;
    stage.daemon().hide(&token);
    token
}

#[tokio::test]
async fn a_real_providers_set_is_kept_alive_revoked_and_unlinked() {
    let provider = Provider::start();
    let stage = Stage::dev(Mode::Strict).await;
    let connector = stage.connect_with("oidc", TARGET, provider.config()).await;
    let ana = stage.user("ana").await;

    // Link and read.
    let record = verified(&stage, &ana, &connector).await;
    let linked = stage.link(&ana, &record).await;
    assert_eq!(linked.status(), 204, "{}", linked.text().await.unwrap());
    let first = read(&stage, &ana).await;
    assert!(provider.accepts(&first).await);
    let shown = stage.metadata(&ana, TARGET).await;
    assert_eq!(
        (&shown["identityId"], &shown["metadata"]["hasRefreshToken"]),
        (&json!(provider.fact("account")), &json!(true))
    );
    assert_eq!(provider.refreshes().await, 0);

    // Expire and refresh, several times over: each time with the token that came last.
    let mut last = first;
    for round in 1..=3 {
        until("the end of the token", Duration::from_secs(LIFETIME + 5), async || {
            !provider.accepts(&last).await
        })
        .await;
        let at = path(TARGET);
        let mut seen = Vec::new();
        for answer in join_all((0..200).map(|_| ana.api.get(&at))).await {
            seen.push(token_in(answer).await);
        }
        seen.dedup();
        assert_eq!((seen.len(), provider.refreshes().await), (1, round), "one request, one token");
        assert!(seen[0] != last && provider.accepts(&seen[0]).await);
        stage.daemon().hide(&seen[0]);
        last.clone_from(&seen[0]);
    }

    // Re-authorise.
    let record = verified(&stage, &ana, &connector).await;
    let written = body(put_token(&ana, TARGET, &record).send().await.unwrap(), 200).await;
    stage.daemon().hide(&text(&written["access_token"]));
    assert!(provider.accepts(&text(&written["access_token"])).await);
    assert_eq!(stage.metadata(&ana, TARGET).await["id"], shown["id"]);

    // The person takes the consent back at the provider.
    provider.end().await;
    tokio::time::sleep(Duration::from_secs(LIFETIME + 1)).await;
    for _ in 0..3 {
        refused(ana.api.get(&path(TARGET)).await, 401, EXPIRED).await;
    }
    let report = provider.report().await;
    assert_eq!(report["refused"].as_array().unwrap().len(), 1, "a dead token is tried once: {report}");
    assert_eq!(report["reused"], 0, "{report}");
    let record = verified(&stage, &ana, &connector).await;
    body(put_token(&ana, TARGET, &record).send().await.unwrap(), 200).await;
    assert!(provider.accepts(&read(&stage, &ana).await).await);

    // Revoke here, come back, and unlink.
    let deleted = stage.admin.delete(&format!("/api/secrets/{}", text(&shown["id"]))).await;
    assert_eq!(deleted.status(), 204);
    refused(ana.api.get(&path(TARGET)).await, 404, NOTHING).await;
    let record = verified(&stage, &ana, &connector).await;
    body(put_token(&ana, TARGET, &record).send().await.unwrap(), 200).await;
    assert!(provider.accepts(&read(&stage, &ana).await).await);
    assert_eq!(ana.api.delete(&format!("/api/my-account/identities/{TARGET}")).await.status(), 204);
    refused(ana.api.get(&path(TARGET)).await, 404, NOTHING).await;
    let report = provider.report().await;
    assert_eq!((&report["reused"], report["refused"].as_array().unwrap().len()), (&json!(0), 1), "{report}");
    until("the end of the grant at the provider", Duration::from_secs(10), async || {
        provider.report().await["revoked"].as_u64().unwrap() > 0
    })
    .await;
    assert_eq!((stage.sets(), stage.idp.connections()), (0, 0));
    stage.finish().await;
}
