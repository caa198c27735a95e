//! RO-5: the daemon dies at each write to its database and at each call of the device of a rotation, before the
//! effect and after it. Started again, one key signs, it verifies, and every object on the token has its row.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::sql_types::{BigInt, Text};
use reqwest::Method;
use serde_json::{Value, json};

use crate::daemon::{Api, Options, TestDaemon};
use crate::kill::strace;
use crate::model::{Died, config, connect};
use crate::shim::{ShimControl, shim_path};

/// A takeover two seconds after the rotation, so that a test can wait for it.
const QUICK: &str = r#"{ "skew": 0, "propagation": 2 }"#;
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = BigInt)]
    count: i64,
}

struct Stage {
    daemon: TestDaemon,
    /// The module itself: the daemon loads the shim around it.
    control: ShimControl,
    pin: String,
}

impl Stage {
    async fn start() -> Self {
        let daemon = TestDaemon::dev().await;
        let hsm = daemon.dev_json()["hsm"].clone();
        let module = hsm["module"].as_str().unwrap().to_owned();
        let pin = std::fs::read_to_string(hsm["pin_file"].as_str().unwrap()).unwrap();
        let api = daemon.api().await;
        let quick: Value = serde_json::from_str(QUICK).unwrap();
        let set =
            api.request(Method::PATCH, "/v1/signing-keys/jwt/policy").json(&quick).send().await.unwrap();
        assert_eq!(set.status(), 200);
        let mut stage =
            Self { daemon, control: ShimControl::new(module.as_ref()), pin: pin.trim().to_owned() };
        stage.daemon.stop().await;
        stage
    }

    /// The daemon drives the module in its own process, so that a call that kills one kills the other.
    fn options(&self, wrapper: &[String]) -> Options {
        let module = shim_path();
        let text = config("[sealer]\nmode = \"thread\"").replace("{module}", module.to_str().unwrap());
        let env = self.control.env().map(|(name, path)| (name.to_owned(), path.to_str().unwrap().to_owned()));
        Options { config: Some(text), wrapper: wrapper.to_vec(), env: env.to_vec() }
    }

    async fn run(&mut self, wrapper: &[String]) -> bool {
        self.daemon.set_options(self.options(wrapper));
        self.daemon.try_run().await
    }

    fn rows(&self) -> BTreeMap<String, i64> {
        let mut conn = SqliteConnection::establish(self.daemon.database().to_str().unwrap()).unwrap();
        diesel::sql_query("PRAGMA busy_timeout = 5000").execute(&mut conn).unwrap();
        let query = "SELECT purpose || ' ' || state AS name, count(*) AS count FROM signing_keys GROUP BY 1";
        let rows: Vec<Count> = diesel::sql_query(query).load(&mut conn).unwrap();
        rows.into_iter().map(|row| (row.name, row.count)).collect()
    }

    /// Key objects on the token.
    fn objects(&self) -> i64 {
        let mut command = Command::new("pkcs11-tool");
        let module = self.daemon.dev_json()["hsm"]["module"].as_str().unwrap().to_owned();
        let conf = self.daemon.dir().canonicalize().unwrap().join("softhsm2.conf");
        command.env("SOFTHSM2_CONF", conf).args(["--module", &module]);
        command.args(["--token-label", "lacre-dev", "--login", "--pin", &self.pin, "--list-objects"]);
        let output = command.output().expect("pkcs11-tool is installed");
        i64::try_from(String::from_utf8_lossy(&output.stdout).matches(" Object; ").count()).unwrap()
    }

    /// Key objects that the rows say are there: two halves of a signing key, one secret of the others, a KEK.
    fn expected(&self) -> i64 {
        let rows = self.rows();
        let count = |name: &str| rows.get(name).copied().unwrap_or(0);
        let live = |purpose: &str| -> i64 {
            ["next", "current", "previous"].map(|state| count(&format!("{purpose} {state}"))).iter().sum()
        };
        2 * live("jwt") + live("cookie") + count("client-secret active") + count("request-body active") + 1
    }

