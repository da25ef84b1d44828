//! Waiting for conditions: a growing record, a gate, a function that returns `Some`.
//!
//! # Failure
//! A condition that isn't met in time panics with its description, unless the function returns an
//! `Option`.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait for an event, even on a busy machine, before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Interval between two checks of a condition that can't announce itself, such as the state of a
/// process.
const POLL: Duration = Duration::from_millis(4);

/// Items in the order in which they came, with a way to wait for the next one.
#[derive(Debug)]
pub struct Record<T> {
    items: Mutex<Vec<T>>,
    grown: Condvar,
}

impl<T> Default for Record<T> {
    fn default() -> Self {
        Self { items: Mutex::default(), grown: Condvar::new() }
    }
}

impl<T: Clone> Record<T> {
    fn lock(&self) -> MutexGuard<'_, Vec<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an item and wakes all waiting threads.
    pub fn push(&self, item: T) {
        self.lock().push(item);
        self.grown.notify_all();
    }

    /// Returns all items so far.
    pub fn all(&self) -> Vec<T> {
        self.lock().clone()
    }

    /// Returns the number of items so far.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Waits until `predicate` returns a result for the items; `None` when `timeout` has passed.
    pub fn wait_for<R>(
        &self,
        timeout: Duration,
        mut predicate: impl FnMut(&[T]) -> Option<R>,
    ) -> Option<R> {
        let deadline = Instant::now() + timeout;
        let mut items = self.lock();
        loop {
            if let Some(result) = predicate(&items) {
                return Some(result);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.grown.wait_timeout(items, left);
            items = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for [`PATIENCE`] at most until there are at least `count` items.
    pub fn wait_for_count(&self, count: usize) {
        let enough = self.wait_for(PATIENCE, |items| (items.len() >= count).then_some(()));
        assert!(enough.is_some(), "waited for {count}, got {}", self.len());
    }
}

/// A gate that holds every thread that wants to pass while it is closed.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets all threads pass from now on.
    pub fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    /// Waits until the gate opens, for twice [`PATIENCE`] at most, which is longer than any test
    /// waits for an effect of the gate.
    pub fn pass(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_timeout_while(open, 2 * PATIENCE, |open| !*open));
    }
}

/// Waits until `condition` returns a result. Panics with `what` after [`PATIENCE`].
#[track_caller]
pub fn eventually<R>(what: &str, condition: impl FnMut() -> Option<R>) -> R {
    match within(PATIENCE, condition) {
        Some(result) => result,
        None => panic!("waited in vain: {what}"),
    }
}

/// Waits until `condition` returns a result; `None` when `timeout` has passed.
pub fn within<R>(timeout: Duration, mut condition: impl FnMut() -> Option<R>) -> Option<R> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(result) = condition() {
            return Some(result);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(POLL);
    }
}
