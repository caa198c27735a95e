//! Link, read, look at, re-authorise, unlink and delete, as software written for Logto does: contract, section 7.

use reqwest::Method;
use serde_json::{Value, json};

use crate::idp::{Fault, Mode};
use crate::stage::{
    ACME, CALLBACK, EXPIRED, Engine, NOTHING, SCOPE, Stage, USED, body, now, patch, path, put_token, refused,
    text,
};

fn members(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("not an object: {value}")).keys().map(String::as_str).collect()
}

async fn a_whole_life(stage: Stage) {
    let ana = stage.user("ana").await;
    refused(stage.read(&ana).await, 404, NOTHING).await;
    let record = stage.verified(&ana, "idp-ana", None).await;
    assert_eq!(stage.link(&ana, &record).await.status(), 204);

    let answer = stage.read(&ana).await;
    assert_eq!(answer.headers()["Cache-Control"], "no-store");
    let tag = answer.headers().get("ETag");
    assert_eq!(tag, None, "what must not be kept has no tag");
    let known = ana.api.request(Method::GET, &path(ACME)).header("If-None-Match", "*").send().await.unwrap();
    assert_eq!(known.status(), 200, "answered from a cache");
    let read = body(answer, 200).await;
    assert_eq!(members(&read), ["access_token", "scope", "token_type", "expires_in"]);
    assert_eq!((&read["scope"], &read["token_type"]), (&json!(SCOPE), &json!("bearer")));
    assert!((3500..=3600).contains(&read["expires_in"].as_i64().unwrap()), "seconds that are left: {read}");
    let first = text(&read["access_token"]);
    assert_eq!(stage.idp.subject_of(&first).as_deref(), Some("idp-ana"));

    let before = stage.metadata(&ana, ACME).await;
    stage.idp.script([Fault::with("scope", json!("read write more"))]);
    let again = stage.verified(&ana, "idp-ana", Some("read write more")).await;
    let written = body(put_token(&ana, ACME, &again).send().await.unwrap(), 200).await;
    assert_eq!(members(&written), ["access_token", "scope", "token_type", "expires_in"]);
    assert_eq!(written["scope"], "read write more");
    let second = text(&written["access_token"]);
    assert_ne!(second, first);
    assert_eq!(stage.token(&ana).await, second);
    let after = stage.metadata(&ana, ACME).await;
    assert_eq!(
        (&after["id"], &after["createdAt"]),
        (&before["id"], &before["createdAt"]),
        "section 2, row 1"
    );
    assert!(after["updatedAt"].as_i64() > before["updatedAt"].as_i64(), "{before} {after}");

    let unlinked = ana.api.delete("/api/my-account/identities/acme").await;
    assert_eq!((unlinked.status().as_u16(), unlinked.text().await.unwrap().as_str()), (204, ""));
    refused(stage.read(&ana).await, 404, NOTHING).await;
    let gone = ana.api.delete("/api/my-account/identities/acme").await;
    refused(gone, 404, "user.identity_not_exist").await;
    assert_eq!((stage.sets(), stage.idp.refreshes()), (0, 0));
    stage.finish().await;
}

#[tokio::test]
async fn a_set_is_linked_read_written_anew_and_unlinked_with_lacre_dev() {
    a_whole_life(Stage::dev(Mode::Strict).await).await;
}

#[tokio::test]
async fn a_set_is_linked_read_written_anew_and_unlinked_on_postgresql() {
    a_whole_life(Stage::serve(Engine::Postgres, Mode::Strict, "").await).await;
}

