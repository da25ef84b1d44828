//! Connections and listeners for local sockets and TCP, behind one type each.
//!
//! Contract: blocking I/O with time limits. Connecting never exceeds its time limit, not even to a
//! local socket with a full backlog.
//!
//! # Failure
//! Every error is an `io::Error` with the kind of the failed operation; an exceeded limit is
//! `TimedOut` or `WouldBlock`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket};
use nix::sys::socket::{SockProtocol, sockopt::SendTimeout};
use nix::sys::time::TimeVal;
use qrelay_shared::endpoint::Endpoint;

/// Shortest time limit, because the kernel takes a limit of zero as none at all.
const SHORTEST: Duration = Duration::from_millis(1);

/// A connection to a peer.
#[derive(Debug)]
pub enum Stream {
    /// A local socket: a path or an abstract name.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Stream {
    /// Connects to a server within `timeout`.
    pub fn connect(to: &Endpoint, timeout: Duration) -> io::Result<Self> {
        let timeout = timeout.max(SHORTEST);
        match to {
            Endpoint::Inet(address) => TcpStream::connect_timeout(address, timeout).map(Self::Tcp),
            Endpoint::Path(path) => connect_local(&UnixAddr::new(path)?, timeout),
            Endpoint::Abstract(name) => connect_local(&UnixAddr::new_abstract(name)?, timeout),
        }
    }

    /// Sets the time limit of each following read and each following write.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(SHORTEST));
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
        }
    }

    /// Shuts down the sending side, so that the peer sees the end of the data.
    pub fn finish(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

/// Connects to a local socket within `timeout`. The standard library has no such limit and waits
/// for ever while the backlog of the listener is full.
fn connect_local(address: &UnixAddr, timeout: Duration) -> io::Result<Stream> {
    let kind = (AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC);
    let fd = socket(kind.0, kind.1, kind.2, None::<SockProtocol>)?;
    let limit = TimeVal::new(timeout.as_secs().cast_signed(), timeout.subsec_micros().into());
    setsockopt(&fd, SendTimeout, &limit)?;
    connect(fd.as_raw_fd(), address)?;
    Ok(Stream::Unix(fd.into()))
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// A local socket: a path or an abstract name.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on `at`. A socket file on which nobody listens is replaced.
    pub fn bind(at: &Endpoint) -> io::Result<Self> {
        match at {
            Endpoint::Inet(address) => TcpListener::bind(address).map(Self::Tcp),
            Endpoint::Abstract(name) => {
                let address = SocketAddr::from_abstract_name(name)?;
                UnixListener::bind_addr(&address).map(Self::Unix)
            }
            Endpoint::Path(path) => {
                remove_stale(path)?;
                UnixListener::bind(path).map(Self::Unix)
            }
        }
    }

    /// Waits without limit for the next connection.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
        }
    }
}

/// Removes the socket file at `path` if it refuses connections. Any other file is left alone, so
/// that `bind` reports it.
fn remove_stale(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(found) if found.file_type().is_socket() => {}
        _ => return Ok(()),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}
