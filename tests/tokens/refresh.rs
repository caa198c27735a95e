//! One refresh at a time, for all who wait, and none that is not needed: contract, section 8; ID-2, ID-3.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use crate::idp::{Fault, Mode, Point};
use crate::stage::{
    ACME, EXPIRED, SCOPE, Stage, body, patch, path, put_token, refused, text, token_in, until,
};

const READERS: usize = 200;

#[tokio::test]
async fn two_hundred_readers_of_an_expired_set_make_one_request_and_get_one_token() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let old = stage.token(&ana).await;
    stage.expire();
    stage.idp.script([Fault::Delay(Duration::from_millis(300))]);

    let answers = join_all((0..READERS).map(|_| stage.read(&ana))).await;
    let mut tokens = Vec::new();
    for answer in answers {
        tokens.push(token_in(answer).await);
    }
    tokens.dedup();
    assert_eq!((tokens.len(), stage.idp.refreshes()), (1, 1));
    assert!(tokens[0] != old && stage.idp.is_live(&tokens[0]));
    assert_eq!(stage.token(&ana).await, tokens[0]);
    assert_eq!((stage.idp.refreshes(), stage.idp.families_revoked()), (1, 0));
    stage.finish().await;
}

#[tokio::test]
async fn sets_of_other_users_do_not_wait_for_each_other() {
    let stage = Stage::dev(Mode::Strict).await;
    let mut users = Vec::new();
    for number in 0..12 {
        users.push(stage.linked(&format!("user_{number}")).await);
    }
    stage.expire();
    stage.idp.script((0..users.len()).map(|_| Fault::Delay(Duration::from_secs(1))));
    let begun = std::time::Instant::now();
    let tokens = join_all(users.iter().map(|user| stage.token(user))).await;
    assert!(begun.elapsed() < Duration::from_secs(6), "one after the other: {:?}", begun.elapsed());
    for (number, token) in tokens.iter().enumerate() {
        assert_eq!(stage.idp.subject_of(token), Some(format!("user_{number}")));
    }
    assert_eq!((stage.idp.refreshes(), stage.idp.most_uses()), (users.len(), 1));
    stage.finish().await;
}

/// Sends a read and hangs up with RST after so long.
async fn hang_up(stage: &Stage, token: &str, after: Duration) {
    let address: SocketAddr = stage.daemon().url.strip_prefix("http://").unwrap().parse().unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    // With no time to linger, closing is a reset.
    stream.set_zero_linger().unwrap();
    let head =
        format!("GET {} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\r\n", path(ACME));
    stream.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(after).await;
}

#[tokio::test]
async fn a_refresh_is_finished_although_its_client_hangs_up() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    for after in (0..=300).step_by(30) {
        let before = (stage.token(&ana).await, stage.idp.refreshes());
        stage.expire();
        stage.idp.script([Fault::Delay(Duration::from_millis(150))]);
        hang_up(&stage, &ana.api.token, Duration::from_millis(after)).await;
        if after >= 120 {
            // It was on its way: nobody asks, and still it is stored.
            let is_kept = async || stage.idp.refreshes() == before.1 + 1 && stage.states() == ["idle"];
            until("the refresh", Duration::from_secs(10), is_kept).await;
        }
        let token = stage.token(&ana).await;
        assert!(token != before.0 && stage.idp.is_live(&token), "{after} ms");
        assert_eq!(stage.idp.refreshes(), before.1 + 1, "{after} ms");
        stage.idp.forget_faults();
    }
    assert_eq!((stage.idp.families_revoked(), stage.idp.most_uses()), (0, 1));
    stage.finish().await;
}

#[tokio::test]
async fn a_refresh_keeps_the_set_and_replaces_what_is_in_it() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let (before, old) = (stage.metadata(&ana, ACME).await, stage.token(&ana).await);
    stage.expire();
    stage.idp.set_expires_in(1800);
    tokio::time::sleep(Duration::from_millis(20)).await;

    let read = body(stage.read(&ana).await, 200).await;
    assert_ne!(read["access_token"], old.as_str());
    assert!((1700..=1800).contains(&read["expires_in"].as_i64().unwrap()), "{read}");
    let after = stage.metadata(&ana, ACME).await;
    assert_eq!((&after["id"], &after["createdAt"]), (&before["id"], &before["createdAt"]));
    assert!(after["updatedAt"].as_i64() > before["updatedAt"].as_i64(), "{before} {after}");
    assert_eq!(after["metadata"]["hasRefreshToken"], true);
    let actions = stage.records().await;
    let about = actions.iter().filter(|record| record["outcome"]["result"] == "success");
    assert!(
        about.into_iter().any(|record| text(&record["action"]).contains("refresh")),
        "the refresh is not in the log"
    );
    stage.finish().await;
}

