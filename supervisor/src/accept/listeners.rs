//! The listening sockets, across generations.
//!
//! The listeners of a generation are first *prepared*: sockets that earlier generations have are
//! shared, the others are bound. That changes nothing for the earlier generations. Then the
//! generation is *activated* or *abandoned*. A socket that both generations declare keeps its inode
//! and backlog.
//!
//! # Failure
//! A generation whose listeners can't all be bound gets none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, Shutdown, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt,
    listen, setsockopt, shutdown, sockopt,
};
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl};
use qrelay_shared::sys::closer;
use qrelay_shared::sys::rights::{self, Rights};

use crate::accept::bind::{Port, backlog, bind_abstract, bind_inet, bind_path};
use crate::accept::bind_error::BindError;
use crate::accept::diagnosis::{self, Queue};
use crate::accept::socket_file::SocketFile;
use crate::ids::{GenerationId, ListenerId};
use crate::watch::{Source, Watcher};

/// A socket that connections are accepted from.
#[derive(Debug)]
pub(super) enum Socket {
    /// Local: peers have credentials.
    Unix(UnixListener),
    /// TCP: peers have addresses.
    Tcp(TcpListener),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// One listening socket.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Socket,
    watched: bool,
    /// The declaration of the latest generation that was activated.
    declared: Option<ListenerDecl>,
    address: ListenAddress,
    /// The address, for the mails' lines.
    name: Arc<str>,
    file: Option<SocketFile>,
    /// Whether clients that are accepted now can pass descriptors.
    rights: Rights,
    /// Whether clients that connect from now on can.
    later: Rights,
    /// Passed by systemd: never closed, never unlinked.
    adopted: bool,
    /// Nobody can connect any more, so no further generation can have this listener.
    ending: bool,
    /// The listener's number in each generation's declaration.
    numbers: BTreeMap<GenerationId, u32>,
}

impl Listener {
    /// Returns the socket to accept from.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Returns the address as text.
    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Returns the permissions of the socket's file, if it has one that this process has made.
    pub(super) fn mode(&self) -> Option<u32> {
        self.file.as_ref().and(self.declared.as_ref()).map(|declared| declared.mode)
    }

    /// Returns the queue of connections that aren't accepted yet, if the kernel tells it.
    pub(super) fn queue(&self) -> Option<Queue> {
        match &self.socket {
            Socket::Unix(socket) => diagnosis::queue(socket),
            Socket::Tcp(socket) => diagnosis::tcp_queue(socket),
        }
    }

    /// Returns whether a client that is accepted now can pass descriptors.
    pub(super) fn rights(&self) -> Rights {
        self.rights
    }

    /// Returns whether the listener is watched for connections.
    pub(super) fn is_watched(&self) -> bool {
        self.watched
    }

    /// Returns the listener's number in a generation's declaration.
    pub(super) fn number(&self, generation: GenerationId) -> Option<u32> {
        self.numbers.get(&generation).copied()
    }

    /// Returns whether further generations can have this listener for an address.
    pub(super) fn serves(&self, address: &ListenAddress) -> bool {
        self.address == *address && !self.ending
    }

    /// Returns whether nobody can connect, because the socket's file isn't where it was bound.
    fn is_gone(&self) -> bool {
        self.file.as_ref().is_some_and(SocketFile::is_gone)
    }

    /// Returns the socket if it has the port of this address.
    fn tcp_at(&self, address: SocketAddr) -> Option<&TcpListener> {
        match &self.socket {
            Socket::Tcp(socket) => Some(socket)
                .filter(|socket| socket.local_addr().is_ok_and(|own| own.port() == address.port())),
            Socket::Unix(_) => None,
        }
    }

    /// Returns whether clients from this address are served.
    pub(super) fn allows(&self, address: IpAddr) -> bool {
        self.declared.as_ref().is_none_or(|declared| declared.allows(address))
    }
}

/// All listening sockets.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    table: BTreeMap<ListenerId, Listener>,
    last: ListenerId,
}

/// Why a passed socket can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the socket '{name}' that systemd passed is not a listening stream socket")]
pub(crate) struct NotListening {
    name: String,
}

