//! The clients' connections, from accept to close.
//!
//! A connection is *pending* until its first byte, then *waiting* for a credit, then *dispatched*:
//! a worker has the socket, and the supervisor keeps a duplicate to answer with should the worker
//! die. A connection that the supervisor itself has answered is *lingering*: the rest of the
//! request is read and dropped, because closing with unread data would reset the connection and
//! destroy the answer.
//!
//! # Failure
//! Nothing here waits for a client, and every connection ends: each state but *dispatched* has a
//! time limit. A client that passes descriptors is refused, and a thread that serves nobody closes
//! its socket ([`PeerSocket`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, getsockopt, recv, send, sockopt};
use qrelay_shared::client::Client;
use qrelay_shared::ipc::message::Peer;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::sys::rights::{Look, MoreInput, PeerError, PeerSocket, Rights};
use rustc_hash::FxHashMap;

use crate::accept::eviction::{Held, Worth};
use crate::accept::listeners::{Listener, Socket, canonical};
use crate::event::{LostAnswer, Origin};
use crate::ids::{GenerationId, JobId, ListenerId, WorkerId};
use crate::system::boottime;
use crate::watch::{Source, Watcher};

/// How long the rest of an answered request is read and dropped.
const LINGER: Duration = Duration::from_secs(2);

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The client has sent nothing.
    Pending,
    /// The client waits for a credit.
    Waiting,
    /// The worker has the connection.
    Dispatched(WorkerId),
    /// The supervisor has answered.
    Lingering,
}

/// When the time limits of connections are over.
type Timers = BTreeSet<(Instant, JobId)>;

/// One client's connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// The socket; after dispatch, a duplicate.
    pub(super) fd: PeerSocket,
    /// The client.
    pub(super) peer: Peer,
    /// The listener that accepted the connection.
    pub(super) listener: ListenerId,
    /// The address of that listener, which may be gone.
    pub(super) listener_name: Arc<str>,
    /// When the connection was accepted.
    pub(super) accepted: Instant,
    /// The moment of the accept in nanoseconds of CLOCK_BOOTTIME.
    pub(super) accepted_boottime: u64,
    /// When the first byte was seen, on the same clock.
    pub(super) spoke_boottime: u64,
    /// How far the connection has come.
    pub(super) state: State,
    /// The only generation that can serve the connection, and the listener's number there, because
    /// the listener is gone.
    pub(super) bound: Option<(GenerationId, u32)>,
    until: Option<Instant>,
    watched: bool,
}

impl Connection {
    /// Returns where the connection came from.
    pub(super) fn origin(&self) -> Origin {
        Origin { peer: self.peer, listener: Arc::clone(&self.listener_name) }
    }

    /// Returns whether neither a worker nor an answer has reached the client.
    fn is_unserved(&self) -> bool {
        matches!(self.state, State::Pending | State::Waiting)
    }

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

/// The outcome of an attempt to accept.
#[derive(Debug)]
pub(super) enum Accepted {
    /// The backlog may hold more connections.
    More,
    /// The backlog is empty.
    Empty,
    /// Out of descriptors or memory.
    Exhausted(io::Error),
}

/// The state of a client's side, as the supervisor sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Bytes can be read.
    Spoken,
    /// Nothing came yet.
    Silent,
    /// The client has closed the connection, or the connection is broken.
    Gone,
    /// The client has passed descriptors.
    Rights,
}

/// All connections.
#[derive(Debug)]
pub(super) struct Connections {
    watcher: Watcher,
    /// The keys are counted here, so no client can choose keys that collide.
    table: FxHashMap<JobId, Connection>,
    timers: Timers,
    clients: BTreeMap<Client, u32>,
    /// Connections that began to wait in this turn of the loop. Most are dispatched in the same
    /// turn, and never need a time limit.
    unlimited: Vec<JobId>,
    last: JobId,
    dispatched: usize,
}

impl Connections {
    /// Starts without connections.
    pub(super) fn new(watcher: Watcher) -> Self {
        Self {
            watcher,
            table: FxHashMap::default(),
            timers: Timers::new(),
            clients: BTreeMap::new(),
            unlimited: Vec::new(),
            last: JobId::default(),
            dispatched: 0,
        }
    }

