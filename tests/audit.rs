//! The audit trail on both engines.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/postgres.rs"]
mod postgres;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use lacre::audit::{
    Action, AuditCode, AuditError, AuditLog, Checkpoint, Event, Options, Outcome, verify, verify_against,
};
use lacre::clock::SystemClock;
use lacre::db::{Conn, Db, DbError, OpenOptions, Url, schema::audit_head};
use lacre::identity::{Caller, Principal, ScopeSet};
use lacre::ids::{ClientId, RequestId, TenantId};
use lacre::with_conn;
use postgres::Postgres;
use serde_json::Value;

#[derive(Debug)]
enum WorkError {
    Audit,
    NotFound,
}

impl From<AuditError> for WorkError {
    fn from(_: AuditError) -> Self {
        Self::Audit
    }
}

impl AuditCode for WorkError {
    fn audit_code(&self) -> &'static str {
        match self {
            Self::Audit => "audit-unavailable",
            Self::NotFound => "not-found",
        }
    }
}

struct Fixture {
    db: Db,
    url: Url,
    _directory: tempfile::TempDir,
}

impl Fixture {
    fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::at(Url::sqlite(directory.path().join("lacre.db")), directory)
    }

    fn postgres() -> Self {
        Self::at(Url::parse(&Postgres::shared().database()).unwrap(), tempfile::tempdir().unwrap())
    }

    fn at(url: Url, directory: tempfile::TempDir) -> Self {
        Self { db: open(&url), url, _directory: directory }
    }

    fn both() -> [Self; 2] {
        [Self::sqlite(), Self::postgres()]
    }

    async fn log(&self) -> AuditLog {
        self.log_with(Duration::from_secs(2)).await
    }

    async fn log_with(&self, deadline: Duration) -> AuditLog {
        AuditLog::open(self.db.clone(), Arc::new(SystemClock), Options { deadline }).await.unwrap()
    }

    async fn execute(&self, sql: &'static str) {
        let run = move |conn: &mut Conn| Ok::<_, DbError>(with_conn!(conn, |c| c.batch_execute(sql))?);
        self.db.write(run).await.unwrap();
    }
}

fn open(url: &Url) -> Db {
    Db::open(url, &OpenOptions { connections: 4, migrate: true }).unwrap()
}

fn operator() -> Caller {
    Caller::system("test", TenantId::parse("default").unwrap())
}

fn application(tenant: &str) -> Caller {
    Caller {
        principal: Principal::Application(ClientId::parse("app-1").unwrap()),
        tenant: TenantId::parse(tenant).unwrap(),
        scopes: ScopeSet::all(),
        request: RequestId::generate(),
    }
}

fn reveal() -> Event {
    Event::new(Action::SecretReveal, "secret", "s-1")
}

async fn lines(log: &AuditLog) -> Vec<String> {
    let records = log.export(&operator(), 0, 1_000_000).await.unwrap();
    records.into_iter().map(|record| record.body).collect()
}

async fn records(log: &AuditLog) -> Vec<Value> {
    let parsed = lines(log).await.into_iter().map(|line| serde_json::from_str::<Value>(&line).unwrap());
    parsed.filter(|record| record["action"] != "audit.read").collect()
}

fn verified(lines: &[String]) -> Checkpoint {
    verify(lines.iter().map(String::as_str), Checkpoint::START).unwrap()
}

