//! Enterprises' single sign-on: link, read, refresh by discovery, re-authorise and end over the routes that are Lacre's
//! own, beside those that are Logto's (contract, sections 7.2, 7.3, 7.5, 8.3 and 8.4).

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::idp::{CLIENT, FakeIdp, Fault, Mode};
use crate::stage::{
    CALLBACK, EXPIRED, Engine, NOTHING, Stage, USED, User, body, now, patch, path, put_token, refused, text,
    token_in, until,
};

const REFUSED: &str = "connector.authorization_failed";
const NO_IDENTITY: &str = "user.enterprise_sso_identity_not_exists";

/// The body of an OIDC connector to a provider.
pub fn connector_to(idp: &FakeIdp) -> Value {
    let config = json!({ "issuer": idp.url, "clientId": CLIENT, "clientSecret": idp.client_secret,
                         "scope": "offline_access" });
    json!({ "providerName": "OIDC", "connectorName": "Acme", "config": config, "enableTokenStorage": true })
}

/// Makes an OIDC connector to a provider; its id.
pub async fn connect_to(stage: &Stage, idp: &FakeIdp) -> String {
    text(&body(stage.admin.post("/api/sso-connectors", &connector_to(idp)).await, 200).await["id"])
}

/// The path of a user's token.
pub fn token_of(connector: &str) -> String {
    format!("/api/my-account/sso-identities/{connector}/access-token")
}

/// Begins a verification, whatever comes of it.
pub async fn try_to_begin(user: &User, connector: &str) -> Response {
    let asked = json!({ "connectorId": connector, "state": "s-1", "redirectUri": CALLBACK });
    user.api.post("/api/verifications/sso", &asked).await
}

/// Begins one: its record's id and where the browser goes.
pub async fn begin(user: &User, connector: &str) -> (String, String) {
    let begun = body(try_to_begin(user, connector).await, 201).await;
    (text(&begun["verificationRecordId"]), text(&begun["authorizationUri"]))
}

/// Brings back what the provider gave the browser, with further members.
pub async fn verify(user: &User, record: &str, code: &str, more: &Value) -> Response {
    let mut data = json!({ "code": code, "state": "s-1", "redirectUri": CALLBACK });
    data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let asked = json!({ "verificationRecordId": record, "connectorData": data });
    user.api.post("/api/verifications/sso/verify", &asked).await
}

/// Signs in at the provider as `subject`; the id of the verified record.
pub async fn verified(idp: &FakeIdp, user: &User, connector: &str, subject: &str) -> String {
    let (record, uri) = begin(user, connector).await;
    let (code, _) = idp.authorize(&uri, subject);
    let done = body(verify(user, &record, &code, &json!({})).await, 200).await;
    assert_eq!(done, json!({ "verificationRecordId": record }));
    record
}

/// Links what was verified.
pub async fn link(user: &User, record: &str) -> Response {
    let asked = json!({ "newIdentifierVerificationRecordId": record });
    user.api.post("/api/my-account/sso-identities", &asked).await
}

/// A new user with an account at the enterprise; the subject there is the user's name.
pub async fn linked(stage: &Stage, idp: &FakeIdp, connector: &str, name: &str) -> User {
    let user = stage.user(name).await;
    let record = verified(idp, &user, connector, name).await;
    let linked = link(&user, &record).await;
    assert_eq!(linked.status(), 204, "{}", linked.text().await.unwrap());
    user
}

/// Writes what was verified over the stored set.
async fn renew(user: &User, connector: &str, method: Method, member: &str, record: &str) -> Response {
    let asked = json!({ member: record });
    user.api.request(method, &token_of(connector)).json(&asked).send().await.unwrap()
}

/// What an administrator sees of the identity; `None` if there is none.
async fn seen(stage: &Stage, user: &User, connector: &str) -> Option<Value> {
    let at = format!("/api/users/{}/sso-identities/{connector}?includeTokenSecret=true", user.id);
    let answer = stage.admin.get(&at).await;
    if answer.status() == 404 {
        refused(answer, 404, NO_IDENTITY).await;
        return None;
    }
    Some(body(answer, 200).await)
}

fn members(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("not an object: {value}")).keys().map(String::as_str).collect()
}

