//! Making a listening socket: stale files, locks, modes.
//!
//! A path is bound under a flock on `PATH.lock`, which is held only while the path is bound, so
//! that two daemons that start at once can't take the path from each other. Whatever is at the path
//! is left alone, unless it is a socket that refuses connections.
//!
//! # Failure
//! Every error names the address and the cause; nothing is left behind.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, UnixAddr,
    bind, listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use qrelay_shared::settings::{ListenAddress, ListenerDecl};

use crate::accept::bind_error::{BindError, os};
use crate::accept::socket_file::{PathLock, Place, SocketFile, unix_socket};

/// Binds a path and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_path(
    path: &Path,
    declared: &ListenerDecl,
) -> Result<(UnixListener, SocketFile), BindError> {
    let shown = path.display().to_string();
    let place = Rc::new(Place::of(path)?);
    let lock = PathLock::take(Rc::clone(&place))?;
    place.remove_stale()?;
    let socket = unix_socket().map_err(os("create a socket for", &shown))?;
    // The file gets the socket's mode without the bits of the umask, which would be this process's
    // and is not changed for a moment. Until the socket listens, nobody can connect.
    fchmod(&socket, Mode::from_bits_truncate(declared.mode)).map_err(os("prepare", &shown))?;
    let address = UnixAddr::new(path).map_err(os("bind", &shown))?;
    // What follows opens two descriptors. If they are lacking, that has to show before the file is
    // there, because nothing removes a file that can't be looked at.
    let reserved = [socket.try_clone(), socket.try_clone()];
    for descriptor in reserved {
        drop(descriptor.map_err(os("bind", &shown))?);
    }
    bind(socket.as_raw_fd(), &address).map_err(os("bind", &shown))?;
    let file = SocketFile::of(place, &socket)?;
    let finished = file
        .apply(declared)
        .and_then(|()| listen(&socket, backlog(declared)).map_err(os("listen on", &shown)));
    // To another process a socket that doesn't listen yet looks stale.
    drop(lock);
    match finished {
        Ok(()) => Ok((UnixListener::from(socket), file)),
        Err(error) => {
            file.unlink();
            Err(error)
        }
    }
}

/// Binds a path for this process's own user and root, and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_private(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let declared = ListenerDecl {
        address: ListenAddress::Path(path.to_owned()),
        mode: 0o600,
        owner: None,
        group: None,
        backlog: 128,
        max_size: 0,
        allow: None,
    };
    bind_path(path, &declared)
}

/// Binds a name of the abstract namespace and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_abstract(
    name: &[u8],
    declared: &ListenerDecl,
) -> Result<UnixListener, BindError> {
    let shown = declared.address.to_string();
    let socket = unix_socket().map_err(os("create a socket for", &shown))?;
    let address = UnixAddr::new_abstract(name).map_err(os("bind", &shown))?;
    bind_and_listen(&socket, &address, declared)?;
    Ok(UnixListener::from(socket))
}

/// Whether other sockets of this process may have the same port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    /// No other socket may have it.
    Alone,
    /// Another one may, which has SO_REUSEPORT as well.
    Shared,
}

/// Binds a TCP port and listens on it.
///
/// # Errors
/// See [`BindError`].
pub(crate) fn bind_inet(
    address: SocketAddr,
    port: Port,
    declared: &ListenerDecl,
) -> Result<TcpListener, BindError> {
    let shown = address.to_string();
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(os("create a socket for", &shown))?;
    setsockopt(&socket, sockopt::ReuseAddr, &true).map_err(os("prepare", &shown))?;
    let is_shared = port == Port::Shared;
    setsockopt(&socket, sockopt::ReusePort, &is_shared).map_err(os("prepare", &shown))?;
    match address {
        SocketAddr::V4(v4) => bind_and_listen(&socket, &SockaddrIn::from(v4), declared)?,
        SocketAddr::V6(v6) => {
            setsockopt(&socket, sockopt::Ipv6V6Only, &true).map_err(os("prepare", &shown))?;
            bind_and_listen(&socket, &SockaddrIn6::from(v6), declared)?;
        }
    }
    // From now on another process can't share the port.
    setsockopt(&socket, sockopt::ReusePort, &false).map_err(os("prepare", &shown))?;
    Ok(TcpListener::from(socket))
}

/// Returns the declared length of the kernel's queue, or the longest possible one.
pub(super) fn backlog(declared: &ListenerDecl) -> Backlog {
    i32::try_from(declared.backlog)
        .ok()
        .and_then(|n| Backlog::new(n).ok())
        .unwrap_or(Backlog::MAXALLOWABLE)
}

fn bind_and_listen(
    socket: &OwnedFd,
    address: &dyn SockaddrLike,
    declared: &ListenerDecl,
) -> Result<(), BindError> {
    let shown = declared.address.to_string();
    match bind(socket.as_raw_fd(), address) {
        Err(Errno::EADDRINUSE) => return Err(BindError::InUse(shown)),
        Err(Errno::EACCES) if matches!(declared.address, ListenAddress::Inet(_)) => {
            return Err(BindError::Privileged(shown));
        }
        other => other.map_err(os("bind", &shown))?,
    }
    listen(socket, backlog(declared)).map_err(os("listen on", shown))
}
