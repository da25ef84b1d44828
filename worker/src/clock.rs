//! The clock of jobs: CLOCK_BOOTTIME, which supervisor and workers share.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Returns the time since the machine started; zero if the system doesn't know.
pub(crate) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// Returns how long ago a time was, given in nanoseconds of this clock; zero for a time to come.
pub(crate) fn age(nanoseconds: u64) -> Duration {
    now().saturating_sub(Duration::from_nanos(nanoseconds))
}
