//! One piece of work between its intent and its outcome.
//!
//! Whatever way it leaves, the log gets exactly one outcome for every durable intent: the one given
//! to [`Pending::finish`], or, when the value is dropped in the middle, what is known then.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::audit::append::Appender;
use crate::audit::model::{Event, Note, Outcome};
use crate::audit::record::Subject;
use crate::audit::{AuditCode, AuditError};
use crate::clock::Clock;
use crate::identity::Caller;

const NOT_STARTED: &str = "not-started";

enum Step {
    /// The intent is on its way.
    Waiting(oneshot::Receiver<()>),
    /// The intent is durable and the work has not begun.
    Ready,
    /// The work has begun.
    Working,
    /// The outcome is queued, or there is none to write.
    Closed,
}

/// Work whose intent is durable. Dropped before [`Pending::run`], it was not started.
#[must_use = "dropped, the log says that the work was not started"]
pub struct Pending {
    appender: Appender,
    clock: Arc<dyn Clock>,
    subject: Subject,
    note: Note,
    step: Step,
}

impl Pending {
    /// Makes the intent durable, or fails within the deadline.
    pub(super) async fn begin(
        appender: &Appender,
        clock: &Arc<dyn Clock>,
        caller: &Caller,
        event: &Event,
    ) -> Result<Self, AuditError> {
        let subject = Subject::new(caller, event);
        let intent = subject.intent(clock.now(), &event.details);
        let (waiter, answer) = oneshot::channel();
        let mut pending = Self {
            appender: appender.clone(),
            clock: Arc::clone(clock),
            subject,
            note: Note::default(),
            step: Step::Waiting(answer),
        };
        let durable = async {
            appender.offer(intent, waiter).await?;
            match &mut pending.step {
                Step::Waiting(answer) => answer.await.map_err(|_| AuditError::Unavailable),
                Step::Ready | Step::Working | Step::Closed => Ok(()),
            }
        };
        timeout(appender.deadline(), durable).await.map_err(|_| AuditError::Unavailable)??;
        pending.step = Step::Ready;
        Ok(pending)
    }

    /// Runs the work, which adds what it learns to the [`Note`], and queues its outcome.
    ///
    /// # Errors
    /// What `work` returns.
    pub async fn run<T, E, F, Fut>(mut self, work: F) -> Result<T, E>
    where
        E: AuditCode,
        F: FnOnce(Note) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.step = Step::Working;
        let result = work(self.note.clone()).await;
        let outcome = result.as_ref().map_or_else(AuditCode::audit_outcome, |_| Outcome::Success);
        self.finish(outcome);
        result
    }

    /// Queues the outcome. Its loss does not undo the work, so nothing waits for its commit.
    fn finish(mut self, outcome: Outcome) {
        let draft = self.subject.outcome(self.clock.now(), outcome, &self.note.take());
        self.step = Step::Closed;
        self.appender.push(draft);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let outcome = match &mut self.step {
            Step::Closed => return,
            // The caller went away, or the work panicked: nobody can say how far it came.
            Step::Working => Outcome::Unknown,
            Step::Ready => Outcome::Failure(NOT_STARTED),
            Step::Waiting(answer) => {
                // Once closed, the appender sees that nobody waits and closes the intent itself. Only
                // an answer that is here already is ours to deal with.
                answer.close();
                if answer.try_recv().is_err() {
                    return;
                }
                Outcome::Failure(NOT_STARTED)
            }
        };
        let draft = self.subject.outcome(self.clock.now(), outcome, &self.note.take());
        self.appender.push(draft);
    }
}
