//! Jobs that wait for a thread, and the promise each one carries.
//!
//! A job is answered exactly once. It waits a bounded time in a bounded queue; who gives up waiting
//! takes the job back, so that "unavailable" always means "was not done".

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::db::{Conn, DbError};

/// How many jobs may wait for one lane.
const CAPACITY: usize = 1024;
/// How long a job may wait before it is started.
const WAIT: Duration = Duration::from_secs(5);
/// How long one that was started may take: above every limit that a database keeps itself, so this is for
/// one that has stopped without a word.
const RUN: Duration = Duration::from_secs(30);

/// What a job did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ran {
    /// Its closure succeeded: commit.
    Done,
    /// Its closure returned an error: roll back.
    Failed,
    /// Its closure panicked: roll back, and trust nothing about the connection's nesting.
    Panicked,
}

/// A closure with its reply channel, the types erased.
pub(super) trait Job: Send {
    /// Whether the job is still wanted; from now on it will be answered by whoever claimed it.
    fn claim(&self) -> bool;
    /// Whether it writes.
    fn writes(&self) -> bool;
    /// Runs the closure and keeps its result.
    fn run(&mut self, conn: &mut Conn) -> Ran;
    /// Answers: with the closure's result or, if that did not come to be, with the failure.
    fn finish(self: Box<Self>, failure: Option<DbError>);
}

struct Task<T, E, F> {
    work: Option<F>,
    result: Option<Result<T, E>>,
    reply: oneshot::Sender<Result<T, E>>,
    claimed: Arc<AtomicBool>,
    writes: bool,
}

impl<T, E, F> Job for Task<T, E, F>
where
    T: Send,
    E: From<DbError> + Send,
    F: FnOnce(&mut Conn) -> Result<T, E> + Send,
{
    fn claim(&self) -> bool {
        // A write is done even if its caller has gone: "queued" must not depend on who listens.
        let wanted = self.writes || !self.reply.is_closed();
        !self.claimed.swap(true, Ordering::AcqRel) && wanted
    }

    fn writes(&self) -> bool {
        self.writes
    }

    fn run(&mut self, conn: &mut Conn) -> Ran {
        let Some(work) = self.work.take() else { return Ran::Failed };
        // Unwind safety: the connection is rolled back or replaced after a panic, and nothing else is shared.
        match catch_unwind(AssertUnwindSafe(|| work(conn))) {
            Ok(result) => {
                let ran = if result.is_ok() { Ran::Done } else { Ran::Failed };
                self.result = Some(result);
                ran
            }
            Err(_) => Ran::Panicked,
        }
    }

    fn finish(self: Box<Self>, failure: Option<DbError>) {
        let answer = match (self.result, failure) {
            (Some(result), None) => result,
            // Whatever the closure found may have been the work of a neighbour that came to nothing with it.
            (_, failure) => Err(E::from(failure.unwrap_or(DbError::Unavailable(None)))),
        };
        // The caller may have gone; then nobody wants to know.
        let _ = self.reply.send(answer);
    }
}

/// What a thread finds in its queue.
pub(super) enum Taken {
    /// Jobs, at least one.
    Jobs(Vec<Box<dyn Job>>),
    /// Nothing for the given time.
    Idle,
    /// Nothing, and nothing will come.
    Closed,
}

/// A bounded queue.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    ready: Condvar,
    /// Whether the last answer did not come in time.
    stalled: AtomicBool,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Box<dyn Job>>,
    closed: bool,
}

impl Queue {
    /// Queues `work` and waits for its answer.
    pub(super) async fn submit<T, E, F>(&self, writes: bool, work: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
        F: FnOnce(&mut Conn) -> Result<T, E> + Send + 'static,
    {
        let (reply, mut answer) = oneshot::channel();
        let claimed = Arc::new(AtomicBool::new(false));
        let task = Task { work: Some(work), result: None, reply, claimed: Arc::clone(&claimed), writes };
        let unavailable = || Err(E::from(DbError::Unavailable(None)));
        if !self.push(Box::new(task)) {
            return unavailable();
        }
        let answer = match tokio::time::timeout(WAIT, &mut answer).await {
            Ok(answer) => Some(answer),
            Err(_) if claimed.swap(true, Ordering::AcqRel) => tokio::time::timeout(RUN, answer).await.ok(),
            Err(_) => {
                self.stalled.store(true, Ordering::Relaxed);
                return unavailable();
            }
        };
        self.stalled.store(answer.is_none(), Ordering::Relaxed);
        match answer {
            Some(answer) => answer.unwrap_or_else(|_| unavailable()),
            // It may have been done.
            None if writes => Err(E::from(DbError::Unknown(None))),
            None => unavailable(),
        }
    }

    /// Takes up to `max` jobs; waits for the first one, at most `idle`.
    pub(super) fn take(&self, max: usize, idle: Duration) -> Taken {
        let (mut state, _) = self
            .ready
            .wait_timeout_while(self.lock(), idle, |state| state.jobs.is_empty() && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.jobs.is_empty() {
            return if state.closed { Taken::Closed } else { Taken::Idle };
        }
        let count = state.jobs.len().min(max);
        Taken::Jobs(state.jobs.drain(..count).collect())
    }

    /// Whether answers do not come in time.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Takes no more jobs; those that wait are still done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }

    fn push(&self, job: Box<dyn Job>) -> bool {
        let mut state = self.lock();
        if state.closed || state.jobs.len() >= CAPACITY {
            return false;
        }
        state.jobs.push_back(job);
        drop(state);
        self.ready.notify_one();
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::{Job, Task};
    use crate::db::{Conn, DbError};

    /// What a job answers that found a rule broken, if its transaction ended with `failure`.
    async fn answer(failure: Option<DbError>) -> Result<(), DbError> {
        let (reply, answer) = oneshot::channel();
        let work = None::<fn(&mut Conn) -> Result<(), DbError>>;
        let task = Task {
            work,
            result: Some(Err(DbError::Duplicate)),
            reply,
            claimed: Arc::default(),
            writes: true,
        };
        Box::new(task).finish(failure);
        answer.await.unwrap()
    }

    #[tokio::test]
    async fn what_was_found_beside_work_that_came_to_nothing_is_no_answer() {
        assert!(matches!(answer(None).await, Err(DbError::Duplicate)));
        let failed = answer(Some(DbError::Unavailable(None))).await;
        assert!(matches!(failed, Err(DbError::Unavailable(_))));
    }
}
