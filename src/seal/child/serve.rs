//! The sealer process itself: takes requests from the daemon and runs them on a device of its own.
//!
//! One thread reads, encrypts payloads and writes; the lanes' threads own the sessions as they do in the
//! daemon. It ends when the daemon's end of the socket is closed, and with the daemon in any case. The
//! service manager's SIGTERM is for the daemon, which drains first; here it is ignored.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use crate::seal::child::errors::WireError;
use crate::seal::child::pipe::{Inbox, Outbox};
use crate::seal::child::transfer::Mailbox;
use crate::seal::child::wire::{self, Ask, Body, Frame, Garbled, HEAD, Kind, LARGEST_META, NO_ID};
use crate::seal::child::{Start, complete, confine};
use crate::seal::device::{self, Device, DeviceStatus, SealerStatus};
use crate::seal::envelope::{Payload, Sealed};
use crate::seal::guarded::{Arena, SecretBuf};
use crate::seal::pin::TypedPin;
use crate::seal::{SealError, StartError, worker};

/// How often the device's status is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// It is sent when it has changed, and every so many looks as a sign of life.
const SIGN: u32 = 5;

/// Why the sealer process ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A person has called the command.
    #[error("this command is for the daemon, which starts it with a socket as its standard input")]
    NotADaemon,
    /// The daemon's socket failed.
    #[error("the daemon's socket failed")]
    Socket(#[from] io::Error),
    /// The first message is not understood.
    #[error("the daemon's first message is not understood")]
    Start,
}

/// Runs until the daemon hangs up. `log` starts logging, by filter and whether as JSON; what it gives sets
/// another filter.
///
/// # Errors
/// [`ServeError`]. What is wrong with the device is told to the daemon.
pub fn serve<F: Fn(&str)>(log: impl FnOnce(&str, bool) -> F) -> Result<(), ServeError> {
    let mut stream = take_stdin()?;
    // The kernel ends this process with the daemon's thread that started it, however that ends.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
    // In lists of processes it would be called "exe" after the link it was started by. Only a name.
    let _ = std::fs::write("/proc/self/comm", "lacre-sealer");
    let (start, body_len) = read_start(&mut stream)?;
    let set_filter = log(&start.log_filter, start.log_json);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(run(stream, start, body_len, &set_filter));
    runtime.shutdown_background();
    outcome
}

/// The socket, in whose place standard input is empty from now on: a module may read from there.
fn take_stdin() -> Result<UnixStream, ServeError> {
    let stdin = io::stdin();
    let stdin = stdin.as_fd();
    let kind = rustix::net::sockopt::socket_domain(stdin).map_err(|_| ServeError::NotADaemon)?;
    if kind != rustix::net::AddressFamily::UNIX {
        return Err(ServeError::NotADaemon);
    }
    confine::close_inherited();
    let socket = stdin.try_clone_to_owned()?;
    let nothing = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing).map_err(io::Error::from)?;
    Ok(UnixStream::from(socket))
}

/// Reads the first message up to its body, for which there is no guarded memory yet.
fn read_start(stream: &mut UnixStream) -> Result<(Start, usize), ServeError> {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head)?;
    let word = |first: usize| u32::from_le_bytes(std::array::from_fn(|at| head[first + at])) as usize;
    let (meta_len, body_len) = (word(0), word(4));
    if meta_len == 0 || meta_len > LARGEST_META {
        return Err(ServeError::Start);
    }
    let mut meta = vec![0; meta_len];
    stream.read_exact(&mut meta)?;
    let start = serde_json::from_slice(&meta[1..]).map_err(|_| ServeError::Start)?;
    Ok((start, body_len))
}

