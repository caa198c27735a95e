//! One piece of work between its intent and its outcome.
//!
//! Whatever way it leaves, the log gets exactly one outcome for every durable intent: the one given
//! to [`Pending::finish`], or, when the value is dropped in the middle, what is known then.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::audit::AuditError;
use crate::audit::append::Appender;
use crate::audit::model::{Event, Note, Outcome};
use crate::audit::record::Subject;
use crate::clock::Clock;
use crate::identity::Caller;

enum Step {
    /// The intent is on its way.
    Waiting(oneshot::Receiver<()>),
    /// The intent is durable.
    Working,
    /// The outcome is queued, or there is none to write.
    Closed,
}

pub(super) struct Pending {
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
                Step::Working | Step::Closed => Ok(()),
            }
        };
        timeout(appender.deadline(), durable).await.map_err(|_| AuditError::Unavailable)??;
        pending.step = Step::Working;
        Ok(pending)
    }

    pub(super) fn note(&self) -> Note {
        self.note.clone()
    }

    /// Queues the outcome. Its loss does not undo the work, so nothing waits for its commit.
    pub(super) async fn finish(mut self, outcome: Outcome) {
        let draft = self.subject.outcome(self.clock.now(), outcome, &self.note.take());
        self.step = Step::Closed;
        self.appender.push(draft).await;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let outcome = match &mut self.step {
            Step::Closed => return,
            // The caller went away, or the work panicked: nobody can say how far it came.
            Step::Working => Outcome::Unknown,
            Step::Waiting(answer) => {
                // Once closed, the appender sees that nobody waits and closes the intent itself. Only
                // an answer that is here already is ours to deal with.
                answer.close();
                if answer.try_recv().is_err() {
                    return;
                }
                Outcome::Failure("not-started")
            }
        };
        let draft = self.subject.outcome(self.clock.now(), outcome, &self.note.take());
        self.appender.push_detached(draft);
    }
}
