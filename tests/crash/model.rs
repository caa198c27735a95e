//! What a client knows of its secrets, and the assertions that close every fault (C1 to C5).

use std::collections::BTreeMap;

use diesel::prelude::*;
use diesel::sql_types::Text;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, Options, TestDaemon, verify_chain};

/// The states that a secret may be in: one after an acknowledgement, two while an answer is missing.
/// `None` is "not there".
type Possible = Vec<Option<String>>;

/// A client's knowledge.
#[derive(Default)]
pub struct Model {
    secrets: BTreeMap<String, Possible>,
    /// Values that were answered with 200.
    released: u64,
    /// Reads whose answer never came.
    cut: u64,
}

/// The daemon died under a request.
pub struct Died;

/// One request of the scenario.
#[derive(Clone, Copy)]
pub enum Step {
    Create(&'static str),
    Replace(&'static str),
    Read(&'static str),
    Delete(&'static str),
    Rotate,
    Rewrap,
}

/// Twenty steps that write in every way there is.
pub const SCENARIO: [Step; 20] = [
    Step::Create("a"),
    Step::Create("b"),
    Step::Read("a"),
    Step::Replace("a"),
    Step::Read("a"),
    Step::Rotate,
    Step::Create("c"),
    Step::Read("b"),
    Step::Rewrap,
    Step::Replace("b"),
    Step::Read("b"),
    Step::Delete("a"),
    Step::Create("d"),
    Step::Read("c"),
    Step::Replace("d"),
    Step::Delete("c"),
    Step::Read("d"),
    Step::Delete("b"),
    Step::Read("d"),
    Step::Delete("d"),
];

/// The configuration that these tests share: on one port, so that tokens stay valid over restarts.
pub fn config(more: &str) -> String {
    format!(
        "data_dir = \"{{dir}}\"\n[server]\nlisten = \"127.0.0.1:{{port}}\"\n{more}\n\
         [seal.pkcs11]\nmodule = \"{{module}}\"\ntoken = \"lacre-dev\"\npin_source = \"file:{{pin}}\"\n"
    )
}

/// `lacre serve` with [`config`], behind `wrapper`.
pub fn serve(wrapper: &[String]) -> Options {
    Options { config: Some(config("")), wrapper: wrapper.to_vec(), ..Options::default() }
}

impl Model {
    /// Runs the scenario; how many steps were answered, and whether the daemon died.
    pub async fn run(&mut self, daemon: &TestDaemon, round: u64) -> Result<(), Died> {
        let api = connect(daemon).await?;
        for (number, step) in SCENARIO.into_iter().enumerate() {
            let value = daemon.secret(&format!("{round}-{number}"));
            self.step(&api, step, &value).await?;
        }
        Ok(())
    }

    /// One step. A refusal (503) leaves everything as it was.
    pub async fn step(&mut self, api: &Api, step: Step, value: &str) -> Result<(), Died> {
        match step {
            Step::Create(name) => self.create(api, name, value).await,
            Step::Replace(name) => self.replace(api, name, value).await,
            Step::Read(name) => self.read(api, name).await,
            Step::Delete(name) => self.delete(api, name).await,
            Step::Rotate => self.plain(api, "/v1/keks/rotate").await,
            Step::Rewrap => self.plain(api, "/v1/keks/rewrap").await,
        }
    }

    async fn plain(&mut self, api: &Api, path: &str) -> Result<(), Died> {
        send(api.request(Method::POST, path).json(&json!({}))).await.map(drop)
    }

    async fn create(&mut self, api: &Api, name: &str, value: &str) -> Result<(), Died> {
        if self.known(name).is_some() {
            return Ok(());
        }
        let body = json!({ "name": name, "kind": "opaque", "value": value });
        let request = api.request(Method::POST, "/v1/secrets").json(&body);
        self.change(name, Some(value), request, StatusCode::CREATED).await
    }

    async fn replace(&mut self, api: &Api, name: &str, value: &str) -> Result<(), Died> {
        let Some(id) = self.find(api, name).await? else { return Ok(()) };
        let request = api.request(Method::PUT, &format!("/v1/secrets/{id}/value")).header("If-Match", "*");
        self.change(name, Some(value), request.json(&json!({ "value": value })), StatusCode::OK).await
    }

    async fn delete(&mut self, api: &Api, name: &str) -> Result<(), Died> {
        let Some(id) = self.find(api, name).await? else { return Ok(()) };
        let request = api.request(Method::DELETE, &format!("/v1/secrets/{id}"));
        self.change(name, None, request, StatusCode::NO_CONTENT).await
    }

    async fn read(&mut self, api: &Api, name: &str) -> Result<(), Died> {
        let Some(id) = self.find(api, name).await? else { return Ok(()) };
        let Ok(answer) = send(api.request(Method::GET, &format!("/v1/secrets/{id}/value"))).await else {
            self.cut += 1;
            return Err(Died);
        };
        if answer.status() != StatusCode::OK {
            return Ok(());
        }
        let Ok(body) = answer.json::<Value>().await else {
            self.cut += 1;
            return Err(Died);
        };
        self.released += 1;
        assert_eq!(body["value"].as_str(), self.known(name).as_deref(), "{name} reads wrongly");
        Ok(())
    }

    /// Sends a change. Acknowledged: that is what is there. Refused: nothing happened. No answer: either.
    async fn change(
        &mut self,
        name: &str,
        to: Option<&str>,
        request: RequestBuilder,
        done: StatusCode,
    ) -> Result<(), Died> {
        let (before, after) = (self.known(name), to.map(str::to_owned));
        self.secrets.insert(name.to_owned(), vec![before.clone(), after.clone()]);
        let answer = send(request).await?;
        let now = match answer.status() {
            status if status == done => vec![after],
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::INSUFFICIENT_STORAGE => vec![before],
            // "Outcome unknown" is said so, and means what it says.
            StatusCode::INTERNAL_SERVER_ERROR => vec![before, after],
            other => panic!("{name}: {other} {}", answer.text().await.unwrap_or_default()),
        };
        self.secrets.insert(name.to_owned(), now);
        Ok(())
    }

    fn known(&self, name: &str) -> Option<String> {
        match self.secrets.get(name).map(Vec::as_slice) {
            None => None,
            Some([one]) => one.clone(),
            Some(several) => panic!("{name} is in doubt: {} states", several.len()),
        }
    }

    async fn find(&self, api: &Api, name: &str) -> Result<Option<String>, Died> {
        let answer = send(api.request(Method::GET, &format!("/v1/secrets?name={name}"))).await?;
        let body: Value = answer.json().await.map_err(|_| Died)?;
        Ok(body["items"][0]["id"].as_str().map(str::to_owned))
    }

    /// Starts the daemon undisturbed, checks what it serves, kills it, and checks its files.
    pub async fn check_restarted(&mut self, daemon: &mut TestDaemon) {
        daemon.set_options(serve(&[]));
        daemon.run().await;
        self.check(daemon).await;
        daemon.kill();
        integrity(daemon);
    }

    /// C1 and C2: what is there is what was acknowledged, or one of the two sides of a missing answer.
    /// C3: the chain holds, every intent has one outcome, and no value left without a record. C5: it
    /// answers. The daemon must be ready.
    pub async fn check(&mut self, daemon: &TestDaemon) {
        let api = daemon.api().await;
        for (name, possible) in std::mem::take(&mut self.secrets) {
            let now = match self.find(&api, &name).await.ok().expect("it answers") {
                None => None,
                Some(id) => {
                    self.released += 1;
                    Some(api.value(&id).await)
                }
            };
            assert!(possible.contains(&now), "{name}: one of {} states expected", possible.len());
            self.secrets.insert(name, vec![now]);
        }
        let lines = api.audit_lines().await;
        verify_chain(&lines);
        self.releases_are_recorded(&lines);
    }

    fn releases_are_recorded(&self, lines: &[String]) {
        let (mut intents, mut outcomes) = (BTreeMap::new(), BTreeMap::new());
        for line in lines {
            let record: Value = serde_json::from_str(line).unwrap();
            let id = record["id"].as_str().unwrap().to_owned();
            match record["type"].as_str().unwrap() {
                "intent" => assert!(intents.insert(id, record).is_none(), "an intent twice"),
                "outcome" => assert!(outcomes.insert(id, record).is_none(), "an outcome twice"),
                _ => {}
            }
        }
        let of = |result: &str| {
            let reveals = outcomes.values().filter(|record| record["action"] == "secret.reveal");
            reveals.filter(|record| record["outcome"]["result"] == result).count() as u64
        };
        let open = intents.keys().filter(|id| !outcomes.contains_key(*id)).count();
        // The last request's outcome may still be on its way.
        assert!(open <= 1, "{open} intents without outcome");
        let (success, unknown) = (of("success"), of("unknown") + open as u64);
        assert!(success + unknown >= self.released, "{} released, {success} recorded", self.released);
        assert!(success <= self.released + self.cut, "{success} recorded, {} released", self.released);
    }
}

/// A session, if the daemon lives.
pub async fn connect(daemon: &TestDaemon) -> Result<Api, Died> {
    let dev = daemon.dev_json();
    let app = &dev["management"];
    let request = daemon
        .anonymous(Method::POST, "/oidc/token")
        .basic_auth(app["client_id"].as_str().unwrap(), app["client_secret"].as_str())
        .form(&[("grant_type", "client_credentials")]);
    let body: Value = send(request).await?.json().await.map_err(|_| Died)?;
    let token = body["access_token"].as_str().ok_or(Died)?;
    Ok(daemon.api_of(token))
}

/// Sends a request; an answer that does not come means that the daemon died.
pub async fn send(request: RequestBuilder) -> Result<Response, Died> {
    request.send().await.map_err(|_| Died)
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = Text)]
    integrity_check: String,
}

/// SQLite's own check of the file.
pub fn integrity(daemon: &TestDaemon) {
    let mut conn = SqliteConnection::establish(daemon.database().to_str().unwrap()).unwrap();
    let lines: Vec<Line> = diesel::sql_query("PRAGMA integrity_check").load(&mut conn).unwrap();
    let lines: Vec<_> = lines.into_iter().map(|line| line.integrity_check).collect();
    assert_eq!(lines, ["ok"]);
}
