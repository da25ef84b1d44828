//! The workers, and which of them gets the next job. Pure: events and the time go in, [`Command`]s
//! come out.
//!
//! Invariants: a worker never holds more jobs than its credit, but for [`Pool::overflow`]. A job
//! belongs to one worker until the job is done or the worker is dead. Every generation that isn't
//! retiring has its full number of workers, or a time at which the next one is tried.

pub(super) mod status;
mod upkeep;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use qrelay_shared::client::{Client, Share};
use qrelay_shared::settings::Settings;
use rustc_hash::FxHashMap;

use crate::backoff::Backoff;
use crate::ids::{GenerationId, JobId, WorkerId};
use crate::workers::fairness::Fairness;
use crate::workers::pool::upkeep::PING_INTERVAL;

/// A worker whose Lua has been held for longer gets no new jobs.
const HELD_TOO_LONG: Duration = Duration::from_millis(250);
/// Longest time limit of an action that a drain waits for.
pub(super) const LONGEST_LIMIT: Duration = Duration::from_secs(3600);
/// Time in which a forked worker becomes ready, or never will.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// An order about a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Have the generation's zygote fork this worker.
    Spawn(GenerationId, WorkerId),
    /// Shut its job socket: the worker finishes what it has and ends.
    Shut(WorkerId),
    /// Ask how long its Lua has been held.
    Ping(WorkerId, u64),
    /// Send SIGABRT, because the worker hangs.
    Abort(WorkerId),
    /// Send SIGKILL.
    Kill(WorkerId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The zygote has been asked.
    Starting { until: Instant },
    /// Takes jobs.
    Ready,
    /// Finishes its jobs; killed at the deadline, which no time limit puts off beyond `latest`.
    Retiring { deadline: Instant, latest: Instant },
    /// Has been signalled; killed (again) at that time.
    Dying { kill_at: Instant },
}

#[derive(Debug)]
struct Worker {
    generation: GenerationId,
    state: State,
    /// The worker has been able to take jobs, whatever happened since.
    ready: bool,
    jobs: usize,
    mails: u64,
    held: Duration,
    exhausted: bool,
    unanswered: u32,
    /// Until when an action's own time limit may run.
    explicit_until: Option<Instant>,
}

impl Worker {
    fn active(&self) -> bool {
        matches!(self.state, State::Starting { .. } | State::Ready)
    }

    fn takes_jobs(&self, credit: usize) -> bool {
        self.state == State::Ready
            && self.jobs < credit
            && self.held <= HELD_TOO_LONG
            && self.unanswered < 3
    }
}

/// The workers of one generation.
#[derive(Debug)]
struct Group {
    target: usize,
    credit: usize,
    share: Share,
    max_mails: u64,
    drain_timeout: Duration,
    hang_timeout: Duration,
    backoff: Backoff,
    /// When the missing workers are tried again.
    respawn: Vec<Instant>,
    /// The worker that ends as soon as its replacement is ready.
    recycling: Option<WorkerId>,
    retiring: bool,
}

/// Why a worker must be ended, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hang {
    /// Lua has been held for this long.
    Held(Duration),
    /// The leader has begun no job for this long, although there is one.
    Stuck(Duration),
    /// The number of pings that went unanswered.
    Silent(u32),
    /// The worker never became ready.
    NotReady,
    /// The drain time is over.
    DrainOver,
}

/// How a worker came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The process ended.
    Died,
    /// There was no process, or none that is known.
    NotForked,
}

/// A worker's report about itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Health {
    /// How long Lua has been held by one call; zero when Lua is free.
    pub(super) held: Duration,
    /// How long the leader has made no progress with a job; zero without a job.
    pub(super) stuck: Duration,
    /// The Lua state is at its memory limit, even after a collection.
    pub(super) exhausted: bool,
}

