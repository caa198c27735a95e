//! Every call, every code (HS-1): a daemon goes through one scenario again and again while the shim fails
//! call number n of a function with a code, before its effect or after it, for n = 1, 2, 3, ... until the
//! scenario makes no such call.
//!
//! `make test` takes a sample in which each function meets each code; `make soak` runs the whole loop.
//! Several daemons share the work: what takes time is waiting for a device to come back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::daemon::{Options, TestDaemon};
use crate::scenario::Client;
use crate::served::over;
use crate::shim::ShimControl;
use crate::softhsm;

/// The return values of reliability.md 5.4.
const CODES: [u64; 17] =
    [0x2, 0x5, 0x6, 0x30, 0x31, 0x32, 0x60, 0x82, 0x90, 0x91, 0xB0, 0xB1, 0xB3, 0xE0, 0x101, 0x150, 0x190];
/// Functions that change something, so that a failure after the effect is another thing than before it.
const CHANGING: [&str; 10] = [
    "C_GenerateKey",
    "C_GenerateKeyPair",
    "C_Login",
    "C_CreateObject",
    "C_DestroyObject",
    "C_OpenSession",
    "C_CloseSession",
    "C_Encrypt",
    "C_Decrypt",
    "C_Sign",
];
/// Each pass begins with the loss of all sessions, so that sessions, logins and searches are in it.
const LOSS: &str = "C_DecryptInit 1 close-all-sessions";
/// Daemons at a time.
const DAEMONS: usize = 4;
/// A token grows by a key with each pass, and SoftHSM reads all of it at each search.
const PASSES_PER_DAEMON: usize = 30;

/// One fault.
#[derive(Clone, PartialEq, Eq)]
struct Fault {
    function: String,
    code: u64,
    n: u64,
    after: bool,
    /// The function is called in the first pass after a start only.
    is_first: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let when = if self.after { "return-after" } else { "return" };
        write!(f, "{} {} {when}:{:#x}", self.function, self.n, self.code)
    }
}

/// What is done under a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// The scenario.
    Scenario,
    /// A start of the daemon.
    Start,
}

impl What {
    async fn once(self, client: &mut Client, fault: &str) {
        match self {
            Self::Scenario => {
                client.control.set_rules(&format!("{LOSS}\n{fault}"));
                client.pass().await;
            }
            Self::Start => client.start_again(fault).await,
        }
    }

    /// Rules that fire with each fault beside it.
    fn beside(self) -> u64 {
        u64::from(self == Self::Scenario)
    }
}

/// A client over a fresh daemon.
async fn client() -> Client {
    let control = ShimControl::new(&softhsm::module());
    let options = over(&control, "");
    let text = format!("{}[server.rate_limit]\nper_second = 0\nburst = 1\n", options.config.unwrap());
    let daemon = TestDaemon::start(Options { config: Some(text), ..options }).await;
    Client::new(daemon, control).await
}

/// A function of what is done under a fault: how often it is called, without another fault than the loss.
struct Called {
    calls: u64,
    is_first: bool,
}

/// The functions of what is done under a fault.
async fn functions(client: &mut Client, what: What) -> BTreeMap<String, Called> {
    let first = calls(client, what).await;
    let mut again = calls(client, what).await;
    let called = first.into_iter().map(|(name, calls)| {
        let again = again.remove(&name);
        (name, Called { calls: again.unwrap_or(calls), is_first: again.is_none() })
    });
    // Without its function list there is no module: the daemon ends and says so.
    called.filter(|(name, _)| name != "C_GetFunctionList").collect()
}

async fn calls(client: &mut Client, what: What) -> BTreeMap<String, u64> {
    let before = client.control.counts();
    what.once(client, "").await;
    let more = std::mem::take(&mut client.counted).into_iter().map(|(name, count)| {
        let more = count - before.get(&name).copied().unwrap_or(0);
        (name, more)
    });
    more.filter(|(name, more)| name.starts_with("C_") && *more > 0).collect()
}

