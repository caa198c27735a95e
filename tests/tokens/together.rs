//! Two daemons on one PostgreSQL: one refresh between them (MD-1), also when the one that holds the lease stands
//! still for longer than it holds (MD-2).

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::{Method, Response};
use tokio::task::JoinHandle;

use crate::daemon::signal;
use crate::idp::{Mode, Point};
use crate::stage::{ACME, EXPIRED, Stage, User, body, path, refused, token_in, until};

const READERS: usize = 200;
const PATIENCE: Duration = Duration::from_secs(30);

async fn one_request_a_round(rounds: usize) {
    let stage = Stage::pair(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let there = stage.at_peer(&ana);
    let mut last = stage.token(&ana).await;
    for round in 0..rounds {
        stage.expire();
        let at = path(ACME);
        let reads =
            (0..READERS).map(|number| if number % 2 == 0 { ana.api.get(&at) } else { there.get(&at) });
        let mut tokens = Vec::new();
        for answer in join_all(reads).await {
            tokens.push(token_in(answer).await);
        }
        tokens.dedup();
        assert_eq!(tokens.len(), 1, "round {round}: several tokens");
        assert_ne!(tokens[0], last, "round {round}");
        assert!(stage.idp.is_live(&tokens[0]), "round {round}");
        assert_eq!(stage.idp.refreshes(), round + 1, "round {round}");
        last.clone_from(&tokens[0]);
    }
    assert_eq!((stage.idp.families_revoked(), stage.idp.most_uses()), (0, 1));
    stage.finish().await;
}

#[tokio::test]
async fn two_hundred_readers_at_two_daemons_make_one_request_a_round() {
    one_request_a_round(5).await;
}

#[tokio::test]
#[ignore = "minutes: make soak"]
async fn two_hundred_readers_at_two_daemons_make_one_request_in_each_of_a_hundred_rounds() {
    one_request_a_round(100).await;
}

#[tokio::test]
async fn what_one_daemon_ends_the_other_does_not_serve() {
    let stage = Stage::pair(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let there = stage.at_peer(&ana);
    token_in(there.get(&path(ACME)).await).await;
    let deleted = ana.api.delete("/api/my-account/identities/acme").await;
    assert_eq!(deleted.status(), 204);
    refused(there.get(&path(ACME)).await, 404, crate::stage::NOTHING).await;

    let ben = stage.linked("ben").await;
    let there = stage.at_peer(&ben);
    let first = token_in(there.get(&path(ACME)).await).await;
    body(stage.reauthorise(&ben, "ben").await, 200).await;
    assert_ne!(token_in(there.get(&path(ACME)).await).await, first, "the other daemon serves the old one");
    stage.finish().await;
}

/// A user with an expired set, which both daemons have served.
async fn expired(stage: &Stage) -> User {
    let ana = stage.linked("ana").await;
    stage.token(&ana).await;
    token_in(stage.at_peer(&ana).get(&path(ACME)).await).await;
    stage.expire();
    ana
}

/// Reads at the first daemon, while the test goes on.
fn reading(user: &User) -> JoinHandle<reqwest::Result<Response>> {
    tokio::spawn(user.api.request(Method::GET, &path(ACME)).send())
}

/// What the second daemon says in the end. In between it may ask to wait.
async fn settled_at_peer(stage: &Stage, user: &User) -> Option<String> {
    let there = stage.at_peer(user);
    let is_settled = async || [200, 401].contains(&there.get(&path(ACME)).await.status().as_u16());
    until("an answer of the second daemon", PATIENCE, is_settled).await;
    let answer = there.get(&path(ACME)).await;
    if answer.status() == 200 {
        return Some(token_in(answer).await);
    }
    refused(answer, 401, EXPIRED).await;
    None
}

#[tokio::test]
async fn a_daemon_that_stood_still_before_it_sent_does_not_send() {
    let stage = Stage::pair(Mode::Strict).await;
    let ana = expired(&stage).await;
    stage.idp.stop_accepting().await;
    let asking = reading(&ana);
    until("the lease", PATIENCE, async || stage.states() == ["refreshing"]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    signal(stage.daemon().pid(), "STOP");
    stage.leases_have_ended().await;
    // Its connection is made now, by the kernel, and nothing was written to it.
    stage.idp.accept_again();
    let token = settled_at_peer(&stage, &ana).await.expect("the second daemon has refreshed");
    assert_eq!(stage.idp.refreshes(), 1);

    signal(stage.daemon().pid(), "CONT");
    drop(asking.await);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((stage.idp.refreshes(), stage.idp.families_revoked()), (1, 0), "it has sent in spite of that");
    assert_eq!(stage.token(&ana).await, token);
    assert!(stage.idp.is_live(&token));
    stage.finish().await;
}

/// Stops the holder with its request at the provider, which answers it while it stands still.
async fn stands_still(stage: &Stage, point: Point) -> (User, Option<String>) {
    let ana = expired(stage).await;
    stage.idp.pause(point);
    let asking = reading(&ana);
    stage.idp.wait_for_request().await;
    signal(stage.daemon().pid(), "STOP");
    stage.idp.release();
    stage.leases_have_ended().await;
    let there = settled_at_peer(stage, &ana).await;
    let asked = stage.idp.refreshes();
    assert!(asked <= 2, "the second daemon has tried {asked} times");

    signal(stage.daemon().pid(), "CONT");
    drop(asking.await);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(stage.idp.refreshes(), asked, "the first daemon has sent again");
    (ana, there)
}

async fn nothing_is_lost(point: Point) {
    let stage = Stage::pair(Mode::Grace(Duration::from_mins(5))).await;
    let (ana, there) = stands_still(&stage, point).await;
    let token = there.expect("the provider gave it once more");
    assert!(stage.idp.is_live(&token));
    assert_eq!(stage.token(&ana).await, token, "the answer that came late was written over the newer one");
    stage.expire();
    assert!(stage.idp.is_live(&stage.token(&ana).await), "the newest refresh token was kept");
    assert_eq!(stage.idp.families_revoked(), 0);
    stage.finish().await;
}

#[tokio::test]
async fn a_daemon_that_stood_still_after_it_sent_overwrites_nothing() {
    nothing_is_lost(Point::Received).await;
}

#[tokio::test]
async fn a_daemon_that_stood_still_before_its_answer_was_read_overwrites_nothing() {
    nothing_is_lost(Point::HalfSent).await;
}

#[tokio::test]
async fn an_answer_that_comes_after_the_family_has_ended_is_no_way_to_more() {
    let stage = Stage::pair(Mode::Strict).await;
    let (ana, there) = stands_still(&stage, Point::Decided).await;
    // One try with the old token was allowed, and this provider punishes it.
    assert_eq!((there, stage.idp.families_revoked()), (None, 1));
    // Its holder may serve what came late, which another provider would stand by; here it ends at the next refresh.
    stage.expire();
    refused(stage.read(&ana).await, 401, EXPIRED).await;
    refused(stage.at_peer(&ana).get(&path(ACME)).await, 401, EXPIRED).await;
    assert!(stage.idp.refreshes() <= 3 && stage.idp.most_uses() <= 2, "{} requests", stage.idp.refreshes());
    assert_eq!(stage.idp.families_revoked(), 1);
    body(stage.reauthorise(&ana, "ana").await, 200).await;
    assert!(stage.idp.is_live(&stage.token(&ana).await));
    stage.finish().await;
}
