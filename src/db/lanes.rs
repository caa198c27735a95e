//! Threads that own connections, and what they tell about themselves.
//!
//! SQLite: one thread writes (`sqlite.rs`), a few read. PostgreSQL: a few do both (`postgres.rs`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::connect::Target;
use super::queue::Queue;
use super::turn::Turns;
use super::{Conn, DbError, Engine, OpenError, OpenOptions, Turn, TurnName, Url, postgres, sqlite};

/// How long an orderly end waits for calls that are under way.
const CLOSE: Duration = Duration::from_secs(10);

/// The database's status.
#[derive(Clone, Debug, serde::Serialize)]
pub struct DbStatus {
    /// Which engine.
    pub engine: Engine,
    /// Whether it answers; the reason if it does not.
    pub problem: Option<String>,
    /// Write jobs committed since the start.
    pub writes: u64,
    /// Transactions that committed them: fewer than `writes` where jobs shared one.
    pub commits: u64,
}

/// What the threads report.
#[derive(Default)]
pub(super) struct Health {
    problem: Mutex<Option<String>>,
    writes: AtomicU64,
    commits: AtomicU64,
}

impl Health {
    pub(super) fn committed(&self, jobs: usize) {
        self.writes.fetch_add(u64::try_from(jobs).unwrap_or(0), Ordering::Relaxed);
        self.commits.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_problem(&self, problem: Option<String>) {
        let mut now = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if *now != problem {
            match &problem {
                Some(reason) => tracing::warn!(reason, "database does not answer"),
                None => tracing::info!("database answers again"),
            }
            *now = problem;
        }
    }
}

/// The threads of one database.
pub(super) struct Lanes {
    engine: Engine,
    writing: Arc<Queue>,
    reading: Arc<Queue>,
    health: Arc<Health>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Where the PostgreSQL server is, for connections beside the threads'.
    server: Option<SecretString>,
    turns: Turns,
    /// The single-daemon lock of SQLite; given back when the threads have ended.
    lock: Mutex<Option<sqlite::DaemonLock>>,
}

impl Lanes {
    pub(super) fn open(url: &Url, options: &OpenOptions) -> Result<Self, OpenError> {
        let health = Arc::new(Health::default());
        let writing = Arc::new(Queue::default());
        let count = options.connections.clamp(1, 64);
        let (reading, threads, lock, server) = match url.target() {
            Target::Sqlite(path) => {
                let lock = sqlite::lock(path)?;
                let reading = Arc::new(Queue::default());
                let threads = sqlite::start(path, count, &writing, &reading, &health)?;
                (reading, threads, Some(lock), None)
            }
            Target::Postgres(url) => {
                let threads = postgres::start(url, count, options.migrate, &writing, &health)?;
                (Arc::clone(&writing), threads, None, Some(url.clone()))
            }
        };
        Ok(Self {
            engine: url.engine(),
            writing,
            reading,
            health,
            threads: Mutex::new(threads),
            server,
            turns: Turns::default(),
            lock: Mutex::new(lock),
        })
    }

    pub(super) async fn read<T, E, F>(&self, query: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
        F: FnOnce(&mut Conn) -> Result<T, E> + Send + 'static,
    {
        self.reading.submit(false, query).await
    }

    pub(super) async fn write<T, E, F>(&self, work: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
        F: FnOnce(&mut Conn) -> Result<T, E> + Send + 'static,
    {
        self.writing.submit(true, work).await
    }

    pub(super) async fn turn(&self, name: TurnName) -> Result<Turn, DbError> {
        self.turns.take(name, self.server.as_ref()).await
    }

    pub(super) fn status(&self) -> DbStatus {
        let known = self.health.problem.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let is_stalled = self.writing.is_stalled() || self.reading.is_stalled();
        DbStatus {
            engine: self.engine,
            problem: known.or_else(|| is_stalled.then(|| "its answers do not come in time".to_owned())),
            writes: self.health.writes.load(Ordering::Relaxed),
            commits: self.health.commits.load(Ordering::Relaxed),
        }
    }

    pub(super) fn engine(&self) -> Engine {
        self.engine
    }

    /// Readers end first, so that the writer's last checkpoint finds nobody in its way.
    pub(super) fn close(&self) {
        self.reading.close();
        let mut threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // The writer is the first of SQLite's threads.
        let until = Instant::now() + CLOSE;
        for reader in threads.drain(1.min(threads.len())..) {
            join(reader, until);
        }
        self.writing.close();
        for writer in threads {
            join(writer, until);
        }
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits for a thread, but not for one that a server without a word holds: it ends with the process.
fn join(thread: JoinHandle<()>, until: Instant) {
    while !thread.is_finished() {
        if Instant::now() > until {
            tracing::warn!(
                thread = thread.thread().name(),
                "a database call does not end; leaving it behind"
            );
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = thread.join();
}

/// Starts a named thread.
pub(super) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, OpenError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(body).map_err(|error| OpenError::Unreachable { reason: error.to_string() })
}
