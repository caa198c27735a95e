//! Threads that own device sessions, in three lanes, and the way a request takes through them.
//!
//! Fast (EC, AES, HMAC), slow (RSA) and admin (make, destroy, inspect) lanes, so that a 4 ms RSA-4096
//! never stands before a 40 us ES256. A thread takes a job, then what is already queued, up to 16 and
//! for about a millisecond, and answers all of it at once: waking the event loop once per signature
//! costs a quarter of the throughput (hsm.md 2.10). It never waits for more to come.
//!
//! Per job: skip it if its caller has gone or its deadline has passed; call; on a void session open
//! again and retry once; on a device that is away report to `recovery`, which opens the breaker. A job is
//! one call, but for a rewrap within the device: its two follow each other, so that no DEK is queued.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot};

use crate::seal::SealError;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::devices::DeviceName;
use crate::seal::driver::Driver;
use crate::seal::gate::Gate;
use crate::seal::guarded::Arena;
use crate::seal::key::KeyRef;
use crate::seal::queue::Queue;
use crate::seal::recovery::Breaker;
use crate::seal::request::{Answer, Output, Request};

pub(crate) use crate::seal::queue::Priority;

/// Jobs answered together at the most.
const BATCH: usize = 16;
/// A batch is answered after this time even if more is queued.
const BATCH_TIME: Duration = Duration::from_millis(1);
/// How often an idle thread looks whether it was abandoned.
const IDLE: Duration = Duration::from_millis(500);

/// What a caller wants kept for as long as its call may run.
pub(crate) type Held = Box<dyn Send>;

struct Job {
    request: Request,
    /// Dropped when the job's call has ended or will never begin, whether or not anybody waits for it.
    held: Held,
    deadline: Instant,
    reply: oneshot::Sender<Result<Answer, SealError>>,
}

/// What a watching thread can see of a worker.
pub(crate) struct Pulse {
    /// Milliseconds since the lanes started at which the present call began; 0 while idle.
    busy_since: AtomicU64,
    /// Set once the thread was given up; it ends when its call returns.
    abandoned: AtomicBool,
    /// The present call is background work.
    in_background: AtomicBool,
    /// Cleared when the thread ends.
    alive: AtomicBool,
}

impl Pulse {
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }
}

impl Lane {
    /// Gives a thread up: it ends when its call returns.
    pub(crate) fn abandon(&self, pulse: &Pulse) {
        pulse.abandoned.store(true, Ordering::Release);
        self.release(pulse);
    }

    /// The thread's background work, if it was that, is over or hangs.
    fn release(&self, pulse: &Pulse) {
        if pulse.in_background.swap(false, Ordering::AcqRel) {
            self.queue.release();
        }
    }

    /// The lane that makes and destroys keys: its calls may take seconds.
    pub(crate) const fn is_admin(&self) -> bool {
        self.read_write
    }
}

/// Notes the end of a thread, also by a panic: another one takes its place then.
struct Ends<'a> {
    lane: &'a Lane,
    pulse: &'a Pulse,
}

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.lane.release(self.pulse);
        self.pulse.alive.store(false, Ordering::Release);
    }
}

/// One lane.
pub(crate) struct Lane {
    name: &'static str,
    read_write: bool,
    queue: Queue<Job>,
    /// DEKs that come from other devices: as many as may be wrapped at a time.
    pub(crate) arrivals: Semaphore,
    pub(crate) pulses: std::sync::Mutex<Vec<Arc<Pulse>>>,
    pub(crate) width: usize,
}

/// Counts for metrics and status.
#[derive(Default)]
pub(crate) struct Counters {
    /// Threads that hang inside the module now.
    pub(crate) stuck: AtomicUsize,
    /// Calls that met a missing or unfit key.
    pub(crate) key_failures: AtomicU64,
}

/// The three lanes of one device.
pub(crate) struct Lanes {
    pub(crate) device: DeviceName,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) arena: Arena,
    pub(crate) breaker: Breaker,
    pub(crate) counters: Counters,
    pub(crate) gate: Gate,
    pub(crate) fast: Arc<Lane>,
    pub(crate) slow: Arc<Lane>,
    pub(crate) admin: Arc<Lane>,
    pub(crate) deadline: Duration,
    started: Instant,
}

/// Sizes of the lanes.
pub(crate) struct Sizes {
    pub(crate) fast: usize,
    pub(crate) slow: usize,
    pub(crate) queue: usize,
    pub(crate) deadline: Duration,
}