#[tokio::test]
async fn administrators_see_the_metadata_in_the_contracts_form_and_no_value() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let path = format!("/api/users/{}/identities/{ACME}", ana.id);
    let answer = stage.admin.get(&format!("{path}?includeTokenSecret=true")).await;
    assert!(answer.headers().contains_key("ETag"), "metadata may be kept");
    let shown = body(answer, 200).await;

    assert_eq!(members(&shown), ["identity", "tokenSecret", "tokenStatus"]);
    assert_eq!(shown["identity"]["userId"], "ana");
    assert_eq!(shown["identity"]["details"]["id"], "ana");
    let secret = &shown["tokenSecret"];
    let names = [
        "tenantId",
        "id",
        "userId",
        "type",
        "metadata",
        "createdAt",
        "updatedAt",
        "connectorId",
        "identityId",
    ];
    assert_eq!(members(secret)[..9], names);
    // The last is Lacre's own.
    assert_eq!(members(secret)[9..], ["target", "status"]);
    assert_eq!((&secret["tenantId"], &secret["type"]), (&json!("default"), &json!("federated_token_set")));
    assert_eq!((&secret["userId"], &secret["identityId"]), (&json!(ana.id), &json!("ana")));
    assert_eq!((&secret["connectorId"], &secret["target"]), (&json!(stage.connector), &json!(ACME)));
    assert_eq!(text(&secret["id"]).len(), 21);
    assert!(text(&secret["id"]).chars().all(|c| c.is_ascii_digit() || c.is_ascii_lowercase()), "{secret}");
    assert!((secret["createdAt"].as_i64().unwrap() - now() * 1000).abs() < 60_000, "milliseconds: {secret}");
    assert_eq!(secret["createdAt"], secret["updatedAt"]);
    let metadata = &secret["metadata"];
    assert_eq!(members(metadata), ["scope", "expiresAt", "tokenType", "hasRefreshToken"]);
    assert!((metadata["expiresAt"].as_i64().unwrap() - now() - 3600).abs() < 60, "seconds: {metadata}");
    assert_eq!(
        (&metadata["scope"], &metadata["tokenType"], &metadata["hasRefreshToken"]),
        (&json!(SCOPE), &json!("bearer"), &json!(true))
    );

    for yes in ["1", "true", "y", "yes", "yep", "yeah", "TRUE"] {
        let shown = body(stage.admin.get(&format!("{path}?includeTokenSecret={yes}")).await, 200).await;
        assert_eq!(&shown["tokenSecret"], secret, "{yes}");
    }
    let all = format!("/api/users/{}/all-identities", ana.id);
    for no in ["", "?includeTokenSecret=false", "?includeTokenSecret=0", "?includeTokenSecret=no"] {
        let one = body(stage.admin.get(&format!("{path}{no}")).await, 200).await;
        assert_eq!(members(&one), ["identity"], "{no}");
        let many = body(stage.admin.get(&format!("{all}{no}")).await, 200).await;
        let identity = &shown["identity"];
        let wanted =
            json!({ "socialIdentities": [{ "target": ACME, "identity": identity }], "ssoIdentities": [] });
        assert_eq!(many, wanted, "{no}");
    }
    let many = body(stage.admin.get(&format!("{all}?includeTokenSecret=true")).await, 200).await;
    assert_eq!(members(&many["socialIdentities"][0]), ["target", "identity", "tokenSecret"]);
    assert_eq!(&many["socialIdentities"][0]["tokenSecret"], secret);

    let everything = format!("{shown}{many}{}", body(stage.admin.get("/api/users").await, 200).await);
    assert!(!everything.contains(&stage.daemon().canary), "an administrator sees a value");
    let none = format!("/api/users/{}/identities/other", ana.id);
    refused(stage.admin.get(&none).await, 404, "user.identity_not_exist").await;
    refused(stage.admin.get("/api/users/000000000000/identities/acme").await, 404, "entity.not_found").await;
    let sso = format!("/api/users/{}/sso-identities/000000000000", ana.id);
    refused(stage.admin.get(&sso).await, 404, "user.enterprise_sso_identity_not_exists").await;
    stage.finish().await;
}

