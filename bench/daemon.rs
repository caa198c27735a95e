//! What the daemon does over HTTP, beside what the device alone does in the same run.
//!
//! `cargo bench --bench daemon [-- --quick] [--seconds N] [--secrets N] [--stored N]`. Client and
//! daemon share the machine, so the client is a few hundred lines on bare sockets. The daemon is
//! `lacre serve` with its audit log durable as always and its rate limit off; SQLite first, then
//! PostgreSQL where its programs are installed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a bench prints and fails by panicking"
)]

use std::time::Duration;

#[path = "daemon/bare.rs"]
mod bare;
#[path = "daemon/installation.rs"]
mod installation;
#[path = "daemon/load.rs"]
mod load;
#[path = "../tests/support/postgres.rs"]
mod postgres;
#[path = "../tests/support/raw.rs"]
mod raw;
#[path = "../tests/support/softhsm.rs"]
mod softhsm;
mod support;

use installation::{Daemon, Installation};
use load::Load;
use support::{Flags, print_table, rate};

const CONNECTIONS: [usize; 4] = [1, 8, 32, 128];
/// Secrets that reads go to.
const READ_FROM: u64 = 1000;

/// How much is measured.
struct Sizes {
    time: Duration,
    secrets: u64,
    stored: u64,
}

impl Sizes {
    fn of(flags: &Flags) -> Self {
        let (seconds, secrets, stored) =
            if flags.has("--quick") { (3, 20_000, 200_000) } else { (10, 100_000, 1_000_000) };
        Self {
            time: Duration::from_secs(flags.number("--seconds", seconds)),
            secrets: flags.number("--secrets", secrets),
            stored: flags.number("--stored", stored),
        }
    }
}

fn main() {
    // First of all: it sets SOFTHSM2_CONF for the bare device, and that needs a process without threads.
    let bare = bare::Bare::new();
    let sizes = Sizes::of(&Flags::of_process());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        sqlite(&sizes, &bare).await;
        if postgres_is_installed() {
            let server = postgres::Postgres::start();
            let database = server.database();
            let installation = Installation::new(Some(&database));
            let daemon = installation.start();
            let ids = daemon.create_secrets(0, READ_FROM).await.ids();
            rates("PostgreSQL", &sizes, &bare, &daemon, &ids).await;
            daemon.stop();
        } else {
            println!("\nPostgreSQL: not installed, not measured");
        }
    });
}

async fn sqlite(sizes: &Sizes, bare: &bare::Bare) {
    let installation = Installation::new(None);
    let daemon = installation.start();
    let (first_start, empty) = (daemon.started_in, daemon.memory_kib());
    let ids = daemon.create_secrets(0, READ_FROM).await.ids();
    rates("SQLite", sizes, bare, &daemon, &ids).await;

    let few = daemon.read_secrets(&ids, 32, sizes.time).await;
    let created = daemon.create_secrets(READ_FROM, sizes.secrets).await;
    let full = daemon.memory_kib();
    daemon.stop();
    let daemon = installation.start();
    let (second_start, fresh) = (daemon.started_in, daemon.memory_kib());
    daemon.stop();
    let added = installation.fill(sizes.stored.saturating_sub(sizes.secrets));
    let daemon = installation.start();
    // All that the daemon sealed; what was filled in makes tables and indexes as large as they are.
    let many = daemon.read_secrets(&created.ids(), 32, sizes.time).await;
    let third_start = daemon.started_in;
    daemon.stop();

    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let rows = [
        row("start to ready, no secrets", support::millis(first_start)),
        row(&format!("start to ready, {} secrets", sizes.secrets), support::millis(second_start)),
        row(&format!("start to ready, {} secrets", sizes.secrets + added), support::millis(third_start)),
        row("resident memory, no secrets", format!("{empty} KiB")),
        row(&format!("resident memory after creating {} secrets", sizes.secrets), format!("{full} KiB")),
        row(&format!("resident memory, restarted with {} secrets", sizes.secrets), format!("{fresh} KiB")),
        row("secrets created per second, 64 connections", rate(created.per_second())),
        row(&format!("reads per second with {READ_FROM} secrets, 32 connections"), rate(few.per_second())),
        row(
            &format!("reads per second of {} among {} secrets", created.ids().len(), sizes.secrets + added),
            rate(many.per_second()),
        ),
        row("many against few", support::percent(many.per_second(), few.per_second())),
    ];
    print_table("SQLite: size and start", &["what", "measured"], &rows);
}

/// Tokens and reads at every number of connections.
async fn rates(engine: &str, sizes: &Sizes, bare: &bare::Bare, daemon: &Daemon, ids: &[String]) {
    let mut rows = Vec::new();
    for connections in CONNECTIONS {
        let device = bare.token_rate(Duration::from_secs(1));
        let load = daemon.issue_tokens(connections, sizes.time).await;
        rows.push(row("token issued", connections, &load, device));
    }
    for connections in CONNECTIONS {
        let device = bare.open_rate(Duration::from_secs(1));
        let load = daemon.read_secrets(ids, connections, sizes.time).await;
        rows.push(row("secret read", connections, &load, device));
    }
    let head = ["request", "connections", "per second", "p50", "p99", "refused", "device only", "of device"];
    print_table(&format!("{engine}, audit durable"), &head, &rows);
}

fn row(what: &str, connections: usize, load: &Load, device: f64) -> Vec<String> {
    vec![
        what.to_owned(),
        connections.to_string(),
        rate(load.per_second()),
        support::millis(load.percentile(50)),
        support::millis(load.percentile(99)),
        load.refusals(),
        rate(device),
        support::percent(load.per_second(), device),
    ]
}

fn postgres_is_installed() -> bool {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let path = std::env::var_os("PATH").unwrap_or_default();
    versions
        .map(|entry| entry.path().join("bin"))
        .chain(std::env::split_paths(&path))
        .any(|dir| dir.join("initdb").exists())
}
