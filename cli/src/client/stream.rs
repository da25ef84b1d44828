//! Connections and listeners of either family, behind one type each.
//!
//! Contract: blocking I/O with time limits. Connecting never takes longer than it is told, not
//! even to a local socket with a full backlog.
//!
//! # Failure
//! `io::Error` with the operation's own kind; an exceeded limit is `TimedOut` or `WouldBlock`.

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

/// Shortest limit that is asked of the kernel, where zero means none at all.
const SHORTEST: Duration = Duration::from_millis(1);

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Local.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// Connects within `timeout`.
    pub fn connect(to: &Endpoint, timeout: Duration) -> io::Result<Self> {
        let timeout = timeout.max(SHORTEST);
        match to {
            Endpoint::Inet(address) => TcpStream::connect_timeout(address, timeout).map(Self::Tcp),
            Endpoint::Path(path) => connect_local(&UnixAddr::new(path)?, timeout),
            Endpoint::Abstract(name) => connect_local(&UnixAddr::new_abstract(name)?, timeout),
        }
    }

    /// Limits every single read and write from now on.
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

    /// Tells the peer that nothing more will come.
    pub fn finish(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

/// The standard library connects a local socket without a limit, and waits for ever while the
/// listener's backlog is full.
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
    /// Local.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens; a socket file that nobody listens on is replaced.
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

    /// Waits for the next connection.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
        }
    }
}

/// Removes a socket file that refuses connections; anything else is left for `bind` to refuse.
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
