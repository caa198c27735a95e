//! `/api/configs/oidc` as software written for Logto uses it: contract, sections 4.1, 5 and 9.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use p256::pkcs8::EncodePrivateKey;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::daemon::Api;
use crate::stage::{Engine, Stage, on_both};

const PRIVATE: &str = "/api/configs/oidc/private-keys";
const COOKIE: &str = "/api/configs/oidc/cookie-keys";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The body of an answer of the given status.
async fn body(answer: Response, status: u16) -> Value {
    let now = answer.status().as_u16();
    let text = answer.text().await.unwrap();
    assert_eq!(now, status, "{text}");
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

async fn refused(answer: Response, status: u16, code: &str) -> Value {
    assert!(answer.headers().contains_key("Logto-Core-Request-Id"));
    assert_eq!(answer.headers().get("ETag"), None);
    let body = body(answer, status).await;
    assert_eq!(body["code"], code, "{body}");
    assert!(body["message"].is_string(), "{body}");
    body
}

async fn list(api: &Api, path: &str) -> Vec<Value> {
    body(api.get(path).await, 200).await.as_array().unwrap().clone()
}

async fn change(api: &Api, path: &str, asked: Value) -> Vec<Value> {
    body(api.post(path, &asked).await, 200).await.as_array().unwrap().clone()
}

/// Status and algorithm of each key.
fn shape(keys: &[Value]) -> Vec<(&str, &str)> {
    let text = |key: &'static str| move |item| -> &str { str_of(item, key) };
    keys.iter().map(|item| (text("status")(item), text("signingKeyAlgorithm")(item))).collect()
}

fn str_of<'a>(item: &'a Value, member: &str) -> &'a str {
    item[member].as_str().unwrap_or_else(|| panic!("no {member} in {item}"))
}

fn ids(keys: &[Value]) -> Vec<&str> {
    keys.iter().map(|item| str_of(item, "id")).collect()
}

async fn delete(api: &Api, path: &str, id: &str) -> Response {
    api.delete(&format!("{path}/{id}")).await
}

/// The header of a session's token.
fn header(api: &Api) -> Value {
    let header = URL_SAFE_NO_PAD.decode(api.token.split('.').next().unwrap()).unwrap();
    serde_json::from_slice(&header).unwrap()
}

/// The sequence of section 9.4; where Logto would lose a live token, Lacre keeps the key.
async fn worked_sequence(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let first = list(&api, PRIVATE).await;
    assert_eq!(shape(&first), [("Current", "EC")]);
    let members: Vec<_> = first[0].as_object().unwrap().keys().take(4).collect();
    assert_eq!(members, ["id", "createdAt", "signingKeyAlgorithm", "status"]);
    assert!(first[0]["createdAt"].as_u64().unwrap().abs_diff(now()) < 120, "seconds: {}", first[0]);
    assert!(str_of(&first[0], "id").len() == 21 && str_of(&first[0], "kid").len() == 43);
    assert_eq!(first[0].get("effectiveAt"), None);
    let k1 = str_of(&first[0], "id").to_owned();

    let rotate = format!("{PRIVATE}/rotate");
    let two = change(&api, &rotate, json!({ "signingKeyAlgorithm": "RSA" })).await;
    assert_eq!(shape(&two), [("Current", "RSA"), ("Previous", "EC")]);
    assert_eq!(two[1]["id"], k1.as_str());
    // It is honoured at once, and says from when the key signs and why not yet.
    assert!(two[0]["signsFrom"].as_u64().unwrap() > now() * 1000, "milliseconds: {}", two[0]);
    assert!(two[0]["waitsFor"].is_string());
    let k2 = str_of(&two[0], "id").to_owned();

    let three = body(api.request(Method::POST, &rotate).send().await.unwrap(), 200).await;
    let three = three.as_array().unwrap();
    assert_eq!(shape(three), [("Current", "EC"), ("Previous", "RSA"), ("Previous", "EC")]);
    assert_eq!(ids(three)[1..], [k2.as_str(), k1.as_str()]);
    let k3 = str_of(&three[0], "id").to_owned();

    refused(delete(&api, PRIVATE, &k3).await, 422, "oidc.only_previous_key_can_be_deleted").await;
    for unknown in ["000000000000000000000", "no-such-key", "p3dz8c2wy85x49jjm4qv6"] {
        refused(delete(&api, PRIVATE, unknown).await, 404, "oidc.key_not_found").await;
    }
    let would_be = body(api.delete(&format!("{PRIVATE}/{k2}?dryRun=true")).await, 200).await;
    assert_eq!(ids(would_be.as_array().unwrap()), [&k3, &k1]);
    assert_eq!(list(&api, PRIVATE).await.len(), 3, "a dry run changes nothing");
    for previous in [&k2, &k1] {
        assert_eq!(delete(&api, PRIVATE, previous).await.status(), StatusCode::NO_CONTENT);
    }
    assert_eq!(ids(&list(&api, PRIVATE).await), [&k3]);
    for id in [k3.as_str(), "000000000000000000000", "no-such-key"] {
        refused(delete(&api, PRIVATE, id).await, 422, "oidc.key_required").await;
    }

    let staged =
        change(&api, &rotate, json!({ "signingKeyAlgorithm": "ES384", "rotationGracePeriod": 14_400 })).await;
    assert_eq!(shape(&staged), [("Next", "ES384"), ("Current", "EC")]);
    assert_eq!(staged[0].as_object().unwrap().keys().nth(4).unwrap(), "effectiveAt");
    let effective = staged[0]["effectiveAt"].as_u64().unwrap();
    assert!(effective.abs_diff((now() + 14_400) * 1000) < 60_000, "{effective}");
    let again =
        change(&api, &rotate, json!({ "signingKeyAlgorithm": "EC", "rotationGracePeriod": 7200 })).await;
    assert_eq!(shape(&again), [("Next", "EC"), ("Current", "EC")]);
    assert_ne!(again[0]["id"], staged[0]["id"], "the pending one was replaced");
    assert_eq!(again[1]["id"], k3.as_str());
    stage.daemon.finish().await;
}
on_both!(the_worked_sequence_ends_as_the_contract_says, worked_sequence);