/// The consequences of a death for the pool.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Death {
    /// The generation of the worker.
    pub(super) generation: GenerationId,
    /// The jobs that nobody will finish.
    pub(super) jobs: Vec<JobId>,
    /// The worker had not been asked to end.
    pub(super) unexpected: bool,
    /// The worker had been able to take jobs.
    pub(super) was_ready: bool,
}

/// All workers of all generations.
#[derive(Debug, Default)]
pub(super) struct Pool {
    workers: BTreeMap<WorkerId, Worker>,
    groups: BTreeMap<GenerationId, Group>,
    jobs: FxHashMap<JobId, (Client, WorkerId)>,
    fairness: Fairness,
    current: Option<GenerationId>,
    last_worker: WorkerId,
    next_ping: Option<Instant>,
    sequence: u64,
}

impl Pool {
    /// Starts the workers of a generation, each of which takes `credit` jobs at a time. They get no
    /// jobs before [`Self::switch`].
    pub(super) fn start(
        &mut self,
        generation: GenerationId,
        settings: &Settings,
        credit: usize,
        now: Instant,
    ) -> Vec<Command> {
        let group = Group {
            target: settings.workers as usize,
            credit,
            share: Share::new(settings.client_share),
            max_mails: settings.worker_max_mails,
            drain_timeout: settings.drain_timeout,
            hang_timeout: settings.hang_timeout,
            backoff: Backoff::default(),
            respawn: Vec::new(),
            recycling: None,
            retiring: false,
        };
        let target = group.target;
        self.groups.insert(generation, group);
        (0..target).map(|_| self.spawn(generation, now)).collect()
    }

    fn spawn(&mut self, generation: GenerationId, now: Instant) -> Command {
        let id = self.last_worker.advance();
        self.workers.insert(
            id,
            Worker {
                generation,
                state: State::Starting { until: now + START_TIMEOUT },
                ready: false,
                jobs: 0,
                mails: 0,
                held: Duration::ZERO,
                exhausted: false,
                unanswered: 0,
                explicit_until: None,
            },
        );
        Command::Spawn(generation, id)
    }

    /// Notes that a worker can take jobs from now on.
    pub(super) fn ready(&mut self, worker: WorkerId, now: Instant) -> Vec<Command> {
        let Some(entry) = self.workers.get_mut(&worker) else { return Vec::new() };
        if !matches!(entry.state, State::Starting { .. }) {
            return Vec::new();
        }
        entry.state = State::Ready;
        entry.ready = true;
        let generation = entry.generation;
        self.next_ping.get_or_insert(now + PING_INTERVAL);
        let recycled = self.groups.get_mut(&generation).and_then(|group| group.recycling.take());
        recycled.map_or_else(Vec::new, |old| self.retire_worker(old, now))
    }

    /// Gives new jobs to this generation.
    pub(super) fn switch(&mut self, generation: GenerationId) {
        self.current = Some(generation);
    }