impl Listeners {
    /// Takes over the sockets that systemd passed.
    ///
    /// # Errors
    /// A socket isn't a listening stream socket.
    pub(super) fn adopt(&mut self, passed: Vec<(OwnedFd, String)>) -> Result<(), NotListening> {
        for (fd, name) in passed {
            let socket = adopted_socket(fd).ok_or_else(|| NotListening { name: name.clone() })?;
            let later = refuse_rights(&socket);
            self.insert(Listener {
                socket,
                watched: false,
                declared: None,
                name: format!("systemd['{name}']").into(),
                address: ListenAddress::Systemd(Some(name)),
                file: None,
                // Clients may be in the backlog that connected before anything was refused.
                rights: Rights::Possible,
                later,
                adopted: true,
                ending: false,
                numbers: BTreeMap::new(),
            });
        }
        Ok(())
    }

    /// Returns the FileDescriptorNames of the sockets that systemd passed.
    pub(super) fn adopted_names(&self) -> Vec<String> {
        self.table
            .values()
            .filter(|listener| listener.adopted)
            .filter_map(|listener| match &listener.address {
                ListenAddress::Systemd(Some(name)) => Some(name.clone()),
                _ => None,
            })
            .collect()
    }

    /// Returns every listening socket.
    pub(super) fn iter(&self) -> impl Iterator<Item = (ListenerId, &Listener)> {
        self.table.iter().map(|(&id, listener)| (id, listener))
    }

    fn insert(&mut self, listener: Listener) {
        self.table.insert(self.last.advance(), listener);
    }

    /// Finds or binds every listener that the generation declares. Returns the addresses of local
    /// sockets that were bound again, because their files are gone.
    ///
    /// # Errors
    /// The first listener that can't be bound; the generation has none then.
    pub(super) fn prepare(
        &mut self,
        generation: GenerationId,
        declaration: &Declaration,
    ) -> Result<Vec<ListenAddress>, BindError> {
        let is_gone = |address: &ListenAddress| {
            let mut same = self.table.values().filter(|listener| listener.serves(address));
            same.any(Listener::is_gone)
        };
        let addresses = declaration.listeners.iter().map(|declared| &declared.address);
        let gone = addresses.filter(|address| is_gone(address)).cloned().collect();
        for (number, declared) in (0..).zip(&declaration.listeners) {
            if let Err(error) = self.prepare_one(generation, number, declared, declaration) {
                self.abandon(generation);
                return Err(error);
            }
        }
        Ok(gone)
    }

    fn prepare_one(
        &mut self,
        generation: GenerationId,
        number: u32,
        declared: &ListenerDecl,
        declaration: &Declaration,
    ) -> Result<(), BindError> {
        if matches!(declared.address, ListenAddress::Systemd(_)) {
            self.claim(generation, number, &declared.address, declaration);
            return Ok(());
        }
        let known = self
            .table
            .values_mut()
            .find(|listener| listener.serves(&declared.address) && !listener.is_gone());
        if let Some(listener) = known {
            listener.numbers.insert(generation, number);
            return Ok(());
        }
        let (socket, file) = match &declared.address {
            ListenAddress::Path(path) => {
                let (socket, file) = bind_path(path, declared)?;
                (Socket::Unix(socket), Some(file))
            }
            ListenAddress::Abstract(name) => (Socket::Unix(bind_abstract(name, declared)?), None),
            ListenAddress::Inet(address) => {
                (Socket::Tcp(self.bind_inet(*address, declared)?), None)
            }
            ListenAddress::Systemd(_) => return Ok(()),
        };
        nonblocking(&socket)
            .map_err(|error| BindError::Os("prepare", declared.address.to_string(), error))?;
        let rights = refuse_rights(&socket);
        self.insert(Listener {
            socket,
            watched: false,
            rights,
            later: rights,
            declared: Some(declared.clone()),
            address: declared.address.clone(),
            name: declared.address.to_string().into(),
            file,
            adopted: false,
            ending: false,
            numbers: BTreeMap::from([(generation, number)]),
        });
        Ok(())
    }