async fn a_whole_life(stage: Stage) {
    let connector = connect_to(&stage, &stage.idp).await;
    let ana = stage.user("ana").await;
    refused(ana.api.get(&token_of(&connector)).await, 404, NOTHING).await;
    let record = verified(&stage.idp, &ana, &connector, "ana").await;
    assert_eq!(link(&ana, &record).await.status(), 204);
    refused(link(&ana, &record).await, 400, USED).await;
    let first = token_in(ana.api.get(&token_of(&connector)).await).await;
    assert_eq!(stage.idp.subject_of(&first).as_deref(), Some("ana"));
    let before = seen(&stage, &ana, &connector).await.unwrap();

    // By discovery, with the client's credentials in the header, as for the code.
    stage.expire();
    let read = body(ana.api.get(&token_of(&connector)).await, 200).await;
    assert_eq!(members(&read), ["access_token", "scope", "token_type", "expires_in"]);
    assert_eq!(read["scope"], "openid profile email offline_access");
    assert!(read["access_token"] != first.as_str() && stage.idp.is_live(&text(&read["access_token"])));
    assert!(stage.idp.fetched("/.well-known/openid-configuration") > 0);
    assert_eq!((stage.idp.refreshes(), stage.idp.by_header()), (1, 2));
    let alias = format!("/my-account/sso-identities/{connector}/access-token");
    assert_eq!(token_in(ana.api.get(&alias).await).await, text(&read["access_token"]));

    for (method, member) in [
        (Method::PUT, "verificationRecordId"),
        (Method::PATCH, "verificationRecordId"),
        (Method::PATCH, "socialVerificationId"),
    ] {
        let old = token_in(ana.api.get(&token_of(&connector)).await).await;
        let record = verified(&stage.idp, &ana, &connector, "ana").await;
        let new = token_in(renew(&ana, &connector, method.clone(), member, &record).await).await;
        assert!(new != old && new == token_in(ana.api.get(&token_of(&connector)).await).await, "{method}");
        refused(renew(&ana, &connector, method, member, &record).await, 400, USED).await;
    }
    let after = seen(&stage, &ana, &connector).await.unwrap();
    for member in ["id", "createdAt"] {
        assert_eq!(after["tokenSecret"][member], before["tokenSecret"][member], "{member}");
    }
    assert!(after["tokenSecret"]["updatedAt"].as_i64() > before["tokenSecret"]["updatedAt"].as_i64());

    assert_eq!(ana.api.delete(&format!("/api/my-account/sso-identities/{connector}")).await.status(), 204);
    refused(ana.api.get(&token_of(&connector)).await, 404, NOTHING).await;
    let again = ana.api.delete(&format!("/api/my-account/sso-identities/{connector}")).await;
    refused(again, 404, NO_IDENTITY).await;
    assert_eq!((seen(&stage, &ana, &connector).await, stage.sets()), (None, 0));
    // Where to revoke is known by discovery too.
    until("the revocation", Duration::from_secs(10), async || !stage.idp.revocations().is_empty()).await;
    stage.finish().await;
}

#[tokio::test]
async fn an_enterprises_set_lives_from_its_link_to_its_end_with_lacre_dev() {
    a_whole_life(Stage::dev(Mode::Strict).await).await;
}

#[tokio::test]
async fn an_enterprises_set_lives_from_its_link_to_its_end_on_postgresql() {
    a_whole_life(Stage::serve(Engine::Postgres, Mode::Strict, "").await).await;
}

