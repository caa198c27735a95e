//! Signatures per second over HTTP for each algorithm, beside the device's own rate in the same run; and the JWKS.
//!
//! `cargo bench --bench signing [-- --seconds N]`. One signature per request at 64 connections, and batches of 100
//! at 4. The daemon is `lacre serve` on SQLite with its audit log durable as always, on SoftHSM. The device's own
//! rate: one thread, one session, a cached handle, one init and one call. Client, daemon and soft token share the
//! machine, and the daemon verifies each signature before it leaves: on a soft token that costs about as much as
//! the signature itself, on a real device it happens while the device works on the next one. So the second table has
//! a device that takes 5 ms for each call, on eight sessions, as in `latency.rs`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a bench prints and fails by panicking"
)]

use std::time::{Duration, Instant};

use cryptoki_sys::{
    CK_FALSE, CK_OBJECT_HANDLE, CK_TRUE, CKA_CLASS, CKA_KEY_TYPE, CKA_SIGN, CKA_TOKEN, CKA_VALUE_LEN,
    CKK_GENERIC_SECRET, CKM_ECDSA, CKM_GENERIC_SECRET_KEY_GEN, CKM_RSA_PKCS, CKM_SHA256_HMAC, CKO_SECRET_KEY,
};
use serde_json::{Value, json};

#[path = "daemon/installation.rs"]
mod installation;
#[path = "daemon/load.rs"]
mod load;
#[path = "../tests/support/raw.rs"]
mod raw;
#[path = "../tests/support/shim.rs"]
mod shim;
#[path = "../tests/support/softhsm.rs"]
mod softhsm;
mod support;

use installation::{Between, Daemon, Installation};
use load::{End, Load};
use raw::{Module, PSS_SHA256, Session, attribute, pss_sha256};
use softhsm::SoftHsm;
use support::{Flags, print_table, rate};

const CONNECTIONS: usize = 64;
const BATCH: usize = 100;
/// Each with many signatures under way.
const BATCH_CONNECTIONS: usize = 4;
/// The object identifiers of the curves, DER.
const P256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: [u8; 7] = [0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
/// `DigestInfo` with SHA-256 and a hash.
const DIGEST_INFO: usize = 51;

/// What is measured: the policy's member and value, the algorithm, and the key of the bare device.
const KINDS: [(&str, u16, &str); 6] = [
    ("ES256", 3072, "ES256"),
    ("ES384", 3072, "ES384"),
    ("RS256 2048", 2048, "RS256"),
    ("RS256 3072", 3072, "RS256"),
    ("RS256 4096", 4096, "RS256"),
    ("PS256 2048", 2048, "PS256"),
];

/// A token of the bench's own, logged in.
struct Bare(Session);

impl Bare {
    fn new() -> Self {
        let token = SoftHsm::in_process("bare");
        let module = Module::load(&token.module);
        let session = module.session(module.slot("bare").unwrap()).unwrap();
        session.login(&token.pin).unwrap();
        Self(session)
    }

    fn rate(&self, bits: u16, alg: &str, time: Duration) -> f64 {
        let (session, mut out) = (&self.0, [0; 512]);
        match alg {
            "ES256" => self.plain(CKM_ECDSA, session.generate_ec(&P256).unwrap(), 32, time),
            "ES384" => self.plain(CKM_ECDSA, session.generate_ec(&P384).unwrap(), 48, time),
            "RS256" => {
                self.plain(CKM_RSA_PKCS, session.generate_rsa(bits.into()).unwrap(), DIGEST_INFO, time)
            }
            _ => {
                let key = session.generate_rsa(bits.into()).unwrap();
                per_second(time, || {
                    let mut params = PSS_SHA256;
                    session.sign_with(pss_sha256(&raw mut params), key, &[7; 32], &mut out).unwrap();
                })
            }
        }
    }

    fn plain(&self, mechanism: u64, key: CK_OBJECT_HANDLE, len: usize, time: Duration) -> f64 {
        let (data, mut out) = (vec![7; len], [0; 512]);
        per_second(time, || {
            self.0.sign(mechanism, key, &data, &mut out).unwrap();
        })
    }

    fn hmac(&self, time: Duration) -> f64 {
        let (yes, no, len) = ([CK_TRUE], [CK_FALSE], 32_u64.to_ne_bytes());
        let (class, generic) = (CKO_SECRET_KEY.to_ne_bytes(), CKK_GENERIC_SECRET.to_ne_bytes());
        let template = [
            attribute(CKA_CLASS, &class),
            attribute(CKA_TOKEN, &no),
            attribute(CKA_VALUE_LEN, &len),
            attribute(CKA_KEY_TYPE, &generic),
            attribute(CKA_SIGN, &yes),
        ];
        let key = self.0.generate(CKM_GENERIC_SECRET_KEY_GEN, &template).unwrap();
        self.plain(CKM_SHA256_HMAC, key, 60, time)
    }
}

fn per_second(time: Duration, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut done = 0_u32;
    while start.elapsed() < time {
        for _ in 0..8 {
            work();
        }
        done += 8;
    }
    f64::from(done) / start.elapsed().as_secs_f64()
}

/// Requests of an application that may sign.
struct Client<'a> {
    daemon: &'a Daemon,
    admin: String,
    signer: String,
    time: Duration,
}