/// Guarded memory and confinement: what has to be there before a module is loaded.
fn prepare(stream: &mut UnixStream, start: &mut Start, body_len: usize) -> Result<Arena, StartError> {
    let failed = |reason: String| StartError::Sealer { reason };
    let arena = Arena::new(&start.memory).map_err(|error| failed(error.to_string()))?;
    let mut typed = None;
    if body_len > 0 {
        let mut pin: SecretBuf = arena.try_take(body_len).map_err(|error| failed(error.to_string()))?;
        pin.with_mut(|room| stream.read_exact(room)).map_err(|error| failed(error.to_string()))?;
        typed = Some(TypedPin(Arc::new(pin)));
    }
    complete(&mut start.device, start.credentials_dir.as_deref(), typed);
    confine::apply(start.network).map_err(|error| {
        failed(format!("it cannot be confined: {error}; sealer.mode = \"thread\" does without"))
    })?;
    Ok(arena)
}

async fn run(
    mut stream: UnixStream,
    mut start: Start,
    body_len: usize,
    set_filter: &dyn Fn(&str),
) -> Result<(), ServeError> {
    // Kept, so that these signals stay without effect.
    let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
    let _signals = kinds.map(signal);
    let arena = match prepare(&mut stream, &mut start, body_len) {
        Ok(arena) => arena,
        Err(error) => return refuse(&mut stream, &error),
    };
    stream.set_nonblocking(true)?;
    let outbox = Outbox::start(stream.try_clone()?, &arena).map_err(io::Error::other)?;
    let inbox = Inbox::new(&arena).map_err(io::Error::other)?;
    let mailbox = Mailbox::new().map_err(io::Error::other)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    let device = match bring_up(&start, &arena, &outbox, &stream).await {
        Some(Ok(device)) => device,
        Some(Err(error)) => {
            outbox.push(Frame::note(Kind::Failed, &error));
            outbox.flush();
            // Until the daemon has read it and hangs up.
            return Ok(stream.readable().await?);
        }
        None => return Ok(()),
    };
    let part = Arc::new(Part {
        device,
        arena,
        outbox,
        mailbox,
        active: AtomicUsize::new(0),
        told: Mutex::new(None),
    });
    part.tell(Kind::Hello);
    let outcome = part.listen(&stream, inbox, set_filter).await;
    part.device.close();
    part.outbox.close();
    outcome
}

/// Says that there will be no device, while there is no outbox yet.
fn refuse(stream: &mut UnixStream, error: &StartError) -> Result<(), ServeError> {
    use std::io::Write;
    let frame = Frame::note(Kind::Failed, error);
    stream.write_all(&frame.head())?;
    stream.write_all(&frame.meta)?;
    // Until the daemon has read it and hangs up.
    let _ = stream.read(&mut [0]);
    Ok(())
}

/// Starts the device on a thread of its own, with signs of life meanwhile: a module may take minutes
/// over its first call. `None` if the daemon went away.
async fn bring_up(
    start: &Start,
    arena: &Arena,
    outbox: &Outbox,
    stream: &tokio::net::UnixStream,
) -> Option<Result<Device, StartError>> {
    let (tell, mut told) = tokio::sync::oneshot::channel();
    let (config, arena) = (start.device.clone(), arena.clone());
    let thread = std::thread::Builder::new().name("device-start".to_owned());
    let thread = thread.spawn(move || {
        // Nobody to tell means that the daemon went away.
        let _ = tell.send(device::start(&config, &arena));
    });
    if let Err(error) = thread {
        return Some(Err(StartError::Threads { reason: error.to_string() }));
    }
    let mut tick = tokio::time::interval(LOOK * SIGN);
    loop {
        tokio::select! {
            started = &mut told => {
                let panicked = |_| Err(StartError::Sealer { reason: "the start panicked".to_owned() });
                return Some(started.unwrap_or_else(panicked));
            }
            // The daemon asks nothing before it was greeted, so this is its end.
            _ = stream.readable() => return None,
            _ = tick.tick() => {
                outbox.push(Frame::note(Kind::Starting, &()));
                outbox.flush();
            }
        }
    }
}

/// The one thing that the daemon says without asking for anything.
fn log_filter(meta: &[u8]) -> Result<String, Garbled> {
    match (Kind::of(meta)?, serde_json::from_slice(&meta[1..])) {
        (Kind::LogFilter, Ok(filter)) => Ok(filter),
        _ => Err(Garbled("neither a request nor a log filter")),
    }
}

