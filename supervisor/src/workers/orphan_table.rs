//! What becomes of the programs that dead workers left behind. Pure: facts and the time go in, what
//! is to be done comes out. `orphans` carries it out.
//!
//! A program's process group gets SIGTERM, and what is left of it SIGKILL in the end
//! ([`Ending`]). A leader that ends before the rest of its group is held: it isn't reaped, so that
//! its number still names the group. Only a scan of /proc shows when the rest has ended, because
//! the other members needn't be children of this process. Scans take a small part of the time at
//! most, however many processes there are.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use qrelay_shared::sys::process_group::{
    Ending, FIRST_PAUSE, Others, Step, next_pause, pause_after_scan,
};

use crate::ids::JobId;

/// A program.
#[derive(Debug)]
struct Orphan {
    job: JobId,
    group: Pid,
    ending: Ending,
}

impl Orphan {
    /// Returns whether the leader is reaped or given up.
    fn is_settled(&self) -> bool {
        !self.ending.leader_runs() && !self.ending.holds_leader()
    }
}

/// The programs of dead workers, by their process ids.
#[derive(Debug, Default)]
pub(super) struct OrphanTable {
    programs: HashMap<Pid, Orphan>,
    /// When to scan for what became of the groups whose leaders are held.
    scan_at: Option<Instant>,
    /// From that scan to the next.
    pause: Duration,
    /// No scan before that.
    rested_at: Option<Instant>,
    /// Children may have ended that a held leader hides from waitid(2).
    hidden: bool,
}

impl OrphanTable {
    /// Adds a program whose group has been sent SIGTERM at `now`.
    pub(super) fn add(&mut self, job: JobId, leader: Pid, group: Pid, now: Instant) {
        self.programs.insert(leader, Orphan { job, group, ending: Ending::asked(now) });
    }

    /// Returns whether this process is one of the programs.
    pub(super) fn contains(&self, pid: Pid) -> bool {
        self.programs.contains_key(&pid)
    }

    /// Returns whether this process is one of the programs, and neither reaped nor given up.
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.programs.get(&pid).is_some_and(|orphan| !orphan.is_settled())
    }

    /// Returns whether one of the programs is for this job.
    pub(super) fn concerns(&self, job: JobId) -> bool {
        self.programs.values().any(|orphan| orphan.job == job)
    }

    /// Returns whether this leader has ended and must not be reaped yet.
    pub(super) fn holds(&self, pid: Pid) -> bool {
        self.programs.get(&pid).is_some_and(|orphan| orphan.ending.holds_leader())
    }

    /// Returns whether no program is left.
    pub(super) fn is_empty(&self) -> bool {
        self.programs.is_empty()
    }

    /// Notes that a child has ended. Returns whether the child is a leader that must not be reaped
    /// before [`Self::reapable`] says so.
    pub(super) fn leader_ended(&mut self, pid: Pid, now: Instant) -> bool {
        let Some(orphan) = self.programs.get_mut(&pid) else { return false };
        if orphan.ending.leader_runs() {
            orphan.ending.leader_ended();
            self.pause = FIRST_PAUSE;
            self.scan_at = Some(self.rested_at.map_or(now, |rested| rested.max(now)));
        }
        orphan.ending.holds_leader()
    }

    /// Returns whether it is time to scan for the groups of held leaders.
    pub(super) fn scan_is_due(&self, now: Instant) -> bool {
        self.scan_at.is_some_and(|at| at <= now)
    }

    /// Notes a scan that began at `now`, and when the next one may be.
    pub(super) fn scanned(&mut self, now: Instant, lasted: Duration) {
        self.rested_at = Some(now + pause_after_scan(lasted));
    }

    /// Returns the leaders that are to be reaped now, and their groups, which are to be killed
    /// before. `living` is what a scan that was due has found: the groups with living members. A
    /// group that isn't known to have ended counts as alive.
    pub(super) fn reapable(
        &mut self,
        now: Instant,
        living: Option<&HashSet<Pid>>,
    ) -> Vec<(Pid, Pid)> {
        if self.scan_is_due(now) {
            self.scan_at = self.rested_at.max(Some(now + self.pause));
            self.pause = next_pause(self.pause);
        }
        let mut ended = Vec::new();
        let mut waits = false;
        for (&leader, orphan) in self.programs.iter_mut().filter(|(_, o)| o.ending.holds_leader()) {
            let others = match living {
                Some(living) if !living.contains(&orphan.group) => Others::Gone,
                _ => Others::MayLive,
            };
            match orphan.ending.next(others, now) {
                Step::KillAndReap => ended.push((leader, orphan.group)),
                _ => waits = true,
            }
        }
        if !waits {
            self.scan_at = None;
        }
        ended
    }

    /// Returns the groups whose leaders run although their time is over, with what is to be done:
    /// [`Step::Kill`] or [`Step::GiveUp`].
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<(Pid, Step)> {
        let running = self.programs.values_mut().filter(|orphan| orphan.ending.leader_runs());
        let steps = running.map(|orphan| (orphan.group, orphan.ending.next(Others::MayLive, now)));
        steps.filter(|(_, step)| *step != Step::Wait).collect()
    }

    /// Forgets the programs that are over, all of their groups included, and returns their jobs.
    pub(super) fn over(&mut self, now: Instant, exists: impl Fn(Pid) -> bool) -> Vec<JobId> {
        let is_over = |_: &Pid, orphan: &mut Orphan| {
            orphan.is_settled() && {
                let others = if exists(orphan.group) { Others::MayLive } else { Others::Gone };
                orphan.ending.next(others, now) == Step::Over
            }
        };
        self.programs.extract_if(is_over).map(|(_, orphan)| orphan.job).collect()
    }

    /// Returns the groups that are to be killed now, out of turn: all that are left.
    pub(super) fn kill_all(&mut self, now: Instant) -> Vec<Pid> {
        let left = self.programs.values_mut().filter(|orphan| !orphan.is_settled());
        left.map(|orphan| {
            orphan.ending.killed(now);
            orphan.group
        })
        .collect()
    }

    /// Returns whether a scan may look now for ended children that a held leader hides. If not,
    /// [`Self::hides`] says when.
    pub(super) fn may_look_behind(&mut self, now: Instant) -> bool {
        self.hidden = self.rested_at.is_some_and(|rested| rested > now);
        !self.hidden
    }

    /// Notes that such a scan failed, so another one is due later.
    pub(super) fn look_again(&mut self) {
        self.hidden = true;
    }

    /// Returns whether it is time to look again for hidden children. It is said once.
    pub(super) fn hides(&mut self, now: Instant) -> bool {
        let due = self.hidden && self.rested_at.is_none_or(|rested| rested <= now);
        self.hidden &= !due;
        due
    }

    /// Returns when something is due although nothing has happened.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let hidden = self.rested_at.filter(|_| self.hidden);
        let endings = self.programs.values().map(|orphan| orphan.ending.due());
        endings.chain(self.scan_at).chain(hidden).min()
    }
}