#[tokio::test]
async fn an_administrator_sees_an_enterprises_identity_in_the_contracts_shape() {
    let stage = Stage::dev(Mode::Strict).await;
    let connector = connect_to(&stage, &stage.idp).await;
    let ana = linked(&stage, &stage.idp, &connector, "ana").await;
    let shown = seen(&stage, &ana, &connector).await.unwrap();
    assert_eq!(members(&shown), ["ssoIdentity", "tokenSecret", "tokenStatus"]);

    let identity = &shown["ssoIdentity"];
    let names = [
        "tenantId",
        "id",
        "userId",
        "issuer",
        "identityId",
        "detail",
        "createdAt",
        "updatedAt",
        "ssoConnectorId",
    ];
    assert_eq!(members(identity), names);
    assert_eq!((&identity["userId"], &identity["identityId"]), (&json!(ana.id), &json!("ana")));
    assert_eq!(
        (&identity["issuer"], &identity["ssoConnectorId"]),
        (&json!(stage.idp.url), &json!(connector))
    );
    assert_eq!((text(&identity["id"]).len(), &identity["tenantId"]), (21, &json!("default")));
    assert!((identity["createdAt"].as_i64().unwrap() - now() * 1000).abs() < 60_000, "{identity}");
    assert_eq!(identity["detail"]["name"], "Ana Teste");
    assert_eq!(identity["detail"].get("email"), None, "nobody has verified it");

    let secret = &shown["tokenSecret"];
    let names = [
        "tenantId",
        "id",
        "userId",
        "type",
        "metadata",
        "createdAt",
        "updatedAt",
        "ssoConnectorId",
        "issuer",
        "identityId",
        "status",
    ];
    assert_eq!(members(secret), names);
    assert_eq!((&secret["type"], &secret["issuer"]), (&json!("federated_token_set"), &identity["issuer"]));
    assert_eq!((&secret["metadata"]["hasRefreshToken"], &secret["status"]), (&json!(true), &json!("active")));
    let ends = secret["metadata"]["expiresAt"].as_i64().unwrap();
    assert!((ends - now() - 3600).abs() < 60, "seconds: {secret}");

    let all = format!("/api/users/{}/all-identities?includeTokenSecret=", ana.id);
    let many = body(stage.admin.get(&format!("{all}true")).await, 200).await;
    let one = json!({ "ssoConnectorId": connector, "ssoIdentity": identity, "tokenSecret": secret });
    assert_eq!(many, json!({ "socialIdentities": [], "ssoIdentities": [one] }));
    assert_eq!(members(&many["ssoIdentities"][0]), ["ssoConnectorId", "ssoIdentity", "tokenSecret"]);
    let few = body(stage.admin.get(&format!("{all}false")).await, 200).await;
    assert_eq!(members(&few["ssoIdentities"][0]), ["ssoConnectorId", "ssoIdentity"]);
    assert!(!format!("{shown}{many}").contains(&stage.daemon().canary), "an administrator sees a value");

    // Another user sees nothing of it, under its id as under one that is not there.
    let ben = stage.user("ben").await;
    let theirs = refused(ben.api.get(&token_of(&connector)).await, 404, NOTHING).await;
    assert_eq!(theirs, refused(ben.api.get(&token_of("000000000000")).await, 404, NOTHING).await);
    stage.finish().await;
}

#[tokio::test]
async fn every_enterprises_provider_is_made_changed_listed_and_deleted() {
    let stage = Stage::dev(Mode::Strict).await;
    let secret = stage.daemon().secret("client");
    let issuer = json!("https://login.example.com/tenant");
    let rows = [("OIDC", true), ("Okta", true), ("AzureAdOidc", true), ("GoogleWorkspace", false)];
    let mut ids = Vec::new();
    for (provider, has_issuer) in rows {
        let mut config = json!({ "clientId": "cid", "clientSecret": secret });
        if has_issuer {
            let asked = json!({ "providerName": provider, "connectorName": provider, "config": config });
            let answer = stage.admin.post("/api/sso-connectors", &asked).await;
            let said = refused(answer, 400, "guard.invalid_input").await;
            assert!(text(&said["details"]).contains("config.issuer"), "{provider}: {said}");
            config["issuer"] = issuer.clone();
        }
        let asked = json!({ "providerName": provider, "connectorName": provider, "config": config,
                            "domains": ["acme.example"], "enableTokenStorage": true, "refreshAhead": 300 });
        let made = body(stage.admin.post("/api/sso-connectors", &asked).await, 200).await;
        assert_eq!(
            (&made["providerType"], &made["refreshAhead"]),
            (&json!("oidc"), &json!(300)),
            "{provider}"
        );
        let at = format!("/api/sso-connectors/{}", text(&made["id"]));
        let change = json!({ "connectorName": "other", "refreshAhead": 0, "config": made["config"] });
        let changed = patch(&stage.admin, &at, &change).await;
        assert_eq!((&changed["connectorName"], &changed["refreshAhead"]), (&json!("other"), &json!(0)));
        assert_eq!(changed["config"]["clientId"], "cid", "{provider}");
        assert_eq!(changed, body(stage.admin.get(&at).await, 200).await, "{provider}");
        assert!(!format!("{made}{changed}").contains(&secret), "{provider}: the client secret is shown");
        ids.push(made["id"].clone());
    }
    let listed = body(stage.admin.get("/api/sso-connectors").await, 200).await;
    let mut found: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
    found.sort_by_key(ToString::to_string);
    ids.sort_by_key(ToString::to_string);
    assert_eq!(found, ids);
    for id in ids {
        let at = format!("/api/sso-connectors/{}", text(&id));
        assert_eq!(stage.admin.delete(&at).await.status(), 204);
        refused(stage.admin.get(&at).await, 404, "entity.not_found").await;
        refused(stage.admin.delete(&at).await, 404, "entity.not_found").await;
    }
    // A social connector is none of them, nor is one of them social.
    let at = format!("/api/sso-connectors/{}", stage.connector);
    refused(stage.admin.get(&at).await, 404, "entity.not_found").await;
    refused(stage.admin.delete(&at).await, 404, "entity.not_found").await;
    stage.finish().await;
}

