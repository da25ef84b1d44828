//! What administrators see of workers and of the mails that these have.

use std::collections::BTreeMap;
use std::time::Instant;

use nix::unistd::Pid;
use qrelay_shared::admin;
use qrelay_shared::flight::{Flight, Phase};
use qrelay_shared::ids::JobId;
use qrelay_shared::sys::recorder;
use slog::info;

use crate::event::{Cursor, Event, Events};
use crate::ids::WorkerId;
use crate::workers::Workers;
use crate::workers::pool::Hang;
use crate::workers::pool::status::Summary;

/// Mails of a worker that are listed at a time.
const PART: usize = 64;

/// Most databases whose errors are remembered when their workers are gone.
const MOST_DATABASES: usize = 64;

/// The errors of databases that workers have told which are gone.
#[derive(Debug, Default)]
pub(super) struct PastErrors(BTreeMap<String, u64>);

impl PastErrors {
    /// Adds errors to those of a database.
    pub(super) fn add(&mut self, database: &str, errors: u64) {
        if let Some(sum) = self.0.get_mut(database) {
            *sum = sum.saturating_add(errors);
        } else if self.0.len() < MOST_DATABASES {
            self.0.insert(database.to_owned(), errors);
        }
    }
}

impl Workers {
    /// Logs one line about each worker.
    pub(crate) fn log_status(&self) {
        for Summary { worker, generation, state, jobs, mails, .. } in self.pool.summaries() {
            let pid = self.processes.get(&worker).and_then(|process| process.pid);
            info!(self.log, "status of a worker"; "worker" => worker,
                "pid" => pid.map(Pid::as_raw), "generation" => generation, "state" => state,
                "in_flight" => jobs, "mails" => mails);
        }
    }

    /// Describes every worker, in the order of their numbers.
    pub(crate) fn shown(&self, now: Instant) -> Vec<admin::Worker> {
        let shown = self.pool.summaries().map(|summary| {
            let process = self.processes.get(&summary.worker);
            let pid = process.and_then(|process| process.pid);
            let usage = pid.and_then(|pid| self.system.usage(pid));
            let age = process.map(|process| now.saturating_duration_since(process.asked));
            admin::Worker {
                worker: summary.worker.0,
                pid: pid.map(Pid::as_raw),
                generation: summary.generation.0,
                state: summary.state.to_owned(),
                in_flight: summary.jobs as u64,
                credit: summary.credit as u64,
                mails: summary.mails,
                answers: process.map(|process| process.answers).unwrap_or_default(),
                lua_bytes: process.map_or(0, |process| process.lua_bytes),
                rss_bytes: usage.map(|usage| usage.rss),
                threads: usage.map(|usage| usage.threads),
                age: age.unwrap_or_default().as_secs(),
            }
        });
        shown.collect()
    }

    /// Describes the workers' pools of connections to databases, those to one database added up, in
    /// the order of their names.
    pub(crate) fn databases(&self) -> Vec<admin::Database> {
        let mut sums: BTreeMap<&str, admin::Database> = BTreeMap::new();
        for pool in self.processes.values().flat_map(|process| &process.databases) {
            let sum = sums.entry(&pool.name).or_default();
            let busy = u64::from(pool.outstanding.min(pool.connections));
            sum.limit += u64::from(pool.limit);
            sum.connections += u64::from(pool.connections);
            sum.busy += busy;
            sum.waiting += u64::from(pool.outstanding) - busy;
            sum.errors = sum.errors.saturating_add(pool.errors);
        }
        let named = sums.into_iter().map(|(name, sum)| admin::Database {
            database: name.to_owned(),
            errors: sum.errors.saturating_add(self.past_errors.0.get(name).copied().unwrap_or(0)),
            ..sum
        });
        named.collect()
    }

    /// Counts how workers have come to their ends.
    pub(crate) fn ends(&self) -> admin::Ends {
        self.ends
    }

    /// Counts the mails that go to each next hop or program at the moment. A mail whose next hop is
    /// still looked up counts for none.
    pub(crate) fn at_next_hops(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        let busy = self.processes.iter().filter(|&(&worker, _)| self.pool.jobs_of(worker) > 0);
        for (_, process) in busy {
            let flights = process.flights.as_ref().map(recorder::flights);
            for flight in flights.and_then(Result::ok).into_iter().flatten() {
                let goes =
                    matches!(flight.phase, Phase::Connecting | Phase::NextHop | Phase::Program);
                if goes && !flight.next_hop.is_empty() {
                    *counts.entry(flight.next_hop).or_default() += 1;
                }
            }
        }
        counts
    }

    /// Returns some of the mails that workers have, from this place on: which worker has them, what
    /// it has noted, and where the next ones begin, if there may be more.
    pub(crate) fn flights(
        &self,
        worker: WorkerId,
        slot: usize,
    ) -> Option<(WorkerId, Vec<Flight>, Cursor)> {
        let (&found, process) = self.processes.range(worker..).next()?;
        let (worker, slot) = (found, if found == worker { slot } else { 0 });
        let flights = process.flights.as_ref().map(|memory| recorder::part(memory, slot, PART));
        // What a worker notes isn't believed: only mails that it has are listed.
        let own = |flight: &Flight| self.pool.has(flight.job, worker);
        let (flights, next) = match flights.and_then(Result::ok) {
            Some((flights, recorder::More::Yes)) => (flights, Cursor::Worker(worker, slot + PART)),
            Some((flights, recorder::More::No)) => (flights, following(worker)),
            None => (Vec::new(), following(worker)),
        };
        Some((worker, flights.into_iter().filter(own).collect(), next))
    }

    /// Logs and counts that a worker is ended because it hangs.
    pub(super) fn note_hang(
        &mut self,
        worker: WorkerId,
        hang: Hang,
        (job, place): (Option<JobId>, &str),
        events: &mut Events,
    ) {
        self.log_hang(worker, hang, job, place);
        if hang != Hang::DrainOver {
            self.ends.hangs += 1;
            let text = match place {
                "" => format!("worker {worker} hangs"),
                place => format!("worker {worker} hangs in {place}"),
            };
            events.push_back(Event::Incident(admin::IncidentKind::Hang, text));
        }
    }
}

fn following(worker: WorkerId) -> Cursor {
    Cursor::Worker(WorkerId(worker.0 + 1), 0)
}
