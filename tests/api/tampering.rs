//! Whoever writes to the database can spoil a value, and never get another one out (CB-1, CB-7).

use std::collections::HashSet;
use std::process::{Command, Output};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::daemon::{Api, contains, encodings};
use crate::stage::{Engine, Stage, on_both, problem, stored};

const COLUMNS: [&str; 4] = ["wrapped_dek", "iv", "ciphertext", "tag"];

/// The sealed columns of one version, in hex.
pub fn columns(stage: &Stage, id: &str, version: u32) -> [String; 4] {
    COLUMNS.map(|column| {
        let hex = stage.hex(column);
        let rule = format!("secret_id = '{id}' AND version = {version}");
        stage.texts(&format!("SELECT {hex} AS t FROM secret_versions WHERE {rule}")).remove(0)
    })
}

/// Puts sealed columns into one version's row.
pub fn write(stage: &Stage, id: &str, version: u32, values: &[String; 4]) {
    let set: Vec<_> =
        COLUMNS.iter().zip(values).map(|(column, hex)| format!("{column} = {}", stage.bytes(hex))).collect();
    let set = set.join(", ");
    stage.run(&format!("UPDATE secret_versions SET {set} WHERE secret_id = '{id}' AND version = {version}"));
}

/// An integrity error with nothing of either value in it.
pub async fn refuses(api: &Api, path: &str, canary: &str, what: &str) {
    let answer = api.get(path).await;
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR, "{what}");
    let body = problem(answer, 500, "integrity").await.to_string();
    for text in encodings(canary) {
        assert!(!contains(body.as_bytes(), &text), "{what}: plaintext in {body}");
    }
}

/// What the tenant's log has of altered values.
pub async fn incidents(api: &Api) -> Vec<Value> {
    let records =
        api.audit_lines().await.into_iter().map(|line| serde_json::from_str::<Value>(&line).unwrap());
    records.filter(|record| record["action"] == "incident.integrity").collect()
}

async fn every_subset_of_columns(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    // Of one length, so that nothing but the seal tells them apart.
    let values = [daemon.secret("value-of-a"), daemon.secret("value-of-b")];
    let ids = [stored(&api, "a", &values[0]).await, stored(&api, "b", &values[1]).await];
    let rows = [columns(&stage, &ids[0], 1), columns(&stage, &ids[1], 1)];

    for subset in 1..16 {
        let mixed = |mine: usize| {
            let mut columns = rows[mine].clone();
            for (at, column) in columns.iter_mut().enumerate().filter(|(at, _)| subset & (1 << at) != 0) {
                column.clone_from(&rows[1 - mine][at]);
            }
            columns
        };
        for (mine, id) in ids.iter().enumerate() {
            write(&stage, id, 1, &mixed(mine));
        }
        for id in &ids {
            refuses(
                &api,
                &format!("/v1/secrets/{id}/value"),
                &daemon.canary,
                &format!("subset {subset:04b}"),
            )
            .await;
        }
    }
    let recorded = incidents(&api).await;
    assert_eq!(recorded.len(), 30, "an incident for each read");
    for (record, id) in recorded.iter().zip(ids.iter().cycle()) {
        assert_eq!(record["object"]["id"], id.as_str());
        assert_eq!(record["details"]["version"], "1");
    }
    for (mine, id) in ids.iter().enumerate() {
        write(&stage, id, 1, &rows[mine]);
        assert_eq!(api.value(id).await, values[mine], "put back");
    }
    let ready = daemon.anonymous(Method::GET, "/readyz").send().await.unwrap();
    assert_eq!(ready.status(), StatusCode::OK, "the device is blamed for a row");
    stage.daemon.finish().await;
}
on_both!(columns_of_one_row_do_not_open_in_another, every_subset_of_columns);

