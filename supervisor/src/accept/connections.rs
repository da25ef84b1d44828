//! The clients' connections, from accept to close.
//!
//! A connection is *pending* until its first byte, then *waiting* for a credit,
//! then *dispatched*: a worker has the socket and the supervisor keeps a
//! duplicate, so that it can answer should the worker die. *Lingering* is what
//! comes after an answer of the supervisor's own: the rest of the request is
//! read and dropped, since closing with unread data would reset the connection
//! and eat the answer.
//!
//! # Failure
//! Nothing here waits for a client, and no client is left without an end: each
//! state but *dispatched* has a time limit.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, recv, send, shutdown, sockopt};
use qrelay_shared::ipc::message::Peer;
use qrelay_shared::qmqp::Reply;
use rustc_hash::FxHashMap;

use crate::accept::fairness::Client;
use crate::accept::listeners::{Listener, Socket, canonical};
use crate::event::{Source, Watcher};
use crate::ids::{GenerationId, JobId, ListenerId, WorkerId};

/// Connections that are not with a worker; beyond, the kernel's backlog has to hold them.
pub const MAX_HELD: usize = 4096;
/// How long the rest of an answered request is read.
const LINGER: Duration = Duration::from_secs(2);
/// Connections taken from one listener before the others get their turn.
pub const ACCEPT_BATCH: usize = 64;

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its first byte hasn't come.
    Pending,
    /// It waits for a credit.
    Waiting,
    /// This worker has it.
    Dispatched(WorkerId),
    /// It has been answered.
    Lingering,
}

/// When the time of connections is over.
type Timers = BTreeSet<(Instant, JobId)>;

/// One client's connection.
#[derive(Debug)]
pub struct Connection {
    /// The socket; after dispatch, a duplicate.
    pub fd: OwnedFd,
    /// The client.
    pub peer: Peer,
    /// Where it came in.
    pub listener: ListenerId,
    /// When it came in.
    pub accepted: Instant,
    /// The same in nanoseconds of CLOCK_BOOTTIME.
    pub accepted_boottime: u64,
    /// When its first byte was seen, likewise.
    pub spoke_boottime: u64,
    /// Where it is now.
    pub state: State,
    /// Its listener is gone: the generation, and the listener's number in it, that must serve it.
    pub last_chance: Option<(GenerationId, u32)>,
    until: Option<Instant>,
    watched: bool,
}

impl Connection {
    fn unwatch(&mut self, watcher: &Watcher) {
        if std::mem::take(&mut self.watched) {
            watcher.remove(self.fd.as_fd());
        }
    }

    fn set_timer(&mut self, timers: &mut Timers, id: JobId, until: Option<Instant>) {
        if let Some(old) = self.until.take() {
            timers.remove(&(old, id));
        }
        self.until = until;
        timers.extend(until.map(|until| (until, id)));
    }
}

/// What became of an attempt to accept.
#[derive(Debug)]
pub enum Accepted {
    /// The backlog may hold more.
    More,
    /// The backlog is empty.
    Empty,
    /// Out of descriptors or memory.
    Exhausted(io::Error),
}

/// All connections.
#[derive(Debug, Default)]
pub struct Connections {
    /// Its keys are our own, so that nobody can choose them to collide.
    table: FxHashMap<JobId, Connection>,
    timers: Timers,
    clients: BTreeMap<Client, u32>,
    /// Those that have begun to wait, and may be dispatched before they need a time limit.
    unlimited: Vec<JobId>,
    last: JobId,
    dispatched: usize,
}

