//! What is asked and what is refused: every route, every rule, on both engines.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::daemon::Api;
use crate::stage::{Engine, Stage, on_both, problem, stored};

const UNKNOWN: &str = "01a21768-4101-75eb-a9af-db33cf966f25";

async fn a_secrets_life(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let body = json!({ "name": "life", "kind": "api-key", "value": daemon.secret("one"), "labels": { "team": "mail" } });
    let answer = api.post("/v1/secrets", &body).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    let (tag, place) = (answer.headers()["ETag"].clone(), answer.headers()["Location"].clone());
    let made: Value = answer.json().await.unwrap();
    let path = place.to_str().unwrap().to_owned();
    assert_eq!((tag.to_str().unwrap(), made["version"].as_u64()), ("\"1\"", Some(1)));
    assert!(made.get("value").is_none());
    let shown = api.get(&path).await;
    assert_eq!(shown.headers()["ETag"], tag);
    assert_eq!(shown.json::<Value>().await.unwrap(), made);
    problem(api.post("/v1/secrets", &body).await, 409, "name-taken").await;

    // A new version, under the tag that was seen and no other.
    let put = |tag: &str, value: String| {
        let request = api.request(Method::PUT, &format!("{path}/value")).json(&json!({ "value": value }));
        if tag.is_empty() { request.send() } else { request.header("If-Match", tag).send() }
    };
    problem(put("", daemon.secret("two")).await.unwrap(), 428, "precondition-required").await;
    problem(put("\"7\"", daemon.secret("two")).await.unwrap(), 412, "version-conflict").await;
    problem(put("W/\"1\"", daemon.secret("two")).await.unwrap(), 412, "version-conflict").await;
    assert_eq!(put("\"1\"", daemon.secret("two")).await.unwrap().headers()["ETag"], "\"2\"");
    problem(put("\"1\"", daemon.secret("three")).await.unwrap(), 412, "version-conflict").await;

    let value = api.get(&format!("{path}/value?version=1")).await;
    assert_eq!(value.headers()["Cache-Control"], "no-store");
    assert_eq!(value.json::<Value>().await.unwrap()["value"], daemon.secret("one"));
    problem(api.get(&format!("{path}/value?version=9")).await, 404, "not-found").await;
    let versions: Value = api.get(&format!("{path}/versions")).await.json().await.unwrap();
    let numbers: Vec<_> =
        versions["items"].as_array().unwrap().iter().map(|item| item["version"].as_u64()).collect();
    assert_eq!(numbers, [Some(2), Some(1)]);
    let raw = api.request(Method::GET, &format!("{path}/value")).header("Accept", "application/octet-stream");
    assert_eq!(raw.send().await.unwrap().text().await.unwrap(), daemon.secret("two"));

    let delete = |tag: &str| api.request(Method::DELETE, &path).header("If-Match", tag).send();
    problem(delete("\"1\"").await.unwrap(), 412, "version-conflict").await;
    assert_eq!(delete("\"2\"").await.unwrap().status(), StatusCode::NO_CONTENT);
    for gone in [path.clone(), format!("{path}/value"), format!("{path}/versions")] {
        problem(api.get(&gone).await, 404, "not-found").await;
    }
    problem(api.delete(&path).await, 404, "not-found").await;
    stage.daemon.finish().await;
}
on_both!(a_secret_lives_from_its_creation_to_its_deletion, a_secrets_life);

