//! Refreshes ahead of expiry, which nobody asks for: when they come, how many at once, and what stops them (ID-14 as far
//! as it is about users' sets; MD-1).

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::idp::{FakeIdp, Fault, Mode};
use crate::stage::{ACME, Engine, Stage, User, now, patch, until};

/// Longer than a few looks for what is due.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has the sets of a connector refreshed so many seconds before they expire.
async fn ahead(stage: &Stage, connector: &str, seconds: u64) {
    let at = format!("/api/connectors/{connector}");
    let changed = patch(&stage.admin, &at, &json!({ "refreshAhead": seconds })).await;
    assert_eq!(changed["refreshAhead"], seconds);
}

/// A user's sets are due since then, and expire in so long.
fn due(stage: &Stage, user: &User, seconds: i64) {
    let (past, ends) = ((now() - 60) * 1_000_000, now() + seconds);
    let set = format!("refresh_at = {past}, retry_at = 0, expires_at = {ends}");
    stage.ground.run(&format!("UPDATE token_sets SET {set} WHERE user_id = '{}'", user.id));
}

/// Users of the connector of the stage.
async fn users(stage: &Stage, count: usize) -> Vec<User> {
    let mut users = Vec::new();
    for number in 0..count {
        users.push(stage.linked(&format!("user_{number}")).await);
    }
    users
}

/// When it is refreshed by itself, in seconds; `None`: it is not.
fn next_refresh(secret: &Value) -> Option<i64> {
    secret.get("nextRefreshAt").map(|at| at.as_i64().unwrap() / 1000)
}

fn ends(secret: &Value) -> i64 {
    secret["metadata"]["expiresAt"].as_i64().unwrap()
}

/// Until nothing is due any more.
async fn all_done(stage: &Stage) {
    let due = format!("SELECT id AS t FROM token_sets WHERE refresh_at < {}", now() * 1_000_000);
    until("the end of what is due", PATIENCE, async || {
        stage.ground.texts(&due).is_empty() && stage.states().iter().all(|state| state == "idle")
    })
    .await;
}

#[tokio::test]
async fn a_set_is_refreshed_before_it_expires_without_being_read() {
    let stage = Stage::dev(Mode::Strict).await;
    ahead(&stage, &stage.connector, 60).await;
    // Half of six seconds: never earlier, however long before the end it is wanted.
    stage.idp.set_expires_in(6);
    let ana = stage.linked("ana").await;
    stage.idp.set_expires_in(3600);
    let before = stage.metadata(&ana, ACME).await;
    let at = next_refresh(&before).expect("nextRefreshAt");
    assert!((2..=4).contains(&(ends(&before) - at)), "{before}");

    until("the refresh", PATIENCE, async || stage.idp.refreshes() == 1 && stage.states() == ["idle"]).await;
    assert!(now() >= at, "too early");
    let after = stage.metadata(&ana, ACME).await;
    assert_eq!((&after["id"], &after["createdAt"]), (&before["id"], &before["createdAt"]));
    assert!(after["updatedAt"].as_i64() > before["updatedAt"].as_i64());
    assert!((60..=66).contains(&(ends(&after) - next_refresh(&after).unwrap())), "{after}");
    // Who reads gets what it brought, and asks nobody.
    assert!(stage.idp.is_live(&stage.token(&ana).await));
    assert_eq!(stage.idp.refreshes(), 1);
    let by = stage.records().await;
    let by = by.iter().find(|record| record["action"] == "token-set.refresh").expect("a record");
    assert_eq!(by["actor"], "system:token-refresh", "{by}");
    stage.finish().await;
}

