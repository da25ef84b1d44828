//! The programs that a dead worker was running: they are children of this process now, and must not
//! deliver a mail whose client is told to try again.
//!
//! Each program leads a process group of its own, which is told to end, and killed if it doesn't
//! ([`OrphanTable`]). The client is answered only when nothing is left of the group. A program that
//! the worker had started and not yet reported is recognized by its standard input.
//!
//! # Failure
//! A program that became another user's can't be signalled, and isn't waited for. Neither is a
//! program that SIGKILL doesn't end.

use std::collections::HashSet;
use std::io;
use std::rc::Rc;
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use qrelay_shared::sys::proc_stat::Process;
use qrelay_shared::sys::process_group::Step;

use crate::ids::JobId;
use crate::system::{Role, System};
use crate::workers::orphan_table::OrphanTable;

/// The programs of dead workers that still run.
#[derive(Debug)]
pub(super) struct Orphans {
    system: Rc<dyn System>,
    table: OrphanTable,
}

impl Orphans {
    /// Starts without programs.
    pub(super) fn new(system: Rc<dyn System>) -> Self {
        Self { system, table: OrphanTable::default() }
    }

    /// Tells a dead worker's programs to end; returns the jobs of those that can be told. Each
    /// program is a child of this process that isn't reaped.
    pub(super) fn adopt(&mut self, children: &[(JobId, Pid)], now: Instant) -> Vec<JobId> {
        let mut jobs = Vec::new();
        for &(job, pid) in children {
            // The program isn't reaped, so the number still names its group. A group that can't be
            // signalled has no member that could deliver anything.
            if self.system.signal_group(pid, Signal::SIGTERM) {
                self.table.add(job, pid, pid, now);
                jobs.push(job);
            }
        }
        jobs
    }

    /// Does the same for programs that a dead worker had started for these jobs and could not
    /// report.
    pub(super) fn adopt_unreported(&mut self, jobs: &[JobId], now: Instant) -> Vec<JobId> {
        let jobs: HashSet<JobId> = jobs.iter().copied().collect();
        let mut found = Vec::new();
        for process in self.children().unwrap_or_default() {
            let Process { pid, group, .. } = process;
            if self.table.contains(pid) || self.table.contains(group) {
                continue;
            }
            match self.system.role(process, &jobs) {
                Role::Program(job) => {
                    self.system.signal_group(group, Signal::SIGTERM);
                    self.table.add(job, pid, group, now);
                    found.push(job);
                }
                // The copy hasn't become the program yet, and won't. Its group isn't signalled,
                // because others lead it.
                Role::Copy(job) => {
                    self.system.signal(pid, Signal::SIGKILL);
                    self.table.add(job, pid, pid, now);
                    found.push(job);
                }
                Role::Other => {}
            }
        }
        found
    }

    /// Notes that a child has ended. Returns whether it is a program that must not be reaped before
    /// [`Self::reapable`] says so.
    pub(super) fn ended(&mut self, pid: Pid, now: Instant) -> bool {
        self.table.leader_ended(pid, now)
    }

