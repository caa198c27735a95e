//! DB-1: killed at a write to its database, by strace, at any of them.

use std::fs;
use std::time::Instant;

use crate::daemon::TestDaemon;
use crate::model::{Model, serve};

/// Everything with which SQLite changes its files.
const CALLS: [&str; 4] = ["pwrite64", "fsync", "ftruncate", "unlink"];

/// strace around the daemon, which does `inject` at calls on the database's files.
pub fn strace(daemon: &TestDaemon, inject: &str) -> Vec<String> {
    let base = daemon.dir().canonicalize().unwrap().join("lacre.db");
    let log = daemon.dir().join("strace.log");
    let mut words: Vec<String> =
        ["strace", "-f", "-qq", "-o", log.to_str().unwrap()].map(str::to_owned).to_vec();
    words.extend(["-e".to_owned(), format!("trace={}", CALLS.join(","))]);
    for ending in ["", "-wal", "-shm"] {
        words.extend(["-P".to_owned(), format!("{}{ending}", base.display())]);
    }
    words.extend(["-e".to_owned(), inject.to_owned()]);
    words
}

/// How many calls of each kind the busiest thread makes in a whole scenario: strace counts by thread.
fn calls_in(daemon: &TestDaemon) -> [usize; CALLS.len()] {
    let log = fs::read_to_string(daemon.dir().join("strace.log")).unwrap();
    CALLS.map(|call| {
        let mut by_thread = std::collections::BTreeMap::new();
        for line in log.lines() {
            let (thread, rest) = line.split_once(' ').unwrap();
            if rest.trim_start().starts_with(&format!("{call}(")) {
                *by_thread.entry(thread).or_insert(0) += 1;
            }
        }
        by_thread.into_values().max().unwrap_or(0)
    })
}

/// Points that one installation goes through: its data go on from point to point, its KEKs grow in number.
const CHUNK: usize = 40;

/// How many calls of each kind the scenario makes, undisturbed.
async fn count() -> [usize; CALLS.len()] {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    daemon.stop().await;
    let never = strace(&daemon, "inject=pwrite64:signal=SIGKILL:when=60000");
    daemon.set_options(serve(&never));
    daemon.run().await;
    let run = Model::default().run(&daemon, 0).await;
    assert!(run.is_ok(), "the scenario works when nothing is done to it");
    daemon.stop().await;
    let counts = calls_in(&daemon);
    println!("calls of one scenario: {CALLS:?} {counts:?}");
    assert!(counts[0] > 50 && counts[1] > 10, "strace saw too little: {counts:?}");
    counts
}

/// Kills at each point and checks what is left.
async fn sweep(points: impl Fn([usize; CALLS.len()]) -> Vec<(&'static str, usize)>) {
    let points = points(count().await);
    let (began, mut killed) = (Instant::now(), 0);
    for chunk in points.chunks(CHUNK) {
        let mut daemon = TestDaemon::start(serve(&[])).await;
        let mut model = Model::default();
        assert!(model.run(&daemon, 0).await.is_ok(), "the scenario works when nothing is done to it");
        daemon.stop().await;
        let mut round = 0;
        for &(call, when) in chunk {
            killed += usize::from(killed_at(&mut daemon, (&mut model, &mut round), call, when).await);
            model.check_restarted(&mut daemon).await;
        }
        daemon.finish().await;
        println!("at {call:?}, {:?}", began.elapsed(), call = chunk.last());
    }
    println!("killed {killed} times at {} points in {:?}", points.len(), began.elapsed());
    assert_eq!(killed, points.len(), "points at which it was not killed");
}

/// Runs the scenario and an orderly end until the call at which it is killed. Writes that share a commit
/// are fewer calls, so a late one may not come: then an earlier one is tried. Whether it was killed.
async fn killed_at(
    daemon: &mut TestDaemon,
    (model, round): (&mut Model, &mut u64),
    call: &str,
    when: usize,
) -> bool {
    for when in std::iter::successors(Some(when), |when| (*when > 1).then(|| when * 3 / 4)) {
        let wrapper = strace(daemon, &format!("inject={call}:signal=SIGKILL:when={when}"));
        daemon.set_options(serve(&wrapper));
        *round += 1;
        let died = !daemon.try_run().await || model.run(daemon, *round).await.is_err();
        if died || daemon.stop().await != Some(0) {
            daemon.kill();
            return true;
        }
    }
    false
}

/// The first ones, where the start is, and some of the others.
fn sample(counts: [usize; CALLS.len()]) -> Vec<(&'static str, usize)> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).unwrap();
    let mut seed = std::env::var("LACRE_SEED").map_or(u64::from_ne_bytes(seed), |text| text.parse().unwrap());
    println!("LACRE_SEED={seed}");
    let mut points = Vec::new();
    for (at, (call, count)) in CALLS.into_iter().zip(counts).enumerate() {
        let (first, others) = [(6, 22), (6, 12), (2, 1), (1, 0)][at];
        points.extend((1..=first.min(count)).map(|when| (call, when)));
        for _ in 0..others {
            // xorshift: any spread will do, if it can be repeated.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let rest = count.saturating_sub(first) as u64;
            if rest > 0 {
                points.push((call, first + 1 + usize::try_from(seed % rest).unwrap()));
            }
        }
    }
    points
}

#[tokio::test]
async fn killed_at_a_write_it_loses_nothing_acknowledged_and_shows_nothing_half_done() {
    sweep(sample).await;
}

#[tokio::test]
#[ignore = "a quarter of an hour: make soak"]
async fn killed_at_every_write_it_loses_nothing_acknowledged_and_shows_nothing_half_done() {
    let all = |counts: [usize; CALLS.len()]| {
        let each = CALLS.into_iter().zip(counts);
        each.flat_map(|(call, count)| (1..=count).map(move |when| (call, when))).collect()
    };
    sweep(all).await;
}