#[tokio::test]
async fn a_failure_at_an_enterprises_provider_has_the_contracts_code() {
    // Less than the ten seconds of the default, so that the test need not wait for them.
    let stage = Stage::serve(Engine::Sqlite, Mode::Strict, "timeout = \"2s\"\nidle = \"1s\"\n").await;
    let words =
        || json!({ "error": "server_error", "error_description": "the provider's own words" }).to_string();
    let rows = [
        ("s500", Fault::Status(500, vec![], words()), 401, REFUSED),
        ("s503", Fault::Status(503, vec![("Retry-After", "7".to_owned())], words()), 401, REFUSED),
        ("client", Fault::error(401, "invalid_client"), 401, REFUSED),
        ("closed", Fault::CloseBeforeAnswer, 401, REFUSED),
        ("hangs", Fault::Hang, 401, REFUSED),
        ("ok_error", Fault::Status(200, vec![], words()), 400, "connector.invalid_response"),
        ("no_access", Fault::without("access_token"), 400, "connector.invalid_response"),
        ("grant", Fault::error(400, "invalid_grant"), 401, EXPIRED),
    ];
    let mut users = Vec::new();
    for (name, fault, status, code) in rows {
        let connector = connect_to(&stage, &stage.idp).await;
        let user = linked(&stage, &stage.idp, &connector, name).await;
        stage.ends_where(&format!("user_id = '{}'", user.id), -10);
        stage.idp.script([fault]);
        let answer = user.api.get(&token_of(&connector)).await;
        let wait = answer.headers().get("Retry-After").map(|wait| wait.to_str().unwrap().parse::<u64>());
        let said = refused(answer, status, code).await;
        assert!(
            !said.to_string().contains("own words"),
            "{name}: the provider's answer is passed on: {said}"
        );
        let least = if name == "s503" { 6 } else { 1 };
        assert!(code != REFUSED || wait.is_some_and(|wait| wait.unwrap() >= least), "{name}");
        if code == REFUSED {
            assert_eq!(members(&said["data"]), ["ssoErrorCode", "message"], "{name}");
            assert_eq!(said["data"]["ssoErrorCode"], "authorization_failed");
        }
        assert!(seen(&stage, &user, &connector).await.unwrap()["tokenSecret"].is_object(), "{name}: gone");
        if name == "grant" {
            for _ in 0..2 {
                refused(user.api.get(&token_of(&connector)).await, 401, EXPIRED).await;
            }
            let secret = seen(&stage, &user, &connector).await.unwrap()["tokenSecret"].clone();
            assert_eq!(secret["metadata"]["needsReauthorization"], true, "{secret}");
        }
        users.push((name, user, connector));
    }
    // Each was asked about once, and what has no refresh token about nothing.
    assert_eq!(stage.idp.refreshes(), users.len());
    stage.idp.set_offline(false);
    let connector = connect_to(&stage, &stage.idp).await;
    let bare = linked(&stage, &stage.idp, &connector, "bare").await;
    stage.ends_where(&format!("user_id = '{}'", bare.id), -10);
    for _ in 0..2 {
        refused(bare.api.get(&token_of(&connector)).await, 401, EXPIRED).await;
    }
    assert_eq!(stage.idp.refreshes(), users.len());

    // The rest comes back by itself.
    stage.idp.set_offline(true);
    stage.ground.run("UPDATE token_sets SET retry_at = 0");
    stage.ground.run("UPDATE connectors SET breaker_until = 0");
    for (name, user, connector) in users {
        let answer = user.api.get(&token_of(&connector)).await;
        match name {
            "grant" => drop(refused(answer, 401, EXPIRED).await),
            // Nobody knows whether the provider has put another refresh token in its place; this one has.
            "no_access" => assert!([200, 401].contains(&answer.status().as_u16()), "{name}"),
            _ => assert!(stage.idp.is_live(&token_in(answer).await), "{name}"),
        }
    }
    stage.finish().await;
}