    /// Binds a TCP port, even if this process has the port by another address, such as 127.0.0.1 in
    /// place of 0.0.0.0.
    fn bind_inet(
        &self,
        address: SocketAddr,
        declared: &ListenerDecl,
    ) -> Result<TcpListener, BindError> {
        let rivals: Vec<_> =
            self.table.values().filter_map(|listener| listener.tcp_at(address)).collect();
        if rivals.is_empty() {
            return bind_inet(address, Port::Alone, declared);
        }
        let share = |shared| {
            for rival in &rivals {
                // If a port can't be shared, binding it fails, and says so.
                let _ = setsockopt(rival, sockopt::ReusePort, &shared);
            }
        };
        share(true);
        let bound = bind_inet(address, Port::Shared, declared);
        share(false);
        bound
    }

    /// Gives a generation the passed sockets of one name, or all sockets that no name claims.
    fn claim(
        &mut self,
        generation: GenerationId,
        number: u32,
        address: &ListenAddress,
        declaration: &Declaration,
    ) {
        let named: BTreeSet<_> = declaration
            .listeners
            .iter()
            .map(|declared| &declared.address)
            .filter_map(name)
            .collect();
        for listener in self.table.values_mut().filter(|listener| listener.adopted) {
            let claimed = match name(address) {
                Some(_) => listener.address == *address,
                None => !name(&listener.address).is_some_and(|own| named.contains(own)),
            };
            if claimed {
                listener.numbers.insert(generation, number);
            }
        }
    }

    /// Sets mode, owner and backlog of the generation's listeners as declared.
    ///
    /// # Errors
    /// Modes or owners that can't be set; the sockets serve all the same.
    pub(super) fn activate(
        &mut self,
        generation: GenerationId,
        declaration: &Declaration,
    ) -> Vec<BindError> {
        let mut errors = Vec::new();
        for listener in self.table.values_mut() {
            let Some(declared) = listener
                .number(generation)
                .and_then(|number| declaration.listeners.get(number as usize))
            else {
                continue;
            };
            if listener.declared.as_ref() != Some(declared) && !listener.adopted {
                errors.extend(listener.file.as_ref().and_then(|f| f.apply(declared).err()));
                // The socket listens already, so this can only change the backlog.
                let _ = listen(&listener.socket, backlog(declared));
            }
            listener.declared = Some(declared.clone());
        }
        errors
    }

    /// Closes and unlinks what only this generation has bound, which never served.
    pub(super) fn abandon(&mut self, generation: GenerationId) {
        self.forget(generation);
        for id in self.ids(|listener| listener.numbers.is_empty()) {
            if let Some(listener) = self.table.get_mut(&id).filter(|listener| !listener.adopted) {
                listener.close_path();
            }
            self.close(id);
        }
    }

    /// Forgets a generation's numbers, when its last worker has ended.
    pub(super) fn forget(&mut self, generation: GenerationId) {
        for listener in self.table.values_mut() {
            listener.numbers.remove(&generation);
        }
    }

    /// Returns the sockets that this generation lacks and that are not ending.
    pub(super) fn without(&self, generation: GenerationId) -> Vec<ListenerId> {
        self.ids(|listener| listener.number(generation).is_none() && !listener.ending)
    }

    /// Returns the sockets that this generation has.
    pub(super) fn with(&self, generation: GenerationId) -> Vec<ListenerId> {
        self.ids(|listener| listener.number(generation).is_some())
    }

    fn ids(&self, wanted: impl Fn(&Listener) -> bool) -> Vec<ListenerId> {
        self.table.iter().filter(|(_, listener)| wanted(listener)).map(|(&id, _)| id).collect()
    }

    /// Closes a socket. A socket that systemd passed stays open, and nothing is accepted from it.
    pub(super) fn close(&mut self, id: ListenerId) {
        if self.table.get(&id).is_some_and(|listener| !listener.adopted)
            && let Some(listener) = self.table.remove(&id)
        {
            listener.close();
        }
    }

    /// Notes that a listener's backlog is empty: whoever connected before the kernel was told to
    /// refuse passed descriptors has been accepted.
    pub(super) fn emptied(&mut self, id: ListenerId) {
        if let Some(listener) = self.table.get_mut(&id) {
            listener.rights = listener.later;
        }
    }

