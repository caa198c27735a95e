//! Somebody holds the database's lock (AU-4, DB-5): work that cannot be recorded is refused in time.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::{Connection, SqliteConnection};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::daemon::TestDaemon;
use crate::model::serve;

/// Holds SQLite's write lock until dropped.
struct Holder(SqliteConnection);

impl Holder {
    fn of(daemon: &TestDaemon) -> Self {
        let mut conn = SqliteConnection::establish(daemon.database().to_str().unwrap()).unwrap();
        conn.batch_execute("PRAGMA busy_timeout = 5000; BEGIN IMMEDIATE").unwrap();
        Self(conn)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.batch_execute("ROLLBACK");
    }
}

#[tokio::test]
async fn what_cannot_be_recorded_is_refused_within_the_deadline_and_nothing_leaves() {
    let daemon = TestDaemon::start(serve(&[])).await;
    let api = daemon.api().await;
    let value = daemon.secret("locked");
    let id = api.create("locked", &value).await["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/secrets/{id}/value");

    let holder = Holder::of(&daemon);
    let began = Instant::now();
    let lost = json!({ "name": "lost", "kind": "opaque", "value": daemon.secret("lost") });
    let (read, created) = tokio::join!(api.get(&path), api.post("/v1/secrets", &lost));
    // The audit deadline is 2 s; what is more is the machine's.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    for answer in [read, created] {
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer.headers().contains_key("Retry-After"));
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["code"], "audit-unavailable");
    }
    for open in ["/livez", "/metrics", "/oidc/jwks"] {
        assert_eq!(daemon.anonymous(Method::GET, open).send().await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!(api.get(&format!("/v1/secrets/{id}")).await.status(), StatusCode::OK, "metadata");
    drop(holder);

    let began = Instant::now();
    while api.get(&path).await.status() != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(10), "the lock is gone and the log refuses still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let list: Value = api.get("/v1/secrets?name=lost").await.json().await.unwrap();
    assert_eq!(list["items"], json!([]), "a refused request was done");
    daemon.finish().await;
}

/// A write that failed makes the daemon open the database anew, and that must not cost it its locks:
/// whoever opens and closes the file afterwards would delete the write-ahead log under it.
#[tokio::test]
async fn after_a_failed_write_another_program_that_looks_at_the_file_takes_nothing_away() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let api = daemon.api().await;
    let wal = daemon.dir().join("lacre.db-wal");
    let inode = fs::metadata(&wal).unwrap().ino();
    let began = Instant::now();
    let holder = Holder::of(&daemon);
    // Longer than the daemon waits for the lock.
    while began.elapsed() < Duration::from_secs(8) {
        let body = json!({ "name": "refused", "value": daemon.secret("refused") });
        assert_eq!(api.post("/v1/secrets", &body).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
    assert!(daemon.log().contains("database is locked"), "no write failed");
    drop(holder);
    let began = Instant::now();
    let value = daemon.secret("kept");
    let body = json!({ "name": "before", "value": value });
    while api.post("/v1/secrets", &body).await.status() != StatusCode::CREATED {
        assert!(began.elapsed() < Duration::from_secs(10), "the lock is gone and the daemon refuses still");
    }

    // As a backup or a person with sqlite3 does.
    let look = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT count(*) FROM secrets').fetchone()";
    let looked = Command::new("python3").args(["-c", look]).arg(daemon.database()).status().unwrap();
    assert!(looked.success());
    assert_eq!(fs::metadata(&wal).unwrap().ino(), inode, "the write-ahead log is another one");
    let id = api.create("after", &value).await["id"].as_str().unwrap().to_owned();
    daemon.kill();

    daemon.run().await;
    assert_eq!(daemon.api().await.value(&id).await, value, "acknowledged and lost");
    daemon.finish().await;
}

/// `mv` under the daemon, as a mistaken restore does it.
#[tokio::test]
async fn a_database_file_that_is_moved_away_takes_no_more_and_is_whole_when_it_is_put_back() {
    let mut daemon = TestDaemon::start(serve(&[])).await;
    let api = daemon.api().await;
    let value = daemon.secret("kept");
    let id = api.create("kept", &value).await["id"].as_str().unwrap().to_owned();
    let (file, away) = (daemon.database(), daemon.dir().join("away.db"));

    fs::rename(&file, &away).unwrap();
    let body = json!({ "name": "lost", "value": daemon.secret("lost") });
    let answer = api.post("/v1/secrets", &body).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "taken into a file that nobody finds");
    assert!(daemon.failing().await.contains(&"database".to_owned()), "readiness does not know");
    daemon.kill();
    // The write-ahead log without its file is not for SQLite to delete.
    let refused = daemon.command().output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("put the file back"), "{said}");

    fs::rename(&away, &file).unwrap();
    daemon.run().await;
    assert_eq!(daemon.api().await.value(&id).await, value);
    daemon.finish().await;
}

#[tokio::test]
async fn a_reader_that_stays_costs_no_write_its_turn() {
    let daemon = TestDaemon::start(serve(&[])).await;
    let api = daemon.api().await;
    let mut reader = SqliteConnection::establish(daemon.database().to_str().unwrap()).unwrap();
    api.create("first", &daemon.secret("first")).await;
    reader.batch_execute("BEGIN; SELECT count(*) FROM secrets").unwrap();
    let began = Instant::now();
    // Pauses in which the daemon would like to cut its write-ahead log.
    for number in 0..10 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        api.create(&format!("beside/{number}"), &daemon.secret("beside")).await;
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    drop(reader);
    daemon.finish().await;
}
