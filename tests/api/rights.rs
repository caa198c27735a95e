//! Who may call what: every route with every single right, and with credentials that are none.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::stage::{Engine, Stage, on_both, problem, stored};

const SCOPES: [&str; 17] = [
    "secrets:metadata",
    "secrets:read",
    "secrets:write",
    "crypto:use",
    "keys:admin",
    "audit:read",
    "apps:admin",
    "signing-keys:admin",
    "signing-keys:revoke",
    "tokens:sign",
    "cookies:sign",
    "users:admin",
    "connectors:admin",
    "token-sets:admin",
    "token-sets:read",
    "token-sets:exchange",
    "users:impersonate",
];

/// Every route of docs/api.md with the right it needs, and the status that the right gives here.
fn routes(id: &str) -> Vec<(Method, String, Value, &'static str, u16)> {
    let (get, post) = (Method::GET, Method::POST);
    let none = || json!({});
    let secret = |rest: &str| format!("/v1/secrets/{id}{rest}");
    let job = "/v1/jobs/01a21768-4101-75eb-a9af-db33cf966f25";
    vec![
        (get.clone(), secret(""), none(), "secrets:metadata", 200),
        (get.clone(), secret("/value"), none(), "secrets:read", 200),
        (get.clone(), secret("/versions"), none(), "secrets:metadata", 200),
        (get.clone(), "/v1/secrets".to_owned(), none(), "secrets:metadata", 200),
        (
            post.clone(),
            "/v1/secrets".to_owned(),
            json!({ "name": "", "kind": "opaque", "value": "" }),
            "secrets:write",
            422,
        ),
        (Method::PUT, secret("/value"), json!({ "value": "" }), "secrets:write", 412),
        (Method::DELETE, secret(""), none(), "secrets:write", 412),
        (get.clone(), "/v1/keks".to_owned(), none(), "keys:admin", 200),
        (post.clone(), "/v1/keks/rewrap".to_owned(), none(), "keys:admin", 202),
        (get.clone(), job.to_owned(), none(), "keys:admin", 404),
        (post.clone(), format!("{job}/cancel"), none(), "keys:admin", 404),
        (post.clone(), "/v1/restore/release".to_owned(), none(), "keys:admin", 200),
        (post.clone(), "/v1/datakeys".to_owned(), json!({ "context": "c" }), "crypto:use", 200),
        (post.clone(), "/v1/seal".to_owned(), json!({ "context": "c", "value": "v" }), "crypto:use", 200),
        (post.clone(), "/v1/open".to_owned(), json!({ "context": "c", "sealed": "AAAA" }), "crypto:use", 422),
        (get.clone(), "/v1/audit/events".to_owned(), none(), "audit:read", 200),
        (get.clone(), "/v1/apps".to_owned(), none(), "apps:admin", 200),
        (post.clone(), "/v1/apps".to_owned(), json!({ "name": "", "scopes": [] }), "apps:admin", 422),
        (Method::DELETE, "/v1/apps/app-00000000000000000000".to_owned(), none(), "apps:admin", 404),
        (get.clone(), "/v1/apps/app-00000000000000000000/signing".to_owned(), none(), "apps:admin", 404),
        (Method::PUT, "/v1/apps/app-00000000000000000000/signing".to_owned(), none(), "apps:admin", 404),
        (post.clone(), "/v1/jwt".to_owned(), json!({ "claims": {}, "lifetime": 1 }), "tokens:sign", 403),
        (post.clone(), "/v1/jws".to_owned(), json!({ "signing_input": "a.b" }), "tokens:sign", 403),
        (get.clone(), "/v1/signing-keys/current".to_owned(), none(), "tokens:sign", 200),
        (
            post.clone(),
            "/v1/cookies/sign".to_owned(),
            json!({ "name": "a", "value": "b" }),
            "cookies:sign",
            403,
        ),
        (
            post.clone(),
            "/v1/cookies/verify".to_owned(),
            json!({ "name": "a", "value": "b", "signature": "c" }),
            "cookies:sign",
            403,
        ),
        (
            post.clone(),
            "/v1/token-sets/access-token".to_owned(),
            json!({ "user_id": "nobody", "connection": "github", "reason": "a test" }),
            "token-sets:read",
            404,
        ),
        (post, "/v1/keks/rotate".to_owned(), none(), "keys:admin", 201),
    ]
    .into_iter()
    .chain(signing_key_routes())
    .collect()
}

