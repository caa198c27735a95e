//! What the sealing API costs over the bare device, as ratios within one run.
//!
//! `cargo bench --bench device [-- --seconds N --rounds N]`. The bench makes a SoftHSM token and
//! starts itself again under it, once for the rates and once with the counting shim of
//! `tests/backend/shim` between Lacre and the token. Raw rate: one thread, one session, a cached
//! handle, one init and one call. Lacre's rate: 64 tasks on a runtime with two workers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a bench prints and fails by panicking"
)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Alg, Arena, Context, Device, DeviceConfig, DeviceState, Kek, KekId, KeyRef, KeySpec, Sealed, pkcs11,
};

#[path = "device/calls.rs"]
mod calls;
#[path = "device/jwt.rs"]
mod jwt;
#[path = "../tests/support/raw.rs"]
mod raw;
#[path = "../tests/support/shim.rs"]
mod shim;
#[path = "../tests/support/softhsm.rs"]
mod softhsm;
mod support;

use support::Flags;

const LABEL: &str = "lacre-bench";
const ROLE: &str = "LACRE_BENCH_ROLE";
const DIR: &str = "LACRE_BENCH_DIR";
const MODULE: &str = "LACRE_BENCH_MODULE";

/// Requests that are under way at one time.
const IN_FLIGHT: usize = 64;
/// About as long as the signing input of an access token.
const MESSAGE: &[u8] = &[b'm'; 300];
const PLACE: Context<'static> = Context { tenant: "bench", kind: "secret", record: "r", version: 1 };

fn main() {
    let role = std::env::var(ROLE).unwrap_or_default();
    match role.as_str() {
        "rates" => runtime().block_on(rates()),
        "calls" => runtime().block_on(calls::run()),
        _ => direct(),
    }
}

/// Makes the token and runs the parts in processes that see it: SoftHSM reads its environment once.
fn direct() {
    let token = softhsm::SoftHsm::new(LABEL);
    run_role("rates", &token, &token.module, &[]);
    let control = shim::ShimControl::new(&token.module);
    run_role("calls", &token, &shim::shim_path(), &control.env());
}