    /// Returns whether this process is one of the programs, and neither reaped nor given up.
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.table.has(pid)
    }

    /// Returns whether one of the programs is for this job.
    pub(super) fn concerns(&self, job: JobId) -> bool {
        self.table.concerns(job)
    }

    /// Returns whether this child has ended and must not be reaped yet.
    pub(super) fn holds(&self, pid: Pid) -> bool {
        self.table.holds(pid)
    }

    /// Returns whether no program is left.
    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Returns the children that have ended and may be reaped, although others that have ended are
    /// held. There may be more later: [`Self::hides`].
    pub(super) fn ended_besides(&mut self, now: Instant) -> Vec<Pid> {
        if !self.table.may_look_behind(now) {
            return Vec::new();
        }
        let Some(children) = self.scan(now, Self::children) else {
            self.table.look_again();
            return Vec::new();
        };
        let ended = children.iter().filter(|child| !child.alive && !self.holds(child.pid));
        ended.map(|child| child.pid).filter(|&pid| self.system.ended(Some(pid)).is_some()).collect()
    }

    /// Returns whether it is time to look for what [`Self::ended_besides`] was too early for, or
    /// could not see. It is said once.
    pub(super) fn hides(&mut self, now: Instant) -> bool {
        self.table.hides(now)
    }

    /// Lists processes, and sees to it that this isn't done too often.
    fn scan(
        &mut self,
        now: Instant,
        list: impl FnOnce(&Self) -> io::Result<Vec<Process>>,
    ) -> Option<Vec<Process>> {
        let started = Instant::now();
        let found = list(self);
        self.table.scanned(now, started.elapsed());
        found.ok()
    }

    /// Lists the children of this process. (The kernel's own list of them is a build option.)
    fn children(&self) -> io::Result<Vec<Process>> {
        let own = self.system.own_pid();
        let mut all = self.system.processes()?;
        all.retain(|process| process.parent == own);
        Ok(all)
    }

    /// Returns the leaders that are to be reaped now, because their groups have ended or their time
    /// is over. What is left of each group has been killed.
    pub(super) fn reapable(&mut self, now: Instant) -> Vec<Pid> {
        let living = self.table.scan_is_due(now).then(|| self.living_groups(now)).flatten();
        let ended = self.table.reapable(now, living.as_ref());
        for &(_, group) in &ended {
            self.system.signal_group(group, Signal::SIGKILL);
        }
        ended.into_iter().map(|(leader, _)| leader).collect()
    }

    fn living_groups(&mut self, now: Instant) -> Option<HashSet<Pid>> {
        let found = self.scan(now, |orphans| orphans.system.processes())?;
        Some(found.iter().filter(|process| process.alive).map(|process| process.group).collect())
    }

    /// Returns the jobs whose programs are over, all of their groups included, and forgets them.
    pub(super) fn over(&mut self, now: Instant) -> Vec<JobId> {
        let Self { system, table } = self;
        table.over(now, |group| system.group_exists(group))
    }

    /// Kills the programs that ignored SIGTERM for too long. Returns the groups that ignored even
    /// SIGKILL and aren't waited for any more.
    pub(super) fn kill_overdue(&mut self, now: Instant) -> Vec<Pid> {
        let mut given_up = Vec::new();
        for (group, step) in self.table.overdue(now) {
            match step {
                Step::GiveUp => given_up.push(group),
                _ => {
                    self.system.signal_group(group, Signal::SIGKILL);
                }
            }
        }
        given_up
    }

    /// Kills all programs, and waits no longer than it takes a killed process to vanish.
    pub(super) fn kill_all(&mut self, now: Instant) {
        for group in self.table.kill_all(now) {
            self.system.signal_group(group, Signal::SIGKILL);
        }
    }

    /// Returns when [`Self::reapable`], [`Self::kill_overdue`], [`Self::over`] or [`Self::hides`]
    /// has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.table.next_deadline()
    }
}

#[cfg(test)]
impl Orphans {
    /// Returns the jobs of all programs.
    pub(super) fn jobs(&self) -> HashSet<JobId> {
        self.table.jobs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::Linux;
    use qrelay_shared::sys::input;
    use qrelay_shared::sys::limits::Limits;
    use qrelay_shared::sys::process::ended_child;
    use qrelay_shared::sys::process_group::{FIRST_PAUSE, GRACE};
    use std::io::Read as _;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, Command, Stdio};

    fn orphans() -> Orphans {
        let limits = Limits::now().expect("limits");
        Orphans::new(Rc::new(Linux { level: slog::Level::Info, limits }))
    }

    /// Starts a program as a worker would for this job.
    fn program(job: JobId) -> Child {
        let input = input::sealed(job, &[b"mail"]).expect("input");
        let mut command = Command::new("/bin/sleep");
        command.arg("60").stdin(Stdio::from(input)).process_group(0);
        command.spawn().expect("spawn")
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_raw(child.id().cast_signed())
    }