/// Those of both rings. Nothing of them changes a key that is in use.
fn signing_key_routes() -> Vec<(Method, String, Value, &'static str, u16)> {
    let (get, post, admin) = (Method::GET, Method::POST, "signing-keys:admin");
    let nothing = "000000000000000000000";
    let of_ring = |name: &str| {
        let path = |rest: &str| format!("/v1/signing-keys/{name}{rest}");
        let revoke = format!("/{nothing}/revoke");
        vec![
            (get.clone(), path(""), json!({}), admin, 200),
            (post.clone(), path("/rotate?dry_run=true"), json!({}), admin, 200),
            (post.clone(), path("/cancel"), json!({}), admin, 404),
            (post.clone(), path("/revert"), json!({}), admin, 404),
            (Method::DELETE, path(&format!("/{nothing}")), json!({}), admin, 409),
            (post.clone(), path(&revoke), json!({}), "signing-keys:revoke", 404),
            (get.clone(), path("/policy"), json!({}), admin, 200),
            (Method::PATCH, path("/policy"), json!({}), admin, 200),
        ]
    };
    let import = json!({ "pem": "x", "as": "current" });
    let import = (post.clone(), "/v1/signing-keys/jwt/import".to_owned(), import, admin, 422);
    let orphans = (get.clone(), "/v1/signing-keys/orphans".to_owned(), json!({}), admin, 200);
    let orphan = format!("/v1/signing-keys/orphans/{}", "0".repeat(32));
    let orphan = (Method::DELETE, orphan, json!({}), admin, 404);
    let clock = (post.clone(), "/v1/signing-keys/clock/accept".to_owned(), json!({}), admin, 204);
    ["jwt", "cookie"].into_iter().flat_map(of_ring).chain([import, orphans, orphan, clock]).collect()
}

/// Those of the Logto family.
fn logto_routes() -> Vec<(Method, String, Value, &'static str, u16)> {
    let (get, post, admin) = (Method::GET, Method::POST, "signing-keys:admin");
    let nothing = "000000000000000000000";
    let of_kind = |name: &str| {
        let path = |rest: &str| format!("/api/configs/oidc/{name}{rest}");
        let revoke = format!("/{nothing}/revoke");
        vec![
            (get.clone(), path(""), json!({}), admin, 200),
            (post.clone(), path("/rotate?dryRun=true"), json!({}), admin, 200),
            (Method::DELETE, path("/next"), json!({}), admin, 404),
            (post.clone(), path("/revert"), json!({}), admin, 404),
            (Method::DELETE, path(&format!("/{nothing}")), json!({}), admin, 422),
            (post.clone(), path(&revoke), json!({}), "signing-keys:revoke", 404),
            (get.clone(), path("/policy"), json!({}), admin, 200),
            (Method::PATCH, path("/policy"), json!({}), admin, 200),
        ]
    };
    let session = "/api/configs/oidc/session".to_owned();
    let import = json!({ "pem": "x", "as": "Current" });
    let others = [
        (get.clone(), session.clone(), json!({}), admin, 200),
        (Method::PATCH, session, json!({}), admin, 200),
        (post.clone(), "/api/configs/oidc/private-keys/import".to_owned(), import, admin, 400),
    ];
    let keys = ["private-keys", "cookie-keys"].into_iter().flat_map(of_kind).chain(others);
    keys.chain(token_set_routes()).collect()
}

