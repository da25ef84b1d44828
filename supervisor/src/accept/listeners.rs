//! The listening sockets, across generations.
//!
//! A generation first *prepares* its listeners (what it shares with earlier ones
//! is found, the rest is bound), which changes nothing for the others; then it is
//! *activated* or *abandoned*. A socket that both generations declare keeps its
//! inode and backlog.
//!
//! # Failure
//! A generation whose listeners can't all be had gets none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::sys::socket::{
    AddressFamily, Shutdown, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt,
    listen, shutdown, sockopt,
};
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl};

use crate::accept::bind::{BindError, SocketFile, backlog, bind_abstract, bind_inet, bind_path};
use crate::ids::{GenerationId, ListenerId};

/// A socket that connections are accepted from.
#[derive(Debug)]
pub enum Socket {
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
pub struct Listener {
    /// Accept from here.
    pub socket: Socket,
    /// Known to the daemon's epoll set.
    pub watched: bool,
    /// Of the latest generation that was activated with it.
    pub declared: Option<ListenerDecl>,
    address: ListenAddress,
    file: Option<SocketFile>,
    /// systemd's: never closed, never unlinked.
    adopted: bool,
    /// Nothing new gets in any more: no generation can have it.
    ending: bool,
    /// Its number in each generation's declaration.
    numbers: BTreeMap<GenerationId, u32>,
}

impl Listener {
    /// Its number in a generation's declaration.
    pub fn number(&self, generation: GenerationId) -> Option<u32> {
        self.numbers.get(&generation).copied()
    }

    /// Whether clients from this address are served.
    pub fn allows(&self, address: IpAddr) -> bool {
        match self.declared.as_ref().and_then(|declared| declared.allow.as_ref()) {
            Some(networks) => networks.iter().any(|network| network.contains(address)),
            None => self.adopted || address.to_canonical().is_loopback(),
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Listeners {
    table: BTreeMap<ListenerId, Listener>,
    last: ListenerId,
}

/// Why a passed socket can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the socket '{name}' that systemd passed is not a listening stream socket")]
pub struct NotListening {
    name: String,
}

impl Listeners {
    /// Takes over what systemd passed.
    ///
    /// # Errors
    /// One that isn't a listening stream socket.
    pub fn adopt(&mut self, passed: Vec<(OwnedFd, String)>) -> Result<(), NotListening> {
        for (fd, name) in passed {
            let socket = adopted_socket(fd).ok_or_else(|| NotListening { name: name.clone() })?;
            self.insert(Listener {
                socket,
                watched: false,
                declared: None,
                address: ListenAddress::Systemd(Some(name)),
                file: None,
                adopted: true,
                ending: false,
                numbers: BTreeMap::new(),
            });
        }
        Ok(())
    }

    /// The FileDescriptorNames of the sockets that systemd passed.
    pub fn adopted_names(&self) -> Vec<String> {
        self.table
            .values()
            .filter(|listener| listener.adopted)
            .filter_map(|listener| match &listener.address {
                ListenAddress::Systemd(Some(name)) => Some(name.clone()),
                _ => None,
            })
            .collect()
    }

    fn insert(&mut self, listener: Listener) {
        self.table.insert(self.last.advance(), listener);
    }

    /// Finds or binds everything that the generation declares.
    ///
    /// # Errors
    /// The first that can't be had; the generation has none then.
    pub fn prepare(
        &mut self,
        generation: GenerationId,
        declaration: &Declaration,
    ) -> Result<(), BindError> {
        for (number, declared) in (0..).zip(&declaration.listeners) {
            if let Err(error) = self.prepare_one(generation, number, declared, declaration) {
                self.abandon(generation);
                return Err(error);
            }
        }
        Ok(())
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
            .find(|listener| listener.address == declared.address && !listener.ending);
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
            ListenAddress::Inet(address) => (Socket::Tcp(bind_inet(*address, declared)?), None),
            ListenAddress::Systemd(_) => return Ok(()),
        };
        nonblocking(&socket)
            .map_err(|error| BindError::Os("prepare", declared.address.to_string(), error))?;
        self.insert(Listener {
            socket,
            watched: false,
            declared: Some(declared.clone()),
            address: declared.address.clone(),
            file,
            adopted: false,
            ending: false,
            numbers: BTreeMap::from([(generation, number)]),
        });
        Ok(())
    }

    /// Gives a generation the passed sockets of one name, or all that no name claims.
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

    /// Makes the generation's listeners look as it declared them.
    ///
    /// # Errors
    /// Modes or owners that can't be set; the sockets serve all the same.
    pub fn activate(
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

    /// Closes and unlinks what only this generation, which never served, has bound.
    pub fn abandon(&mut self, generation: GenerationId) {
        self.table.retain(|_, listener| {
            listener.numbers.remove(&generation);
            let keep = listener.adopted || !listener.numbers.is_empty();
            if !keep {
                listener.close_path();
            }
            keep
        });
    }

    /// Forgets the numbers of a generation whose last worker has ended.
    pub fn forget(&mut self, generation: GenerationId) {
        for listener in self.table.values_mut() {
            listener.numbers.remove(&generation);
        }
    }

    /// The sockets that this generation doesn't have, but for those that are ending.
    pub fn without(&self, generation: GenerationId) -> Vec<ListenerId> {
        self.ids(|listener| listener.number(generation).is_none() && !listener.ending)
    }

    /// The sockets that this generation has.
    pub fn with(&self, generation: GenerationId) -> Vec<ListenerId> {
        self.ids(|listener| listener.number(generation).is_some())
    }

    fn ids(&self, wanted: impl Fn(&Listener) -> bool) -> Vec<ListenerId> {
        self.table.iter().filter(|(_, listener)| wanted(listener)).map(|(&id, _)| id).collect()
    }

    /// Closes a socket; one that systemd passed stays open, unaccepted.
    pub fn close(&mut self, id: ListenerId) {
        if self.table.get(&id).is_some_and(|listener| !listener.adopted) {
            self.table.remove(&id);
        }
    }

    /// One of them.
    pub fn get(&self, id: ListenerId) -> Option<&Listener> {
        self.table.get(&id)
    }

    /// One of them, to change.
    pub fn get_mut(&mut self, id: ListenerId) -> Option<&mut Listener> {
        self.table.get_mut(&id)
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (ListenerId, &mut Listener)> {
        self.table.iter_mut().map(|(&id, listener)| (id, listener))
    }
}

impl Listener {
    /// Nobody new gets in; what is in a local socket's backlog can still be
    /// accepted. systemd's stays as it is, for whoever comes after us.
    pub fn refuse_new(&mut self) {
        self.ending = !self.adopted;
        self.close_path();
        if let (Socket::Unix(socket), false) = (&self.socket, self.adopted) {
            // It can only fail if it doesn't listen any more.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Read);
        }
    }

    /// A TCP port is given up at once, with what came in since its backlog was emptied.
    pub fn stop_listening(&self) {
        if let (Socket::Tcp(socket), false) = (&self.socket, self.adopted) {
            // It can only fail if it doesn't listen any more.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Read);
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

/// The descriptor as a socket to accept from, if it is one.
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

fn nonblocking(socket: &Socket) -> std::io::Result<()> {
    match socket {
        Socket::Unix(socket) => socket.set_nonblocking(true),
        Socket::Tcp(socket) => socket.set_nonblocking(true),
    }
}

/// The address of a client as it is counted and shown: never IPv4-mapped.
pub fn canonical(address: SocketAddr) -> IpAddr {
    address.ip().to_canonical()
}
