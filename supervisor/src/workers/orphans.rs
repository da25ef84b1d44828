//! The programs that a dead worker was running: they are the supervisor's
//! children now, and must not deliver a mail whose client is told to try again.
//!
//! Each leads a process group of its own. The group gets SIGTERM, and what is left of it SIGKILL
//! after a grace; only when nothing is left is the client answered. A leader that ends before the
//! rest isn't reaped until then ([`Orphans::holds`]), so that its number still names the group. One
//! that the worker had started and not yet reported is recognized by its standard input.
//!
//! # Failure
//! A program that became another user's can't be signalled; it isn't waited for. Nor is one any
//! longer that SIGKILL doesn't end. Looking through /proc takes a small part of our time at most,
//! however many processes there are.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::ids::JobId;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgrp};
use qrelay_shared::sys::input;
use qrelay_shared::sys::proc_stat::{Process, processes};
use qrelay_shared::sys::process::ended_child;

/// From SIGTERM to SIGKILL, as for a program that has timed out.
const GRACE: Duration = Duration::from_secs(10);

/// How long the rest of a group may take to vanish after SIGKILL. What takes
/// longer hangs in the kernel, and doesn't come back to do anything.
const VANISH: Duration = Duration::from_secs(1);

/// When it is looked again whether a group has ended whose leader has: its other members needn't be
/// our children. Each pause is twice the one before, up to [`MAX_GLANCE`].
const GLANCE: Duration = Duration::from_millis(20);
const MAX_GLANCE: Duration = Duration::from_millis(500);

/// So many times what a look through /proc took (15 µs per process) passes before the next one.
const REST: u32 = 20;

/// What is left of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its leader, at least.
    Running,
    /// Its leader has ended, and isn't reaped since others may not have.
    Held,
    /// Its leader has been reaped, and the rest of its group killed.
    Ended,
}

#[derive(Debug)]
struct Orphan {
    job: JobId,
    group: Pid,
    state: State,
    /// When it is killed or, if that has happened or it has ended, no longer waited for.
    due: Instant,
    killed: bool,
}

impl Orphan {
    fn new(job: JobId, group: Pid, now: Instant) -> Self {
        Self { job, group, state: State::Running, due: now + GRACE, killed: false }
    }

    /// Nothing of it is left. (A signal of 0 does nothing: should the group's number be another
    /// one's by now, that isn't disturbed.)
    fn is_over(&self, now: Instant) -> bool {
        self.state == State::Ended
            && (self.due <= now || killpg(self.group, None) == Err(Errno::ESRCH))
    }
}