#[tokio::test]
async fn an_enterprises_connector_takes_its_identities_and_sets_along() {
    let stage = Stage::dev(Mode::Strict).await;
    let (gone, stays) = (connect_to(&stage, &stage.idp).await, connect_to(&stage, &stage.idp).await);
    let ana = linked(&stage, &stage.idp, &gone, "ana").await;
    let ben = linked(&stage, &stage.idp, &stays, "ben").await;
    let parked = verified(&stage.idp, &ana, &gone, "ana").await;
    let at = format!("/api/sso-connectors/{gone}");
    assert_eq!(stage.admin.delete(&at).await.status(), 204);

    refused(ana.api.get(&token_of(&gone)).await, 404, NOTHING).await;
    assert_eq!(seen(&stage, &ana, &gone).await, None, "the identity is there");
    let all = format!("/api/users/{}/all-identities?includeTokenSecret=true", ana.id);
    assert_eq!(body(stage.admin.get(&all).await, 200).await["ssoIdentities"], json!([]));
    refused(link(&ana, &parked).await, 400, USED).await;
    refused(try_to_begin(&ana, &gone).await, 422, "session.invalid_connector_id").await;
    until("the revocation", Duration::from_secs(10), async || stage.idp.live_tokens_of("ana").len() <= 1)
        .await;
    // The other's are not touched.
    assert_eq!(stage.sets(), 1);
    assert!(stage.idp.is_live(&token_in(ben.api.get(&token_of(&stays)).await).await));
    // The account is free again, by another way.
    let record = verified(&stage.idp, &ana, &stays, "ana").await;
    assert_eq!(link(&ana, &record).await.status(), 204);
    stage.finish().await;
}

#[tokio::test]
async fn an_enterprises_connector_without_storage_keeps_identities_and_no_tokens() {
    let stage = Stage::dev(Mode::Strict).await;
    let connector = connect_to(&stage, &stage.idp).await;
    let ana = linked(&stage, &stage.idp, &connector, "ana").await;
    let parked = verified(&stage.idp, &ana, &connector, "ana").await;
    let at = format!("/api/sso-connectors/{connector}");
    patch(&stage.admin, &at, &json!({ "enableTokenStorage": false })).await;

    assert_eq!(stage.sets(), 0);
    refused(ana.api.get(&token_of(&connector)).await, 404, NOTHING).await;
    let shown = seen(&stage, &ana, &connector).await.unwrap();
    assert_eq!(members(&shown), ["ssoIdentity", "tokenStatus"], "the identity stays and its tokens do not");
    assert_eq!(shown["tokenStatus"], "not_applicable");
    refused(renew(&ana, &connector, Method::PUT, "verificationRecordId", &parked).await, 400, USED).await;
    let record = verified(&stage.idp, &ana, &connector, "ana").await;
    let none = "verification_record.social_verification.token_response_not_found";
    refused(renew(&ana, &connector, Method::PUT, "verificationRecordId", &record).await, 422, none).await;

    patch(&stage.admin, &at, &json!({ "enableTokenStorage": true })).await;
    refused(ana.api.get(&token_of(&connector)).await, 404, NOTHING).await;
    let record = verified(&stage.idp, &ana, &connector, "ana").await;
    token_in(renew(&ana, &connector, Method::PUT, "verificationRecordId", &record).await).await;
    stage.finish().await;
}

