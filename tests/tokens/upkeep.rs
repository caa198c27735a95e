//! What a set's owner and an administrator are told of it (docs/formats/audit-v1.md), the breaker of a connector, and
//! sets under another KEK (KL-4).

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::idp::{Fault, Mode};
use crate::sso::{connect_to, link, linked, token_of, verified};
use crate::stage::{ACME, EXPIRED, Engine, Stage, body, put_token, refused, text, token_in, until};

const PATIENCE: Duration = Duration::from_secs(15);

/// Records of an action that is not an intent: what it was about, and what came of it.
async fn told(stage: &Stage, action: &str) -> Vec<(String, String)> {
    let records = stage.records().await.into_iter();
    let ends = records.filter(|record| record["action"] == action && record["type"] != "intent");
    ends.map(|record| {
        let outcome = &record["outcome"];
        let result = text(&outcome["result"]);
        let code = outcome["code"].as_str().map_or(result.clone(), |code| format!("{result} {code}"));
        (text(&record["object"]["kind"]), code)
    })
    .collect()
}

/// Waits for the newest record of an action; outcomes are not waited for by who asked.
async fn is_told(stage: &Stage, action: &str, kind: &str, number: usize, outcome: &str) {
    let are_there = async || told(stage, action).await.len() >= number;
    until(&format!("record {number} of {action}"), PATIENCE, are_there).await;
    let told = told(stage, action).await;
    assert_eq!((told.len(), &told[number - 1]), (number, &(kind.to_owned(), outcome.to_owned())), "{action}");
}

#[tokio::test]
async fn the_log_tells_what_became_of_a_set() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    is_told(&stage, "token-set.store", "token-set", 1, "success").await;
    is_told(&stage, "identity.link", "user", 1, "success").await;
    stage.token(&ana).await;
    is_told(&stage, "token-set.read", "user", 1, "success").await;
    assert_eq!(told(&stage, "token-set.refresh").await, []);

    stage.expire();
    stage.token(&ana).await;
    is_told(&stage, "token-set.refresh", "token-set", 1, "success").await;
    is_told(&stage, "token-set.read", "user", 2, "success").await;
    stage.expire();
    stage.idp.script([Fault::status(503)]);
    refused(stage.read(&ana).await, 400, "connector.general").await;
    is_told(&stage, "token-set.refresh", "token-set", 2, "failure provider-transient").await;
    is_told(&stage, "token-set.read", "user", 3, "denied provider-transient").await;
    let shown = stage.metadata(&ana, ACME).await;
    assert_eq!((&shown["lastError"], &shown["failures"]), (&json!("provider-transient"), &json!(1)));
    assert_eq!((&shown["status"], shown["metadata"].get("needsReauthorization")), (&json!("expired"), None));

    stage.ground.run("UPDATE token_sets SET retry_at = 0");
    stage.token(&ana).await;
    is_told(&stage, "token-set.refresh", "token-set", 3, "success").await;
    let shown = stage.metadata(&ana, ACME).await;
    assert_eq!((shown.get("lastError"), shown.get("failures")), (None, None), "{shown}");

    stage.expire();
    stage.idp.script([Fault::error(400, "invalid_grant")]);
    refused(stage.read(&ana).await, 401, EXPIRED).await;
    refused(stage.read(&ana).await, 401, EXPIRED).await;
    is_told(&stage, "token-set.refresh", "token-set", 4, "failure needs-reauthorization").await;
    is_told(&stage, "token-set.needs-reauthorization", "token-set", 1, "failure provider-grant").await;
    let shown = stage.metadata(&ana, ACME).await;
    let status = (&shown["status"], &shown["metadata"]["needsReauthorization"], &shown["lastError"]);
    assert_eq!(status, (&json!("needs_reauthorization"), &json!(true), &json!("provider-grant")));

    body(stage.reauthorise(&ana, "ana").await, 200).await;
    is_told(&stage, "token-set.store", "user", 2, "success").await;
    let shown = stage.metadata(&ana, ACME).await;
    assert_eq!((&shown["status"], shown.get("lastError")), (&json!("active"), None));
    refused(stage.reauthorise(&ana, "somebody-else").await, 422, "user.identity_not_exists_in_current_user")
        .await;
    is_told(&stage, "token-set.store", "user", 3, "failure wrong-identity").await;

    let deleted = stage.admin.delete(&format!("/api/secrets/{}", text(&shown["id"]))).await;
    assert_eq!(deleted.status(), 204);
    is_told(&stage, "token-set.delete", "token-set", 1, "success").await;
    assert_eq!(told(&stage, "token-set.revoke").await, [], "that was local");
    body(stage.reauthorise(&ana, "ana").await, 200).await;
    assert_eq!(ana.api.delete("/api/my-account/identities/acme").await.status(), 204);
    is_told(&stage, "token-set.delete", "token-set", 2, "success").await;
    is_told(&stage, "token-set.revoke", "provider", 1, "success").await;
    let records = stage.records().await;
    let last = records.iter().rev().find(|record| record["action"] == "token-set.delete").unwrap();
    assert_eq!(last["details"]["why"], "identity-unlinked", "{last}");
    stage.finish().await;
}

