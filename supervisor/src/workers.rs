//! The workers: their processes, the jobs that they have, and the programs that they leave behind.
//!
//! [`Workers`] owns all of it. `dispatch` passes jobs on, `processes` keeps the channels to the
//! workers, `reaping` learns of their ends. Which worker gets a job is decided in `pool`, what
//! becomes of a dead worker's programs in `orphan_table`.
//!
//! # Failure
//! A worker that ends, or that says anything which can't be understood or can't be true, costs each
//! of its clients a `Z`, and is replaced.

mod dispatch;
mod fairness;
mod orphan_table;
mod orphans;
mod pool;
mod processes;
mod reaping;
mod shown;
mod told;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Instant;

use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qrelay_shared::admin;
use qrelay_shared::client::Client;
use qrelay_shared::ipc::channel::RecvBuffer;
use qrelay_shared::settings::Declaration;
use slog::{Logger, warn};

use crate::descriptors::allot;
use crate::event::{Event, Events, Programs};
use crate::ids::{GenerationId, JobId, WorkerId};
use crate::system::System;
use crate::watch::Watcher;
use crate::workers::dispatch::Dispatches;
use crate::workers::orphans::Orphans;
use crate::workers::pool::{Command, Pool};
use crate::workers::processes::Process;
use crate::workers::shown::PastErrors;

/// The owner of worker processes, jobs, and programs of dead workers.
#[derive(Debug)]
pub(crate) struct Workers {
    log: Logger,
    /// Names this run of the supervisor in the ids of mails.
    instance: String,
    watcher: Watcher,
    system: Rc<dyn System>,
    /// Taken while it is read from.
    buffer: Option<RecvBuffer>,
    pool: Pool,
    processes: BTreeMap<WorkerId, Process>,
    /// Generations that take no more jobs.
    retired: BTreeSet<GenerationId>,
    /// Generations without a zygote, now and for ever.
    without_zygote: BTreeSet<GenerationId>,
    dispatches: Dispatches,
    /// Children that ended before anybody told what they were.
    strangers: HashMap<Pid, WaitStatus>,
    /// Since when children that have ended may be left for the next turn.
    unreaped_since: Option<Instant>,
    /// Programs that dead workers left behind.
    orphans: Orphans,
    /// How workers have come to their ends.
    ends: admin::Ends,
    /// What workers that are gone have told of their databases.
    past_errors: PastErrors,
}

impl Workers {
    /// Starts without workers.
    pub(crate) fn new(
        log: Logger,
        instance: String,
        watcher: Watcher,
        system: Rc<dyn System>,
    ) -> Self {
        Self {
            log,
            instance,
            watcher,
            buffer: Some(RecvBuffer::new()),
            pool: Pool::default(),
            processes: BTreeMap::new(),
            retired: BTreeSet::new(),
            without_zygote: BTreeSet::new(),
            dispatches: Dispatches::default(),
            strangers: HashMap::new(),
            unreaped_since: None,
            orphans: Orphans::new(Rc::clone(&system)),
            system,
            ends: admin::Ends::default(),
            past_errors: PastErrors::default(),
        }
    }

    /// Counts the jobs that workers have.
    pub(crate) fn in_flight(&self) -> usize {
        self.pool.in_flight()
    }

    /// Returns when the last of the actions' own time limits is over.
    pub(crate) fn latest_time_limit(&self) -> Option<Instant> {
        self.pool.latest_explicit()
    }

    /// Returns whether neither a worker nor a dead worker's program is left.
    pub(crate) fn is_idle(&self) -> bool {
        self.processes.is_empty() && self.orphans.is_empty()
    }

    /// Starts the workers of a generation.
    pub(crate) fn start(
        &mut self,
        generation: GenerationId,
        declaration: &Declaration,
        now: Instant,
        events: &mut Events,
    ) {
        let settings = &declaration.settings;
        let credit = allot(self.system.descriptor_limit(), declaration).credit;
        if credit < settings.worker_connections as usize {
            warn!(self.log, "too few descriptors for worker_connections: raise LimitNOFILE in the \
                unit or the hard limit (ulimit -Hn)"; "generation" => generation,
                "worker_connections" => settings.worker_connections, "in_force" => credit,
                "descriptors" => self.system.descriptor_limit());
        }
        let commands = self.pool.start(generation, settings, credit, now);
        self.carry_out(commands, now, events);
    }

    /// Gives new jobs to this generation.
    pub(crate) fn switch(&mut self, generation: GenerationId) {
        self.pool.switch(generation);
    }