#[tokio::test]
async fn a_proof_of_one_kind_or_connector_is_none_for_another() {
    let stage = Stage::dev(Mode::Strict).await;
    let (one, two) = (connect_to(&stage, &stage.idp).await, connect_to(&stage, &stage.idp).await);
    let ana = linked(&stage, &stage.idp, &one, "ana").await;
    let social = stage.verified(&ana, "ana", None).await;
    assert_eq!(stage.link(&ana, &social).await.status(), 204);
    refused(try_to_begin(&ana, &stage.connector).await, 400, "connector.unexpected_type").await;
    let asked = json!({ "connectorId": one, "state": "s-1", "redirectUri": CALLBACK });
    let begun = ana.api.post("/api/verifications/social", &asked).await;
    refused(begun, 400, "connector.unexpected_type").await;
    refused(try_to_begin(&ana, "000000000000").await, 422, "session.invalid_connector_id").await;

    let social = stage.verified(&ana, "ana", None).await;
    let enterprise = verified(&stage.idp, &ana, &one, "ana").await;
    let put = async |connector: &str, record: &str| {
        renew(&ana, connector, Method::PUT, "verificationRecordId", record).await
    };
    refused(put(&one, &social).await, 400, USED).await;
    refused(link(&ana, &social).await, 400, USED).await;
    refused(put_token(&ana, "acme", &enterprise).send().await.unwrap(), 400, USED).await;
    refused(stage.link(&ana, &enterprise).await, 400, USED).await;
    // The same provider and account by another connector.
    let other = verified(&stage.idp, &ana, &two, "ana").await;
    refused(put(&one, &other).await, 422, "verification_record.social_verification.invalid_target").await;
    // An answer to one kind of sign-in is not taken as one to the other.
    let (record, uri) = begin(&ana, &one).await;
    let (code, _) = stage.idp.authorize(&uri, "ana");
    let codes = stage.idp.requests("authorization_code");
    refused(stage.verify(&ana, &record, &code).await, 400, USED).await;
    assert_eq!(stage.idp.requests("authorization_code"), codes);
    // None of that has used up a good one.
    token_in(put(&one, &enterprise).await).await;
    body(put_token(&ana, "acme", &social).send().await.unwrap(), 200).await;
    assert!(stage.idp.is_live(&token_in(ana.api.get(&path("acme")).await).await));
    stage.finish().await;
}

#[tokio::test]
async fn a_machine_and_an_application_name_an_enterprises_connector_by_its_id() {
    let stage = Stage::dev(Mode::Strict).await;
    let connector = connect_to(&stage, &stage.idp).await;
    let (ana, ben) = (linked(&stage, &stage.idp, &connector, "ana").await, stage.user("ben").await);
    let app = async |kind: &str, scope: &str, exchanges: bool| {
        let asked =
            json!({ "name": scope, "kind": kind, "scopes": [scope], "allow_token_exchange": exchanges });
        let made = body(stage.admin.post("/v1/apps", &asked).await, 201).await;
        crate::stage::App { id: text(&made["client_id"]), secret: text(&made["client_secret"]) }
    };
    let machine = app("machine", "token-sets:read", false).await;
    let token = stage.daemon().token_of(&machine.id, &machine.secret, "all").await;
    let machine = stage.daemon().api_of(&token);
    let read = async |user: &str, connector: &str| {
        let asked = json!({ "user_id": user, "connection": connector, "reason": "a test" });
        machine.post("/v1/token-sets/access-token", &asked).await
    };
    let stored = token_in(ana.api.get(&token_of(&connector)).await).await;
    assert_eq!(token_in(read(&ana.id, &connector).await).await, stored);
    for (user, connector) in [(&ben.id, connector.as_str()), (&ana.id, "000000000000"), (&ana.id, "acme")] {
        assert_eq!(read(user, connector).await.status(), 404);
    }

    let agent = app("traditional", "token-sets:exchange", true).await;
    let third_party = async |connector: &str| {
        let form = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("subject_token", ana.api.token.as_str()),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("requested_token_type", "urn:lacre:params:oauth:token-type:third-party-access-token"),
            ("reason", "a test"),
            ("audience", connector),
        ];
        stage.ask(&agent, &form).await
    };
    assert_eq!(text(&body(third_party(&connector).await, 200).await["access_token"]), stored);
    assert_eq!(third_party("000000000000").await.status(), 400);
    // One refresh for all of them.
    stage.expire();
    let new = token_in(read(&ana.id, &connector).await).await;
    assert_eq!(text(&body(third_party(&connector).await, 200).await["access_token"]), new);
    assert_eq!((stage.idp.refreshes(), new == stored), (1, false));
    stage.finish().await;
}
