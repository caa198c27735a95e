//! Whoever writes to the database spoils a set, and gets no token to another user, another provider or another
//! tenant: CB-1, CB-5, AP-2.

use std::fs;
use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::daemon::{Api, Options, Peer, TestDaemon, contains, encodings};
use crate::ground;
use crate::idp::{FakeIdp, Mode};
use crate::postgres::Postgres;
use crate::stage::{ACME, Engine, Stage, User, body, path, text, token_in, until};

const COLUMNS: [&str; 4] = ["wrapped_dek", "iv", "ciphertext", "tag"];
/// The sealed rows of token sets.
const SETS: &str = "kind = 'token-set'";

/// A sealed row: whose it is, and its columns in hex.
struct Row {
    id: String,
    version: String,
    columns: [String; 4],
}

fn rows(stage: &Stage) -> Vec<Row> {
    let place = "secret_id || ' ' || CAST(version AS TEXT)";
    let places =
        stage.ground.texts(&format!("SELECT {place} AS t FROM secret_versions WHERE {SETS} ORDER BY 1"));
    let row = |place: String| {
        let (id, version) = place.split_once(' ').unwrap();
        let columns = COLUMNS.map(|column| {
            let hex = stage.ground.hex(column);
            let rule = format!("secret_id = '{id}' AND version = {version}");
            stage.ground.texts(&format!("SELECT {hex} AS t FROM secret_versions WHERE {rule}")).remove(0)
        });
        Row { id: id.to_owned(), version: version.to_owned(), columns }
    };
    places.into_iter().map(row).collect()
}

fn write(stage: &Stage, row: &Row, columns: &[String; 4]) {
    let set: Vec<_> = COLUMNS
        .iter()
        .zip(columns)
        .map(|(column, hex)| format!("{column} = {}", stage.ground.bytes(hex)))
        .collect();
    let rule = format!("secret_id = '{}' AND version = {}", row.id, row.version);
    stage.ground.run(&format!("UPDATE secret_versions SET {} WHERE {rule}", set.join(", ")));
}

/// An error that tells nothing, with nothing of any value in it.
async fn fails(stage: &Stage, answer: Response, what: &str) {
    let body = body(answer, 500).await;
    assert_eq!(body, json!({ "message": "Internal server error." }), "{what}");
    for text in encodings(&stage.daemon().canary) {
        assert!(!contains(body.to_string().as_bytes(), &text), "{what}: plaintext");
    }
}

async fn incidents(stage: &Stage) -> usize {
    let records = stage.records().await;
    records.iter().filter(|record| record["action"] == "incident.integrity").count()
}

async fn every_subset_of_columns(engine: Engine) {
    let stage = Stage::serve(engine, Mode::Strict, "").await;
    let users = [stage.linked("ana").await, stage.linked("ben").await];
    let tokens = [stage.token(&users[0]).await, stage.token(&users[1]).await];
    let rows = rows(&stage);
    assert_eq!(rows.len(), 2, "one sealed row for each set");

    for subset in 1..16 {
        for mine in 0..2 {
            let from = |at: usize| if subset & (1 << at) == 0 { mine } else { 1 - mine };
            write(&stage, &rows[mine], &[0, 1, 2, 3].map(|at| rows[from(at)].columns[at].clone()));
        }
        for user in &users {
            fails(&stage, stage.read(user).await, &format!("subset {subset:04b}")).await;
        }
    }
    assert!(incidents(&stage).await >= 30, "an incident for each read");
    for (mine, row) in rows.iter().enumerate() {
        write(&stage, row, &rows[mine].columns);
    }
    for (user, token) in users.iter().zip(&tokens) {
        assert_eq!(&stage.token(user).await, token, "put back");
    }
    assert_eq!(stage.idp.refreshes(), 0);
    stage.finish().await;
}

#[tokio::test]
async fn columns_of_one_users_set_do_not_open_in_anothers_on_sqlite() {
    every_subset_of_columns(Engine::Sqlite).await;
}

#[tokio::test]
async fn columns_of_one_users_set_do_not_open_in_anothers_on_postgresql() {
    every_subset_of_columns(Engine::Postgres).await;
}