    /// Lets a connection wait for a credit.
    pub(crate) fn ready(&mut self, job: JobId, client: Client) {
        self.pool.wait(client, job);
    }

    /// Forgets a connection that waited and has been answered.
    pub(crate) fn given_up(&mut self, job: JobId, client: Client) {
        self.pool.forget(client, job);
        self.dispatches.unbind(job);
    }

    /// Lets a generation's workers finish what they have, and end: nobody waits for them any more.
    pub(crate) fn retire(&mut self, generation: GenerationId, now: Instant, events: &mut Events) {
        let commands = self.pool.retire(generation, now);
        self.carry_out(commands, now, events);
        self.retired.insert(generation);
        self.finish(generation, now, events);
    }

    /// Kills the workers of a generation that never served.
    pub(crate) fn abandon(&mut self, generation: GenerationId, now: Instant, events: &mut Events) {
        for worker in self.pool.of(generation) {
            self.kill(worker, now, events);
        }
        self.retire(generation, now, events);
    }

    /// Notes that no process can fork workers of this generation any more.
    pub(crate) fn zygotes_ended(
        &mut self,
        generation: GenerationId,
        now: Instant,
        events: &mut Events,
    ) {
        self.without_zygote.insert(generation);
        self.finish(generation, now, events);
    }

    /// Asks again for the workers that a lost zygote may not have forked; gives up on them if the
    /// generation is to end anyway.
    pub(crate) fn zygote_lost(
        &mut self,
        generation: GenerationId,
        now: Instant,
        events: &mut Events,
    ) {
        if self.retired.contains(&generation) {
            return self.end_unborn(generation, now, events);
        }
        for worker in self.pool.starting(generation) {
            self.forget_process(worker, events);
            self.pool.restart(worker, now);
            self.spawn(generation, worker, now, events);
        }
    }

    /// Takes the next step to the end of a retired generation: reports it when its last worker is
    /// gone.
    pub(crate) fn finish(&mut self, generation: GenerationId, now: Instant, events: &mut Events) {
        if !self.retired.contains(&generation) {
            return;
        }
        if self.pool.is_empty(generation) {
            self.retired.remove(&generation);
            self.without_zygote.remove(&generation);
            self.pool.remove(generation);
            events.push_back(Event::Drained(generation));
        } else if self.without_zygote.contains(&generation) {
            self.end_unborn(generation, now, events);
        }
    }

    /// Gives up the workers that a zygote was asked for and whose process ids it never told: the
    /// zygote is gone. A worker that it did fork ends by itself, because its sockets are closed.
    fn end_unborn(&mut self, generation: GenerationId, now: Instant, events: &mut Events) {
        for worker in self.pool.of(generation) {
            if self.processes.get(&worker).is_none_or(|process| process.pid.is_none()) {
                self.not_forked(worker, now, events);
            }
        }
    }

    /// Kills every worker, because the time for the drain is over.
    pub(crate) fn kill_all(&mut self, programs: Programs, now: Instant, events: &mut Events) {
        for worker in self.processes.keys().copied().collect::<Vec<_>>() {
            self.kill(worker, now, events);
        }
        if programs == Programs::Killed {
            self.orphans.kill_all(now);
        }
    }

    /// Kills every worker, and waits for their ends: the daemon ends.
    pub(crate) fn close(&mut self) {
        let processes = std::mem::take(&mut self.processes);
        let pids: Vec<Pid> = processes.values().filter_map(|process| process.pid).collect();
        self.system.kill_all(&pids);
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant, events: &mut Events) {
        let (commands, hangs) = self.pool.tick(now);
        for (worker, hang) in hangs {
            self.note_hang(worker, hang, (None, ""), events);
        }
        self.carry_out(commands, now, events);
        if self.unreaped_since.take().is_some() {
            events.push_back(Event::ChildEnded);
        }
        self.tick_orphans(now, events);
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let due = [self.pool.next_tick(), self.orphans.next_deadline(), self.unreaped_since];
        due.into_iter().flatten().min()
    }

    fn carry_out(&mut self, commands: Vec<Command>, now: Instant, events: &mut Events) {
        for command in commands {
            match command {
                Command::Spawn(generation, worker) => self.spawn(generation, worker, now, events),
                Command::Shut(worker) => self.shut_jobs(worker),
                Command::Ping(worker, sequence) => self.ping(worker, sequence),
                Command::Abort(worker) => self.abort(worker, now, events),
                Command::Kill(worker) => self.kill(worker, now, events),
            }
        }
    }
}

#[cfg(test)]
#[path = "workers/tests.rs"]
mod tests;
