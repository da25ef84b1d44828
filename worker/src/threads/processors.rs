//! Whether the machine's processors are all busy: then a further thread only takes time from the
//! others.
//!
//! # Failure
//! Without /proc the processors never count as busy, so that mails get their threads.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

/// How often the processors are looked at. A look costs about two microseconds.
const INTERVAL: Duration = Duration::from_millis(5);

/// Looks in a row that have to find a processor idle. A single look sees one moment, and even while
/// there is always something to do, a thread may just be between two things.
const CERTAIN: u64 = 4;

/// The processors of the machine.
#[derive(Debug)]
pub(super) struct Processors {
    /// /proc/loadavg (proc_loadavg(5)).
    load: Option<File>,
    count: u64,
    /// When the next look is due, in nanoseconds.
    next: AtomicU64,
    /// Looks in a row that have found a processor idle.
    idle: AtomicU64,
}

impl Processors {
    /// Opens what is looked at.
    pub(super) fn open() -> Self {
        let count = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        Self {
            load: File::open("/proc/loadavg").ok(),
            count: count.map_or(1, i64::unsigned_abs),
            next: AtomicU64::new(0),
            idle: AtomicU64::new(CERTAIN),
        }
    }

    /// Returns whether a processor has had nothing to do lately. Looks if that is due.
    pub(super) fn are_idle(&self, now: Duration) -> bool {
        let Some(load) = &self.load else { return true };
        let (due, now) = (self.next.load(Ordering::Relaxed), now.as_nanos() as u64);
        let after = now + INTERVAL.as_nanos() as u64;
        // One thread looks for all.
        if due <= now
            && self.next.compare_exchange(due, after, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            let idle = match running(load) {
                Some(running) if running > self.count => 0,
                _ => self.idle.load(Ordering::Relaxed).saturating_add(1),
            };
            self.idle.store(idle, Ordering::Relaxed);
        }
        self.idle.load(Ordering::Relaxed) >= CERTAIN
    }
}

/// Returns the number of threads on the machine that run or could run, this one included.
fn running(load: &File) -> Option<u64> {
    let mut text = [0; 128];
    let length = load.read_at(&mut text, 0).ok()?;
    parse(text.get(..length)?)
}

/// Parses the number before the slash in `0.20 0.18 0.12 1/80 11206`.
fn parse(load: &[u8]) -> Option<u64> {
    let fields = str::from_utf8(load).ok()?.split(' ').nth(3)?;
    fields.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_running_threads_is_parsed() {
        assert_eq!(parse(b"0.20 0.18 0.12 1/80 11206\n"), Some(1));
        for nonsense in [&b""[..], b"0.20 0.18", b"a b c d e", b"0 0 0 /80 1", &[0xff; 40]] {
            assert_eq!(parse(nonsense), None);
        }
        let load = File::open("/proc/loadavg").expect("/proc");
        assert!(running(&load) >= Some(1), "this thread runs");
    }

    #[test]
    fn only_several_looks_in_a_row_are_certain() {
        let mut processors = Processors::open();
        processors.count = u64::MAX;
        let at = |look: u32| INTERVAL * look;
        assert!(processors.are_idle(at(0)), "until somebody has looked");
        processors.idle = AtomicU64::new(0);
        for look in 1..=CERTAIN as u32 {
            assert!(!processors.are_idle(at(look) - Duration::from_nanos(1)), "not due");
            assert_eq!(processors.are_idle(at(look)), u64::from(look) == CERTAIN);
        }
        processors.count = 0;
        assert!(!processors.are_idle(at(100)), "this thread runs");
        assert!(!processors.are_idle(at(100)));
    }
}
