//! Frames over a stream socket, many in one system call while there are many.
//!
//! Both directions go through one staging buffer of guarded memory each, which is wiped behind what was
//! moved. [`Outbox`] writes on the thread that has something to say; only when the socket is full does a
//! thread of its own go on, so that no caller waits for the other side. [`Inbox`] puts frames together.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use zeroize::Zeroize;

use crate::seal::SealError;
use crate::seal::child::wire::{Body, Frame, Garbled, HEAD, LARGEST_BODY, LARGEST_META};
use crate::seal::guarded::{Arena, SecretBuf};

/// As much as is moved at once.
const STAGING: usize = 64 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is on its way out. Shared by all that send.
pub(super) struct Outbox {
    stream: UnixStream,
    waiting: Mutex<VecDeque<Frame>>,
    moving: Mutex<Moving>,
    /// Says to the helping thread that the socket is full.
    full: Mutex<bool>,
    help: Condvar,
    closed: AtomicBool,
}

/// The frame that is being moved, and the bytes that are staged.
struct Moving {
    staging: SecretBuf,
    /// Staged and not sent: `start..end`.
    start: usize,
    end: usize,
    /// The frame that did not fit, with what was staged of it.
    rest: Option<(Frame, usize)>,
}

/// How far the socket took it.
enum Moved {
    All,
    Full,
    Gone,
}

