//! What systemd is told (sd_notify(3)), and when the watchdog is fed.
//!
//! # Failure
//! See `notifier`. A watchdog interval that makes no sense is logged, and no watchdog is fed.

use std::time::{Duration, Instant};

use slog::{Logger, warn};

use crate::services::notifier::{Notifier, assignment};

/// How often systemd is asked for more time during a drain.
const EXTEND_EVERY: Duration = Duration::from_secs(2);
/// How much time systemd is asked for.
const EXTEND_BY: Duration = Duration::from_secs(10);
/// Shortest and longest time between two feeds of the watchdog. A shorter one would keep the loop
/// busy.
const FEED_BOUNDS: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(3600)];

/// Sends notifications to systemd, some of them at regular times.
#[derive(Debug)]
pub(super) struct Systemd {
    notifier: Notifier,
    /// Time between two feeds.
    watchdog: Option<Duration>,
    next_watchdog: Option<Instant>,
    next_extension: Option<Instant>,
    /// The line for `systemctl status` that was set last.
    shown: String,
}

impl Systemd {
    /// Reads the socket and the watchdog's interval from the environment.
    pub(super) fn new(log: &Logger, now: Instant) -> Self {
        let variable = |name| std::env::var(name).ok();
        let (time, pid) = (variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"));
        let watchdog = watchdog(time.as_deref(), pid.as_deref()).unwrap_or_else(|value| {
            warn!(log, "no watchdog is fed: WATCHDOG_USEC is no number of microseconds";
                "WATCHDOG_USEC" => value);
            None
        });
        Self {
            notifier: Notifier::new(log.clone(), variable("NOTIFY_SOCKET").as_deref(), now),
            watchdog,
            next_watchdog: watchdog.map(|_| now),
            next_extension: None,
            shown: String::new(),
        }
    }

    /// Says that the daemon serves, at the start and after a reload. systemd gets the state in a
    /// datagram of its own, which no text can spoil.
    pub(super) fn ready(&mut self, status: &str) {
        self.status(status);
        self.notifier.tell("READY=1".into());
    }

    /// Says that a reload begins, with the time that `Type=notify-reload` asks for.
    pub(super) fn reloading(&mut self) {
        let microseconds = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
            .map_or(0, |time| time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000);
        self.notifier.tell(format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// Sets the line for `systemctl status`, unless it is as it was. There will be another one.
    pub(super) fn mention_status(&mut self, status: String) {
        if self.shown != status {
            self.notifier.mention(&assignment("STATUS", &status));
            self.shown = status;
        }
    }

    /// Sets the line for `systemctl status`.
    pub(super) fn status(&mut self, status: &str) {
        status.clone_into(&mut self.shown);
        self.notifier.tell(assignment("STATUS", status));
    }

    /// Says that the daemon stops, and asks for time until it has stopped.
    pub(super) fn stopping(&mut self, status: &str, now: Instant) {
        self.notifier.tell("STOPPING=1".into());
        self.status(status);
        self.next_extension = Some(now);
    }

    /// Feeds the watchdog and asks for time, when that is due. Only a turn of the loop calls this.
    pub(super) fn tick(&mut self, now: Instant) {
        if let (Some(at), Some(interval)) = (self.next_watchdog, self.watchdog)
            && at <= now
        {
            self.notifier.mention("WATCHDOG=1");
            self.next_watchdog = Some(now + interval);
        }
        if self.next_extension.is_some_and(|at| at <= now) {
            let microseconds = EXTEND_BY.as_micros();
            self.notifier.mention(&format!("EXTEND_TIMEOUT_USEC={microseconds}"));
            self.next_extension = Some(now + EXTEND_EVERY);
        }
        self.notifier.tick(now);
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let due = [self.next_watchdog, self.next_extension, self.notifier.next_tick()];
        due.into_iter().flatten().min()
    }
}

/// Returns the time between two feeds of the watchdog that WATCHDOG_USEC and WATCHDOG_PID ask for
/// (sd_watchdog_enabled(3)).
///
/// # Errors
/// The value of WATCHDOG_USEC, which is none.
fn watchdog(time: Option<&str>, pid: Option<&str>) -> Result<Option<Duration>, String> {
    let Some(time) = time else { return Ok(None) };
    if pid.is_some_and(|pid| pid.parse() != Ok(std::process::id())) {
        return Ok(None);
    }
    match time.parse() {
        Err(_) | Ok(0 | u64::MAX) => Err(time.to_owned()),
        Ok(microseconds) => {
            let [shortest, longest] = FEED_BOUNDS;
            Ok(Some(Duration::from_micros(microseconds / 2).clamp(shortest, longest)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdogs_interval() {
        let own = std::process::id().to_string();
        let milliseconds = |number| Ok(Some(Duration::from_millis(number)));
        for (time, pid, expected) in [
            (None, None, Ok(None)),
            (None, Some(&*own), Ok(None)),
            (Some("30000000"), None, milliseconds(15_000)),
            (Some("30000000"), Some(&*own), milliseconds(15_000)),
            (Some("30000000"), Some("1"), Ok(None)),
            (Some("30000000"), Some("x"), Ok(None)),
            (Some("0"), Some("1"), Ok(None)),
            (Some("1"), None, milliseconds(10)),
            (Some("999"), None, milliseconds(10)),
            (Some("18446744073709551614"), None, milliseconds(3_600_000)),
        ] {
            assert_eq!(watchdog(time, pid), expected, "{time:?} {pid:?}");
        }
        for time in
            ["", "0", "-1", "x", "5s", "1.5", "18446744073709551615", "99999999999999999999"]
        {
            assert_eq!(watchdog(Some(time), None), Err(time.to_owned()));
        }
    }
}
