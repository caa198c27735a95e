//! Reads of stored access tokens over HTTP, with a thousand and with a million sets in the database.
//!
//! `cargo bench --bench tokens [-- --quick] [--seconds N] [--rounds N] [--users N] [--sets N]`. Two daemons, each
//! `lacre serve` on SoftHSM and SQLite with its audit log durable as always and its rate limit off. Both have the same
//! number of users who came in over the API, from a provider that gives them tokens for a day: theirs are the sets that
//! are read, by `GET /api/my-account/identities/{target}/access-token` with the user's own token. One of them has, around
//! these, rows with copied ciphertext up to a million (`tokens/fill.rs`). They are measured in turns, so that what else
//! the machine does hits both; a ratio is the median of the rounds' ratios. The device alone: one session in one thread,
//! as many as Lacre has lanes for it.

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

use serde_json::Value;

#[path = "daemon/bare.rs"]
mod bare;
#[path = "tokens/fill.rs"]
mod fill;
#[path = "../tests/support/idp.rs"]
mod idp;
#[path = "daemon/installation.rs"]
mod installation;
#[path = "daemon/load.rs"]
mod load;
#[path = "tokens/people.rs"]
mod people;
#[path = "../tests/support/raw.rs"]
mod raw;
#[path = "../tests/support/softhsm.rs"]
mod softhsm;
mod support;

use bare::Bare;
use idp::{FakeIdp, Mode};
use installation::{Between, Daemon, Installation};
use load::{End, Load};
use support::{Flags, median, millis, percent, print_table, rate};

const CONNECTIONS: [usize; 4] = [1, 8, 32, 128];
/// The connector's target.
const TARGET: &str = "acme";
/// Seconds that the provider's access tokens live.
const DAY: u64 = 86_400;
/// How long the daemon takes a user's token: longer than a run.
const CONFIG: &str = "[upstream]\nloopback_http = true\n[issuer]\ntoken_lifetime = \"12h\"";
/// What the rate with many sets must reach of that with few.
const FLAT: f64 = 0.9;

/// How much is measured.
struct Sizes {
    time: Duration,
    rounds: u64,
    users: u64,
    sets: u64,
}

impl Sizes {
    fn of(flags: &Flags) -> Self {
        let (seconds, rounds, users, sets) =
            if flags.has("--quick") { (1, 1, 100, 10_000) } else { (5, 3, 1000, 1_000_000) };
        Self {
            time: Duration::from_secs(flags.number("--seconds", seconds)),
            rounds: flags.number("--rounds", rounds),
            users: flags.number("--users", users),
            sets: flags.number("--sets", sets),
        }
    }
}

fn main() {
    // First of all: it sets SOFTHSM2_CONF for the bare device, and that needs a process without threads.
    let bare = Bare::new();
    let sizes = Sizes::of(&Flags::of_process());
    // Three of these and what is around them are a set of about a kilobyte, as of a provider with opaque tokens.
    let idp = FakeIdp::start(Mode::Strict, &"t".repeat(150));
    idp.set_expires_in(DAY);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, compare(&sizes, &bare, &idp));
    assert_eq!(idp.refreshes(), 0, "tokens were not valid all the time");
}

/// A daemon with its users.
struct Stage {
    sets: u64,
    daemon: Daemon,
    /// The read of each user.
    requests: Vec<Vec<u8>>,
    // Its files go with it.
    _installation: Installation,
}

impl Stage {
    async fn new(sizes: &Sizes, sets: u64, idp: &FakeIdp) -> Self {
        let between = Between { seal: CONFIG, ..Between::default() };
        let installation = Installation::over(None, between);
        let daemon = installation.start();
        let begun = Instant::now();
        let bearers = people::link(&daemon, idp, sizes.users).await;
        let linked = begun.elapsed();
        daemon.stop();
        let begun = Instant::now();
        fill::around(&installation, sizes.users, sets);
        let (filled, size) = (begun.elapsed(), installation.sqlite_file().metadata().unwrap().len());
        // Both are started anew: their memory is that of reads only.
        let daemon = installation.start();
        println!(
            "{sets} sets: {} linked over the API in {:.0} s, the others are rows with copied ciphertext, made in {:.0} s; \
             database {} MiB, start to ready {}",
            sizes.users,
            linked.as_secs_f64(),
            filled.as_secs_f64(),
            size >> 20,
            millis(daemon.started_in),
        );
        let path = format!("/api/my-account/identities/{TARGET}/access-token");
        let requests: Vec<_> =
            bearers.iter().map(|bearer| load::request("GET", &path, bearer, None)).collect();
        let reply = load::ask(daemon.address, &requests[0]).await.unwrap();
        let body: Value = serde_json::from_slice(&reply.body).unwrap();
        assert!(idp.is_live(body["access_token"].as_str().unwrap()), "another token");
        Self { sets, daemon, requests, _installation: installation }
    }