/// Those that still run.
#[derive(Debug, Default)]
pub struct Orphans {
    table: HashMap<Pid, Orphan>,
    /// When it is looked what has become of the groups whose leaders are held.
    look: Option<Instant>,
    /// From that look to the next.
    pause: Duration,
    /// No look through /proc before that.
    rested: Option<Instant>,
    /// Children may have ended that those held hide.
    hidden: bool,
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
        for Process { pid, group, .. } in children().unwrap_or_default() {
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

    /// This child has ended. If it is one of these it isn't to be reaped now, but when
    /// [`Self::to_reap`] says so.
    pub fn ended(&mut self, pid: Pid, now: Instant) -> bool {
        let Some(orphan) = self.table.get_mut(&pid) else { return false };
        if orphan.state == State::Running {
            orphan.state = State::Held;
            self.pause = GLANCE;
            self.look = Some(self.rested.map_or(now, |rested| rested.max(now)));
        }
        orphan.state != State::Ended
    }

    /// Whether a program for this job is among them.
    pub fn concerns(&self, job: JobId) -> bool {
        self.table.values().any(|orphan| orphan.job == job)
    }

    /// Whether this is a child that has ended and isn't to be reaped yet.
    pub fn holds(&self, pid: Pid) -> bool {
        self.table.get(&pid).is_some_and(|orphan| orphan.state == State::Held)
    }

    /// The children that have ended and may be reaped although others that have are held. There may
    /// be more later: [`Self::hides`].
    pub fn ended_besides(&mut self, now: Instant) -> Vec<Pid> {
        self.hidden = self.rested.is_some_and(|rested| rested > now);
        if self.hidden {
            return Vec::new();
        }
        let Some(children) = self.look_through(now, children) else {
            self.hidden = true;
            return Vec::new();
        };
        let ended = children.iter().filter(|child| !child.alive && !self.holds(child.pid));
        ended.map(|child| child.pid).filter(|&pid| ended_child(Some(pid)).is_some()).collect()
    }

    /// Whether it is time to look for what [`Self::ended_besides`] was too early for, or could not
    /// see. It is said once.
    pub fn hides(&mut self, now: Instant) -> bool {
        let due = self.hidden && self.rested.is_none_or(|rested| rested <= now);
        self.hidden &= !due;
        due
    }

    /// Lists processes, and sees to it that this isn't done too often.
    fn look_through(
        &mut self,
        now: Instant,
        list: impl FnOnce() -> std::io::Result<Vec<Process>>,
    ) -> Option<Vec<Process>> {
        let started = Instant::now();
        let found = list();
        // A look that fails takes hardly any time.
        self.rested = Some(now + GLANCE.max(started.elapsed() * REST));
        found.ok()
    }

    /// Leaders that are to be reaped now, since their groups have ended or their time is over. The
    /// rest of each group is killed.
    pub fn to_reap(&mut self, now: Instant) -> Vec<Pid> {
        let living = self.living_groups(now);
        let mut reaped = Vec::new();
        let mut held = false;
        for (&pid, orphan) in self.table.iter_mut().filter(|(_, o)| o.state == State::Held) {
            // What can't be known counts as alive.
            let lives = living.as_ref().is_none_or(|living| living.contains(&orphan.group));
            if lives && now < orphan.due {
                held = true;
                continue;
            }
            let _ = killpg(orphan.group, Signal::SIGKILL);
            orphan.state = State::Ended;
            orphan.due = now + VANISH;
            reaped.push(pid);
        }
        if !held {
            self.look = None;
        }
        reaped
    }

    /// The process groups that have living members, if it is time to look.
    fn living_groups(&mut self, now: Instant) -> Option<HashSet<Pid>> {
        self.look.filter(|&look| look <= now)?;
        let found = self.look_through(now, processes);
        self.look = self.rested.max(Some(now + self.pause));
        self.pause = MAX_GLANCE.min(self.pause * 2);
        Some(found?.iter().filter(|process| process.alive).map(|process| process.group).collect())
    }

    /// The jobs whose programs are over, all of their groups included.
    pub fn over(&mut self, now: Instant) -> Vec<JobId> {
        self.table.extract_if(|_, orphan| orphan.is_over(now)).map(|(_, o)| o.job).collect()
    }

    /// SIGKILL for those that ignore SIGTERM; the result is those that ignored even that, and
    /// aren't waited for any more.
    pub fn kill_overdue(&mut self, now: Instant) -> Vec<Pid> {
        let mut given_up = Vec::new();
        let overdue = |orphan: &&mut Orphan| orphan.state == State::Running && orphan.due <= now;
        for orphan in self.table.values_mut().filter(overdue) {
            if orphan.killed {
                orphan.state = State::Ended;
                given_up.push(orphan.group);
                continue;
            }
            let _ = killpg(orphan.group, Signal::SIGKILL);
            orphan.killed = true;
            orphan.due = now + GRACE;
        }
        given_up
    }

    /// SIGKILL for all, and no further patience.
    pub fn kill_all(&mut self, now: Instant) {
        for orphan in self.table.values_mut().filter(|orphan| orphan.state != State::Ended) {
            let _ = killpg(orphan.group, Signal::SIGKILL);
            if !orphan.killed {
                orphan.killed = true;
                orphan.due = orphan.due.min(now + VANISH);
            }
        }
    }

    /// When [`Self::to_reap`], [`Self::kill_overdue`], [`Self::over`] or [`Self::hides`] has
    /// something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let hidden = self.rested.filter(|_| self.hidden);
        self.table.values().map(|orphan| orphan.due).chain(self.look).chain(hidden).min()
    }