async fn versions_and_garbage(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let values = [daemon.secret("version-one"), daemon.secret("version-two")];
    let id = stored(&api, "a", &values[0]).await;
    api.replace(&id, &values[1]).await.error_for_status().unwrap();
    let rows = [columns(&stage, &id, 1), columns(&stage, &id, 2)];

    write(&stage, &id, 1, &rows[1]);
    write(&stage, &id, 2, &rows[0]);
    for version in [1, 2] {
        refuses(
            &api,
            &format!("/v1/secrets/{id}/value?version={version}"),
            &daemon.canary,
            "exchanged versions",
        )
        .await;
    }
    write(&stage, &id, 1, &rows[0]);
    let spoilt: [(usize, String); 5] = [
        (0, String::new()),
        (0, rows[0][0][2..].to_owned()),
        (1, rows[0][1][2..].to_owned()),
        (2, format!("{}00", rows[0][2])),
        (3, rows[0][3][8..].to_owned()),
    ];
    for (column, hex) in spoilt {
        let mut other = rows[0].clone();
        other[column] = hex;
        write(&stage, &id, 1, &other);
        refuses(&api, &format!("/v1/secrets/{id}/value?version=1"), &daemon.canary, COLUMNS[column]).await;
    }
    write(&stage, &id, 1, &rows[0]);
    stage.run("UPDATE secret_versions SET kek_version = 7, value_len = value_len + 1 WHERE version = 1");
    refuses(&api, &format!("/v1/secrets/{id}/value?version=1"), &daemon.canary, "length").await;
    stage.daemon.finish().await;
}
on_both!(versions_and_cut_columns_do_not_open, versions_and_garbage);

async fn columns_that_only_count(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let names = ["below", "above", "no-version", "sound"];
    let mut ids = Vec::new();
    for name in names {
        ids.push(stored(&api, name, &daemon.secret(name)).await);
    }
    let spoil = |id: &str, what: &str| {
        stage.run(&format!("UPDATE secret_versions SET {what} WHERE secret_id = '{id}'"));
    };
    spoil(&ids[0], "kek_version = -1");
    spoil(&ids[1], "kek_version = 4294967296");
    spoil(&ids[2], "version = -5");

    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    let keks: Value = api.get("/v1/keks").await.error_for_status().unwrap().json().await.unwrap();
    assert_eq!(keks["items"][1]["records"], 2, "{keks}");
    let job: Value = api.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
    let job = api.job(job["id"].as_str().unwrap()).await;

    // The row that has no place cannot be moved and is on record; the others are, and the job ends.
    assert_eq!((&job["state"], &job["done"], &job["failed"]), (&json!("failed"), &json!(2), &json!(1)));
    assert_eq!(incidents(&api).await[0]["object"]["id"], ids[2].as_str());
    for at in [0, 3] {
        assert_eq!(api.value(&ids[at]).await, daemon.secret(names[at]));
    }
    // No rewrap comes by this one, and nobody counts it where it is.
    refuses(&api, &format!("/v1/secrets/{}/value", ids[1]), &daemon.canary, "a KEK version").await;
    let keks: Value = api.get("/v1/keks").await.json().await.unwrap();
    assert_eq!((&keks["items"][0]["records"], &keks["items"][1]["records"]), (&json!(2), &json!(1)));
    stage.daemon.finish().await;
}
on_both!(impossible_counts_hinder_nobody, columns_that_only_count);

