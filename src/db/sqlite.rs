//! SQLite: one file, one daemon, one thread that writes.
//!
//! The writer takes every job that waits, gives each a savepoint and commits them together: one
//! fsync for all. Checkpoints are its own work, so that a failing one is seen. After an fsync that
//! failed nothing is written any more: the kernel may have dropped the pages and a repeated fsync
//! would succeed without them. Deleted bytes are overwritten (`secure_delete`), and the write-ahead
//! log, which still has them, is truncated when writing pauses.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};
use diesel::sql_types::BigInt;
use rustix::fs::{FlockOperation, flock};

use super::connect::{sqlite_name, unreachable};
use super::lanes::{Health, spawn};
use super::queue::{Job, Queue, Ran, Taken};
use super::{Conn, DbError, OpenError, migrate};

/// `Lacr`: how a file of this program is told from any other SQLite file.
const APPLICATION_ID: i64 = 0x4c61_6372;
/// How many jobs share one commit.
const GROUP: usize = 256;
/// The write-ahead log is copied into the file when it is longer.
const WAL_BYTES: u64 = 4 << 20;
/// Deleted bytes stay in the write-ahead log for no longer than this under load ...
const TRUNCATE_EVERY: Duration = Duration::from_secs(30);
/// ... and no longer than this after the last write.
const IDLE: Duration = Duration::from_millis(500);
/// ... unless somebody else reads the file: then it is tried again this often.
const RETRY: Duration = Duration::from_secs(5);

/// How long a statement waits for somebody else's lock, in milliseconds.
const BUSY: u32 = 5000;
/// How long a checkpoint does: long enough for this daemon's own reads to end, too short to cost a write
/// its deadline where a foreign reader stays.
const BUSY_CHECKPOINT: u32 = 200;

/// Takes the lock that keeps a second daemon off this file, also if it knows it by a symbolic link.
pub(super) fn lock(path: &Path) -> Result<DaemonLock, OpenError> {
    // A file that is yet to be made has no other name.
    let mut name = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()).into_os_string();
    name.push(".lock");
    let mut options = fs::OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).mode(0o600).open(&name);
    let file = file.map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            unreachable(format!("{}: no such directory; `lacre init` makes it", path.display()))
        }
        _ => unreachable(format!("{}: {error}", Path::new(&name).display())),
    })?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(DaemonLock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse { path: path.display().to_string() }),
        Err(error) => Err(unreachable(format!("{}: {error}", Path::new(&name).display()))),
    }
}

/// The lock that keeps a second daemon off the file.
pub(super) struct DaemonLock(File);

