//! The breaker, and the thread that brings a device back.
//!
//! One flag says "the device is away" and is looked at before each request (boulder#1003), so nobody
//! hammers a dead device. While it is open, one probe at a time goes through the steps of recovery: open
//! and log in again, look the keys up again and use one, initialise the library again. Only a keyed
//! operation closes the breaker: `C_OpenSession` proves nothing (F4). Threads that hang inside the
//! module are given up and replaced, as many as the lane is wide and no more.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::seal::SealError;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::device::DeviceState;
use crate::seal::driver::Problem;
use crate::seal::envelope::DEK_SLOT_LEN;
use crate::seal::key::{Alg, KeyRef, KeySpec, Pin};
use crate::seal::worker::Lanes;

/// How often the watching thread looks.
const TICK: Duration = Duration::from_millis(100);
/// First and longest pause between probes. With the longest one a device that is back is used again
/// well within the 5 s of HS-5.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Between looks whether a person has changed the PIN or cleared the latch.
const STOPPED_PAUSE: Duration = Duration::from_secs(5);
/// Failed probes before the library itself is initialised again.
const GENTLE_ROUNDS: u32 = 2;

const CLOSED: u8 = 0;
const OPEN: u8 = 1;
const STOPPED: u8 = 2;

/// Says whether the device may be asked.
#[derive(Default)]
pub(crate) struct Breaker {
    /// Looked at on every request, without the lock.
    state: AtomicU8,
    has_key: AtomicBool,
    facts: Mutex<Facts>,
}

#[derive(Default)]
struct Facts {
    reason: String,
    /// A key that worked: what a probe uses.
    key: Option<KeyRef>,
}

impl Breaker {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a request through, or answers it at once.
    pub(crate) fn admit(&self) -> Result<(), SealError> {
        match self.state.load(Ordering::Acquire) {
            CLOSED => Ok(()),
            state => Err(self.refusal(state)),
        }
    }

    fn refusal(&self, state: u8) -> SealError {
        let retry_after = Duration::from_secs(if state == STOPPED { 60 } else { 2 });
        SealError::Unavailable { retry_after, reason: self.facts().reason.clone() }
    }

    /// The device is away: from now on requests are answered at once.
    pub(crate) fn open(&self, reason: String) -> SealError {
        if self.state.compare_exchange(CLOSED, OPEN, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            tracing::warn!(reason, "Device away, breaker opens");
            self.facts().reason = reason;
        }
        self.refusal(self.state.load(Ordering::Acquire).max(OPEN))
    }

    /// A person is needed.
    pub(crate) fn stop(&self, reason: String) -> SealError {
        let news = {
            let mut facts = self.facts();
            let news = facts.reason != reason;
            facts.reason.clone_from(&reason);
            news
        };
        if self.state.swap(STOPPED, Ordering::AcqRel) != STOPPED || news {
            tracing::error!(reason, "Device stopped, somebody has to act");
        }
        self.refusal(STOPPED)
    }

    fn close(&self) {
        if self.state.swap(CLOSED, Ordering::AcqRel) != CLOSED {
            tracing::info!("Device is back, breaker closes");
            self.facts().reason.clear();
        }
    }

    /// Keeps a key that worked for later probes.
    pub(crate) fn remember(&self, key: &KeyRef) {
        if !self.has_key.load(Ordering::Relaxed) && key.is_pinned() {
            self.facts().key = Some(key.clone());
            self.has_key.store(true, Ordering::Relaxed);
        }
    }

    /// A self-test failed with this key: the probes use it, since others may go on to work.
    pub(crate) fn suspect(&self, key: &KeyRef) {
        self.facts().key = Some(key.clone());
        self.has_key.store(true, Ordering::Relaxed);
    }

    pub(crate) fn device_state(&self) -> DeviceState {
        match self.state.load(Ordering::Acquire) {
            CLOSED => DeviceState::Ready,
            OPEN => DeviceState::Away(self.facts().reason.clone()),
            _ => DeviceState::Stopped(self.facts().reason.clone()),
        }
    }
}

/// Tries once to bring the device up; the first try happens before any request is served.
pub(crate) fn first_round(lanes: &Lanes) {
    match lanes.driver.bring_up() {
        Ok(()) => {}
        Err(Problem::Away(reason)) => drop(lanes.breaker.open(reason)),
        Err(Problem::Stopped(reason)) => drop(lanes.breaker.stop(reason)),
    }
}

/// The watching thread: hung workers, and probes while the breaker is open.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    pub(crate) fn start(lanes: &Arc<Lanes>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (of, seen) = (Arc::clone(lanes), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("seal-watch".to_owned()).spawn(move || {
            let mut prober = Prober { lanes: of, round: 0, due: Instant::now(), running: None };
            while !seen.load(Ordering::Acquire) {
                std::thread::sleep(TICK);
                replace_hung(&prober.lanes);
                prober.tick();
            }
        })?;
        Ok(Self { stop, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The loop sleeps and never calls the module itself, so this ends within a tick.
            let _ = thread.join();
        }
    }
}

