//! Tokens and cookies for other systems: what a policy allows, what is on record, what a batch does.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, TestDaemon};
use crate::stage::{Engine, Stage, on_both, problem};

const API: &str = "https://default.lacre.local/api";

fn policy() -> Value {
    json!({
        "jwt": { "types": ["JWT", "at+jwt"], "max_lifetime": 3600, "audiences": ["https://api.example"],
                 "subjects": ["user-*"] },
        "jws": { "issuers": ["https://idp.example"], "types": ["JWT", ""], "max_lifetime": 86400 },
        "cookies": { "names": ["_session", "_interaction*"], "max_age": 1000 },
    })
}

/// A new application and a session of it.
async fn app(daemon: &TestDaemon, admin: &Api, signing: Option<Value>) -> (String, Api) {
    let mut body = json!({ "name": "idp", "scopes": ["tokens:sign", "cookies:sign"] });
    if let Some(signing) = signing {
        body["signing"] = signing;
    }
    let made: Value = admin.post("/v1/apps", &body).await.json().await.unwrap();
    let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let token = daemon.token_of(id, secret, "all").await;
    (id.to_owned(), daemon.api_of(&token))
}

async fn good(api: &Api, path: &str, body: &Value) -> Value {
    let answer = api.post(path, body).await;
    let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
    assert_eq!(status, StatusCode::OK, "{path}: {body}");
    body
}

fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

fn signing_input(key: &Value, payload: &Value) -> String {
    let header = json!({ "alg": key["alg"], "typ": "JWT", "kid": key["kid"] });
    [header, payload.clone()].map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".")
}

/// With a library that knows nothing of Lacre.
fn verified(token: &str, jwks: &Value) -> Value {
    let header = jsonwebtoken::decode_header(token).unwrap();
    let keys = jwks["keys"].as_array().unwrap();
    let jwk = keys.iter().find(|key| key["kid"] == json!(header.kid)).expect("its key is published");
    let key = jsonwebtoken::DecodingKey::from_jwk(&serde_json::from_value(jwk.clone()).unwrap()).unwrap();
    let mut rules = jsonwebtoken::Validation::new(header.alg);
    rules.validate_aud = false;
    jsonwebtoken::decode::<Value>(token, &key, &rules).unwrap().claims
}

async fn jwks(daemon: &TestDaemon) -> Value {
    daemon.anonymous(Method::GET, "/oidc/jwks").send().await.unwrap().json().await.unwrap()
}