/// Those of users, connectors, token sets and applications. None of them finds or makes anything.
fn token_set_routes() -> Vec<(Method, String, Value, &'static str, u16)> {
    let (get, post, patch, delete) = (Method::GET, Method::POST, Method::PATCH, Method::DELETE);
    let (users, connectors, apps) = ("users:admin", "connectors:admin", "apps:admin");
    let user = |rest: &str| format!("/api/users/000000000000{rest}");
    let none = || json!({});
    let (no_name, no_app) = (|| json!({ "username": "1" }), || json!({ "name": "", "type": "Traditional" }));
    let nowhere = || json!({ "connectorId": "nothing", "providerName": "nothing", "connectorName": "n" });
    let link = || json!({ "connectorId": "c", "connectorData": {} });
    let row = |method: &Method, path: &str, body: Value, needed: &'static str, status: u16| {
        (method.clone(), path.to_owned(), body, needed, status)
    };
    vec![
        row(&get, "/api/users", none(), users, 200),
        row(&post, "/api/users", no_name(), users, 400),
        row(&get, &user(""), none(), users, 404),
        row(&patch, &user(""), none(), users, 404),
        row(&delete, &user(""), none(), users, 404),
        row(&patch, &user("/password"), json!({ "password": "x" }), users, 404),
        row(&patch, &user("/is-suspended"), json!({ "isSuspended": true }), users, 404),
        row(&get, &user("/custom-data"), none(), users, 404),
        row(&patch, &user("/custom-data"), json!({ "customData": {} }), users, 404),
        row(&get, &user("/identities/github"), none(), users, 404),
        row(&Method::PUT, &user("/identities/github"), json!({ "userId": "1" }), users, 404),
        row(&delete, &user("/identities/github"), none(), users, 404),
        row(&post, &user("/identities"), link(), users, 404),
        row(&get, &user("/sso-identities/c"), none(), users, 404),
        row(&delete, &user("/sso-identities/c"), none(), users, 404),
        row(&get, &user("/all-identities"), none(), users, 404),
        row(&get, "/api/connectors", none(), connectors, 200),
        row(&post, "/api/connectors", nowhere(), connectors, 404),
        row(&get, "/api/connectors/c", none(), connectors, 404),
        row(&patch, "/api/connectors/c", none(), connectors, 404),
        row(&delete, "/api/connectors/c", none(), connectors, 404),
        row(&get, "/api/connector-factories", none(), connectors, 200),
        row(&get, "/api/sso-connectors", none(), connectors, 200),
        row(&post, "/api/sso-connectors", nowhere(), connectors, 404),
        row(&get, "/api/sso-connectors/c", none(), connectors, 404),
        row(&patch, "/api/sso-connectors/c", none(), connectors, 404),
        row(&delete, "/api/sso-connectors/c", none(), connectors, 404),
        row(&get, "/api/sso-connector-providers", none(), connectors, 200),
        row(&get, "/api/account-center", none(), connectors, 200),
        row(&patch, "/api/account-center", none(), connectors, 200),
        row(&delete, "/api/secrets/000000000000000000000", none(), "token-sets:admin", 404),
        row(&delete, "/api/secret/000000000000000000000", none(), "token-sets:admin", 404),
        row(&post, "/api/subject-tokens", json!({ "userId": "u" }), "users:impersonate", 404),
        row(&get, "/api/applications", none(), apps, 200),
        row(&post, "/api/applications", no_app(), apps, 400),
        row(&get, "/api/applications/app-0", none(), apps, 404),
        row(&patch, "/api/applications/app-0", none(), apps, 404),
        row(&delete, "/api/applications/app-0", none(), apps, 404),
    ]
}

