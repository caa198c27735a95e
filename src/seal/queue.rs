//! The queue in front of a lane: bounded, foreground before background, fair between tenants.
//!
//! Each flow (tenant) has its own line and lines take turns, so a tenant that sends a hundred jobs
//! waits behind itself. Background work runs only when no foreground work waits, and never in all threads
//! of a lane that has several: a call in the device cannot be interrupted, so what comes a moment later
//! would wait for the end of one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// When a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// Somebody waits for it.
    Foreground,
    /// It runs when nothing else waits.
    Background,
}

/// Lines that take turns.
struct Lines<T> {
    turns: VecDeque<u64>,
    lines: HashMap<u64, VecDeque<T>>,
}

impl<T> Lines<T> {
    fn push(&mut self, flow: u64, item: T) {
        let line = self.lines.entry(flow).or_default();
        if line.is_empty() {
            self.turns.push_back(flow);
        }
        line.push_back(item);
    }

    fn pop(&mut self) -> Option<T> {
        let flow = self.turns.pop_front()?;
        let line = self.lines.get_mut(&flow)?;
        let item = line.pop_front();
        if line.is_empty() {
            // A tenant that went quiet must not stay in the map for ever.
            self.lines.remove(&flow);
        } else {
            self.turns.push_back(flow);
        }
        item
    }
}

struct State<T> {
    foreground: Lines<T>,
    background: Lines<T>,
    len: usize,
    /// Background items that were taken and not released.
    in_background: usize,
    closed: bool,
}

/// The queue.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
    capacity: usize,
    /// Background items that may be taken at the same time.
    background: usize,
}

impl<T> State<T> {
    fn take(&mut self, background: usize) -> Option<(Priority, T)> {
        let taken = match self.foreground.pop() {
            Some(item) => (Priority::Foreground, item),
            None if self.in_background < background => {
                let item = self.background.pop()?;
                self.in_background += 1;
                (Priority::Background, item)
            }
            None => return None,
        };
        self.len -= 1;
        Some(taken)
    }
}

impl<T> Queue<T> {
    /// For at most `capacity` items, of which `background` may be in work at a time for nobody who waits.
    pub(crate) fn new(capacity: usize, background: usize) -> Self {
        let lines = || Lines { turns: VecDeque::new(), lines: HashMap::new() };
        let state =
            State { foreground: lines(), background: lines(), len: 0, in_background: 0, closed: false };
        Self { state: Mutex::new(state), arrived: Condvar::new(), capacity, background }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the item back if the queue is full or closed.
    pub(crate) fn push(&self, priority: Priority, flow: u64, item: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.closed || state.len >= self.capacity {
            return Err(item);
        }
        match priority {
            Priority::Foreground => state.foreground.push(flow, item),
            Priority::Background => state.background.push(flow, item),
        }
        state.len += 1;
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    /// The next item, without waiting. One of background work has to be released when it is done.
    pub(crate) fn try_pop(&self) -> Option<(Priority, T)> {
        self.lock().take(self.background)
    }

    /// The next item, waiting for at most `patience`; `Err` once the queue is closed and empty.
    pub(crate) fn pop(&self, patience: Duration) -> Result<Option<(Priority, T)>, Closed> {
        let mut state = self.lock();
        if let Some(taken) = state.take(self.background) {
            return Ok(Some(taken));
        }
        if !state.closed {
            state = self.arrived.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
        match state.take(self.background) {
            Some(taken) => Ok(Some(taken)),
            None if state.closed && state.len == 0 => Err(Closed),
            None => Ok(None),
        }
    }

    /// Background work that was taken is done, or its thread was given up.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        state.in_background = state.in_background.saturating_sub(1);
        drop(state);
        self.arrived.notify_one();
    }

    /// Refuses new items; what is queued is still taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().len
    }
}

/// The queue was closed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Closed, Priority, Queue};

    #[test]
    fn tenants_take_turns_and_background_waits() {
        let queue = Queue::new(10, 1);
        for item in ["a1", "a2", "a3"] {
            queue.push(Priority::Foreground, 1, item).unwrap();
        }
        queue.push(Priority::Background, 3, "late").unwrap();
        queue.push(Priority::Foreground, 2, "b1").unwrap();

        let order: Vec<_> = std::iter::from_fn(|| queue.try_pop().map(|(_, item)| item)).collect();

        assert_eq!(order, ["a1", "b1", "a2", "a3", "late"]);
    }

    #[test]
    fn a_full_queue_gives_the_item_back_and_a_closed_one_drains() {
        let queue = Queue::new(1, 1);
        queue.push(Priority::Foreground, 1, 1).unwrap();
        assert_eq!(queue.push(Priority::Foreground, 1, 2), Err(2));
        queue.close();
        assert_eq!(queue.pop(Duration::ZERO), Ok(Some((Priority::Foreground, 1))));
        assert_eq!(queue.pop(Duration::ZERO), Err(Closed));
    }

    #[test]
    fn background_work_leaves_threads_for_what_comes() {
        let queue = Queue::new(10, 2);
        for item in 1..=3 {
            queue.push(Priority::Background, 1, item).unwrap();
        }
        assert!(queue.try_pop().is_some() && queue.try_pop().is_some());
        assert_eq!(queue.try_pop(), None, "a third at the same time");
        queue.push(Priority::Foreground, 1, 4).unwrap();
        assert_eq!(queue.try_pop(), Some((Priority::Foreground, 4)));
        queue.release();
        assert_eq!(queue.pop(Duration::ZERO), Ok(Some((Priority::Background, 3))));
    }
}