#[tokio::test]
async fn a_token_near_its_end_is_replaced_and_any_other_is_left_alone() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let first = stage.token(&ana).await;
    stage.ends_in(300);
    assert_eq!(stage.token(&ana).await, first);
    assert_eq!(stage.idp.refreshes(), 0);

    stage.ends_in(30);
    let second = stage.token(&ana).await;
    assert!(second != first && stage.idp.is_live(&second));
    assert_eq!(stage.idp.refreshes(), 1);

    // A token that lives no longer than the leeway is not replaced at every read.
    stage.idp.set_expires_in(30);
    stage.expire();
    for _ in 0..10 {
        stage.token(&ana).await;
    }
    assert_eq!(stage.idp.refreshes(), 2);
    stage.finish().await;
}

#[tokio::test]
async fn a_token_that_the_provider_let_end_is_replaced() {
    let stage = Stage::dev(Mode::Strict).await;
    stage.idp.set_expires_in(1);
    let ana = stage.linked("ana").await;
    stage.idp.set_expires_in(3600);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let token = stage.token(&ana).await;
    assert_eq!(stage.idp.refreshes(), 1);
    assert!(stage.idp.is_live(&token));
    stage.finish().await;
}

#[tokio::test]
async fn what_an_answer_leaves_out_is_kept_but_for_its_end() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    stage.expire();
    let bare = |answer: &mut Value| {
        let object = answer.as_object_mut().unwrap();
        for member in ["scope", "token_type", "expires_in", "id_token"] {
            object.remove(member);
        }
    };
    stage.idp.script([Fault::Edit(Box::new(bare))]);
    let read = body(stage.read(&ana).await, 200).await;
    assert_eq!((&read["scope"], &read["token_type"]), (&json!(SCOPE), &json!("bearer")));
    assert_eq!(read.get("expires_in"), None, "an unknown end is not the old one");
    assert_eq!(stage.metadata(&ana, ACME).await["metadata"]["scope"], SCOPE);

    // A consent that brings no refresh token leaves the one that is there; that of another account does not.
    let refresh_tokens = stage.idp.tokens_used();
    stage.idp.set_offline(false);
    body(stage.reauthorise(&ana, "ana").await, 200).await;
    assert_eq!(stage.metadata(&ana, ACME).await["metadata"]["hasRefreshToken"], true);
    stage.expire();
    stage.token(&ana).await;
    assert_eq!(stage.idp.tokens_used(), refresh_tokens + 1);
    let record = stage.verified(&ana, "another", None).await;
    let asked = json!({ "newIdentifierVerificationRecordId": record });
    let request = ana.api.request(reqwest::Method::PUT, "/api/my-account/identities").json(&asked);
    assert_eq!(request.send().await.unwrap().status(), 204);
    assert_eq!(stage.metadata(&ana, ACME).await["metadata"]["hasRefreshToken"], false);
    stage.finish().await;
}

#[tokio::test]
async fn a_set_whose_grant_is_gone_waits_for_its_user() {
    let mut stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let before = stage.metadata(&ana, ACME).await;
    stage.idp.revoke_everything();
    stage.expire();
    for _ in 0..3 {
        refused(stage.read(&ana).await, 401, EXPIRED).await;
    }
    assert_eq!(stage.idp.refreshes(), 1, "a dead token was sent again");
    assert_eq!(stage.states(), ["needs_reauth"]);
    assert_eq!(stage.metadata(&ana, ACME).await["id"], before["id"]);

    stage.ground.daemon.restart().await;
    stage.found_again().await;
    let ana = stage.again(ana);
    refused(stage.read(&ana).await, 401, EXPIRED).await;
    assert_eq!(stage.idp.refreshes(), 1, "forgotten over a restart");
    stage.finish().await;
}

#[tokio::test]
async fn a_set_that_needs_its_user_is_whole_again_after_a_write() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let id = stage.metadata(&ana, ACME).await["id"].clone();
    stage.idp.script([Fault::error(400, "invalid_grant")]);
    stage.expire();
    refused(stage.read(&ana).await, 401, EXPIRED).await;
    let written = body(stage.reauthorise(&ana, "ana").await, 200).await;
    assert_eq!(stage.token(&ana).await, text(&written["access_token"]));
    assert_eq!(stage.metadata(&ana, ACME).await["id"], id);
    stage.expire();
    assert!(stage.idp.is_live(&stage.token(&ana).await), "and it can be refreshed");
    assert_eq!(stage.idp.refreshes(), 2);
    stage.finish().await;
}