async fn every_logto_route_with_every_right(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let daemon = &stage.daemon;
    for scope in SCOPES.into_iter().chain(["all"]) {
        let api = daemon.api_with(scope).await;
        for (method, path, body, needed, status) in logto_routes() {
            let request = api.request(method.clone(), &path);
            let request = if method == Method::GET { request } else { request.json(&body) };
            let answer = request.send().await.unwrap();
            let (now, text) = (answer.status().as_u16(), answer.text().await.unwrap());
            if scope == needed || scope == "all" {
                assert_eq!(now, status, "{method} {path} with {scope}: {text}");
            } else {
                assert_eq!(now, 403, "{method} {path} with {scope}: {text}");
                assert!(text.contains("\"auth.forbidden\""), "{text}");
            }
        }
    }
    for (method, path, _, _, _) in logto_routes() {
        for bad in [String::new(), "garbage".to_owned(), "a".repeat(5000)] {
            let answer = daemon.api_of(&bad).request(method.clone(), &path).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{method} {path}");
        }
        let answer = daemon.anonymous(method, &path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
    }
    stage.daemon.finish().await;
}
on_both!(each_logto_route_takes_its_own_right_or_all, every_logto_route_with_every_right);

async fn every_route_with_every_right(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let daemon = &stage.daemon;
    let id = stored(&daemon.api().await, "guarded", &daemon.secret("guarded")).await;
    for scope in SCOPES {
        let api = daemon.api_with(scope).await;
        for (method, path, body, needed, status) in routes(&id) {
            let request = api.request(method.clone(), &path).header("If-Match", "\"999\"");
            let request = if method == Method::GET { request } else { request.json(&body) };
            let answer = request.send().await.unwrap();
            if scope == needed {
                let now = answer.status().as_u16();
                assert_eq!(now, status, "{method} {path} with {scope}: {}", answer.text().await.unwrap());
            } else {
                let asked = answer.headers().get("WWW-Authenticate").cloned();
                problem(answer, 403, "insufficient-scope").await;
                let asked = asked.expect("names what is missing");
                assert!(asked.to_str().unwrap().contains(needed), "{method} {path}: {asked:?}");
            }
        }
        assert_eq!(api.get("/v1/status").await.status(), StatusCode::OK);
    }
    let api = daemon.api().await;
    assert_eq!(api.value(&id).await, daemon.secret("guarded"), "still as it was");
    // Replacing whatever is there takes no right to look at it.
    let writer = daemon.api_with("secrets:write").await;
    assert_eq!(writer.replace(&id, &daemon.secret("guarded")).await.status(), StatusCode::OK);
    let records = api.audit_lines().await;
    let denied =
        records.iter().filter(|line| line.contains("secret.reveal") && line.contains("\"denied\"")).count();
    assert_eq!(denied, SCOPES.len() - 1, "refused releases are on record");
    stage.daemon.finish().await;
}
on_both!(each_route_takes_its_own_right_and_no_other, every_route_with_every_right);

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

async fn credentials_that_are_none(engine: Engine) {
    let (stage, other) = (Stage::on(engine, "").await, Stage::on(engine, "").await);
    let daemon = &stage.daemon;
    let good = daemon.token("all").await;
    let id = stored(&daemon.api_of(&good), "guarded", &daemon.secret("guarded")).await;
    let parts: Vec<_> = good.split('.').collect();
    let few = daemon.token("audit:read").await;
    let few: Vec<_> = few.split('.').collect();
    let (header, claims) = (decoded(parts[0]), decoded(parts[1]));
    let with = |name: &str, value: Value| {
        let mut changed = claims.clone();
        changed[name] = value;
        format!("{}.{}.{}", parts[0], part(&changed), parts[2])
    };
    let as_alg = |alg: &str| {
        let mut changed = header.clone();
        changed["alg"] = json!(alg);
        format!("{}.{}.{}", part(&changed), parts[1], parts[2])
    };
    let bad = [
        ("no token at all", String::new()),
        ("not a token", "garbage".to_owned()),
        ("another daemon's", other.daemon.token("all").await),
        ("unsigned", format!("{}.{}.", part(&json!({ "alg": "none", "typ": "at+jwt" })), parts[1])),
        ("alg none", as_alg("none")),
        ("alg HS256", as_alg("HS256")),
        ("longer lived", with("exp", json!(9_999_999_999_u64))),
        ("more rights", {
            let (mut claims, parts) = (decoded(few[1]), &few);
            claims["scope"] = json!("all");
            format!("{}.{}.{}", parts[0], part(&claims), parts[2])
        }),
        ("text for a time", with("exp", json!("9999999999"))),
        ("its signature cut", good[..good.len() - 2].to_owned()),
        ("64 KiB", "a".repeat(65_536 - 100)),
    ];
    for (what, token) in &bad {
        for (method, path, _, _, _) in routes(&id) {
            let answer = daemon.api_of(token).request(method.clone(), &path).send().await.unwrap();
            let status = answer.status();
            // A header beyond any sense does not come as far as a route.
            let refused =
                status == StatusCode::UNAUTHORIZED || (*what == "64 KiB" && status.is_client_error());
            assert!(refused, "{what}: {method} {path} answered {status}");
        }
    }
    for (method, path, _, _, _) in routes(&id) {
        problem(daemon.anonymous(method, &path).send().await.unwrap(), 401, "unauthenticated").await;
    }
    problem(daemon.api_of("garbage").get("/v1/nowhere").await, 401, "invalid-token").await;
    assert_eq!(daemon.api_of(&good).value(&id).await, daemon.secret("guarded"));
    other.daemon.finish().await;
    stage.daemon.finish().await;
}
on_both!(a_credential_that_is_none_opens_nothing, credentials_that_are_none);

async fn many_wrong_secrets(engine: Engine) {
    const TRIES: usize = 200;
    let stage = Stage::on(engine, "").await;
    let daemon = &stage.daemon;
    let known = daemon.dev_json()["management"]["client_id"].as_str().unwrap().to_owned();
    let token = |id: String, secret: &'static str| {
        let form = [("grant_type", "client_credentials")];
        daemon.anonymous(Method::POST, "/oidc/token").basic_auth(id, Some(secret)).form(&form).send()
    };
    for number in 0..TRIES {
        let id = if number % 2 == 0 { known.clone() } else { format!("app-{number:012x}") };
        assert_eq!(token(id, "wrong").await.unwrap().status(), StatusCode::UNAUTHORIZED);
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    token(known.clone(), "wrong").await.unwrap();

    let lines = daemon.api().await.audit_lines().await;
    let records = lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let refused: Vec<_> =
        records.filter(|one| one["action"] == "token.issue" && one["type"] == "event").collect();
    // 20 at once and 5 a second; a slow machine takes a few seconds for the tries.
    assert!((20..TRIES / 2).contains(&refused.len()), "{} records", refused.len());
    let left_out = refused.iter().map(|one| one["details"]["unrecorded"].as_str().unwrap());
    let left_out: usize = left_out.map(|count| count.parse::<usize>().unwrap()).sum();
    assert_eq!(refused.len() + left_out, TRIES + 1, "each is recorded or counted");
    let objects: BTreeSet<_> = refused.iter().map(|one| one["object"]["id"].as_str().unwrap()).collect();
    assert_eq!(objects, BTreeSet::from([known.as_str(), "unknown"]));
    stage.daemon.finish().await;
}
on_both!(clients_that_are_not_let_in_do_not_fill_the_audit_log, many_wrong_secrets);

async fn a_tokens_end(engine: Engine) {
    let stage = Stage::on(engine, "[issuer]\ntoken_lifetime = \"3s\"").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let id = stored(&api, "guarded", &daemon.secret("guarded")).await;
    let body = json!({ "name": "guest", "scopes": ["secrets:read"] });
    let app: Value = api.post("/v1/apps", &body).await.json().await.unwrap();
    let (client, secret) = (app["client_id"].as_str().unwrap(), app["client_secret"].as_str().unwrap());
    let guest = daemon.api_of(&daemon.token_of(client, secret, "all").await);
    assert_eq!(guest.value(&id).await, daemon.secret("guarded"));
    problem(guest.get(&format!("/v1/secrets/{id}")).await, 403, "insufficient-scope").await;

    assert_eq!(api.delete(&format!("/v1/apps/{client}")).await.status(), StatusCode::NO_CONTENT);
    problem(guest.get(&format!("/v1/secrets/{id}/value")).await, 401, "invalid-token").await;
    tokio::time::sleep(Duration::from_millis(4200)).await;
    problem(api.get(&format!("/v1/secrets/{id}/value")).await, 401, "invalid-token").await;
    stage.daemon.finish().await;
}
on_both!(a_token_ends_with_its_time_and_with_its_application, a_tokens_end);
