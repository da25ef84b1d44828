//! The programs that a dead worker was running: they are the supervisor's
//! children now, and must not deliver a mail whose client is told to try again.
//!
//! Each leads a process group of its own. The group gets SIGTERM, SIGKILL after
//! a grace, and whatever is left of it SIGKILL when the leader ends; only when
//! nothing is left is the client answered. One that the worker had started and not yet
//! reported is recognized by its standard input.
//!
//! # Failure
//! A program that became another user's can't be signalled; it isn't waited for.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgid, getpgrp};
use qrelay_shared::ipc::message::JobId;
use qrelay_shared::sys::input;

/// From SIGTERM to SIGKILL, as for a program that has timed out.
const GRACE: Duration = Duration::from_secs(10);

/// How long the rest of a group may take to vanish after SIGKILL. What takes
/// longer hangs in the kernel, and doesn't come back to do anything.
const VANISH: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Orphan {
    job: JobId,
    group: Pid,
    /// It has been reaped, and the rest of its group killed.
    ended: bool,
    /// When it is killed or, if it has ended, no longer waited for.
    due: Instant,
}

impl Orphan {
    fn new(job: JobId, group: Pid, now: Instant) -> Self {
        Self { job, group, ended: false, due: now + GRACE }
    }

    /// Nothing of it is left. (A signal of 0 does nothing: should the group's number be another
    /// one's by now, that isn't disturbed.)
    fn is_over(&self, now: Instant) -> bool {
        self.ended && (self.due <= now || killpg(self.group, None) == Err(Errno::ESRCH))
    }
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
                self.table.insert(pid, Orphan::new(job, pid, now));
                jobs.push(job);
            }
        }
        jobs
    }

    /// The same for programs that a dead worker had started for these jobs without being able to
    /// report them.
    pub fn adopt_unreported(&mut self, jobs: &[JobId], now: Instant) -> Vec<JobId> {
        let mut found = Vec::new();
        for pid in children() {
            let group = getpgid(Some(pid)).unwrap_or(pid);
            if self.table.contains_key(&pid) || self.table.contains_key(&group) {
                continue;
            }
            let (job, group) = match input::mail_of(pid).filter(|job| jobs.contains(job)) {
                Some(job) if group != getpgrp() => {
                    let _ = killpg(group, Signal::SIGTERM);
                    (job, group)
                }
                _ => match input::mails_of(pid).into_iter().find(|job| jobs.contains(job)) {
                    // A copy of the worker that hasn't become the program yet, and won't.
                    Some(job) => {
                        let _ = kill(pid, Signal::SIGKILL);
                        (job, pid)
                    }
                    None => continue,
                },
            };
            self.table.insert(pid, Orphan::new(job, group, now));
            found.push(job);
        }
        found
    }

    /// This child is about to be reaped: ends the rest of its group. Says whether it is one of
    /// these.
    pub fn reaping(&mut self, pid: Pid, now: Instant) -> bool {
        let Some(orphan) = self.table.get_mut(&pid) else { return false };
        let _ = killpg(orphan.group, Signal::SIGKILL);
        orphan.ended = true;
        orphan.due = now + VANISH;
        true
    }

    /// The jobs whose programs are over, all of their groups included.
    pub fn over(&mut self, now: Instant) -> Vec<JobId> {
        self.table.extract_if(|_, orphan| orphan.is_over(now)).map(|(_, o)| o.job).collect()
    }

    /// SIGKILL for those that ignore SIGTERM.
    pub fn kill_overdue(&mut self, now: Instant) {
        for orphan in self.table.values_mut().filter(|o| !o.ended && o.due <= now) {
            let _ = killpg(orphan.group, Signal::SIGKILL);
            orphan.due = now + GRACE;
        }
    }

    /// SIGKILL for all.
    pub fn kill_all(&self) {
        for orphan in self.table.values().filter(|orphan| !orphan.ended) {
            let _ = killpg(orphan.group, Signal::SIGKILL);
        }
    }

    /// When [`Self::kill_overdue`] or [`Self::over`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.table.values().map(|orphan| orphan.due).min()
    }

    /// None is left.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
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
        assert!(orphans.reaping(pid(&child), now));
        assert_eq!(orphans.over(now), [71_001]);
        assert!(orphans.is_empty());
    }

    #[test]
    fn unreported_programs_are_found_by_their_input() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let (mut mine, mut other) = (program(71_002), program(71_003));
        assert_eq!(orphans.adopt_unreported(&[71_002, 71_004], now), [71_002]);
        assert_eq!(mine.wait().expect("wait").signal(), Some(Signal::SIGTERM as i32));
        assert!(orphans.reaping(pid(&mine), now) && !orphans.reaping(pid(&other), now));
        assert_eq!(orphans.over(now), [71_002]);
        assert!(other.try_wait().expect("wait").is_none(), "another worker's goes on");
        other.kill().expect("kill");
        other.wait().expect("wait");
    }

    #[test]
    fn it_is_over_when_its_group_is() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let mut leader = program(71_007);
        let mut other = Command::new("/bin/sleep");
        let mut other =
            other.arg("60").process_group(pid(&leader).as_raw()).spawn().expect("spawn");
        orphans.adopt(&[(71_007, pid(&leader))], now);
        assert_eq!(orphans.over(now), [], "it hasn't ended");
        orphans.reaping(pid(&leader), now);
        leader.wait().expect("wait");
        assert_eq!(orphans.over(now), [], "the other isn't reaped");
        other.wait().expect("wait");
        assert_eq!(orphans.over(now), [71_007]);
    }

    #[test]
    fn a_copy_of_the_worker_never_becomes_the_program() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let input = input::sealed(71_006, &[b"mail"]).expect("input");
        // The file is open, but isn't standard input yet.
        let mut command = Command::new("/bin/sleep");
        command.arg("60").stdin(Stdio::null()).stdout(Stdio::from(input));
        let mut child = command.spawn().expect("spawn");
        assert_eq!(orphans.adopt_unreported(&[71_006], now), [71_006]);
        assert_eq!(child.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
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