#[tokio::test]
async fn a_token_that_is_alive_is_served_although_its_grant_is_gone() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let token = stage.token(&ana).await;
    stage.idp.script([Fault::error(400, "invalid_grant")]);
    stage.ends_in(30);
    assert_eq!(stage.token(&ana).await, token);
    assert_eq!(stage.token(&ana).await, token);
    assert_eq!(stage.idp.refreshes(), 1);
    stage.expire();
    refused(stage.read(&ana).await, 401, EXPIRED).await;
    assert_eq!(stage.idp.refreshes(), 1);
    stage.finish().await;
}

#[tokio::test]
async fn a_refusal_of_the_old_token_does_not_touch_a_set_that_was_written_meanwhile() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    stage.expire();
    stage.idp.script([Fault::error(400, "invalid_grant")]);
    stage.idp.pause(Point::Received);
    let (answer, written) = tokio::join!(stage.read(&ana), async {
        stage.idp.wait_for_request().await;
        let record = stage.verified(&ana, "ana", None).await;
        let written = body(put_token(&ana, ACME, &record).send().await.unwrap(), 200).await;
        stage.idp.release();
        text(&written["access_token"])
    });
    assert_eq!(token_in(answer).await, written);
    assert_eq!(stage.token(&ana).await, written);
    assert_eq!((stage.states(), stage.idp.refreshes()), (vec!["idle".to_owned()], 1));
    stage.finish().await;
}

#[tokio::test]
async fn an_answer_to_the_old_token_does_not_replace_a_set_that_was_written_meanwhile() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    stage.expire();
    stage.idp.pause_before_answer();
    let (answer, written) = tokio::join!(stage.read(&ana), async {
        stage.idp.wait_for_request().await;
        let record = stage.verified(&ana, "ana", None).await;
        let written = body(put_token(&ana, ACME, &record).send().await.unwrap(), 200).await;
        stage.idp.release();
        text(&written["access_token"])
    });
    assert!(stage.idp.is_live(&token_in(answer).await));
    assert_eq!(stage.token(&ana).await, written, "the user's newest consent counts");
    stage.finish().await;
}

#[tokio::test]
async fn a_client_that_the_provider_does_not_know_costs_one_request_for_all_users() {
    const USERS: usize = 6;
    let stage = Stage::dev(Mode::Strict).await;
    let mut users = Vec::new();
    for number in 0..USERS {
        users.push(stage.linked(&format!("user_{number}")).await);
    }
    stage.expire();
    stage.idp.script((0..50).map(|_| Fault::error(401, "invalid_client")));
    for user in &users {
        let answer = stage.read(user).await;
        assert!([400, 401, 503].contains(&answer.status().as_u16()), "{}", answer.text().await.unwrap());
        let said: Value = answer.json().await.unwrap();
        assert_ne!(said["code"], EXPIRED, "the user is asked for what only the operator can mend");
    }
    assert_eq!(stage.idp.refreshes(), 1);
    assert!(!stage.states().contains(&"needs_reauth".to_owned()), "{:?}", stage.states());

    // The operator mends it: a connector that was written again is tried again.
    stage.idp.forget_faults();
    let path = format!("/api/connectors/{}", stage.connector);
    patch(&stage.admin, &path, &json!({ "config": stage.config() })).await;
    let works = async || stage.read(&users[0]).await.status() == 200;
    until("an end of the outage", Duration::from_secs(150), works).await;
    for user in &users {
        assert!(stage.idp.is_live(&stage.token(user).await));
    }
    assert_eq!(stage.idp.families_revoked(), 0);
    stage.finish().await;
}

#[tokio::test]
async fn a_provider_that_says_when_to_come_back_is_left_alone_until_then() {
    const WAIT: Duration = Duration::from_secs(4);
    const ALMOST: Duration = Duration::from_millis(3500);
    let stage = Stage::dev(Mode::Strict).await;
    for (status, name) in [(503, "ana"), (429, "ben")] {
        let connector = stage.connect(name).await;
        let user = stage.linked_at(&connector, name).await;
        stage.expire();
        let later = vec![("Retry-After", WAIT.as_secs().to_string())];
        stage.idp.script([Fault::Status(status, later, String::new())]);
        let begun = std::time::Instant::now();
        let before = stage.idp.refreshes();
        while begun.elapsed() < ALMOST {
            let answer = user.api.get(&path(name)).await;
            assert!([400, 429, 503].contains(&answer.status().as_u16()), "{}", answer.text().await.unwrap());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(stage.idp.refreshes(), before + 1, "{status}: asked before its time");
        let works = async || user.api.get(&path(name)).await.status() == 200;
        until("an end of the wait", Duration::from_secs(60), works).await;
        assert_eq!(stage.idp.refreshes(), before + 2, "{status}");
    }
    stage.finish().await;
}