fn run_role(role: &str, token: &softhsm::SoftHsm, module: &Path, more: &[(&str, &Path)]) {
    let (name, conf) = token.env();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(std::env::args_os().skip(1))
        .envs(more.iter().map(|(name, path)| (*name, path.as_os_str())))
        .envs([(name, conf.as_os_str()), (ROLE, OsStr::new(role))])
        .envs([(DIR, token.dir.as_os_str()), (MODULE, module.as_os_str())])
        .status()
        .unwrap();
    assert!(status.success(), "the part {role} failed: {status}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn path_of(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap()
}

/// The started device and one key of each kind that is measured.
struct Stage {
    device: Device,
    ec: KeyRef,
    hmac: KeyRef,
    kek: Kek,
    sealed: Sealed,
}

impl Stage {
    async fn new() -> Self {
        let dir = path_of(DIR);
        let config = DeviceConfig {
            pkcs11: Some(pkcs11::Config {
                module: Some(path_of(MODULE)),
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
        std::fs::create_dir_all(dir.join("latch")).unwrap();
        let arena = Arena::new(&Options { allow_unlocked: true, ..Options::default() }).unwrap();
        let device = lacre::seal::start(&config, &arena).unwrap();
        let state = device.status().state;
        assert_eq!(state, DeviceState::Ready);
        let [ec, hmac, kek] =
            [KeySpec::EcP256, KeySpec::HmacSha256, KeySpec::Kek].map(|spec| KeyRef::plan(spec).unwrap());
        let ec = device.admin.generate(&ec).await.unwrap();
        let hmac = device.admin.generate(&hmac).await.unwrap();
        let key = device.admin.generate(&kek).await.unwrap();
        let kek = Kek { id: KekId::generate().unwrap(), version: 1, key };
        let sealed = device.sealer.seal(&kek, &PLACE, &[7; 32]).await.unwrap();
        Self { device, ec, hmac, kek, sealed }
    }

    async fn sign(&self) {
        self.device.sealer.sign(&self.ec, Alg::Es256, MESSAGE).await.unwrap();
    }

    async fn mac(&self) {
        self.device.sealer.mac(&self.hmac, MESSAGE).await.unwrap();
    }

    async fn open(&self) {
        self.device.sealer.open(&self.kek, &PLACE, &self.sealed).await.unwrap();
    }
}

/// The bare device: one session on which the keys were looked up once.
struct Bare {
    session: raw::Session,
    ec: u64,
    hmac: u64,
    kek: u64,
    iv: [u8; 12],
    wrapped: Vec<u8>,
}

impl Bare {
    /// In the process where Lacre has initialised the module and logged in.
    fn new(stage: &Stage) -> Self {
        let module = raw::Module::load(&path_of(MODULE));
        let session = module.session(module.slot(LABEL).unwrap()).unwrap();
        let find = |class, key: &KeyRef| session.find(class, key.id().as_bytes()).unwrap();
        let ec = find(cryptoki_sys::CKO_PRIVATE_KEY, &stage.ec);
        let hmac = find(cryptoki_sys::CKO_SECRET_KEY, &stage.hmac);
        let kek = find(cryptoki_sys::CKO_SECRET_KEY, &stage.kek.key);
        let mut iv = [9; 12];
        let wrapped = session.gcm_seal(kek, &mut iv, &PLACE.wrap_aad(&stage.kek), &[7; 32]).unwrap();
        Self { session, ec, hmac, kek, iv, wrapped }
    }

    fn sign(&self) {
        let mut out = [0; 64];
        self.session.sign(cryptoki_sys::CKM_ECDSA, self.ec, &MESSAGE[..32], &mut out).unwrap();
    }

    fn mac(&self) {
        let mut out = [0; 32];
        self.session.sign(cryptoki_sys::CKM_SHA256_HMAC, self.hmac, MESSAGE, &mut out).unwrap();
    }

    fn open(&self, aad: &[u8]) {
        let mut out = [0; 64];
        self.session.gcm_open(self.kek, &self.iv, aad, &self.wrapped, &mut out).unwrap();
    }
}

/// Calls per second of `work`, on this thread.
fn raw_rate(time: Duration, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut done = 0_u32;
    while start.elapsed() < time {
        for _ in 0..16 {
            work();
        }
        done += 16;
    }
    f64::from(done) / start.elapsed().as_secs_f64()
}

/// Which of Lacre's operations is measured.
#[derive(Clone, Copy)]
enum Operation {
    Sign,
    Mac,
    Open,
}

impl Operation {
    async fn run(self, stage: &Stage) {
        match self {
            Self::Sign => stage.sign().await,
            Self::Mac => stage.mac().await,
            Self::Open => stage.open().await,
        }
    }
}

/// Operations per second with [`IN_FLIGHT`] tasks.
async fn lacre_rate(time: Duration, stage: &std::sync::Arc<Stage>, operation: Operation) -> f64 {
    let start = Instant::now();
    let tasks: Vec<_> = (0..IN_FLIGHT)
        .map(|_| {
            let stage = stage.clone();
            tokio::spawn(async move {
                let mut done = 0_u32;
                while start.elapsed() < time {
                    operation.run(&stage).await;
                    done += 1;
                }
                done
            })
        })
        .collect();
    let mut done = 0;
    for task in tasks {
        done += task.await.unwrap();
    }
    f64::from(done) / start.elapsed().as_secs_f64()
}

async fn rates() {
    let flags = Flags::of_process();
    let time = Duration::from_secs(flags.number("--seconds", 2));
    let stage = std::sync::Arc::new(Stage::new().await);
    let bare = Bare::new(&stage);
    let aad = PLACE.wrap_aad(&stage.kek);
    let cases = [
        ("ES256 signature", Operation::Sign, 95),
        ("HMAC-SHA256", Operation::Mac, 80),
        ("DEK open", Operation::Open, 80),
    ];
    let mut rows = Vec::new();
    for (name, operation, target) in cases {
        let (mut bare_rates, mut lacre_rates, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        lacre_rate(time / 10, &stage, operation).await;
        for _ in 0..flags.number("--rounds", 3) {
            let raw = raw_rate(time, || match operation {
                Operation::Sign => bare.sign(),
                Operation::Mac => bare.mac(),
                Operation::Open => bare.open(&aad),
            });
            let lacre = lacre_rate(time, &stage, operation).await;
            bare_rates.push(raw);
            lacre_rates.push(lacre);
            ratios.push(lacre / raw);
        }
        let ratio = support::median(ratios);
        let [raw, lacre] = [bare_rates, lacre_rates].map(|values| support::rate(support::median(values)));
        rows.push(vec![name.into(), raw, lacre, support::percent(ratio, 1.0), format!("{target} %")]);
    }
    let head = ["operation", "raw, 1 thread", "Lacre, 64 in flight", "ratio", "target"];
    support::print_table("Operations per second, median of the rounds", &head, &rows);
    jwt::run(&flags, std::sync::Arc::clone(&stage), bare).await;
    // A process that ends while a thread is inside SoftHSM may crash in its last moment.
    stage.device.close();
}
