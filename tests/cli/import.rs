//! `lacre import logto`: a Logto-like database, taken over by the program, on both engines.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use aes_gcm::aead::{Aead, KeyInit};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use diesel::connection::SimpleConnection;
use diesel::{Connection, PgConnection};
use p384::pkcs8::{EncodePrivateKey, LineEnding};
use serde_json::{Value, json};

use crate::postgres::Postgres;
use crate::stage::{Engine, Stage, on_both};
use crate::{code, stderr, stdout};

/// The public test value of the contract, section 6.6.
const KEK: &str = "DtPWS09unRXGuRScB60qXqCSsrjd22dUlXt/0oZgxSo=";

/// Written from the contract's sections 6.1 and 9.1: as much of the schema as an import may look at.
const SCHEMA: &str = "
CREATE TYPE hashing AS ENUM ('Argon2i', 'Argon2id', 'Bcrypt');
CREATE TABLE users (tenant_id varchar(21), id varchar(12) PRIMARY KEY, username varchar(128), primary_email varchar(128),
    primary_phone varchar(128), password_encrypted varchar(256), password_encryption_method hashing, name varchar(128),
    avatar varchar(2048), profile jsonb NOT NULL DEFAULT '{}', identities jsonb NOT NULL DEFAULT '{}',
    custom_data jsonb NOT NULL DEFAULT '{}', is_suspended boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE connectors (tenant_id varchar(21), id varchar(128) PRIMARY KEY, connector_id varchar(128), config jsonb DEFAULT '{}',
    metadata jsonb DEFAULT '{}', sync_profile boolean DEFAULT false, enable_token_storage boolean DEFAULT false,
    created_at timestamptz DEFAULT now());
CREATE TABLE sso_connectors (tenant_id varchar(21), id varchar(128) PRIMARY KEY, provider_name varchar(128),
    connector_name varchar(128), config jsonb DEFAULT '{}', domains jsonb DEFAULT '[]', branding jsonb DEFAULT '{}',
    sync_profile boolean DEFAULT false, enable_token_storage boolean DEFAULT false, created_at timestamptz DEFAULT now());
CREATE TABLE user_sso_identities (tenant_id varchar(21), id varchar(21) PRIMARY KEY, user_id varchar(12), issuer varchar(256),
    identity_id varchar(128), detail jsonb DEFAULT '{}', created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now(),
    sso_connector_id varchar(128));
CREATE TABLE secrets (tenant_id varchar(21), id varchar(21) PRIMARY KEY, user_id varchar(21) REFERENCES users (id), type varchar(256),
    encrypted_dek bytea, iv bytea, auth_tag bytea, ciphertext bytea, metadata jsonb DEFAULT '{}',
    created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now());
CREATE TABLE secret_social_connector_relations (tenant_id varchar(21), secret_id varchar(21), connector_id varchar(128),
    target varchar(256), identity_id varchar(128), PRIMARY KEY (tenant_id, secret_id));
CREATE TABLE secret_enterprise_sso_connector_relations (tenant_id varchar(21), secret_id varchar(21),
    sso_connector_id varchar(128), issuer varchar(256), identity_id varchar(128), PRIMARY KEY (tenant_id, secret_id));
CREATE TABLE logto_configs (tenant_id varchar(21), key varchar(256), value jsonb, PRIMARY KEY (tenant_id, key));
";

const VECTOR: &str = "
INSERT INTO secrets VALUES ('default', 'vector000000000000001', 'ana000000001', 'federated_token_set',
    '\\xa0a1a2a3a4a5a6a7a8a9aaab8861dcd1aceb8f9afa5810809a4eb7dde421573b9556df469b7209d94a1902f9d8bbcf97817f12034b61a1a44cab19c0',
    '\\xb0b1b2b3b4b5b6b7b8b9babb', '\\x6f418834a624ec0a4e17ddf709ba8b07',
    '\\xe2773bc88fa8c82c188cf8c9a833aaf8a65d3dff240ca31737aadd8533e997782771015317f3979a8979d22f5acbe7c6453263a8705e2cd277a81e4429aa0282',
    '{\"hasRefreshToken\":true,\"scope\":\"read,write\",\"tokenType\":\"bearer\",\"expiresAt\":1795347573}',
    '2026-01-02T03:04:05Z', '2026-02-03T04:05:06.789Z')";

struct Logto {
    url: String,
    conn: PgConnection,
    /// The file with the KEK, away from where the daemon's files are looked through.
    dir: tempfile::TempDir,
}

impl Logto {
    fn new() -> Self {
        let url = Postgres::shared().database();
        let mut conn = PgConnection::establish(&url).expect("the server answers");
        conn.batch_execute(SCHEMA).expect("the schema is accepted");
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("kek"), format!(" {KEK}\n")).expect("a file");
        Self { url, conn, dir }
    }

    fn run(&mut self, sql: &str) {
        self.conn.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    fn user(&mut self, id: &str, members: &str, values: &str, identities: &Value) {
        self.run(&format!(
            "INSERT INTO users (tenant_id, id, identities{members}) VALUES ('default', '{id}', '{identities}'{values})"
        ));
    }

    /// A token set of a social identity, made as Logto makes it.
    fn social(&mut self, id: &str, user: &str, identity: &str, kind: &str, plain: &Value) {
        self.run(&secret(id, user, kind, plain));
        self.run(&format!(
            "INSERT INTO secret_social_connector_relations VALUES ('default', '{id}', 'acme00000001', 'acme', '{identity}')"
        ));
    }

    fn kek_file(&self) -> String {
        self.dir.path().join("kek").to_str().expect("text").to_owned()
    }

    fn command(&self, stage: &Stage, more: &[&str]) -> Command {
        let kek = self.kek_file();
        let args = ["import", "logto", "--database-url", &self.url, "--kek-file", &kek, "-o", "json"];
        let mut command = stage.daemon.command_of(&[&args[..], more].concat());
        command.stdin(Stdio::null());
        command
    }

    fn import(&self, stage: &Stage, more: &[&str]) -> Output {
        self.command(stage, more).output().expect("the program runs")
    }
}

/// An INSERT of a secret; its DEK and IVs are new.
fn secret(id: &str, user: &str, kind: &str, plain: &Value) -> String {
    let mut random = [0; 32 + 12 + 12];
    getrandom::fill(&mut random).expect("randomness");
    let (dek, ivs) = random.split_at(32);
    let (wrap_iv, iv) = ivs.split_at(12);
    let seal = |key: &[u8], iv: &[u8], plain: &[u8]| {
        let key: Key<Aes256Gcm> = key.try_into().expect("32 bytes");
        let nonce: Nonce<aes_gcm::aead::consts::U12> = iv.try_into().expect("12 bytes");
        Aes256Gcm::new(&key).encrypt(&nonce, plain).expect("it encrypts")
    };
    let wrapped = [wrap_iv, &seal(&STANDARD.decode(KEK).expect("base64"), wrap_iv, dek)].concat();
    let sealed = seal(dek, iv, plain.to_string().as_bytes());
    let (ciphertext, tag) = sealed.split_at(sealed.len() - 16);
    let metadata = json!({ "hasRefreshToken": plain.get("refresh_token").is_some(), "scope": "s" });
    format!(
        "INSERT INTO secrets VALUES ('default', '{id}', '{user}', '{kind}', '\\x{}', '\\x{}', '\\x{}', '\\x{}', '{metadata}')",
        hex::encode(wrapped),
        hex::encode(iv),
        hex::encode(tag),
        hex::encode(ciphertext)
    )
}

/// A Logto in which everything is that an import has a word for. Returns the Current key's `x`.
fn furnished(canary: &str) -> (Logto, String) {
    let mut logto = Logto::new();
    let acme = json!({
        "clientId": "lacre", "clientSecret": format!("{canary}-client"), "scope": "read",
        "authorizationEndpoint": "https://acme.example/auth", "tokenEndpoint": "https://acme.example/token",
        "userInfoEndpoint": "https://acme.example/me", "tokenEndpointResponseType": "json",
        "profileMap": { "id": "id" },
    });
    let okta = json!({ "issuer": "https://okta.example", "clientId": "lacre", "clientSecret": format!("{canary}-sso") });
    logto.run(&format!(
        "INSERT INTO connectors VALUES
            ('default', 'acme00000001', 'oauth2', '{acme}', '{{\"target\":\"acme\"}}', true, true, '2026-01-01T00:00:00Z'),
            ('default', 'mail00000001', 'simple-mail-transfer-protocol', '{{}}', '{{}}', false, false, now()),
            ('default', 'oidc00000001', 'oidc', '{{\"clientId\":\"x\"}}', '{{\"target\":\"half\"}}', false, true, now()),
            ('other', 'acme00000002', 'oauth2', '{acme}', '{{\"target\":\"other\"}}', true, true, now());
        INSERT INTO sso_connectors VALUES
            ('default', 'okta00000001', 'Okta', 'Okta', '{okta}', '[\"corp.example\"]', '{{}}', true, true);"
    ));
    let identity =
        |id: &str| json!({ "acme": { "userId": id, "details": { "id": id, "rawData": { "n": 1 } } } });
    let argon2 =
        "$argon2i$v=19$m=4096,t=10,p=1$c29tZXRoaW5nIHRoYXQgaXM$Tm9ib2R5IGhhcyBhIHBhc3N3b3JkIG9mIHRoYXQgaGE";
    logto.user(
        "ana000000001",
        ", username, primary_email, password_encrypted, password_encryption_method, custom_data, created_at",
        &format!(", 'ana', 'ana@a.example', '{argon2}', 'Argon2i', '{{\"k\":1}}', '2025-05-06T07:08:09Z'"),
        &identity("a1"),
    );
    logto.user(
        "bia000000001",
        ", username, is_suspended, password_encrypted, password_encryption_method",
        ", 'bia', true, '$2a$10$xyz', 'Bcrypt'",
        &identity("b1"),
    );
    logto.user("cid000000001", ", avatar", ", 'none'", &identity("c1"));
    logto.user("dan000000001", ", primary_email", ", 'nobody'", &identity("d1"));
    logto.run(
        "INSERT INTO user_sso_identities (tenant_id, id, user_id, issuer, identity_id, sso_connector_id) VALUES
            ('default', 'ssoidentity0000000001', 'ana000000001', 'https://okta.example', 'sub-1', 'okta00000001');",
    );
    logto.run(VECTOR);
    logto.run(
        "INSERT INTO secret_social_connector_relations VALUES
            ('default', 'vector000000000000001', 'acme00000001', 'acme', 'a1')",
    );
    let tokens = json!({ "access_token": format!("{canary}-at"), "refresh_token": format!("{canary}-rt") });
    logto.social("bias00000000000000001", "bia000000001", "b1", "federated_token_set", &tokens);
    logto.social("tampered0000000000001", "cid000000001", "c1", "federated_token_set", &tokens);
    logto
        .run("UPDATE secrets SET auth_tag = '\\x00000000000000000000000000000000' WHERE id LIKE 'tampered%'");
    logto.social("note00000000000000001", "cid000000001", "c1", "note", &tokens);
    logto.run(&secret("sso000000000000000001", "ana000000001", "federated_token_set", &tokens));
    logto.run(
        "INSERT INTO secret_enterprise_sso_connector_relations VALUES
            ('default', 'sso000000000000000001', 'okta00000001', 'https://okta.example', 'sub-1')",
    );
    let x = with_keys(&mut logto, canary);
    (logto, x)
}

/// Three signing keys and a cookie key; the Current key's `x`.
fn with_keys(logto: &mut Logto, canary: &str) -> String {
    let (next, current, previous) = (p384_key(), p384_key(), p384_key());
    let key = |id: &str, key: &p384::ecdsa::SigningKey, status: &str| {
        let pem = key.to_pkcs8_pem(LineEnding::LF).expect("PEM").to_string();
        json!({ "id": id, "value": pem, "createdAt": 1_795_347_573, "status": status })
    };
    let keys = json!([
        key("next00000000000000001", &next, "Next"),
        key("curr00000000000000001", &current, "Current"),
        key("prev00000000000000001", &previous, "Previous"),
    ]);
    let cookies =
        json!([{ "id": "cook00000000000000001", "value": format!("{canary}-cookie"), "createdAt": 1 }]);
    logto.run(&format!(
        "INSERT INTO logto_configs VALUES ('default', 'oidc.privateKeys', '{keys}'), ('default', 'oidc.cookieKeys', '{cookies}')"
    ));
    let point = current.verifying_key().to_sec1_point(false);
    URL_SAFE_NO_PAD.encode(point.x().expect("a point"))
}

fn p384_key() -> p384::ecdsa::SigningKey {
    loop {
        let mut bytes = [0; 48];
        getrandom::fill(&mut bytes).expect("randomness");
        if let Ok(key) = p384::ecdsa::SigningKey::from_slice(&bytes) {
            return key;
        }
    }
}

/// `[found, imported, present, skipped]` of a kind.
fn counts(output: &Output, kind: &str) -> [u64; 4] {
    let report: Value = serde_json::from_str(&stdout(output))
        .unwrap_or_else(|error| panic!("{error}: {} {}", stdout(output), stderr(output)));
    let items = report["items"].as_array().expect("a list");
    let item = items.iter().find(|item| item["kind"] == kind).expect("the kind is told");
    ["found", "imported", "present", "skipped"].map(|name| item[name].as_u64().expect("a number"))
}

/// What is in the installation's tables.
fn rows(stage: &Stage, engine: Engine) -> Vec<String> {
    let tables = ["connectors", "users", "user_identities", "token_sets", "secret_versions"];
    let count = |table| stage.texts(&format!("SELECT '{table} ' || count(*) AS t FROM {table}"));
    let keys = stage.texts("SELECT 'keys ' || count(*) AS t FROM signing_keys");
    let records =
        stage.texts("SELECT 'records ' || count(*) AS t FROM audit_records WHERE body LIKE '%logto.import%'");
    // Beside a daemon others write records, too.
    let all = match engine {
        Engine::Sqlite => stage.texts("SELECT 'all records ' || count(*) AS t FROM audit_records"),
        Engine::Postgres => Vec::new(),
    };
    tables.into_iter().flat_map(count).chain(keys).chain(records).chain(all).collect()
}

async fn everything(engine: Engine) {
    let mut stage = Stage::on(engine, "").await;
    let (logto, x) = furnished(&stage.daemon.canary);
    if engine == Engine::Sqlite {
        let output = logto.import(&stage, &[]);
        assert_eq!(code(&output), 4, "{}", stderr(&output));
        assert!(stderr(&output).contains("stop the daemon first"), "{}", stderr(&output));
        stage.daemon.stop().await;
    }
    let before = rows(&stage, engine);

    let rehearsed = logto.import(&stage, &["--dry-run"]);
    assert_eq!(code(&rehearsed), 5, "{}", stderr(&rehearsed));
    assert_eq!(rows(&stage, engine), before, "a dry run writes nothing");
    let wrong = logto.dir.path().join("wrong");
    std::fs::write(&wrong, STANDARD.encode([7; 32])).expect("a file");
    let mut command = stage.daemon.command_of(&["import", "logto", "--database-url", &logto.url]);
    let refused = command.arg("--kek-file").arg(&wrong).output().expect("the program runs");
    assert_eq!(code(&refused), 1);
    assert!(stderr(&refused).contains("opens none of the first 4 token sets"), "{}", stderr(&refused));
    assert_eq!(rows(&stage, engine), before, "another KEK imports nothing");

    let done = logto.import(&stage, &[]);
    for output in [&rehearsed, &done] {
        let shown = stdout(output);
        assert_eq!(code(output), 5, "{}", stderr(output));
        assert_eq!(counts(output, "connectors"), [3, 1, 0, 2], "{shown}");
        assert_eq!(counts(output, "sso-connectors"), [1, 1, 0, 0], "{shown}");
        assert_eq!(counts(output, "users"), [4, 3, 0, 1], "{shown}");
        assert_eq!(counts(output, "passwords"), [2, 1, 0, 1], "{shown}");
        assert_eq!(counts(output, "identities"), [3, 3, 0, 0], "{shown}");
        assert_eq!(counts(output, "sso-identities"), [1, 1, 0, 0], "{shown}");
        assert_eq!(counts(output, "token-sets"), [5, 3, 0, 2], "{shown}");
        assert_eq!(counts(output, "signing-keys"), [3, 2, 0, 1], "{shown}");
        assert_eq!(counts(output, "cookie-keys"), [1, 0, 0, 1], "{shown}");
        let report: Value = serde_json::from_str(&shown).expect("JSON");
        let lost: Vec<_> =
            report["lost"].as_array().expect("a list").iter().map(|lost| &lost["id"]).collect();
        assert_eq!(lost, ["oidc00000001", "dan000000001", "bia000000001", "tampered0000000000001"]);
        assert!(shown.contains("config.") && !shown.contains(&stage.daemon.canary), "{shown}");
    }
    taken_over(&stage);

    let again = logto.import(&stage, &[]);
    assert_eq!(counts(&again, "users"), [4, 0, 3, 1]);
    assert_eq!(counts(&again, "passwords"), [2, 0, 1, 1]);
    assert_eq!(counts(&again, "identities"), [3, 0, 3, 0]);
    assert_eq!(counts(&again, "token-sets"), [5, 0, 3, 2]);
    assert_eq!(counts(&again, "connectors"), [3, 0, 1, 2]);
    assert_eq!(counts(&again, "signing-keys"), [3, 0, 2, 1]);
    taken_over(&stage);

    if engine == Engine::Sqlite {
        stage.daemon.run().await;
    }
    served(&stage, &x).await;
    // Looks for the tokens and the connectors' secrets in every file and record.
    stage.daemon.finish().await;
}

/// What a daemon tells of it.
async fn served(stage: &Stage, x: &str) {
    let api = stage.daemon.api().await;
    // Beside a daemon: it knows within a second.
    let until = Instant::now() + Duration::from_secs(20);
    let jwks = loop {
        let jwks: Value = api.get("/oidc/jwks").await.json().await.expect("JSON");
        if jwks["keys"].as_array().is_some_and(|keys| keys.len() == 3) || Instant::now() > until {
            break jwks;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let keys = jwks["keys"].as_array().expect("a list");
    let key = keys.iter().find(|key| key["x"] == json!(x)).unwrap_or_else(|| panic!("{jwks}"));
    assert_eq!((&key["alg"], keys.len()), (&json!("ES384"), 3), "{jwks}");
    let policy: Value = api.get("/v1/signing-keys/jwt/policy").await.json().await.expect("JSON");
    assert_eq!(policy["ec_curve"], "P-384");
    let lines = api.audit_lines().await;
    let of_sets: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains("logto.import") && line.contains(r#""kind":"token-sets""#))
        .filter(|line| line.contains(r#""imported""#))
        .collect();
    assert_eq!(of_sets.len(), 2, "{of_sets:?}");
    assert!(of_sets[0].contains(r#""imported":"3","present":"0","skipped":"2""#), "{}", of_sets[0]);
    assert!(of_sets[1].contains(r#""imported":"0","present":"3","skipped":"2""#), "{}", of_sets[1]);
}

/// What the import has written, row by row.
fn taken_over(stage: &Stage) {
    let sets = stage.texts(
        "SELECT id || ' ' || user_id || ' ' || family || ' ' || target || ' ' || identity_id || ' ' || scope || ' ' ||
            coalesce(token_type, '-') || ' ' || coalesce(CAST(expires_at AS text), '-') || ' ' || state AS t
         FROM token_sets ORDER BY id",
    );
    assert_eq!(
        sets,
        [
            "bias00000000000000001 bia000000001 social acme b1 s - - idle",
            "sso000000000000000001 ana000000001 sso okta00000001 sub-1 s - - idle",
            "vector000000000000001 ana000000001 social acme a1 read,write bearer 1795347573 idle",
        ]
    );
    let times = stage.texts(
        "SELECT CAST(created_at AS text) || ' ' || CAST(updated_at AS text) AS t FROM token_sets WHERE id LIKE 'vector%'",
    );
    assert_eq!(times, ["1767323045000000 1770091506789000"]);
    let sealed = stage
        .texts("SELECT kind || ' ' || secret_id AS t FROM secret_versions WHERE kind <> 'secret' ORDER BY 1");
    assert_eq!(
        sealed,
        [
            "connector connector/default/acme00000001",
            "connector connector/default/okta00000001",
            "token-set token-set/default/ana000000001/social/acme",
            "token-set token-set/default/ana000000001/sso/okta00000001",
            "token-set token-set/default/bia000000001/social/acme",
        ]
    );
    let users = stage.texts(
        "SELECT id || ' ' || coalesce(username, '-') || ' ' || coalesce(substr(password_hash, 1, 9), '-') || ' ' ||
            CAST(is_suspended AS text) || ' ' || coalesce(avatar, '-') AS t FROM users ORDER BY id",
    );
    assert_eq!(users, ["ana000000001 ana $argon2i$ 0 -", "bia000000001 bia - 1 -", "cid000000001 - - 0 -"]);
    let sso = stage.texts("SELECT id || ' ' || issuer AS t FROM user_identities WHERE family = 'sso'");
    assert_eq!(sso, ["ssoidentity0000000001 https://okta.example"]);
}

on_both!(a_logto_is_taken_over, everything);

const MANY: usize = 700;

/// Kills the import when `done` rows are told to be done, at the earliest.
fn killed_at(logto: &Logto, stage: &Stage, done: u64) {
    let mut command = logto.command(stage, &["--progress", "json"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program runs");
    let lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let reached = lines.map_while(Result::ok).any(|line| {
        serde_json::from_str::<Value>(&line).is_ok_and(|line| line["done"].as_u64() >= Some(done))
    });
    assert!(reached, "it has ended before");
    child.kill().expect("it runs");
    child.wait().expect("it ends");
}

#[tokio::test]
async fn a_killed_import_goes_on() {
    let mut stage = Stage::on(Engine::Sqlite, "").await;
    let (mut logto, _) = furnished(&stage.daemon.canary);
    logto.run("DELETE FROM secrets WHERE id LIKE 'tampered%' OR id LIKE 'note%'");
    logto.run("DELETE FROM users WHERE id LIKE 'dan%' OR id LIKE 'cid%'");
    logto.run("DELETE FROM connectors WHERE id LIKE 'oidc%'; UPDATE users SET password_encrypted = NULL");
    for number in 0..MANY {
        let (user, identity) = (format!("many{number:08}"), format!("m{number}"));
        let tokens = json!({ "access_token": format!("{}-{number}", stage.daemon.canary) });
        logto.user(&user, "", "", &json!({ "acme": { "userId": identity } }));
        logto.social(&format!("many{number:017}"), &user, &identity, "federated_token_set", &tokens);
    }
    stage.daemon.stop().await;
    let count = |stage: &Stage, table: &str| -> usize {
        let text = stage.texts(&format!("SELECT CAST(count(*) AS text) AS t FROM {table}"));
        text[0].parse().expect("a number")
    };

    killed_at(&logto, &stage, 100);
    let users = count(&stage, "users");
    assert!((100..MANY).contains(&users) && count(&stage, "token_sets") == 0, "{users}");
    killed_at(&logto, &stage, MANY as u64 + 100);
    let sets = count(&stage, "token_sets");
    assert!((1..MANY).contains(&sets), "{sets}");

    let output = logto.import(&stage, &[]);
    assert_eq!(code(&output), 0, "{}{}", stdout(&output), stderr(&output));
    let [found, imported, present, skipped] = counts(&output, "token-sets");
    assert_eq!((found, imported + present, skipped), (MANY as u64 + 3, MANY as u64 + 3, 0));
    assert!(present >= sets as u64, "{present}");
    assert_eq!(counts(&output, "users"), [MANY as u64 + 2, 0, MANY as u64 + 2, 0]);
    assert_eq!((count(&stage, "users"), count(&stage, "token_sets")), (MANY + 2, MANY + 3));
    let with_values = "token_sets s JOIN secret_versions v ON v.version = s.version AND v.kind = 'token-set'
        AND v.secret_id = 'token-set/default/' || s.user_id || '/' || s.family || '/' || s.target";
    assert_eq!(count(&stage, with_values), MANY + 3);
    stage.daemon.finish().await;
}

#[test]
fn what_is_no_logto_is_refused_before_anything_is_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("lacre.toml");
    std::fs::write(&config, format!("data_dir = \"{}\"\n", dir.path().display())).expect("a file");
    let run = |args: &[&str]| {
        let config = config.to_str().expect("text");
        crate::run(&[&["import", "logto", "--config", config], args].concat())
    };
    let output = run(&["--database-url", "mysql://x:s3cret@y/z"]);
    assert_eq!(code(&output), 1);
    assert!(!stderr(&output).contains("s3cret"), "{}", stderr(&output));
    let output = run(&["--database-url", "postgres://x:s3cret@127.0.0.1:9/z"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("a passfile does not"), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot open postgres://x:***@127.0.0.1:9/z"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("s3cret"), "{}", stderr(&output));
    let kek = dir.path().join("kek");
    std::fs::write(&kek, "c2hvcnQ=").expect("a file");
    let output = run(&["--database-url", "postgres://y/z", "--kek-file", kek.to_str().expect("text")]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("base64 of 32 bytes"), "{}", stderr(&output));
}