fn shown(functions: &BTreeMap<String, Called>) -> String {
    let one = |(name, called): (&String, &Called)| format!("{name} {}", called.calls);
    functions.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// What one run did.
#[derive(Default)]
struct Tally {
    fired: usize,
    passed_over: usize,
    refused: BTreeMap<String, u64>,
    slowest: Duration,
}

/// Takes fault after fault from the list until it is used up.
async fn work(what: What, faults: Arc<Vec<Fault>>, next: Arc<AtomicUsize>) -> Tally {
    let mut tally = Tally::default();
    while next.load(Ordering::Relaxed) < faults.len() {
        let mut client = client().await;
        for _ in 0..PASSES_PER_DAEMON {
            let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            if fault.is_first {
                // A version that is planned would be made by the start.
                client.rotate().await;
                client.start_again("").await;
            }
            let mut fault = fault.clone();
            let mut fired = meets(what, &mut client, &fault, &mut tally).await;
            if !fired && fault.n > 1 {
                // Passes differ by a call or two: then the first call, so that each function meets each code.
                fault.n = 1;
                fired = meets(what, &mut client, &fault, &mut tally).await;
            }
            if fired {
                tally.fired += 1;
            } else {
                println!("met no call: {fault}");
                tally.passed_over += 1;
            }
        }
        for (answer, count) in std::mem::take(&mut client.refused) {
            *tally.refused.entry(answer).or_default() += count;
        }
        client.finish().await;
    }
    tally
}

/// Does it once under the fault; whether the fault met a call.
async fn meets(what: What, client: &mut Client, fault: &Fault, tally: &mut Tally) -> bool {
    let (fired, began) = (client.control.count("rules_fired"), Instant::now());
    // Named if the pass panics.
    let named = Named(fault.to_string());
    what.once(client, &fault.to_string()).await;
    std::mem::forget(named);
    tally.slowest = tally.slowest.max(began.elapsed());
    client.control.count("rules_fired") - fired > what.beside()
}

/// Says under which fault a test failed.
struct Named(String);

impl Drop for Named {
    fn drop(&mut self) {
        eprintln!("--- under the fault: {}", self.0);
    }
}

async fn run(what: What, faults: Vec<Fault>) {
    let (faults, next, began) = (Arc::new(faults), Arc::new(AtomicUsize::new(0)), Instant::now());
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..DAEMONS {
        running.spawn(work(what, Arc::clone(&faults), Arc::clone(&next)));
    }
    let mut all = Tally::default();
    while let Some(tally) = running.join_next().await {
        let tally = tally.unwrap();
        all.fired += tally.fired;
        all.passed_over += tally.passed_over;
        all.slowest = all.slowest.max(tally.slowest);
        for (answer, count) in tally.refused {
            *all.refused.entry(answer).or_default() += count;
        }
    }
    println!(
        "{} faults in {:?}: {} fired, {} met no call; slowest pass {:?}",
        faults.len(),
        began.elapsed(),
        all.fired,
        all.passed_over,
        all.slowest
    );
    for (answer, count) in &all.refused {
        println!("{count:5} x {answer}");
    }
    assert!(all.fired * 10 >= faults.len() * 9, "too many faults met no call");
}

/// Whether a function's failure after its effect is a case of its own.
fn changes(function: &str) -> bool {
    CHANGING.contains(&function)
}

/// Each function with each code, the numbers of the calls spread over the scenario.
fn sample(functions: &BTreeMap<String, Called>) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (function, Called { calls, is_first }) in functions {
        for (at, code) in CODES.into_iter().enumerate() {
            let spread = u64::try_from(at).unwrap() * 7 % calls + 1;
            let fault = |n, after| Fault { function: function.clone(), code, n, after, is_first: *is_first };
            faults.push(fault(spread, false));
            if changes(function) {
                faults.push(fault((spread + calls / 2) % calls + 1, true));
            }
        }
    }
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_function_of_the_scenario_may_fail_with_each_code() {
    let mut first = client().await;
    let functions = functions(&mut first, What::Scenario).await;
    first.finish().await;
    println!("{}", shown(&functions));
    let names: BTreeSet<_> = functions.keys().map(String::as_str).collect();
    for expected in ["C_Login", "C_OpenSession", "C_FindObjects", "C_GenerateKey", "C_Encrypt", "C_Sign"] {
        assert!(names.contains(expected), "the scenario has no {expected}");
    }
    run(What::Scenario, sample(&functions)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_function_of_the_start_may_fail() {
    let mut first = client().await;
    let functions = functions(&mut first, What::Start).await;
    first.finish().await;
    println!("{}", shown(&functions));
    assert!(functions.contains_key("C_Initialize") && functions.contains_key("C_GetSlotList"));
    // A start takes longer than a pass: what the scenario does not call meets every code, the rest every fifth.
    let rare = ["C_Initialize", "C_Finalize", "C_GetSlotList", "C_GetInfo", "C_GetTokenInfo", "C_Login"];
    let all = sample(&functions).into_iter().enumerate();
    let faults = all.filter(|(at, fault)| rare.contains(&fault.function.as_str()) || at % 5 == 0);
    run(What::Start, faults.map(|(_, fault)| fault).collect()).await;
}

/// All numbers of all calls.
fn every(functions: &BTreeMap<String, Called>) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (function, Called { calls, is_first }) in functions {
        // Two more than were counted: recovery may call it once more.
        for (n, code) in (1..=calls + 2).flat_map(|n| CODES.map(|code| (n, code))) {
            let fault = |after| Fault { function: function.clone(), code, n, after, is_first: *is_first };
            faults.push(fault(false));
            if changes(function) {
                faults.push(fault(true));
            }
        }
    }
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "thousands of passes: `make soak`"]
async fn every_call_of_the_scenario_and_of_the_start_may_fail_with_every_code() {
    for what in [What::Scenario, What::Start] {
        let mut first = client().await;
        let functions = functions(&mut first, what).await;
        first.finish().await;
        run(what, every(&functions)).await;
    }
}
