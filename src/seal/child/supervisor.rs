//! Starts the sealer process, reads what it says, and starts another one when it has ended.
//!
//! One thread for the life of the device. It is the thread that spawns, because the process asks the
//! kernel to be ended with it. A process that ends is replaced at once, one that keeps ending after
//! growing pauses. PIN tries are not this file's business: the latch, which is on disk, counts a login
//! that was begun and not ended, so a module that dies in `C_Login` gets two and then none.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::seal::child::Start;
use crate::seal::child::account::Account;
use crate::seal::child::client::{Client, Link};
use crate::seal::child::pipe::{Inbox, Outbox};
use crate::seal::child::wire::{Body, Frame, Garbled, Kind, NO_ID};
use crate::seal::device::{DeviceState, DeviceStatus, StartError};
use crate::seal::guarded::{Arena, SecretBuf};

/// How often the thread looks up from reading.
const TICK: Duration = Duration::from_millis(100);
/// A process that gave no sign of life for so long is ended.
const HUNG: Duration = Duration::from_secs(10);
/// A process that is told to end may close its sessions first; a hanging call costs it three seconds.
const CLOSING: Duration = Duration::from_secs(6);
/// Between the end of its socket and the end of a process.
const LAST_MOMENT: Duration = Duration::from_millis(250);
/// A process that lived for so long did not end because of how it began.
const CALM: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Between starts that fail for a reason that a person has to remove.
const UNFIT_PAUSE: Duration = Duration::from_secs(5);

/// Everything that a start needs.
pub(super) struct Plan {
    pub(super) program: PathBuf,
    /// Who the process runs as, if somebody else than the daemon.
    pub(super) user: Option<Account>,
    pub(super) start: Start,
    /// What the process is to log, whenever that changes.
    pub(super) log_filter: watch::Receiver<String>,
    /// The PIN that was typed.
    pub(super) pin: Option<Arc<SecretBuf>>,
}

/// The supervising thread.
pub(crate) struct Supervisor {
    closing: Arc<AtomicBool>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// How a life of the process ended.
enum End {
    /// It was told to.
    Closed,
    /// It said that the device cannot be started.
    Unfit(StartError),
    /// By itself, or for a reason that may pass.
    Died(String),
}

impl Supervisor {
    /// Starts the thread and with it the process. What the first start says comes over `first`.
    pub(super) fn start(
        client: Arc<Client>,
        plan: Plan,
        arena: &Arena,
        first: mpsc::Sender<Result<(), StartError>>,
    ) -> io::Result<Self> {
        let closing = Arc::new(AtomicBool::new(false));
        let arena = arena.clone();
        let watch = Watch {
            client,
            plan,
            arena,
            closing: Arc::clone(&closing),
            first: Some(first),
            restarts: 0,
            has_greeted: false,
        };
        let thread = std::thread::Builder::new().name("sealer-watch".to_owned());
        let thread = thread.spawn(move || watch.run())?;
        Ok(Self { closing, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the process in order and waits for it, for a few seconds.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("The thread of the sealer process panicked");
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // A device that was never closed: the thread ends the process and then itself.
        self.closing.store(true, Ordering::Release);
    }
}

struct Watch {
    client: Arc<Client>,
    plan: Plan,
    arena: Arena,
    closing: Arc<AtomicBool>,
    first: Option<mpsc::Sender<Result<(), StartError>>>,
    restarts: u64,
    /// The process that is there has said hello. Before, it takes whatever it is sent for its end.
    has_greeted: bool,
}

/// How long to wait before the next start after `failures` short lives in a row.
fn pause_after(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        more => FIRST_PAUSE.saturating_mul(1 << (more - 1).min(16)).min(LONGEST_PAUSE),
    }
}

impl Watch {
    fn run(mut self) {
        let mut failures = 0;
        while !self.is_closing() {
            let began = Instant::now();
            let end = self.live();
            if began.elapsed() >= CALM {
                failures = 0;
            }
            let (reason, pause) = match end {
                End::Closed => break,
                End::Unfit(error) => {
                    let reason = error.to_string();
                    // Whoever started the device hears of it and does without; unless it was waited for in vain
                    // before: then this one goes on, since nobody else will.
                    if self.first.take().is_some_and(|first| first.send(Err(error)).is_ok()) {
                        break;
                    }
                    (reason, UNFIT_PAUSE)
                }
                End::Died(reason) => (reason, pause_after(failures)),
            };
            failures += 1;
            tracing::error!(
                reason,
                pause_ms = pause.as_millis(),
                "The sealer process ended, another is started"
            );
            metrics::counter!("lacre_sealer_restarts_total").increment(1);
            self.client.end(DeviceState::Away(reason));
            self.rest(pause);
            self.restarts += 1;
        }
        self.client.end(DeviceState::Away("the sealer process was closed".to_owned()));
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while Instant::now() < until && !self.is_closing() {
            std::thread::sleep(TICK.min(pause));
        }
    }