#[cfg(test)]
impl OrphanTable {
    /// Returns the jobs of all programs.
    pub(super) fn jobs(&self) -> HashSet<JobId> {
        self.programs.values().map(|orphan| orphan.job).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrelay_shared::sys::process_group::{GRACE, VANISH};

    const JOB: JobId = JobId(7);
    const LEADER: Pid = Pid::from_raw(70);

    fn table(now: Instant) -> OrphanTable {
        let mut table = OrphanTable::default();
        table.add(JOB, LEADER, LEADER, now);
        table
    }

    fn groups(groups: &[Pid]) -> HashSet<Pid> {
        groups.iter().copied().collect()
    }

    #[test]
    fn a_program_is_over_when_its_group_is() {
        let now = Instant::now();
        let mut table = table(now);
        assert!(table.concerns(JOB) && !table.concerns(JobId(8)) && table.contains(LEADER));
        assert!(!table.scan_is_due(now) && table.reapable(now, None).is_empty());
        assert!(table.leader_ended(LEADER, now) && table.holds(LEADER) && table.has(LEADER));
        assert!(table.scan_is_due(now), "at once");
        table.scanned(now, Duration::ZERO);
        assert_eq!(table.reapable(now, Some(&groups(&[LEADER]))), []);
        let rested = now + pause_after_scan(Duration::ZERO);
        assert!(!table.scan_is_due(now) && table.scan_is_due(rested));
        assert_eq!(table.reapable(rested, Some(&groups(&[]))), [(LEADER, LEADER)]);
        assert!(!table.holds(LEADER) && !table.has(LEADER));
        assert_eq!(table.over(now, |_| true), [], "a member isn't reaped");
        assert_eq!(table.over(now, |_| false), [JOB]);
        assert!(table.is_empty());
        assert_eq!(table.next_deadline(), None);
    }

    #[test]
    fn what_is_not_known_counts_as_alive() {
        let now = Instant::now();
        let mut table = table(now);
        table.leader_ended(LEADER, now);
        assert_eq!(table.reapable(now, None), [], "the scan failed");
        let late = now + GRACE;
        assert_eq!(table.reapable(late, None), [(LEADER, LEADER)], "but not for ever");
        assert_eq!(table.over(late + VANISH, |_| true), [JOB]);
    }

    #[test]
    fn a_leader_that_stays_is_killed_and_then_given_up() {
        let now = Instant::now();
        let mut table = table(now);
        assert_eq!(table.overdue(now + GRACE / 2), []);
        assert_eq!(table.next_deadline(), Some(now + GRACE));
        assert_eq!(table.overdue(now + GRACE), [(LEADER, Step::Kill)]);
        assert_eq!(table.overdue(now + GRACE), []);
        assert_eq!(table.overdue(now + 2 * GRACE), [(LEADER, Step::GiveUp)]);
        assert_eq!(table.over(now + 2 * GRACE, |_| true), [JOB]);
    }

    #[test]
    fn a_hurry_kills_what_is_left() {
        let now = Instant::now();
        let mut table = table(now);
        assert_eq!(table.kill_all(now), [LEADER]);
        assert_eq!(table.next_deadline(), Some(now + VANISH));
        assert_eq!(table.overdue(now + VANISH), [(LEADER, Step::GiveUp)]);
        assert_eq!(table.kill_all(now + VANISH), [], "nobody can do more");
    }

    #[test]
    fn scans_rest_in_proportion_to_what_they_took() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut table = table(now);
        assert!(table.may_look_behind(now) && !table.hides(now));
        table.scanned(now, second / 2);
        let rested = now + pause_after_scan(second / 2);
        assert!(!table.may_look_behind(now + second) && !table.hides(now + second));
        assert_eq!(table.next_deadline(), Some((now + GRACE).min(rested)));
        assert!(table.hides(rested) && !table.hides(rested), "once");
        table.leader_ended(LEADER, now + second);
        assert!(!table.scan_is_due(now + second) && table.scan_is_due(rested));
    }

    #[test]
    fn others_are_none_of_its_business() {
        let now = Instant::now();
        let mut table = table(now);
        let other = Pid::from_raw(71);
        assert!(!table.leader_ended(other, now) && !table.holds(other) && !table.contains(other));
    }
}
