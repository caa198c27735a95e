//! The database does not take what a provider has just answered: the only copy lies sealed in the spool, until it does
//! (reliability.md, section 6). No second request is made, over crashes too.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diesel::SqliteConnection;
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use reqwest::{Method, Response};
use tokio::task::JoinHandle;

use crate::idp::Mode;
use crate::stage::{ACME, Engine, Stage, User, path, token_in, until};

/// Longer than a database is waited for before it counts as refusing.
const PATIENCE: Duration = Duration::from_secs(30);

fn spool(stage: &Stage) -> PathBuf {
    stage.daemon().dir().join("spool")
}

fn spooled(stage: &Stage) -> Vec<PathBuf> {
    let entries = fs::read_dir(spool(stage)).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|ending| ending == "json")).collect()
}

/// A refresh whose answer is kept back by the provider.
async fn about_to_answer(stage: &Stage) -> (User, String, JoinHandle<reqwest::Result<Response>>) {
    let ana = stage.linked("ana").await;
    let token = stage.token(&ana).await;
    stage.expire();
    stage.idp.pause_before_answer();
    let asking = tokio::spawn(ana.api.request(Method::GET, &path(ACME)).send());
    stage.idp.wait_for_request().await;
    (ana, token, asking)
}

/// The one file that there is, with nothing in it that is for nobody.
async fn answer_in_spool(stage: &Stage) -> PathBuf {
    until("an answer in the spool", PATIENCE, async || spooled(stage).len() == 1).await;
    let file = spooled(stage).remove(0);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&spool(stage)), mode(&file)), (0o700, 0o600));
    let bytes = fs::read(&file).unwrap();
    assert!(!stage.daemon().finder().is_match(&bytes), "a token is in the spool");
    assert!(bytes.len() > 200, "{}", String::from_utf8_lossy(&bytes));
    file
}

/// What was spooled is stored, and nobody was asked for it again.
async fn comes_out(stage: &Stage, user: &User, old: &str) -> String {
    until("the end of the spool", PATIENCE, async || spooled(stage).is_empty()).await;
    assert_eq!(stage.states(), ["idle"]);
    let token = stage.token(user).await;
    assert!(token != old && stage.idp.is_live(&token), "the answer was lost");
    assert_eq!((stage.idp.refreshes(), stage.idp.families_revoked()), (1, 0), "it was asked for again");
    // The refresh token that came with it is the one in use.
    stage.expire();
    let next = stage.token(user).await;
    assert!(next != token && stage.idp.is_live(&next));
    assert_eq!((stage.idp.refreshes(), stage.idp.most_uses(), stage.idp.families_revoked()), (2, 1, 0));
    next
}

#[tokio::test]
async fn an_answer_outlives_a_locked_database_and_a_kill() {
    let mut stage = Stage::serve(Engine::Sqlite, Mode::Strict, "").await;
    let (ana, old, asking) = about_to_answer(&stage).await;
    let mut lock = SqliteConnection::establish(stage.daemon().database().to_str().unwrap()).unwrap();
    lock.batch_execute("BEGIN IMMEDIATE").unwrap();
    stage.idp.release();
    let file = answer_in_spool(&stage).await;
    let copy = fs::read(&file).unwrap();
    stage.ground.daemon.kill();
    drop((lock, asking.await));

    // Beside it lie one that was not finished, and something else.
    let (half, other) = (spool(&stage).join("half.new"), spool(&stage).join("other.json"));
    fs::write(&half, &copy[..100]).unwrap();
    fs::write(&other, "{}").unwrap();
    stage.ground.daemon.run().await;
    let aside = other.with_extension("bad");
    until("the end of what can be read", PATIENCE, async || spooled(&stage).is_empty() && aside.exists())
        .await;
    fs::remove_file(&aside).unwrap();
    assert!(!half.exists());
    let newest = comes_out(&stage, &ana, &old).await;

    // Put there once more, by whoever has kept a copy, it is overtaken.
    stage.ground.daemon.stop().await;
    fs::write(&file, &copy).unwrap();
    stage.ground.daemon.run().await;
    until("the end of the copy", PATIENCE, async || spooled(&stage).is_empty()).await;
    assert_eq!(stage.token(&ana).await, newest, "an older answer came back");
    assert_eq!(stage.idp.refreshes(), 2);
    stage.finish().await;
}

/// Takes the table of the sets away, or brings it back.
fn rename(stage: &Stage, from: &str, to: &str) {
    stage.ground.run(&format!("ALTER TABLE {from} RENAME TO {to}"));
}

#[tokio::test]
async fn an_answer_is_stored_as_soon_as_the_database_takes_it() {
    let stage = Stage::serve(Engine::Postgres, Mode::Strict, "").await;
    let (ana, old, asking) = about_to_answer(&stage).await;
    rename(&stage, "token_sets", "away");
    stage.idp.release();
    answer_in_spool(&stage).await;
    let answer = asking.await.unwrap().unwrap();
    assert!(answer.status().is_server_error(), "{}", answer.text().await.unwrap());
    rename(&stage, "away", "token_sets");
    comes_out(&stage, &ana, &old).await;
    stage.finish().await;
}

#[tokio::test]
async fn an_answer_waits_for_a_database_that_refuses_at_the_next_start_too() {
    let mut stage = Stage::serve(Engine::Postgres, Mode::Strict, "").await;
    let (ana, old, asking) = about_to_answer(&stage).await;
    rename(&stage, "token_sets", "away");
    stage.idp.release();
    answer_in_spool(&stage).await;
    stage.ground.daemon.kill();
    drop(asking.await);
    stage.ground.daemon.run().await;
    let waits = async || stage.daemon().log().contains("the spool waits for the database");
    until("a try to store it", PATIENCE, waits).await;
    assert_eq!(spooled(&stage).len(), 1);
    rename(&stage, "away", "token_sets");
    comes_out(&stage, &ana, &old).await;
    stage.finish().await;
}

#[tokio::test]
async fn an_answer_for_a_set_that_was_deleted_meanwhile_is_dropped() {
    let mut stage = Stage::serve(Engine::Postgres, Mode::Strict, "").await;
    let (ana, _, asking) = about_to_answer(&stage).await;
    rename(&stage, "token_sets", "away");
    stage.idp.release();
    answer_in_spool(&stage).await;
    stage.ground.daemon.kill();
    drop(asking.await);
    rename(&stage, "away", "token_sets");
    stage.ground.run("DELETE FROM token_sets");
    stage.ground.daemon.run().await;
    until("the end of the spool", PATIENCE, async || spooled(&stage).is_empty()).await;
    let gone = stage.read(&ana).await;
    assert_eq!((gone.status().as_u16(), stage.sets()), (404, 0), "the set came back");
    // Who comes back brings a new one.
    assert_eq!(token_in(stage.reauthorise(&ana, "ana").await).await, stage.token(&ana).await);
    stage.finish().await;
}