async fn tokens_of_lacre(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, admin) = (&stage.daemon, stage.daemon.api().await);
    let (_, api) = app(daemon, &admin, Some(policy())).await;
    let claims = json!({ "sub": "user-1", "email": "a@b.example", "aud": "https://api.example" });
    let body = json!({ "claims": claims, "type": "at+jwt", "lifetime": 300 });

    let made = good(&api, "/v1/jwt", &body).await;

    let token = made["token"].as_str().unwrap();
    let claims = verified(token, &jwks(daemon).await);
    assert_eq!(claims["iss"], format!("{}/oidc", daemon.url));
    assert_eq!((&claims["sub"], &claims["jti"]), (&json!("user-1"), &made["jti"]));
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 300);
    let header = decoded(token.split('.').next().unwrap());
    assert_eq!((&header["typ"], &header["kid"]), (&json!("at+jwt"), &made["kid"]));
    assert_eq!(header.as_object().unwrap().len(), 3);
    // It is no token for Lacre itself.
    problem(daemon.api_of(token).get("/v1/status").await, 401, "invalid-token").await;

    let mut items = vec![body.clone(); 100];
    items[7]["claims"]["sub"] = json!("root");
    items[8]["claims"]["exp"] = json!(1);
    items[9]["lifetime"] = json!(3601);
    let batch = good(&api, "/v1/jwt", &json!({ "items": items })).await;
    let batch = batch["items"].as_array().unwrap();
    assert_eq!(batch.len(), 100);
    for (at, item) in batch.iter().enumerate() {
        match at {
            7 | 9 => assert_eq!(item["error"]["code"], "signing-refused", "{item}"),
            8 => assert_eq!(item["error"]["code"], "invalid", "{item}"),
            _ => drop(verified(item["token"].as_str().unwrap(), &jwks(daemon).await)),
        }
    }
    problem(api.post("/v1/jwt", &json!({ "items": vec![body.clone(); 101] })).await, 422, "invalid").await;

    let lines = admin.audit_lines().await;
    let records: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ours: Vec<_> = records.iter().filter(|one| one["action"] == "jwt.sign").collect();
    let of = |kind: &str| ours.iter().filter(|one| one["type"] == kind).count();
    assert_eq!((of("intent"), of("outcome"), of("event")), (98, 98, 3), "one for each token");
    let first: Vec<_> = ours.iter().filter(|one| one["object"]["id"] == made["jti"]).collect();
    assert_eq!(first.len(), 2);
    assert_eq!(first[0]["details"]["sub"], "user-1");
    assert_eq!(first[0]["details"]["type"], "at+jwt");
    assert_eq!(first[1]["details"]["kid"], made["kid"]);
    assert!(!lines.iter().any(|line| line.contains("a@b.example")), "a record has the content");
    let issued =
        records.iter().find(|one| one["action"] == "token.issue" && one["type"] == "outcome").unwrap();
    assert_eq!(issued["details"]["kid"], made["kid"]);
    stage.daemon.finish().await;
}
on_both!(a_token_is_made_within_the_policy_and_recorded_without_its_content, tokens_of_lacre);

async fn tokens_of_a_provider(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, admin) = (&stage.daemon, stage.daemon.api().await);
    let (_, api) = app(daemon, &admin, Some(policy())).await;
    let key: Value = api.get("/v1/signing-keys/current").await.json().await.unwrap();
    assert!(key["jwk"]["x"].is_string() && key["jwk"].get("d").is_none(), "{key}");
    let payload = json!({ "iss": "https://idp.example", "sub": "ana", "aud": "client", "iat": now(),
                          "exp": now() + 600, "jti": "token-1" });
    let input = signing_input(&key, &payload);

    let signed = good(&api, "/v1/jws", &json!({ "signing_input": input })).await;

    let token = signed["token"].as_str().unwrap();
    assert_eq!(token, format!("{input}.{}", signed["signature"].as_str().unwrap()));
    assert_eq!(verified(token, &jwks(daemon).await), payload);

    let with = |name: &str, value: Value| {
        let mut changed = payload.clone();
        changed[name] = value;
        json!({ "signing_input": signing_input(&key, &changed) })
    };
    let other_key = json!({ "kid": "x", "alg": key["alg"] });
    let other_alg = json!({ "kid": key["kid"], "alg": "HS256" });
    for (body, status, code) in [
        (with("iss", json!("https://elsewhere.example")), 403, "signing-refused"),
        (with("iss", json!(format!("{}/oidc", daemon.url))), 403, "signing-refused"),
        (with("aud", json!(["client", API])), 403, "signing-refused"),
        (with("exp", json!(now() + 86_500)), 403, "signing-refused"),
        (with("exp", json!("9999999999")), 422, "invalid"),
        (with("iat", json!(now() - 100)), 422, "invalid"),
        (json!({ "signing_input": format!("{input}.") }), 422, "invalid"),
        (json!({ "signing_input": "aGk.aGk" }), 422, "invalid"),
        (json!({ "bytes": "aGk" }), 422, "invalid"),
    ] {
        problem(api.post("/v1/jws", &body).await, status, code).await;
    }
    for other in [other_key, other_alg] {
        let body = json!({ "signing_input": signing_input(&other, &payload) });
        let told = problem(api.post("/v1/jws", &body).await, 409, "key-not-current").await;
        assert_eq!((&told["kid"], &told["alg"]), (&key["kid"], &key["alg"]));
        let batch = good(&api, "/v1/jws", &json!({ "items": [body, { "signing_input": input }] })).await;
        assert_eq!(batch["items"][0]["error"]["kid"], key["kid"]);
        assert!(batch["items"][1]["token"].is_string());
    }
    // An answer does not wait for its outcome's record.
    let mut wanted = vec![("beyond-signing-policy", 4), ("malformed-token", 4), ("not-current", 4)];
    let until = Instant::now() + Duration::from_secs(10);
    while !wanted.is_empty() && Instant::now() < until {
        let lines = admin.audit_lines().await;
        let records: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let refused = |code: &str| {
            let of = |one: &&Value| one["outcome"] == json!({ "result": "denied", "code": code });
            records.iter().filter(|one| one["action"] == "jws.sign").filter(of).count()
        };
        wanted.retain(|(code, count)| refused(code) != *count);
    }
    assert!(wanted.is_empty(), "not on record: {wanted:?}");
    stage.daemon.finish().await;
}
on_both!(a_provider_has_its_own_tokens_signed_and_nothing_else, tokens_of_a_provider);

