//! The bound on memory for messages (`mail_memory`).
//!
//! Contract: a request that outgrows its thread's own buffer first takes its whole length from the
//! budget, in one step, and gives it back when the mail is finished. A thread never waits while it
//! holds a share, so waiting can't become a deadlock. Waiting threads are served in order; a
//! request that is larger than the budget runs when no other share is held.
//!
//! # Failure
//! A thread that waits until its deadline gets nothing.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};
use qrelay_shared::deadline::Deadline;

/// The memory of a worker for messages.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    waiting: VecDeque<u64>,
    next_ticket: u64,
}

/// A part of the budget; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Takes `bytes`, waiting for them until the deadline.
    pub(crate) fn take(&self, bytes: usize, deadline: Deadline) -> Option<Share<'_>> {
        let bytes = bytes.min(self.limit);
        let mut state = self.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waiting.push_back(ticket);
        while state.waiting.front() != Some(&ticket) || self.limit - state.used < bytes {
            if self.changed.wait_until(&mut state, deadline.instant()).timed_out() {
                state.waiting.retain(|&other| other != ticket);
                self.changed.notify_all();
                return None;
            }
        }
        state.waiting.pop_front();
        state.used += bytes;
        if !state.waiting.is_empty() {
            self.changed.notify_all();
        }
        Some(Share { budget: self, bytes })
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.budget.state.lock().used -= self.bytes;
        self.budget.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(5))
    }

    #[test]
    fn takes_and_gives_back() {
        let budget = Budget::new(100);
        let first = budget.take(60, soon()).expect("free");
        assert!(budget.take(41, soon()).is_none());
        let second = budget.take(40, soon()).expect("free");
        drop(first);
        assert!(budget.take(60, soon()).is_some());
        drop(second);
        assert!(budget.take(100, soon()).is_some());
    }

    #[test]
    fn what_exceeds_everything_runs_alone() {
        let budget = Budget::new(100);
        let all = budget.take(1000, soon()).expect("free");
        assert!(budget.take(1, soon()).is_none());
        drop(all);
        assert!(budget.take(1, soon()).is_some());
    }

    #[test]
    fn serves_in_order() {
        let budget = Budget::new(100);
        let late = Deadline::after(Duration::from_secs(10));
        let held = budget.take(50, late).expect("free");
        std::thread::scope(|scope| {
            let large = scope.spawn(|| budget.take(100, late).is_some());
            while budget.state.lock().waiting.is_empty() {
                std::thread::yield_now();
            }
            // There is room, but somebody else was first.
            assert!(budget.take(10, soon()).is_none());
            drop(held);
            assert!(large.join().expect("joins"));
        });
        assert_eq!(budget.state.lock().used, 0);
    }

    #[test]
    fn who_gives_up_lets_the_next_one_pass() {
        let budget = Budget::new(100);
        let held = budget.take(50, soon()).expect("free");
        std::thread::scope(|scope| {
            let large = scope.spawn(|| budget.take(100, soon()).is_some());
            while budget.state.lock().waiting.is_empty() {
                std::thread::yield_now();
            }
            let late = Deadline::after(Duration::from_secs(10));
            assert!(budget.take(10, late).is_some());
            assert!(!large.join().expect("joins"));
        });
        drop(held);
    }
}