impl<'a> Client<'a> {
    async fn new(daemon: &'a Daemon, time: Duration) -> Self {
        let admin = daemon.bearer().await;
        let policy = json!({
            "jwt": { "types": ["JWT"], "max_lifetime": 3600, "audiences": ["https://api.bench"], "subjects": "any" },
            "cookies": { "names": ["sid"], "max_age": 3600 },
        });
        let body = json!({ "name": "bench", "scopes": ["tokens:sign", "cookies:sign"], "signing": policy });
        let made = ask(daemon, &admin, "POST", "/v1/apps", &body).await;
        let text = |member: &str| made[member].as_str().unwrap().to_owned();
        let signer = daemon.bearer_of(&text("client_id"), &text("client_secret")).await;
        Self { daemon, admin, signer, time }
    }

    /// Lets a key of that kind sign.
    async fn rotate(&self, bits: u16, alg: &str) {
        let quick = json!({ "skew": 0, "propagation": 2, "rsa_bits": bits });
        ask(self.daemon, &self.admin, "PATCH", "/v1/signing-keys/jwt/policy", &quick).await;
        ask(self.daemon, &self.admin, "POST", "/v1/signing-keys/jwt/rotate", &json!({ "algorithm": alg }))
            .await;
        for _ in 0..100 {
            let current =
                ask(self.daemon, &self.signer, "GET", "/v1/signing-keys/current", &Value::Null).await;
            let len = current["jwk"]["n"].as_str().map_or(0, |n| n.len() * 6 / 8 * 8);
            if current["alg"] == alg && (len == 0 || len.abs_diff(bits.into()) < 32) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the new key does not sign");
    }

    async fn run(&self, connections: usize, path: &'static str, body: Value) -> Load {
        let request =
            load::request("POST", path, &self.signer, Some(("application/json", &body.to_string())));
        let end = End::After(self.time);
        load::run(self.daemon.address, connections, end, move |_| request.clone()).await
    }

    /// One per request, and batches: the signatures per second.
    async fn both(&self, path: &'static str, item: Value) -> (Load, Load) {
        let one = self.run(CONNECTIONS, path, item.clone()).await;
        let items = vec![item; BATCH];
        let batch = self.run(BATCH_CONNECTIONS, path, json!({ "items": items })).await;
        (one, batch)
    }
}

async fn ask(daemon: &Daemon, bearer: &str, method: &str, path: &str, body: &Value) -> Value {
    let text = body.to_string();
    let body = (!body.is_null()).then_some(("application/json", text.as_str()));
    let reply = load::ask(daemon.address, &load::request(method, path, bearer, body)).await.unwrap();
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    assert!((200..300).contains(&reply.status), "{method} {path}: {} {text}", reply.status);
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

#[expect(clippy::cast_precision_loss, reason = "a hundred")]
fn row(what: &str, device: f64, (one, batch): &(Load, Load)) -> Vec<String> {
    let batched = batch.per_second() * BATCH as f64;
    vec![
        what.to_owned(),
        rate(device),
        rate(one.per_second()),
        support::percent(one.per_second(), device),
        support::millis(one.percentile(99)),
        rate(batched),
        support::percent(batched, device),
        format!("{}, {}", one.refusals(), batch.refusals()),
    ]
}

fn main() {
    // First of all: it sets SOFTHSM2_CONF for the bare device, and that needs a process without threads.
    let bare = Bare::new();
    let time = Duration::from_secs(Flags::of_process().number("--seconds", 8));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let installation = Installation::new(None);
        let daemon = installation.start();
        let client = Client::new(&daemon, time).await;
        let mut rows = Vec::new();
        let claims = json!({ "sub": "bench-user", "aud": "https://api.bench", "scope": "read write" });
        let token = json!({ "claims": claims, "type": "JWT", "lifetime": 300 });
        for (what, bits, alg) in KINDS {
            client.rotate(bits, alg).await;
            let device = bare.rate(bits, alg, Duration::from_secs(2));
            rows.push(row(what, device, &client.both("/v1/jwt", token.clone()).await));
        }
        let device = bare.hmac(Duration::from_secs(2));
        let cookie =
            json!({ "name": "sid", "value": "5b1c8d8e-3a53-4c1e-9d7c-5d1f6f3e2a10", "max_age": 3600 });
        rows.push(row("cookie (HMAC)", device, &client.both("/v1/cookies/sign", cookie).await));
        let head = [
            "algorithm",
            "device only",
            "single",
            "of device",
            "p99",
            "in batches of 100",
            "of device",
            "refused",
        ];
        print_table("Signatures per second, SQLite, audit durable, 64 connections", &head, &rows);

        let jwks = load::request("GET", "/oidc/jwks", "-", None);
        let load = load::run(daemon.address, CONNECTIONS, End::After(time), move |_| jwks.clone()).await;
        let rows = [vec![rate(load.per_second()), support::millis(load.percentile(99)), load.refusals()]];
        print_table("JWKS with seven keys, 64 connections", &["per second", "p99", "refused"], &rows);
        daemon.stop();
        over_latency(&bare, time, &token).await;
    });
}

