//! What systemd is told (sd_notify(3)), and when the watchdog is fed.
//!
//! # Failure
//! Without NOTIFY_SOCKET nothing is sent. A message that can't be sent is lost, as systemd would
//! lose it too.

use std::time::{Duration, Instant};

use libsystemd::daemon::{NotifyState, notify, watchdog_enabled};

/// How often systemd is asked for more time during a drain.
const EXTEND_EVERY: Duration = Duration::from_secs(2);
/// How much time systemd is asked for.
const EXTEND_BY: Duration = Duration::from_secs(10);

/// Sends notifications to systemd, some of them at regular times.
#[derive(Debug)]
pub(super) struct Systemd {
    watchdog: Option<Duration>,
    next_watchdog: Option<Instant>,
    next_extension: Option<Instant>,
}

impl Systemd {
    /// Reads the watchdog's interval from the environment.
    pub(super) fn new(now: Instant) -> Self {
        let watchdog = watchdog_enabled(false).map(|interval| interval / 2);
        Self { watchdog, next_watchdog: watchdog.map(|_| now), next_extension: None }
    }

    /// Says that the daemon serves, at the start and after a reload.
    pub(super) fn ready(&self, status: String) {
        tell(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// Says that a reload begins, with the time that `Type=notify-reload` asks for.
    pub(super) fn reloading(&self) {
        let microseconds = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
            .map_or(0, |time| time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000);
        tell(&[
            NotifyState::Reloading,
            NotifyState::Other(format!("MONOTONIC_USEC={microseconds}")),
        ]);
    }

    /// Sets the line for `systemctl status`.
    pub(super) fn status(&self, status: String) {
        tell(&[NotifyState::Status(status)]);
    }

    /// Says that the daemon stops, and asks for time until it has stopped.
    pub(super) fn stopping(&mut self, status: String, now: Instant) {
        tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
        self.next_extension = Some(now);
    }

    /// Feeds the watchdog and asks for time, when that is due. Only a turn of the loop calls this.
    pub(super) fn tick(&mut self, now: Instant) {
        if let (Some(at), Some(interval)) = (self.next_watchdog, self.watchdog)
            && at <= now
        {
            tell(&[NotifyState::Watchdog]);
            self.next_watchdog = Some(now + interval);
        }
        if self.next_extension.is_some_and(|at| at <= now) {
            let microseconds = EXTEND_BY.as_micros();
            tell(&[NotifyState::Other(format!("EXTEND_TIMEOUT_USEC={microseconds}"))]);
            self.next_extension = Some(now + EXTEND_EVERY);
        }
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.next_watchdog.into_iter().chain(self.next_extension).min()
    }
}

fn tell(states: &[NotifyState]) {
    let _ = notify(false, states);
}