impl Connections {
    /// Accepts a batch from a listener; the new ones are in no list yet but `new`.
    pub fn accept(
        &mut self,
        id: ListenerId,
        listener: &Listener,
        new: &mut Vec<JobId>,
    ) -> Accepted {
        let now = Instant::now();
        let boottime = boottime();
        for _ in 0..ACCEPT_BATCH {
            let (fd, peer) = match accept_one(&listener.socket) {
                Ok(accepted) => accepted,
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    // EINVAL: it has been shut down.
                    Some(Errno::EAGAIN | Errno::EINVAL) => return Accepted::Empty,
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                        return Accepted::Exhausted(error);
                    }
                    // That client is gone, or its error is pending: the next one may be fine.
                    _ => continue,
                },
            };
            let job = self.last.advance();
            *self.clients.entry(peer.into()).or_default() += 1;
            self.table.insert(
                job,
                Connection {
                    fd,
                    peer,
                    listener: id,
                    accepted: now,
                    accepted_boottime: boottime,
                    spoke_boottime: boottime,
                    state: State::Pending,
                    last_chance: None,
                    until: None,
                    watched: false,
                },
            );
            new.push(job);
        }
        Accepted::More
    }

    /// One of them.
    pub fn get(&self, id: JobId) -> Option<&Connection> {
        self.table.get(&id)
    }

    /// Those that are not with a worker.
    pub fn held(&self) -> usize {
        self.table.len() - self.dispatched
    }

    /// Those of clients whose request no worker has yet.
    pub fn unserved(&mut self) -> impl Iterator<Item = (JobId, &mut Connection)> {
        self.table
            .iter_mut()
            .filter(|(_, c)| matches!(c.state, State::Pending | State::Waiting))
            .map(|(&id, connection)| (id, connection))
    }

    /// Whether no connection is left for a worker of this generation but those it has.
    pub fn none_unserved(&self, wanted: impl Fn(&Connection) -> bool) -> bool {
        self.held() == 0
            || !self
                .table
                .values()
                .any(|c| matches!(c.state, State::Pending | State::Waiting) && wanted(c))
    }

    /// Open connections of the same client as this one's.
    pub fn of_client(&self, peer: Peer) -> u32 {
        self.clients.get(&peer.into()).copied().unwrap_or(0)
    }

    /// Looks whether the client has sent something. `None`: it has closed, or is gone.
    pub fn peek(&self, id: JobId) -> Option<bool> {
        let connection = self.table.get(&id)?;
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(connection.fd.as_raw_fd(), &mut [0], flags) {
            Ok(0) => None,
            Ok(_) => Some(true),
            Err(Errno::EAGAIN | Errno::EINTR) => Some(false),
            Err(_) => None,
        }
    }

    /// As [`Self::peek`] for each of them; mostly, one call answers for all.
    pub fn peek_all(&self, ids: &[JobId]) -> Vec<Option<bool>> {
        let ended = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let interest = PollFlags::POLLIN | PollFlags::POLLPRI | ended;
        let mut fds: Vec<_> = ids
            .iter()
            .filter_map(|id| Some(PollFd::new(self.table.get(id)?.fd.as_fd(), interest)))
            .collect();
        let asked = fds.len() == ids.len() && poll(&mut fds, PollTimeout::ZERO).is_ok();
        let judge = |(at, &id): (usize, &JobId)| match fds.get(at).and_then(PollFd::revents) {
            Some(PollFlags::POLLIN) if asked => Some(true),
            Some(events) if asked && events.is_empty() => Some(false),
            // Its end or urgent data may have come after something, or instead of it.
            _ => self.peek(id),
        };
        ids.iter().enumerate().map(judge).collect()
    }

    /// Takes urgent data out (MSG_OOB), which QMQP knows nothing of: it makes a socket readable
    /// that has nothing to read, for ever.
    pub fn drop_urgent(&self, id: JobId) {
        if let Some(connection) = self.table.get(&id) {
            let fd = connection.fd.as_raw_fd();
            // Errors say that there is none. Reading nothing takes its mark away, and can't take
            // a byte of the request that has come meanwhile.
            let _ = recv(fd, &mut [0], MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT);
            let _ = recv(fd, &mut [], MsgFlags::MSG_DONTWAIT);
        }
    }

    /// Makes room when too many connections are held: of the client that has the most, the one
    /// that has been silent for longest is told to try again, and closed. It has sent nothing,
    /// so nothing can be unread.
    pub fn evict(&mut self, reply: &Reply, watcher: &Watcher) -> Option<Client> {
        let (&client, _) = self.clients.iter().max_by_key(|(_, count)| **count)?;
        let id = self.timers.iter().map(|&(_, id)| id).find(|id| {
            self.table
                .get(id)
                .is_some_and(|c| c.state == State::Pending && Client::from(c.peer) == client)
        })?;
        self.answer(id, reply, watcher);
        self.close(id, watcher);
        Some(client)
    }

    /// Waits for its first byte until the time given.
    ///
    /// # Errors
    /// It can't be watched.
    pub fn pend(&mut self, id: JobId, until: Instant, watcher: &Watcher) -> Result<(), Errno> {
        if let Some(connection) = self.table.get_mut(&id) {
            watcher.add(connection.fd.as_fd(), Source::Connection(id))?;
            connection.watched = true;
            connection.set_timer(&mut self.timers, id, Some(until));
        }
        Ok(())
    }

    /// It waits for a credit, until the next [`Self::limit_waiting`] without a time limit.
    pub fn wait(&mut self, id: JobId, watcher: &Watcher) {
        if let Some(connection) = self.table.get_mut(&id) {
            // One that was there at once has spoken when it was accepted.
            if connection.until.is_some() {
                connection.spoke_boottime = boottime();
            }
            connection.unwatch(watcher);
            connection.set_timer(&mut self.timers, id, None);
            connection.state = State::Waiting;
            self.unlimited.push(id);
        }
    }

    /// Those that have begun to wait and still do, wait until the time given.
    pub fn limit_waiting(&mut self, until: Instant) {
        for id in self.unlimited.drain(..) {
            let waiting = self.table.get_mut(&id).filter(|c| c.state == State::Waiting);
            if let Some(connection) = waiting {
                connection.set_timer(&mut self.timers, id, Some(until));
            }
        }
    }

    /// A worker has it now.
    pub fn dispatched(&mut self, id: JobId, worker: WorkerId, watcher: &Watcher) {
        if let Some(connection) = self.table.get_mut(&id) {
            connection.unwatch(watcher);
            connection.set_timer(&mut self.timers, id, None);
            connection.state = State::Dispatched(worker);
            self.dispatched += 1;
        }
    }

    /// Answers for the supervisor and lingers. False: the client is gone, or its worker had
    /// answered it, just before it died.
    pub fn answer(&mut self, id: JobId, reply: &Reply, watcher: &Watcher) -> bool {
        let Some(connection) = self.table.get_mut(&id) else { return false };
        let fd = connection.fd.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let told = send(fd, &reply.encode(), flags).is_ok();
        let _ = shutdown(fd, Shutdown::Write);
        if matches!(connection.state, State::Dispatched(_)) {
            self.dispatched -= 1;
        }
        connection.state = State::Lingering;
        let watched = connection.watched
            || watcher.add(connection.fd.as_fd(), Source::Connection(id)).is_ok();
        connection.watched = watched;
        connection.set_timer(&mut self.timers, id, Some(Instant::now() + LINGER));
        if !watched {
            self.drop_input(id, watcher);
        }
        told
    }

    /// Reads and drops what an answered client still sends; closes at its end.
    pub fn drop_input(&mut self, id: JobId, watcher: &Watcher) {
        let Some(connection) = self.table.get(&id) else { return };
        let mut scratch = [0; 16 * 1024];
        for _ in 0..16 {
            match recv(connection.fd.as_raw_fd(), &mut scratch, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Ok(0) | Err(_) => return self.close(id, watcher),
                Ok(_) => {}
            }
        }
    }

    /// Forgets a connection and closes our descriptor.
    pub fn close(&mut self, id: JobId, watcher: &Watcher) {
        let Some(mut connection) = self.table.remove(&id) else { return };
        connection.unwatch(watcher);
        connection.set_timer(&mut self.timers, id, None);
        if matches!(connection.state, State::Dispatched(_)) {
            self.dispatched -= 1;
        }
        let client = Client::from(connection.peer);
        if let Some(count) = self.clients.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.clients.remove(&client);
            }
        }
    }

    /// A connection whose time is over.
    pub fn overdue(&self, now: Instant) -> Option<JobId> {
        self.timers.first().filter(|(until, _)| *until <= now).map(|&(_, id)| id)
    }

    /// When [`Self::overdue`] has one.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.first().map(|&(until, _)| until)
    }
}

fn accept_one(socket: &Socket) -> io::Result<(OwnedFd, Peer)> {
    match socket {
        Socket::Unix(listener) => {
            let fd = OwnedFd::from(listener.accept()?.0);
            let credentials = getsockopt(&fd, sockopt::PeerCredentials)?;
            let peer = Peer::Local {
                // 0: it lives in a pid namespace that we can't see.
                pid: Some(credentials.pid()).filter(|&pid| pid > 0),
                uid: credentials.uid(),
                gid: credentials.gid(),
            };
            Ok((fd, peer))
        }
        Socket::Tcp(listener) => {
            let (stream, address) = listener.accept()?;
            Ok((stream.into(), Peer::Remote(canonical(address))))
        }
    }
}

fn boottime() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