/// The meta part of an answer.
fn plain(meta: &[u8]) -> Vec<u8> {
    [&[Kind::Answer as u8], meta].concat()
}

/// The device and the way back to the daemon.
struct Part {
    device: Device,
    arena: Arena,
    outbox: Arc<Outbox>,
    /// Where DEKs from other sealer processes arrive.
    mailbox: Mailbox,
    /// Requests that are not answered yet.
    active: AtomicUsize,
    /// What the daemon was last told of the device.
    told: Mutex<Option<DeviceStatus>>,
}

/// Tells the daemon that the device has ended a call, when whatever kept this lets go of it.
struct Ended(Arc<Part>, u64);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.outbox.push(Frame { id: self.1, meta: vec![Kind::Ended as u8], body: Body::None });
        self.0.outbox.flush();
    }
}

impl Part {
    async fn listen(
        self: &Arc<Self>,
        stream: &tokio::net::UnixStream,
        mut inbox: Inbox,
        set_filter: &dyn Fn(&str),
    ) -> Result<(), ServeError> {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looks = 0_u32;
        loop {
            tokio::select! {
                ready = stream.readable() => ready?,
                _ = tick.tick() => {
                    looks = looks.wrapping_add(1);
                    self.look(looks.is_multiple_of(SIGN));
                    continue;
                }
            }
            match inbox.fill(|room| stream.try_read(room)) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            let room = |_, meta: &[u8], len| self.room(meta, len);
            while let Some(frame) = inbox.next(room).map_err(io::Error::other)? {
                if frame.id == NO_ID {
                    set_filter(&log_filter(&frame.meta).map_err(io::Error::other)?);
                    continue;
                }
                self.active.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(Arc::clone(self).answer(frame));
            }
        }
    }

    /// Where the body of a request goes.
    fn room(&self, meta: &[u8], len: usize) -> Body {
        if Ask::has_secret(meta) {
            // Without room it is answered as busy; reading must not wait for memory.
            return self.arena.try_take(len).map_or(Body::Skip(len), Body::Secret);
        }
        Body::Plain(Zeroizing::new(vec![0; len]))
    }

    async fn answer(self: Arc<Self>, frame: Frame) {
        let id = frame.id;
        let frame = match self.perform(frame).await {
            Ok((meta, body)) => Frame { id, meta, body },
            Err(error) => {
                // The reason of a refusal reaches the daemon's status before the refusal reaches a caller.
                self.look(false);
                Frame { id, ..Frame::note(Kind::Error, &WireError::from(error)) }
            }
        };
        self.outbox.push(frame);
        if self.active.fetch_sub(1, Ordering::Relaxed) > 1 {
            // What else is answered in this turn of the loop goes with it.
            tokio::task::yield_now().await;
        }
        self.outbox.flush();
    }

