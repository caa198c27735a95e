//! RO-3: one token per 50 ms while the key rotates, with one daemon on SQLite and with two on PostgreSQL.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::{Api, Options, Peer, TestDaemon};
use crate::postgres::Postgres;
use crate::{Script, answer, app, count, hurry, idp, is_well, nothing_failed, rotate};

const AUDIENCE: &str = "https://api.example";
/// Seconds that a token lives.
const LIFETIME: u64 = 15;
const EVERY: Duration = Duration::from_millis(50);

/// How long, and how often another key comes.
struct Pace {
    whole: Duration,
    rotation: Duration,
}

const SHORT: Pace = Pace { whole: Duration::from_secs(60), rotation: Duration::from_secs(9) };
const SOAK: Pace = Pace { whole: Duration::from_secs(300), rotation: Duration::from_secs(20) };

/// Where tokens are signed and keys are published, in turns.
pub struct Place {
    pub daemon: TestDaemon,
    pub peer: Option<Peer>,
    issuer: String,
}

impl Place {
    async fn on_sqlite() -> Self {
        let daemon = TestDaemon::dev().await;
        let issuer = format!("{}/oidc", daemon.url);
        Self { daemon, peer: None, issuer }
    }

    pub async fn on_postgresql() -> Self {
        let config = format!(
            "data_dir = \"{{dir}}\"\n[server]\nlisten = \"127.0.0.1:{{port}}\"\n\
             [issuer]\nurl = \"http://127.0.0.1:{{port}}\"\n[seal.pkcs11]\nmodule = \"{{module}}\"\n\
             token = \"lacre-dev\"\npin_source = \"file:{{pin}}\"\n[keys]\npropagation = \"2s\"\nskew = \"1s\"\n\
             [database]\nurl = \"{}\"\n",
            Postgres::shared().database()
        );
        let daemon = TestDaemon::start(Options { config: Some(config.clone()), ..Options::default() }).await;
        let peer = Some(Peer::start(&daemon, &config));
        // The second one calls itself by the first one's address, as behind one name.
        let issuer = format!("{}/oidc", daemon.url);
        Self { daemon, peer, issuer }
    }

    /// The addresses: of one daemon, or of two.
    pub fn urls(&self) -> Vec<String> {
        let peer = self.peer.as_ref().map(|peer| peer.url.clone());
        std::iter::once(self.daemon.url.clone()).chain(peer).collect()
    }

    fn verifiers(&self) -> Vec<(&'static str, Script)> {
        let urls = self.urls();
        let arguments = |url: &String| {
            let jwks = format!("{url}/oidc/jwks");
            ["--jwks", &jwks, "--issuer", &self.issuer, "--audience", AUDIENCE].map(str::to_owned)
        };
        let mut jose = idp::node("live.mjs");
        jose.args(arguments(&urls[0]));
        let mut py_jwt = idp::python("live.py");
        py_jwt.args(arguments(urls.last().unwrap()));
        vec![("jose", Script::ready(jose)), ("PyJWT", Script::ready(py_jwt))]
    }
}

async fn token(api: &Api) -> String {
    let body = json!({ "claims": { "sub": "load", "aud": AUDIENCE }, "lifetime": LIFETIME });
    let made = answer(api, Method::POST, "/v1/jwt", &body, StatusCode::OK).await;
    made["token"].as_str().unwrap().to_owned()
}

/// Waits until a daemon says for how long its keys may be kept: a verifier that never keeps them shows nothing.
async fn keys_may_be_kept(url: &str, seconds: u64) {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = reqwest::get(format!("{url}/oidc/jwks")).await.unwrap();
        let said = answer.headers()["Cache-Control"].to_str().unwrap().to_owned();
        if said.contains(&format!("max-age={seconds}")) {
            return;
        }
        assert!(Instant::now() < until, "{url} says {said}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn every_token_is_good_for_its_whole_life(place: Place, pace: Pace) {
    let admin = place.daemon.api().await;
    hurry(&admin, 3).await;
    for url in place.urls() {
        keys_may_be_kept(&url, 3).await;
    }
    let policy = json!({ "jwt": { "types": ["JWT"], "max_lifetime": LIFETIME, "audiences": [AUDIENCE],
                                  "subjects": "any" } });
    let (client, secret) = app(&admin, policy).await;
    let first = place.daemon.api_of(&place.daemon.token_of(&client, &secret, "all").await);
    let apis: Vec<_> = place.urls().iter().map(|url| first.at(url)).collect();
    let admins: Vec<_> = place.urls().iter().map(|url| admin.at(url)).collect();
    let mut verifiers = place.verifiers();

    let begun = Instant::now();
    let (mut signed, mut rotations) = (0, 0);
    let mut clock = tokio::time::interval(EVERY);
    while begun.elapsed() < pace.whole {
        clock.tick().await;
        if begun.elapsed() >= pace.rotation * (rotations + 1) {
            // In turns at one daemon and at the other, and every third with another algorithm.
            let algorithm = ["ES256", "ES384", "EC"][rotations as usize % 3];
            rotate(&admins[rotations as usize % admins.len()], Some(algorithm)).await;
            rotations += 1;
        }
        let token = token(&apis[signed % apis.len()]).await;
        for (_, verifier) in &mut verifiers {
            verifier.line(&token);
        }
        signed += 1;
    }
    // Those that are alive now are verified to their end.
    tokio::time::sleep(Duration::from_secs(LIFETIME)).await;

    println!("{signed} tokens, {rotations} rotations");
    let reports: Vec<(_, Value)> = verifiers.into_iter().map(|(name, one)| (name, one.report())).collect();
    for (name, report) in &reports {
        nothing_failed(name, report);
        assert_eq!(count(report, "tokens"), signed, "{name}");
        assert!(count(report, "checks") > signed * 8, "{name} looked at each token every second");
        // The last ones may not have come to signing.
        assert!(count(report, "kids") + 1 >= rotations as usize, "{name} saw {} keys", report["kids"]);
    }
    // What a busy machine could do of one token per 50 ms; the check is about verification.
    assert!(signed > usize::try_from(pace.whole.as_secs()).unwrap() * 5, "only {signed} tokens");
    is_well(&place.daemon);
    let Place { daemon, peer, .. } = place;
    drop(peer);
    daemon.finish().await;
}

#[tokio::test]
async fn no_verifier_meets_an_unknown_key_with_one_daemon() {
    every_token_is_good_for_its_whole_life(Place::on_sqlite().await, SHORT).await;
}

#[tokio::test]
async fn no_verifier_meets_an_unknown_key_with_two_daemons() {
    every_token_is_good_for_its_whole_life(Place::on_postgresql().await, SHORT).await;
}

#[tokio::test]
#[ignore = "five minutes: make soak"]
async fn no_verifier_meets_an_unknown_key_in_five_minutes_with_one_daemon() {
    every_token_is_good_for_its_whole_life(Place::on_sqlite().await, SOAK).await;
}

#[tokio::test]
#[ignore = "five minutes: make soak"]
async fn no_verifier_meets_an_unknown_key_in_five_minutes_with_two_daemons() {
    every_token_is_good_for_its_whole_life(Place::on_postgresql().await, SOAK).await;
}