impl Lanes {
    /// Makes the lanes and starts their threads.
    pub(crate) fn start(
        device: DeviceName,
        driver: Box<dyn Driver>,
        arena: Arena,
        sizes: &Sizes,
    ) -> std::io::Result<Arc<Self>> {
        let lane = |name, width: usize, read_write| {
            let background = (width / 2).max(1);
            Arc::new(Lane {
                name,
                read_write,
                queue: Queue::new(sizes.queue, background),
                arrivals: Semaphore::new(background),
                pulses: std::sync::Mutex::default(),
                width: width.max(1),
            })
        };
        let lanes = Arc::new(Self {
            device,
            driver,
            arena,
            breaker: Breaker::default(),
            counters: Counters::default(),
            gate: Gate::default(),
            fast: lane("fast", sizes.fast, false),
            slow: lane("slow", sizes.slow, false),
            // One thread makes keys: modules race when two create objects at once (softhsm#576).
            admin: lane("admin", 1, true),
            deadline: sizes.deadline,
            started: Instant::now(),
        });
        for lane in lanes.all() {
            for _ in 0..lane.width {
                lanes.spawn(lane)?;
            }
        }
        Ok(lanes)
    }

    pub(crate) fn all(&self) -> [&Arc<Lane>; 3] {
        [&self.fast, &self.slow, &self.admin]
    }

    /// Starts one more thread for a lane.
    pub(crate) fn spawn(self: &Arc<Self>, lane: &Arc<Lane>) -> std::io::Result<()> {
        let pulse = Arc::new(Pulse {
            busy_since: AtomicU64::new(0),
            abandoned: AtomicBool::new(false),
            in_background: AtomicBool::new(false),
            alive: AtomicBool::new(true),
        });
        let (lanes, of, seen) = (Arc::clone(self), Arc::clone(lane), Arc::clone(&pulse));
        std::thread::Builder::new().name(format!("seal-{}", lane.name)).spawn(move || {
            let _ends = Ends { lane: &of, pulse: &seen };
            Worker { lanes: &lanes, lane: &of, pulse: &seen, session: None }.run();
        })?;
        lane.pulses.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(pulse);
        Ok(())
    }

    pub(crate) fn queued(&self) -> [usize; 3] {
        self.all().map(|lane| lane.queue.len())
    }

    /// Lets the threads finish what is queued and end.
    pub(crate) fn close(&self) {
        for lane in self.all() {
            lane.queue.close();
        }
    }

    /// Waits until the threads have ended, for at most `patience`.
    pub(crate) fn join(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let running = |lane: &Arc<Lane>| {
            let pulses = lane.pulses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            pulses.iter().any(|pulse| pulse.is_alive())
        };
        while Instant::now() < until && self.all().into_iter().any(running) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// How long a worker has been inside one call; `None` if it is idle.
    pub(crate) fn busy_for(&self, pulse: &Pulse) -> Option<Duration> {
        match pulse.busy_since.load(Ordering::Acquire) {
            0 => None,
            since => Some(Duration::from_millis(self.millis().saturating_sub(since))),
        }
    }

    pub(crate) fn lane_of(&self, key: &KeyRef) -> &Lane {
        if key.is_slow() { &self.slow } else { &self.fast }
    }

    pub(crate) async fn ask(
        &self,
        lane: &Lane,
        priority: Priority,
        flow: u64,
        request: Request,
        operation: &'static str,
    ) -> Result<Answer, SealError> {
        self.ask_holding(lane, (priority, flow), request, operation, Box::new(())).await
    }

    pub(crate) async fn ask_holding(
        &self,
        lane: &Lane,
        (priority, flow): (Priority, u64),
        request: Request,
        operation: &'static str,
        held: Held,
    ) -> Result<Answer, SealError> {
        self.breaker.admit()?;
        let (reply, answer) = oneshot::channel();
        // Making an RSA key takes seconds on some devices; everything else shares one deadline.
        let patience = if lane.read_write { self.deadline * 15 } else { self.deadline };
        let deadline = Instant::now() + patience;
        let job = Job { request, held, deadline, reply };
        lane.queue.push(priority, flow, job).map_err(|_| full())?;
        let started = Instant::now();
        let result = match tokio::time::timeout_at(deadline.into(), answer).await {
            Ok(Ok(result)) => result,
            // The thread ended or the time is up: for what changes the device, nobody knows.
            _ if lane.read_write => Err(SealError::Unknown {
                operation,
                source: BackendError::Unknown { function: operation, code: 0 },
            }),
            _ => Err(late()),
        };
        self.device.count(operation, result.is_ok(), started.elapsed());
        result
    }
}

fn late() -> SealError {
    SealError::Unavailable {
        retry_after: Duration::from_secs(1),
        reason: "the device did not answer within the deadline".to_owned(),
    }
}

/// There is more work than the device does in time.
pub(crate) fn full() -> SealError {
    SealError::Busy { what: "the device's queue", retry_after: Duration::from_secs(1) }
}

/// Asked for something that the key or the answer does not fit: a bug here.
pub(crate) fn mismatch(operation: &'static str) -> SealError {
    SealError::Refused { operation, source: BackendError::Refused { function: operation, code: 0 } }
}

/// A thread's view of its lane.
struct Worker<'a> {
    lanes: &'a Lanes,
    lane: &'a Lane,
    pulse: &'a Pulse,
    /// The session and the epoch in which it was opened.
    session: Option<(u64, Box<dyn Backend>)>,
}