    async fn perform(self: &Arc<Self>, frame: Frame) -> Result<(Vec<u8>, Body), SealError> {
        let Frame { id, meta, body } = frame;
        let sealer = &self.device.sealer;
        let ask = Ask::decode(&meta).map_err(|garbled| SealError::Unavailable {
            retry_after: Duration::from_secs(1),
            reason: garbled.to_string(),
        })?;
        Ok(match ask {
            Ask::Seal { kek, context } => {
                let plaintext = match body {
                    Body::Secret(plaintext) => plaintext,
                    Body::Skip(_) => {
                        let retry_after = Duration::from_secs(1);
                        return Err(SealError::Busy { what: "guarded memory", retry_after });
                    }
                    Body::None | Body::Plain(_) => self.arena.take(0).await?,
                };
                let Sealed { key, payload } = sealer.seal_in_place(&kek, &context, plaintext).await?;
                (wire::encode_sealed(&key, &payload), Body::Plain(Zeroizing::new(payload.ciphertext)))
            }
            Ask::Open { kek, context, key, iv, tag } => {
                let ciphertext = match body {
                    Body::Plain(mut bytes) => std::mem::take(&mut *bytes),
                    _ => Vec::new(),
                };
                let sealed = Sealed { key, payload: Payload { iv, ciphertext, tag } };
                (plain(&[]), Body::Secret(sealer.open(&kek, &context, &sealed).await?.0))
            }
            Ask::Rewrap { from, to, context, key } => {
                (plain(&sealer.rewrap(&from, &to, &context, &key).await?.to_bytes()), Body::None)
            }
            Ask::Sign { key, alg, digest } => {
                (plain(sealer.sign_digest(&key, alg, digest.into_owned()).await?.as_bytes()), Body::None)
            }
            Ask::Mac { key } => {
                let message = match &body {
                    Body::Plain(message) => message.as_slice(),
                    _ => &[],
                };
                (plain(&sealer.mac(&key, message).await?), Body::None)
            }
            Ask::PublicKey { key } => (wire::encode_public_key(&sealer.public_key(&key).await?), Body::None),
            Ask::Address => (plain(&self.mailbox.address), Body::None),
            Ask::Export { from, context, key, address, aad } => {
                (plain(&sealer.export(&from, &context, &key, (&address, &aad)).await?), Body::None)
            }
            Ask::Import { to, context, parcel } => {
                (plain(&sealer.import(&to, &context, &parcel, &self.mailbox).await?.to_bytes()), Body::None)
            }
            ask => self.administer(id, ask, body).await?,
        })
    }

    /// What goes through the lane that makes and destroys keys.
    async fn administer(
        self: &Arc<Self>,
        id: u64,
        ask: Ask<'_>,
        body: Body,
    ) -> Result<(Vec<u8>, Body), SealError> {
        let admin = &self.device.admin;
        Ok(match ask {
            Ask::Generate { planned, is_given: false } => {
                let held = Ended(Arc::clone(self), id);
                (plain(&admin.generate_holding(&planned, held).await?.to_bytes()), Body::None)
            }
            Ask::Generate { planned, is_given: true } => {
                let Body::Secret(given) = body else {
                    let retry_after = Duration::from_secs(1);
                    return Err(SealError::Busy { what: "guarded memory", retry_after });
                };
                let held = Ended(Arc::clone(self), id);
                (plain(&admin.import_guarded(&planned, given, held).await?.to_bytes()), Body::None)
            }
            Ask::List => (wire::encode_keys(&admin.list(self.device.name()).await?), Body::None),
            Ask::Destroy { key } => {
                admin.destroy(&key).await?;
                (plain(&[]), Body::None)
            }
            Ask::Inspect { key } => (Frame::note(Kind::Answer, &admin.inspect(&key).await?).meta, Body::None),
            Ask::Count(count) => {
                let held = Ended(Arc::clone(self), id);
                let value = admin.count_holding(self.device.name(), count, held).await?;
                (wire::encode_count(value), Body::None)
            }
            Ask::Capabilities => {
                (Frame::note(Kind::Answer, &self.device.capabilities().await?).meta, Body::None)
            }
            // `perform` has all the others.
            _ => return Err(worker::mismatch(ask.name())),
        })
    }

    fn status(&self) -> DeviceStatus {
        let sealer = Some(SealerStatus { pid: 0, restarts: 0, memory: self.arena.status() });
        DeviceStatus { sealer, ..self.device.status() }
    }

    /// Tells the daemon how the device is, if that has changed or `anyway`.
    fn look(&self, anyway: bool) {
        let changed = {
            let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.device.status();
            told.as_ref().is_none_or(|told| {
                (&told.state, told.key_failures, told.epoch) != (&now.state, now.key_failures, now.epoch)
            })
        };
        if anyway || changed {
            self.tell(Kind::Status);
        }
    }

    fn tell(&self, kind: Kind) {
        let status = self.status();
        self.outbox.push(Frame::note(kind, &status));
        self.outbox.flush();
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
    }
}

/// The id of a note is none; kept here so that a change of it is seen.
const _: () = assert!(NO_ID < wire::FIRST_ID, "notes are no requests");
