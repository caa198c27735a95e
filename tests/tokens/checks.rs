//! What is checked before a set moves, in the contract's order (sections 7.5 to 7.9), and what a callback has to bring
//! (ID-11). Each request has all the later faults too.

use std::collections::HashMap;

use reqwest::Method;
use serde_json::json;

use crate::idp::Mode;
use crate::stage::{ACME, CALLBACK, NOTHING, Stage, USED, User, body, patch, path, put_token, refused, text};

#[tokio::test]
async fn a_write_is_checked_in_the_contracts_order() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.linked("ana").await, stage.user("ben").await);
    let other = stage.connect("other").await;
    let put = async |user, target: &str, record: &str| put_token(user, target, record).send().await.unwrap();

    let nobody = stage.daemon().anonymous(Method::PUT, &path("nothing")).json(&json!({}));
    refused(nobody.send().await.unwrap(), 401, "auth.authorization_header_missing").await;
    let bare = stage.session(&ana.id, "openid").await;
    let asked = json!({ "verificationRecordId": "none" });
    let answer = bare.request(Method::PUT, &path("nothing")).json(&asked).send().await.unwrap();
    refused(answer, 403, "auth.forbidden").await;
    refused(put(&ana, "nothing", "none").await, 400, USED).await;
    let record = stage.verified(&ana, "somebody-else", None).await;
    let target = "verification_record.social_verification.invalid_target";
    let said = refused(put(&ana, "nothing", &record).await, 422, target).await;
    assert!(text(&said["message"]).contains(ACME) && text(&said["message"]).contains("nothing"), "{said}");
    let not_theirs = "user.identity_not_exists_in_current_user";
    refused(put(&ana, ACME, &record).await, 422, not_theirs).await;
    let record = stage.verified(&ben, "ana", None).await;
    refused(put(&ben, ACME, &record).await, 422, not_theirs).await;
    let record = stage.verified_at(&ben, &other, "ben", None).await;
    refused(put(&ben, "other", &record).await, 422, not_theirs).await;

    let path = format!("/api/connectors/{}", stage.connector);
    patch(&stage.admin, &path, &json!({ "enableTokenStorage": false })).await;
    let record = stage.verified(&ana, "ana", None).await;
    let none = "verification_record.social_verification.token_response_not_found";
    refused(put(&ana, ACME, &record).await, 422, none).await;
    stage.finish().await;
}

#[tokio::test]
async fn links_and_unlinks_are_checked_in_the_contracts_order() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.linked("ana").await, stage.user("ben").await);
    let fields = async |value: &str| {
        patch(&stage.admin, "/api/account-center", &json!({ "fields": { "social": value } })).await
    };
    let at = "/api/my-account/identities";
    let bare = stage.session(&ben.id, "openid").await;
    let asked = json!({ "newIdentifierVerificationRecordId": "none" });
    for closed in ["Off", "ReadOnly"] {
        fields(closed).await;
        let code = "account_center.field_not_editable";
        refused(bare.post(at, &asked).await, 400, code).await;
        refused(bare.request(Method::PUT, at).json(&asked).send().await.unwrap(), 400, code).await;
        refused(bare.delete(&format!("{at}/acme")).await, 400, code).await;
        // What is stored is read and written all the same.
        stage.token(&ana).await;
        body(stage.reauthorise(&ana, "ana").await, 200).await;
    }
    fields("Edit").await;
    refused(bare.post(at, &asked).await, 401, "auth.unauthorized").await;
    refused(bare.request(Method::PUT, at).json(&asked).send().await.unwrap(), 401, "auth.unauthorized").await;
    refused(bare.delete(&format!("{at}/acme")).await, 400, "auth.unauthorized").await;
    refused(stage.link(&ben, "none").await, 400, USED).await;
    let record = stage.verified(&ben, "ana", None).await;
    refused(stage.link(&ben, &record).await, 422, "user.identity_already_in_use").await;
    let record = stage.verified(&ana, "another", None).await;
    refused(stage.link(&ana, &record).await, 400, "user.identity_already_in_use").await;

    // Replaced by another account without tokens: nothing of the old one stays (7.9, ID-13).
    let before = stage.metadata(&ana, ACME).await;
    let record = stage.verified(&ana, "another", None).await;
    let asked = json!({ "newIdentifierVerificationRecordId": record });
    let replaced = ana.api.request(Method::PUT, at).json(&asked).send().await.unwrap();
    assert_eq!(replaced.status(), 204);
    let after = stage.metadata(&ana, ACME).await;
    assert_eq!(after["identityId"], "another");
    assert_ne!(after["id"], before["id"], "another account's set is another set");
    assert_eq!(stage.idp.subject_of(&stage.token(&ana).await).as_deref(), Some("another"));
    refused(ben.api.delete(&format!("{at}/acme")).await, 404, "user.identity_not_exist").await;
    stage.finish().await;
}