async fn pending_next(engine: Engine) {
    let stage = Stage::on(engine, "[keys]\nrotation_grace = \"1h\"").await;
    let api = stage.daemon.api().await;
    let rotate = format!("{PRIVATE}/rotate");
    refused(api.delete(&format!("{PRIVATE}/next")).await, 404, "oidc.key_not_found").await;
    refused(api.post(&format!("{PRIVATE}/revert"), &json!({})).await, 404, "oidc.key_not_found").await;

    let would_be = change(&api, &format!("{rotate}?dryRun=true"), json!({})).await;
    assert_eq!(shape(&would_be), [("Next", "EC"), ("Current", "EC")], "the configured grace");
    assert_eq!(list(&api, PRIVATE).await.len(), 1);
    let staged = change(&api, &rotate, json!({})).await;
    assert_eq!(shape(&staged), [("Next", "EC"), ("Current", "EC")]);

    let now = json!({ "rotationGracePeriod": 0 });
    refused(api.post(&rotate, &now).await, 422, "oidc.invalid_request").await;
    refused(api.post(&format!("{PRIVATE}/revert"), &json!({})).await, 422, "oidc.invalid_request").await;
    let left = body(api.delete(&format!("{PRIVATE}/next")).await, 200).await;
    assert_eq!(left, json!(list(&api, PRIVATE).await));
    assert_eq!(ids(left.as_array().unwrap()), ids(&staged[1..]));

    let new = change(&api, &rotate, now).await;
    assert_eq!(shape(&new), [("Current", "EC"), ("Previous", "EC")]);
    let back = change(&api, &format!("{PRIVATE}/revert"), json!({})).await;
    assert_eq!((back[0]["id"].clone(), str_of(&back[0], "status")), (staged[1]["id"].clone(), "Current"));
    stage.daemon.finish().await;
}
on_both!(a_pending_key_stands_in_the_way_and_can_be_taken_back, pending_next);

async fn due_time(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let quick = json!({ "propagation": 2, "skew": 0 });
    let path = format!("{PRIVATE}/policy");
    let policy = body(api.request(Method::PATCH, &path).json(&quick).send().await.unwrap(), 200).await;
    assert_eq!((&policy["propagation"], &policy["algorithm"]), (&json!(2), &json!("EC")));
    assert_eq!(body(api.get(&path).await, 200).await, policy);
    for bad in [json!({ "propagation": 1 }), json!({ "skew": "a" }), json!({ "nothing": 1 })] {
        let answer = api.request(Method::PATCH, &path).json(&bad).send().await.unwrap();
        refused(answer, 400, "guard.invalid_input").await;
    }

    let staged = change(&api, &format!("{PRIVATE}/rotate"), json!({ "rotationGracePeriod": 3 })).await;
    assert_eq!(shape(&staged), [("Next", "EC"), ("Current", "EC")]);
    tokio::time::sleep(Duration::from_millis(3100)).await;
    let due = list(&api, PRIVATE).await;
    assert_eq!(shape(&due), [("Current", "EC"), ("Previous", "EC")], "promoted on the very next look");
    assert_eq!(due[0]["id"], staged[0]["id"]);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let signed = stage.daemon.api().await;
    assert_eq!(header(&api)["kid"], due[1]["kid"]);
    assert_eq!(header(&signed)["kid"], due[0]["kid"]);
    let both = list(&api, PRIVATE).await;
    assert_eq!(ids(&both), ids(&list(&signed, PRIVATE).await), "the older token lives");
    assert!(both[1]["publishedUntil"].as_u64().unwrap() > (now() + 3000) * 1000, "{}", both[1]);
    stage.daemon.finish().await;
}
on_both!(after_its_time_a_next_key_is_current_and_then_signs, due_time);

