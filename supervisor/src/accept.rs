//! Accepting: the listening sockets, and the clients' connections from accept to close.
//!
//! [`Acceptor`] owns both. It decides who is let in, holds each connection until a worker has it,
//! and answers for the supervisor when no worker will.
//!
//! # Failure
//! Out of descriptors or memory, or when the kernel refuses to pass connections on, the listeners
//! are not watched until a job is done or 100 ms are over, because a level-triggered watched
//! listener would keep the loop busy. When too many connections are held, or this process has no
//! descriptor left, `eviction` chooses those that give way to new ones.

mod backlog;
mod bind;
mod bind_error;
mod connections;
mod diagnosis;
mod eviction;
mod listeners;
mod refusal;
mod shown;
mod socket_file;
mod throttle;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use qrelay_shared::client::Client;
use qrelay_shared::flight::{Flight, Phase};
use qrelay_shared::ipc::message::{Job, Peer};
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl};
use slog::{Logger, error, info, warn};

use crate::accept::backlog::{Ending, Serves};
pub(crate) use crate::accept::bind::bind_private;
use crate::accept::connections::{Accepted, Connection, Connections, Seen, State};
use crate::accept::eviction::{Held, Worth};
use crate::accept::listeners::{Listeners, NotListening};
use crate::accept::refusal::Refusal;
pub(crate) use crate::accept::shown::Shown;
pub(crate) use crate::accept::socket_file::SocketFile;
use crate::accept::throttle::Throttle;
use crate::connected::Connected;
use crate::descriptors::allot;
use crate::event::{Event, Events, LostAnswer, LostMail, Origin, Unserved};
use crate::ids::{GenerationId, JobId, ListenerId, WorkerId};
use crate::watch::Watcher;

/// Most connections taken from one listener before the others get their turn.
const ACCEPT_BATCH: usize = 64;
/// How long listeners stay unwatched, unless a job is done before.
const DISARM: Duration = Duration::from_millis(100);

/// Why a generation without any listener can't serve.
const NO_SOCKET: &str = "qmqp_listen(systemd) is the only listener, and systemd has passed no \
    socket: start cm4all-qrelay.socket before the service, or name a path in the script";

/// The settings of the current generation that concern clients before a worker has them.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections of one uid; 0 is any number.
    per_uid: u32,
    /// How long a client may be silent.
    first_byte: Duration,
    /// How long a client waits for a worker.
    waiting: Duration,
    /// Most connections that no worker has.
    held: usize,
}

impl Limits {
    fn new(declaration: &Declaration, descriptors: u64) -> Self {
        let settings = &declaration.settings;
        Self {
            per_uid: settings.max_connections_per_uid,
            first_byte: settings.client_timeout,
            waiting: settings.relay_timeout,
            held: allot(descriptors, declaration).held,
        }
    }

    /// Returns how many connections are accepted at once. With few descriptors that is a part of
    /// what may be held, because all of the batch are held for a moment.
    fn batch(&self) -> usize {
        (self.held / 2).clamp(1, ACCEPT_BATCH)
    }
}

/// Whether connections are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    /// The current generation's listeners are watched.
    Open,
    /// Until then no listener is watched.
    Paused(Instant),
    /// The daemon stops.
    Over,
}

/// The owner of listeners and connections.
#[derive(Debug)]
pub(crate) struct Acceptor {
    log: Logger,
    watcher: Watcher,
    /// The limit of this process's descriptors.
    descriptors: u64,
    listeners: Listeners,
    connections: Connections,
    intake: Intake,
    /// The generation that gets new connections, and its limits.
    current: Option<(GenerationId, Limits)>,
    /// Generations that finish: each is reported when no connection waits for its workers.
    leaving: BTreeSet<GenerationId>,
    endings: Vec<Ending>,
    /// When the backlogs of `endings` are tried again at the latest.
    next_try: Option<Instant>,
    warnings: Throttle,
    /// Limits the lines about clients that pass descriptors.
    refusals: Throttle,
    /// Scratch list of new connections, kept for its memory.
    accepted: Vec<JobId>,
}