    /// Returns a listener.
    pub(super) fn get(&self, id: ListenerId) -> Option<&Listener> {
        self.table.get(&id)
    }

    /// Watches a generation's listeners for connections.
    ///
    /// # Errors
    /// A listener can't be watched; the others are.
    pub(super) fn watch(&mut self, generation: GenerationId, watcher: &Watcher) -> nix::Result<()> {
        let mut result = Ok(());
        for (&id, listener) in &mut self.table {
            if !listener.watched && listener.number(generation).is_some() {
                match watcher.add(&listener.socket, Source::Listener(id)) {
                    Ok(()) => listener.watched = true,
                    Err(error) => result = Err(error),
                }
            }
        }
        result
    }

    /// Watches no listener any more.
    pub(super) fn unwatch(&mut self, watcher: &Watcher) {
        self.table.values_mut().for_each(|listener| listener.unwatch(watcher));
    }

    /// Refuses new connections, while those in a local socket's backlog can still be accepted.
    /// systemd's socket stays as it is, for the process that comes after this one.
    pub(super) fn refuse_new(&mut self, id: ListenerId, watcher: &Watcher) {
        let Some(listener) = self.table.get_mut(&id) else { return };
        listener.unwatch(watcher);
        listener.ending = !listener.adopted;
        listener.close_path();
        if let (Socket::Unix(socket), false) = (&listener.socket, listener.adopted) {
            // The call can only fail if the socket doesn't listen any more.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Read);
        }
    }

    /// Gives a TCP port up at once, with what came in since its backlog was emptied.
    pub(super) fn stop_listening(&self, id: ListenerId) {
        let Some(listener) = self.table.get(&id).filter(|listener| !listener.adopted) else {
            return;
        };
        if let Socket::Tcp(socket) = &listener.socket {
            // The call can only fail if the socket doesn't listen any more.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Read);
        }
    }
}

impl Listener {
    fn unwatch(&mut self, watcher: &Watcher) {
        if std::mem::take(&mut self.watched) {
            watcher.remove(&self.socket);
        }
    }

    /// Closes the socket. Clients that are still in its backlog may have passed descriptors, which
    /// are closed with it.
    fn close(self) {
        if self.rights == Rights::Possible
            && let Socket::Unix(socket) = self.socket
        {
            closer::give(socket.into());
        }
    }

    fn close_path(&mut self) {
        if let Some(file) = self.file.take() {
            file.unlink();
        }
    }
}

fn name(address: &ListenAddress) -> Option<&String> {
    match address {
        ListenAddress::Systemd(name) => name.as_ref(),
        _ => None,
    }
}

/// Returns the descriptor as a socket to accept from, if it is a listening stream socket.
fn adopted_socket(fd: OwnedFd) -> Option<Socket> {
    let listening = getsockopt(&fd, sockopt::AcceptConn).ok()?;
    let kind = getsockopt(&fd, sockopt::SockType).ok()?;
    if !listening || kind != SockType::Stream {
        return None;
    }
    let address: SockaddrStorage = getsockname(fd.as_raw_fd()).ok()?;
    let socket = match address.family()? {
        AddressFamily::Unix => Socket::Unix(UnixListener::from(fd)),
        AddressFamily::Inet | AddressFamily::Inet6 => Socket::Tcp(TcpListener::from(fd)),
        _ => return None,
    };
    nonblocking(&socket).ok()?;
    Some(socket)
}

/// Has the kernel refuse descriptors that a socket's clients pass; over TCP there are none.
fn refuse_rights(socket: &Socket) -> Rights {
    match socket {
        Socket::Unix(socket) => rights::refuse(socket.as_fd()),
        Socket::Tcp(_) => Rights::Refused,
    }
}

fn nonblocking(socket: &Socket) -> std::io::Result<()> {
    match socket {
        Socket::Unix(socket) => socket.set_nonblocking(true),
        Socket::Tcp(socket) => socket.set_nonblocking(true),
    }
}

/// Returns a client's address as it is counted and shown: never IPv4-mapped.
pub(super) fn canonical(address: SocketAddr) -> IpAddr {
    address.ip().to_canonical()
}
