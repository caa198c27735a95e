//! The daemon's side of the sealer process: requests that wait for their answers.
//!
//! A [`Link`] is one life of the process. When it ends, everything that waits is answered: what changes
//! the device as unknown, the rest as unavailable. Buffers for plaintext that is to come are taken before
//! it is asked for, so that the thread that reads never waits for memory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use zeroize::Zeroizing;

use crate::seal::backend::BackendError;
use crate::seal::child::errors::{Names, WireError};
use crate::seal::child::pipe::Outbox;
use crate::seal::child::transfer::{Address, Parcel};
use crate::seal::child::wire::{self, Ask, Body, FIRST_ID, Frame, Garbled, Kind, LARGEST_BODY};
use crate::seal::context::Context;
use crate::seal::device::{DeviceState, DeviceStatus};
use crate::seal::devices::DeviceName;
use crate::seal::driver::Count;
use crate::seal::envelope::{Payload, Reader, Sealed, WrappedKey};
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{Alg, Kek, KeyRef, PublicKey, Signature};
use crate::seal::worker::Held;
use crate::seal::{KeyReport, SealError};

/// The process's own answer that the deadline has passed comes first if it comes at all.
const GRACE: Duration = Duration::from_millis(250);
/// A process that gave no sign of life for so long is not asked.
const SILENT: Duration = Duration::from_secs(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks the sealer process. Outlives each of its lives.
pub(crate) struct Client {
    device: DeviceName,
    pub(crate) deadline: Duration,
    /// Requests that may wait for the process at one time.
    limit: usize,
    names: Names,
    state: RwLock<State>,
}

/// What is known of the process.
struct State {
    /// `None` while there is none that could be asked.
    link: Option<Arc<Link>>,
    /// How the device was when last heard of; the reason while there is no link.
    status: DeviceStatus,
    /// Failures at keys that earlier lives had counted.
    failures_before: u64,
}

/// One life of the process.
pub(super) struct Link {
    stream: UnixStream,
    pub(super) outbox: Arc<Outbox>,
    waiting: Mutex<Waiting>,
    next: AtomicU64,
    began: Instant,
    /// Milliseconds after `began`.
    heard: AtomicU64,
}

struct Waiting {
    open: bool,
    calls: HashMap<u64, Call>,
    /// What callers want kept until the device has ended their calls.
    held: HashMap<u64, Held>,
}

struct Call {
    reply: oneshot::Sender<Frame>,
    /// Where plaintext goes that is the answer.
    room: Option<SecretBuf>,
}

/// Takes a call out when nobody waits for it any more.
struct Forget<'a>(&'a Link, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.0.waiting).calls.remove(&self.1);
    }
}

/// Sends what was put into the outbox, also if the caller goes away before it came to that.
struct Flush<'a>(&'a Outbox);

impl Drop for Flush<'_> {
    fn drop(&mut self) {
        self.0.flush();
    }
}

impl Link {
    pub(super) fn new(stream: UnixStream, outbox: Arc<Outbox>) -> Self {
        let waiting = Waiting { open: true, calls: HashMap::new(), held: HashMap::new() };
        Self {
            stream,
            outbox,
            waiting: Mutex::new(waiting),
            next: AtomicU64::new(FIRST_ID),
            began: Instant::now(),
            heard: AtomicU64::new(0),
        }
    }

    /// Takes note of a sign of life.
    pub(super) fn hear(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Release);
    }

    /// For how long nothing was heard.
    pub(super) fn silence(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.heard.load(Ordering::Acquire)))
    }

    /// Where the body of a message goes.
    pub(super) fn room(&self, id: u64, len: usize) -> Body {
        let mut waiting = lock(&self.waiting);
        match waiting.calls.get_mut(&id) {
            Some(Call { room: Some(room), .. }) if room.len() != len => Body::None,
            Some(Call { room, .. }) => match room.take() {
                Some(room) => Body::Secret(room),
                None => Body::Plain(Zeroizing::new(vec![0; len])),
            },
            // Whoever asked has gone.
            None => Body::Skip(len),
        }
    }

    /// Hands an answer to whoever waits for it.
    pub(super) fn answer(&self, frame: Frame) {
        let call = lock(&self.waiting).calls.remove(&frame.id);
        if let Some(call) = call {
            // A caller that has gone takes its answer with it: guarded buffers wipe themselves.
            let _ = call.reply.send(frame);
        }
    }

    /// Lets go what was held for a call that the device has ended.
    pub(super) fn ended(&self, id: u64) {
        let held = lock(&self.waiting).held.remove(&id);
        drop(held);
    }

    /// The process has ended: so has every call.
    pub(super) fn close(&self) {
        self.outbox.close();
        let (calls, held) = {
            let mut waiting = lock(&self.waiting);
            waiting.open = false;
            (std::mem::take(&mut waiting.calls), std::mem::take(&mut waiting.held))
        };
        drop((calls, held));
    }

    /// For the thread that reads.
    pub(super) const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Lets the process see that nothing more comes; it ends in order.
    pub(super) fn hang_up(&self) {
        // Fails only if the other side has gone first.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Makes the reading thread find the end.
    fn give_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Notes a call; its id, where its answer comes, and whether others are under way.
    fn enter(
        &self,
        room: Option<SecretBuf>,
        held: Option<Held>,
        limit: usize,
    ) -> Result<(u64, oneshot::Receiver<Frame>, bool), SealError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let mut waiting = lock(&self.waiting);
        if !waiting.open {
            return Err(gone());
        }
        if waiting.calls.len() >= limit {
            let retry_after = Duration::from_secs(1);
            return Err(SealError::Busy { what: "the device's queue", retry_after });
        }
        let is_alone = waiting.calls.is_empty();
        waiting.calls.insert(id, Call { reply, room });
        if let Some(held) = held {
            waiting.held.insert(id, held);
        }
        Ok((id, answer, is_alone))
    }
}

