//! From the connections that wait to the workers' job sockets.
//!
//! Contract: a connection counts as dispatched only when its socket is in a worker's job socket.
//! Up to [`MAX_FDS`] jobs for one worker go into one datagram.
//!
//! # Failure
//! A job socket that takes no more counts as no credit: the jobs wait again, before those of the
//! same client. That holds as well for connections that only a generation on its way out can serve.

use std::os::fd::AsFd;

use qrelay_shared::client::Client;
use qrelay_shared::ipc::channel::{Batch, MAX_FDS, SendError};
use qrelay_shared::ipc::message::{Job, ToJobs};

use crate::connected::Connected;
use crate::event::{Event, Events};
use crate::ids::{GenerationId, JobId, WorkerId};
use crate::workers::Workers;

/// Jobs that are about to be passed to workers.
#[derive(Debug, Default)]
pub(super) struct Dispatches {
    /// What goes into one datagram, per worker.
    batches: Vec<JobBatch>,
    /// Empty batches, kept for their memory.
    spare: Vec<JobBatch>,
    datagram: Batch<ToJobs>,
    /// Waiting connections that only one generation can serve.
    bound: Vec<Bound>,
}

/// Jobs for one worker.
#[derive(Debug, Default)]
struct JobBatch {
    worker: WorkerId,
    jobs: Vec<Job>,
}

/// A waiting connection, and the only generation that can serve it.
#[derive(Debug, Clone, Copy)]
struct Bound {
    job: JobId,
    client: Client,
    generation: GenerationId,
}

/// Whether a datagram was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Yes,
    No,
}

impl Dispatches {
    /// Adds a job to its worker's batch, and returns the batch when it is full.
    fn add(&mut self, worker: WorkerId, job: Job) -> Option<JobBatch> {
        let at = match self.batches.iter().position(|batch| batch.worker == worker) {
            Some(at) => at,
            None => {
                let spare = self.spare.pop().unwrap_or_default();
                self.batches.push(JobBatch { worker, ..spare });
                self.batches.len() - 1
            }
        };
        let jobs = &mut self.batches[at].jobs;
        jobs.push(job);
        (jobs.len() == MAX_FDS).then(|| self.batches.swap_remove(at))
    }

    /// Forgets a connection that only one generation could serve.
    pub(super) fn unbind(&mut self, job: JobId) {
        self.bound.retain(|bound| bound.job != job);
    }
}

#[cfg(test)]
impl Dispatches {
    /// Returns the connections that only one generation can serve.
    pub(super) fn bound_jobs(&self) -> impl Iterator<Item = JobId> {
        assert!(self.batches.is_empty(), "nothing is half sent between two turns");
        self.bound.iter().map(|bound| bound.job)
    }
}

impl Workers {
    /// Lets a connection wait for a worker of the only generation that can serve it.
    pub(crate) fn bound(&mut self, job: JobId, client: Client, generation: GenerationId) {
        self.pool.forget(client, job);
        self.dispatches.bound.push(Bound { job, client, generation });
    }

    /// Passes on as many waiting connections as there are credits.
    pub(crate) fn dispatch(&mut self, connected: &impl Connected, events: &mut Events) {
        self.dispatch_bound(connected, events);
        while let Some((job, worker)) = self.pool.next_dispatch() {
            let generation = self.pool.generation_of(worker);
            let Some(told) = generation.and_then(|generation| connected.job(job, generation))
            else {
                self.pool.abort(job);
                events.push_back(Event::Unservable(job));
                continue;
            };
            if let Some(full) = self.dispatches.add(worker, told)
                && self.send(full, connected, events) == Sent::No
            {
                break;
            }
        }
        while let Some(batch) = self.dispatches.batches.pop() {
            self.send(batch, connected, events);
        }
    }

    /// Passes on the connections that only one generation can serve, whatever the credits. After a
    /// failure the others of the same generation wait too.
    fn dispatch_bound(&mut self, connected: &impl Connected, events: &mut Events) {
        let mut full = None;
        for bound in std::mem::take(&mut self.dispatches.bound) {
            let Bound { job, client, generation } = bound;
            if full == Some(generation) {
                self.dispatches.bound.push(bound);
                continue;
            }
            let worker = self.pool.overflow(generation, client, job);
            let Some((worker, told)) = worker.zip(connected.job(job, generation)) else {
                self.pool.abort(job);
                events.push_back(Event::Unservable(job));
                continue;
            };
            if self.hand_over(worker, &[told], connected, events).is_err() {
                // There is no room just now, or the worker has just died: another may live.
                self.pool.abort(job);
                self.dispatches.bound.push(bound);
                full = Some(generation);
            }
        }
    }

    /// Passes a batch on; jobs that can't be passed wait again.
    fn send(
        &mut self,
        mut batch: JobBatch,
        connected: &impl Connected,
        events: &mut Events,
    ) -> Sent {
        let result = self.hand_over(batch.worker, &batch.jobs, connected, events);
        if result.is_err() {
            for job in batch.jobs.iter().rev() {
                self.pool.bounced(job.job);
            }
        }
        batch.jobs.clear();
        self.dispatches.spare.push(batch);
        match result {
            Ok(()) => Sent::Yes,
            Err(SendError::Full | SendError::Closed) => Sent::No,
            Err(error) => {
                events.push_back(Event::DispatchFailed(error));
                Sent::No
            }
        }
    }

    /// Passes the sockets; on failure nothing has changed.
    fn hand_over(
        &mut self,
        worker: WorkerId,
        jobs: &[Job],
        connected: &impl Connected,
        events: &mut Events,
    ) -> Result<(), SendError> {
        let process = self.processes.get(&worker).ok_or(SendError::Closed)?;
        let datagram = &mut self.dispatches.datagram;
        datagram.clear();
        let mut fds = [process.jobs.as_fd(); MAX_FDS];
        let fds = fds.get_mut(..jobs.len()).ok_or(SendError::TooLarge)?;
        for (told, fd) in jobs.iter().zip(fds.iter_mut()) {
            *fd = connected.socket(told.job).ok_or(SendError::Closed)?;
            datagram.push(told)?;
        }
        process.jobs.try_send_batch(datagram, fds)?;
        events.extend(jobs.iter().map(|told| Event::Dispatched { job: told.job, worker }));
        Ok(())
    }
}