#[tokio::test]
async fn the_documented_spellings_do_what_the_real_ones_do() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let alias = format!("/my-account/identities/{ACME}/access-token");
    let token = body(ana.api.get(&alias).await, 200).await;
    assert_eq!(token["access_token"], stage.token(&ana).await.as_str());

    // The documents' own sequence, word by word.
    let asked = json!({ "connectorId": stage.connector, "state": "s-1", "redirectUri": CALLBACK });
    let begun = body(ana.api.post("/api/verification/social", &asked).await, 201).await;
    assert_eq!(members(&begun), ["verificationRecordId", "authorizationUri", "expiresAt"]);
    assert!(text(&begun["expiresAt"]).ends_with('Z'), "{begun}");
    let record = text(&begun["verificationRecordId"]);
    let (code, _) = stage.idp.authorize(&text(&begun["authorizationUri"]), "ana");
    let data = json!({ "code": code, "state": "s-1", "redirectUri": CALLBACK });
    let asked = json!({ "verificationId": record, "connectorData": data });
    // Without a content type, as the documented example sends it.
    let verify = ana.api.request(Method::POST, "/api/verification/social/verify").body(asked.to_string());
    assert_eq!(body(verify.send().await.unwrap(), 200).await, json!({ "verificationRecordId": record }));
    let change = ana.api.request(Method::PATCH, &alias).json(&json!({ "socialVerificationId": record }));
    let written = body(change.send().await.unwrap(), 200).await;
    assert_ne!(written["access_token"], token["access_token"]);
    assert_eq!(written["access_token"], stage.token(&ana).await.as_str());

    // Methods and names in any combination; the real name wins.
    for (method, at, member) in [
        (Method::PATCH, path(ACME), "verificationRecordId"),
        (Method::PUT, alias.clone(), "socialVerificationId"),
    ] {
        let record = stage.verified(&ana, "ana", None).await;
        let asked = json!({ member: record, "unknown": 1 });
        body(ana.api.request(method, &at).json(&asked).send().await.unwrap(), 200).await;
    }
    let record = stage.verified(&ana, "ana", None).await;
    let both = json!({ "socialVerificationId": "nothing", "verificationRecordId": record });
    body(ana.api.request(Method::PATCH, &alias).json(&both).send().await.unwrap(), 200).await;
    for bad in [json!({}), json!({ "verificationRecordId": "" }), json!({ "socialVerificationId": "" })] {
        let answer = ana.api.request(Method::PATCH, &alias).json(&bad).send().await.unwrap();
        let said = refused(answer, 400, "guard.invalid_input").await;
        assert!(text(&said["details"]).contains("verificationRecordId"), "{said}");
    }

    let id = text(&stage.metadata(&ana, ACME).await["id"]);
    assert_eq!(stage.admin.delete(&format!("/api/secret/{id}")).await.status(), 204);
    refused(stage.admin.delete(&format!("/api/secret/{id}")).await, 404, "entity.not_found").await;
    let unknown = ana.api.get("/my-account/nothing").await;
    assert_eq!((unknown.status().as_u16(), unknown.text().await.unwrap().as_str()), (404, "Not Found"));
    stage.finish().await;
}

#[tokio::test]
async fn a_deleted_secret_is_gone_and_its_identity_stays() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let first = stage.metadata(&ana, ACME).await;
    let deleted = stage.admin.delete(&format!("/api/secrets/{}", text(&first["id"]))).await;
    assert_eq!((deleted.status().as_u16(), deleted.text().await.unwrap().as_str()), (204, ""));

    refused(stage.read(&ana).await, 404, NOTHING).await;
    assert_eq!(stage.metadata(&ana, ACME).await, Value::Null);
    refused(
        stage.admin.delete(&format!("/api/secrets/{}", text(&first["id"]))).await,
        404,
        "entity.not_found",
    )
    .await;
    body(stage.reauthorise(&ana, "ana").await, 200).await;
    assert_ne!(stage.metadata(&ana, ACME).await["id"], first["id"], "another set");
    stage.finish().await;
}