#[tokio::test]
async fn a_set_that_is_given_to_another_user_opens_for_nobody() {
    let stage = Stage::serve(Engine::Sqlite, Mode::Strict, "").await;
    let (ana, ben) = (stage.linked("ana").await, stage.user("ben").await);
    stage.ground.run(&format!("UPDATE token_sets SET user_id = '{}'", ben.id));
    let answer = stage.read(&ben).await;
    assert!([404, 500].contains(&answer.status().as_u16()), "{}", answer.text().await.unwrap());
    // With a refresh due, it is not sent to the provider either.
    stage.expire();
    let answer = stage.read(&ben).await;
    assert!([404, 500].contains(&answer.status().as_u16()), "{}", answer.text().await.unwrap());
    assert_eq!(stage.idp.refreshes(), 0);
    stage.ground.run(&format!("UPDATE token_sets SET user_id = '{}'", ana.id));
    assert!(stage.idp.is_live(&stage.token(&ana).await), "put back");
    stage.finish().await;
}

/// The columns of a table, in SQLite.
fn columns_of(stage: &Stage, table: &str) -> Vec<String> {
    stage.ground.texts(&format!("SELECT name AS t FROM pragma_table_info('{table}')"))
}

#[tokio::test]
async fn an_address_that_was_changed_in_the_database_gets_nothing() {
    let stage = Stage::serve(Engine::Sqlite, Mode::Strict, "").await;
    let theirs = FakeIdp::start(Mode::Strict, "theirs");
    let ana = stage.linked("ana").await;
    stage.expire();
    let mut changed = 0;
    for column in columns_of(&stage, "connectors") {
        let has =
            format!("SELECT id AS t FROM connectors WHERE CAST({column} AS TEXT) LIKE '%{}%'", stage.idp.url);
        if stage.ground.texts(&has).is_empty() {
            continue;
        }
        changed += 1;
        let other = format!("replace(CAST({column} AS TEXT), '{}', '{}')", stage.idp.url, theirs.url);
        stage.ground.run(&format!("UPDATE connectors SET {column} = {other}"));
        stage.expire();
        // What is only shown may be wrong; what decides is sealed.
        let answer = stage.read(&ana).await;
        if answer.status() == 200 {
            assert!(stage.idp.is_live(&token_in(answer).await), "{column}");
            let (_, uri) = stage.begin(&ana, &stage.connector, None).await;
            assert!(uri.starts_with(&stage.idp.url), "{column}: the user is sent to {uri}");
        } else {
            fails(&stage, answer, &column).await;
        }
        assert_eq!(theirs.connections(), 0, "{column}");
        let back = format!("replace(CAST({column} AS TEXT), '{}', '{}')", theirs.url, stage.idp.url);
        stage.ground.run(&format!("UPDATE connectors SET {column} = {back}"));
    }
    println!("{changed} columns tell the provider's address");
    stage.expire();
    let works = async || stage.read(&ana).await.status() == 200;
    until("what was put back", Duration::from_secs(60), works).await;
    assert_eq!((theirs.connections(), stage.idp.families_revoked()), (0, 0));
    stage.finish().await;
}

#[tokio::test]
async fn a_connector_whose_row_was_written_by_another_hand_is_refused() {
    // Of the columns, those that decide where tokens come from and whether they are kept.
    const COLUMNS: [&str; 4] = ["factory", "target", "stores_tokens", "version"];
    let stage = Stage::serve(Engine::Sqlite, Mode::Strict, "").await;
    let ana = stage.linked("ana").await;
    stage.expire();
    let before = incidents(&stage).await;
    let mut failed = 0;
    for column in COLUMNS {
        let kept = format!("SELECT CAST({column} AS TEXT) AS t FROM connectors");
        let kept = stage.ground.texts(&kept).remove(0);
        let (other, back) = match kept.parse::<i64>() {
            Ok(number) => (format!("{}", if number == 0 { 1 } else { number - 1 }), kept),
            Err(_) => ("'oidc'".to_owned(), format!("'{kept}'")),
        };
        stage.ground.run(&format!("UPDATE connectors SET {column} = {other}"));
        let answer = stage.read(&ana).await;
        assert_ne!(answer.status(), 200, "{column}");
        assert_eq!(stage.idp.refreshes(), 0, "{column}");
        failed += usize::from(answer.status() == 500);
        stage.ground.run(&format!("UPDATE connectors SET {column} = {back}"));
    }
    assert!(failed > 0 && incidents(&stage).await > before, "nothing was noticed");
    let works = async || stage.read(&ana).await.status() == 200;
    until("what was put back", Duration::from_secs(60), works).await;
    assert_eq!(stage.idp.refreshes(), 1);
    stage.finish().await;
}

/// What an answer says, without what is different in every answer.
async fn said(answer: Response) -> (u16, String, Vec<String>) {
    let mut names: Vec<_> = answer.headers().keys().map(|name| name.as_str().to_owned()).collect();
    names.sort();
    (answer.status().as_u16(), answer.text().await.unwrap(), names)
}