async fn rows_that_nobody_wrote(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let mut ids = Vec::new();
    for name in ["labels", "kind", "encoding", "sound"] {
        ids.push(stored(&api, name, &daemon.secret(name)).await);
    }
    stage.run(&format!("UPDATE secrets SET labels = 'none' WHERE id = '{}'", ids[0]));
    stage.run(&format!("UPDATE secrets SET kind = 'other' WHERE id = '{}'", ids[1]));
    stage.run(&format!("UPDATE secret_versions SET encoding = 'x' WHERE secret_id = '{}'", ids[2]));
    stage.run(&format!("UPDATE secrets SET current_version = 7 WHERE id = '{}'", ids[3]));
    refuses(&api, &format!("/v1/secrets/{}/value", ids[3]), &daemon.canary, "a version that is not there")
        .await;
    stage.run(&format!("UPDATE secrets SET current_version = 1 WHERE id = '{}'", ids[3]));

    // The list has the others, page by page, and an incident for each one that it leaves out.
    let (mut listed, mut path) = (Vec::new(), "/v1/secrets?limit=1".to_owned());
    loop {
        let page: Value = api.get(&path).await.error_for_status().unwrap().json().await.unwrap();
        listed.extend(page["items"].as_array().unwrap().iter().map(|item| item["id"].clone()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/secrets?limit=1&cursor={cursor}");
    }
    assert_eq!(listed, [ids[2].as_str(), ids[3].as_str()]);
    // A list waits for no record; that of a token stands behind them and is waited for.
    daemon.token("all").await;
    let altered: HashSet<_> = incidents(&api)
        .await
        .iter()
        .map(|record| record["object"]["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(altered, HashSet::from([ids[0].clone(), ids[1].clone(), ids[3].clone()]));

    for (id, paths) in [(&ids[0], vec!["", "/value", "/versions"]), (&ids[2], vec!["/value", "/versions"])] {
        for path in paths {
            let before = incidents(&api).await.len();
            refuses(&api, &format!("/v1/secrets/{id}{path}"), &daemon.canary, path).await;
            assert_eq!(incidents(&api).await.len(), before + 1, "{path}");
        }
    }
    let status: Value = api.get("/v1/status").await.error_for_status().unwrap().json().await.unwrap();
    assert_eq!(status["vault"]["secrets"], json!({ "opaque": 3, "unreadable": 1 }));
    for id in &ids {
        assert_eq!(api.delete(&format!("/v1/secrets/{id}")).await.status(), StatusCode::NO_CONTENT);
    }
    stage.daemon.finish().await;
}
on_both!(rows_that_nobody_wrote_are_incidents_and_hide_no_others, rows_that_nobody_wrote);

async fn jobs_and_ids_that_nobody_wrote(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let value = daemon.secret("sound");
    let id = stored(&api, "sound", &value).await;
    let altered = stored(&api, "altered", &daemon.secret("altered")).await;
    let set = [("secret_versions", "secret_id"), ("secrets", "id")]
        .map(|(table, id)| format!("UPDATE {table} SET {id} = 'zz/x/1' WHERE {id} = '{altered}'"));
    match engine {
        Engine::Sqlite => set.iter().for_each(|sql| stage.run(sql)),
        // Past the foreign key.
        Engine::Postgres => stage.run(&format!(
            "DO $$ BEGIN SET LOCAL session_replication_role = replica; {}; END $$",
            set.join("; ")
        )),
    }

    let list: Value = api.get("/v1/secrets?limit=1").await.error_for_status().unwrap().json().await.unwrap();
    assert_eq!(list["items"][0]["id"], id.as_str());
    let cursor = list["next_cursor"].as_str().unwrap();
    let rest = api.get(&format!("/v1/secrets?limit=1&cursor={cursor}")).await;
    assert_eq!(rest.error_for_status().unwrap().json::<Value>().await.unwrap()["items"], json!([]));

    api.post("/v1/keks/rotate", &json!({})).await.error_for_status().unwrap();
    let rewrap = async || -> Value {
        let job: Value = api.post("/v1/keks/rewrap", &json!({})).await.json().await.unwrap();
        api.job(job["id"].as_str().unwrap()).await
    };
    let job = rewrap().await;
    assert_eq!((&job["state"], &job["done"]), (&json!("failed"), &json!(1)), "{job}");

    // A job in the queue whose row cannot be read is in nobody's way.
    let at = job["id"].as_str().unwrap();
    stage.run(&format!("UPDATE jobs SET state = 'queued', kind = 'other' WHERE id = '{at}'"));
    let job = rewrap().await;
    assert_eq!(job["state"], "failed", "{job}");
    let states = stage.texts(&format!("SELECT state AS t FROM jobs WHERE id = '{at}'"));
    assert_eq!(states, ["failed"]);
    assert_eq!(api.value(&id).await, value);
    stage.daemon.finish().await;
}
on_both!(ids_and_jobs_that_nobody_wrote_hold_up_nothing, jobs_and_ids_that_nobody_wrote);

async fn a_public_key_that_is_not_the_device_s(engine: Engine) {
    let mut stage = Stage::on(engine, "").await;
    let api = stage.daemon.api().await;
    stored(&api, "guarded", &stage.daemon.secret("guarded")).await;
    // The attacker's key in the place of the signing key's public half, everything else as it was.
    let theirs = p256::ecdsa::SigningKey::from_slice(&[7; 32]).unwrap();
    let point = theirs.verifying_key().to_sec1_point(false);
    let [x, y] = [point.x(), point.y()].map(|number| URL_SAFE_NO_PAD.encode(number.unwrap()));
    let jwk = json!({ "kty": "EC", "crv": "P-256", "x": x, "y": y });
    stage.daemon.stop().await;
    stage.run(&format!("UPDATE signing_keys SET jwk = '{jwk}' WHERE purpose = 'jwt'"));
    assert!(!stage.daemon.try_run().await, "started with another public key");
    assert!(stage.daemon.log().contains("impossible row in signing_keys"), "{}", stage.daemon.log());

    // And with the pin and the kid that fit it: the device knows better.
    let [x, y] = [point.x(), point.y()].map(|number| number.unwrap().to_vec());
    let mut pin = b"lacre/pin/v1/ec".to_vec();
    for number in [&x, &y] {
        pin.extend_from_slice(&32_u64.to_be_bytes());
        pin.extend_from_slice(number);
    }
    let stored =
        stage.texts(&format!("SELECT {} AS t FROM signing_keys WHERE purpose = 'jwt'", stage.hex("key_ref")));
    // Version, kind and id; then a fingerprint.
    let key_ref = format!("{}01{}", &stored[0][..36], hex::encode(Sha256::digest(&pin)));
    let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":{},"y":{}}}"#, jwk["x"], jwk["y"]);
    let kid = URL_SAFE_NO_PAD.encode(Sha256::digest(canonical));
    let set = format!("key_ref = {}, kid = '{kid}'", stage.bytes(&key_ref));
    stage.run(&format!("UPDATE signing_keys SET {set} WHERE purpose = 'jwt'"));
    assert!(!stage.daemon.try_run().await, "started with another pin");
    assert!(stage.daemon.log().contains("unfit for use"), "{}", stage.daemon.log());
}
on_both!(a_public_key_that_the_device_does_not_have_is_not_believed, a_public_key_that_is_not_the_device_s);

async fn a_thousand_times_the_same(engine: Engine) {
    const TIMES: usize = 1000;
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let value = daemon.secret("the-same");
    let mut creates = JoinSet::new();
    for number in 0..TIMES {
        let body = serde_json::json!({ "name": format!("n/{number}"), "kind": "opaque", "value": value });
        let request = api.request(Method::POST, "/v1/secrets").json(&body);
        creates.spawn(async move { request.send().await.unwrap().status() });
        if creates.len() > 32 {
            assert_eq!(creates.join_next().await.unwrap().unwrap(), StatusCode::CREATED);
        }
    }
    assert!(creates.join_all().await.into_iter().all(|status| status == StatusCode::CREATED));

    let hash = hex::encode(Sha256::digest(value.as_bytes()));
    for column in COLUMNS {
        let hex = stage.hex(column);
        let all = stage.texts(&format!("SELECT {hex} AS t FROM secret_versions"));
        assert_eq!(all.len(), TIMES);
        assert!(all.iter().all(|text| !text.contains(&hash[..16])), "{column} has the value's hash");
        let distinct: HashSet<_> = all.into_iter().collect();
        assert_eq!(distinct.len(), TIMES, "{column} repeats");
    }
    stage.daemon.finish().await;
}
on_both!(equal_values_do_not_look_equal, a_thousand_times_the_same);

/// `lacre audit verify` as somebody who has a token does, with a checkpoint that is kept.
fn verify(stage: &Stage, api: &Api, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
    command.args(["audit", "verify", "--addr", &stage.daemon.url, "--checkpoint"]);
    command.arg(stage.daemon.dir().join("checkpoint")).args(more).env("LACRE_TOKEN", &api.token);
    command.output().unwrap()
}

async fn an_old_record(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    for name in ["a", "b"] {
        stored(&api, name, &daemon.secret(name)).await;
    }
    assert!(verify(&stage, &api, &[]).status.success());
    let body = "replace(body, '\"secret.create\"', '\"secret.delete\"')";
    let old = stage
        .texts("SELECT body AS t FROM audit_records WHERE action = 'secret.create' ORDER BY seq LIMIT 1");
    let seq = serde_json::from_str::<Value>(&old[0]).unwrap()["seq"].as_u64().unwrap();
    stage.run(&format!("UPDATE audit_records SET body = {body} WHERE seq = {seq}"));
    stored(&api, "c", &daemon.secret("c")).await;

    let full = verify(&stage, &api, &["--full"]);
    assert_eq!(full.status.code(), Some(2));
    let said = String::from_utf8_lossy(&full.stderr).into_owned();
    assert!(said.contains(&format!("record {seq} is bad")), "{said}");
    // Put back, all is well again.
    stage.run(&format!(
        "UPDATE audit_records SET body = replace(body, 'secret.delete', 'secret.create') WHERE seq = {seq}"
    ));
    assert!(verify(&stage, &api, &["--full"]).status.success());
    stage.daemon.finish().await;
}
on_both!(an_audit_record_that_is_altered_long_after_is_named, an_old_record);