#[tokio::test]
async fn work_stands_between_its_intent_and_its_outcome() {
    for fixture in Fixture::both() {
        let log = fixture.log().await;

        let done: Result<u8, WorkError> = log
            .around(&application("default"), reveal(), async |note| {
                assert_eq!(records(&log).await.len(), 1, "the intent is durable when the work starts");
                note.add("version", "3");
                Ok(7)
            })
            .await;
        let missing: Result<u8, WorkError> =
            log.around(&application("default"), reveal(), async |_| Err(WorkError::NotFound)).await;
        log.close().await;

        assert_eq!(done.unwrap(), 7);
        assert!(missing.is_err());
        let log = fixture.log().await;
        let records = records(&log).await;
        let types: Vec<_> = records.iter().map(|record| record["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["intent", "outcome", "intent", "outcome"]);
        assert_eq!(records[0]["id"], records[1]["id"]);
        assert_eq!(records[1]["outcome"]["result"], "success");
        assert_eq!(records[1]["details"]["version"], "3");
        assert_eq!(records[1]["actor"], "app:app-1");
        assert_eq!(records[3]["outcome"]["code"], "not-found");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_work_makes_one_chain_without_gaps() {
    for fixture in Fixture::both() {
        let log = fixture.log().await;

        let tasks = (0..400).map(|_| {
            let log = log.clone();
            tokio::spawn(async move {
                log.around(&application("default"), reveal(), async |_| Ok::<_, WorkError>(())).await
            })
        });
        for task in futures_util::future::join_all(tasks).await {
            task.unwrap().unwrap();
        }
        log.close().await;

        let log = fixture.log().await;
        let head = log.head().await.unwrap();
        let lines = lines(&log).await;
        assert_eq!(head.seq, 800);
        verify_against(lines.iter().map(String::as_str), Checkpoint::START, head).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_daemons_on_postgresql_write_one_chain() {
    let fixture = Fixture::postgres();
    let other = Fixture::at(fixture.url.clone(), tempfile::tempdir().unwrap());
    let logs = [fixture.log().await, other.log().await];

    let tasks = (0..200).map(|n: usize| {
        let log = logs[n % 2].clone();
        tokio::spawn(async move { log.record(&operator(), reveal(), Outcome::Success).await })
    });
    for task in futures_util::future::join_all(tasks).await {
        task.unwrap().unwrap();
    }

    let lines = lines(&logs[0]).await;
    assert_eq!(verified(&lines).seq, 200);
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_an_unknown_outcome() {
    let fixture = Fixture::sqlite();
    let log = fixture.log().await;

    let caller = application("default");
    let endless = log.around(&caller, reveal(), async |note| {
        note.add("reached", "work");
        std::future::pending::<Result<(), WorkError>>().await
    });
    tokio::time::timeout(Duration::from_millis(300), endless).await.unwrap_err();
    log.close().await;

    let records = records(&fixture.log().await).await;
    assert_eq!(records.len(), 2);
    assert_eq!(records[1]["outcome"]["result"], "unknown");
    assert_eq!(records[1]["details"]["reached"], "work");
}

#[tokio::test]
async fn work_is_refused_while_the_log_cannot_be_written_and_goes_on_by_itself() {
    for fixture in Fixture::both() {
        let log = fixture.log().await;
        let held = log
            .around(&application("default"), reveal(), async |_| {
                fixture.execute("ALTER TABLE audit_records RENAME TO elsewhere").await;
                Ok::<_, WorkError>(())
            })
            .await;
        assert!(held.is_ok());

        let started = AtomicU32::new(0);
        for _ in 0..3 {
            let refused = log
                .around(&application("default"), reveal(), async |_| {
                    started.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, WorkError>(())
                })
                .await;
            assert!(matches!(refused, Err(WorkError::Audit)));
        }
        assert_eq!(started.load(Ordering::Relaxed), 0);

        fixture.execute("ALTER TABLE elsewhere RENAME TO audit_records").await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        log.around(&application("default"), reveal(), async |_| Ok::<_, WorkError>(())).await.unwrap();
        log.close().await;

        let log = fixture.log().await;
        let records = records(&log).await;
        let outage = records.iter().find(|record| record["action"] == "audit.outage").unwrap();
        assert_eq!(outage["details"]["refused"], "3");
        assert_eq!(outage["details"]["lost"], "0");
        assert_unfinished(&records, 0);
        verified(&lines(&log).await);
    }
}

#[tokio::test]
async fn a_blocked_log_refuses_within_the_deadline_and_never_starts_the_work() {
    let fixture = Fixture::sqlite();
    let log = fixture.log_with(Duration::from_millis(200)).await;
    let db = fixture.db.clone();
    let blocker = tokio::spawn(async move {
        let sleep = |_: &mut Conn| -> Result<(), DbError> {
            std::thread::sleep(Duration::from_millis(900));
            Ok(())
        };
        db.write(sleep).await
    });
    tokio::time::sleep(Duration::from_millis(50)).await;

    let asked = Instant::now();
    let refused = log
        .around(&application("default"), reveal(), async |_| -> Result<(), WorkError> { panic!("started") })
        .await;
    assert!(matches!(refused, Err(WorkError::Audit)));
    assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());

    blocker.await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let records = records(&log).await;
    assert_eq!(records[1]["outcome"]["code"], "not-started");
    assert_unfinished(&records, 0);
}

#[tokio::test]
async fn an_intent_left_by_a_crash_is_closed_as_unknown_once() {
    let fixture = Fixture::sqlite();
    let log = fixture.log().await;
    for _ in 0..50 {
        log.around(&application("default"), reveal(), async |_| Ok::<_, WorkError>(())).await.unwrap();
    }
    let crashed = log.clone();
    let task = tokio::spawn(async move {
        let never = async |_| std::future::pending::<Result<(), WorkError>>().await;
        crashed.around(&application("default"), reveal(), never).await
    });
    tokio::time::sleep(Duration::from_millis(300)).await;

    // The first log's process is gone as far as the database can see: nothing is closed in order.
    for _ in 0..2 {
        let log = fixture.log().await;
        let records = records(&log).await;
        assert_eq!(records.len(), 102);
        let last = records.last().unwrap();
        assert_eq!(last["outcome"]["result"], "unknown");
        assert_eq!(last["details"]["closed_by"], "restart");
        assert_unfinished(&records, 0);
        verified(&lines(&log).await);
    }
    task.abort();
}

#[tokio::test]
async fn recovery_starts_behind_the_oldest_open_intent() {
    let fixture = Fixture::sqlite();
    let log = fixture.log().await;
    let (caller, mut open) = (application("default"), Vec::new());
    for n in 0..3 {
        let many = (0..1100).map(|_| log.record(&caller, reveal(), Outcome::Success));
        futures_util::future::try_join_all(many).await.unwrap();
        if n == 1 {
            let (log, caller) = (log.clone(), caller.clone());
            open.push(tokio::spawn(async move {
                let never = async |_| std::future::pending::<Result<(), WorkError>>().await;
                log.around(&caller, reveal(), never).await
            }));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    let mark = fixture.db.read(mark).await.unwrap();
    assert!((1100..=2200).contains(&mark), "{mark}: the open intent is number 2201");
    // Kept until the end: a log that is dropped moves the mark behind the record of having been read.
    let log = fixture.log().await;
    let records = records(&log).await;
    assert_eq!(records.last().unwrap()["details"]["closed_by"], "restart");
    assert_eq!(fixture.db.read(self::mark).await.unwrap(), 3302);
}

fn mark(conn: &mut Conn) -> Result<i64, DbError> {
    let row = audit_head::table.find(2).select(audit_head::seq);
    Ok(with_conn!(conn, |c| row.first(c))?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_connections_leave_one_outcome_for_every_intent() {
    let server = Postgres::start();
    let fixture = Fixture::at(Url::parse(&server.database()).unwrap(), tempfile::tempdir().unwrap());
    let log = fixture.log().await;

    let workers = (0..16).map(|_| {
        let log = log.clone();
        tokio::spawn(async move {
            let mut done = 0;
            for _ in 0..150 {
                let work = async |_| Ok::<_, WorkError>(());
                match log.around(&application("default"), reveal(), work).await {
                    Ok(()) => done += 1,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
            done
        })
    });
    let workers = futures_util::future::join_all(workers);
    let breaker = async {
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(40)).await;
            server.drop_connections();
        }
    };
    let (done, ()) = tokio::join!(workers, breaker);
    let done: usize = done.into_iter().map(Result::unwrap).sum();
    tokio::time::sleep(Duration::from_millis(500)).await;
    log.close().await;

    let log = fixture.log().await;
    let records = records(&log).await;
    let succeeded = records.iter().filter(|r| r["type"] == "outcome" && r["outcome"]["result"] == "success");
    assert_eq!(succeeded.count(), done);
    assert_unfinished(&records, 0);
    verified(&lines(&log).await);
}

#[tokio::test]
async fn a_tenant_reads_its_own_records_and_only_the_operator_reads_all() {
    for fixture in Fixture::both() {
        let log = fixture.log().await;
        for tenant in ["a", "b", "a"] {
            log.record(&application(tenant), reveal(), Outcome::Success).await.unwrap();
        }

        let of_a = log.events(&application("a"), 0, 10).await.unwrap();
        assert_eq!(of_a.iter().map(|record| record.seq).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(log.events(&application("a"), 1, 1).await.unwrap()[0].seq, 3);
        let powerless = Caller { scopes: ScopeSet::NONE, ..application("a") };
        assert!(matches!(log.events(&powerless, 0, 10).await, Err(AuditError::Forbidden(_))));
        assert!(matches!(log.export(&application("a"), 0, 10).await, Err(AuditError::NotLocal)));
        log.close().await;

        let log = fixture.log().await;
        let lines = lines(&log).await;
        verified(&lines);
        let denied = lines.iter().filter(|line| line.contains(r#""result":"denied","code":"forbidden""#));
        assert_eq!(denied.count(), 2);
    }
}

#[tokio::test]
async fn following_the_log_does_not_feed_it() {
    let fixture = Fixture::sqlite();
    let log = fixture.log().await;
    log.record(&operator(), reveal(), Outcome::Success).await.unwrap();

    let mut after = 0;
    for _ in 0..10 {
        let records = log.events(&operator(), after, 100).await.unwrap();
        after = records.last().map_or(after, |record| record.seq);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    assert_eq!(log.head().await.unwrap().seq, 2);
}

/// How quick it is: `cargo test --release --test audit -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn records_per_second() {
    for fixture in Fixture::both() {
        let log = fixture.log().await;
        let begun = Instant::now();
        let tasks = (0..128).map(|_| {
            let log = log.clone();
            tokio::spawn(async move {
                for _ in 0..200 {
                    log.around(&application("default"), reveal(), async |_| Ok::<_, WorkError>(()))
                        .await
                        .unwrap();
                }
            })
        });
        futures_util::future::join_all(tasks).await;
        log.close().await;
        let seconds = begun.elapsed().as_secs_f64();
        println!("{:?}: {:.0} records/s", fixture.db.engine(), 51_200.0 / seconds);
    }
}

fn assert_unfinished(records: &[Value], wanted: usize) {
    let mut open: HashMap<&str, i32> = HashMap::new();
    for record in records {
        let id = record["id"].as_str().unwrap();
        match record["type"].as_str().unwrap() {
            "intent" => *open.entry(id).or_default() += 1,
            "outcome" => *open.entry(id).or_default() -= 1,
            _ => {}
        }
    }
    assert!(open.values().all(|count| (0..=1).contains(count)), "an outcome for each intent, and one only");
    assert_eq!(open.values().filter(|count| **count == 1).count(), wanted);
}