    fn wait_for_end(child: &Child) {
        while ended_child(Some(pid(child))).is_none() {
            std::thread::yield_now();
        }
    }

    /// Waits for the end of a program that is alone in its group; returns the signal that ended it.
    fn end_of(orphans: &mut Orphans, child: &mut Child, now: Instant) -> Option<i32> {
        wait_for_end(child);
        assert!(orphans.ended(pid(child), now) && orphans.holds(pid(child)));
        assert_eq!(orphans.reapable(now), [pid(child)]);
        assert!(!orphans.holds(pid(child)));
        child.wait().expect("wait").signal()
    }

    #[test]
    fn reported_programs_are_told_to_end() {
        let now = Instant::now();
        let mut orphans = orphans();
        let mut child = program(JobId(71_001));
        let reported = [(JobId(71_001), pid(&child))];
        assert_eq!(orphans.adopt(&reported, now), [JobId(71_001)]);
        assert_eq!(orphans.adopt_unreported(&[JobId(71_001)], now), [], "it is known already");
        assert_eq!(orphans.next_deadline(), Some(now + GRACE));
        assert_eq!(end_of(&mut orphans, &mut child, now), Some(Signal::SIGTERM as i32));
        assert_eq!(orphans.over(now), [JobId(71_001)]);
        assert!(orphans.is_empty());
    }

    #[test]
    fn unreported_programs_are_found_by_their_input() {
        let now = Instant::now();
        let mut orphans = orphans();
        let (mut mine, mut other) = (program(JobId(71_002)), program(JobId(71_003)));
        assert_eq!(orphans.adopt_unreported(&[JobId(71_002), JobId(71_004)], now), [JobId(71_002)]);
        assert_eq!(end_of(&mut orphans, &mut mine, now), Some(Signal::SIGTERM as i32));
        assert!(!orphans.ended(pid(&other), now));
        assert_eq!(orphans.over(now), [JobId(71_002)]);
        assert!(other.try_wait().expect("wait").is_none(), "another worker's goes on");
        other.kill().expect("kill");
        other.wait().expect("wait");
    }

    /// Returns a program that has ended, and a member of its group that ignores SIGTERM.
    fn leader_and_other(orphans: &mut Orphans, job: JobId, now: Instant) -> (Child, Child) {
        let leader = program(job);
        let mut other = Command::new("/bin/sh");
        other.args(["-c", "trap '' TERM; echo; exec sleep 60"]).stdout(Stdio::piped());
        let mut other = other.process_group(pid(&leader).as_raw()).spawn().expect("spawn");
        let ignores = other.stdout.take().expect("pipe").read_exact(&mut [0]);
        ignores.expect("a line");
        orphans.adopt(&[(job, pid(&leader))], now);
        wait_for_end(&leader);
        assert!(orphans.ended(pid(&leader), now));
        (leader, other)
    }

    #[test]
    fn it_is_over_when_its_group_is() {
        let now = Instant::now();
        let mut orphans = orphans();
        let (mut leader, mut other) = leader_and_other(&mut orphans, JobId(71_007), now);
        assert_eq!(orphans.reapable(now), [], "the other has its time");
        let look = orphans.next_deadline().expect("there is something to do");
        assert!(look >= now + FIRST_PAUSE && look < now + GRACE, "{:?}", look - now);
        assert!(orphans.holds(pid(&leader)) && orphans.over(now).is_empty());
        other.kill().expect("kill");
        wait_for_end(&other);
        assert_eq!(orphans.reapable(now), [], "it isn't time to look again");
        assert_eq!(orphans.reapable(look), [pid(&leader)]);
        leader.wait().expect("wait");
        assert_eq!(orphans.over(now), [], "the other isn't reaped");
        other.wait().expect("wait");
        assert_eq!(orphans.over(now), [JobId(71_007)]);
    }

