//! A device that takes its time, as a network HSM does: what share of its limit is reached, and whether
//! foreground work feels background work.
//!
//! `cargo bench --bench latency [-- --seconds N --millis N]`. The shim of `tests/backend/shim` lets each of
//! the six calls that operations are made of wait 5 ms, and eight sessions are used. The limit is eight
//! divided by the time that one operation takes on one session: its calls times the delay and the device's
//! own work, measured in the same run without Lacre. First `seal` in this process, then the daemon over HTTP.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    dead_code,
    reason = "a bench prints and fails by panicking"
)]
#![expect(unsafe_code, reason = "the environment is set once, before there are threads")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Alg, Arena, Context, Device, DeviceConfig, DeviceState, Kek, KekId, KeyRef, KeySpec, Sealed,
};

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
use load::Load;
use shim::ShimControl;
use support::{Flags, millis, percent, print_table, rate};

const LABEL: &str = "lacre-latency";
const SESSIONS: u32 = 8;
const IN_FLIGHT: usize = 64;
const SLOW: [&str; 6] = ["C_SignInit", "C_Sign", "C_DecryptInit", "C_Decrypt", "C_EncryptInit", "C_Encrypt"];
const MESSAGE: &[u8] = &[b'm'; 300];
const PLACE: Context<'static> = Context { tenant: "bench", kind: "secret", record: "r", version: 1 };

fn main() {
    // Before any thread: SoftHSM and the shim read their environment once.
    let token = softhsm::SoftHsm::in_process(LABEL);
    let control = ShimControl::new(&token.module);
    for (name, value) in control.env() {
        // SAFETY: this process has one thread yet.
        unsafe { std::env::set_var(name, value) };
    }
    let flags = Flags::of_process();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let limits = runtime.block_on(in_process(&flags, &control));
    drop(runtime);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, over_http(&flags, limits));
}

fn delays(flags: &Flags) -> String {
    let delay = flags.number("--millis", 5);
    let rules: Vec<_> = SLOW.iter().map(|function| format!("{function} * sleep:{delay}\n")).collect();
    rules.concat()
}

/// The started device and its keys.
struct Stage {
    device: Device,
    ec: KeyRef,
    kek: Kek,
    other: Kek,
    sealed: Sealed,
}

impl Stage {
    async fn new() -> Self {
        let dir = &softhsm::SoftHsm::in_process(LABEL).dir;
        let config = serde_json::json!({
            "pkcs11": {
                "module": shim::shim_path(),
                "token": LABEL,
                "pin_source": format!("file:{}", dir.join("pin").display()),
            },
            "latch_dir": dir.join("latch"),
            "fast_threads": SESSIONS,
            "slow_threads": 1,
            "deadline": "5s",
        });
        let config: DeviceConfig = serde_json::from_value(config).unwrap();
        let arena = Arena::new(&Options { allow_unlocked: true, slots: 512, ..Options::default() }).unwrap();
        let device = lacre::seal::start(&config, &arena).unwrap();
        assert_eq!(device.status().state, DeviceState::Ready);
        let make = async |spec| device.admin.generate(&KeyRef::plan(spec).unwrap()).await.unwrap();
        let kek = async || Kek { id: KekId::generate().unwrap(), version: 1, key: make(KeySpec::Kek).await };
        let (ec, kek, other) = (make(KeySpec::EcP256).await, kek().await, kek().await);
        let sealed = device.sealer.seal(&kek, &PLACE, &[7; 32]).await.unwrap();
        Self { device, ec, kek, other, sealed }
    }