impl Acceptor {
    /// Takes over the sockets that systemd passed. This process may have `descriptors` descriptors
    /// in all (RLIMIT_NOFILE).
    ///
    /// # Errors
    /// A passed socket doesn't listen.
    pub(crate) fn new(
        log: Logger,
        watcher: Watcher,
        passed: Vec<(OwnedFd, String)>,
        descriptors: u64,
    ) -> Result<Self, NotListening> {
        let mut listeners = Listeners::default();
        listeners.adopt(passed)?;
        Ok(Self {
            log,
            connections: Connections::new(watcher.clone()),
            watcher,
            descriptors,
            listeners,
            intake: Intake::Open,
            current: None,
            leaving: BTreeSet::new(),
            endings: Vec::new(),
            next_try: None,
            warnings: Throttle::new(Duration::from_secs(1)),
            refusals: Throttle::new(Duration::from_secs(1)),
            accepted: Vec::new(),
        })
    }

    /// Returns the FileDescriptorNames of the sockets that systemd passed.
    pub(crate) fn passed_names(&self) -> Vec<String> {
        self.listeners.adopted_names()
    }

    /// Returns where a connection came from.
    pub(crate) fn origin(&self, job: JobId) -> Option<Origin> {
        self.connections.get(job).map(Connection::origin)
    }

    /// Counts the connections that no worker has.
    pub(crate) fn held(&self) -> usize {
        self.connections.held()
    }

    /// Returns whether every connection is closed or with a worker, and every backlog is empty.
    pub(crate) fn is_idle(&self) -> bool {
        self.connections.held() == 0 && self.endings.is_empty()
    }

    /// Binds the listeners of a generation that has declared itself.
    pub(crate) fn listen(
        &mut self,
        generation: GenerationId,
        declaration: &Declaration,
        events: &mut Events,
    ) {
        let of_systemd =
            |listener: &&ListenerDecl| matches!(listener.address, ListenAddress::Systemd(_));
        let wanted = declaration.listeners.iter().filter(of_systemd).count();
        if wanted > 0 && self.passed_names().is_empty() {
            if wanted == declaration.listeners.len() {
                return events.push_back(Event::ListenFailed(generation, NO_SOCKET.to_owned()));
            }
            warn!(self.log, "qmqp_listen(systemd): systemd has passed no socket");
        }
        events.push_back(match self.listeners.prepare(generation, declaration) {
            Ok(gone) => {
                for address in gone {
                    warn!(self.log, "the socket file was gone: bound again"; "path" => %address);
                }
                Event::Listening(generation)
            }
            Err(error) => Event::ListenFailed(generation, error.to_string()),
        });
    }

    /// Closes and unlinks what only a generation that never served has bound.
    pub(crate) fn abandon(&mut self, generation: GenerationId) {
        self.listeners.abandon(generation);
    }

    /// Forgets a generation that has ended.
    pub(crate) fn generation_ended(&mut self, generation: GenerationId) {
        self.listeners.forget(generation);
    }

    /// Accepts for the generation `new` from now on. What is in the backlog of a listener that only
    /// `old` has is still accepted, and bound to `old`.
    pub(crate) fn switch(
        &mut self,
        (new, declaration): (GenerationId, &Declaration),
        old: Option<GenerationId>,
        now: Instant,
        events: &mut Events,
    ) {
        for error in self.listeners.activate(new, declaration) {
            error!(self.log, "listener: {error}");
        }
        self.current = Some((new, Limits::new(declaration, self.descriptors)));
        if let Some(old) = old {
            for id in self.listeners.without(new) {
                match self.listeners.get(id).and_then(|listener| listener.number(old)) {
                    Some(number) => self.end_listener(id, Serves::Old(old, number), now, events),
                    None => self.listeners.close(id),
                }
            }
            self.leaving.insert(old);
        }
        match self.intake {
            Intake::Over => self.end_current(now, events),
            Intake::Open | Intake::Paused(_) => self.watch_listeners(now),
        }
    }

    /// Lets nobody in any more: unlinks the sockets and accepts what is in their backlogs.
    pub(crate) fn stop(&mut self, now: Instant, events: &mut Events) {
        self.intake = Intake::Over;
        self.end_current(now, events);
    }

