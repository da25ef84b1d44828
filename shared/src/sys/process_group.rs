//! Ending the process group of a program: SIGTERM, then SIGKILL, with one set of times for worker
//! and supervisor.
//!
//! Contract: a [`Group`] never names every process, init's group or the caller's own group.
//! [`Ending`] decides and does nothing; the caller carries its steps out. A group is signalled
//! before its leader is reaped, because the number of a group is free for another one once the
//! leader is reaped and no member is left.
//!
//! # Failure
//! Some programs survive SIGKILL: a program that waits for a dead file server, or one that became
//! another user's. [`Step::GiveUp`] ends the waiting for them.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpgrp};

use crate::sys::proc_stat;

/// Time from SIGTERM to SIGKILL, and from SIGKILL to giving up.
pub const GRACE: Duration = Duration::from_secs(10);

/// Longest wait for the other members of a group after SIGKILL. A member that takes longer hangs in
/// the kernel and runs no more code of its own.
pub const VANISH: Duration = Duration::from_secs(1);

/// First pause between two checks whether a group has members left; the end of a member is not
/// reported. The first pause is short, because most groups end at once; each pause is twice the one
/// before.
pub const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest of these pauses.
pub const LAST_PAUSE: Duration = Duration::from_millis(50);

/// Minimum pause between two scans of /proc, as a multiple of the last scan's duration: about 15 µs
/// per process of the system.
const SCAN_REST: u32 = 20;
/// Shortest of these pauses. A scan that fails takes hardly any time, and must not keep the
/// supervisor busy.
const SCAN_PAUSE_MIN: Duration = Duration::from_millis(20);

/// Returns the pause after `pause`.
pub fn next_pause(pause: Duration) -> Duration {
    LAST_PAUSE.min(pause * 2)
}

/// Returns the pause after a scan of /proc that took `lasted`.
pub fn pause_after_scan(lasted: Duration) -> Duration {
    SCAN_PAUSE_MIN.max(lasted * SCAN_REST)
}

/// The process group that a program leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group(Pid);

impl Group {
    /// Returns the group that the process `leader` leads, or `None` for numbers that killpg(2)
    /// takes for more than one program: 0 (the caller's group), 1 and below (every process), and
    /// the caller's group by its number.
    pub fn led_by(leader: Pid) -> Option<Self> {
        (leader.as_raw() > 1 && leader != getpgrp()).then_some(Self(leader))
    }

    /// Returns the number of the group, which is the number of its leader.
    pub fn id(self) -> Pid {
        self.0
    }

    /// Sends a signal to all members.
    ///
    /// # Errors
    /// `ESRCH`: the group has no member. `EPERM`: all members are other users' by now.
    pub fn signal(self, signal: Signal) -> Result<(), Errno> {
        killpg(self.0, signal)
    }

    /// Returns whether the group has no member, not even a process that has ended and isn't reaped.
    /// Signal 0 disturbs nobody if the number is another group's by now.
    pub fn is_empty(self) -> bool {
        killpg(self.0, None) == Err(Errno::ESRCH)
    }
}

/// Returns all process groups that have a member which hasn't ended.
///
/// # Errors
/// As [`proc_stat::processes`].
pub fn living() -> io::Result<HashSet<Pid>> {
    let all = proc_stat::processes()?;
    Ok(all.into_iter().filter(|process| process.alive).map(|process| process.group).collect())
}

/// Whether members of a group other than its leader are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// No member is left.
    Gone,
    /// A member is left, or the answer isn't known.
    MayLive,
}

/// The next step of an [`Ending`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Wait: for the leader's end, for the end of the others, or until [`Ending::due`].
    Wait,
    /// Send SIGKILL to the group, whose leader still runs.
    Kill,
    /// Send SIGKILL to what is left of the group, and then reap the leader, which has ended.
    KillAndReap,
    /// Log that the leader survived SIGKILL; it isn't waited for any more.
    GiveUp,
    /// Nothing is left to do.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// SIGTERM has been sent.
    Asked,
    /// SIGKILL has been sent.
    Killed,
    /// The leader has been reaped, after SIGKILL for the others.
    Reaped,
    /// The leader survived SIGKILL.
    GivenUp,
}

/// The progress of ending a group, from SIGTERM on.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    stage: Stage,
    leader_ended: bool,
    due: Instant,
}

impl Ending {
    /// Begins when SIGTERM has been sent to the group at `now`.
    pub fn asked(now: Instant) -> Self {
        Self { stage: Stage::Asked, leader_ended: false, due: now + GRACE }
    }

    /// Notes that SIGKILL has been sent to the group at `now`, out of turn, by a caller in a hurry.
    pub fn killed(&mut self, now: Instant) {
        if self.stage == Stage::Asked {
            self.stage = Stage::Killed;
            self.due = self.due.min(now + VANISH);
        }
    }

    /// Notes that the leader has ended. Until [`Step::KillAndReap`] the caller must not reap it.
    pub fn leader_ended(&mut self) {
        self.leader_ended = true;
    }

    /// Returns whether the leader has neither ended nor been given up.
    pub fn leader_runs(&self) -> bool {
        !self.leader_ended && self.stage != Stage::GivenUp
    }

    /// Returns whether the leader has ended and must not be reaped yet.
    pub fn holds_leader(&self) -> bool {
        self.leader_ended && matches!(self.stage, Stage::Asked | Stage::Killed)
    }