    /// None is left.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}

/// All children of this process. (The kernel's own list of them is a build option.)
fn children() -> std::io::Result<Vec<Process>> {
    let own = Pid::this();
    let mut all = processes()?;
    all.retain(|process| process.parent == own);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
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

    fn wait_for_end(child: &Child) {
        while ended_child(Some(pid(child))).is_none() {
            std::thread::yield_now();
        }
    }

    /// Waits for the end of a program that is alone in its group; the signal that brought it about.
    fn end_of(orphans: &mut Orphans, child: &mut Child, now: Instant) -> Option<i32> {
        wait_for_end(child);
        assert!(orphans.ended(pid(child), now) && orphans.holds(pid(child)));
        assert_eq!(orphans.to_reap(now), [pid(child)]);
        assert!(!orphans.holds(pid(child)));
        child.wait().expect("wait").signal()
    }

    #[test]
    fn reported_programs_are_told_to_end() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
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
        let mut orphans = Orphans::default();
        let (mut mine, mut other) = (program(JobId(71_002)), program(JobId(71_003)));
        assert_eq!(orphans.adopt_unreported(&[JobId(71_002), JobId(71_004)], now), [JobId(71_002)]);
        assert_eq!(end_of(&mut orphans, &mut mine, now), Some(Signal::SIGTERM as i32));
        assert!(!orphans.ended(pid(&other), now));
        assert_eq!(orphans.over(now), [JobId(71_002)]);
        assert!(other.try_wait().expect("wait").is_none(), "another worker's goes on");
        other.kill().expect("kill");
        other.wait().expect("wait");
    }

    /// A program that has ended, and a member of its group that ignores SIGTERM.
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
        let mut orphans = Orphans::default();
        let (mut leader, mut other) = leader_and_other(&mut orphans, JobId(71_007), now);
        assert_eq!(orphans.to_reap(now), [], "the other has its time");
        let look = orphans.next_deadline().expect("there is something to do");
        assert!(look >= now + GLANCE && look < now + GRACE, "{:?}", look - now);
        assert!(orphans.holds(pid(&leader)) && orphans.over(now).is_empty());
        other.kill().expect("kill");
        wait_for_end(&other);
        assert_eq!(orphans.to_reap(now), [], "it isn't time to look again");
        assert_eq!(orphans.to_reap(look), [pid(&leader)]);
        leader.wait().expect("wait");
        assert_eq!(orphans.over(now), [], "the other isn't reaped");
        other.wait().expect("wait");
        assert_eq!(orphans.over(now), [JobId(71_007)]);
    }

    #[test]
    fn who_outlives_the_leader_is_killed_in_its_time() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let (mut leader, mut other) = leader_and_other(&mut orphans, JobId(71_008), now);
        let late = now + GRACE;
        assert_eq!(orphans.to_reap(late - GLANCE), []);
        assert_eq!(orphans.kill_overdue(late), []);
        assert_eq!(orphans.to_reap(late), [pid(&leader)]);
        assert_eq!(other.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
        leader.wait().expect("wait");
        assert_eq!(orphans.over(late), [JobId(71_008)]);
    }

    #[test]
    fn what_those_held_hide_is_looked_for_once_and_not_too_often() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let (mut leader, mut other) = leader_and_other(&mut orphans, JobId(71_009), now);
        orphans.to_reap(now);
        assert_eq!(orphans.ended_besides(now), [], "too early after that look");
        assert!(!orphans.hides(now));
        let rested = orphans.next_deadline().expect("there is something to do");
        assert!(rested >= now + GLANCE && rested < now + GRACE, "{:?}", rested - now);
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
        let mut orphans = Orphans::default();
        assert!(orphans.look_through(now, || Err(std::io::Error::other("no"))).is_none());
        assert_eq!(orphans.ended_besides(now), []);
        assert!(!orphans.hides(now) && orphans.next_deadline() >= Some(now + GLANCE));
    }

    #[test]
    fn a_copy_of_the_worker_never_becomes_the_program() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let input = input::sealed(JobId(71_006), &[b"mail"]).expect("input");
        // The file is open, but isn't standard input yet.
        let mut command = Command::new("/bin/sleep");
        command.arg("60").stdin(Stdio::null()).stdout(Stdio::from(input));
        let mut child = command.spawn().expect("spawn");
        assert_eq!(orphans.adopt_unreported(&[JobId(71_006)], now), [JobId(71_006)]);
        assert_eq!(child.wait().expect("wait").signal(), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn who_does_not_obey_is_killed() {
        let now = Instant::now();
        let mut orphans = Orphans::default();
        let mut child = program(JobId(71_005));
        orphans.adopt(&[(JobId(71_005), pid(&child))], now);
        assert_eq!(orphans.kill_overdue(now + GRACE), []);
        child.wait().expect("wait");
        assert_eq!(orphans.next_deadline(), Some(now + 2 * GRACE));
        // Had it not ended even so.
        assert_eq!(orphans.kill_overdue(now + 2 * GRACE), [pid(&child)]);
        assert_eq!(orphans.over(now + 2 * GRACE), [JobId(71_005)]);
    }
}
