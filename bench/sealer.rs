//! What the sealer process costs: the same device in threads of the daemon and in a child process.
//!
//! `cargo bench --bench sealer [-- --seconds N --rounds N]`. Both run at the same time on one SoftHSM
//! token with one fast thread each, and are measured in turns, so that what else the machine does hits
//! both. The ratio is the median of the rounds' ratios; p99 is the median of the rounds' p99. Then two
//! daemons over HTTP, one in each mode, measured in the same way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a bench prints and fails by panicking"
)]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Alg, Arena, Context, Device, DeviceConfig, DeviceState, Kek, KekId, KeyRef, KeySpec, Sealed,
    SealerConfig, SealerMode, Surroundings, pkcs11,
};

#[path = "daemon/installation.rs"]
mod installation;
#[path = "daemon/load.rs"]
mod load;
#[path = "../tests/support/softhsm.rs"]
mod softhsm;
mod support;

use installation::{Between, Daemon, Installation};
use load::Load;
use support::{Flags, median, millis, percent, rate};

const LABEL: &str = "lacre-bench";
const DIR: &str = "LACRE_BENCH_DIR";
const MODULE: &str = "LACRE_BENCH_MODULE";
const CALLERS: [usize; 3] = [1, 16, 64];
/// About as long as the signing input of an access token.
const MESSAGE: &[u8] = &[b'm'; 300];
/// A token set.
const VALUE: &[u8] = &[7; 2048];
const PLACE: Context<'static> = Context { tenant: "bench", kind: "secret", record: "r", version: 1 };

fn main() {
    if std::env::var_os(DIR).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return runtime.unwrap().block_on(compare());
    }
    // SoftHSM reads its environment once, so this program starts itself again under it.
    let token = softhsm::SoftHsm::new(LABEL);
    let (name, conf) = token.env();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(std::env::args_os().skip(1))
        .env(name, conf)
        .env(DIR, &token.dir)
        .env(MODULE, &token.module)
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, over_http(&Flags::of_process()));
}

/// A started device and one key of each kind that is measured.
struct Stage {
    device: Device,
    ec: KeyRef,
    hmac: KeyRef,
    kek: Kek,
    sealed: Sealed,
}

fn device(mode: SealerMode) -> Device {
    let dir = std::env::var_os(DIR).map(PathBuf::from).unwrap();
    let config = DeviceConfig {
        pkcs11: Some(pkcs11::Config {
            module: std::env::var_os(MODULE).map(PathBuf::from),
            token: Some(LABEL.to_owned()),
            pin_source: Some(format!("file:{}", dir.join("pin").display())),
            ..Default::default()
        }),
        tpm: None,
        latch_dir: Some(dir.join("latch")),
        fast_threads: 1,
        slow_threads: None,
        queue: 1024,
        deadline: Duration::from_secs(5),
    };
    let memory = Options { allow_unlocked: true, ..Options::default() };
    let arena = Arena::new(&memory).unwrap();
    let sealer = SealerConfig { mode, ..SealerConfig::default() };
    let mut surroundings = Surroundings::new(&memory, "warn", false);
    surroundings.program = PathBuf::from(env!("CARGO_BIN_EXE_lacre"));
    let device = lacre::seal::launch(&sealer, &config, &surroundings, &arena).unwrap();
    assert_eq!(device.status().state, DeviceState::Ready);
    device
}

impl Stage {
    async fn new() -> [Arc<Self>; 2] {
        let devices = [SealerMode::Thread, SealerMode::Process].map(device);
        let admin = &devices[0].admin;
        let [ec, hmac, kek] =
            [KeySpec::EcP256, KeySpec::HmacSha256, KeySpec::Kek].map(|spec| KeyRef::plan(spec).unwrap());
        let (ec, hmac) = (admin.generate(&ec).await.unwrap(), admin.generate(&hmac).await.unwrap());
        let kek =
            Kek { id: KekId::generate().unwrap(), version: 1, key: admin.generate(&kek).await.unwrap() };
        let sealed = devices[0].sealer.seal(&kek, &PLACE, VALUE).await.unwrap();
        devices.map(|device| {
            let (ec, hmac, kek, sealed) = (ec.clone(), hmac.clone(), kek.clone(), sealed.clone());
            Arc::new(Self { device, ec, hmac, kek, sealed })
        })
    }

    async fn run(&self, operation: Operation) {
        let sealer = &self.device.sealer;
        match operation {
            Operation::Sign => drop(sealer.sign(&self.ec, Alg::Es256, MESSAGE).await.unwrap()),
            Operation::Mac => drop(sealer.mac(&self.hmac, MESSAGE).await.unwrap()),
            Operation::Open => drop(sealer.open(&self.kek, &PLACE, &self.sealed).await.unwrap()),
            Operation::Seal => drop(sealer.seal(&self.kek, &PLACE, VALUE).await.unwrap()),
        }
    }
}