    /// One life of the process, from its start to its last word.
    fn live(&mut self) -> End {
        self.has_greeted = false;
        self.plan.start.log_filter.clone_from(&self.plan.log_filter.borrow_and_update());
        let (mut child, link, inbox) = match self.spawn() {
            Ok(parts) => parts,
            Err(reason) => return End::Died(format!("the sealer process cannot be started: {reason}")),
        };
        let end = self.listen(&mut child, &link, inbox);
        // Refused at once from here on, and not when the process has been buried.
        self.client.end(DeviceState::Away("the sealer process ended".to_owned()));
        link.close();
        // It has nothing left to say, so nothing is lost if it has not ended by itself; if it was about
        // to, how it ended is worth a moment.
        let until = Instant::now() + LAST_MOMENT;
        let mut ended = child.try_wait().ok().flatten().is_some();
        while !ended && end.is_err() && link.silence() < HUNG && Instant::now() < until {
            std::thread::sleep(LAST_MOMENT / 50);
            ended = child.try_wait().ok().flatten().is_some();
        }
        let killed = !ended && child.kill().is_ok();
        let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        match end {
            Ok(end) => end,
            Err(reason) if killed => End::Died(reason),
            Err(reason) => End::Died(format!("{reason} ({status})")),
        }
    }

    fn spawn(&self) -> Result<(Child, Arc<Link>, Inbox), String> {
        let text = |error: io::Error| error.to_string();
        let (ours, theirs) = UnixStream::pair().map_err(text)?;
        let outbox = Outbox::start(ours.try_clone().map_err(text)?, &self.arena);
        let outbox = outbox.map_err(|error| error.to_string())?;
        let link = Arc::new(Link::new(ours, outbox));
        let inbox = Inbox::new(&self.arena).map_err(|error| error.to_string())?;
        let pin = self.plan.pin.as_ref().map(|pin| copy_pin(pin, &self.arena)).transpose()?;
        let mut command = Command::new(&self.plan.program);
        command.arg0("lacre").arg("sealer");
        // Its end of the socket is its standard input: nothing else is inherited, and no number is passed.
        command.stdin(std::os::fd::OwnedFd::from(theirs)).stdout(Stdio::null());
        for name in ["LACRE_TOKEN", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"] {
            command.env_remove(name);
        }
        // The daemon's settings, among them perhaps a password of the database: a vendor's module reads its
        // environment, and the process gets its configuration over the socket.
        for (name, _) in std::env::vars_os() {
            let bytes = name.as_encoded_bytes();
            if bytes.starts_with(b"LACRE__") || bytes.starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        if let Some(user) = &self.plan.user {
            user.put_on(&mut command);
        }
        let child = command.spawn().map_err(text);
        if child.is_err() {
            link.close();
        }
        let child = child?;
        let mut start = Frame::note(Kind::Starting, &self.plan.start);
        start.body = pin.map_or(Body::None, Body::Secret);
        link.outbox.push(start);
        link.outbox.flush();
        Ok((child, link, inbox))
    }

    /// Reads until there is nothing more to read, or no point in it.
    fn listen(&mut self, child: &mut Child, link: &Arc<Link>, mut inbox: Inbox) -> Result<End, String> {
        link.stream().set_read_timeout(Some(TICK)).map_err(|error| error.to_string())?;
        let mut closing_since = None;
        loop {
            match inbox.fill(|room| link.stream().read(room)) {
                Ok(0) if closing_since.is_some() => return Ok(End::Closed),
                Ok(0) => return Err("the sealer process ended".to_owned()),
                Ok(_) => {
                    link.hear();
                    let room = |id, _: &[u8], len| link.room(id, len);
                    while let Some(frame) = inbox.next(room).map_err(|garbled| garbled.to_string())? {
                        if let Some(end) =
                            self.hear(child, link, frame).map_err(|garbled| garbled.to_string())?
                        {
                            return Ok(end);
                        }
                    }
                }
                Err(error) if is_patience(&error) => {}
                Err(error) => return Err(format!("the sealer process cannot be read from: {error}")),
            }
            if self.has_greeted {
                self.pass_on_filter(link);
            }
            if self.is_closing() {
                let since = *closing_since.get_or_insert_with(|| {
                    link.hang_up();
                    Instant::now()
                });
                if since.elapsed() > CLOSING {
                    tracing::warn!("The sealer process does not end and is killed");
                    return Ok(End::Closed);
                }
            } else if link.silence() > HUNG {
                return Err("the sealer process did not move any more and was killed".to_owned());
            }
        }
    }

    /// Tells the process what to log, if that has changed since it was told.
    fn pass_on_filter(&mut self, link: &Link) {
        // An error means that nobody is left who could change it.
        if self.plan.log_filter.has_changed().unwrap_or(false) {
            let filter = self.plan.log_filter.borrow_and_update().clone();
            link.outbox.push(Frame::note(Kind::LogFilter, &filter));
            link.outbox.flush();
        }
    }

    fn hear(&mut self, child: &Child, link: &Arc<Link>, frame: Frame) -> Result<Option<End>, Garbled> {
        let note = &frame.meta[1..];
        match (Kind::of(&frame.meta)?, frame.id) {
            (Kind::Answer | Kind::Error, _) => link.answer(frame),
            (Kind::Ended, id) => link.ended(id),
            (Kind::Starting, NO_ID) => {}
            (kind @ (Kind::Hello | Kind::Status), NO_ID) => {
                let status: DeviceStatus =
                    serde_json::from_slice(note).map_err(|_| Garbled("a status that is none"))?;
                self.client.update(status, child.id(), self.restarts);
                if kind == Kind::Hello {
                    self.has_greeted = true;
                    self.client.begin(link);
                    tracing::info!(pid = child.id(), "The sealer process serves");
                    // Nobody waits for it if the first start took too long, and then again at no restart.
                    self.first.take().map(|first| first.send(Ok(())));
                }
            }
            (Kind::Failed, NO_ID) => {
                let error = serde_json::from_slice(note).map_err(|_| Garbled("an error that is none"))?;
                return Ok(Some(End::Unfit(error)));
            }
            _ => return Err(Garbled("something that was not asked for")),
        }
        Ok(None)
    }
}

/// The slot that goes out is given back behind it; the original stays for the next start.
fn copy_pin(pin: &SecretBuf, arena: &Arena) -> Result<SecretBuf, String> {
    let mut copy = arena.try_take(pin.len()).map_err(|error| error.to_string())?;
    pin.with(|pin| copy.with_mut(|copy| copy.copy_from_slice(pin)));
    Ok(copy)
}

/// Whether a read ended because nothing came, which is no error.
fn is_patience(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::{LONGEST_PAUSE, pause_after};

    #[test]
    fn the_first_restart_is_immediate_and_a_crash_loop_slows_down() {
        let pauses: Vec<_> = (0..10).map(pause_after).collect();
        assert!(pauses[0].is_zero());
        assert!(pauses.is_sorted() && pauses[1] < pauses[2]);
        assert_eq!(pauses[9], LONGEST_PAUSE);
        assert_eq!(pause_after(u32::MAX), LONGEST_PAUSE);
    }
}