#[tokio::test]
async fn a_connector_that_is_refused_is_told_once_and_left_alone() {
    let stage = Stage::dev(Mode::Strict).await;
    let mut users = Vec::new();
    for number in 0..8 {
        users.push(stage.linked(&format!("user_{number}")).await);
    }
    stage.expire();
    stage.idp.script((0..100).map(|_| Fault::error(401, "invalid_client")));
    for answer in join_all(users.iter().map(|user| stage.read(user))).await {
        assert!(answer.headers().contains_key("Retry-After"));
        refused(answer, 400, "connector.general").await;
    }
    let asked = stage.idp.refreshes();
    assert!(asked <= users.len(), "{asked} requests");
    is_told(&stage, "connector.breaker", "connector", 1, "failure provider-config").await;
    let at = format!("/api/connectors/{}", stage.connector);
    let shown = body(stage.admin.get(&at).await, 200).await;
    assert_eq!(shown["pausedFor"], "provider-config");
    assert!(shown["pausedUntil"].as_i64().unwrap() > crate::stage::now() * 1000);

    // Nobody's set is asked about, of those that have not failed either.
    stage.ground.run("UPDATE token_sets SET retry_at = 0, failures = 0");
    for user in &users {
        refused(stage.read(user).await, 400, "connector.general").await;
    }
    assert_eq!(stage.idp.refreshes(), asked);
    stage.idp.forget_faults();
    stage.ground.run("UPDATE connectors SET breaker_until = 0");
    for user in &users {
        assert!(stage.idp.is_live(&stage.token(user).await));
    }
    let shown = body(stage.admin.get(&at).await, 200).await;
    assert_eq!((shown.get("pausedUntil"), shown.get("pausedFor")), (None, None), "it is closed again");
    is_told(&stage, "connector.breaker", "connector", 1, "failure provider-config").await;
    stage.finish().await;
}

async fn keks(stage: &Stage) -> Vec<u64> {
    let list = body(stage.admin.get("/v1/keks").await, 200).await;
    list["items"].as_array().unwrap().iter().map(|kek| kek["records"].as_u64().unwrap()).collect()
}

async fn under_another_kek(engine: Engine) {
    let mut stage = Stage::serve(engine, Mode::Strict, "").await;
    let enterprise = connect_to(&stage, &stage.idp).await;
    let (ana, ben) = (stage.linked("ana").await, linked(&stage, &stage.idp, &enterprise, "ben").await);
    let parked = stage.verified(&ana, "ana", None).await;
    let theirs = verified(&stage.idp, &stage.user("eva").await, &enterprise, "eva").await;
    let kept = [stage.token(&ana).await, token_in(ben.api.get(&token_of(&enterprise)).await).await];
    let before: u64 = keks(&stage).await.iter().sum();
    assert!(before >= 7, "two sets, two connectors, two proofs and the settings: {before}");

    body(stage.admin.post("/v1/keks/rotate", &json!({})).await, 201).await;
    let job = body(stage.admin.post("/v1/keks/rewrap", &json!({})).await, 202).await;
    let ended = stage.admin.job(&text(&job["id"])).await;
    assert_eq!((&ended["state"], &ended["failed"]), (&json!("succeeded"), &json!(0)), "{ended}");
    assert_eq!(keks(&stage).await, [before, 0], "not all have moved");
    // Nothing that was opened before is still open.
    stage.ground.daemon.restart().await;

    assert_eq!(stage.token(&ana).await, kept[0]);
    assert_eq!(token_in(ben.api.get(&token_of(&enterprise)).await).await, kept[1]);
    stage.expire();
    for token in [stage.token(&ana).await, token_in(ben.api.get(&token_of(&enterprise)).await).await] {
        assert!(stage.idp.is_live(&token) && !kept.contains(&token));
    }
    body(put_token(&ana, ACME, &parked).send().await.unwrap(), 200).await;
    // A proof of somebody else is still nobody else's.
    assert_eq!(link(&ana, &theirs).await.status(), 400);
    let records: Vec<Value> = stage.records().await;
    assert!(!records.iter().any(|record| text(&record["action"]).starts_with("incident.")));
    stage.finish().await;
}

#[tokio::test]
async fn sets_connectors_and_proofs_move_to_another_kek_on_sqlite() {
    under_another_kek(Engine::Sqlite).await;
}

#[tokio::test]
async fn sets_connectors_and_proofs_move_to_another_kek_on_postgresql() {
    under_another_kek(Engine::Postgres).await;
}