#[derive(Clone, Copy)]
enum Operation {
    Sign,
    Mac,
    Open,
    Seal,
}

/// Operations per second of `callers` tasks, and the 99th percentile of their times in microseconds.
async fn measure(time: Duration, stage: &Arc<Stage>, operation: Operation, callers: usize) -> (f64, f64) {
    let start = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let stage = Arc::clone(stage);
            tokio::spawn(async move {
                let mut took = Vec::new();
                while start.elapsed() < time {
                    let began = Instant::now();
                    stage.run(operation).await;
                    took.push(began.elapsed().as_secs_f64() * 1e6);
                }
                took
            })
        })
        .collect();
    let mut took = Vec::new();
    for task in tasks {
        took.extend(task.await.unwrap());
    }
    took.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let rate = took.len() as f64 / start.elapsed().as_secs_f64();
    (rate, took[took.len() * 99 / 100])
}

async fn compare() {
    let flags = Flags::of_process();
    let time = Duration::from_secs(flags.number("--seconds", 1));
    let stages = Stage::new().await;
    let cases = [
        ("ES256", Operation::Sign),
        ("HMAC-SHA256", Operation::Mac),
        ("open 2 KiB", Operation::Open),
        ("seal 2 KiB", Operation::Seal),
    ];
    let mut rows = Vec::new();
    for (name, operation) in cases {
        for callers in CALLERS {
            let (mut rates, mut tails, mut ratios) = ([vec![], vec![]], [vec![], vec![]], vec![]);
            for stage in &stages {
                measure(time / 10, stage, operation, callers).await;
            }
            for _ in 0..flags.number("--rounds", 5) {
                let mut round = Vec::new();
                for (at, stage) in stages.iter().enumerate() {
                    let (rate, tail) = measure(time, stage, operation, callers).await;
                    rates[at].push(rate);
                    tails[at].push(tail);
                    round.push(rate);
                }
                ratios.push(round[1] / round[0]);
            }
            let [thread, process] = rates.map(|rates| rate(median(rates)));
            let [thread_p99, process_p99] = tails.map(|tails| format!("{:.0} us", median(tails)));
            let ratio = percent(median(ratios), 1.0);
            rows.push(vec![
                name.into(),
                callers.to_string(),
                thread,
                process,
                ratio,
                thread_p99,
                process_p99,
            ]);
        }
    }
    let head = ["operation", "callers", "thread", "process", "ratio", "p99 thread", "p99 process"];
    support::print_table("Operations per second in both modes, median of the rounds", &head, &rows);
    for stage in &stages {
        stage.device.close();
    }
}

/// Tokens and reads of two daemons on SQLite, audit durable.
async fn over_http(flags: &Flags) {
    const SECRETS: u64 = 500;
    let time = Duration::from_secs(2 * flags.number("--seconds", 1));
    let modes = ["[sealer]\nmode = \"thread\"", "[sealer]\nmode = \"process\""];
    let installations = modes.map(|seal| Installation::over(None, Between { seal, ..Between::default() }));
    let mut daemons = Vec::new();
    for installation in &installations {
        let daemon = installation.start();
        let ids = daemon.create_secrets(0, SECRETS).await.ids();
        daemons.push((daemon, ids));
    }
    let mut rows = Vec::new();
    for name in ["token issued", "secret read"] {
        for connections in [1, 8, 32, 128] {
            let (mut rates, mut tails, mut ratios) = ([vec![], vec![]], [vec![], vec![]], vec![]);
            for _ in 0..flags.number("--rounds", 5) {
                let mut round = Vec::new();
                for (at, (daemon, ids)) in daemons.iter().enumerate() {
                    let load = request(name, daemon, ids, connections, time).await;
                    assert_eq!(load.refusals(), "0");
                    rates[at].push(load.per_second());
                    tails[at].push(load.percentile(99).as_secs_f64());
                    round.push(load.per_second());
                }
                ratios.push(round[1] / round[0]);
            }
            let [thread, process] = rates.map(|rates| rate(median(rates)));
            let [thread_p99, process_p99] = tails.map(|tails| millis(Duration::from_secs_f64(median(tails))));
            let ratio = percent(median(ratios), 1.0);
            rows.push(vec![
                name.into(),
                connections.to_string(),
                thread,
                process,
                ratio,
                thread_p99,
                process_p99,
            ]);
        }
    }
    let head = ["request", "connections", "thread", "process", "ratio", "p99 thread", "p99 process"];
    support::print_table("Requests over HTTP per second in both modes, median of the rounds", &head, &rows);
    for (daemon, _) in daemons {
        daemon.stop();
    }
}

async fn request(name: &str, daemon: &Daemon, ids: &[String], connections: usize, time: Duration) -> Load {
    match name {
        "token issued" => daemon.issue_tokens(connections, time).await,
        _ => daemon.read_secrets(ids, connections, time).await,
    }
}
