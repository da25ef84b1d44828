//! Deadlines: points on the monotonic clock by which an operation must be done.
//!
//! Each mail has one deadline. Every operation of the mail that waits takes the deadline, and a
//! time limit of the operation itself can only shorten it.

use std::time::{Duration, Instant};

/// A point in time on the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// Returns the deadline `timeout` from now.
    pub fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout)
    }

    /// Returns the deadline at `instant`.
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// Returns the earlier of this deadline and `timeout` from now.
    pub fn at_most(self, timeout: Duration) -> Self {
        self.min(Self::after(timeout))
    }

    /// Returns the time until the deadline, or zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Returns whether the deadline has passed.
    pub fn expired(self) -> bool {
        self.0 <= Instant::now()
    }

    /// Returns the deadline as an instant, for interfaces that take one.
    pub fn instant(self) -> Instant {
        self.0
    }
}