async fn every_algorithm(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let mut sessions = vec![stage.daemon.api().await];
    let quick = json!({ "propagation": 2, "skew": 0, "rsa_bits": 2048 });
    let path = format!("{PRIVATE}/policy");
    body(sessions[0].request(Method::PATCH, &path).json(&quick).send().await.unwrap(), 200).await;
    for (choice, alg) in
        [("ES384", "ES384"), ("RS256", "RS256"), ("PS256", "PS256"), ("EdDSA", "EdDSA"), ("RSA", "RS256")]
    {
        let asked = json!({ "signingKeyAlgorithm": choice });
        let keys = change(&sessions[0], &format!("{PRIVATE}/rotate"), asked).await;
        assert_eq!(keys[0]["signingKeyAlgorithm"], choice);
        let began = Instant::now();
        let session = loop {
            let session = stage.daemon.api().await;
            if header(&session)["kid"] == keys[0]["kid"] {
                break session;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{choice} does not sign");
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        assert_eq!(header(&session)["alg"], alg);
        sessions.push(session);
        for session in &sessions {
            assert_eq!(list(session, PRIVATE).await[0]["id"], keys[0]["id"], "a live token stays valid");
        }
    }
    assert_eq!(list(&sessions[0], PRIVATE).await.len(), sessions.len());
    stage.daemon.finish().await;
}
on_both!(live_tokens_of_every_algorithm_survive_consecutive_rotations, every_algorithm);

async fn cookie_keys(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let first = list(&api, COOKIE).await;
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].as_object().unwrap().keys().collect::<Vec<_>>(), ["id", "createdAt"]);

    let rotate = format!("{COOKIE}/rotate");
    for grace in [0, 60] {
        let answer = api.post(&rotate, &json!({ "rotationGracePeriod": grace })).await;
        refused(answer, 422, "oidc.invalid_request").await;
    }
    // The Console sends it.
    let two = change(&api, &rotate, json!({ "signingKeyAlgorithm": "RSA" })).await;
    assert_eq!((two.len(), &two[1]), (2, &first[0]));
    assert_eq!(two[0].as_object().unwrap().keys().collect::<Vec<_>>(), ["id", "createdAt"]);
    assert_eq!(delete(&api, COOKIE, ids(&two)[0]).await.status(), StatusCode::NO_CONTENT, "any of two");
    assert_eq!(list(&api, COOKIE).await.len(), 1);
    refused(delete(&api, COOKIE, "000000000000000000000").await, 422, "oidc.key_required").await;
    stage.daemon.finish().await;
}
on_both!(cookie_keys_have_no_grace_and_no_algorithm, cookie_keys);

async fn revocation(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    stage.daemon.token("all").await;
    let first = list(&api, PRIVATE).await;
    let revoke = format!("{PRIVATE}/{}/revoke", ids(&first)[0]);
    refused(api.post(&format!("{PRIVATE}/no-such-key/revoke"), &json!({})).await, 404, "oidc.key_not_found")
        .await;
    let dead = |answer: &Response| -> u64 {
        answer.headers()["Lacre-Dead-Tokens"].to_str().unwrap().parse().unwrap()
    };
    let answer = api.post(&format!("{revoke}?dryRun=true"), &json!({})).await;
    assert!(dead(&answer) >= 2, "{} tokens", dead(&answer));
    assert_eq!(ids(&list(&api, PRIVATE).await), ids(&first));

    let answer = api.post(&revoke, &json!({})).await;
    assert!(dead(&answer) >= 2);
    let left = body(answer, 200).await;
    let left = left.as_array().unwrap();
    assert_eq!(shape(left), [("Current", "EC")]);
    assert_ne!(left[0]["id"], first[0]["id"]);
    assert_eq!(left[0].get("waitsFor"), None, "waiting would protect nobody");

    refused(api.get(PRIVATE).await, 401, "auth.unauthorized").await;
    let jwks: Value =
        stage.daemon.anonymous(Method::GET, "/oidc/jwks").send().await.unwrap().json().await.unwrap();
    assert_eq!(jwks["keys"].as_array().unwrap().len(), 1);
    assert_eq!(jwks["keys"][0]["kid"], left[0]["kid"]);
    assert_eq!(list(&stage.daemon.api().await, PRIVATE).await.len(), 1);
    stage.daemon.finish().await;
}
on_both!(a_revoked_key_is_gone_at_once_with_its_tokens, revocation);

