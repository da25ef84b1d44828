//! The control socket: administrators' commands ask and order, and get answers.
//!
//! [`Admin`] owns the socket and its clients. It tells the daemon what is asked, and passes the
//! answers on. What is said is in [`qrelay_shared::admin`].
//!
//! Only root and the daemon's own user can connect. Workers and programs may run as that user, so a
//! client that descends from this process is refused.
//!
//! # Failure
//! A client that says nothing, doesn't read or sends nonsense is closed, and costs nobody else
//! anything: a few are connected at a time ([`commands`]), one request is served in a turn of the
//! loop, and a request that took some time lets the next one wait for [`SHARE`] times as long. The
//! silent ones give way to new ones; while there are only others, new ones wait in the backlog.

mod client;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Pid, geteuid};
use qrelay_shared::admin::{Body, Command, InFlight, Reload};
use qrelay_shared::sys::rights::{self, PeerSocket, Rights};
use slog::{Logger, warn};

use crate::admin::client::{Client, Interest, Life, Waits};
use crate::descriptors::commands;
use crate::event::{Cursor, Event, Events};
use crate::ids::{AdminId, GenerationId};
use crate::system::System;
use crate::watch::{Source, Watcher};

/// How long a client may take to say something, or to read something.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are taken in a turn of the loop.
const BATCH: usize = 4;
/// How long no connection is taken after a batch, so that clients that come again and again cost
/// little.
const PAUSE: Duration = Duration::from_millis(10);
/// The next request waits for so many times the time that the last one took.
const SHARE: u32 = 4;
/// Most ancestors of a client that are looked at.
const ANCESTORS: usize = 64;

/// The owner of the control socket.
#[derive(Debug)]
pub(crate) struct Admin {
    log: Logger,
    watcher: Watcher,
    system: Rc<dyn System>,
    /// The socket, and whether its clients can pass descriptors.
    listener: Option<(UnixListener, Rights)>,
    /// When connections are taken again; the listener isn't watched until then.
    resume: Option<Instant>,
    clients: BTreeMap<AdminId, Client>,
    last: AdminId,
    /// The client that was served last: the others come first.
    served: AdminId,
    /// Most clients at a time.
    most: usize,
    /// When the next request is served at the earliest.
    next_service: Instant,
    /// No reload comes to an end any more.
    stopping: bool,
}

impl Admin {
    /// Starts without a socket.
    pub(crate) fn new(log: Logger, watcher: Watcher, system: Rc<dyn System>, now: Instant) -> Self {
        Self {
            most: commands(system.descriptor_limit()) as usize,
            log,
            watcher,
            system,
            listener: None,
            resume: None,
            clients: BTreeMap::new(),
            last: AdminId::default(),
            served: AdminId::default(),
            next_service: now,
            stopping: false,
        }
    }

    /// Takes connections from this socket from now on.
    pub(crate) fn listen(&mut self, listener: UnixListener) {
        if let Some((old, _)) = self.listener.take() {
            self.watcher.remove(&old);
        }
        self.resume = None;
        let rights = rights::refuse(listener.as_fd());
        match self.watcher.add(&listener, Source::AdminListener) {
            Ok(()) => self.listener = Some((listener, rights)),
            Err(error) => warn!(self.log, "no control socket: epoll_ctl: {error}"),
        }
    }

    /// Takes some of the connections that have come.
    pub(crate) fn on_listener(&mut self, now: Instant) {
        for _ in 0..BATCH {
            if self.clients.len() >= self.most && self.silent().is_none() {
                break;
            }
            let Some((listener, rights)) = &self.listener else { return };
            let (Ok((stream, _)), rights) = (listener.accept(), *rights) else { break };
            let client = Client::new(PeerSocket::new(stream.into(), rights), now + PATIENCE);
            self.admit(client, now);
        }
        if let Some((listener, _)) = &self.listener {
            self.watcher.remove(listener);
            self.resume = Some(now + PAUSE);
        }
    }

    fn admit(&mut self, mut client: Client, now: Instant) {
        if let Err(message) = self.judge(&client.socket) {
            // Whether the client learns it makes no difference.
            let _ = client.say(Body::Error { message: message.to_owned() });
            return;
        }
        if self.clients.len() >= self.most
            && let Some(oldest) = self.silent()
        {
            self.close(oldest);
        }
        let id = self.last.advance();
        self.clients.insert(id, client);
        // Most have sent their request by now.
        self.on_client(id, now);
    }