    fn end_current(&mut self, now: Instant, events: &mut Events) {
        let Some((current, _)) = self.current else { return };
        for id in self.listeners.with(current) {
            self.end_listener(id, Serves::Current, now, events);
        }
        self.leaving.insert(current);
    }

    /// Unlinks the sockets when the daemon ends without having stopped.
    pub(crate) fn close(&mut self) {
        if self.intake == Intake::Over {
            return;
        }
        self.intake = Intake::Over;
        if let Some((current, _)) = self.current {
            for id in self.listeners.with(current) {
                self.listeners.refuse_new(id, &self.watcher);
            }
        }
    }

    /// Answers every client that no worker has: the time for the drain is over.
    pub(crate) fn give_up(&mut self, now: Instant, events: &mut Events) {
        let unserved: Vec<_> = self.connections.unserved().map(|(job, _)| job).collect();
        for job in unserved {
            self.give_up_one(job, &Refusal::STOPPING, now, events);
        }
        self.endings.clear();
    }

    fn give_up_one(&mut self, job: JobId, why: &Refusal, now: Instant, events: &mut Events) {
        let Some(connection) = self.connections.get(job) else { return };
        if connection.state == State::Waiting {
            events.push_back(Event::GivenUp { job, client: connection.peer.into() });
            self.refuse(job, why, now, events);
        } else {
            self.answer(job, why, now);
        }
    }

    /// Accepts a batch from a listener whose backlog has connections.
    pub(crate) fn on_listener(&mut self, id: ListenerId, now: Instant, events: &mut Events) {
        if !self.listeners.get(id).is_some_and(|listener| listener.is_watched()) {
            // Something earlier in the same turn has ended the listener.
            return;
        }
        if let Accepted::Exhausted(error) = self.accept_batch(id, now, events) {
            self.pause(&format!("accept: {error}"), now);
        }
    }

    /// Accepts a batch of connections. If too many are held then, some give way.
    fn accept_batch(&mut self, id: ListenerId, now: Instant, events: &mut Events) -> Accepted {
        let Some((_, limits)) = self.current else { return Accepted::Empty };
        let batch = limits.batch();
        let mut new = std::mem::take(&mut self.accepted);
        let mut accepted = Accepted::Empty;
        if let Some(listener) = self.listeners.get(id) {
            accepted = self.connections.accept((id, listener), batch, now, &mut new);
        }
        self.admit_all(&new, now, events);
        let surplus = self.connections.held().saturating_sub(limits.held);
        self.evict(surplus, "too many connections wait", now, events);
        match &accepted {
            Accepted::More => {}
            Accepted::Empty => self.listeners.emptied(id),
            // Only this process's own descriptors come back when its connections give way; the
            // system's, and memory, are somebody else's to free.
            Accepted::Exhausted(error)
                if new.is_empty() && error.raw_os_error() == Some(Errno::EMFILE as i32) =>
            {
                let cause = format!("accept: {error}");
                if self.evict(batch, &cause, now, events) > 0 {
                    accepted = Accepted::More;
                }
            }
            Accepted::Exhausted(_) if !new.is_empty() => accepted = Accepted::More,
            Accepted::Exhausted(_) => {}
        }
        new.clear();
        self.accepted = new;
        accepted
    }

    /// Has connections give way, those of the client first that holds most: one client must not
    /// shut out the others. Returns how many.
    fn evict(&mut self, count: usize, cause: &str, now: Instant, events: &mut Events) -> usize {
        if count == 0 {
            return 0;
        }
        let held = self.connections.held();
        let chosen = eviction::choose(self.connections.held_ones(), count);
        let Some(first) = chosen.first() else { return 0 };
        if let Some(suppressed) = self.warnings.pass(now) {
            warn!(self.log, "closing connections of the client that holds most: {cause}";
                "client" => %first.client, "held" => held, "closed" => chosen.len(),
                "suppressed" => suppressed);
        }
        for &Held { job, client, worth } in &chosen {
            match worth {
                Worth::Waits => {
                    events.push_back(Event::GivenUp { job, client });
                    self.refuse(job, &Refusal::GIVES_WAY, now, events);
                }
                Worth::Silent => drop(self.answer(job, &Refusal::GIVES_WAY, now)),
                Worth::Answered => {}
            }
            self.connections.dismiss(job);
        }
        chosen.len()
    }