    /// Accepts at most `batch` connections from a listener and appends them to `new`. They are
    /// pending and not watched.
    pub(super) fn accept(
        &mut self,
        (id, listener): (ListenerId, &Listener),
        batch: usize,
        now: Instant,
        new: &mut Vec<JobId>,
    ) -> Accepted {
        let boottime = boottime();
        for _ in 0..batch {
            let (fd, peer) = match accept_one(listener) {
                Ok(accepted) => accepted,
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    // EINVAL: the listener has been shut down.
                    Some(Errno::EAGAIN | Errno::EINVAL) => return Accepted::Empty,
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                        return Accepted::Exhausted(error);
                    }
                    // The error is that client's: the next client may be fine.
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
                    listener_name: Arc::clone(listener.name()),
                    accepted: now,
                    accepted_boottime: boottime,
                    spoke_boottime: boottime,
                    state: State::Pending,
                    bound: None,
                    until: None,
                    watched: false,
                },
            );
            new.push(job);
        }
        Accepted::More
    }

    /// Returns a connection.
    pub(super) fn get(&self, id: JobId) -> Option<&Connection> {
        self.table.get(&id)
    }

    /// Counts the connections that no worker has.
    pub(super) fn held(&self) -> usize {
        self.table.len() - self.dispatched
    }

    /// Counts the connections that workers have.
    pub(super) fn dispatched(&self) -> usize {
        self.dispatched
    }

    /// Returns the connections that are pending or waiting.
    pub(super) fn unserved(&self) -> impl Iterator<Item = (JobId, &Connection)> {
        let unserved = self.table.iter().filter(|(_, connection)| connection.is_unserved());
        unserved.map(|(&id, connection)| (id, connection))
    }

    /// Returns the listener of each connection, and whether a worker has it.
    pub(super) fn places(&self) -> impl Iterator<Item = (ListenerId, bool)> {
        let with_worker = |c: &Connection| matches!(c.state, State::Dispatched(_));
        self.table.values().map(move |c| (c.listener, with_worker(c)))
    }

    /// Returns whether a pending or waiting connection is `wanted`. Without connections here, the
    /// answer costs nothing.
    pub(super) fn any_unserved(&self, wanted: impl Fn(&Connection) -> bool) -> bool {
        self.held() > 0 && self.table.values().any(|c| c.is_unserved() && wanted(c))
    }

    /// Counts the open connections of a client.
    pub(super) fn of_client(&self, client: Client) -> u32 {
        self.clients.get(&client).copied().unwrap_or(0)
    }

    /// Looks whether the client has sent something.
    pub(super) fn look(&self, id: JobId) -> Seen {
        let Some(connection) = self.table.get(&id) else { return Seen::Gone };
        match connection.fd.look() {
            Ok(Look::End) => Seen::Gone,
            Ok(Look::Data) => Seen::Spoken,
            Err(PeerError::Os(Errno::EAGAIN | Errno::EINTR)) => Seen::Silent,
            Err(PeerError::Os(_)) => Seen::Gone,
            Err(PeerError::Rights) => Seen::Rights,
        }
    }

    /// Looks at each connection as [`Self::look`] does; mostly, one system call answers for all.
    pub(super) fn look_at_all(&self, ids: &[JobId]) -> Vec<Seen> {
        let ended = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let interest = PollFlags::POLLIN | PollFlags::POLLPRI | ended;
        let mut fds: Vec<_> = ids
            .iter()
            .filter_map(|id| Some(PollFd::new(self.table.get(id)?.fd.as_fd(), interest)))
            .collect();
        let asked = fds.len() == ids.len() && poll(&mut fds, PollTimeout::ZERO).is_ok();
        let judge = |(at, &id): (usize, &JobId)| match fds.get(at).and_then(PollFd::revents) {
            Some(PollFlags::POLLIN) if asked => Seen::Spoken,
            Some(events) if asked && events.is_empty() => Seen::Silent,
            // The end or urgent data may have come after some bytes, or instead of them.
            _ => self.look(id),
        };
        ids.iter().enumerate().map(judge).collect()
    }

    /// Takes urgent data out (MSG_OOB), because QMQP has no use for it and the socket would be
    /// readable for ever without having anything to read.
    pub(super) fn drop_urgent(&self, id: JobId) {
        // Where descriptors can come with it, urgent data is like other input.
        let refusing = |connection: &&Connection| connection.fd.rights() == Rights::Refused;
        if let Some(connection) = self.table.get(&id).filter(refusing) {
            let fd = connection.fd.as_fd().as_raw_fd();
            // Errors say that there is none. Reading nothing takes the mark of urgent data away,
            // and can't take a byte of the request that has come meanwhile.
            let _ = recv(fd, &mut [0], MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT);
            let _ = recv(fd, &mut [], MsgFlags::MSG_DONTWAIT);
        }
    }

    /// Returns the connections that no worker has.
    pub(super) fn held_ones(&self) -> impl Iterator<Item = Held> {
        self.table.iter().filter_map(|(&job, connection)| {
            let worth = match connection.state {
                State::Lingering => Worth::Answered,
                State::Pending => Worth::Silent,
                State::Waiting => Worth::Waits,
                State::Dispatched(_) => return None,
            };
            Some(Held { job, client: connection.peer.into(), worth })
        })
    }

    /// Closes a connection that has been answered, without waiting for the client. What the client
    /// has sent by now is dropped before, because unread bytes can destroy the answer.
    pub(super) fn dismiss(&mut self, id: JobId) {
        self.drop_input(id);
        self.close(id);
    }

    /// Watches a connection for its first byte, until the time given.
    ///
    /// # Errors
    /// The connection can't be watched.
    pub(super) fn pend(&mut self, id: JobId, until: Instant) -> Result<(), Errno> {
        if let Some(connection) = self.table.get_mut(&id) {
            self.watcher.add(connection.fd.as_fd(), Source::Connection(id))?;
            connection.watched = true;
            connection.set_timer(&mut self.timers, id, Some(until));
        }
        Ok(())
    }

    /// Lets a connection wait for a credit, without a time limit until the next
    /// [`Self::limit_waiting`].
    pub(super) fn wait(&mut self, id: JobId) {
        if let Some(connection) = self.table.get_mut(&id) {
            // A client whose first byte was there at the accept has spoken then.
            if connection.until.is_some() {
                connection.spoke_boottime = boottime();
            }
            connection.unwatch(&self.watcher);
            connection.set_timer(&mut self.timers, id, None);
            connection.state = State::Waiting;
            self.unlimited.push(id);
        }
    }

    /// Gives the connections that began to wait in this turn, and still wait, a time limit. The
    /// limit doesn't count from the accept, because a client may take its time before it speaks.
    pub(super) fn limit_waiting(&mut self, until: Instant) {
        for id in self.unlimited.drain(..) {
            let waiting = self.table.get_mut(&id).filter(|c| c.state == State::Waiting);
            if let Some(connection) = waiting {
                connection.set_timer(&mut self.timers, id, Some(until));
            }
        }
    }

    /// Binds a connection to the only generation that can serve it, and the listener's number
    /// there.
    pub(super) fn bind(&mut self, id: JobId, generation: GenerationId, number: u32) {
        if let Some(connection) = self.table.get_mut(&id) {
            connection.bound = Some((generation, number));
        }
    }

    /// Notes that a worker has the connection.
    pub(super) fn set_dispatched(&mut self, id: JobId, worker: WorkerId) {
        if let Some(connection) = self.table.get_mut(&id) {
            connection.unwatch(&self.watcher);
            connection.set_timer(&mut self.timers, id, None);
            connection.state = State::Dispatched(worker);
            self.dispatched += 1;
        }
    }

    /// Answers for the supervisor and lingers, unless the client has been answered.
    pub(super) fn answer(&mut self, id: JobId, reply: &Reply, now: Instant) -> LostAnswer {
        let connection = self.table.get(&id).filter(|c| c.state != State::Lingering);
        let Some(connection) = connection else { return LostAnswer::Unknown };
        let fd = connection.fd.as_fd().as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // The send fails if the client is gone, or if a worker answered just before it died.
        let told = send(fd, &reply.encode(), flags).is_ok();
        self.linger(id, now);
        if told { LostAnswer::TryAgain } else { LostAnswer::Unknown }
    }

    /// Ends the answer to a client, and lets it read the answer: what it still sends is read and
    /// dropped for a while.
    pub(super) fn linger(&mut self, id: JobId, now: Instant) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        connection.fd.end_output(MoreInput::Likely);
        if matches!(connection.state, State::Dispatched(_)) {
            self.dispatched -= 1;
        }
        connection.state = State::Lingering;
        let watched = connection.watched
            || self.watcher.add(connection.fd.as_fd(), Source::Connection(id)).is_ok();
        connection.watched = watched;
        connection.set_timer(&mut self.timers, id, Some(now + LINGER));
        if !watched {
            self.drop_input(id);
        }
    }

    /// Reads and drops what an answered client still sends; closes at the end of it.
    pub(super) fn drop_input(&mut self, id: JobId) {
        let Some(connection) = self.table.get(&id) else { return };
        let mut scratch = [0; 16 * 1024];
        for _ in 0..16 {
            match connection.fd.recv(&mut scratch, MsgFlags::MSG_DONTWAIT) {
                Err(PeerError::Os(Errno::EAGAIN | Errno::EINTR)) => return,
                Ok(0) | Err(_) => return self.close(id),
                Ok(_) => {}
            }
        }
    }

    /// Forgets a connection and closes the supervisor's descriptor.
    pub(super) fn close(&mut self, id: JobId) {
        let Some(mut connection) = self.table.remove(&id) else { return };
        connection.unwatch(&self.watcher);
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

    /// Returns a connection whose time is over.
    pub(super) fn overdue(&self, now: Instant) -> Option<JobId> {
        self.timers.first().filter(|(until, _)| *until <= now).map(|&(_, id)| id)
    }

    /// Returns when [`Self::overdue`] has something.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.timers.first().map(|&(until, _)| until)
    }
}