/// A device that takes its time. Its limit: eight sessions, two calls of 5 ms each, and its own work.
async fn over_latency(bare: &Bare, time: Duration, token: &Value) {
    let control = shim::ShimControl::new(&softhsm::module());
    let env = control.env().map(|(name, path)| (name, path.to_owned())).to_vec();
    let seal = "fast_threads = 8\nslow_threads = 1\ndeadline = \"5s\"";
    let installation = Installation::over(None, Between { module: Some(shim::shim_path()), env, seal });
    let daemon = installation.start();
    let client = Client::new(&daemon, time).await;
    // Every session finds its keys.
    let warm = Client { time: Duration::from_millis(500), ..Client::new(&daemon, time).await };
    warm.both("/v1/jwt", token.clone()).await;
    control.set_rules("C_SignInit * sleep:5\nC_Sign * sleep:5\n");
    let limit = |own: f64| 8.0 / (0.010 + 1.0 / own);
    let es256 = limit(bare.rate(3072, "ES256", Duration::from_secs(1)));
    let mut rows = vec![row("ES256", es256, &client.both("/v1/jwt", token.clone()).await)];
    let hmac = limit(bare.hmac(Duration::from_secs(1)));
    let cookie = json!({ "name": "sid", "value": "5b1c8d8e-3a53-4c1e-9d7c-5d1f6f3e2a10", "max_age": 3600 });
    rows.push(row("cookie (HMAC)", hmac, &client.both("/v1/cookies/sign", cookie).await));
    let head = [
        "algorithm",
        "device's limit",
        "single",
        "of limit",
        "p99",
        "in batches of 100",
        "of limit",
        "refused",
    ];
    print_table("A device of 5 ms per call with eight sessions, 64 connections", &head, &rows);
    daemon.stop();
}