    /// Decides about new connections. Whether they have spoken is looked at only now, because by
    /// the end of the batch most have sent their request.
    fn admit_all(&mut self, new: &[JobId], now: Instant, events: &mut Events) {
        let seen = self.connections.look_at_all(new);
        for (&job, seen) in new.iter().zip(seen) {
            self.admit(job, seen, now, events);
        }
    }

    /// Refuses a new connection, or lets it wait for a worker or for its first byte.
    fn admit(&mut self, job: JobId, seen: Seen, now: Instant, events: &mut Events) {
        let Some(connection) = self.connections.get(job) else { return };
        let (peer, listener) = (connection.peer, connection.listener);
        let Some((_, limits)) = self.current else {
            return self.turn_away(job, seen, &Refusal::STOPPING, now, events);
        };
        if let Peer::Remote(address) = peer
            && !self.listeners.get(listener).is_some_and(|listener| listener.allows(address))
        {
            info!(self.log, # "peer", "connection refused: address not allowed";
                "peer" => %address);
            return self.turn_away(job, seen, &Refusal::NOT_ALLOWED, now, events);
        }
        if let Peer::Local { uid, .. } = peer
            && limits.per_uid > 0
            && self.connections.of_client(peer.into()) > limits.per_uid
        {
            info!(self.log, # "uid", "connection refused: max_connections_per_uid";
                "uid" => uid, "limit" => limits.per_uid);
            return self.turn_away(job, seen, &Refusal::TOO_MANY, now, events);
        }
        match seen {
            Seen::Gone => self.connections.close(job),
            Seen::Rights => self.refuse_descriptors(job, now, events),
            Seen::Spoken => self.make_ready(job, events),
            Seen::Silent => {
                if let Err(error) = self.connections.pend(job, now + limits.first_byte) {
                    self.unwatched(error, now);
                    self.make_ready(job, events);
                }
            }
        }
    }

    /// Notes that a client is passed to a worker before its first byte, because it can't be
    /// watched. The kernel counts what the processes of a user watch, so any program of qrelay's
    /// can use that up. Without a pause, listeners need not be added to what is watched again.
    fn unwatched(&mut self, error: Errno, now: Instant) {
        if let Some(suppressed) = self.warnings.pass(now) {
            warn!(self.log, "a silent client goes to a worker: epoll_ctl: {error}";
                "suppressed" => suppressed);
        }
    }

    /// Lets a client that has spoken wait for a worker.
    fn make_ready(&mut self, job: JobId, events: &mut Events) {
        self.connections.wait(job);
        let Some(connection) = self.connections.get(job) else { return };
        let client = connection.peer.into();
        events.push_back(match connection.bound {
            Some((generation, _)) => Event::Bound { job, client, generation },
            None => Event::Ready { job, client },
        });
    }

    /// Refuses a new client.
    fn turn_away(
        &mut self,
        job: JobId,
        seen: Seen,
        why: &Refusal,
        now: Instant,
        events: &mut Events,
    ) {
        match seen {
            Seen::Spoken | Seen::Rights => self.refuse(job, why, now, events),
            Seen::Silent | Seen::Gone => drop(self.answer(job, why, now)),
        }
    }

    /// Answers a client that has said something, and has that logged.
    fn refuse(&mut self, job: JobId, why: &Refusal, now: Instant, events: &mut Events) {
        let Some(connection) = self.connections.get(job) else { return };
        let (origin, accepted) = (connection.origin(), connection.accepted);
        let told = self.answer(job, why, now) == LostAnswer::TryAgain;
        let reply = told.then_some((why.status, why.text));
        let unserved = Unserved { job, origin, accepted, reply, cause: why.cause };
        events.push_back(Event::Unserved(Box::new(unserved)));
    }