    #[test]
    fn who_outlives_the_leader_is_killed_in_its_time() {
        let now = Instant::now();
        let mut orphans = orphans();
        let (mut leader, mut other) = leader_and_other(&mut orphans, JobId(71_008), now);
        let late = now + GRACE;
        assert_eq!(orphans.reapable(late - FIRST_PAUSE), []);
        assert_eq!(orphans.kill_overdue(late), []);
        assert_eq!(orphans.reapable(late), [pid(&leader)]);
        assert_eq!(other.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
        leader.wait().expect("wait");
        assert_eq!(orphans.over(late), [JobId(71_008)]);
    }

    #[test]
    fn what_those_held_hide_is_looked_for_once_and_not_too_often() {
        let now = Instant::now();
        let mut orphans = orphans();
        let (mut leader, mut other) = leader_and_other(&mut orphans, JobId(71_009), now);
        orphans.reapable(now);
        assert_eq!(orphans.ended_besides(now), [], "too early after that look");
        assert!(!orphans.hides(now));
        let rested = orphans.next_deadline().expect("there is something to do");
        assert!(rested >= now + FIRST_PAUSE && rested < now + GRACE, "{:?}", rested - now);
        assert!(orphans.hides(rested));
        assert!(!orphans.hides(rested), "nobody is asked twice");
        assert!(orphans.next_deadline() > Some(now));
        orphans.kill_all(now);
        other.wait().expect("wait");
        leader.wait().expect("wait");
    }

    #[test]
    fn a_look_that_fails_is_repeated_later() {
        let now = Instant::now();
        let mut orphans = orphans();
        assert!(orphans.scan(now, |_| Err(io::Error::other("no"))).is_none());
        assert_eq!(orphans.ended_besides(now), []);
        assert!(!orphans.hides(now) && orphans.next_deadline() >= Some(now + FIRST_PAUSE));
    }

    #[test]
    fn a_copy_of_the_worker_never_becomes_the_program() {
        let now = Instant::now();
        let mut orphans = orphans();
        let input = input::sealed(JobId(71_006), &[b"mail"]).expect("input");
        // The file is open, but isn't standard input yet.
        let mut command = Command::new("/bin/sleep");
        command.arg("60").stdin(Stdio::null()).stdout(Stdio::from(input));
        let mut child = command.spawn().expect("spawn");
        assert_eq!(orphans.adopt_unreported(&[JobId(71_006)], now), [JobId(71_006)]);
        assert_eq!(child.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn a_program_that_joined_a_strangers_group_is_killed_alone() {
        let now = Instant::now();
        let mut orphans = orphans();
        let mut stranger =
            Command::new("/bin/sleep").arg("60").process_group(0).spawn().expect("a");
        let input = input::sealed(JobId(71_010), &[b"mail"]).expect("input");
        let mut command = Command::new("/bin/sleep");
        command.arg("60").stdin(Stdio::from(input)).process_group(pid(&stranger).as_raw());
        let mut child = command.spawn().expect("spawn");
        assert_eq!(orphans.adopt_unreported(&[JobId(71_010)], now), [JobId(71_010)]);
        assert_eq!(child.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
        orphans.kill_all(now);
        // SIGTERM would have come before this signal.
        stranger.kill().expect("kill");
        assert_eq!(stranger.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn who_does_not_obey_is_killed() {
        let now = Instant::now();
        let mut orphans = orphans();
        let mut child = program(JobId(71_005));
        orphans.adopt(&[(JobId(71_005), pid(&child))], now);
        assert_eq!(orphans.kill_overdue(now + GRACE), []);
        child.wait().expect("wait");
        assert_eq!(orphans.next_deadline(), Some(now + 2 * GRACE));
        // As if SIGKILL had not ended the program.
        assert_eq!(orphans.kill_overdue(now + 2 * GRACE), [pid(&child)]);
        assert_eq!(orphans.over(now + 2 * GRACE), [JobId(71_005)]);
    }
}
