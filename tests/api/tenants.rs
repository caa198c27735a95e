//! Two tenants on one database and one token: nothing of the one is seen, opened or changed by the other,
//! not even when rows are moved between them (CB-1, CB-7, AP-2).

use std::fs;
use std::process::{Command, Output};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, Options, Peer, TestDaemon};
use crate::postgres::Postgres;
use crate::stage::{Engine, Stage, config, problem, stored};
use crate::tampering::{columns, incidents, refuses, write};

/// The daemon of tenant `default` on a stage, that of tenant `other` beside it, and a session with each.
struct Tenants {
    stage: Stage,
    peer: Peer,
    here: Api,
    there: Api,
}

impl Tenants {
    async fn start() -> Self {
        let url = Postgres::shared().database();
        // One issuer for both, so that nothing but the tenant tells their tokens apart.
        let uid = rustix::process::getuid().as_raw();
        let more = format!(
            "[[server.local_users]]\nuid = {uid}\nscopes = [\"audit:read\"]\n\
             [issuer]\nurl = \"http://127.0.0.1:{{port}}\"\n[database]\nurl = \"{url}\"\n"
        );
        let text = config("", &more).replace("[server]\n", "[server]\nunix_socket = \"{dir}/here\"\n");
        let options = Options { config: Some(text.clone()), ..Options::default() };
        let mut daemon = TestDaemon::start(options.clone()).await;
        let other = format!("tenant = \"other\"\n{text}").replace("{dir}/here", "{dir}/there");
        daemon.set_options(Options { config: Some(other.clone()), ..Options::default() });
        let secret = daemon.dir().join("other.secret");
        let init = || -> Value {
            let args = ["init", "-o", "json", "--secret-out", secret.to_str().unwrap()];
            let made = daemon.command_of(&args).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            serde_json::from_slice(&made.stdout).unwrap()
        };
        let made = init();
        let kept = fs::read(&secret).unwrap();
        let again = init();
        assert_eq!((&again["client_id"], &again["created"]), (&made["client_id"], &json!(false)), "repeated");
        assert_eq!(fs::read(&secret).unwrap(), kept, "the secret that was made");
        assert!(!daemon.dir().join("other.secret.new").exists(), "an empty file is left");
        daemon.set_options(options);

        let peer = Peer::start(&daemon, &other);
        let here = daemon.api().await;
        let (id, secret_text) = (made["client_id"].as_str().unwrap(), fs::read_to_string(&secret).unwrap());
        fs::remove_file(secret).unwrap();
        let token = daemon.token_at(&peer.url, id, &secret_text, "all").await;
        let there = daemon.api_of(&token).at(&peer.url);
        Self { stage: Stage::of(daemon, Engine::Postgres, url), peer, here, there }
    }
}

