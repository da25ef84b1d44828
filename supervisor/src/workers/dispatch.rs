//! From a listener's backlog to a worker's job socket.
//!
//! # Failure
//! Out of descriptors, memory or credits, the listeners are unwatched (a
//! level-triggered watched one would spin) until a job is done or 100 ms are
//! over. A worker's job socket that takes no more counts as no credit, for those
//! too that only a generation on its way out can serve. When too
//! many silent connections are held, the client that has the most of them loses
//! its oldest ones.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use qrelay_shared::ipc::channel::{Batch, MAX_FDS, SendError};
use qrelay_shared::ipc::message::{Job, Peer, ToJobs};
use qrelay_shared::qmqp::Reply;
use qrelay_shared::settings::Settings;
use qrelay_shared::texts;
use slog::{info, warn};

use crate::accept::connections::{ACCEPT_BATCH, Accepted, MAX_HELD, State};
use crate::accept::fairness::Client;
use crate::daemon::{Daemon, Phase};
use crate::event::Source;
use crate::ids::{JobId, ListenerId, WorkerId};

/// How long listeners stay unwatched, unless a job is done before.
const DISARM: Duration = Duration::from_millis(100);

/// What is about to be passed to workers.
#[derive(Debug, Default)]
pub(crate) struct Dispatches {
    /// Per worker, what goes into one datagram.
    parcels: Vec<Parcel>,
    batch: Batch<ToJobs>,
    /// Connections of listeners that are gone, whose generation's workers had no room for them.
    late: Vec<JobId>,
}

/// Jobs for one worker, each with its listener's number in the worker's generation.
#[derive(Debug)]
struct Parcel {
    worker: WorkerId,
    jobs: Vec<(JobId, u32)>,
}

impl Dispatches {
    /// Adds a job to its worker's parcel, and gives the parcel out when it is full.
    fn add(&mut self, job: JobId, worker: WorkerId, listener: u32) -> Option<Parcel> {
        let at = match self.parcels.iter().position(|parcel| parcel.worker == worker) {
            Some(at) => at,
            None => {
                self.parcels.push(Parcel { worker, jobs: Vec::with_capacity(MAX_FDS) });
                self.parcels.len() - 1
            }
        };
        let jobs = &mut self.parcels[at].jobs;
        jobs.push((job, listener));
        (jobs.len() == MAX_FDS).then(|| self.parcels.swap_remove(at))
    }
}

impl Daemon {
    /// Connections may be waiting in a listener's backlog.
    pub(crate) fn on_listener(&mut self, id: ListenerId) {
        if !self.listeners.get(id).is_some_and(|listener| listener.watched) {
            // What came before it, in the same turn, has ended it.
            return;
        }
        if !self.make_room() {
            return self.disarm("too many connections wait");
        }
        let mut new = std::mem::take(&mut self.accepted);
        if let Some(listener) = self.listeners.get(id)
            && let Accepted::Exhausted(error) = self.connections.accept(id, listener, &mut new)
        {
            self.disarm(&format!("accept: {error}"));
        }
        self.admit_all(&new);
        new.clear();
        self.accepted = new;
    }

    /// Whether a batch of connections can be held, if need be instead of silent ones of the client
    /// that has the most: one client must not shut out the others.
    fn make_room(&mut self) -> bool {
        let reply = Reply::temporary(texts::TRY_AGAIN);
        while self.connections.held() + ACCEPT_BATCH > MAX_HELD {
            let Some(client) = self.connections.evict(&reply, &self.watcher) else { return false };
            if let Some(suppressed) = self.exhausted.pass(Instant::now()) {
                warn!(self.log, "too many silent connections: closing some";
                    "client" => ?client, "held" => self.connections.held(),
                    "suppressed" => suppressed);
            }
        }
        true
    }

    /// Accepts all that is in a backlog, before the listener is closed. False: there may be more,
    /// to be accepted later.
    pub(crate) fn accept_all(&mut self, id: ListenerId) -> bool {
        let mut new = Vec::new();
        let mut exhausted = None;
        while let Some(listener) = self.listeners.get(id) {
            match self.connections.accept(id, listener, &mut new) {
                Accepted::More => {}
                Accepted::Empty => break,
                Accepted::Exhausted(error) => {
                    exhausted = Some(error);
                    break;
                }
            }
        }
        self.admit_all(&new);
        if let Some(error) = &exhausted {
            self.disarm(&format!("accept: {error}"));
        }
        exhausted.is_none()
    }

    /// Decides about new connections. They are looked at only now: by the end of the batch most
    /// have sent their request.
    fn admit_all(&mut self, new: &[JobId]) {
        let spoken = self.connections.peek_all(new);
        for (&job, spoken) in new.iter().zip(spoken) {
            self.admit(job, spoken);
        }
    }

