//! The programs that a dead worker was running: they are the supervisor's
//! children now, and must not deliver a mail whose client is told to try again.
//!
//! Each leads a process group of its own. The group gets SIGTERM, SIGKILL after
//! a grace, and whatever is left of it SIGKILL when the leader ends; only then
//! is the client answered. One that the worker had started and not yet
//! reported is recognized by its standard input, and killed at once.
//!
//! # Failure
//! A program that became another user's can't be signalled; it isn't waited for.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgid, getpgrp};
use qrelay_shared::ipc::message::JobId;
use qrelay_shared::sys::input;

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

    /// Kills the programs that a dead worker had started for these jobs without being able to
    /// report them; the result is those jobs.
    pub fn adopt_unreported(&mut self, jobs: &[JobId], now: Instant) -> Vec<JobId> {
        let mut found = Vec::new();
        for pid in children() {
            let group = getpgid(Some(pid)).unwrap_or(pid);
            if self.table.contains_key(&pid) || self.table.contains_key(&group) {
                continue;
            }
            let Some(job) = job_of(pid, jobs) else { continue };
            // Unreported means that it has just begun.
            let _ = kill(pid, Signal::SIGKILL);
            if group != getpgrp() {
                let _ = killpg(group, Signal::SIGKILL);
            }
            self.table.insert(pid, Orphan { job, kill_at: now + GRACE });
            found.push(job);
        }
        found
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

/// Which of the jobs a child works for: the one on its standard input, or, in a worker's copy
/// that hasn't become the program yet, any that is open.
fn job_of(pid: Pid, jobs: &[JobId]) -> Option<JobId> {
    let input = input::mail_of(pid).filter(|job| jobs.contains(job));
    input.or_else(|| input::mails_of(pid).into_iter().find(|job| jobs.contains(job)))
}

/// All children of this process. (The kernel's own list of them is a build option.)
fn children() -> Vec<Pid> {
    let own = Pid::this();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.map(Pid::from_raw).filter(|&pid| parent(pid) == Some(own)).collect()
}

/// The fourth field of proc_pid_stat(5); the second is in parentheses and may contain anything.
fn parent(pid: Pid) -> Option<Pid> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after = stat.iter().rposition(|&byte| byte == b')')?;
    let mut fields = str::from_utf8(&stat[after + 1..]).ok()?.split_ascii_whitespace();
    fields.nth(1)?.parse().ok().map(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, Command, Stdio};

    /// A program that a worker might have started for this job.
    fn program(job: JobId) -> Child {
        let input = input::sealed(job, &[b"mail"]).expect("input");
        let mut command = Command::new("/bin/sleep");
        command.arg("60").stdin(Stdio::from(input)).process_group(0);
        command.spawn().expect("spawn")
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_raw(child.id().cast_signed())
    }

    #[test]
    fn reported_programs_are_told_to_end() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let mut child = program(71_001);
        let reported = [(71_001, pid(&child))];
        assert_eq!(orphans.adopt(&reported, now), [71_001]);
        assert_eq!(orphans.adopt_unreported(&[71_001], now), [], "it is known already");
        assert_eq!(orphans.next_deadline(), Some(now + GRACE));
        assert_eq!(child.wait().expect("wait").signal(), Some(Signal::SIGTERM as i32));
        assert_eq!(orphans.reaping(pid(&child)), Some(71_001));
        assert!(orphans.is_empty());
    }

    #[test]
    fn unreported_programs_are_found_by_their_input() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let (mut mine, mut other) = (program(71_002), program(71_003));
        assert_eq!(orphans.adopt_unreported(&[71_002, 71_004], now), [71_002]);
        assert_eq!(mine.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
        assert_eq!(orphans.reaping(pid(&mine)), Some(71_002));
        assert!(other.try_wait().expect("wait").is_none(), "another worker's goes on");
        other.kill().expect("kill");
        other.wait().expect("wait");
    }

    #[test]
    fn who_does_not_obey_is_killed() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let mut child = program(71_005);
        orphans.adopt(&[(71_005, pid(&child))], now);
        orphans.kill_overdue(now + GRACE);
        child.wait().expect("wait");
        assert_eq!(orphans.next_deadline(), Some(now + 2 * GRACE));
    }
}