fn accept_one(listener: &Listener) -> io::Result<(PeerSocket, Peer)> {
    match listener.socket() {
        Socket::Unix(socket) => {
            let fd = PeerSocket::new(socket.accept()?.0.into(), listener.rights());
            let credentials = getsockopt(&fd, sockopt::PeerCredentials)?;
            let peer = Peer::Local {
                // 0: the client lives in a pid namespace that this process can't see.
                pid: Some(credentials.pid()).filter(|&pid| pid > 0),
                uid: credentials.uid(),
                gid: credentials.gid(),
            };
            Ok((fd, peer))
        }
        Socket::Tcp(socket) => {
            let (stream, address) = socket.accept()?;
            let fd = PeerSocket::new(stream.into(), Rights::Refused);
            Ok((fd, Peer::Remote(canonical(address))))
        }
    }
}

#[cfg(test)]
impl Connections {
    /// Panics if what is counted twice doesn't agree.
    pub(super) fn assert_consistent(&self) {
        let with_workers = self.with_workers().count();
        assert_eq!(self.dispatched, with_workers, "connections that workers have");
        let open: u32 = self.clients.values().sum();
        assert_eq!(open as usize, self.table.len(), "connections of clients");
        let timers = self.table.iter().filter_map(|(&id, c)| Some((c.until?, id)));
        assert_eq!(timers.collect::<Timers>(), self.timers, "time limits");
        for (id, connection) in &self.table {
            let waits = connection.state == State::Waiting && self.unlimited.contains(id);
            let limited = connection.until.is_some() || waits;
            let dispatched = matches!(connection.state, State::Dispatched(_));
            assert!(limited != dispatched, "{id} is {:?} without an end", connection.state);
        }
    }

    /// Returns the connections that workers have.
    pub(super) fn with_workers(&self) -> impl Iterator<Item = (JobId, WorkerId)> {
        self.table.iter().filter_map(|(&id, connection)| match connection.state {
            State::Dispatched(worker) => Some((id, worker)),
            _ => None,
        })
    }
}