#[tokio::test]
async fn sets_that_came_together_are_not_refreshed_together() {
    let stage = Stage::dev(Mode::Strict).await;
    ahead(&stage, &stage.connector, 1000).await;
    let users = users(&stage, 12).await;
    let mut leads = Vec::new();
    for user in &users {
        let secret = stage.metadata(user, ACME).await;
        leads.push(ends(&secret) - next_refresh(&secret).unwrap());
    }
    assert!(leads.iter().all(|lead| (1000..=1101).contains(lead)), "{leads:?}");
    leads.sort_unstable();
    leads.dedup();
    assert!(leads.len() >= 8, "not spread: {leads:?}");

    // Off, and on again, also for those that are there.
    ahead(&stage, &stage.connector, 0).await;
    for user in &users {
        assert_eq!(next_refresh(&stage.metadata(user, ACME).await), None);
    }
    ahead(&stage, &stage.connector, 600).await;
    for user in &users {
        let secret = stage.metadata(user, ACME).await;
        let lead = ends(&secret) - next_refresh(&secret).unwrap();
        assert!((600..=661).contains(&lead), "{lead}");
    }
    // What nobody can refresh is not tried.
    stage.idp.set_offline(false);
    let bare = stage.linked("bare").await;
    assert_eq!(next_refresh(&stage.metadata(&bare, ACME).await), None);
    stage.finish().await;
}

#[tokio::test]
async fn after_a_downtime_the_soonest_to_expire_come_first_and_few_at_once() {
    let more = "[tokens]\nbackground_at_once = 2\n";
    let mut stage = Stage::serve(Engine::Sqlite, Mode::Strict, more).await;
    ahead(&stage, &stage.connector, 300).await;
    let users = users(&stage, 10).await;
    stage.ground.daemon.stop().await;
    // The last to come is the first to go.
    for (number, user) in users.iter().enumerate() {
        due(&stage, user, 1000 - 60 * i64::try_from(number).unwrap());
    }
    stage.idp.set_pace(Duration::from_millis(200));
    stage.ground.daemon.run().await;
    until("all of them", PATIENCE, async || stage.idp.refreshes() >= users.len()).await;
    all_done(&stage).await;

    let order = stage.idp.refreshed();
    assert_eq!((order.len(), stage.idp.most_uses()), (users.len(), 1), "none twice: {order:?}");
    for (place, subject) in order.iter().rev().enumerate() {
        let number: usize = subject.strip_prefix("user_").unwrap().parse().unwrap();
        assert!(place.abs_diff(number) <= 2, "out of order: {order:?}");
    }
    assert_eq!((stage.idp.most_at_once(), stage.idp.families_revoked()), (2, 0));
    stage.finish().await;
}