#[tokio::test]
async fn a_record_is_of_use_once_and_to_who_made_it() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.user("ana").await, stage.user("ben").await);
    let record = stage.verified(&ana, "idp-ana", None).await;
    assert_eq!(stage.link(&ana, &record).await.status(), 204);
    refused(put_token(&ana, ACME, &record).send().await.unwrap(), 400, USED).await;
    refused(stage.link(&ana, &record).await, 400, USED).await;

    let record = stage.verified(&ana, "idp-ana", None).await;
    body(put_token(&ana, ACME, &record).send().await.unwrap(), 200).await;
    let (kept, calls) = (stage.token(&ana).await, stage.idp.requests("authorization_code"));
    refused(put_token(&ana, ACME, &record).send().await.unwrap(), 400, USED).await;
    assert_eq!(stage.token(&ana).await, kept, "an older set was restored");

    // A code is redeemed once too, and none is asked for by a record that is not there.
    let (record, uri) = stage.begin(&ana, &stage.connector, None).await;
    let (code, _) = stage.idp.authorize(&uri, "idp-ana");
    refused(stage.verify(&ana, "000000000000000000000", &code).await, 400, USED).await;
    assert_eq!(stage.idp.requests("authorization_code"), calls);
    refused(put_token(&ana, ACME, &record).send().await.unwrap(), 400, USED).await;
    body(stage.verify(&ana, &record, &code).await, 200).await;
    let again = stage.verify(&ana, &record, &code).await.status().as_u16();
    assert!(again == 400 || again == 401, "a code was redeemed twice: {again}");
    refused(stage.verify(&ben, &record, &code).await, 400, USED).await;
    refused(put_token(&ben, ACME, &record).send().await.unwrap(), 400, USED).await;
    stage.finish().await;
}

#[tokio::test]
async fn two_uses_of_one_record_at_once_have_one_winner() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    for _ in 0..5 {
        let record = stage.verified(&ana, "ana", None).await;
        let uses = (0..8).map(|_| put_token(&ana, ACME, &record).send());
        let answers = futures_util::future::join_all(uses).await.into_iter().map(Result::unwrap);
        let mut statuses: Vec<_> = answers.map(|answer| answer.status().as_u16()).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 400, 400, 400, 400, 400, 400, 400]);
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_set_without_refresh_token_ends_and_stays() {
    let stage = Stage::dev(Mode::Strict).await;
    stage.idp.set_offline(false);
    let ana = stage.linked("ana").await;
    let before = stage.metadata(&ana, ACME).await;
    assert_eq!(before["metadata"]["hasRefreshToken"], false);
    stage.ends_in(20);
    stage.token(&ana).await;

    stage.expire();
    for _ in 0..3 {
        refused(stage.read(&ana).await, 401, EXPIRED).await;
    }
    assert_eq!(stage.metadata(&ana, ACME).await["id"], before["id"], "a read has deleted it");
    assert_eq!(stage.idp.refreshes(), 0);
    body(stage.reauthorise(&ana, "ana").await, 200).await;
    stage.token(&ana).await;
    stage.finish().await;
}