    /// Answers a client for the supervisor.
    fn answer(&mut self, job: JobId, why: &Refusal, now: Instant) -> LostAnswer {
        self.connections.answer(job, &why.reply(), now)
    }

    /// Refuses a client that has passed descriptors. Its input can't be read, so the connection is
    /// closed at once.
    fn refuse_descriptors(&mut self, job: JobId, now: Instant, events: &mut Events) {
        if let Some(connection) = self.connections.get(job)
            && let Some(suppressed) = self.refusals.pass(now)
        {
            warn!(self.log, "connection refused: the client has passed descriptors";
                "client" => %Client::from(connection.peer), "suppressed" => suppressed);
        }
        self.refuse(job, &Refusal::DESCRIPTORS, now, events);
        self.connections.close(job);
    }

    /// Acts on a pending client that has sent something, or reads on what an answered one sends.
    pub(crate) fn on_connection(&mut self, job: JobId, now: Instant, events: &mut Events) {
        match self.connections.get(job).map(|connection| connection.state) {
            Some(State::Lingering) => self.connections.drop_input(job),
            Some(State::Pending) => match self.connections.look(job) {
                Seen::Gone => self.connections.close(job),
                Seen::Rights => self.refuse_descriptors(job, now, events),
                Seen::Spoken => self.make_ready(job, events),
                Seen::Silent => self.connections.drop_urgent(job),
            },
            _ => {}
        }
    }

    /// Notes that a worker has a connection.
    pub(crate) fn dispatched(&mut self, job: JobId, worker: WorkerId) {
        self.connections.set_dispatched(job, worker);
    }

    /// Answers a client that no worker can serve.
    pub(crate) fn unservable(&mut self, job: JobId, now: Instant, events: &mut Events) {
        self.refuse(job, &Refusal::UNSERVABLE, now, events);
    }

    /// Accepts nothing for a moment, because the kernel refused to pass connections on.
    pub(crate) fn dispatch_failed(&mut self, cause: &str, now: Instant) {
        self.pause(&format!("dispatch: {cause}"), now);
    }

    /// Closes the duplicate of a connection that a worker has answered.
    pub(crate) fn done(&mut self, job: JobId, now: Instant) {
        self.connections.close(job);
        self.resume(now);
    }

    /// Answers a client whose socket did not reach the worker.
    pub(crate) fn socket_lost(&mut self, job: JobId, now: Instant, events: &mut Events) {
        self.refuse(job, &Refusal::SOCKET_LOST, now, events);
        self.resume(now);
    }

    /// Answers a client whose last program has ended after its worker. The log has the mail's line
    /// since the worker's death.
    pub(crate) fn program_ended(&mut self, job: JobId, now: Instant) {
        self.answer(job, &Refusal::WORKER_DIED, now);
        self.resume(now);
    }

    /// Answers a client whose worker died, unless the worker has answered or a program of the job
    /// still runs.
    pub(crate) fn orphaned(
        &mut self,
        (job, worker): (JobId, WorkerId),
        program: ProgramState,
        flight: Option<Box<Flight>>,
        now: Instant,
        events: &mut Events,
    ) {
        let Some(connection) = self.connections.get(job) else { return };
        let (origin, accepted) = (connection.origin(), connection.accepted);
        let answer = match (flight.as_ref().map(|flight| flight.phase), program) {
            (Some(Phase::Answered(status)), _) => {
                self.connections.linger(job, now);
                LostAnswer::Given(status)
            }
            // The client may have the answer, or a part of it. An end without an answer means to
            // every client that it is to try again.
            (Some(Phase::Answering(_)), _) => {
                self.connections.linger(job, now);
                LostAnswer::Unknown
            }
            (_, ProgramState::Runs) => LostAnswer::TryAgain,
            (_, ProgramState::Ended) => self.answer(job, &Refusal::WORKER_DIED, now),
        };
        let mail = LostMail { worker, job, origin, accepted, answer, flight };
        events.push_back(Event::MailLost(Box::new(mail)));
    }