    async fn run(&self, operation: Operation) {
        match operation {
            Operation::Sign => {
                self.device.sealer.sign(&self.ec, Alg::Es256, MESSAGE).await.unwrap();
            }
            Operation::Open => {
                self.device.sealer.open(&self.kek, &PLACE, &self.sealed).await.unwrap();
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Operation {
    Sign,
    Open,
}

/// Rate and latencies of `tasks` tasks that do the operation again and again.
async fn burst(
    stage: &Arc<Stage>,
    operation: Operation,
    tasks: usize,
    time: Duration,
) -> (f64, Vec<Duration>) {
    let start = Instant::now();
    let running: Vec<_> = (0..tasks)
        .map(|_| {
            let stage = Arc::clone(stage);
            tokio::spawn(async move {
                let mut took = Vec::new();
                while start.elapsed() < time {
                    let began = Instant::now();
                    stage.run(operation).await;
                    took.push(began.elapsed());
                }
                took
            })
        })
        .collect();
    let mut took = Vec::new();
    for task in running {
        took.extend(task.await.unwrap());
    }
    let elapsed = start.elapsed();
    took.sort_unstable();
    let done = u32::try_from(took.len()).unwrap();
    (f64::from(done) / elapsed.as_secs_f64(), took)
}

fn at(took: &[Duration], percent: usize) -> Duration {
    took[(took.len() * percent / 100).min(took.len() - 1)]
}

/// Operations per second on one session, without Lacre.
fn bare_rate(stage: &Stage, operation: Operation, time: Duration) -> f64 {
    let module = raw::Module::load(&shim::shim_path());
    let session = module.session(module.slot(LABEL).unwrap()).unwrap();
    let ec = session.find(cryptoki_sys::CKO_PRIVATE_KEY, stage.ec.id().as_bytes()).unwrap();
    let kek = session.find(cryptoki_sys::CKO_SECRET_KEY, stage.kek.key.id().as_bytes()).unwrap();
    let (aad, mut iv) = (PLACE.wrap_aad(&stage.kek), [9; 12]);
    let wrapped = session.gcm_seal(kek, &mut iv, &aad, &[7; 32]).unwrap();
    let (start, mut done, mut out) = (Instant::now(), 0_u32, [0; 64]);
    while start.elapsed() < time {
        match operation {
            Operation::Sign => session.sign(cryptoki_sys::CKM_ECDSA, ec, &MESSAGE[..32], &mut out).unwrap(),
            Operation::Open => session.gcm_open(kek, &iv, &aad, &wrapped, &mut out).unwrap(),
        };
        done += 1;
    }
    f64::from(done) / start.elapsed().as_secs_f64()
}

/// What eight sessions of the device reach without Lacre: signatures and opens per second.
async fn in_process(flags: &Flags, control: &ShimControl) -> [f64; 2] {
    let time = Duration::from_secs(flags.number("--seconds", 5));
    let stage = Arc::new(Stage::new().await);
    for operation in [Operation::Sign, Operation::Open] {
        // Every session finds its keys before anything is measured.
        burst(&stage, operation, IN_FLIGHT, Duration::from_millis(500)).await;
    }
    let (mut rows, mut limits) = (Vec::new(), [0.0; 2]);
    let operations = [("ES256 signature", Operation::Sign), ("DEK open", Operation::Open)];
    for (reached, (name, operation)) in limits.iter_mut().zip(operations) {
        control.set_rules("");
        let service = 1.0 / bare_rate(&stage, operation, time / 5);
        control.set_rules(&delays(flags));
        let one = bare_rate(&stage, operation, time / 5);
        let before = control.counts();
        let (per_second, took) = burst(&stage, operation, IN_FLIGHT, time).await;
        let limit = f64::from(SESSIONS) * one;
        *reached = limit;
        rows.push(vec![
            name.to_owned(),
            calls_per(&before, &control.counts(), took.len()),
            format!("{:.3} ms", service * 1e3),
            rate(limit),
            rate(per_second),
            percent(per_second, limit),
            millis(at(&took, 50)),
            millis(at(&took, 99)),
        ]);
    }
    let head = [
        "operation",
        "calls",
        "device's own work",
        "limit",
        "Lacre, 64 in flight",
        "of limit (95 %)",
        "p50",
        "p99",
    ];
    let delay = flags.number("--millis", 5);
    print_table(&format!("seal, {delay} ms for each call, {SESSIONS} sessions"), &head, &rows);
    lanes(&stage, time).await;
    control.set_rules("");
    stage.device.close();
    limits
}

fn calls_per(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>, operations: usize) -> String {
    let operations = u32::try_from(operations).unwrap();
    let more = |name: &str| u32::try_from(after[name] - before[name]).unwrap();
    let calls: u32 = SLOW.iter().map(|name| more(name)).sum();
    format!("{:.2}", f64::from(calls) / f64::from(operations))
}

/// Signatures with and without rewraps behind them.
async fn lanes(stage: &Arc<Stage>, time: Duration) {
    const SIGNERS: usize = 3;
    let (alone_rate, alone) = burst(stage, Operation::Sign, SIGNERS, time).await;
    let stop = Arc::new(AtomicBool::new(false));
    let rewrapping: Vec<_> = (0..16)
        .map(|_| {
            let (stage, stop) = (Arc::clone(stage), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut done = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    let Stage { device, kek, other, sealed, .. } = stage.as_ref();
                    device.sealer.rewrap(kek, other, &PLACE, sealed.key()).await.unwrap();
                    done += 1;
                }
                done
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = Instant::now();
    let (beside_rate, beside) = burst(stage, Operation::Sign, SIGNERS, time).await;
    stop.store(true, Ordering::Relaxed);
    let mut rewrapped = 0;
    for task in rewrapping {
        rewrapped += task.await.unwrap();
    }
    let rewraps = f64::from(rewrapped) / began.elapsed().as_secs_f64();
    let row = |name: &str, per_second, took: &[Duration], rewraps: String| {
        vec![name.to_owned(), rate(per_second), millis(at(took, 50)), millis(at(took, 99)), rewraps]
    };
    let rows = [
        row("alone", alone_rate, &alone, "-".to_owned()),
        row("beside 16 rewraps at a time", beside_rate, &beside, rate(rewraps)),
    ];
    let head = ["ES256 signatures of 3 clients", "per second", "p50", "p99", "rewraps/s"];
    print_table("Foreground and background (target: p99 less than double)", &head, &rows);
    let (alone, beside) = (at(&alone, 99).as_secs_f64(), at(&beside, 99).as_secs_f64());
    println!("p99 is {:.2} times that of signatures alone", beside / alone);
}

async fn over_http(flags: &Flags, limits: [f64; 2]) {
    let time = Duration::from_secs(flags.number("--seconds", 5));
    let control = ShimControl::new(&softhsm::module());
    let between = Between {
        module: Some(shim::shim_path()),
        env: control.env().map(|(name, path)| (name, path.to_owned())).to_vec(),
        seal: "fast_threads = 8\nslow_threads = 1\ndeadline = \"5s\"",
    };
    let installation = Installation::over(None, between);
    let daemon = installation.start();
    let ids = daemon.create_secrets(0, 3000).await.ids();
    // Every session finds its keys.
    daemon.issue_tokens(IN_FLIGHT, Duration::from_millis(500)).await;
    daemon.read_secrets(&ids, IN_FLIGHT, Duration::from_millis(500)).await;
    control.set_rules(&delays(flags));
    let mut rows = Vec::new();
    for (name, limit) in ["token issued", "secret read"].into_iter().zip(limits) {
        let before = control.counts();
        let load = match name {
            "token issued" => daemon.issue_tokens(IN_FLIGHT, time).await,
            _ => daemon.read_secrets(&ids, IN_FLIGHT, time).await,
        };
        rows.push(vec![
            name.to_owned(),
            calls_per(&before, &control.counts(), load.done()),
            rate(limit),
            rate(load.per_second()),
            percent(load.per_second(), limit),
            millis(load.percentile(50)),
            millis(load.percentile(99)),
            load.refusals(),
        ]);
    }
    let head =
        ["request", "calls", "limit", "HTTP, 64 connections", "of limit (95 %)", "p50", "p99", "refused"];
    print_table("lacre serve on SQLite, audit durable, client on the same cores", &head, &rows);
    beside_a_rewrap(&daemon, time).await;
    control.set_rules("");
    daemon.stop();
}

/// Tokens with and without the rewrap of all secrets behind them.
async fn beside_a_rewrap(daemon: &Daemon, time: Duration) {
    let alone = daemon.issue_tokens(3, time).await;
    let bearer = daemon.bearer().await;
    let post = |path: &str| load::request("POST", path, &bearer, Some(("application/json", "{}")));
    let rotated = load::ask(daemon.address, &post("/v1/keks/rotate")).await.unwrap();
    assert_eq!(rotated.status, 201);
    let job = load::ask(daemon.address, &post("/v1/keks/rewrap")).await.unwrap();
    let job: serde_json::Value = serde_json::from_slice(&job.body).unwrap();
    let beside = daemon.issue_tokens(3, time).await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    let job = load::ask(daemon.address, &load::request("GET", &path, &bearer, None)).await.unwrap();
    let job: serde_json::Value = serde_json::from_slice(&job.body).unwrap();
    let row = |name: &str, load: &Load, note: String| {
        let [p50, p99] = [50, 99].map(|part| millis(load.percentile(part)));
        vec![name.to_owned(), rate(load.per_second()), p50, p99, note]
    };
    let note = format!("{}, {} of {} moved", job["state"].as_str().unwrap(), job["done"], job["total"]);
    let rows = [row("alone", &alone, String::new()), row("beside a rewrap", &beside, note)];
    let head = ["tokens of 3 clients", "per second", "p50", "p99", "rewrap"];
    print_table("The same over HTTP (target: p99 less than double)", &head, &rows);
    let ratio = beside.percentile(99).as_secs_f64() / alone.percentile(99).as_secs_f64();
    println!("p99 is {ratio:.2} times that of tokens alone");
}