#[tokio::test]
async fn an_openid_connector_keeps_a_set_whose_id_token_was_checked() {
    let stage = Stage::dev(Mode::Strict).await;
    let mut config = stage.config();
    let checks = json!({ "jwksUri": format!("{}/jwks", stage.idp.url), "issuer": stage.idp.url });
    config["idTokenVerificationConfig"] = checks;
    config["scope"] = json!("openid profile offline_access");
    let connector = stage.connect_with("oidc", "open", config).await;
    let ana = stage.linked_at(&connector, "ana").await;
    body(ana.api.get(&path("open")).await, 200).await;
    stage.expire();
    stage.idp.script([Fault::without("id_token")]);
    let after = body(ana.api.get(&path("open")).await, 200).await;
    assert!(stage.idp.is_live(&text(&after["access_token"])), "refreshed without an ID token");

    let ben = stage.user("ben").await;
    let forged = |answer: &mut Value| {
        let token = text(&answer["id_token"]);
        let (head, signature) = token.rsplit_once('.').unwrap();
        let other = if signature.starts_with('A') { "B" } else { "A" };
        answer["id_token"] = json!(format!("{head}.{other}{}", &signature[1..]));
    };
    for fault in [Fault::Edit(Box::new(forged)), Fault::without("id_token")] {
        let (record, uri) = stage.begin(&ben, &connector, None).await;
        let (code, _) = stage.idp.authorize(&uri, "ben");
        stage.idp.script([fault]);
        let answer = stage.verify(&ben, &record, &code).await;
        assert!([400, 401].contains(&answer.status().as_u16()), "{}", answer.text().await.unwrap());
        refused(stage.link(&ben, &record).await, 400, USED).await;
    }
    stage.finish().await;
}

#[tokio::test]
async fn storage_is_for_connectors_that_have_it() {
    let stage = Stage::dev(Mode::Strict).await;
    let factories = body(stage.admin.get("/api/connector-factories").await, 200).await;
    let able = |id: &str| {
        let found = factories.as_array().unwrap().iter().find(|factory| factory["id"] == id);
        found.map(|factory| factory["isTokenStorageSupported"] == true)
    };
    for id in ["oauth2", "oidc"] {
        assert_eq!(able(id), Some(true), "{id}");
    }
    let shown = body(stage.admin.get(&format!("/api/connectors/{}", stage.connector)).await, 200).await;
    assert_eq!(
        (&shown["connectorId"], &shown["target"], &shown["type"], &shown["enableTokenStorage"]),
        (&json!("oauth2"), &json!(ACME), &json!("Social"), &json!(true))
    );
    assert!(!shown.to_string().contains(&stage.daemon().canary), "the client secret is shown");
    let listed = body(stage.admin.get(&format!("/api/connectors?target={ACME}")).await, 200).await;
    assert_eq!(listed, json!([shown]));
    let saml = json!({ "providerName": "SAML", "connectorName": "s", "enableTokenStorage": true });
    let answer = stage.admin.post("/api/sso-connectors", &saml).await;
    refused(answer, 400, "connector.token_storage_not_supported").await;
    refused(stage.admin.get("/api/connectors/000000000000").await, 404, "entity.not_found").await;
    stage.finish().await;
}

#[tokio::test]
async fn an_enterprise_connector_is_kept_with_its_switch_and_without_its_secret() {
    let stage = Stage::dev(Mode::Strict).await;
    let config = json!({ "issuer": stage.idp.url, "clientId": crate::idp::CLIENT,
                         "clientSecret": stage.idp.client_secret });
    let asked = json!({ "providerName": "OIDC", "connectorName": "Acme SSO", "config": config,
                        "domains": ["acme.example"], "enableTokenStorage": true });
    let made = body(stage.admin.post("/api/sso-connectors", &asked).await, 200).await;
    assert_eq!((&made["providerName"], &made["enableTokenStorage"]), (&json!("OIDC"), &json!(true)));
    assert_eq!((&made["tenantId"], text(&made["id"]).len()), (&json!("default"), 12));
    let path = format!("/api/sso-connectors/{}", text(&made["id"]));
    let shown = body(stage.admin.get(&path).await, 200).await;
    assert_eq!((&shown["providerType"], &shown["connectorName"]), (&json!("oidc"), &json!("Acme SSO")));
    let off = patch(&stage.admin, &path, &json!({ "enableTokenStorage": false })).await;
    assert_eq!(off["enableTokenStorage"], false);
    for answer in [made, shown, off] {
        assert!(!answer.to_string().contains(&stage.daemon().canary), "the client secret is shown: {answer}");
    }
    stage.finish().await;
}