    /// Lets a generation's workers finish what they have, and end.
    pub(super) fn retire(&mut self, generation: GenerationId, now: Instant) -> Vec<Command> {
        let Some(group) = self.groups.get_mut(&generation) else { return Vec::new() };
        group.retiring = true;
        group.respawn.clear();
        if self.current == Some(generation) {
            self.current = None;
        }
        let workers: Vec<_> = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.generation == generation && worker.active())
            .map(|(&id, _)| id)
            .collect();
        workers.into_iter().flat_map(|worker| self.retire_worker(worker, now)).collect()
    }

    fn retire_worker(&mut self, id: WorkerId, now: Instant) -> Vec<Command> {
        let Some(worker) = self.workers.get_mut(&id).filter(|worker| worker.active()) else {
            return Vec::new();
        };
        let drain = self.groups.get(&worker.generation).map_or(Duration::ZERO, |g| g.drain_timeout);
        let deadline = worker.explicit_until.map_or(now + drain, |until| until.max(now + drain));
        worker.state = State::Retiring { deadline, latest: now + drain + LONGEST_LIMIT };
        vec![Command::Shut(id)]
    }

    /// Returns whether the generation has no worker left.
    pub(super) fn is_empty(&self, generation: GenerationId) -> bool {
        !self.workers.values().any(|worker| worker.generation == generation)
    }

    /// Forgets a generation without workers.
    pub(super) fn remove(&mut self, generation: GenerationId) {
        self.groups.remove(&generation);
    }

    /// Lets a connection wait for a credit.
    pub(super) fn wait(&mut self, client: Client, job: JobId) {
        self.fairness.wait(client, job);
    }

    /// Forgets a waiting connection.
    pub(super) fn forget(&mut self, client: Client, job: JobId) {
        self.fairness.forget(client, job);
    }

    /// Counts the jobs that workers have.
    pub(super) fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    /// Returns how many jobs a worker of this generation takes at a time.
    pub(super) fn credit(&self, generation: GenerationId) -> usize {
        self.groups.get(&generation).map_or(0, |group| group.credit)
    }

    /// Counts the jobs that a worker has.
    pub(super) fn jobs_of(&self, worker: WorkerId) -> usize {
        self.workers.get(&worker).map_or(0, |worker| worker.jobs)
    }

    /// Takes the next job to dispatch, and chooses the worker that gets it.
    pub(super) fn next_dispatch(&mut self) -> Option<(JobId, WorkerId)> {
        if self.fairness.waiting() == 0 {
            return None;
        }
        let generation = self.current?;
        let group = self.groups.get(&generation)?;
        let mut free = 0;
        let mut best: Option<(usize, WorkerId)> = None;
        for (&id, worker) in self.workers.iter().filter(|(_, w)| w.generation == generation) {
            if worker.state == State::Ready {
                free += group.credit.saturating_sub(worker.jobs);
            }
            if worker.takes_jobs(group.credit) && best.is_none_or(|(jobs, _)| worker.jobs < jobs) {
                best = Some((worker.jobs, id));
            }
        }
        let (_, worker) = best?;
        let (client, job) = self.fairness.next(group.share.cap(free))?;
        self.assign(job, client, worker);
        Some((job, worker))
    }

    /// Chooses a worker of this generation for a job that no other generation can serve, whatever
    /// the worker's credit.
    pub(super) fn overflow(
        &mut self,
        generation: GenerationId,
        client: Client,
        job: JobId,
    ) -> Option<WorkerId> {
        let worker = self
            .workers
            .iter()
            .filter(|(_, w)| w.generation == generation && w.state == State::Ready)
            .min_by_key(|(_, w)| w.jobs)
            .map(|(&id, _)| id)?;
        self.fairness.started(client);
        self.assign(job, client, worker);
        Some(worker)
    }

    fn assign(&mut self, job: JobId, client: Client, worker: WorkerId) {
        self.jobs.insert(job, (client, worker));
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.jobs += 1;
            worker.mails += 1;
        }
    }

    /// Takes a job back that no worker got, and forgets it.
    pub(super) fn abort(&mut self, job: JobId) {
        self.take_back(job);
    }

    /// Takes a job back that no worker got: it waits again, before its client's others.
    pub(super) fn bounced(&mut self, job: JobId) {
        if let Some(client) = self.take_back(job) {
            self.fairness.wait_first(client, job);
        }
    }

    /// Undoes an assignment: the worker never had the job.
    fn take_back(&mut self, job: JobId) -> Option<Client> {
        if let Some(worker) = self.jobs.get(&job).and_then(|(_, id)| self.workers.get_mut(id)) {
            worker.mails = worker.mails.saturating_sub(1);
        }
        self.unassign(job)
    }

    /// Returns whether this worker has this job.
    pub(super) fn has(&self, job: JobId, worker: WorkerId) -> bool {
        self.jobs.get(&job).is_some_and(|&(_, owner)| owner == worker)
    }

    /// Ends a job; returns false if this worker doesn't have it.
    pub(super) fn done(&mut self, job: JobId, worker: WorkerId) -> bool {
        if !self.has(job, worker) {
            return false;
        }
        self.unassign(job);
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.held = Duration::ZERO;
            if let Some(group) = self.groups.get_mut(&worker.generation) {
                group.backoff.succeeded();
            }
        }
        true
    }

    fn unassign(&mut self, job: JobId) -> Option<Client> {
        let (client, worker) = self.jobs.remove(&job)?;
        self.fairness.finished(client);
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.jobs = worker.jobs.saturating_sub(1);
        }
        Some(client)
    }

    /// Notes that an action of this worker has its own time limit, which a drain waits for.
    pub(super) fn explicit_timeout(&mut self, worker: WorkerId, until: Instant) {
        let Some(worker) = self.workers.get_mut(&worker) else { return };
        worker.explicit_until = worker.explicit_until.max(Some(until));
        if let State::Retiring { deadline, latest } = &mut worker.state {
            *deadline = until.min(*latest).max(*deadline);
        }
    }

    /// Returns when the last of the actions' own time limits is over.
    pub(super) fn latest_explicit(&self) -> Option<Instant> {
        self.workers.values().filter_map(|worker| worker.explicit_until).max()
    }

    /// Has a worker killed at `at`, because it has closed its channels or broken the protocol.
    pub(super) fn condemn(&mut self, worker: WorkerId, at: Instant) {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.state = State::Dying { kill_at: at };
        }
    }

    /// Removes a worker that is dead or could not be forked, and its jobs.
    pub(super) fn died(&mut self, id: WorkerId, end: End, now: Instant) -> Option<Death> {
        let worker = self.workers.remove(&id)?;
        let jobs: Vec<JobId> =
            self.jobs.iter().filter(|(_, (_, owner))| *owner == id).map(|(&job, _)| job).collect();
        for &job in &jobs {
            self.unassign(job);
        }
        let was_ready = worker.ready;
        let unexpected = end == End::Died && !matches!(worker.state, State::Retiring { .. });
        if let Some(group) = self.groups.get_mut(&worker.generation) {
            if group.recycling == Some(id) {
                group.recycling = None;
            }
            let active = self
                .workers
                .values()
                .filter(|other| other.generation == worker.generation && other.active())
                .count();
            let needed = group.target + usize::from(group.recycling.is_some());
            if !group.retiring && active + group.respawn.len() < needed {
                let wait = match worker.mails > 0 {
                    true => Duration::ZERO,
                    false => group.backoff.failed(),
                };
                group.respawn.push(now + wait);
            }
        }
        Some(Death { generation: worker.generation, jobs, unexpected, was_ready })
    }

    /// Returns whether this worker has been told to finish, or is gone.
    pub(super) fn is_retiring(&self, worker: WorkerId) -> bool {
        self.workers
            .get(&worker)
            .is_none_or(|worker| matches!(worker.state, State::Retiring { .. }))
    }

    /// Returns the generation of a worker.
    pub(super) fn generation_of(&self, worker: WorkerId) -> Option<GenerationId> {
        self.workers.get(&worker).map(|worker| worker.generation)
    }

    /// Returns the workers of a generation that have never been ready.
    pub(super) fn starting(&self, generation: GenerationId) -> Vec<WorkerId> {
        self.workers
            .iter()
            .filter(|(_, w)| w.generation == generation && !w.ready)
            .map(|(&id, _)| id)
            .collect()
    }

    /// Gives a worker that has never been ready its whole time again.
    pub(super) fn restart(&mut self, worker: WorkerId, now: Instant) {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.state = State::Starting { until: now + START_TIMEOUT };
        }
    }

    /// Returns the workers of a generation, whatever their state.
    pub(super) fn of(&self, generation: GenerationId) -> Vec<WorkerId> {
        let own = self.workers.iter().filter(|(_, worker)| worker.generation == generation);
        own.map(|(&id, _)| id).collect()
    }
}

#[cfg(test)]
#[path = "pool/tests.rs"]
mod tests;