    /// Does what is due: ends connections whose time is over, accepts what is left in backlogs, and
    /// watches the listeners again.
    pub(crate) fn tick(&mut self, now: Instant, events: &mut Events) {
        while let Some(job) = self.connections.overdue(now) {
            let Some(connection) = self.connections.get(job) else { break };
            match connection.state {
                State::Pending => drop(self.answer(job, &Refusal::SILENT, now)),
                State::Waiting => {
                    let client = Client::from(connection.peer);
                    warn!(self.log, # "client", "no worker was free in time"; "client" => %client);
                    self.give_up_one(job, &Refusal::NO_WORKER, now, events);
                }
                State::Lingering | State::Dispatched(_) => self.connections.close(job),
            }
        }
        if matches!(self.intake, Intake::Paused(until) if until <= now) {
            self.resume(now);
        }
        self.retry_endings(now, events);
    }

    /// Ends a turn of the loop, after everything that a worker could take was dispatched: gives the
    /// clients that still wait a time limit, and reports the generations that nobody waits for.
    pub(crate) fn settle(&mut self, now: Instant, events: &mut Events) {
        let patience = self.current.map_or(Duration::ZERO, |(_, limits)| limits.waiting);
        self.connections.limit_waiting(now + patience);
        if self.leaving.is_empty() {
            return;
        }
        let mut leaving = std::mem::take(&mut self.leaving);
        leaving.retain(|&generation| {
            let needed = self.is_needed(generation);
            if !needed {
                events.push_back(Event::BacklogTaken(generation));
            }
            needed
        });
        self.leaving = leaving;
    }

    /// Returns whether a connection, here or in a backlog, waits for this generation's workers.
    fn is_needed(&self, generation: GenerationId) -> bool {
        let current = self.is_current(generation);
        self.is_in_backlog(generation)
            || self.connections.any_unserved(|connection| match connection.bound {
                Some((wanted, _)) => wanted == generation,
                None => current,
            })
    }

    fn is_current(&self, generation: GenerationId) -> bool {
        self.current.is_some_and(|(current, _)| current == generation)
    }

    /// Stops accepting for a moment.
    fn pause(&mut self, cause: &str, now: Instant) {
        if let Some(suppressed) = self.warnings.pass(now) {
            warn!(self.log, "not accepting for a moment: {cause}";
                "held" => self.connections.held(), "in_flight" => self.connections.dispatched(),
                "suppressed" => suppressed);
        }
        if self.intake != Intake::Over {
            self.intake = Intake::Paused(now + DISARM);
        }
        self.listeners.unwatch(&self.watcher);
    }

    /// Accepts again, if accepting was paused.
    fn resume(&mut self, now: Instant) {
        if matches!(self.intake, Intake::Paused(_)) {
            self.intake = Intake::Open;
            self.watch_listeners(now);
        }
    }

    fn watch_listeners(&mut self, now: Instant) {
        if self.intake != Intake::Open {
            return;
        }
        let Some((current, _)) = self.current else { return };
        if let Err(error) = self.listeners.watch(current, &self.watcher) {
            self.pause(&format!("epoll_ctl: {error}"), now);
        }
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let paused = match self.intake {
            Intake::Paused(until) => Some(until),
            Intake::Open | Intake::Over => None,
        };
        let next_try = self.next_try.filter(|_| !self.endings.is_empty());
        self.connections.next_deadline().into_iter().chain(paused).chain(next_try).min()
    }
}

/// Whether a job whose worker died still has a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProgramState {
    Runs,
    Ended,
}

impl Connected for Acceptor {
    fn job(&self, job: JobId, generation: GenerationId) -> Option<Job> {
        let connection = self.connections.get(job)?;
        let listener = match connection.bound {
            Some((_, number)) => number,
            None => self.listeners.get(connection.listener)?.number(generation)?,
        };
        Some(Job {
            job,
            listener,
            listening: connection.listener,
            peer: connection.peer,
            rights: connection.fd.rights(),
            accepted: connection.accepted_boottime,
            spoke: connection.spoke_boottime,
        })
    }

    fn socket(&self, job: JobId) -> Option<BorrowedFd<'_>> {
        self.connections.get(job).map(|connection| connection.fd.as_fd())
    }
}

#[cfg(test)]
#[path = "accept/tests.rs"]
mod tests;
