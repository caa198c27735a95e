//! PostgreSQL: every thread owns one connection and does what comes, reads and writes.
//!
//! A connection that broke is replaced for the next job. While the server is away jobs fail at
//! once, and one attempt to connect is made per back-off.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::result::Error;
use secrecy::SecretString;

use super::lanes::{Health, spawn};
use super::queue::{Job, Queue, Ran, Taken};
use super::{Conn, DbError, OpenError, connect, migrate};
use crate::with_conn;

/// After a failed attempt to connect, jobs are refused for so long without a new attempt.
const BACK_OFF: Duration = Duration::from_millis(500);
/// A connection that rested for longer is tried before a read depends on it.
const RESTED: Duration = Duration::from_secs(1);
/// How often an idle thread looks whether the server is there: readiness must not wait for a request.
const LOOK: Duration = Duration::from_secs(5);

/// Checks the schema and starts `count` threads.
pub(super) fn start(
    url: &SecretString,
    count: usize,
    may_migrate: bool,
    queue: &Arc<Queue>,
    health: &Arc<Health>,
) -> Result<Vec<JoinHandle<()>>, OpenError> {
    let mut conn = Conn::Postgres(connect::postgres_bare(url).map_err(connect::unreachable)?);
    if may_migrate {
        migrate::run_pending(&mut conn)?;
    }
    match migrate::pending(&mut conn)? {
        0 => {}
        count => return Err(OpenError::MigrationsPending { count }),
    }
    drop(conn);
    let server =
        Arc::new(Server { url: url.clone(), health: Arc::clone(health), attempts: Mutex::default() });
    (0..count)
        .map(|index| {
            let mut worker = Worker { server: Arc::clone(&server), conn: None, used: Instant::now() };
            let queue = Arc::clone(queue);
            spawn(&format!("lacre-db-{index}"), move || worker.serve(&queue))
        })
        .collect()
}

/// What the threads know of the server together: the first that reaches it ends the back-off of all.
struct Server {
    url: SecretString,
    health: Arc<Health>,
    attempts: Mutex<Attempts>,
}

#[derive(Default)]
struct Attempts {
    failed: Option<Instant>,
    succeeded: Option<Instant>,
}

impl Server {
    fn connect(&self) -> Option<Conn> {
        let begun = Instant::now();
        if self.attempts().failed.is_some_and(|at| begun.duration_since(at) < BACK_OFF) {
            return None;
        }
        let result = connect::postgres(&self.url);
        let mut attempts = self.attempts();
        match result {
            Ok(conn) => {
                *attempts = Attempts { failed: None, succeeded: Some(Instant::now()) };
                self.health.set_problem(None);
                Some(conn)
            }
            // An attempt that began before another succeeded tells of a server that has come back since.
            Err(_) if attempts.succeeded.is_some_and(|at| at > begun) => None,
            Err(reason) => {
                attempts.failed = Some(Instant::now());
                self.health.set_problem(Some(reason));
                None
            }
        }
    }

    fn attempts(&self) -> MutexGuard<'_, Attempts> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Worker {
    server: Arc<Server>,
    conn: Option<Conn>,
    used: Instant,
}

impl Worker {
    fn serve(&mut self, queue: &Queue) {
        loop {
            match queue.take(1, LOOK) {
                Taken::Jobs(jobs) => jobs.into_iter().for_each(|job| self.handle(job)),
                // Twice: a connection that broke while it rested is replaced first.
                Taken::Idle => drop(self.ready(false).or_else(|()| self.ready(false))),
                Taken::Closed => return,
            }
        }
    }

    fn handle(&mut self, job: Box<dyn Job>) {
        if !job.claim() {
            return;
        }
        // Nothing of the job was done yet, so a connection that turns out broken here costs only a new one.
        if self.ready(job.writes()).is_err() && self.ready(job.writes()).is_err() {
            return job.finish(Some(DbError::Unavailable(None)));
        }
        let Some(conn) = self.conn.take() else { return job.finish(Some(DbError::Unavailable(None))) };
        self.conn = perform(job, conn, &self.server.health);
        self.used = Instant::now();
        if self.conn.is_none() {
            // At once, so that readiness knows whether it was the connection or the server.
            self.conn = self.server.connect();
        }
    }

    /// Makes sure of a connection that works and, for a write, begins its transaction.
    fn ready(&mut self, writes: bool) -> Result<(), ()> {
        let rested = self.used.elapsed() > RESTED;
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.server.connect().ok_or(())?,
        };
        let begun = match &mut conn {
            Conn::Postgres(conn) if writes => AnsiTransactionManager::begin_transaction(conn),
            conn if rested => ping(conn),
            _ => Ok(()),
        };
        begun.map_err(|_| ())?;
        self.conn = Some(conn);
        Ok(())
    }
}

/// Runs the job and answers it; returns the connection if it can be used again.
fn perform(mut job: Box<dyn Job>, mut conn: Conn, health: &Health) -> Option<Conn> {
    let writes = job.writes();
    match job.run(&mut conn) {
        Ran::Done if !writes => {
            job.finish(None);
            Some(conn)
        }
        Ran::Failed if !writes => {
            job.finish(None);
            ping(&mut conn).is_ok().then_some(conn)
        }
        Ran::Done => {
            // Alone, COMMIT of a transaction in which a statement failed rolls back and says "done";
            // the SELECT before it fails in that case.
            match with_conn!(&mut conn, |c| c.batch_execute("SELECT 1; COMMIT")) {
                Ok(()) => {
                    health.committed(1);
                    job.finish(None);
                    Some(conn)
                }
                Err(error) => {
                    let alive = rolled_back(&mut conn);
                    job.finish(Some(commit_failure(error, alive)));
                    alive.then_some(conn)
                }
            }
        }
        Ran::Failed => {
            let alive = rolled_back(&mut conn) && ping(&mut conn).is_ok();
            job.finish(None);
            alive.then_some(conn)
        }
        // The server rolls back when the connection ends.
        Ran::Panicked => {
            job.finish(Some(DbError::Refused(Error::RollbackTransaction)));
            None
        }
    }
}

/// Whether the server answers and takes writes: after a failover the connection may lead to a standby.
fn ping(conn: &mut Conn) -> Result<(), Error> {
    let takes_writes = "SELECT 1 / (current_setting('transaction_read_only') = 'off')::int";
    with_conn!(conn, |c| c.batch_execute(takes_writes))
}

fn rolled_back(conn: &mut Conn) -> bool {
    with_conn!(conn, |c| c.batch_execute("ROLLBACK")).is_ok()
}

/// A server that still answers has rolled back; one that does not may have committed before it fell silent.
fn commit_failure(error: Error, alive: bool) -> DbError {
    if alive { DbError::from(error) } else { DbError::Unknown(Some(error)) }
}