    /// Refuses a new connection, or serves it if it has `spoken`, or waits for its first byte.
    fn admit(&mut self, job: JobId, spoken: Option<bool>) {
        let Some(connection) = self.connections.get(job) else { return };
        let (peer, listener) = (connection.peer, connection.listener);
        let Some(settings) = self.current_settings() else {
            return self.refuse(job, Reply::temporary(texts::TRY_AGAIN));
        };
        let (limit, client_timeout) = (settings.max_connections_per_uid, settings.client_timeout);
        if let Peer::Remote(address) = peer
            && !self.listeners.get(listener).is_some_and(|listener| listener.allows(address))
        {
            info!(self.log, "connection refused: address not allowed"; "peer" => %address);
            return self.refuse(job, Reply::temporary(texts::ACCESS_DENIED));
        }
        if let Peer::Local { uid, .. } = peer
            && limit > 0
            && self.connections.of_client(peer) > limit
        {
            info!(self.log, "connection refused: max_connections_per_uid"; "uid" => uid, "limit" => limit);
            return self.refuse(job, Reply::temporary(texts::TRY_AGAIN));
        }
        match spoken {
            None => self.connections.close(job, &self.watcher),
            Some(true) => self.make_ready(job),
            Some(false) => {
                let until = Instant::now() + client_timeout;
                if let Err(error) = self.connections.pend(job, until, &self.watcher) {
                    self.disarm(&format!("epoll_ctl: {error}"));
                    self.refuse(job, Reply::temporary(texts::TRY_AGAIN));
                }
            }
        }
    }

    fn refuse(&mut self, job: JobId, reply: Reply) {
        self.connections.answer(job, &reply, &self.watcher);
    }

    pub(crate) fn current_settings(&self) -> Option<&Settings> {
        let current = self.generations.current()?;
        self.loaded.get(&current).map(|generation| &generation.declaration.settings)
    }

    /// The connection has data: it waits for a credit.
    fn make_ready(&mut self, job: JobId) {
        let Some(connection) = self.connections.get(job) else { return };
        let client = Client::from(connection.peer);
        let last_chance = connection.last_chance.is_some();
        self.connections.wait(job, &self.watcher);
        match last_chance {
            true => self.serve_last(job),
            false => self.pool.wait(client, job),
        }
    }

    /// A waiting connection of a listener that is gone: only an old generation can serve it.
    pub(crate) fn serve_last(&mut self, job: JobId) {
        let waiting = self.connections.get(job).filter(|c| c.state == State::Waiting);
        // Else its time was over, and it has been answered.
        let Some(connection) = waiting else { return };
        let client = Client::from(connection.peer);
        let served = connection.last_chance.and_then(|(generation, number)| {
            let worker = self.pool.overflow(generation, client, job)?;
            Some(self.hand_over(worker, &[(job, number)]))
        });
        match served {
            Some(Ok(())) => {}
            // There is no room just now, or the worker has just died: another may live.
            Some(Err(_)) => {
                self.pool.abort(job);
                self.dispatches.late.push(job);
            }
            None => self.refuse(job, Reply::temporary(texts::TRY_AGAIN)),
        }
    }

    /// Those that wait since this turn of the loop do so for this long. Their time hasn't run since
    /// their accept: a client may have taken its time before it spoke.
    pub(crate) fn limit_waiting(&mut self) {
        let patience = self.current_settings().map_or(Duration::ZERO, |s| s.relay_timeout);
        self.connections.limit_waiting(Instant::now() + patience);
    }

    /// Dispatches as many waiting connections as there are credits.
    pub(crate) fn dispatch_waiting(&mut self) {
        while let Some((job, worker)) = self.pool.next_dispatch() {
            let number = self.connections.get(job).and_then(|connection| {
                let generation = self.pool.generation_of(worker)?;
                self.listeners.get(connection.listener)?.number(generation)
            });
            let Some(number) = number else {
                self.pool.abort(job);
                self.refuse(job, Reply::temporary(texts::TRY_AGAIN));
                continue;
            };
            if let Some(full) = self.dispatches.add(job, worker, number)
                && !self.send(&full)
            {
                break;
            }
        }
        while let Some(parcel) = self.dispatches.parcels.pop() {
            self.send(&parcel);
        }
    }

    /// Tries again those for whom there was no room.
    pub(crate) fn dispatch_late(&mut self) {
        let mut full = None;
        for job in std::mem::take(&mut self.dispatches.late) {
            let Some(connection) = self.connections.get(job) else { continue };
            let generation = connection.last_chance.map(|(generation, _)| generation);
            let before = self.dispatches.late.len();
            if full.is_some() && full == generation {
                self.dispatches.late.push(job);
                continue;
            }
            self.serve_last(job);
            if self.dispatches.late.len() > before {
                full = generation;
            }
        }
    }