impl Outbox {
    /// Starts the helping thread, which ends with [`Outbox::close`].
    pub(super) fn start(stream: UnixStream, arena: &Arena) -> Result<Arc<Self>, SealError> {
        let staging = arena.apart(STAGING)?;
        let outbox = Arc::new(Self {
            stream,
            waiting: Mutex::default(),
            moving: Mutex::new(Moving { staging, start: 0, end: 0, rest: None }),
            full: Mutex::new(false),
            help: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        let helped = Arc::clone(&outbox);
        let thread = std::thread::Builder::new().name("sealer-out".to_owned());
        thread.spawn(move || helped.help()).map_err(|error| SealError::Unavailable {
            retry_after: Duration::from_secs(1),
            reason: format!("no thread for the sealer process: {error}"),
        })?;
        Ok(outbox)
    }

    /// Puts a frame behind the others; [`Outbox::flush`] sends it.
    pub(super) fn push(&self, frame: Frame) {
        if !self.closed.load(Ordering::Acquire) {
            lock(&self.waiting).push_back(frame);
        }
    }

    /// Sends what waits, as far as the socket takes it; the rest is sent by the helping thread. Never waits.
    pub(super) fn flush(&self) {
        loop {
            if lock(&self.waiting).is_empty() {
                return;
            }
            let mut moving = match self.moving.try_lock() {
                Ok(moving) => moving,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Whoever sends looks once more after it has let go.
                Err(TryLockError::WouldBlock) => return,
            };
            match self.advance(&mut moving) {
                Moved::All => {}
                Moved::Full => {
                    *lock(&self.full) = true;
                    self.help.notify_one();
                    return;
                }
                Moved::Gone => return self.close(),
            }
        }
    }

    /// Ends the helping thread and drops what waits.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        lock(&self.waiting).clear();
        drop(lock(&self.full));
        self.help.notify_all();
    }

    fn help(&self) {
        loop {
            {
                let mut full = lock(&self.full);
                while !*full && !self.closed.load(Ordering::Acquire) {
                    full = self.help.wait(full).unwrap_or_else(PoisonError::into_inner);
                }
                *full = false;
            }
            while !self.closed.load(Ordering::Acquire) {
                let moved = self.advance(&mut lock(&self.moving));
                match moved {
                    // Somebody may have put a frame there and found this thread sending.
                    Moved::All if lock(&self.waiting).is_empty() => break,
                    Moved::All => {}
                    Moved::Full => {
                        let mut fds = [PollFd::new(&self.stream, PollFlags::OUT)];
                        let pause = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                        // Interrupted or not, the next look at the socket says how it is.
                        let _ = poll(&mut fds, Some(&pause));
                    }
                    Moved::Gone => self.close(),
                }
            }
            if self.closed.load(Ordering::Acquire) {
                return;
            }
        }
    }

    fn advance(&self, moving: &mut Moving) -> Moved {
        loop {
            if moving.start == moving.end && !moving.stage(|| lock(&self.waiting).pop_front()) {
                return Moved::All;
            }
            let (start, end) = (moving.start, moving.end);
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let sent = moving.staging.with(|bytes| send(self.stream.as_fd(), &bytes[start..end], flags));
            match sent {
                Ok(count) => {
                    moving.staging.with_mut(|bytes| bytes[start..start + count].zeroize());
                    moving.start += count;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Moved::Full,
                Err(_) => return Moved::Gone,
            }
        }
    }
}

impl Moving {
    /// Fills the staging buffer with as many frames as fit; whether there was anything.
    fn stage(&mut self, mut next: impl FnMut() -> Option<Frame>) -> bool {
        (self.start, self.end) = (0, 0);
        loop {
            let Some((frame, done)) = self.rest.take().or_else(|| Some((next()?, 0))) else { break };
            let done = self.copy(&frame, done);
            if done < HEAD + frame.meta.len() + frame.body.len() {
                self.rest = Some((frame, done));
                break;
            }
        }
        self.end > 0
    }

    /// Copies what is left of a frame after `done` bytes, as much as fits; the new `done`.
    fn copy(&mut self, frame: &Frame, mut done: usize) -> usize {
        let (at, head) = (self.end, frame.head());
        let count = self.staging.with_mut(|room| {
            let room = &mut room[at..];
            let mut filled = 0;
            for (begin, part) in [(0, head.as_slice()), (HEAD, frame.meta.as_slice())] {
                let rest = part.get(done.saturating_sub(begin)..).unwrap_or_default();
                let len = rest.len().min(room.len() - filled);
                room[filled..filled + len].copy_from_slice(&rest[..len]);
                filled += len;
                done += len;
                if len < rest.len() {
                    return filled;
                }
            }
            let from = done - HEAD - frame.meta.len();
            let len = frame.body.copy_out(from, &mut room[filled..]);
            done += len;
            filled + len
        });
        self.end += count;
        done
    }
}

/// What has come in.
pub(super) struct Inbox {
    staging: SecretBuf,
    start: usize,
    end: usize,
    partial: Option<Partial>,
}

/// A frame of which a part is here.
struct Partial {
    id: u64,
    meta: Vec<u8>,
    meta_len: usize,
    body: Option<Body>,
    body_len: usize,
    got: usize,
}

impl Inbox {
    pub(super) fn new(arena: &Arena) -> Result<Self, SealError> {
        Ok(Self { staging: arena.apart(STAGING)?, start: 0, end: 0, partial: None })
    }

    /// Lets `read` fill the staging buffer; what `read` says. Zero is the end of the stream.
    pub(super) fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        let (start, end) = (self.start, self.end);
        self.staging.with_mut(|bytes| {
            // At most the begin of a head is left: all else was taken out, and wiped.
            bytes.copy_within(start..end, 0);
            bytes[end - start..end].zeroize();
        });
        (self.start, self.end) = (0, end - start);
        let count = self.staging.with_mut(|bytes| read(&mut bytes[end - start..]))?;
        self.end += count;
        Ok(count)
    }

    /// The next whole frame. `room` says where a body goes, once id, meta and length are known. Without
    /// one, what was read is wiped from the staging buffer.
    pub(super) fn next(
        &mut self,
        room: impl FnMut(u64, &[u8], usize) -> Body,
    ) -> Result<Option<Frame>, Garbled> {
        let frame = self.step(room)?;
        if frame.is_none() {
            let start = self.start;
            self.staging.with_mut(|bytes| bytes[..start].zeroize());
        }
        Ok(frame)
    }

    fn step(&mut self, mut room: impl FnMut(u64, &[u8], usize) -> Body) -> Result<Option<Frame>, Garbled> {
        if self.partial.is_none() {
            self.partial = self.begin()?;
        }
        let Some(mut partial) = self.partial.take() else { return Ok(None) };
        let missing = partial.meta_len - partial.meta.len();
        let (start, count) = self.take(missing);
        self.staging.with(|bytes| partial.meta.extend_from_slice(&bytes[start..start + count]));
        if partial.meta.len() == partial.meta_len {
            let body = match partial.body.take() {
                Some(body) => body,
                None if partial.body_len == 0 => Body::None,
                None => room(partial.id, &partial.meta, partial.body_len),
            };
            if body.len() != partial.body_len {
                return Err(Garbled("a body of another length than expected"));
            }
            let (start, count) = self.take(partial.body_len - partial.got);
            let body = partial.body.insert(body);
            self.staging.with(|bytes| body.copy_in(partial.got, &bytes[start..start + count]));
            partial.got += count;
            if partial.got == partial.body_len {
                let body = partial.body.unwrap_or(Body::None);
                return Ok(Some(Frame { id: partial.id, meta: partial.meta, body }));
            }
        }
        self.partial = Some(partial);
        Ok(None)
    }

    /// Up to `wanted` staged bytes: where they are and how many.
    fn take(&mut self, wanted: usize) -> (usize, usize) {
        let (start, count) = (self.start, wanted.min(self.end - self.start));
        self.start += count;
        (start, count)
    }

    fn begin(&mut self) -> Result<Option<Partial>, Garbled> {
        if self.end - self.start < HEAD {
            return Ok(None);
        }
        let (start, _) = self.take(HEAD);
        let mut head = [0; HEAD];
        self.staging.with(|bytes| head.copy_from_slice(&bytes[start..start + HEAD]));
        let word = |first: usize| u32::from_le_bytes(std::array::from_fn(|at| head[first + at])) as usize;
        let (meta_len, body_len) = (word(0), word(4));
        let id: [u8; HEAD - 8] = std::array::from_fn(|at| head[8 + at]);
        if meta_len == 0 || meta_len > LARGEST_META || body_len > LARGEST_BODY {
            return Err(Garbled("a length beyond the limits"));
        }
        let meta = Vec::with_capacity(meta_len);
        Ok(Some(Partial { id: u64::from_le_bytes(id), meta, meta_len, body: None, body_len, got: 0 }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::seal::guarded::Options;

    fn arena() -> Arena {
        Arena::new(&Options { slots: 8, allow_unlocked: true, ..Options::default() }).unwrap()
    }

    fn frame(id: u64, meta: usize, body: Body) -> Frame {
        Frame { id, meta: vec![7; meta], body }
    }

    fn plain(len: usize) -> Body {
        // A pattern in which a part at the wrong place shows.
        Body::Plain((0..len).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<_>>().into())
    }

    #[test]
    fn frames_of_every_size_arrive_whole_and_in_order_though_nobody_waits_for_the_reader() {
        let arena = arena();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let outbox = Outbox::start(ours, &arena).unwrap();
        let mut inbox = Inbox::new(&arena).unwrap();
        let sizes = [(1, 0), (1, 1), (300, 2048), (70_000, 10), (5, LARGEST_BODY), (1, STAGING), (2, 0)];
        for (id, (meta, body)) in sizes.into_iter().enumerate() {
            let body = if body == 0 { Body::None } else { plain(body) };
            outbox.push(frame(id as u64, meta, body));
            outbox.flush();
        }
        let mut secret = arena.try_take(32).unwrap();
        secret.with_mut(|bytes| bytes.fill(0xA5));
        outbox.push(frame(99, 1, Body::Secret(secret)));
        outbox.flush();

        let mut seen = 0;
        while seen <= sizes.len() {
            assert!(inbox.fill(|room| theirs.read(room)).unwrap() > 0);
            let room = |_, _: &[u8], len| plain(len);
            while let Some(frame) = inbox.next(room).unwrap() {
                let Body::Plain(bytes) = &frame.body else {
                    assert_eq!((frame.body.len(), sizes[seen].1), (0, 0));
                    seen += 1;
                    continue;
                };
                if let Some((meta, body)) = sizes.get(seen) {
                    assert_eq!((frame.id, frame.meta.len(), bytes.len()), (seen as u64, *meta, *body));
                    assert!(frame.body.copy_out(0, &mut [0; 0]) == 0 && frame.meta.iter().all(|b| *b == 7));
                    let Body::Plain(wanted) = plain(*body) else { unreachable!() };
                    assert!(*bytes == wanted, "frame {seen}");
                } else {
                    assert_eq!((frame.id, bytes.as_slice()), (99, &[0xA5; 32][..]));
                }
                seen += 1;
            }
        }
        assert!(inbox.staging.with(|bytes| bytes.iter().all(|byte| *byte == 0)), "not wiped");
        assert!(lock(&outbox.moving).staging.with(|bytes| bytes.iter().all(|byte| *byte == 0)), "not wiped");
        outbox.close();
    }

    #[test]
    fn a_peer_that_is_gone_closes_the_outbox() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let outbox = Outbox::start(ours, &arena()).unwrap();
        drop(theirs);
        outbox.push(frame(1, 1, Body::None));
        outbox.flush();
        assert!(outbox.closed.load(Ordering::Acquire));
    }

    #[test]
    fn lengths_beyond_the_limits_and_bodies_that_do_not_fit_are_refused() {
        let head =
            |meta: u32, body: u32| [&meta.to_le_bytes()[..], &body.to_le_bytes(), &[0; 8], &[1]].concat();
        let (meta, body) = (u32::try_from(LARGEST_META).unwrap(), u32::try_from(LARGEST_BODY).unwrap());
        for (bytes, fits) in [
            (head(0, 0), false),
            (head(meta + 1, 0), false),
            (head(1, body + 1), false),
            (head(1, u32::MAX), false),
            (head(1, 5), false),
            (head(1, 4), true),
        ] {
            let mut inbox = Inbox::new(&arena()).unwrap();
            inbox.fill(|mut room| room.write(&bytes)).unwrap();
            assert_eq!(inbox.next(|_, _, _| plain(4)).is_ok(), fits);
        }
    }
}
