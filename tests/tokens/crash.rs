//! ID-1: killed at every step of a refresh. A set is lost only while an answer is on its way and not yet kept; the
//! old refresh token is tried once more at most; and whoever lost a set is told so, and gets it back by a write.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use reqwest::Method;

use crate::daemon::{Options, TestDaemon};
use crate::ground;
use crate::idp::{Mode, Point};
use crate::stage::{ACME, EXPIRED, Engine, Stage, User, body, path, refused, token_in, until};

/// Longer than a lease.
const PATIENCE: Duration = Duration::from_secs(90);
/// With which SQLite makes its changes last.
const CALLS: [&str; 2] = ["pwrite64", "fsync"];

fn options(wrapper: Vec<String>) -> Options {
    let more = "[keys]\npropagation = \"2s\"\nskew = \"0s\"\n[upstream]\nloopback_http = true\n";
    Options { config: Some(ground::config("", more)), wrapper, ..Options::default() }
}

async fn stage(mode: Mode) -> Stage {
    let daemon = TestDaemon::start(options(vec![])).await;
    Stage::with(ground::Stage::of(daemon, Engine::Sqlite, String::new()), mode).await
}

/// What is said in the end: a token that is worth something, or that the user is needed. Until then it may be
/// asked to wait.
async fn settled(stage: &Stage, user: &User) -> Option<String> {
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = stage.read(user).await;
        match answer.status().as_u16() {
            200 => {
                let token = token_in(answer).await;
                assert!(stage.idp.is_live(&token), "a token that is worth nothing");
                return Some(token);
            }
            401 => {
                refused(answer, 401, EXPIRED).await;
                return None;
            }
            400 | 429 | 503 => assert!(Instant::now() < until, "{}", answer.text().await.unwrap()),
            other => panic!("{other}: {}", answer.text().await.unwrap()),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What holds after any crash: settled is settled, no token was tried more than twice, and a set that was lost
/// comes back by a write.
async fn check(stage: &Stage, user: &User, name: &str) -> Option<String> {
    let token = settled(stage, user).await;
    let asked = stage.idp.refreshes();
    assert_eq!(settled(stage, user).await, token, "{name}");
    assert_eq!(stage.idp.refreshes(), asked, "{name}: and again");
    assert!(stage.idp.most_uses() <= 2, "{name}: the old token was tried {} times", stage.idp.most_uses());
    assert_ne!(stage.metadata(user, ACME).await, serde_json::Value::Null, "{name}: the set is gone");
    if token.is_none() {
        body(stage.reauthorise(user, name).await, 200).await;
        assert!(settled(stage, user).await.is_some(), "{name}");
    }
    token
}

/// Kills the daemon with a refresh at `point`; what is said after the next start, and how many requests it took.
async fn killed_at(stage: &mut Stage, name: &str, point: Point, is_done: bool) -> (Option<String>, usize) {
    let user = stage.linked(name).await;
    stage.expire();
    let before = stage.idp.refreshes();
    stage.idp.pause(point);
    let asking = tokio::spawn(user.api.request(Method::GET, &path(ACME)).send());
    stage.idp.wait_for_request().await;
    stage.ground.daemon.kill();
    if is_done {
        stage.idp.release();
    } else {
        stage.idp.abandon();
    }
    assert!(asking.await.unwrap().is_err(), "a dead daemon has answered");
    stage.ground.daemon.run().await;
    let found = check(stage, &user, name).await;
    (found, stage.idp.refreshes() - before)
}

#[tokio::test]
async fn a_request_that_was_never_done_is_made_once_more() {
    let mut stage = stage(Mode::Strict).await;
    let (found, asked) = killed_at(&mut stage, "ana", Point::Received, false).await;
    assert!(found.is_some(), "a set was lost that the provider had not touched");
    assert_eq!((asked, stage.idp.families_revoked()), (2, 0));
    stage.finish().await;
}

#[tokio::test]
async fn with_a_strict_provider_a_set_is_lost_only_while_its_answer_is_on_the_way() {
    let mut stage = stage(Mode::Strict).await;
    for (name, point) in [("decided", Point::Decided), ("half", Point::HalfSent)] {
        let (found, asked) = killed_at(&mut stage, name, point, true).await;
        assert_eq!((found, asked), (None, 2), "{name}: what nobody read cannot be had again");
    }
    assert_eq!(stage.idp.families_revoked(), 2);

    // The whole answer is there: it is kept, or it is as lost as half of one.
    let lost = stage.idp.families_revoked();
    let (found, asked) = killed_at(&mut stage, "sent", Point::Sent, true).await;
    match found {
        Some(_) => assert_eq!((asked, stage.idp.families_revoked()), (1, lost)),
        None => assert_eq!((asked, stage.idp.families_revoked()), (2, lost + 1)),
    }
    stage.finish().await;
}

#[tokio::test]
async fn with_a_provider_that_grants_grace_nothing_is_lost() {
    let mut stage = stage(Mode::Grace(Duration::from_mins(5))).await;
    let points = [("decided", Point::Decided), ("half", Point::HalfSent), ("sent", Point::Sent)];
    for (name, point) in points {
        let (found, asked) = killed_at(&mut stage, name, point, true).await;
        assert!(found.is_some() && asked <= 2, "{name}: {asked} requests");
    }
    assert_eq!(stage.idp.families_revoked(), 0);
    stage.finish().await;
}

#[tokio::test]
async fn a_refresh_that_was_kept_survives_although_its_reader_never_heard() {
    let mut stage = stage(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    stage.expire();
    stage.idp.pause(Point::Sent);
    let asking = tokio::spawn(ana.api.request(Method::GET, &path(ACME)).send());
    stage.idp.wait_for_request().await;
    until("the commit", Duration::from_secs(10), async || stage.states() == ["idle"]).await;
    stage.ground.daemon.kill();
    stage.idp.release();
    drop(asking.await);
    stage.ground.daemon.run().await;
    assert!(check(&stage, &ana, "ana").await.is_some());
    assert_eq!((stage.idp.refreshes(), stage.idp.families_revoked()), (1, 0));
    stage.finish().await;
}

#[tokio::test]
async fn a_token_that_is_alive_is_served_while_it_is_not_known_what_became_of_its_refresh() {
    let mut stage = stage(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let token = stage.token(&ana).await;
    stage.ends_in(50);
    stage.idp.pause_before_answer();
    let asking = tokio::spawn(ana.api.request(Method::GET, &path(ACME)).send());
    stage.idp.wait_for_request().await;
    stage.ground.daemon.kill();
    stage.idp.abandon();
    drop(asking.await);
    stage.ground.daemon.run().await;
    stage.ends_in(50);
    for _ in 0..5 {
        assert_eq!(stage.token(&ana).await, token);
    }
    assert_eq!(stage.idp.refreshes(), 1, "the old token was tried although nothing had ended");
    stage.expire();
    assert_eq!(check(&stage, &ana, "ana").await, None);
    assert_eq!(stage.idp.refreshes(), 2);
    stage.finish().await;
}

/// strace around the daemon, which kills it at that call on the database's files.
fn strace(daemon: &TestDaemon, call: &str, when: usize) -> Vec<String> {
    let base = daemon.dir().canonicalize().unwrap().join("lacre.db");
    let log = daemon.dir().join("strace.log");
    let mut words: Vec<String> =
        ["strace", "-f", "-qq", "-o", log.to_str().unwrap()].map(str::to_owned).to_vec();
    words.extend(["-e".to_owned(), format!("trace={}", CALLS.join(","))]);
    for ending in ["", "-wal", "-shm"] {
        words.extend(["-P".to_owned(), format!("{}{ending}", base.display())]);
    }
    words.extend(["-e".to_owned(), format!("inject={call}:signal=SIGKILL:when={when}")]);
    words
}

/// How often each thread has made that call: strace counts by thread.
fn calls(daemon: &TestDaemon, call: &str) -> BTreeMap<String, usize> {
    let log = fs::read_to_string(daemon.dir().join("strace.log")).unwrap();
    let mut by_thread = BTreeMap::new();
    for line in log.lines() {
        let (thread, rest) = line.split_once(' ').unwrap();
        if rest.trim_start().starts_with(&format!("{call}(")) {
            *by_thread.entry(thread.to_owned()).or_insert(0) += 1;
        }
    }
    by_thread
}

/// From which call to which one a refresh goes, after a start: of the thread that makes most of them.
async fn span(stage: &mut Stage, user: &User, call: &str) -> std::ops::RangeInclusive<usize> {
    stage.ground.daemon.stop().await;
    let never = strace(stage.daemon(), call, 60_000);
    stage.ground.daemon.set_options(options(never));
    stage.ground.daemon.run().await;
    stage.expire();
    let before = calls(stage.daemon(), call);
    assert!(settled(stage, user).await.is_some());
    let after = calls(stage.daemon(), call);
    let made = |thread: &String| after[thread] - before.get(thread).copied().unwrap_or(0);
    let busiest = after.keys().max_by_key(|thread| made(thread)).expect("it writes");
    assert!(made(busiest) > 0, "a refresh that does not write: {call}");
    let first = before.get(busiest).copied().unwrap_or(0) + 1;
    println!("{call}: {first} to {}", after[busiest]);
    first..=after[busiest]
}

async fn killed_at_writes(most: usize) {
    let mut stage = stage(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let (mut killed, mut kept, mut points) = (0, 0, 0);
    for call in CALLS {
        let span = span(&mut stage, &ana, call).await;
        let step = (span.end() - span.start()) / most + 1;
        for when in span.step_by(step) {
            points += 1;
            stage.ground.daemon.stop().await;
            let wrapper = strace(stage.daemon(), call, when);
            stage.ground.daemon.set_options(options(wrapper));
            let (asked, lost) = (stage.idp.refreshes(), stage.idp.families_revoked());
            stage.expire();
            let has_started = stage.ground.daemon.try_run().await;
            let request = ana.api.request(Method::GET, &path(ACME)).send();
            let died = !has_started || request.await.is_err();
            stage.ground.daemon.kill();
            killed += usize::from(died);
            let sent = stage.idp.refreshes() - asked;
            assert!(sent <= 1, "{call} {when}: sent {sent} times");
            stage.ground.daemon.set_options(options(vec![]));
            stage.ground.daemon.run().await;
            let found = check(&stage, &ana, "ana").await;
            let is_lost = stage.idp.families_revoked() > lost;
            assert_eq!(found.is_none(), is_lost, "{call} {when}: lost without a reason");
            assert!(sent > 0 || found.is_some(), "{call} {when}: lost and nothing was sent");
            kept += usize::from(found.is_some());
        }
    }
    println!("killed {killed} times at {points} points, {kept} sets were kept");
    assert!(killed * 2 > points, "killed {killed} times at {points} points");
    assert!(kept > 0 && stage.idp.most_uses() <= 2);
    stage.finish().await;
}

#[tokio::test]
async fn killed_at_a_write_of_a_refresh_it_tries_the_old_token_once_at_most() {
    killed_at_writes(5).await;
}

#[tokio::test]
#[ignore = "minutes: make soak"]
async fn killed_at_every_write_of_a_refresh_it_tries_the_old_token_once_at_most() {
    killed_at_writes(usize::MAX).await;
}