async fn pages_and_repeats(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let mut made = BTreeSet::new();
    for number in 0..25 {
        made.insert(stored(&api, &format!("page/{number}"), &daemon.secret("paged")).await);
    }
    let (mut seen, mut path) = (Vec::new(), "/v1/secrets?limit=7&kind=opaque".to_owned());
    loop {
        let page: Value = api.get(&path).await.json().await.unwrap();
        seen.extend(
            page["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()),
        );
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/secrets?limit=7&kind=opaque&cursor={cursor}");
    }
    assert!(seen.len() == 25 && seen.is_sorted(), "each once, in order: {seen:?}");
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), made);
    for bad in ["cursor=nonsense", "limit=0", "limit=x", "kind=unknown", "unknown=1"] {
        problem(api.get(&format!("/v1/secrets?{bad}")).await, 422, "invalid").await;
    }

    // Sixteen times at once: one secret, and nobody is told of another.
    let body = json!({ "name": "repeated", "kind": "opaque", "value": daemon.secret("repeated") });
    let mut repeats = JoinSet::new();
    for _ in 0..16 {
        let request = api.request(Method::POST, "/v1/secrets").header("Idempotency-Key", "k-1").json(&body);
        repeats.spawn(async move {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap()["id"].clone())
        });
    }
    let answers = repeats.join_all().await;
    let ids: BTreeSet<_> =
        answers.iter().filter(|(status, _)| *status == 201).map(|(_, id)| id.to_string()).collect();
    assert_eq!(ids.len(), 1, "{answers:?}");
    assert!(answers.iter().all(|(status, _)| [201, 409].contains(status)), "{answers:?}");
    let other = json!({ "name": "repeated", "kind": "opaque", "value": daemon.secret("another") });
    let again = api.request(Method::POST, "/v1/secrets").header("Idempotency-Key", "k-1").json(&other);
    problem(again.send().await.unwrap(), 422, "idempotency-mismatch").await;
    stage.daemon.finish().await;
}
on_both!(lists_come_in_pages_and_repeated_requests_have_one_effect, pages_and_repeats);

async fn values_of_every_kind(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let create = |kind: &str, encoding: &str, value: &str| {
        let name = format!("v/{}", rand_name(kind, encoding, value));
        let body = json!({ "name": name, "kind": kind, "encoding": encoding, "value": value });
        let api = &api;
        async move { api.post("/v1/secrets", &body).await }
    };
    let all: Vec<u8> = (0..=255).collect();
    let largest = "x".repeat(64 << 10);
    for (kind, encoding, value) in [
        ("opaque", "utf8", String::new()),
        ("opaque", "utf8", "caf\u{e9} \u{6f22} \u{1f512} \"\\\u{7}\n".to_owned()),
        ("opaque", "base64", STANDARD.encode(&all)),
        ("opaque", "utf8", largest.clone()),
        ("json", "utf8", r#"{"b":1, "a":[true,null]}"#.to_owned()),
    ] {
        let answer = create(kind, encoding, &value).await;
        assert_eq!(answer.status(), StatusCode::CREATED, "{kind} {encoding}");
        let id = answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
        let back: Value = api.get(&format!("/v1/secrets/{id}/value")).await.json().await.unwrap();
        assert_eq!(
            (back["encoding"].as_str(), back["value"].as_str()),
            (Some(encoding), Some(value.as_str()))
        );
    }
    problem(create("opaque", "utf8", &format!("{largest}x")).await, 413, "too-large").await;
    for (kind, encoding, value) in [
        ("json", "utf8", "{"),
        ("json", "base64", "/w=="),
        ("password", "utf8", ""),
        ("api-key", "utf8", "a b"),
        ("opaque", "base64", "not base64!"),
        ("opaque", "base64", "YQ"),
        ("opaque", "utf16", "a"),
        ("certificate", "utf8", "a"),
    ] {
        let answer = problem(create(kind, encoding, value).await, 422, "invalid").await;
        assert!(
            value.is_empty() || value.len() < 3 || !answer.to_string().contains(value),
            "quotes the value"
        );
    }
    stage.daemon.finish().await;
}
on_both!(values_keep_their_bytes_their_kind_and_their_limit, values_of_every_kind);

/// A name of its own for each case.
fn rand_name(kind: &str, encoding: &str, value: &str) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(&Sha256::digest(format!("{kind}/{encoding}/{value}"))[..8])
}

