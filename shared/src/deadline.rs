//! A point on the monotonic clock by which something must have happened.
//!
//! Everything in the life of a mail that waits takes a deadline, and a limit of
//! its own only shortens it.

use std::time::{Duration, Instant};

/// A point in time; copies freely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// `timeout` from now.
    pub fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout)
    }

    /// At this instant.
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// The earlier of this and `timeout` from now.
    pub fn at_most(self, timeout: Duration) -> Self {
        self.min(Self::after(timeout))
    }

    /// What remains, zero when it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn expired(self) -> bool {
        self.0 <= Instant::now()
    }

    /// The instant itself, for interfaces that take one.
    pub fn instant(self) -> Instant {
        self.0
    }
}
