//! Process ids that zygotes and workers tell, and what is believed of them.
//!
//! Contract: no process is signalled because somebody has told its number. A worker's process is
//! this process' own child, whose number can't become another process' before this process reaps
//! it. A program is its worker's child when the worker tells it. When the worker has ended, the
//! program is looked at again: only a child of this process that is still the same process counts
//! (the start time tells), and its group is signalled while the child isn't reaped.
//!
//! # Failure
//! A number that can't be looked at (no descriptor is free, or /proc hides the process) isn't taken
//! for a lie. Such a program is signalled only if it turns out to be this process' own child.

use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::sys::proc_stat::Identity;

use crate::ids::JobId;
use crate::system::System;

/// A program that a worker has told.
#[derive(Debug)]
pub(super) struct Program {
    /// The job that the program runs for.
    pub(super) job: JobId,
    /// The number that was told.
    pub(super) pid: Pid,
    /// What is known about the number.
    pub(super) belief: Belief,
}

/// What is known about the number of a program.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Belief {
    /// The number could not be looked at, or names no process any more.
    Unchecked,
    /// The number named a program of the worker. The value is its start time.
    Runs(u64),
    /// The number named another process. That is a lie, unless the worker has reported meanwhile
    /// that it reaps the program: then the number may have become another process'.
    Doubted(String),
}

/// What a zygote has told about a process that it has forked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fork {
    /// The process is a child of this process.
    Runs,
    /// The process had ended, and is reaped.
    Ended(WaitStatus),
    /// The number can't be the one of such a process.
    Lie(String),
}

/// Judges the number of a process that a zygote has forked. Such a process is a child of this one
/// and has never left the group. `taken` says whether the number is known for another process'.
/// `remembered` is the status of a child with this number that ended before anybody told about it.
/// That status counts only if the number isn't a child's again.
pub(super) fn judge_fork(
    system: &dyn System,
    pid: Pid,
    taken: bool,
    remembered: Option<WaitStatus>,
) -> Fork {
    if !taken && system.is_child(pid) && may_be_in_own_group(system, pid) {
        return Fork::Runs;
    }
    match remembered {
        Some(status) => Fork::Ended(status),
        None => Fork::Lie(format!("it told process id {pid}, which is none that it forked")),
    }
}

/// Returns whether a process is in the group of this process, or could not be looked at.
pub(super) fn may_be_in_own_group(system: &dyn System, pid: Pid) -> bool {
    match system.identify(pid) {
        Ok(Some(identity)) => identity.process.group == system.own_group(),
        _ => true,
    }
}

/// Looks at the number of a program that a worker has told. `taken` says whether the number is
/// known for another process'.
pub(super) fn look_at_program(
    system: &dyn System,
    worker: Option<Pid>,
    pid: Pid,
    taken: bool,
) -> Belief {
    let stranger =
        || Belief::Doubted(format!("it told process id {pid}, which is none of its programs"));
    // No process can have the number of a group that has members, but for the group's leader, which
    // may have ended.
    if pid == system.own_group() {
        return stranger();
    }
    let Some(worker) = worker else { return Belief::Unchecked };
    let Ok(Some(found)) = system.identify(pid) else { return Belief::Unchecked };
    let parent = found.process.parent;
    // The programs of a worker that ends become children of this process.
    let inherited = || parent == system.own_pid() && !taken && is_ending(system, worker);
    if leads_like_a_program(&found) && (parent == worker || inherited()) {
        return Belief::Runs(found.started);
    }
    stranger()
}

fn is_ending(system: &dyn System, worker: Pid) -> bool {
    match system.identify(worker) {
        Ok(Some(identity)) => identity.ending,
        _ => true,
    }
}

/// Returns whether a process leads its group, but no session. A program is started as the leader of
/// a group, and the leader of a group can't begin a session.
fn leads_like_a_program(found: &Identity) -> bool {
    found.process.group == found.process.pid && found.session != found.process.pid
}

/// Returns whether the process that was told is now a child of this process, so that the number
/// names its group until this process reaps it.
pub(super) fn is_inherited(system: &dyn System, program: &Program) -> bool {
    let is_same = |found: &Identity| match program.belief {
        Belief::Unchecked => true,
        Belief::Runs(started) => found.started == started,
        Belief::Doubted(_) => false,
    };
    if matches!(program.belief, Belief::Doubted(_)) || !system.is_child(program.pid) {
        return false;
    }
    match system.identify(program.pid) {
        Ok(Some(found)) => leads_like_a_program(&found) && is_same(&found),
        _ => true,
    }
}