impl Drop for DaemonLock {
    fn drop(&mut self) {
        // Closing alone leaves it to whatever process was forked a moment ago and has not executed yet.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Migrates the file and starts its threads, the writer first. The caller holds the lock.
pub(super) fn start(
    path: &Path,
    readers: usize,
    writing: &Arc<Queue>,
    reading: &Arc<Queue>,
    health: &Arc<Health>,
) -> Result<Vec<JoinHandle<()>>, OpenError> {
    let mut conn = connect_checked(path)?;
    migrate::run_pending(&mut conn)?;
    let mut writer = Writer {
        path: path.to_owned(),
        file: identity(path),
        conn: Some(conn),
        health: Arc::clone(health),
        poisoned: false,
        dirty: true,
        truncated: Instant::now(),
        retry: Instant::now(),
    };
    let queue = Arc::clone(writing);
    let mut threads = vec![spawn("lacre-db-w", move || writer.serve(&queue))?];
    for index in 0..readers {
        let (queue, path) = (Arc::clone(reading), path.to_owned());
        let conn = connect_reader(&path)?;
        threads.push(spawn(&format!("lacre-db-r{index}"), move || read_jobs(&queue, &path, conn))?);
    }
    Ok(threads)
}

/// A connection to a file that is this program's or new.
pub(super) fn connect_checked(path: &Path) -> Result<Conn, OpenError> {
    let foreign = |reason: String| OpenError::Foreign { path: path.display().to_string(), reason };
    // INVARIANT: while a connection of this process is open, nobody but SQLite opens the file, not even to
    // look. Closing any descriptor of it ends all the locks that the process has on it (fcntl(2)); the next
    // foreign connection would then take itself for the last one and delete the write-ahead log.
    let wal = with_ending(path, "-wal");
    if !path.exists() && fs::metadata(&wal).is_ok_and(|meta| meta.len() > 0) {
        // SQLite would delete it, and with it what only it has.
        let what = "is there without its database file: put the file back";
        return Err(unreachable(format!("{} {what}", wal.display())));
    }
    match fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        file => drop(file.map_err(|error| unreachable(format!("{}: {error}", path.display())))?),
    }
    let mut conn = establish(path)?;
    let id = number(&mut conn, "SELECT application_id AS n FROM pragma_application_id")
        .map_err(|error| foreign(error.to_string()))?;
    let tables = number(&mut conn, "SELECT count(*) AS n FROM sqlite_master");
    let tables = tables.map_err(|error| foreign(error.to_string()))?;
    match (id, tables) {
        (APPLICATION_ID, _) => {}
        (0, 0) => conn
            .batch_execute(&format!("PRAGMA application_id = {APPLICATION_ID}"))
            .map_err(|error| unreachable(error.to_string()))?,
        (id, tables) => {
            return Err(foreign(format!("application_id {id} with {tables} tables and indexes")));
        }
    }
    // After the check, so that nothing of a foreign file is changed. SQLite gives the -wal and -shm
    // files the mode of the file itself.
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(|error| unreachable(error.to_string()))?;
    conn.batch_execute(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
         PRAGMA secure_delete = ON; PRAGMA wal_autocheckpoint = 0; PRAGMA temp_store = MEMORY;
         PRAGMA journal_size_limit = 4194304;",
    )
    .map_err(|error| unreachable(error.to_string()))?;
    Ok(Conn::Sqlite(conn))
}

/// For asking what migrations there are, without a file.
pub(super) fn in_memory() -> Result<SqliteConnection, OpenError> {
    SqliteConnection::establish(":memory:").map_err(|error| unreachable(error.to_string()))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Which file is at the path: device and inode.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

fn connect_reader(path: &Path) -> Result<Conn, OpenError> {
    let mut conn = establish(path)?;
    conn.batch_execute("PRAGMA query_only = ON").map_err(|error| unreachable(error.to_string()))?;
    Ok(Conn::Sqlite(conn))
}

fn establish(path: &Path) -> Result<SqliteConnection, OpenError> {
    let mut conn =
        SqliteConnection::establish(&sqlite_name(path)?).map_err(|error| unreachable(error.to_string()))?;
    conn.batch_execute(&format!("PRAGMA busy_timeout = {BUSY}"))
        .map_err(|error| unreachable(error.to_string()))?;
    Ok(conn)
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    n: i64,
}

fn number(conn: &mut SqliteConnection, sql: &str) -> QueryResult<i64> {
    diesel::sql_query(sql).get_result::<Number>(conn).map(|row| row.n)
}

fn read_jobs(queue: &Queue, path: &Path, conn: Conn) {
    let mut conn = Some(conn);
    loop {
        let jobs = match queue.take(1, Duration::from_secs(60)) {
            Taken::Jobs(jobs) => jobs,
            Taken::Idle => continue,
            Taken::Closed => return,
        };
        for mut job in jobs.into_iter().filter(|job| job.claim()) {
            if conn.is_none() {
                conn = connect_reader(path).ok();
            }
            let Some(open) = conn.as_mut() else {
                job.finish(Some(DbError::Unavailable(None)));
                continue;
            };
            let ran = job.run(open);
            if ran == Ran::Panicked {
                conn = None;
            }
            job.finish(own_failure(ran));
        }
    }
}

/// What a job is told that cannot tell it itself.
fn own_failure(ran: Ran) -> Option<DbError> {
    (ran == Ran::Panicked).then_some(DbError::Refused(Error::RollbackTransaction))
}

struct Writer {
    path: PathBuf,
    /// The file that was opened at the start.
    file: Option<(u64, u64)>,
    conn: Option<Conn>,
    health: Arc<Health>,
    /// An fsync failed: see the module doc.
    poisoned: bool,
    /// Something was written since the write-ahead log was truncated.
    dirty: bool,
    truncated: Instant,
    /// When a truncation that a reader kept from happening is tried again while nothing is written.
    retry: Instant,
}

/// Why a whole group came to nothing.
struct GroupFailure {
    error: Error,
    at_commit: bool,
}

impl Writer {
    fn serve(&mut self, queue: &Queue) {
        loop {
            match queue.take(GROUP, IDLE) {
                Taken::Jobs(jobs) => self.commit_together(jobs),
                Taken::Idle if self.dirty && Instant::now() >= self.retry => self.checkpoint("TRUNCATE"),
                Taken::Idle => {}
                Taken::Closed => break,
            }
            self.copy_back();
        }
        if self.poisoned {
            // Closing the connection would checkpoint, and so trust pages that may be lost.
            std::mem::forget(self.conn.take());
        } else {
            self.checkpoint("TRUNCATE");
        }
    }

    /// One transaction for all `jobs`. A group whose transaction breaks in the middle (full disk)
    /// answers the jobs that had run; the others get a transaction of their own.
    fn commit_together(&mut self, jobs: Vec<Box<dyn Job>>) {
        let mut waiting: Vec<_> = jobs.into_iter().filter(|job| job.claim()).collect();
        while !waiting.is_empty() {
            let Ok(mut conn) = self.connection() else {
                for job in waiting {
                    job.finish(Some(DbError::Unavailable(None)));
                }
                return;
            };
            let mut ran = Vec::with_capacity(waiting.len());
            match run_group(&mut conn, &mut waiting, &mut ran) {
                Ok(()) => {
                    self.conn = Some(conn);
                    self.dirty = true;
                    self.health.set_problem(None);
                    self.health.committed(ran.iter().filter(|(_, ran)| *ran == Ran::Done).count());
                    for (job, ran) in ran {
                        job.finish(own_failure(ran));
                    }
                }
                Err(failure) => self.fail(conn, &failure, ran),
            }
        }
    }

    fn fail(&mut self, conn: Conn, failure: &GroupFailure, ran: Vec<(Box<dyn Job>, Ran)>) {
        let message = innermost(&failure.error).to_string();
        tracing::error!(reason = message, "a write transaction failed");
        let lost = failure.at_commit && message.contains("disk I/O error");
        if lost {
            self.poisoned = true;
            std::mem::forget(conn);
            self.health.set_problem(Some(format!(
                "{message} at commit: nothing is written any more; check the disk and restart"
            )));
        } else {
            // Its transaction state is unknown; a new connection's is not.
            drop(conn);
            self.health.set_problem(Some(message.clone()));
        }
        for (job, ran) in ran {
            let copy = Error::DatabaseError(DatabaseErrorKind::Unknown, Box::new(message.clone()));
            let shared = if lost { DbError::Unknown(Some(copy)) } else { DbError::Unavailable(Some(copy)) };
            job.finish(Some(own_failure(ran).unwrap_or(shared)));
        }
    }

    /// The connection, with a transaction begun.
    fn connection(&mut self) -> Result<Conn, ()> {
        if self.poisoned {
            return Err(());
        }
        if identity(&self.path) != self.file {
            // What is written now would be in a file that no restart finds.
            self.poisoned = true;
            self.health.set_problem(Some(
                "the database file was moved or replaced: nothing is written any more; stop the daemon and put it back"
                    .to_owned(),
            ));
            return Err(());
        }
        let conn = self.conn.take().map_or_else(|| connect_checked(&self.path), Ok);
        let mut conn = conn.map_err(|error| self.health.set_problem(Some(error.to_string())))?;
        match begin(&mut conn) {
            Ok(()) => Ok(conn),
            Err(error) => {
                self.health.set_problem(Some(error.to_string()));
                Err(())
            }
        }
    }

    /// Keeps the write-ahead log short and, from time to time, free of deleted bytes.
    fn copy_back(&mut self) {
        if self.dirty && self.truncated.elapsed() > TRUNCATE_EVERY {
            return self.checkpoint("TRUNCATE");
        }
        // After a checkpoint the next commit begins it anew and cuts it (`journal_size_limit`).
        if fs::metadata(with_ending(&self.path, "-wal")).is_ok_and(|meta| meta.len() > WAL_BYTES) {
            self.checkpoint("PASSIVE");
        }
    }

    fn checkpoint(&mut self, mode: &str) {
        let Some(Conn::Sqlite(conn)) = &mut self.conn else { return };
        if self.poisoned {
            return;
        }
        // A reader in the way is no error here but a row that says "busy".
        let patience = |ms: u32| format!("PRAGMA busy_timeout = {ms}");
        let _ = conn.batch_execute(&patience(BUSY_CHECKPOINT));
        let done = diesel::sql_query(format!("PRAGMA wal_checkpoint({mode})")).get_result::<Checkpoint>(conn);
        let _ = conn.batch_execute(&patience(BUSY));
        if mode == "TRUNCATE" {
            (self.truncated, self.retry) = (Instant::now(), Instant::now() + RETRY);
        }
        match done {
            Ok(Checkpoint { busy: 0 }) if mode == "TRUNCATE" => self.dirty = false,
            Err(error) if error.to_string().contains("disk I/O error") => {
                self.poisoned = true;
                self.health.set_problem(Some(format!(
                    "{error} at checkpoint: nothing is written any more; check the disk and restart"
                )));
            }
            // A reader is in the way, or the disk is full: the log keeps everything until the next time.
            Ok(_) | Err(_) => {}
        }
    }
}

/// The row that `PRAGMA wal_checkpoint` answers with.
#[derive(QueryableByName)]
struct Checkpoint {
    #[diesel(sql_type = diesel::sql_types::Integer)]
    busy: i32,
}

fn begin(conn: &mut Conn) -> QueryResult<()> {
    match conn {
        Conn::Sqlite(conn) => AnsiTransactionManager::begin_transaction_sql(conn, "BEGIN IMMEDIATE"),
        Conn::Postgres(_) => Err(Error::BrokenTransactionManager),
    }
}

/// Runs `waiting` job by job and commits. Jobs that ran are in `ran` with what they did; jobs that were not reached stay in `waiting`.
fn run_group(
    conn: &mut Conn,
    waiting: &mut Vec<Box<dyn Job>>,
    ran: &mut Vec<(Box<dyn Job>, Ran)>,
) -> Result<(), GroupFailure> {
    waiting.reverse();
    let result = loop {
        let Some(mut job) = waiting.pop() else { break commit(conn) };
        let (outcome, broken) = in_savepoint(conn, job.as_mut());
        ran.push((job, outcome));
        if let Err(error) = broken {
            break Err(GroupFailure { error, at_commit: false });
        }
    };
    waiting.reverse();
    result
}

fn commit(conn: &mut Conn) -> Result<(), GroupFailure> {
    let Conn::Sqlite(conn) = conn else { return Ok(()) };
    AnsiTransactionManager::commit_transaction(conn).map_err(|error| GroupFailure { error, at_commit: true })
}

/// Runs one job. The second part is an error if the surrounding transaction is gone: SQLite rolls
/// all of it back by itself on a full disk, and the savepoint with it.
fn in_savepoint(conn: &mut Conn, job: &mut dyn Job) -> (Ran, QueryResult<()>) {
    if let Err(error) = savepoint(conn) {
        return (Ran::Failed, Err(error));
    }
    let ran = job.run(conn);
    let Conn::Sqlite(conn) = conn else { return (ran, Err(Error::BrokenTransactionManager)) };
    let end = match ran {
        Ran::Done => AnsiTransactionManager::commit_transaction(conn),
        Ran::Failed => AnsiTransactionManager::rollback_transaction(conn),
        Ran::Panicked => roll_back_to(conn, 1),
    };
    (ran, end)
}

fn savepoint(conn: &mut Conn) -> QueryResult<()> {
    match conn {
        Conn::Sqlite(conn) => AnsiTransactionManager::begin_transaction(conn),
        Conn::Postgres(_) => Err(Error::BrokenTransactionManager),
    }
}

/// Undoes the transactions that a panic left open inside a job.
fn roll_back_to(conn: &mut SqliteConnection, depth: u32) -> QueryResult<()> {
    type Manager = AnsiTransactionManager;
    loop {
        let now = Manager::transaction_manager_status_mut(conn).transaction_depth()?;
        if now.map_or(0, NonZeroU32::get) <= depth {
            return Ok(());
        }
        Manager::rollback_transaction(conn)?;
    }
}

/// The error that started it, where diesel wraps it because the rollback failed too.
fn innermost(error: &Error) -> &Error {
    match error {
        Error::RollbackErrorOnCommit { commit_error, .. } => innermost(commit_error),
        other => other,
    }
}