    /// Passes jobs on; those that can't be passed wait again.
    fn send(&mut self, parcel: &Parcel) -> bool {
        let Err(error) = self.hand_over(parcel.worker, &parcel.jobs) else { return true };
        for &(job, _) in parcel.jobs.iter().rev() {
            self.pool.bounced(job);
        }
        if !matches!(error, SendError::Full | SendError::Closed) {
            self.disarm(&format!("dispatch: {error}"));
        }
        false
    }

    /// Passes the sockets; on failure nothing has changed.
    fn hand_over(&mut self, worker: WorkerId, jobs: &[(JobId, u32)]) -> Result<(), SendError> {
        let link = self.workers.get(&worker).ok_or(SendError::Closed)?;
        let batch = &mut self.dispatches.batch;
        batch.clear();
        let mut fds = [link.jobs.as_fd(); MAX_FDS];
        let fds = fds.get_mut(..jobs.len()).ok_or(SendError::TooLarge)?;
        for (&(job, listener), fd) in jobs.iter().zip(fds.iter_mut()) {
            let connection = self.connections.get(job).ok_or(SendError::Closed)?;
            *fd = connection.fd.as_fd();
            batch.push(&Job {
                job,
                listener,
                listening: connection.listener,
                peer: connection.peer,
                accepted: connection.accepted_boottime,
                spoke: connection.spoke_boottime,
            })?;
        }
        link.jobs.try_send_batch(batch, fds)?;
        for &(job, _) in jobs {
            self.connections.dispatched(job, worker, &self.watcher);
        }
        Ok(())
    }

    /// A pending client has sent something, or a lingering one goes on.
    pub(crate) fn on_connection(&mut self, job: JobId) {
        match self.connections.get(job).map(|connection| connection.state) {
            Some(State::Lingering) => self.connections.drop_input(job, &self.watcher),
            Some(State::Pending) => match self.connections.peek(job) {
                None => self.connections.close(job, &self.watcher),
                Some(true) => self.make_ready(job),
                Some(false) => self.connections.drop_urgent(job),
            },
            _ => {}
        }
    }

    /// Ends the connections whose time is over, and watches the listeners again.
    pub(crate) fn connections_due(&mut self, now: Instant) {
        while let Some(job) = self.connections.overdue(now) {
            let Some(connection) = self.connections.get(job) else { return };
            let client = Client::from(connection.peer);
            match connection.state {
                State::Pending => self.refuse(job, Reply::temporary(texts::REQUEST_TIMED_OUT)),
                State::Waiting => {
                    warn!(self.log, "no worker was free in time"; "client" => ?client);
                    self.pool.forget(client, job);
                    self.refuse(job, Reply::temporary(texts::TRY_AGAIN));
                }
                State::Lingering | State::Dispatched(_) => {
                    self.connections.close(job, &self.watcher);
                }
            }
        }
        if self.disarmed.is_some_and(|until| until <= now) {
            self.rearm();
        }
    }

    /// Stops accepting for a while.
    fn disarm(&mut self, cause: &str) {
        let now = Instant::now();
        if let Some(suppressed) = self.exhausted.pass(now) {
            warn!(self.log, "not accepting for a moment: {cause}";
                "held" => self.connections.held(), "in_flight" => self.pool.in_flight(),
                "suppressed" => suppressed);
        }
        self.disarmed = Some(now + DISARM);
        for (_, listener) in self.listeners.iter_mut() {
            if std::mem::take(&mut listener.watched) {
                self.watcher.remove(&listener.socket);
            }
        }
    }

    /// Accepts again, if it had been stopped.
    pub(crate) fn rearm(&mut self) {
        if self.disarmed.take().is_some() {
            self.watch_listeners();
        }
    }

    /// Watches the current generation's listeners.
    pub(crate) fn watch_listeners(&mut self) {
        if matches!(self.phase, Phase::Stopping { .. } | Phase::Ended(_)) {
            return;
        }
        let Some(current) = self.generations.current() else { return };
        let mut failed = None;
        for (id, listener) in self.listeners.iter_mut() {
            if !listener.watched && listener.number(current).is_some() {
                match self.watcher.add(&listener.socket, Source::Listener(id)) {
                    Ok(()) => listener.watched = true,
                    Err(error) => failed = Some(error),
                }
            }
        }
        if let Some(error) = failed {
            self.disarm(&format!("epoll_ctl: {error}"));
        }
    }
}