async fn cookies(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, admin) = (&stage.daemon, stage.daemon.api().await);
    let (_, api) = app(daemon, &admin, Some(policy())).await;
    let cookie = json!({ "name": "_session", "value": "abc" });

    let signed = good(&api, "/v1/cookies/sign", &cookie).await;
    let signature = signed["signature"].as_str().unwrap();
    assert_eq!(URL_SAFE_NO_PAD.decode(signature).unwrap().len(), 32);

    let check = |name: &str, value: &str, signature: &str| json!({ "name": name, "value": value, "signature": signature });
    let items = [
        check("_session", "abc", signature),
        check("_session", "abd", signature),
        check("_interaction", "abc", signature),
        check("_session", "abc", "AAAA"),
        check("_session", "abc", ""),
        check("other", "abc", signature),
    ];
    let checked = good(&api, "/v1/cookies/verify", &json!({ "items": items })).await;
    let checked = checked["items"].as_array().unwrap();
    assert_eq!(checked[0], json!({ "valid": true, "renew": false }));
    for wrong in &checked[1..5] {
        assert_eq!(*wrong, json!({ "valid": false, "renew": false }));
    }
    assert_eq!(checked[5]["error"]["code"], "signing-refused");
    let many = json!({ "items": vec![cookie.clone(); 100] });
    let many = good(&api, "/v1/cookies/sign", &many).await;
    assert!(many["items"].as_array().unwrap().iter().all(|one| one["signature"] == signed["signature"]));
    for (member, value) in [("name", json!("other")), ("max_age", json!(1001))] {
        let mut changed = cookie.clone();
        changed[member] = value;
        problem(api.post("/v1/cookies/sign", &changed).await, 403, "signing-refused").await;
    }
    stage.daemon.finish().await;
}
on_both!(a_cookie_is_signed_and_known_again, cookies);