/// Gives up threads that are inside one call for twice the deadline, and starts others in their place and in
/// that of threads that are gone.
fn replace_hung(lanes: &Arc<Lanes>) {
    let mut stuck = 0;
    for lane in lanes.all() {
        let patience = if lane.is_admin() { lanes.deadline * 30 } else { lanes.deadline * 2 };
        let mut pulses = lane.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        pulses.retain(|pulse| pulse.is_alive());
        let given_up = pulses.iter().filter(|pulse| pulse.is_abandoned()).count();
        // Those that ended by a panic: the lane is not closed while this runs.
        let mut replace = lane.width.saturating_sub(pulses.len() - given_up);
        let gone = replace;
        for pulse in pulses.iter().filter(|pulse| !pulse.is_abandoned()) {
            if lanes.busy_for(pulse).is_some_and(|busy| busy > patience) {
                drop(lanes.breaker.open("a call hangs inside the module".to_owned()));
                // As many as the lane is wide: a module that swallows every thread gets no more.
                if given_up + replace - gone < lane.width {
                    lane.abandon(pulse);
                    replace += 1;
                }
            }
        }
        stuck += given_up + replace - gone;
        drop(pulses);
        for _ in 0..replace {
            if let Err(error) = lanes.spawn(lane) {
                tracing::error!(error = &error as &dyn std::error::Error, "No thread for a device lane");
            }
        }
    }
    lanes.counters.stuck.store(stuck, Ordering::Relaxed);
}

/// One probe at a time, on a thread of its own: a probe may hang like any other call.
struct Prober {
    lanes: Arc<Lanes>,
    round: u32,
    due: Instant,
    running: Option<JoinHandle<Result<(), Problem>>>,
}

impl Prober {
    fn tick(&mut self) {
        if let Some(probe) = self.running.take() {
            if probe.is_finished() {
                let result =
                    probe.join().unwrap_or_else(|_| Err(Problem::Away("the probe panicked".to_owned())));
                self.judge(result);
            } else {
                self.running = Some(probe);
            }
            return;
        }
        if self.lanes.breaker.device_state() == DeviceState::Ready {
            (self.round, self.due) = (0, Instant::now());
        } else if Instant::now() >= self.due {
            let (lanes, round) = (Arc::clone(&self.lanes), self.round);
            let probe = std::thread::Builder::new().name("seal-probe".to_owned());
            self.running = probe.spawn(move || probe_once(&lanes, round)).ok();
        }
    }

    fn judge(&mut self, result: Result<(), Problem>) {
        let pause = match result {
            Ok(()) => {
                self.lanes.breaker.close();
                FIRST_PAUSE
            }
            Err(Problem::Stopped(reason)) => {
                drop(self.lanes.breaker.stop(reason));
                STOPPED_PAUSE
            }
            Err(Problem::Away(reason)) => {
                tracing::debug!(reason, round = self.round, "Device still away");
                FIRST_PAUSE.saturating_mul(1 << self.round.min(3)).min(LONGEST_PAUSE)
            }
        };
        self.round = self.round.saturating_add(1);
        self.due = Instant::now() + pause;
    }
}

/// The steps of recovery, gentle ones first.
fn probe_once(lanes: &Lanes, round: u32) -> Result<(), Problem> {
    lanes.driver.bump_epoch();
    if round < GENTLE_ROUNDS {
        lanes.driver.bring_up()?;
    } else {
        lanes.driver.reinitialise()?;
    }
    let key = lanes.breaker.facts().key.clone();
    let used = lanes.driver.open(false).and_then(|mut session| match key {
        Some(key) => use_key(session.as_mut(), &key, lanes),
        None => Ok(()),
    });
    match used {
        // The token answers; that this one key is missing or unfit is its own incident.
        Ok(()) | Err(BackendError::Missing | BackendError::Unfit(_)) => Ok(()),
        Err(BackendError::Stopped(reason)) => Err(Problem::Stopped(reason)),
        Err(other) => Err(Problem::Away(other.to_string())),
    }
}