async fn imported(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let import = format!("{PRIVATE}/import");
    let pem = |seed: u8| {
        let key = p256::SecretKey::from_slice(&[seed; 32]).unwrap();
        key.to_pkcs8_pem(p256::pkcs8::LineEnding::LF).unwrap().to_string()
    };
    for bad in [
        json!({}),
        json!({ "pem": "hello", "as": "Current" }),
        json!({ "pem": pem(7), "as": "Next" }),
        json!({ "pem": pem(7), "as": "Previous" }),
        json!({ "pem": 7, "as": "Current" }),
        json!({ "pem": pem(7), "as": "Previous", "lifetime": -1 }),
    ] {
        let told = refused(api.post(&import, &bad).await, 400, "guard.invalid_input").await;
        assert!(!told.to_string().contains("BEGIN"), "{told}");
    }
    let previous = json!({ "pem": pem(7), "as": "Previous", "lifetime": 3600 });
    let would_be = change(&api, &format!("{import}?dryRun=true"), previous.clone()).await;
    assert_eq!(would_be.len(), 2);
    assert_eq!(list(&api, PRIVATE).await.len(), 1);
    let two = change(&api, &import, previous).await;
    assert_eq!(two.iter().map(|key| str_of(key, "status")).collect::<Vec<_>>(), ["Current", "Previous"]);
    assert_eq!((two[0].get("origin"), &two[1]["origin"]), (None, &json!("imported")));
    let three = change(&api, &import, json!({ "pem": pem(9), "as": "Current" })).await;
    assert_eq!((three.len(), &three[0]["origin"]), (3, &json!("imported")));

    let jwks: Value =
        stage.daemon.anonymous(Method::GET, "/oidc/jwks").send().await.unwrap().json().await.unwrap();
    let kids: Vec<_> = jwks["keys"].as_array().unwrap().iter().map(|key| key["kid"].clone()).collect();
    assert_eq!(kids, three.iter().map(|key| key["kid"].clone()).collect::<Vec<_>>());
    assert!(!jwks.to_string().contains("\"d\""), "never private members");
    stage.daemon.finish().await;
}
on_both!(a_key_from_outside_keeps_its_kid_and_says_where_it_is_from, imported);

async fn session(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let path = "/api/configs/oidc/session";
    let patch = async |asked: Value| api.request(Method::PATCH, path).json(&asked).send().await.unwrap();

    assert_eq!(body(api.get(path).await, 200).await, json!({ "ttl": 1_209_600 }));
    assert_eq!(body(patch(json!({ "ttl": 3600 })).await, 200).await, json!({ "ttl": 3600 }));
    assert_eq!(body(api.get(path).await, 200).await, json!({ "ttl": 3600 }));
    for bad in [json!(0), json!(31_536_001), json!(-1), json!(1.5), json!("3600"), json!(null)] {
        let told = refused(patch(json!({ "ttl": bad })).await, 400, "guard.invalid_input").await;
        assert_eq!(told["data"]["issues"][0]["path"], json!(["ttl"]));
    }
    assert_eq!(body(patch(json!({ "ttl": 31_536_000 })).await, 200).await, json!({ "ttl": 31_536_000 }));
    stage.daemon.finish().await;
}
on_both!(the_session_has_a_lifetime_in_seconds, session);