    /// Returns the time at which [`Self::next`] returns a new step although nothing else has
    /// happened.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Returns the next step and counts it as done.
    pub fn next(&mut self, others: Others, now: Instant) -> Step {
        let late = self.due <= now;
        match self.stage {
            Stage::Asked if self.leader_ended && (late || others == Others::Gone) => {
                self.reaped(now)
            }
            Stage::Asked if !self.leader_ended && late => {
                self.stage = Stage::Killed;
                self.due = now + GRACE;
                Step::Kill
            }
            // SIGKILL leaves the others no time to wait for.
            Stage::Killed if self.leader_ended => self.reaped(now),
            Stage::Killed if late => {
                self.stage = Stage::GivenUp;
                Step::GiveUp
            }
            Stage::Asked | Stage::Killed => Step::Wait,
            Stage::Reaped if late || others == Others::Gone => Step::Over,
            Stage::Reaped => Step::Wait,
            Stage::GivenUp => Step::Over,
        }
    }

    fn reaped(&mut self, now: Instant) -> Step {
        self.stage = Stage::Reaped;
        self.due = now + VANISH;
        Step::KillAndReap
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn only_a_program_of_its_own_is_a_group() {
        for pid in [i32::MIN, -1, 0, 1, getpgrp().as_raw()] {
            assert_eq!(Group::led_by(Pid::from_raw(pid)), None, "{pid}");
        }
        let group = Group::led_by(Pid::from_raw(i32::MAX)).expect("a group");
        assert!(group.is_empty());
        assert_eq!(group.signal(Signal::SIGKILL), Err(Errno::ESRCH));
    }

    #[test]
    fn a_group_is_empty_once_its_last_member_is_reaped() {
        let mut child = Command::new("/bin/sleep").arg("60").process_group(0).spawn().expect("run");
        let group = Group::led_by(Pid::from_raw(child.id().cast_signed())).expect("a group");
        assert!(!group.is_empty() && living().expect("/proc").contains(&group.id()));
        group.signal(Signal::SIGKILL).expect("signal");
        child.wait().expect("wait");
        assert!(group.is_empty());
    }

    #[test]
    fn a_group_that_obeys_is_reaped_when_all_have_ended() {
        let start = Instant::now();
        let mut ending = Ending::asked(start);
        assert_eq!(ending.next(Others::MayLive, start + SECOND), Step::Wait);
        assert!(ending.leader_runs() && !ending.holds_leader());
        ending.leader_ended();
        assert_eq!(ending.next(Others::MayLive, start + SECOND), Step::Wait);
        assert!(!ending.leader_runs() && ending.holds_leader());
        assert_eq!(ending.next(Others::Gone, start + SECOND), Step::KillAndReap);
        assert!(!ending.holds_leader());
        assert_eq!(ending.next(Others::Gone, start + SECOND), Step::Over);
    }

    #[test]
    fn others_that_outlive_the_leader_have_their_grace() {
        let start = Instant::now();
        let mut ending = Ending::asked(start);
        ending.leader_ended();
        let late = start + GRACE;
        assert_eq!(ending.due(), late);
        assert_eq!(ending.next(Others::MayLive, late - SECOND), Step::Wait);
        assert_eq!(ending.next(Others::MayLive, late), Step::KillAndReap);
        assert_eq!(ending.next(Others::MayLive, late), Step::Wait);
        assert_eq!(ending.due(), late + VANISH);
        assert_eq!(ending.next(Others::MayLive, late + VANISH), Step::Over);
    }

    #[test]
    fn a_leader_that_ignores_sigterm_is_killed_and_reaped_at_once() {
        let start = Instant::now();
        let mut ending = Ending::asked(start);
        assert_eq!(ending.next(Others::MayLive, start + GRACE), Step::Kill);
        assert_eq!(ending.next(Others::MayLive, start + GRACE), Step::Wait);
        ending.leader_ended();
        assert_eq!(ending.next(Others::MayLive, start + GRACE), Step::KillAndReap);
    }

    #[test]
    fn a_leader_that_survives_sigkill_is_given_up() {
        let start = Instant::now();
        let mut ending = Ending::asked(start);
        assert_eq!(ending.next(Others::MayLive, start + GRACE), Step::Kill);
        assert_eq!(ending.due(), start + 2 * GRACE);
        assert_eq!(ending.next(Others::MayLive, start + 2 * GRACE), Step::GiveUp);
        assert_eq!(ending.next(Others::MayLive, start + 2 * GRACE), Step::Over);
        assert!(!ending.leader_runs() && !ending.holds_leader());
    }

    #[test]
    fn a_hurry_shortens_every_wait() {
        let start = Instant::now();
        let mut running = Ending::asked(start);
        running.killed(start);
        assert_eq!(running.next(Others::MayLive, start), Step::Wait);
        assert_eq!(running.next(Others::MayLive, start + VANISH), Step::GiveUp);
        let mut held = Ending::asked(start);
        held.leader_ended();
        held.killed(start);
        assert_eq!(held.next(Others::MayLive, start), Step::KillAndReap);
    }

    #[test]
    fn pauses_grow_up_to_a_limit() {
        assert_eq!(next_pause(FIRST_PAUSE), 2 * FIRST_PAUSE);
        assert_eq!(next_pause(LAST_PAUSE), LAST_PAUSE);
        assert_eq!(pause_after_scan(Duration::ZERO), SCAN_PAUSE_MIN);
        assert_eq!(pause_after_scan(SECOND), SCAN_REST * SECOND);
    }
}