/// A body as it is.
async fn raw(api: &Api, content_type: &str, body: impl Into<String>) -> reqwest::Response {
    let request = api.request(Method::POST, "/v1/secrets").header("Content-Type", content_type);
    request.body(body.into()).send().await.unwrap()
}

async fn bodies_of_any_kind(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    let json = "application/json";
    for (body, status, code) in [
        ("", 400, "malformed"),
        ("{", 400, "malformed"),
        ("null", 422, "invalid"),
        ("[]", 422, "invalid"),
        (r#"{"name":"n","kind":"opaque","value":"v"} x"#, 400, "malformed"),
        (r#"{"name":"n","kind":"opaque","value":"v","admin":true}"#, 422, "invalid"),
        (r#"{"name":"n","name":"m","kind":"opaque","value":"v"}"#, 422, "invalid"),
        (r#"{"name":"n","kind":"opaque","value":"v","labels":{"a":"1","a":"2"}}"#, 422, "invalid"),
        (r#"{"name":"n","kind":"opaque","value":7}"#, 422, "invalid"),
        (r#"{"name":"n","kind":"opaque"}"#, 422, "invalid"),
        (r#"{"name":"../etc","kind":"opaque","value":"v\u0000","labels":{"a b":"c"}}"#, 422, "invalid"),
        (r#"{"name":"a\nb","kind":"opaque","value":"v"}"#, 422, "invalid"),
        (r#"{"name":"n","kind":"opaque","value":"v","expires_at":"yesterday"}"#, 422, "invalid"),
        (r#"{"name":"n","kind":"opaque","value":"v","expires_at":"2001-01-01T00:00:00Z"}"#, 422, "invalid"),
        ("{\"name\":\"n\",\"kind\":\"opaque\",\"value\":\"\\ud800\"}", 400, "malformed"),
    ] {
        let answer = raw(&api, json, body).await;
        let (now, text) = (answer.status().as_u16(), answer.text().await.unwrap());
        assert!(now == status && text.contains(code), "{body}: {now} {text}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let answer = raw(&api, json, deep).await;
    assert!(answer.status().is_client_error(), "{}", answer.status());
    let members: Vec<_> = (0..3000).map(|n| format!("\"k{n}\":1")).collect();
    let many = format!("{{{}}}", members.join(","));
    problem(raw(&api, json, many).await, 422, "invalid").await;
    problem(raw(&api, json, "x".repeat(8 << 20)).await, 413, "too-large").await;
    problem(raw(&api, "text/plain", "{}").await, 415, "unsupported-media-type").await;
    let zipped = api.request(Method::POST, "/v1/secrets").header("Content-Encoding", "gzip");
    problem(zipped.json(&json!({})).send().await.unwrap(), 415, "unsupported-media-type").await;

    problem(api.get("/v1/nowhere").await, 404, "not-found").await;
    let answer = api.request(Method::PATCH, "/v1/secrets").send().await.unwrap();
    assert!(answer.headers().contains_key("Allow"));
    problem(answer, 405, "method-not-allowed").await;
    for id in [UNKNOWN, "1", "%00", "..%2f..%2fetc", "01A21768-4101-75EB-A9AF-DB33CF966F25"] {
        problem(api.get(&format!("/v1/secrets/{id}/value")).await, 404, "not-found").await;
    }
    let list: Value = api.get("/v1/secrets").await.json().await.unwrap();
    assert_eq!(list["items"], json!([]), "something was stored after all");
    stage.daemon.finish().await;
}
on_both!(a_body_that_is_not_exactly_what_was_asked_for_changes_nothing, bodies_of_any_kind);

async fn past_its_time(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(1200);
    let body = json!({ "name": "short", "kind": "opaque", "value": daemon.secret("short"), "expires_at": at.to_string() });
    let made: Value = api.post("/v1/secrets", &body).await.error_for_status().unwrap().json().await.unwrap();
    let path = format!("/v1/secrets/{}", made["id"].as_str().unwrap());
    assert_eq!(api.get(&format!("{path}/value")).await.status(), StatusCode::OK);
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    problem(api.get(&format!("{path}/value")).await, 410, "expired").await;
    assert_eq!(api.get(&path).await.status(), StatusCode::OK);
    stage.daemon.finish().await;
}
on_both!(an_expired_secret_keeps_its_metadata_and_its_value, past_its_time);

async fn kept_elsewhere(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let value = daemon.secret("kept elsewhere");
    let sealed: Value =
        api.post("/v1/seal", &json!({ "context": "orders/1", "value": value })).await.json().await.unwrap();
    let bytes = sealed["sealed"].as_str().unwrap();
    let open = |context: &str, sealed: &str| {
        let body = json!({ "context": context, "sealed": sealed });
        let api = &api;
        async move { api.post("/v1/open", &body).await }
    };
    let opened: Value = open("orders/1", bytes).await.json().await.unwrap();
    assert_eq!(opened, json!({ "encoding": "base64", "value": STANDARD.encode(&value) }));
    problem(open("orders/2", bytes).await, 422, "does-not-open").await;
    problem(open("orders/1", "AAAA").await, 422, "does-not-open").await;
    problem(open("", bytes).await, 422, "invalid").await;
    let unreadable = problem(open("orders/1", "no base64").await, 422, "invalid").await;
    assert!(unreadable.to_string().contains("sealed"), "the member that is wrong: {unreadable}");
    // A stored secret's bytes are of another kind: they do not open here, whatever context is tried.
    let id = stored(&api, "stored", &value).await;
    problem(open(&id, bytes).await, 422, "does-not-open").await;

    let key: Value = api.post("/v1/datakeys", &json!({ "context": "disk/7" })).await.json().await.unwrap();
    let opened: Value = open("disk/7", key["sealed"].as_str().unwrap()).await.json().await.unwrap();
    assert_eq!(opened["value"], key["plaintext"]);
    assert_eq!(STANDARD.decode(key["plaintext"].as_str().unwrap()).unwrap().len(), 32);
    problem(api.post("/v1/datakeys", &json!({ "context": "c", "bytes": 15 })).await, 422, "invalid").await;

    let items: Vec<_> =
        (0..100).map(|n| json!({ "context": format!("c/{n}"), "value": format!("{value}/{n}") })).collect();
    let batch: Value = api.post("/v1/seal", &json!({ "items": items })).await.json().await.unwrap();
    let mut back: Vec<_> = (0..100)
        .map(|n| json!({ "context": format!("c/{n}"), "sealed": batch["items"][n]["sealed"] }))
        .collect();
    back[41]["context"] = json!("c/40");
    let opened: Value = api.post("/v1/open", &json!({ "items": back })).await.json().await.unwrap();
    for (n, item) in opened["items"].as_array().unwrap().iter().enumerate() {
        match n {
            41 => assert_eq!(item["error"]["code"], "does-not-open"),
            _ => assert_eq!(item["value"], STANDARD.encode(format!("{value}/{n}"))),
        }
    }
    for count in [0, 101] {
        let items = vec![json!({ "context": "c", "value": "v" }); count];
        problem(api.post("/v1/seal", &json!({ "items": items })).await, 422, "invalid").await;
    }
    // Alike in everything that a record has room for.
    let long = |end: &str| json!({ "context": format!("{}{end}", "c".repeat(300)), "value": value });
    let items = [long("1"), long("2")];
    api.post("/v1/seal", &json!({ "items": items })).await.error_for_status().unwrap();
    let lines = api.audit_lines().await;
    every_item_is_on_record(&lines);
    let hash = |item: &Value| hex::encode(Sha256::digest(item["context"].as_str().unwrap()));
    for item in &items {
        assert!(lines.iter().any(|line| line.contains(&hash(item))), "{item} cannot be told from the other");
    }
    let incidents = lines.iter().filter(|line| line.contains("incident.")).count();
    assert_eq!(incidents, 0, "a caller's mistake is no incident");
    let twice = lines.iter().find(|line| line.matches("\"kek_version\"").count() > 1);
    assert_eq!(twice, None, "a member that stands twice");
    stage.daemon.finish().await;
}
on_both!(callers_seal_and_open_what_they_keep_themselves, kept_elsewhere);

/// Of the batch of a hundred that was opened: an intent before, an outcome after, each with its context.
fn every_item_is_on_record(lines: &[String]) {
    let records = lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let opened: Vec<_> = records.filter(|record| record["action"] == "external.open").collect();
    let mut batch: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for record in &opened {
        batch.entry(record["request_id"].as_str().unwrap()).or_default().push(record);
    }
    let batch = batch.into_values().find(|records| records.len() > 2).expect("a batch");
    let (intents, outcomes) = batch.split_at(100);
    assert!(intents.iter().all(|record| record["type"] == "intent"), "all intents before any work");
    assert!(outcomes.iter().all(|record| record["type"] == "outcome") && outcomes.len() == 100);
    for n in 0..100 {
        let context = if n == 41 { "c/40".to_owned() } else { format!("c/{n}") };
        let intent = intents.iter().find(|record| record["object"]["id"] == context).expect("its intent");
        let wanted = if n == 41 { json!("does-not-open") } else { Value::Null };
        let is_its = |record: &&&Value| {
            record["object"]["id"] == context
                && record["outcome"].get("code").unwrap_or(&Value::Null) == &wanted
        };
        let outcome = outcomes.iter().find(is_its).expect("its outcome");
        assert!(n == 40 || n == 41 || outcome["id"] == intent["id"], "{intent} {outcome}");
    }
}

async fn the_largest_batches(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    // Above a slot of guarded memory: there are 64 buffers for such values, and 100 in each batch.
    let value = format!("{}{}", daemon.secret("large"), "x".repeat(5000));
    let items: Vec<_> = (0..100).map(|_| json!({ "context": "c", "value": value })).collect();
    let batch: Value = api.post("/v1/seal", &json!({ "items": items })).await.json().await.unwrap();
    let back: Vec<_> =
        (0..100).map(|n| json!({ "context": "c", "sealed": batch["items"][n]["sealed"] })).collect();
    let body = json!({ "items": back });

    let open = || async { api.post("/v1/open", &body).await.json::<Value>().await.unwrap() };
    let (a, b, c, d) = tokio::join!(open(), open(), open(), open());
    for opened in [a, b, c, d] {
        for item in opened["items"].as_array().unwrap() {
            assert_eq!(item["value"], STANDARD.encode(&value), "{item}");
        }
    }

    // What was taken in to be sealed is taken in again to be opened, and a value escaped in full is taken too.
    let value = format!("{}{}", daemon.secret("huge"), "x".repeat(64_000));
    let items: Vec<_> = (0..100).map(|_| json!({ "context": "c", "value": value })).collect();
    let batch: Value = api.post("/v1/seal", &json!({ "items": items })).await.json().await.unwrap();
    let sealed = batch["items"].as_array().unwrap().iter().map(|item| &item["sealed"]);
    let back: Vec<_> = sealed.map(|sealed| json!({ "context": "c", "sealed": sealed })).collect();
    let opened: Value = api.post("/v1/open", &json!({ "items": back })).await.json().await.unwrap();
    let encoded = STANDARD.encode(&value);
    assert_eq!(opened["items"].as_array().unwrap().len(), 100, "{opened}");
    assert!(opened["items"].as_array().unwrap().iter().all(|item| item["value"] == encoded));
    let escaped = format!("{}{}", daemon.secret("escaped"), "\u{1}".repeat(65_000));
    let id = stored(&api, "escaped", &escaped).await;
    assert_eq!(api.value(&id).await, escaped);
    stage.daemon.finish().await;
}
on_both!(batches_as_large_as_they_may_be_open_whole_and_beside_each_other, the_largest_batches);