async fn wrong_input(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let rotate = format!("{PRIVATE}/rotate");
    refused(api.get("/api/configs/oidc/other-keys").await, 400, "guard.invalid_input").await;
    for bad in [
        json!({ "rotationGracePeriod": -1 }),
        json!({ "rotationGracePeriod": 0.5 }),
        json!({ "rotationGracePeriod": "1" }),
        json!({ "rotationGracePeriod": 1e15 }),
        json!({ "signingKeyAlgorithm": "DSA" }),
        json!({ "signingKeyAlgorithm": "ec" }),
        json!([]),
    ] {
        let told = refused(api.post(&rotate, &bad).await, 400, "guard.invalid_input").await;
        assert_eq!(told["data"]["name"], "ZodError");
        assert!(told["details"].as_str().unwrap().starts_with("Error in key path \""), "{told}");
    }
    refused(api.post(&format!("{rotate}?dryRun=yes"), &json!({})).await, 400, "guard.invalid_input").await;
    let broken = api.request(Method::POST, &rotate).header("Content-Type", "application/json").body("{");
    let told = body(broken.send().await.unwrap(), 400).await;
    assert_eq!((told.get("code"), told["message"].is_string()), (None, true), "{told}");
    assert_eq!(list(&api, PRIVATE).await.len(), 1, "nothing was done");

    for (method, path, status, text) in [
        (Method::GET, "/api/nowhere".to_owned(), 404, "Not Found"),
        (Method::GET, "/api/configs/nowhere".to_owned(), 404, "Not Found"),
        (Method::PUT, rotate.clone(), 405, "Method Not Allowed"),
    ] {
        let answer = api.request(method, &path).send().await.unwrap();
        assert_eq!(answer.headers()["Content-Type"], "text/plain; charset=utf-8", "{path}");
        assert!(answer.headers().contains_key("Logto-Core-Request-Id"));
        assert_eq!(body(answer, status).await, text, "{path}");
    }

    let nobody = daemon.anonymous(Method::GET, PRIVATE).send().await.unwrap();
    assert!(nobody.headers().contains_key("WWW-Authenticate"));
    refused(nobody, 401, "auth.authorization_header_missing").await;
    let basic = daemon.anonymous(Method::GET, PRIVATE).basic_auth("a", Some("b")).send().await.unwrap();
    let told = refused(basic, 401, "auth.authorization_token_type_not_supported").await;
    assert_eq!(told["data"], json!({ "supportedTypes": ["Bearer"] }));
    let told = refused(daemon.api_of("garbage").get(PRIVATE).await, 401, "auth.unauthorized").await;
    assert_eq!(told["data"], json!({ "code": "ERR_JWS_INVALID", "name": "JWSInvalid" }));
    stage.daemon.finish().await;
}
on_both!(what_is_wrong_is_told_in_logtos_words, wrong_input);

async fn headers(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let answer = api.get(PRIVATE).await;
    let headers = answer.headers().clone();
    for (name, value) in [
        ("Content-Type", "application/json"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
    ] {
        assert_eq!(headers[name], value);
    }
    assert_eq!(headers["Logto-Core-Request-Id"], headers["X-Request-Id"]);
    assert_eq!(headers.get("Access-Control-Allow-Origin"), None);
    let tag = headers["ETag"].to_str().unwrap().to_owned();

    let ask = async |known: &str| {
        api.request(Method::GET, PRIVATE).header("If-None-Match", known).send().await.unwrap()
    };
    for known in [tag.clone(), format!("W/{tag}"), format!("\"a\", {tag}")] {
        let answer = ask(&known).await;
        assert_eq!(answer.headers()["ETag"], tag.as_str());
        assert_eq!(body(answer, 304).await, "");
    }
    change(&api, &format!("{PRIVATE}/rotate"), json!({ "signingKeyAlgorithm": "EC" })).await;
    let answer = ask(&tag).await;
    assert_ne!(answer.headers()["ETag"], tag.as_str());
    assert_eq!(answer.status(), StatusCode::OK);
    stage.daemon.finish().await;
}
on_both!(every_answer_has_the_familys_headers, headers);

/// What the published TypeScript client does.
#[tokio::test]
async fn a_machine_token_for_all_says_so_and_lets_in() {
    let stage = Stage::on(Engine::Sqlite, "").await;
    let dev = stage.daemon.dev_json();
    let (id, secret) = (str_of(&dev["management"], "client_id"), str_of(&dev["management"], "client_secret"));
    let resource = str_of(&dev["management"], "resource");
    let form = [
        ("grant_type", "client_credentials"),
        ("client_id", id),
        ("client_secret", secret),
        ("resource", resource),
        ("scope", "all"),
    ];
    let answer = stage.daemon.anonymous(Method::POST, "/oidc/token").form(&form).send().await.unwrap();
    let token = body(answer, 200).await;
    assert_eq!((&token["scope"], &token["token_type"]), (&json!("all"), &json!("Bearer")));
    assert!(token["expires_in"].is_u64());
    assert_eq!(list(&stage.daemon.api_of(str_of(&token, "access_token")), PRIVATE).await.len(), 1);
    stage.daemon.finish().await;
}