#[tokio::test]
async fn a_user_with_a_password_proves_it_before_an_identity_changes() {
    let stage = Stage::dev(Mode::Strict).await;
    let password = stage.daemon().secret("Pass-word-1");
    let asked = json!({ "username": "ana", "password": password });
    let made = body(stage.admin.post("/api/users", &asked).await, 200).await;
    let id = text(&made["id"]);
    let ana = User { api: stage.session(&id, "openid identities").await, id };
    let record = stage.verified(&ana, "ana", None).await;
    refused(stage.link(&ana, &record).await, 401, "verification_record.permission_denied").await;

    let proof = ana.api.post("/api/verifications/password", &json!({ "password": password })).await;
    let proof = text(&body(proof, 201).await["verificationRecordId"]);
    let asked = json!({ "newIdentifierVerificationRecordId": record });
    let link = ana.api.request(Method::POST, "/api/my-account/identities").json(&asked);
    let linked = link.header("logto-verification-id", &proof).send().await.unwrap();
    assert_eq!(linked.status(), 204, "{}", linked.text().await.unwrap());
    let at = "/api/my-account/identities/acme";
    refused(ana.api.delete(at).await, 401, "verification_record.permission_denied").await;
    // One proof is good for several changes.
    let unlink = ana.api.request(Method::DELETE, at).header("logto-verification-id", &proof);
    assert_eq!(unlink.send().await.unwrap().status(), 204);
    stage.finish().await;
}

#[tokio::test]
async fn a_read_is_checked_in_the_contracts_order() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let at = path(ACME);
    let nobody = stage.daemon().anonymous(Method::GET, &at).send().await.unwrap();
    refused(nobody, 401, "auth.authorization_header_missing").await;
    let basic = stage.daemon().anonymous(Method::GET, &at).basic_auth("a", Some("b")).send().await.unwrap();
    refused(basic, 401, "auth.authorization_token_type_not_supported").await;
    for token in ["nonsense", &stage.admin.token] {
        refused(stage.daemon().api_of(token).get(&at).await, 401, "auth.unauthorized").await;
    }
    let set = patch(&stage.admin, "/api/account-center", &json!({ "enabled": false })).await;
    assert_eq!((&set["enabled"], &set["fields"]["social"]), (&json!(false), &json!("Edit")));
    let bare = stage.session(&ana.id, "openid").await;
    for api in [&bare, &ana.api] {
        refused(api.get(&at).await, 400, "account_center.not_enabled").await;
        let asked = json!({ "connectorId": stage.connector, "state": "s", "redirectUri": CALLBACK });
        let begun = api.post("/api/verifications/social", &asked).await;
        refused(begun, 400, "account_center.not_enabled").await;
    }
    patch(&stage.admin, "/api/account-center", &json!({ "enabled": true })).await;
    refused(bare.get(&at).await, 403, "auth.forbidden").await;
    refused(bare.get(&path("nothing")).await, 403, "auth.forbidden").await;
    refused(ana.api.get(&path("nothing")).await, 404, NOTHING).await;
    let sso = "/api/my-account/sso-identities/000000000000/access-token";
    refused(ana.api.get(sso).await, 404, NOTHING).await;
    refused(bare.get(sso).await, 403, "auth.forbidden").await;
    // The user's token opens nothing of the administrators'.
    refused(ana.api.get(&format!("/api/users/{}", ana.id)).await, 401, "auth.unauthorized").await;
    stage.token(&ana).await;
    stage.finish().await;
}