/// A keyed operation that changes nothing.
fn use_key(session: &mut dyn Backend, key: &KeyRef, lanes: &Lanes) -> Result<(), BackendError> {
    match (key.spec, &*key.pin) {
        // Finding a KEK opens its canary; one more unwrap of it proves the session.
        (KeySpec::Kek, Pin::Canary(canary)) => {
            let mut out = lanes
                .arena
                .try_take(DEK_SLOT_LEN)
                .map_err(|_| BackendError::Refused { function: "guarded memory", code: 0 })?;
            match session.unwrap(key, canary, &[0], &mut out) {
                // Another AAD than the canary's: a well device refuses it and then opens the canary.
                Err(BackendError::Rejected { .. }) => Ok(()),
                other => other,
            }
        }
        (KeySpec::HmacSha256, _) => session.mac(key, b"lacre/probe/v1").map(drop),
        (spec, _) => {
            let Some(alg) = Alg::for_spec(spec) else { return Ok(()) };
            let digest = alg.digest(b"lacre/probe/v1");
            let signature = session.sign(key, alg, &digest)?;
            lanes.gate.known(key).map_or(Ok(()), |known| known.judge(alg, &digest, &signature))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::{BackendError, Breaker, DeviceState, KeyRef, Problem, Watch};
    use crate::seal::KeyReport;
    use crate::seal::backend::Backend;
    use crate::seal::driver::{Driver, Known};
    use crate::seal::guarded::{Arena, Options, SecretBuf};
    use crate::seal::key::{Alg, KeySpec, PublicKey, Signature, WrappedDek};
    use crate::seal::worker::{Lanes, Sizes};

    /// A device whose first MAC panics, as a mistake in its driver would.
    #[derive(Clone, Default)]
    struct Faulty(Arc<AtomicU64>);

    const NOT_ASKED: BackendError = BackendError::Missing;

    impl Backend for Faulty {
        fn wrap(&mut self, _: &KeyRef, _: &SecretBuf, _: &[u8]) -> Result<WrappedDek, BackendError> {
            Err(NOT_ASKED)
        }

        fn unwrap(
            &mut self,
            _: &KeyRef,
            _: &WrappedDek,
            _: &[u8],
            _: &mut SecretBuf,
        ) -> Result<(), BackendError> {
            Err(NOT_ASKED)
        }

        fn sign(&mut self, _: &KeyRef, _: Alg, _: &[u8]) -> Result<Signature, BackendError> {
            Err(NOT_ASKED)
        }

        fn mac(&mut self, _: &KeyRef, _: &[u8]) -> Result<[u8; 32], BackendError> {
            assert!(self.0.fetch_add(1, Ordering::Relaxed) > 0, "on purpose");
            Ok([7; 32])
        }

        fn public_key(&mut self, _: &KeyRef) -> Result<PublicKey, BackendError> {
            Err(NOT_ASKED)
        }

        fn generate(&mut self, _: &KeyRef, _: Option<&SecretBuf>) -> Result<KeyRef, BackendError> {
            Err(NOT_ASKED)
        }

        fn destroy(&mut self, _: &KeyRef) -> Result<(), BackendError> {
            Err(NOT_ASKED)
        }

        fn inspect(&mut self, _: &KeyRef) -> Result<KeyReport, BackendError> {
            Err(NOT_ASKED)
        }
    }

    impl Driver for Faulty {
        fn open(&self, _: bool) -> Result<Box<dyn Backend>, BackendError> {
            Ok(Box::new(self.clone()))
        }

        fn bring_up(&self) -> Result<(), Problem> {
            Ok(())
        }

        fn reinitialise(&self) -> Result<(), Problem> {
            Ok(())
        }

        fn take_down(&self) -> Result<(), Problem> {
            Ok(())
        }

        fn epoch(&self) -> u64 {
            1
        }

        fn bump_epoch(&self) {}

        fn known(&self) -> Known {
            Known::default()
        }

        fn address(&self) -> String {
            String::new()
        }

        fn unlatch(&self, _: bool) -> Result<bool, String> {
            Ok(true)
        }

        fn capabilities(&self) -> Result<serde_json::Value, BackendError> {
            Err(NOT_ASKED)
        }
    }

    #[tokio::test]
    async fn a_thread_that_ended_by_a_panic_is_replaced() {
        let options = Options { slots: 4, allow_unlocked: true, ..Options::default() };
        let arena = Arena::new(&options).unwrap();
        let sizes = Sizes { fast: 1, slow: 1, queue: 8, deadline: Duration::from_secs(2) };
        let lanes =
            Lanes::start(crate::seal::DeviceName::default(), Box::new(Faulty::default()), arena, &sizes)
                .unwrap();
        let watch = Watch::start(&lanes).unwrap();
        let key = KeyRef::plan(KeySpec::HmacSha256).unwrap();

        assert!(lanes.mac(&key, b"m").await.is_err());
        // Its one thread is gone: this waits for the next.
        assert_eq!(lanes.mac(&key, b"m").await.unwrap(), [7; 32]);

        assert_eq!(lanes.counters.stuck.load(Ordering::Relaxed), 0);
        watch.stop();
        lanes.close();
    }

    #[test]
    fn a_probe_uses_the_key_that_is_suspect() {
        let [good, bad] = [(); 2].map(|()| KeyRef::plan(KeySpec::EcP256).unwrap());
        let breaker = Breaker::default();
        breaker.remember(&good);
        breaker.suspect(&bad);
        breaker.remember(&good);
        assert!(breaker.facts().key.as_ref() == Some(&bad));
        assert_eq!(breaker.device_state(), DeviceState::Ready);
    }
}
