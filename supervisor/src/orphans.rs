//! The programs that a dead worker was running: they are the supervisor's
//! children now, and must not deliver a mail whose client is told to try again.
//!
//! Each leads a process group of its own. The group gets SIGTERM, SIGKILL after
//! a grace, and whatever is left of it SIGKILL when the leader ends; only then
//! is the client answered.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use qrelay_shared::ipc::message::JobId;

/// From SIGTERM to SIGKILL, as for a program that has timed out.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Orphan {
    job: JobId,
    kill_at: Instant,
}

/// Those that still run.
#[derive(Debug, Default)]
pub struct Orphans {
    table: HashMap<Pid, Orphan>,
}

impl Orphans {
    /// Tells a dead worker's programs to end; the result is the jobs they were for.
    pub fn adopt(&mut self, children: &[(JobId, Pid)], now: Instant) -> Vec<JobId> {
        let mut jobs = Vec::new();
        for &(job, pid) in children {
            // The worker had not reaped it, so the group is still this program's. A
            // group that can't be found has no member that could deliver anything.
            if killpg(pid, Signal::SIGTERM).is_ok() {
                self.table.insert(pid, Orphan { job, kill_at: now + GRACE });
                jobs.push(job);
            }
        }
        jobs
    }

    /// This child is about to be reaped: ends the rest of its group, and tells whose it was.
    pub fn reaping(&mut self, pid: Pid) -> Option<JobId> {
        let orphan = self.table.remove(&pid)?;
        let _ = killpg(pid, Signal::SIGKILL);
        Some(orphan.job)
    }

    /// SIGKILL for those that ignore SIGTERM.
    pub fn kill_overdue(&mut self, now: Instant) {
        for (&pid, orphan) in self.table.iter_mut().filter(|(_, o)| o.kill_at <= now) {
            let _ = killpg(pid, Signal::SIGKILL);
            orphan.kill_at = now + GRACE;
        }
    }

    /// SIGKILL for all.
    pub fn kill_all(&self) {
        for &pid in self.table.keys() {
            let _ = killpg(pid, Signal::SIGKILL);
        }
    }

    /// When [`Self::kill_overdue`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.table.values().map(|orphan| orphan.kill_at).min()
    }

    /// None is left.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}