    /// Keeps `connections` busy with reads; neighbours are not read together.
    async fn read(&self, connections: usize, time: Duration) -> Load {
        let requests = self.requests.clone();
        let pick = move |n: u64| requests[usize::try_from(n * 7919 % requests.len() as u64).unwrap()].clone();
        load::run(self.daemon.address, connections, End::After(time), pick).await
    }
}

/// What one number of connections has shown of one daemon.
#[derive(Default)]
struct Figures {
    rates: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    of_device: Vec<f64>,
    of_few: Vec<f64>,
    refused: Vec<String>,
    memory: [u64; 2],
}

impl Figures {
    fn add(&mut self, load: &Load, device: f64, few: f64, daemon: &Daemon) {
        let rate = load.per_second();
        self.rates.push(rate);
        self.refused.push(load.refusals());
        self.p50.push(load.percentile(50).as_secs_f64());
        self.p99.push(load.percentile(99).as_secs_f64());
        self.of_device.push(rate / device);
        self.of_few.push(rate / few);
        self.memory = [daemon.memory_kib(), daemon.sealer_memory_kib()];
    }

    fn row(mut self, connections: usize, sets: u64, device: f64) -> Vec<String> {
        let time = |values| millis(Duration::from_secs_f64(median(values)));
        self.refused.retain(|refused| refused != "0");
        let refused = if self.refused.is_empty() { "0".to_owned() } else { self.refused.join(", ") };
        let [daemon, sealer] = self.memory.map(|kib| format!("{} MiB", kib / 1024));
        vec![
            connections.to_string(),
            sets.to_string(),
            rate(median(self.rates)),
            time(self.p50),
            time(self.p99),
            refused,
            daemon,
            sealer,
            rate(device),
            format!("{:.1} %", 100.0 * median(self.of_device)),
            percent(median(self.of_few), 1.0),
        ]
    }
}

async fn compare(sizes: &Sizes, bare: &Bare, idp: &FakeIdp) {
    let stages = [
        Stage::new(sizes, sizes.users, idp).await,
        Stage::new(sizes, sizes.sets.max(sizes.users), idp).await,
    ];
    let (mut rows, mut ratios) = (Vec::new(), Vec::new());
    for connections in CONNECTIONS {
        let (mut device, mut figures) = (Vec::new(), [Figures::default(), Figures::default()]);
        for (stage, figures) in stages.iter().zip(&mut figures) {
            // The caches are filled before anything is measured; who is refused counts.
            figures.refused.push(stage.read(connections, sizes.time / 5).await.refusals());
        }
        for _ in 0..sizes.rounds {
            let alone = bare.open_rate(sizes.time / 5);
            device.push(alone);
            let mut few = None;
            for (stage, figures) in stages.iter().zip(&mut figures) {
                let load = stage.read(connections, sizes.time).await;
                let few = *few.get_or_insert(load.per_second());
                figures.add(&load, alone, few, &stage.daemon);
            }
        }
        let device = median(device);
        ratios.push(median(figures[1].of_few.clone()));
        for (stage, figures) in stages.iter().zip(figures) {
            rows.push(figures.row(connections, stage.sets, device));
        }
    }
    let few = format!("of {} sets", sizes.users);
    let head = [
        "connections",
        "sets",
        "reads/s",
        "p50",
        "p99",
        "refused",
        "daemon's memory",
        "sealer's memory",
        "device only, opens/s",
        "of device",
        &few,
    ];
    let title = format!("Valid access tokens of {} users read, SQLite, audit durable", sizes.users);
    print_table(&title, &head, &rows);
    verdict(&ratios, stages[1].sets);
    for stage in stages {
        stage.daemon.stop();
    }
}

/// Says whether the number of sets is felt.
fn verdict(ratios: &[f64], sets: u64) {
    let worst = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let word = if worst >= FLAT { "flat" } else { "not flat" };
    println!(
        "With {sets} sets at least {} of the rate with few are reached: {word} (aim: {}).",
        percent(worst, 1.0),
        percent(FLAT, 1.0)
    );
}
