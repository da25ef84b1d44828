//! Which children have ended: workers, their programs, and what the supervisor inherited.
//!
//! A worker's programs become the supervisor's children when the worker ends. The process group of
//! such a program can be named only until its leader is reaped, so workers are reaped first, and
//! the leader of a program only when nothing is left of its group.
//!
//! Zygotes are reaped by their owner, before anything here is.
//!
//! Every process that loses its parent becomes a child of this one, and a program may leave behind
//! any number of them. So only some children are reaped before everybody else has a turn.

use std::time::Instant;

use nix::unistd::Pid;
use slog::{debug, error};

use crate::event::{Event, Events, Recorder, Teller};
use crate::ids::{WorkerId, ZygoteId};
use crate::system::ZygotePids;
use crate::workers::Workers;
use crate::workers::told::{self, Fork};

/// Children that are reaped before everybody else has a turn. What is left is found again by
/// [`Workers::tick`].
const PER_TURN: usize = 64;
/// Most statuses that are remembered of children that nobody has told yet. More of them are no
/// honest zygote's.
const MOST_STRANGERS: usize = 1024;

/// Whether a child was there to be reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reaped {
    Yes,
    No,
}

/// Parameters of reaping: the zygotes, the time, and where facts and records go.
struct Context<'a, 'r> {
    zygotes: &'a ZygotePids,
    now: Instant,
    record: &'a mut Recorder<'r>,
    events: &'a mut Events,
}

impl Workers {
    /// Reaps every child that has ended.
    pub(crate) fn reap(
        &mut self,
        zygotes: &ZygotePids,
        now: Instant,
        record: &mut Recorder<'_>,
        events: &mut Events,
    ) {
        self.reap_ended(&mut Context { zygotes, now, record, events });
        // A reaped child may have been the last member of a program's group.
        self.report_over(now, events);
    }

    fn reap_ended(&mut self, context: &mut Context<'_, '_>) {
        let now = context.now;
        while let Some(worker) = self.ended_worker() {
            if self.reap_child(worker, context) == Reaped::No {
                break;
            }
        }
        for _ in 0..PER_TURN {
            let Some(pid) = self.system.ended(None) else { return };
            if context.zygotes.known.contains(&pid) {
                // The zygote ended after its owner looked. There will be another signal.
                return;
            }
            if self.orphans.holds(pid) {
                // The held child hides the others that have ended. For children that end from now
                // on there will be another signal.
                for pid in self.orphans.ended_besides(now) {
                    self.reap_after_workers(pid, context);
                }
                return;
            }
            if self.reap_after_workers(pid, context) == Reaped::No {
                return;
            }
        }
        self.unreaped_since = Some(now);
    }

    /// Reaps a child, and before it every worker that has ended. The programs of a dead worker have
    /// become children of this process; if one of them were reaped first, its number could be
    /// another process' by the time when the dead worker's programs are told to end.
    fn reap_after_workers(&mut self, pid: Pid, context: &mut Context<'_, '_>) -> Reaped {
        while let Some(worker) = self.ended_worker() {
            if self.reap_child(worker, context) == Reaped::No {
                return Reaped::No;
            }
            if worker == pid {
                return Reaped::Yes;
            }
        }
        match context.zygotes.known.contains(&pid) {
            true => Reaped::No,
            false => self.reap_child(pid, context),
        }
    }

    fn ended_worker(&self) -> Option<Pid> {
        let mut workers = self.processes.values().filter_map(|process| process.pid);
        workers.find(|&worker| self.system.ended(Some(worker)).is_some())
    }

    /// Reaps a child that has ended, now or later.
    fn reap_child(&mut self, pid: Pid, context: &mut Context<'_, '_>) -> Reaped {
        let now = context.now;
        if self.system.ended(Some(pid)).is_none() {
            // Without this, reaping would wait.
            return Reaped::No;
        }
        if self.orphans.ended(pid, now) || self.adopt_early(pid, context) {
            return Reaped::Yes;
        }
        let Some(worker) = self.worker_of(pid) else { return self.reap_stranger(pid, context) };
        // The reports come first: the process ids in them are compared with the worker's, which is
        // another process' perhaps as soon as the worker is reaped.
        self.take_last_reports(worker, now, context.record, context.events);
        let Some(status) = self.system.reap(pid) else { return Reaped::No };
        self.ended(worker, Some(status), now, context.events);
        Reaped::Yes
    }

    /// Holds a program whose worker is about to end, as if the worker had ended: the kernel gives
    /// this process a worker's children before the worker's last thread is gone. Returns whether
    /// the child is such a program.
    fn adopt_early(&mut self, pid: Pid, context: &mut Context<'_, '_>) -> bool {
        if self.worker_of(pid).is_some() {
            return false;
        }
        let now = context.now;
        let workers: Vec<WorkerId> = self.processes.keys().copied().collect();
        for worker in workers {
            // The report that the program runs, or that the worker has reaped it, may be unread.
            self.on_all_reports(worker, now, context.record, context.events);
            if let Some(process) = self.processes.get_mut(&worker)
                && let Some(at) = process.children.iter().position(|program| program.pid == pid)
                && told::is_inherited(&*self.system, &process.children[at])
            {
                let program = process.children.swap_remove(at);
                self.orphans.adopt(&[(program.job, pid)], now);
                return self.orphans.ended(pid, now);
            }
        }
        false
    }

    /// Reaps a child that isn't known, and remembers its status if it may be a worker or a standby
    /// whose process id its zygote has yet to tell.
    fn reap_stranger(&mut self, pid: Pid, context: &Context<'_, '_>) -> Reaped {
        let unknown = self.processes.values().any(|process| process.pid.is_none());
        let expected = unknown || context.zygotes.unknown > 0;
        let fits = expected && told::may_be_in_own_group(&*self.system, pid);
        let Some(status) = self.system.reap(pid) else { return Reaped::No };
        if !expected || self.strangers.len() >= MOST_STRANGERS {
            self.strangers.clear();
        }
        if fits {
            self.strangers.insert(pid, status);
        }
        Reaped::Yes
    }

    /// Tells whether a standby has ended before its process id was known.
    pub(crate) fn standby_forked(
        &mut self,
        teller: Teller,
        zygote: ZygoteId,
        pid: Pid,
        events: &mut Events,
    ) {
        events.push_back(match self.judge_fork(pid) {
            Fork::Runs => Event::StandbyRuns { zygote, pid },
            Fork::Ended(_) => Event::StandbyEnded(zygote),
            Fork::Lie(complaint) => Event::ZygoteLied { zygote: teller.zygote, complaint },
        });
    }

    /// Does what is due to the programs of dead workers: kills those that ignore SIGTERM, reaps
    /// those of whose groups nothing is left, and reports jobs whose programs are over.
    pub(super) fn tick_orphans(&mut self, now: Instant, events: &mut Events) {
        for pid in self.orphans.kill_overdue(now) {
            error!(self.log, "a dead worker's program can't be killed"; "pid" => pid.as_raw());
        }
        let reaped = self.orphans.reapable(now);
        for &pid in &reaped {
            // The leader has ended and is a child, so this neither waits nor fails.
            let _ = self.system.reap(pid);
            debug!(self.log, "a dead worker's program has ended"; "pid" => pid.as_raw());
        }
        if !reaped.is_empty() || self.orphans.hides(now) {
            // The leader may have hidden other children that have ended.
            events.push_back(Event::ChildEnded);
        }
        self.report_over(now, events);
    }

    fn report_over(&mut self, now: Instant, events: &mut Events) {
        events.extend(self.orphans.over(now).into_iter().map(Event::ProgramEnded));
    }
}