async fn policies(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, admin) = (&stage.daemon, stage.daemon.api().await);
    let (id, api) = app(daemon, &admin, None).await;
    let path = format!("/v1/apps/{id}/signing");
    let claims = json!({ "sub": "user-1", "aud": "https://api.example" });
    let token = json!({ "claims": claims, "lifetime": 60 });
    let cookie = json!({ "name": "_session", "value": "abc" });
    // The scope alone is nothing.
    problem(api.post("/v1/jwt", &token).await, 403, "signing-refused").await;
    problem(api.post("/v1/jws", &json!({ "signing_input": "a.b" })).await, 403, "signing-refused").await;
    problem(api.post("/v1/cookies/sign", &cookie).await, 403, "signing-refused").await;
    assert_eq!(admin.get(&path).await.json::<Value>().await.unwrap(), json!({}));

    let set =
        async |api: &Api, body: &Value| api.request(Method::PUT, &path).json(body).send().await.unwrap();
    assert_eq!(set(&admin, &policy()).await.json::<Value>().await.unwrap(), policy());
    assert_eq!(admin.get(&path).await.json::<Value>().await.unwrap(), policy());
    let apps: Value = admin.get("/v1/apps").await.json().await.unwrap();
    let listed = apps["items"].as_array().unwrap().iter().find(|app| app["client_id"] == id.as_str());
    assert_eq!(listed.unwrap()["signing"], policy());
    good(&api, "/v1/jwt", &token).await;
    good(&api, "/v1/cookies/sign", &cookie).await;

    // Who has no such right gives none, and nobody gives what is Lacre's own.
    problem(set(&api, &policy()).await, 403, "insufficient-scope").await;
    let only_apps = daemon.api_with("apps:admin").await;
    problem(set(&only_apps, &policy()).await, 403, "insufficient-scope").await;
    let tokens_too = daemon.api_with("apps:admin tokens:sign").await;
    problem(set(&tokens_too, &policy()).await, 403, "insufficient-scope").await;
    for (pointer, value) in [
        ("/jws/issuers", json!([format!("{}/oidc", daemon.url)])),
        ("/jwt/audiences", json!([API])),
        ("/jws/audiences", json!([API])),
        ("/jwt/max_lifetime", json!(0)),
        ("/cookies/names", json!(["*"])),
        ("/jwt/more", json!(1)),
    ] {
        let mut changed = policy();
        let (parent, member) = pointer.rsplit_once('/').unwrap();
        changed.pointer_mut(parent).unwrap()[member] = value;
        problem(set(&admin, &changed).await, 422, "invalid").await;
    }
    let unknown = admin.request(Method::PUT, "/v1/apps/app-00000000000000000000/signing").json(&policy());
    problem(unknown.send().await.unwrap(), 404, "not-found").await;

    assert_eq!(set(&only_apps, &json!({})).await.json::<Value>().await.unwrap(), json!({}));
    problem(api.post("/v1/jwt", &token).await, 403, "signing-refused").await;
    let records = admin.audit_lines().await;
    let is_change = |line: &&String| {
        line.contains("\"app.policy\"") && line.contains("\"type\":\"intent\"") && line.contains(&id)
    };
    let changes = records.iter().filter(is_change);
    assert_eq!(changes.count(), 2);
    stage.daemon.finish().await;
}
on_both!(nothing_is_signed_that_no_policy_allows, policies);

#[tokio::test]
async fn a_local_user_has_signed_what_its_rule_says() {
    let uid = rustix::process::getuid().as_raw();
    let rule = format!(
        "unix_socket = \"{{dir}}/socket\"\n[[server.local_users]]\nuid = {uid}\n\
         scopes = ['cookies:sign', 'tokens:sign']\nsigning = {{ cookies = {{ names = ['a*'], max_age = 10 }} }}\n"
    );
    let text = crate::stage::config("", "").replacen("[seal.pkcs11]", &format!("{rule}[seal.pkcs11]"), 1);
    let options = crate::daemon::Options { config: Some(text), ..Default::default() };
    let daemon = TestDaemon::start(options).await;
    let client = reqwest::Client::builder().unix_socket(daemon.dir().join("socket")).build().unwrap();
    let post = async |path: &str, body: Value| {
        client.post(format!("http://lacre{path}")).json(&body).send().await.unwrap()
    };

    let signed = post("/v1/cookies/sign", json!({ "name": "abc", "value": "1" })).await;
    assert_eq!(signed.status(), StatusCode::OK);
    problem(post("/v1/cookies/sign", json!({ "name": "bc", "value": "1" })).await, 403, "signing-refused")
        .await;
    let token = json!({ "claims": { "aud": "a" }, "lifetime": 1 });
    problem(post("/v1/jwt", token).await, 403, "signing-refused").await;
    daemon.finish().await;
}