impl Worker<'_> {
    fn run(&mut self) {
        let mut answers = Vec::with_capacity(BATCH);
        loop {
            let first = match self.lane.queue.pop(IDLE) {
                Ok(Some(job)) => job,
                Ok(None) if self.pulse.abandoned.load(Ordering::Acquire) => return,
                Ok(None) => continue,
                Err(_) => return,
            };
            let began = Instant::now();
            let mut next = Some(first);
            while let Some((priority, job)) = next {
                self.pulse.in_background.store(priority == Priority::Background, Ordering::Release);
                if let Some(answer) = self.serve(job) {
                    answers.push(answer);
                }
                self.lane.release(self.pulse);
                let more = answers.len() < BATCH && began.elapsed() < BATCH_TIME;
                next = if more { self.lane.queue.try_pop() } else { None };
            }
            for (reply, answer) in answers.drain(..) {
                // A caller that has gone takes its answer with it: guarded buffers wipe themselves.
                let _ = reply.send(answer);
            }
            if self.pulse.abandoned.load(Ordering::Acquire) {
                return;
            }
        }
    }

    #[expect(clippy::type_complexity, reason = "a reply and what to send into it")]
    fn serve(
        &mut self,
        job: Job,
    ) -> Option<(oneshot::Sender<Result<Answer, SealError>>, Result<Answer, SealError>)> {
        if job.reply.is_closed() {
            return None;
        }
        if Instant::now() >= job.deadline {
            return Some((job.reply, Err(late())));
        }
        if let Err(error) = self.lanes.breaker.admit() {
            return Some((job.reply, Err(error)));
        }
        self.pulse.busy_since.store(self.lanes.millis(), Ordering::Release);
        let answer = self.perform(job.request);
        self.pulse.busy_since.store(0, Ordering::Release);
        drop(job.held);
        Some((job.reply, answer))
    }

    /// Calls once, and once more after a void session was replaced.
    fn perform(&mut self, mut request: Request) -> Result<Answer, SealError> {
        let mut result = self.attempt(&mut request);
        if let Err(BackendError::SessionLost { function, code }) = result {
            tracing::info!(function, code, "Device session lost, opening another");
            self.lanes.driver.bump_epoch();
            result = self.attempt(&mut request);
        }
        match result {
            // The device was not asked.
            Ok(Output::Answer(expired @ Answer::Expired)) => Ok(expired),
            Ok(output) => {
                if let Some(key) = request.key() {
                    self.lanes.breaker.remember(key);
                }
                Ok(request.finish(output))
            }
            Err(error) => Err(self.explain(&request, error)),
        }
    }

    fn attempt(&mut self, request: &mut Request) -> Result<Output, BackendError> {
        let driver = self.lanes.driver.as_ref();
        let epoch = driver.epoch();
        let mut session = match self.session.take() {
            Some((since, session)) if since == epoch => session,
            // Closed before the next one is opened: some devices have few.
            void => {
                drop(void);
                driver.open(self.lane.read_write)?
            }
        };
        let result = request.call(session.as_mut(), driver);
        // After anything else an operation may still be active in the session (HS-7): never use it again.
        if matches!(result, Ok(_) | Err(BackendError::Rejected { .. } | BackendError::Missing)) {
            self.session = Some((epoch, session));
        }
        result
    }

    fn explain(&self, request: &Request, error: BackendError) -> SealError {
        let operation = request.name();
        if matches!(error, BackendError::Missing | BackendError::Unfit(_)) {
            self.lanes.counters.key_failures.fetch_add(1, Ordering::Relaxed);
        }
        match error {
            BackendError::Rejected { .. } => SealError::Rejected,
            BackendError::Missing => match request.key() {
                Some(key) => SealError::KeyMissing { key: key.id() },
                None => mismatch(operation),
            },
            BackendError::Unfit(reason) => match request.key() {
                Some(key) => SealError::KeyUnfit { key: key.id(), reason },
                None => mismatch(operation),
            },
            BackendError::Unknown { .. } => SealError::Unknown { operation, source: error },
            BackendError::Refused { function: "guarded memory", .. } => {
                SealError::Busy { what: "guarded memory", retry_after: Duration::from_secs(1) }
            }
            BackendError::Refused { .. } => SealError::Refused { operation, source: error },
            BackendError::Stopped(reason) => self.lanes.breaker.stop(reason),
            BackendError::SelfTest(_) => {
                if let Some(key) = request.key() {
                    self.lanes.breaker.suspect(key);
                }
                self.lanes.breaker.open(error.to_string())
            }
            // After the second lost session in a row the device is not well.
            BackendError::Away { .. } | BackendError::SessionLost { .. } => {
                let unavailable = self.lanes.breaker.open(error.to_string());
                if self.lane.read_write && request.alters() {
                    SealError::Unknown { operation, source: error }
                } else {
                    unavailable
                }
            }
        }
    }
}