/// `lacre audit verify` over the daemon's Unix socket.
fn verify(daemon: &TestDaemon, more: &[&str]) -> Output {
    let addr = format!("unix://{}/here", daemon.dir().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
    let checkpoint = daemon.dir().join(format!("checkpoint{}", more.len()));
    command.args(["audit", "verify", "--addr", &addr, "--checkpoint"]).arg(checkpoint).args(more);
    command.output().unwrap()
}

/// As [`TestDaemon::finish`], which verifies the chain; that of one tenant among several has gaps.
async fn finish(mut stage: Stage, peer: Peer, tenants: &[Api]) {
    let mut lines = Vec::new();
    for api in tenants {
        lines.extend(api.audit_lines().await);
    }
    drop(peer);
    assert_eq!(stage.daemon.stop().await, Some(0));
    stage.daemon.scan(&lines);
}

#[tokio::test]
async fn a_tenant_neither_sees_nor_changes_what_is_another_s() {
    let Tenants { stage, peer, here, there } = Tenants::start().await;
    let value = stage.daemon.secret("ours");
    let ours = stored(&here, "same/name", &value).await;
    let theirs = stored(&there, "same/name", &stage.daemon.secret("theirs")).await;

    let list: Value = there.get("/v1/secrets").await.json().await.unwrap();
    let ids: Vec<_> = list["items"].as_array().unwrap().iter().map(|item| &item["id"]).collect();
    assert_eq!(ids, [theirs.as_str()]);
    let path = format!("/v1/secrets/{ours}");
    for (method, path) in [
        (Method::GET, path.clone()),
        (Method::GET, format!("{path}/value")),
        (Method::GET, format!("{path}/value?version=1")),
        (Method::GET, format!("{path}/versions")),
        (Method::DELETE, path.clone()),
    ] {
        problem(there.request(method, &path).send().await.unwrap(), 404, "not-found").await;
    }
    problem(there.replace(&ours, "taken over").await, 404, "not-found").await;
    for (from, url) in [(&here, peer.url.as_str()), (&there, stage.daemon.url.as_str())] {
        problem(from.at(url).get("/v1/secrets").await, 401, "invalid-token").await;
    }
    // What a caller keeps itself is bound to the tenant too.
    let body = json!({ "context": "c", "value": value });
    let sealed: Value = here.post("/v1/seal", &body).await.json().await.unwrap();
    let body = json!({ "context": "c", "sealed": sealed["sealed"] });
    assert_eq!(here.post("/v1/open", &body).await.status(), StatusCode::OK);
    problem(there.post("/v1/open", &body).await, 422, "does-not-open").await;

    problem(here.get("/v1/audit/events?tenants=all").await, 403, "insufficient-scope").await;
    let whole = verify(&stage.daemon, &["--all-tenants"]);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    assert_eq!(verify(&stage.daemon, &[]).status.code(), Some(2), "one tenant's records are no chain");

    let page = there.get("/v1/audit/events?limit=1000").await.text().await.unwrap();
    assert!(page.contains(&theirs) && !page.contains("\"tenant\":\"default\""), "{page}");
    assert_eq!(here.value(&ours).await, value);
    finish(stage, peer, &[here, there]).await;
}

#[tokio::test]
async fn rows_moved_between_tenants_do_not_open() {
    let Tenants { stage, peer, here, there } = Tenants::start().await;
    let value = stage.daemon.secret("the-same");
    let ids = [stored(&here, "same", &value).await, stored(&there, "same", &value).await];
    let rows = [columns(&stage, &ids[0], 1), columns(&stage, &ids[1], 1)];
    for (mine, other) in rows[0].iter().zip(&rows[1]) {
        assert_ne!(mine, other, "equal values look equal");
    }
    let both = [(&here, &ids[0]), (&there, &ids[1])];

    for subset in 1..16 {
        for (mine, id) in ids.iter().enumerate() {
            let from = |at: usize| if subset & (1 << at) == 0 { mine } else { 1 - mine };
            write(&stage, id, 1, &[0, 1, 2, 3].map(|at| rows[from(at)][at].clone()));
        }
        for (api, id) in both {
            let what = format!("subset {subset:04b}");
            refuses(api, &format!("/v1/secrets/{id}/value"), &stage.daemon.canary, &what).await;
        }
    }
    for (api, id) in both {
        let recorded = incidents(api).await;
        assert_eq!(recorded.len(), 15, "an incident for each read");
        assert!(recorded.iter().all(|record| record["object"]["id"] == id.as_str()));
    }
    for (mine, id) in ids.iter().enumerate() {
        write(&stage, id, 1, &rows[mine]);
        assert_eq!(both[mine].0.value(id).await, value, "put back");
    }
    // The whole row, as it stands, given to the other tenant.
    stage.run(&format!("UPDATE secrets SET name = 'moved' WHERE id = '{}'", ids[0]));
    for table in [
        "secrets SET tenant_id = 'other' WHERE id",
        "secret_versions SET tenant_id = 'other' WHERE secret_id",
    ] {
        stage.run(&format!("UPDATE {table} = '{}'", ids[0]));
    }
    problem(here.get(&format!("/v1/secrets/{}/value", ids[0])).await, 404, "not-found").await;
    refuses(&there, &format!("/v1/secrets/{}/value", ids[0]), &stage.daemon.canary, "a moved row").await;
    finish(stage, peer, &[here, there]).await;
}