    /// Returns the client that has been silent for longest.
    fn silent(&self) -> Option<AdminId> {
        let silent = self.clients.iter().filter(|(_, client)| client.is_silent());
        silent.min_by_key(|(_, client)| client.until).map(|(&id, _)| id)
    }

    /// Judges who asks.
    ///
    /// # Errors
    /// Why the client is refused.
    fn judge(&self, socket: &PeerSocket) -> Result<(), &'static str> {
        const UNKNOWN: &str = "it can't be told which process asks: ask as root";
        let Ok(credentials) = getsockopt(socket, sockopt::PeerCredentials) else {
            return Err(UNKNOWN);
        };
        let own = self.system.own_pid();
        let mut pid = Pid::from_raw(credentials.pid());
        for _ in 0..ANCESTORS {
            if pid == own {
                return Err("a worker or a program of qrelay can't give orders");
            }
            // A process outside of this one's pid namespace has no number here.
            if pid.as_raw() <= 1 {
                return Ok(());
            }
            match self.system.identify(pid) {
                Ok(Some(identity)) => pid = identity.process.parent,
                _ => break,
            }
        }
        // /proc may hide a process of another user. A descendant is this user's.
        if credentials.uid() == geteuid().as_raw() { Err(UNKNOWN) } else { Ok(()) }
    }

    /// Reads what a client has sent, or sends what it has room for.
    pub(crate) fn on_client(&mut self, id: AdminId, now: Instant) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let life = match client.interest() {
            Some(Interest::Input) => client.read(),
            Some(Interest::Output) => {
                client.until = now + PATIENCE;
                client.send()
            }
            Some(Interest::Hangup) => Life::Over,
            None => Life::On,
        };
        self.settle(id, life);
    }

    /// Watches a client for what it is to do next, or closes it.
    fn settle(&mut self, id: AdminId, life: Life) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if life == Life::Over || client.is_over() {
            return self.close(id);
        }
        let interest = client.interest();
        if interest == client.watched {
            return;
        }
        if client.watched.take().is_some() {
            self.watcher.remove(&client.socket);
        }
        let added = match interest {
            Some(Interest::Input) => self.watcher.add(&client.socket, Source::Admin(id)),
            Some(Interest::Output) => self.watcher.add_output(&client.socket, Source::Admin(id)),
            Some(Interest::Hangup) => self.watcher.add_end(&client.socket, Source::Admin(id)),
            None => return,
        };
        match added {
            Ok(()) => client.watched = interest,
            Err(_) => self.close(id),
        }
    }

    fn close(&mut self, id: AdminId) {
        if let Some(client) = self.clients.remove(&id)
            && client.watched.is_some()
        {
            self.watcher.remove(&client.socket);
        }
    }

    /// Does what is due: takes connections again, closes clients whose time is over, and has the
    /// next request served.
    pub(crate) fn tick(&mut self, now: Instant, events: &mut Events) {
        if self.resume.is_some_and(|at| at <= now) {
            self.resume = None;
            if let Some((listener, _)) = &self.listener
                && let Err(error) = self.watcher.add(listener, Source::AdminListener)
            {
                self.resume = Some(now + PATIENCE);
                warn!(self.log, "the control socket can't be watched: {error}");
            }
        }
        let late = self.clients.iter().filter(|(_, client)| {
            client.until <= now && !matches!(client.waits, Waits::Reload(_) | Waits::Stop)
        });
        for id in late.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.close(id);
        }
        if self.next_service <= now
            && let Some(id) = self.next_client()
        {
            self.served = id;
            self.serve(id, events);
        }
    }

    /// Returns the client with a request whose turn it is.
    fn next_client(&self) -> Option<AdminId> {
        let after = self.clients.range(AdminId(self.served.0 + 1)..);
        let mut turns = after.chain(self.clients.range(..=self.served));
        turns.find(|(_, client)| client.wants_service()).map(|(&id, _)| id)
    }

    fn serve(&mut self, id: AdminId, events: &mut Events) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if let Waits::List(cursor, listed) = client.waits {
            client.waits = Waits::Part(listed);
            return events.push_back(Event::MailsWanted { client: id, cursor });
        }
        match client.next_request() {
            Ok(Command::Mails) => {
                client.waits = Waits::Part(0);
                events.push_back(Event::MailsWanted { client: id, cursor: Cursor::default() });
            }
            Ok(command) => {
                client.waits = Waits::Answer;
                events.push_back(Event::Ordered { client: id, command });
            }
            Err(message) => {
                let life = client.say(Body::Error { message });
                self.settle(id, life);
            }
        }
    }

    /// Notes how long a request took.
    pub(crate) fn took(&mut self, time: Duration, now: Instant) {
        self.next_service = now + time.saturating_mul(SHARE);
    }

    /// Answers a client.
    pub(crate) fn answer(&mut self, id: AdminId, body: Body, now: Instant) {
        self.say(id, Waits::Idle, body, now);
    }

    fn say(&mut self, id: AdminId, waits: Waits, body: Body, now: Instant) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.waits = waits;
        client.until = now + PATIENCE;
        let life = client.say(body);
        self.settle(id, life);
    }

    /// Gives a client a part of the list of mails, and where the next part begins, if there is one.
    pub(crate) fn list(
        &mut self,
        id: AdminId,
        (mails, next): (Vec<InFlight>, Option<Cursor>),
        now: Instant,
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Waits::Part(listed) = client.waits else { return };
        let listed = listed + mails.len() as u64;
        for mail in mails {
            client.add(Body::Mail(Box::new(mail)));
        }
        client.waits = match next {
            Some(cursor) => Waits::List(cursor, listed),
            None => {
                client.add(Body::End { mails: listed });
                Waits::Idle
            }
        };
        client.until = now + PATIENCE;
        let life = client.send();
        self.settle(id, life);
    }

    /// Has a client wait for the outcome of the first reload after this generation. Returns false
    /// if the client is refused.
    pub(crate) fn await_reload(&mut self, id: AdminId, last: GenerationId, now: Instant) -> bool {
        if self.stopping {
            self.answer(id, stops(), now);
            return false;
        }
        // The others are for commands that don't wait.
        if self.those(|client| matches!(client.waits, Waits::Reload(_))).len()
            >= (self.most / 2).max(1)
        {
            let message = "too many commands wait for a reload".to_owned();
            self.answer(id, Body::Error { message }, now);
            return false;
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.waits = Waits::Reload(last);
            self.settle(id, Life::On);
        }
        true
    }

    /// Tells those who wait for it how a reload has ended.
    pub(crate) fn loaded(&mut self, reload: &Reload, now: Instant) {
        let waits = |client: &Client| match client.waits {
            Waits::Reload(last) => reload.generation > last.0,
            _ => false,
        };
        for id in self.those(waits) {
            self.answer(id, Body::Reload(reload.clone()), now);
        }
    }

    /// Has a client wait for the end of the daemon.
    pub(crate) fn await_stop(&mut self, id: AdminId, in_flight: u64, now: Instant) {
        self.say(id, Waits::Stop, Body::Stopping { in_flight }, now);
    }

    /// Tells those who wait for a reload that there won't be one.
    pub(crate) fn stop(&mut self, now: Instant) {
        self.stopping = true;
        for id in self.those(|client| matches!(client.waits, Waits::Reload(_))) {
            self.answer(id, stops(), now);
        }
    }

    /// Tells those who wait for it that the daemon has stopped.
    pub(crate) fn close_all(&mut self, now: Instant) {
        for id in self.those(|client| client.waits == Waits::Stop) {
            self.answer(id, Body::Stopped {}, now);
        }
    }

    fn those(&self, wanted: impl Fn(&Client) -> bool) -> Vec<AdminId> {
        let those = self.clients.iter().filter(|(_, client)| wanted(client));
        those.map(|(&id, _)| id).collect()
    }

    /// Returns when [`Self::tick`] has something to do, if ever.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let clients = self
            .clients
            .values()
            .filter(|client| !matches!(client.waits, Waits::Reload(_) | Waits::Stop));
        let service = self.next_client().map(|_| self.next_service);
        clients.map(|client| client.until).chain(self.resume).chain(service).min()
    }
}

fn stops() -> Body {
    Body::Error { message: "the daemon stops, so nothing is loaded any more".to_owned() }
}

#[cfg(test)]
#[path = "admin/tests.rs"]
mod tests;
