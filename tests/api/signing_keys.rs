//! `/v1/signing-keys`: the native face of the same rings.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::Api;
use crate::stage::{Engine, Stage, on_both, problem};

const JWT: &str = "/v1/signing-keys/jwt";

async fn ok(answer: reqwest::Response) -> Value {
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert_eq!(status, StatusCode::OK, "{text}");
    serde_json::from_str(&text).unwrap()
}

async fn ring(api: &Api, path: &str) -> Vec<Value> {
    ok(api.get(path).await).await["items"].as_array().unwrap().clone()
}

async fn a_ring(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let first = ring(&api, JWT).await;
    let members: Vec<_> = first[0].as_object().unwrap().keys().collect();
    let all = [
        "id",
        "use",
        "status",
        "algorithm",
        "kid",
        "alg",
        "origin",
        "device",
        "created_at",
        "effective_at",
        "is_signing",
        "signs_from",
        "signs_until",
        "published_until",
        "waits_for",
    ];
    assert_eq!(members, all);
    assert_eq!(
        ["use", "status", "algorithm", "alg", "origin"].map(|name| first[0][name].as_str().unwrap()),
        ["jwt", "Current", "EC", "ES256", "generated"]
    );
    assert_eq!(first[0]["is_signing"], true);
    let cookie = ring(&api, "/v1/signing-keys/cookie").await;
    assert_eq!((&cookie[0]["use"], &cookie[0]["algorithm"]), (&json!("cookie"), &Value::Null));

    let asked = json!({ "algorithm": "ES384", "grace": 3600 });
    let would_be = ok(api.post(&format!("{JWT}/rotate?dry_run=true"), &asked).await).await;
    assert_eq!((&would_be["dry_run"], would_be["items"].as_array().unwrap().len()), (&json!(true), 2));
    assert_eq!(ring(&api, JWT).await.len(), 1, "nothing was changed");
    let staged = ok(api.post(&format!("{JWT}/rotate"), &asked).await).await;
    assert_eq!((&staged["dry_run"], &staged["items"][0]["status"]), (&json!(false), &json!("Next")));
    assert_eq!(staged["items"][0]["algorithm"], "ES384");
    problem(api.post(&format!("{JWT}/rotate"), &json!({ "grace": 0 })).await, 409, "next-pending").await;
    problem(api.post(&format!("{JWT}/revert"), &json!({})).await, 409, "next-pending").await;
    let left = ok(api.post(&format!("{JWT}/cancel"), &json!({})).await).await;
    assert_eq!(left["items"][0]["id"], first[0]["id"]);
    problem(api.post(&format!("{JWT}/cancel"), &json!({})).await, 404, "not-found").await;

    let id = first[0]["id"].as_str().unwrap();
    problem(api.delete(&format!("{JWT}/{id}")).await, 409, "key-required").await;
    let new = ok(api.post(&format!("{JWT}/rotate"), &json!({})).await).await;
    assert_eq!(
        (&new["items"][0]["is_signing"], &new["items"][1]["is_signing"]),
        (&json!(false), &json!(true))
    );
    assert!(new["items"][0]["waits_for"].is_string());
    let newest = new["items"][0]["id"].as_str().unwrap();
    problem(api.delete(&format!("{JWT}/{newest}")).await, 409, "only-previous").await;
    let revoked = ok(api.post(&format!("{JWT}/{id}/revoke"), &json!({})).await).await;
    assert!(revoked["dead_tokens"].as_u64().unwrap() >= 1, "{revoked}");
    assert_eq!(
        (&revoked["items"][0]["id"], &revoked["items"][0]["is_signing"]),
        (&json!(newest), &json!(true))
    );
    problem(api.get(JWT).await, 401, "invalid-token").await;
    stage.daemon.finish().await;
}
on_both!(a_ring_is_shown_and_changed_with_all_that_is_known_of_it, a_ring);

#[tokio::test]
async fn what_no_ring_takes_is_refused() {
    let stage = Stage::on(Engine::Sqlite, "").await;
    let api = stage.daemon.api().await;
    for path in ["/v1/signing-keys/client-secret", "/v1/signing-keys/JWT", "/v1/signing-keys"] {
        problem(api.get(path).await, 404, "not-found").await;
    }
    for bad in [
        json!({ "algorithm": "DSA" }),
        json!({ "grace": -1 }),
        json!({ "grace": 31_536_001 }),
        json!({ "rotationGracePeriod": 1 }),
    ] {
        problem(api.post(&format!("{JWT}/rotate"), &bad).await, 422, "invalid").await;
    }
    problem(api.post(&format!("{JWT}/rotate?dryRun=true"), &json!({})).await, 422, "invalid").await;
    problem(api.post("/v1/signing-keys/cookie/rotate", &json!({ "grace": 0 })).await, 422, "invalid").await;
    for bad in [
        json!({ "pem": "x", "as": "current" }),
        json!({ "pem": "x", "as": "next" }),
        json!({ "pem": "x", "as": "previous" }),
        json!({ "pem": "x", "as": "current", "lifetime": "1" }),
    ] {
        problem(api.post(&format!("{JWT}/import"), &bad).await, 422, "invalid").await;
    }
    let patch = |body: Value| api.request(Method::PATCH, &format!("{JWT}/policy")).json(&body).send();
    for bad in [json!({ "skew": 3601 }), json!({ "careful_until": 1 }), json!({ "ec_curve": "P-521" })] {
        problem(patch(bad).await.unwrap(), 422, "invalid").await;
    }
    assert_eq!(ring(&api, JWT).await.len(), 1, "nothing was done");
    stage.daemon.finish().await;
}

async fn an_orphan(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let orphans = "/v1/signing-keys/orphans";
    // On PostgreSQL the SQLite installation that was there before has keys on the same token: nobody's, as far as can be known.
    let neighbours = ring(&api, orphans).await;
    assert_eq!(neighbours.is_empty(), engine == Engine::Sqlite);
    let staged = ok(api.post(&format!("{JWT}/rotate"), &json!({ "grace": 3600 })).await).await;
    let id = staged["items"][0]["id"].as_str().unwrap();
    // The row goes, as with an older copy of the database; the object stays.
    stage.run(&format!("DELETE FROM signing_keys WHERE id = '{id}'"));
    stage.run("UPDATE signing_rings SET version = version + 1 WHERE purpose = 'jwt'");
    let mut found = ring(&api, orphans).await;
    found.retain(|one| !neighbours.contains(one));
    assert_eq!(
        (found.len(), &found[0]["kind"], &found[0]["device"]),
        (1, &json!("ec-p256"), &json!("default"))
    );

    problem(api.delete(&format!("{orphans}/{}", "0".repeat(32))).await, 404, "not-found").await;
    let object = found[0]["id"].as_str().unwrap();
    assert_eq!(api.delete(&format!("{orphans}/{object}")).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(ring(&api, orphans).await.len(), neighbours.len());
    problem(api.delete(&format!("{orphans}/{object}")).await, 404, "not-found").await;
    stage.daemon.finish().await;
}
on_both!(an_object_without_a_row_is_found_and_destroyed_by_hand, an_orphan);
