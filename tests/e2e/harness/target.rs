//! Addresses to which a client connects and on which a sink listens.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as LocalAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, UnixAddr, shutdown};
use nix::sys::socket::{bind, socket};

use super::client::Stream;

/// The address of a socket.
#[derive(Debug, Clone)]
pub enum Target {
    /// The path of a socket file.
    Path(PathBuf),
    /// The abstract name of a local socket, without the leading NUL.
    Abstract(String),
    /// A TCP socket.
    Inet(SocketAddr),
}

impl From<PathBuf> for Target {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&Path> for Target {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Inet(address)
    }
}

impl std::fmt::Display for Target {
    /// Writes the address as config.lua does.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{name}"),
            Self::Inet(address) => address.fmt(f),
        }
    }
}

impl Target {
    /// Returns an address on 127.0.0.1 whose port is free at the moment.
    pub fn free_port() -> SocketAddr {
        let probe = TcpListener::bind("127.0.0.1:0").expect("bind port 0");
        probe.local_addr().expect("local address")
    }

    /// Returns an abstract name that no other test uses.
    pub fn unique_abstract() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        Self::Abstract(format!("qrelay-test-{}-{serial}", std::process::id()))
    }

    /// Connects to this address.
    pub fn connect(&self) -> io::Result<Stream> {
        match self {
            Self::Path(path) => UnixStream::connect(path).map(Stream::Unix),
            Self::Abstract(name) => {
                UnixStream::connect_addr(&LocalAddr::from_abstract_name(name)?).map(Stream::Unix)
            }
            Self::Inet(address) => TcpStream::connect(address).map(Stream::Tcp),
        }
    }

    /// Returns whether a process accepts connections on this address.
    pub fn is_alive(&self) -> bool {
        self.connect().is_ok()
    }

    /// Listens on this address.
    pub fn listen(&self) -> io::Result<Listener> {
        match self {
            Self::Path(path) => UnixListener::bind(path).map(Listener::Unix),
            Self::Abstract(name) => {
                let address = LocalAddr::from_abstract_name(name)?;
                UnixListener::bind_addr(&address).map(Listener::Unix)
            }
            Self::Inet(address) => TcpListener::bind(address).map(Listener::Tcp),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// A local socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl Listener {
    /// Waits for the next connection.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
        }
    }

    /// Makes all present and future calls of [`Listener::accept`] fail.
    pub fn stop(&self) {
        use std::os::fd::AsRawFd;
        let fd = match self {
            Self::Unix(listener) => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        };
        shutdown(fd, Shutdown::Both).expect("shutdown of a listener");
    }
}

/// Creates a socket file on which no process listens.
pub fn make_stale(path: &Path) {
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let fd = fd.expect("socket");
    bind(fd.as_raw_fd(), &UnixAddr::new(path).expect("path fits")).expect("bind");
}