#[tokio::test]
async fn two_daemons_refresh_each_set_once() {
    let stage = Stage::pair(Mode::Strict).await;
    ahead(&stage, &stage.connector, 300).await;
    let users = users(&stage, 16).await;
    stage.idp.set_pace(Duration::from_millis(100));
    for round in 1..=2 {
        for user in &users {
            due(&stage, user, 600);
        }
        until("all of them", PATIENCE, async || stage.idp.refreshes() >= round * users.len()).await;
        all_done(&stage).await;
        assert_eq!((stage.idp.refreshes(), stage.idp.most_uses()), (round * users.len(), 1), "round {round}");
    }
    assert_eq!(stage.idp.families_revoked(), 0);
    for user in &users {
        assert!(stage.idp.is_live(&stage.token(user).await));
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_connector_that_was_switched_off_is_left_alone() {
    let stage = Stage::dev(Mode::Strict).await;
    ahead(&stage, &stage.connector, 60).await;
    let other = stage.connect("other").await;
    ahead(&stage, &other, 60).await;
    stage.idp.set_expires_in(6);
    let (ana, ben) = (stage.linked("ana").await, stage.linked_at(&other, "ben").await);
    ahead(&stage, &stage.connector, 0).await;
    stage.idp.set_expires_in(3600);
    // The other one's later refresh says that it was looked for what is due.
    until("the other's refresh", PATIENCE, async || stage.idp.refreshed() == ["ben"]).await;
    due(&stage, &ben, 600);
    until("one more", PATIENCE, async || stage.idp.refreshes() == 2).await;
    assert_eq!(stage.idp.refreshed(), ["ben", "ben"]);
    // Read, it is refreshed all the same.
    until("its end", PATIENCE, async || now() > ends(&stage.metadata(&ana, ACME).await)).await;
    assert!(stage.idp.is_live(&stage.token(&ana).await));
    stage.finish().await;
}

#[tokio::test]
async fn a_provider_that_fails_is_asked_less_and_less_often() {
    let stage = Stage::dev(Mode::Strict).await;
    ahead(&stage, &stage.connector, 300).await;
    let ana = stage.linked("ana").await;
    let token = stage.token(&ana).await;
    stage.idp.script((0..100).map(|_| Fault::status(503)));
    due(&stage, &ana, 3000);
    let begun = Instant::now();
    until("four tries", PATIENCE, async || stage.idp.refreshes() >= 4).await;
    // One, two and four seconds, less up to a half.
    assert!(begun.elapsed() >= Duration::from_millis(3500), "{:?}", begun.elapsed());
    until("what came of it", PATIENCE, async || stage.metadata(&ana, ACME).await["failures"] == 4).await;
    let shown = stage.metadata(&ana, ACME).await;
    assert_eq!((&shown["lastError"], &shown["status"]), (&json!("provider-transient"), &json!("active")));
    assert_eq!(stage.token(&ana).await, token, "what is alive is served meanwhile");
    assert!(stage.idp.refreshes() <= 5, "a reader has asked: {}", stage.idp.refreshes());

    stage.idp.forget_faults();
    until("a success", PATIENCE, async || stage.metadata(&ana, ACME).await.get("failures").is_none()).await;
    let shown = stage.metadata(&ana, ACME).await;
    assert_eq!(shown.get("lastError"), None);
    assert!(next_refresh(&shown).unwrap() > now());
    stage.finish().await;
}

#[tokio::test]
async fn a_provider_that_hangs_keeps_no_other_waiting() {
    let more = "[tokens]\nbackground_at_once = 1\n";
    let stage = Stage::serve(Engine::Sqlite, Mode::Strict, more).await;
    ahead(&stage, &stage.connector, 300).await;
    let mute = FakeIdp::start(Mode::Strict, &stage.daemon().canary);
    let mut config = stage.config();
    for member in ["authorizationEndpoint", "tokenEndpoint", "userInfoEndpoint", "revocationEndpoint"] {
        config[member] = json!(config[member].as_str().unwrap().replace(&stage.idp.url, &mute.url));
    }
    let connector = stage.connect_with("oauth2", "mute", config).await;
    ahead(&stage, &connector, 300).await;
    let ana = stage.linked("ana").await;
    let mut waiting = Vec::new();
    for number in 0..4 {
        let user = stage.user(&format!("mute_{number}")).await;
        let (record, uri) = stage.begin(&user, &connector, None).await;
        let (code, _) = mute.authorize(&uri, &format!("mute_{number}"));
        assert_eq!(stage.verify(&user, &record, &code).await.status(), 200);
        assert_eq!(stage.link(&user, &record).await.status(), 204);
        waiting.push(user);
    }
    mute.script((0..10).map(|_| Fault::Hang));
    for user in &waiting {
        due(&stage, user, 300);
    }
    until("a request that hangs", PATIENCE, async || mute.refreshes() == 1).await;
    // Ten seconds each, one after the other; and then this one.
    due(&stage, &ana, 600);
    until("the other provider's set", Duration::from_secs(8), async || stage.idp.refreshes() == 1).await;
    assert_eq!((mute.most_at_once(), stage.idp.refreshed()), (1, vec!["ana".to_owned()]));
    stage.finish().await;
}

fn quarantine(stage: &Stage, at: &str) {
    stage.ground.run(&format!("UPDATE installation SET quarantined_at = {at} WHERE id = 1"));
}

#[tokio::test]
async fn nothing_is_sent_in_quarantine() {
    let stage = Stage::dev(Mode::Strict).await;
    ahead(&stage, &stage.connector, 300).await;
    let (ana, ben) = (stage.linked("ana").await, stage.linked("ben").await);
    let token = stage.token(&ana).await;
    quarantine(&stage, "1");
    due(&stage, &ana, 600);
    stage.ends_where(&format!("user_id = '{}'", ben.id), -10);
    // Two looks for what is due, and there is nothing else to be seen of them.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(stage.token(&ana).await, token, "what is alive is served");
    let answer = stage.read(&ben).await;
    assert_eq!((answer.status().as_u16(), answer.headers().contains_key("Retry-After")), (503, true));
    assert_eq!(stage.idp.refreshes(), 0);

    quarantine(&stage, "NULL");
    until("the refresh", PATIENCE, async || stage.idp.refreshed().contains(&"ana".to_owned())).await;
    assert!(stage.idp.is_live(&stage.token(&ben).await));
    assert_eq!(stage.idp.most_uses(), 1);
    stage.finish().await;
}
