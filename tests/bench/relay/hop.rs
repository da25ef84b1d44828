//! The next hop of a measured relay: where the sink listens.
//!
//! Contract: `FromStr` restores what `Display` has written. The form of an address is qrelay's, so
//! it can stand in a script.
//!
//! # Failure
//! A connection that can't be made is an I/O error; the relay hangs up on its client.

use std::{
    fmt, io,
    net::{Ipv4Addr, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    str::FromStr,
};

/// Where a relay sends its mails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// A port on 127.0.0.1.
    Tcp(u16),
    /// The path of a local socket.
    Local(PathBuf),
    /// Nowhere: the relay accepts and discards.
    Nowhere,
}

impl NextHop {
    /// Connects to the next hop. Returns `None` if there is none.
    pub fn connect(&self) -> io::Result<Option<OwnedFd>> {
        Ok(match self {
            Self::Tcp(port) => Some(TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?.into()),
            Self::Local(path) => Some(UnixStream::connect(path)?.into()),
            Self::Nowhere => None,
        })
    }
}

impl fmt::Display for NextHop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(port) => write!(f, "127.0.0.1:{port}"),
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Nowhere => f.write_str("nowhere"),
        }
    }
}

impl FromStr for NextHop {
    type Err = io::Error;

    fn from_str(text: &str) -> Result<Self, io::Error> {
        match text.strip_prefix("127.0.0.1:") {
            Some(port) => port.parse().map(Self::Tcp).map_err(io::Error::other),
            None if text == "nowhere" => Ok(Self::Nowhere),
            None => Ok(Self::Local(PathBuf::from(text))),
        }
    }
}