#[tokio::test]
async fn a_verification_begins_with_what_is_needed() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.user("ana").await;
    let good =
        json!({ "connectorId": stage.connector, "state": "s 1", "redirectUri": CALLBACK, "scope": "a b" });
    let begun = body(ana.api.post("/api/verifications/social", &good).await, 201).await;
    let uri = url::Url::parse(&text(&begun["authorizationUri"])).unwrap();
    let query: HashMap<_, _> = uri.query_pairs().into_owned().collect();
    assert_eq!((query["scope"].as_str(), query["state"].as_str()), ("a b", "s 1"));
    assert_eq!(query["redirect_uri"], CALLBACK);
    assert!(query.contains_key("code_challenge"), "no PKCE: {uri}");
    assert!(!uri.as_str().contains(&stage.daemon().canary), "the client secret is in the address");

    let without = |member: &str| {
        let mut asked = good.clone();
        asked.as_object_mut().unwrap().remove(member);
        asked
    };
    let with = |member: &str, value: &str| {
        let mut asked = good.clone();
        asked[member] = json!(value);
        asked
    };
    for member in ["connectorId", "state", "redirectUri"] {
        let answer = ana.api.post("/api/verifications/social", &without(member)).await;
        refused(answer, 400, "guard.invalid_input").await;
    }
    for member in ["state", "redirectUri"] {
        let answer = ana.api.post("/api/verifications/social", &with(member, "")).await;
        refused(answer, 400, "session.insufficient_info").await;
    }
    let answer = ana.api.post("/api/verifications/social", &with("connectorId", "000000000000")).await;
    refused(answer, 422, "session.invalid_connector_id").await;
    let nonsense = ana.api.request(Method::POST, "/api/verifications/social").body("{");
    let nonsense = nonsense.header("Content-Type", "application/json").send().await.unwrap();
    let said = body(nonsense, 400).await;
    assert_eq!((said.get("code"), said["message"].is_string()), (None, true), "{said}");
    stage.finish().await;
}

#[tokio::test]
async fn a_callback_that_is_not_the_one_that_was_asked_for_redeems_nothing() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.user("ana").await, stage.user("ben").await);
    let other = stage.connect("other").await;
    let verify = async |user: &User, record: &str, code: &str, state: &str, place: &str| {
        let data = json!({ "code": code, "state": state, "redirectUri": place });
        let asked = json!({ "verificationRecordId": record, "connectorData": data });
        user.api.post("/api/verifications/social/verify", &asked).await
    };
    let near = [format!("{CALLBACK}/"), format!("{CALLBACK}?a=b"), CALLBACK.to_uppercase(), String::new()];
    let near = near.iter().map(|place| (&ana, "s-1", place.as_str()));
    let others = [(&ana, "other", CALLBACK), (&ana, "", CALLBACK), (&ben, "s-1", CALLBACK)];
    let mut code = String::new();
    // One answer ends a round, so each has a round of its own.
    for (user, state, place) in others.into_iter().chain(near) {
        let (record, uri) = stage.begin(&ana, &stage.connector, None).await;
        code = stage.idp.authorize(&uri, "ana").0;
        let status = verify(user, &record, &code, state, place).await.status().as_u16();
        assert!([400, 401, 422].contains(&status), "{state:?} {place:?}: {status}");
    }
    assert_eq!(stage.idp.requests("authorization_code"), 0, "a token request was sent");

    // The code of one connector's round does not end another's: the provider knows the verifier.
    let (record, _) = stage.begin(&ana, &other, None).await;
    let status = verify(&ana, &record, &code, "s-1", CALLBACK).await.status().as_u16();
    assert!([400, 401].contains(&status), "a code was injected: {status}");
    assert_eq!(stage.sets(), 0);
    stage.finish().await;
}