fn unavailable(reason: &str) -> SealError {
    SealError::Unavailable { retry_after: Duration::from_secs(1), reason: reason.to_owned() }
}

fn gone() -> SealError {
    unavailable("the sealer process ended")
}

impl Client {
    pub(super) fn new(device: DeviceName, deadline: Duration, limit: usize, status: DeviceStatus) -> Self {
        let state = State { link: None, status, failures_before: 0 };
        Self { device, deadline, limit, names: Names::default(), state: RwLock::new(state) }
    }

    /// From now on this life of the process is asked.
    pub(super) fn begin(&self, link: &Arc<Link>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).link = Some(Arc::clone(link));
    }

    /// Takes what the process says of the device.
    pub(super) fn update(&self, mut status: DeviceStatus, pid: u32, restarts: u64) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        status.key_failures += state.failures_before;
        if let Some(sealer) = &mut status.sealer {
            (sealer.pid, sealer.restarts) = (pid, restarts);
        }
        state.status = status;
    }

    /// There is no process to be asked.
    pub(super) fn end(&self, state: DeviceState) {
        let mut known = self.state.write().unwrap_or_else(PoisonError::into_inner);
        known.link = None;
        known.failures_before = known.status.key_failures;
        (known.status.state, known.status.queued, known.status.stuck_threads) = (state, [0; 3], 0);
    }

    /// The present status; never waits for the process.
    pub(crate) fn status(&self) -> DeviceStatus {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let mut status = state.status.clone();
        if state.link.as_ref().is_some_and(|link| link.silence() > SILENT) {
            status.state = DeviceState::Away(HUNG.to_owned());
        }
        status
    }

    /// Whether there is a process that could be asked, and a device that it found well.
    pub(crate) fn admit(&self) -> Result<(), SealError> {
        self.link()?;
        match self.status().state {
            DeviceState::Ready => Ok(()),
            DeviceState::Away(reason) | DeviceState::Stopped(reason) => Err(unavailable(&reason)),
        }
    }

    fn link(&self) -> Result<Arc<Link>, SealError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &state.link {
            Some(link) if link.silence() > SILENT => Err(unavailable(HUNG)),
            Some(link) => Ok(Arc::clone(link)),
            None => Err(match &state.status.state {
                DeviceState::Ready => gone(),
                DeviceState::Away(reason) | DeviceState::Stopped(reason) => unavailable(reason),
            }),
        }
    }

    async fn call(
        &self,
        ask: &Ask<'_>,
        body: Body,
        room: Option<SecretBuf>,
        held: Option<Held>,
    ) -> Result<Frame, SealError> {
        let link = self.link()?;
        if body.len() > LARGEST_BODY {
            return Err(SealError::TooLarge { len: body.len() });
        }
        let (id, answer, is_alone) = link.enter(room, held, self.limit)?;
        let _forget = Forget(&link, id);
        let started = Instant::now();
        link.outbox.push(Frame { id, meta: ask.encode(), body });
        let flush = Flush(&link.outbox);
        if !is_alone {
            // Others that are about to ask do so first, and one system call takes them all.
            tokio::task::yield_now().await;
        }
        drop(flush);
        let patience = if ask.is_admin() { self.deadline * 15 } else { self.deadline } + GRACE;
        let result = match tokio::time::timeout(patience, answer).await {
            Ok(Ok(frame)) => self.judge(&link, frame),
            // Nobody knows what became of it.
            _ if ask.alters() => Err(SealError::Unknown {
                operation: ask.name(),
                source: BackendError::Unknown { function: ask.name(), code: 0 },
            }),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(unavailable("the device did not answer within the deadline")),
        };
        if !matches!(ask, Ask::Address) {
            self.device.count(ask.name(), result.is_ok(), started.elapsed());
        }
        result
    }

    fn judge(&self, link: &Link, frame: Frame) -> Result<Frame, SealError> {
        match Kind::of(&frame.meta) {
            Ok(Kind::Answer) => Ok(frame),
            Ok(Kind::Error) => Err(serde_json::from_slice::<WireError>(&frame.meta[1..])
                .map_err(|_| Garbled("an error that is not one"))
                .and_then(|error| error.into_error(&self.names))
                .unwrap_or_else(|garbled| distrust(link, &garbled))),
            _ => Err(distrust(link, &Garbled("neither answer nor error"))),
        }
    }

    /// Asks and reads the answer's meta part, behind its kind.
    async fn ask<T>(
        &self,
        ask: &Ask<'_>,
        body: Body,
        held: Option<Held>,
        read: impl FnOnce(&[u8]) -> Result<T, Garbled>,
    ) -> Result<T, SealError> {
        let frame = self.call(ask, body, None, held).await?;
        self.read(read(&frame.meta[1..]))
    }

    fn read<T>(&self, read: Result<T, Garbled>) -> Result<T, SealError> {
        read.map_err(|garbled| match self.link() {
            Ok(link) => distrust(&link, &garbled),
            Err(error) => error,
        })
    }

    pub(crate) async fn seal(
        &self,
        kek: &Kek,
        context: &Context<'_>,
        plaintext: SecretBuf,
    ) -> Result<Sealed, SealError> {
        let ask = Ask::Seal { kek: kek.clone(), context: *context };
        let len = plaintext.len();
        let frame = self.call(&ask, Body::Secret(plaintext), None, None).await?;
        let sealed = (|| {
            let mut reader = Reader::new(&frame.meta[1..]);
            let key = WrappedKey::from_bytes(reader.long()?)?;
            let (iv, tag) = (reader.array()?, reader.array()?);
            reader.end()?;
            let ciphertext = match frame.body {
                Body::Plain(mut bytes) => std::mem::take(&mut *bytes),
                _ => Vec::new(),
            };
            if ciphertext.len() != len || key.wrapped_by(kek).is_none() {
                return Err(Garbled("another value than the one that was to be sealed"));
            }
            Ok(Sealed { key, payload: Payload { iv, ciphertext, tag } })
        })();
        self.read(sealed)
    }

    /// `plain` is as long as the plaintext will be.
    pub(crate) async fn open(
        &self,
        kek: &Kek,
        context: &Context<'_>,
        sealed: &Sealed,
        plain: SecretBuf,
    ) -> Result<SecretBuf, SealError> {
        let Payload { iv, ciphertext, tag } = &sealed.payload;
        let ask =
            Ask::Open { kek: kek.clone(), context: *context, key: sealed.key.clone(), iv: *iv, tag: *tag };
        if plain.is_empty() {
            // An empty body is none, so the buffer does not come back with it.
            self.call(&ask, Body::None, None, None).await?;
            return Ok(plain);
        }
        let body = Body::Plain(Zeroizing::new(ciphertext.clone()));
        match self.call(&ask, body, Some(plain), None).await?.body {
            Body::Secret(plain) => Ok(plain),
            _ => self.read(Err(Garbled("no plaintext"))),
        }
    }

    pub(crate) async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &Context<'_>,
        key: &WrappedKey,
    ) -> Result<WrappedKey, SealError> {
        let ask = Ask::Rewrap { from: from.clone(), to: to.clone(), context: *context, key: key.clone() };
        let wrapped = self.ask(&ask, Body::None, None, |meta| Ok(WrappedKey::from_bytes(meta)?)).await?;
        if wrapped.wrapped_by(to).is_none() {
            return self.read(Err(Garbled("wrapped by another KEK")));
        }
        Ok(wrapped)
    }

    /// Where DEKs for the process are encrypted to, as long as it lives.
    pub(crate) async fn address(&self) -> Result<Address, SealError> {
        let read = |meta: &[u8]| meta.try_into().map_err(|_| Garbled("not an address"));
        self.ask(&Ask::Address, Body::None, None, read).await
    }

    /// The DEK of `key`, encrypted for the process at `address`, which will wrap it under `to`.
    pub(crate) async fn export(
        &self,
        from: &Kek,
        context: &Context<'_>,
        key: &WrappedKey,
        (to, address): (&Kek, Address),
    ) -> Result<Parcel, SealError> {
        let aad = Cow::Owned(context.wrap_aad(to));
        let ask = Ask::Export { from: from.clone(), context: *context, key: key.clone(), address, aad };
        let read = |meta: &[u8]| meta.try_into().map_err(|_| Garbled("not a parcel"));
        self.ask(&ask, Body::None, None, read).await
    }

    /// Wraps the DEK of a parcel that was made for this process.
    pub(crate) async fn import(
        &self,
        to: &Kek,
        context: &Context<'_>,
        parcel: Parcel,
    ) -> Result<WrappedKey, SealError> {
        let ask = Ask::Import { to: to.clone(), context: *context, parcel };
        let wrapped = self.ask(&ask, Body::None, None, |meta| Ok(WrappedKey::from_bytes(meta)?)).await?;
        if wrapped.wrapped_by(to).is_none() {
            return self.read(Err(Garbled("wrapped by another KEK")));
        }
        Ok(wrapped)
    }

    pub(crate) async fn sign(&self, key: &KeyRef, alg: Alg, digest: &[u8]) -> Result<Signature, SealError> {
        let ask = Ask::Sign { key: key.clone(), alg, digest: Cow::Borrowed(digest) };
        self.ask(&ask, Body::None, None, |meta| Ok(Signature(meta.to_vec()))).await
    }

    pub(crate) async fn mac(&self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], SealError> {
        let body = Body::Plain(Zeroizing::new(message.to_vec()));
        let read = |meta: &[u8]| meta.try_into().map_err(|_| Garbled("not a MAC"));
        self.ask(&Ask::Mac { key: key.clone() }, body, None, read).await
    }

    pub(crate) async fn public_key(&self, key: &KeyRef) -> Result<PublicKey, SealError> {
        let ask = Ask::PublicKey { key: key.clone() };
        self.ask(&ask, Body::None, None, wire::decode_public_key).await
    }

    /// Makes the planned key, or has it taken from outside.
    pub(crate) async fn generate(
        &self,
        planned: &KeyRef,
        given: Option<SecretBuf>,
        held: Held,
    ) -> Result<KeyRef, SealError> {
        let ask = Ask::Generate { planned: planned.clone(), is_given: given.is_some() };
        let read = |meta: &[u8]| KeyRef::from_bytes(meta).ok_or(Garbled("not a key"));
        let body = given.map_or(Body::None, Body::Secret);
        let made = self.ask(&ask, body, Some(held), read).await?;
        if (made.id(), made.spec()) != (planned.id(), planned.spec()) {
            return self.read(Err(Garbled("another key than the planned one")));
        }
        // The process knows its one device by no name.
        Ok(made.on(planned.device().clone()))
    }

    pub(crate) async fn list(&self) -> Result<Vec<KeyRef>, SealError> {
        let keys = self.ask(&Ask::List, Body::None, None, wire::decode_keys).await?;
        Ok(keys.into_iter().map(|key| key.on(self.device.clone())).collect())
    }

    pub(crate) async fn destroy(&self, key: &KeyRef) -> Result<(), SealError> {
        self.ask(&Ask::Destroy { key: key.clone() }, Body::None, None, |_| Ok(())).await
    }

    pub(crate) async fn inspect(&self, key: &KeyRef) -> Result<KeyReport, SealError> {
        #[derive(serde::Deserialize)]
        struct Report {
            attributes: Vec<(String, String)>,
            deviations: Vec<String>,
            accepted: Vec<String>,
        }
        let ask = Ask::Inspect { key: key.clone() };
        let read = |meta: &[u8]| serde_json::from_slice(meta).map_err(|_| Garbled("not a report"));
        let Report { attributes, deviations, accepted } = self.ask(&ask, Body::None, None, read).await?;
        let attributes = attributes.into_iter().map(|(name, text)| (self.names.get(&name), text));
        Ok(KeyReport { attributes: attributes.collect(), deviations, accepted })
    }

    pub(crate) async fn capabilities(&self) -> Result<serde_json::Value, SealError> {
        let read = |meta: &[u8]| serde_json::from_slice(meta).map_err(|_| Garbled("not a report"));
        self.ask(&Ask::Capabilities, Body::None, None, read).await
    }

    pub(crate) async fn count(&self, count: Count, held: Held) -> Result<Option<u64>, SealError> {
        self.ask(&Ask::Count(count), Body::None, Some(held), wire::decode_count).await
    }
}

const HUNG: &str = "the sealer process does not move";

/// What that process says is not understood: it gets no second chance.
fn distrust(link: &Link, garbled: &Garbled) -> SealError {
    tracing::error!(%garbled, "The sealer process is given up");
    link.give_up();
    gone()
}