    /// Started again it works, and comes to rest: nothing planned, nothing half gone, no object without a row.
    async fn converges(&mut self, what: &str) {
        self.daemon.kill();
        self.control.set_rules("");
        assert!(self.run(&[]).await, "{what}: it does not start again:\n{}", self.daemon.log());
        let api = self.daemon.api().await;
        let until = Instant::now() + PATIENCE;
        loop {
            let rows = self.rows();
            let is_at_rest =
                !rows.keys().any(|name| name.ends_with(" planned") || name.ends_with(" retired"));
            if is_at_rest && self.objects() == self.expected() {
                break;
            }
            let objects = (self.objects(), self.expected());
            assert!(Instant::now() < until, "{what}: {rows:?}, objects and expected {objects:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(self.rows().get("jwt current"), Some(&1), "{what}: one key signs");
        // A token that is signed now is in the JWKS now, and the daemon takes it.
        let again = self.daemon.api().await;
        let keys = jwks(&again).await;
        let header = again.token.split('.').next().unwrap().to_owned();
        let header = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, header).unwrap();
        let header: Value = serde_json::from_slice(&header).unwrap();
        assert!(
            keys.contains(&header["kid"].as_str().unwrap().to_owned()),
            "{what}: {header} not in {keys:?}"
        );
        assert_eq!(api.get("/v1/status").await.status(), 200, "{what}: a token from before is not taken");
        self.daemon.kill();
    }
}

async fn jwks(api: &Api) -> Vec<String> {
    let document: Value = api.get("/oidc/jwks").await.json().await.unwrap();
    let keys = document["keys"].as_array().unwrap();
    keys.iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

async fn call(api: &Api, path: &str, body: Value) -> Result<(), Died> {
    let answer = api.request(Method::POST, path).json(&body).send().await.map_err(|_| Died)?;
    // A refusal is an answer: what a killed one left behind may stand in the way.
    answer.bytes().await.map(|_| ()).map_err(|_| Died)
}

/// Everything that a rotation asks of the device: a key is made, and one is destroyed.
async fn made_and_destroyed(stage: &Stage, api: &Api) -> Result<(), Died> {
    call(api, "/v1/signing-keys/jwt/rotate", json!({ "grace": 600 })).await?;
    call(api, "/v1/signing-keys/jwt/cancel", json!({})).await?;
    let until = Instant::now() + Duration::from_secs(4);
    while stage.rows().contains_key("jwt retired") && Instant::now() < until {
        api.request(Method::GET, "/livez").send().await.map_err(|_| Died)?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    api.request(Method::GET, "/livez").send().await.map_err(|_| Died)?;
    Ok(())
}

/// Everything that a rotation writes: a key is planned, made, published, and takes over.
async fn taken_over(stage: &Stage) -> Result<(), Died> {
    let api = connect(&stage.daemon).await?;
    call(&api, "/v1/signing-keys/jwt/rotate", json!({})).await?;
    let until = Instant::now() + Duration::from_secs(5);
    while stage.rows().contains_key("jwt next") && Instant::now() < until {
        api.request(Method::GET, "/livez").send().await.map_err(|_| Died)?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// How often each function of the device is called in a rotation.
async fn device_calls(stage: &mut Stage) -> Vec<(String, u64)> {
    assert!(stage.run(&[]).await, "{}", stage.daemon.log());
    let (api, before) = (stage.daemon.api().await, stage.control.counts());
    assert!(made_and_destroyed(stage, &api).await.is_ok(), "it works when nothing is done to it");
    let after = stage.control.counts();
    stage.converges("undisturbed").await;
    let delta = |(name, count): (String, u64)| {
        let called = count - before.get(&name).copied().unwrap_or(0);
        (name.starts_with("C_") && called > 0).then_some((name, called))
    };
    let calls: Vec<_> = after.into_iter().filter_map(delta).collect();
    println!("calls of a rotation: {calls:?}");
    let of = |wanted: &str| calls.iter().any(|(name, _)| name == wanted);
    assert!(of("C_GenerateKeyPair") && of("C_DestroyObject"), "{calls:?}");
    calls
}

async fn dies_in_the_device(keep: impl Fn(usize) -> bool) {
    let mut stage = Stage::start().await;
    let calls = device_calls(&mut stage).await;
    let points = calls.iter().flat_map(|(name, count)| (1..=*count).map(move |when| (name, when)));
    let points: Vec<_> =
        points.flat_map(|(name, when)| ["abort", "abort-after"].map(|how| (name, when, how))).collect();
    let (mut died, mut tried) = (0, 0);
    for (number, (name, when, how)) in points.iter().enumerate() {
        if !keep(number) && *name != "C_GenerateKeyPair" && *name != "C_DestroyObject" {
            continue;
        }
        assert!(stage.run(&[]).await, "{}", stage.daemon.log());
        let (api, rule) = (stage.daemon.api().await, format!("{name} {when} {how}"));
        stage.control.set_rules(&rule);
        tried += 1;
        died += usize::from(made_and_destroyed(&stage, &api).await.is_err());
        stage.converges(&rule).await;
    }
    println!("died {died} times of {tried}");
    // Calls that the daemon makes each second by itself come sooner or later.
    assert!(died * 10 >= tried * 8, "died {died} times of {tried} only");
    stage.daemon.finish().await;
}

#[tokio::test]
async fn a_rotation_that_died_in_the_device_is_finished_by_the_next_start() {
    dies_in_the_device(|number| number % 12 == 0).await;
}

#[tokio::test]
#[ignore = "many minutes: make soak"]
async fn a_rotation_that_died_at_any_call_of_the_device_is_finished_by_the_next_start() {
    dies_in_the_device(|_| true).await;
}

async fn dies_at_a_write(stride: usize) {
    let mut stage = Stage::start().await;
    let (mut killed, mut whole) = (0, 0);
    for call in ["pwrite64", "fsync"] {
        // The first ones are the start's; how many there are is seen when it is not killed any more.
        let (mut when, mut alive) = (1, 0);
        while alive < 2 && when < 400 {
            let words = strace(&stage.daemon, &format!("inject={call}:signal=SIGKILL:when={when}"));
            let died = !stage.run(&words).await || taken_over(&stage).await.is_err();
            let what = format!("killed at {call} {when}");
            stage.converges(&what).await;
            (killed, whole) = (killed + usize::from(died), whole + usize::from(!died));
            alive = if died { 0 } else { alive + 1 };
            when += if call == "fsync" { stride.div_ceil(3) } else { stride };
        }
    }
    println!("killed {killed} times, not killed {whole} times");
    assert!(killed >= 10, "killed {killed} times only");
    stage.daemon.finish().await;
}

#[tokio::test]
async fn a_rotation_killed_at_a_write_is_finished_by_the_next_start() {
    dies_at_a_write(11).await;
}

#[tokio::test]
#[ignore = "many minutes: make soak"]
async fn a_rotation_killed_at_any_write_is_finished_by_the_next_start() {
    dies_at_a_write(1).await;
}
