//! The queue in front of a lane: bounded, foreground before background, fair between tenants.
//!
//! Each flow (tenant) has its own line and lines take turns, so a tenant that sends a hundred jobs
//! waits behind itself. Background work runs only when no foreground work waits.

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
    closed: bool,
}

/// The queue.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
    capacity: usize,
}

impl<T> Queue<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        let lines = || Lines { turns: VecDeque::new(), lines: HashMap::new() };
        let state = State { foreground: lines(), background: lines(), len: 0, closed: false };
        Self { state: Mutex::new(state), arrived: Condvar::new(), capacity }
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

    /// The next item, without waiting.
    pub(crate) fn try_pop(&self) -> Option<T> {
        let mut state = self.lock();
        let item = state.foreground.pop().or_else(|| state.background.pop())?;
        state.len -= 1;
        Some(item)
    }

    /// The next item, waiting for at most `patience`; `Err` once the queue is closed and empty.
    pub(crate) fn pop(&self, patience: Duration) -> Result<Option<T>, Closed> {
        let mut state = self.lock();
        if state.len == 0 && !state.closed {
            state = self.arrived.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
        match state.foreground.pop().or_else(|| state.background.pop()) {
            Some(item) => {
                state.len -= 1;
                Ok(Some(item))
            }
            None if state.closed => Err(Closed),
            None => Ok(None),
        }
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
        let queue = Queue::new(10);
        for item in ["a1", "a2", "a3"] {
            queue.push(Priority::Foreground, 1, item).unwrap();
        }
        queue.push(Priority::Background, 3, "late").unwrap();
        queue.push(Priority::Foreground, 2, "b1").unwrap();

        let order: Vec<_> = std::iter::from_fn(|| queue.try_pop()).collect();

        assert_eq!(order, ["a1", "b1", "a2", "a3", "late"]);
    }

    #[test]
    fn a_full_queue_gives_the_item_back_and_a_closed_one_drains() {
        let queue = Queue::new(1);
        queue.push(Priority::Foreground, 1, 1).unwrap();
        assert_eq!(queue.push(Priority::Foreground, 1, 2), Err(2));
        queue.close();
        assert_eq!(queue.pop(Duration::ZERO), Ok(Some(1)));
        assert_eq!(queue.pop(Duration::ZERO), Err(Closed));
    }
}