#[tokio::test]
async fn what_belongs_to_another_user_looks_like_what_is_not_there() {
    let stage = Stage::dev(Mode::Strict).await;
    let (_ana, ben) = (stage.linked("ana").await, stage.user("ben").await);
    let theirs = said(stage.read(&ben).await).await;
    let nothing = said(ben.api.get(&path("unknown")).await).await;
    assert_eq!(theirs, nothing);
    assert_eq!(theirs.0, 404);
    stage.finish().await;
}

/// The daemon of tenant `other` beside that of a stage on PostgreSQL, and an administrator there.
async fn other_tenant(daemon: &mut TestDaemon, text: &str) -> (Peer, Api) {
    let other = format!("tenant = \"other\"\n{text}");
    daemon.set_options(Options { config: Some(other.clone()), ..Options::default() });
    let file = daemon.dir().join("other.secret");
    let made =
        daemon.command_of(&["init", "-o", "json", "--secret-out", file.to_str().unwrap()]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    let secret = fs::read_to_string(&file).unwrap();
    fs::remove_file(file).unwrap();
    daemon.set_options(Options { config: Some(text.to_owned()), ..Options::default() });
    let peer = Peer::start(daemon, &other);
    let token = daemon.token_at(&peer.url, made["client_id"].as_str().unwrap(), &secret, "all").await;
    let api = daemon.api_of(&token).at(&peer.url);
    (peer, api)
}

/// Every way to an id: the method, the path with an id that there is and with one that there is not, and the bodies
/// likewise.
type Door = (Method, String, String, Option<[Value; 2]>);

fn doors(user: &str, secret: &str, connector: &str) -> Vec<Door> {
    const NOBODY: &str = "000000000000";
    let plain = |method: Method, path: &str, id: &str, unknown: &str| -> Door {
        (method, path.replace("{}", id), path.replace("{}", unknown), None)
    };
    let of_user = |method, path| plain(method, path, user, NOBODY);
    let sent =
        |path: &str, bodies| -> Door { (Method::POST, path.to_owned(), path.to_owned(), Some(bodies)) };
    let read = |user: &str| json!({ "user_id": user, "connection": ACME, "reason": "a test" });
    let switch = json!({ "enableTokenStorage": false });
    let (_, at, nowhere, _) = plain(Method::GET, "/api/connectors/{}", connector, NOBODY);
    vec![
        of_user(Method::GET, "/api/users/{}"),
        of_user(Method::GET, "/api/users/{}/identities/acme?includeTokenSecret=true"),
        of_user(Method::GET, "/api/users/{}/all-identities"),
        of_user(Method::DELETE, "/api/users/{}/identities/acme"),
        of_user(Method::DELETE, "/api/users/{}"),
        plain(Method::DELETE, "/api/secrets/{}", secret, "000000000000000000000"),
        (Method::GET, at.clone(), nowhere.clone(), None),
        (Method::PATCH, at.clone(), nowhere.clone(), Some([switch.clone(), switch])),
        (Method::DELETE, at, nowhere, None),
        sent("/api/subject-tokens", [json!({ "userId": user }), json!({ "userId": NOBODY })]),
        sent("/v1/token-sets/access-token", [read(user), read(NOBODY)]),
    ]
}

#[tokio::test]
async fn what_belongs_to_another_tenant_looks_like_what_is_not_there() {
    let url = Postgres::shared().database();
    let more = format!(
        "[issuer]\nurl = \"http://127.0.0.1:{{port}}\"\n[database]\nurl = \"{url}\"\n\
         [upstream]\nloopback_http = true\n"
    );
    let text_of = ground::config("", &more);
    let mut daemon = TestDaemon::start(Options { config: Some(text_of.clone()), ..Options::default() }).await;
    let (peer, there) = other_tenant(&mut daemon, &text_of).await;
    let stage = Stage::with(ground::Stage::of(daemon, Engine::Postgres, url), Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let secret = text(&stage.metadata(&ana, ACME).await["id"]);
    for (method, ours, nothing, sent) in doors(&ana.id, &secret, &stage.connector) {
        let [first, second] = sent.map_or([None, None], |bodies| bodies.map(Some));
        let ask = async |path: &str, sent: Option<Value>| {
            let request = there.request(method.clone(), path).header("X-Request-Id", "the-same");
            let request = if let Some(sent) = sent { request.json(&sent) } else { request };
            said(request.send().await.unwrap()).await
        };
        let (theirs, unknown) = (ask(&ours, first).await, ask(&nothing, second).await);
        assert_eq!(theirs, unknown, "{method} {ours}");
        assert_eq!(theirs.0, 404, "{method} {ours}: {}", theirs.1);
    }
    no_sign_in_of_theirs(&stage, &peer, &there, &ana).await;
    // The user's token is nothing at the other tenant, and is what it was at this one.
    let elsewhere = ana.api.at(&peer.url).get(&path(ACME)).await;
    assert_eq!(elsewhere.status(), 401);
    token_in(stage.read(&ana).await).await;
    assert_eq!(stage.sets(), 1);
    finish(stage, peer, &[there], ana).await;
}

/// A person of the other tenant brings connectors and sign-ins of this one, and those that are nowhere (ID-11).
async fn no_sign_in_of_theirs(stage: &Stage, peer: &Peer, there: &Api, ana: &User) {
    crate::stage::patch(
        there,
        "/api/account-center",
        &json!({ "enabled": true, "fields": { "social": "Edit" } }),
    )
    .await;
    let asked =
        json!({ "name": "theirs", "kind": "traditional", "scopes": [], "allow_token_exchange": true });
    let app = body(there.post("/v1/apps", &asked).await, 201).await;
    let user = body(there.post("/api/users", &json!({ "username": "eve" })).await, 200).await;
    let subject = body(there.post("/api/subject-tokens", &json!({ "userId": user["id"] })).await, 201).await;
    let form = [
        ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange".to_owned()),
        ("subject_token", text(&subject["subjectToken"])),
        ("subject_token_type", "urn:logto:token-type:impersonation_token".to_owned()),
        ("scope", "openid identities".to_owned()),
    ];
    let request = reqwest::Client::new().post(format!("{}/oidc/token", peer.url)).form(&form);
    let request = request.basic_auth(text(&app["client_id"]), Some(text(&app["client_secret"])));
    let token = text(&body(request.send().await.unwrap(), 200).await["access_token"]);
    stage.daemon().hide(&token);
    let eve = stage.daemon().api_of(&token).at(&peer.url);

    let (pending, uri) = stage.begin(ana, &stage.connector, None).await;
    let (code, _) = stage.idp.authorize(&uri, "ana");
    let verified = stage.verified(ana, "ana", None).await;
    let redeemed = stage.idp.requests("authorization_code");
    let data = json!({ "code": code, "state": "s-1", "redirectUri": crate::stage::CALLBACK });
    let nowhere = "000000000000000000000";
    let start = |id: &str| json!({ "connectorId": id, "state": "s", "redirectUri": crate::stage::CALLBACK });
    let answer = |id: &str| json!({ "verificationRecordId": id, "connectorData": data });
    let link = |id: &str| json!({ "newIdentifierVerificationRecordId": id });
    let write = |id: &str| json!({ "verificationRecordId": id });
    for (method, at, bodies) in [
        (Method::POST, "/api/verifications/social", [start(&stage.connector), start("000000000000")]),
        (Method::POST, "/api/verifications/social/verify", [answer(&pending), answer(nowhere)]),
        (Method::POST, "/api/my-account/identities", [link(&verified), link(nowhere)]),
        (Method::PUT, "/api/my-account/identities", [link(&verified), link(nowhere)]),
        (Method::PUT, &path(ACME), [write(&verified), write(nowhere)]),
    ] {
        let ask =
            async |sent: &Value| said(eve.request(method.clone(), at).json(sent).send().await.unwrap()).await;
        let [ours, unknown] = [ask(&bodies[0]).await, ask(&bodies[1]).await];
        assert_eq!(ours, unknown, "{method} {at}");
        assert!([400, 422].contains(&ours.0), "{method} {at}: {}", ours.1);
    }
    assert_eq!(stage.idp.requests("authorization_code"), redeemed, "a token request was sent");
    // Whose they are has them still.
    body(stage.verify(ana, &pending, &code).await, 200).await;
    body(crate::stage::put_token(ana, ACME, &verified).send().await.unwrap(), 200).await;
}

/// As [`Stage::finish`], which verifies the chain; that of one tenant among several has gaps.
async fn finish(stage: Stage, peer: Peer, others: &[Api], user: User) {
    let mut lines = stage.admin.audit_lines().await;
    for api in others {
        lines.extend(api.audit_lines().await);
    }
    drop((peer, user));
    let mut daemon = stage.ground.daemon;
    assert_eq!(daemon.stop().await, Some(0));
    daemon.scan(&lines);
}
