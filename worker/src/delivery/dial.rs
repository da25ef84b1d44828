//! Connecting to a next hop within a time limit.
//!
//! Contract: the socket stays blocking. `SO_SNDTIMEO` bounds connect(2), which over loopback
//! doesn't even sleep, so that no further call is needed. A thread that leads waits for a moment
//! only, and gives up the lead before it waits for longer.
//!
//! The peer isn't trusted: it may pass descriptors with its bytes ([`PeerSocket`]).
//!
//! # Failure
//! An errno; `ETIMEDOUT` also for the time limit, and for a local listener whose backlog stays full
//! for as long.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, connect,
    setsockopt, socket, sockopt,
};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::sys::net::delay_acks;
use qrelay_shared::sys::rights::{PeerSocket, Rights, refuse};
use qrelay_shared::sys::wait::socket_timeout;

use crate::delivery::lead::Lead;

/// Connects a stream to one address.
///
/// # Errors
/// As connect(2).
pub(crate) fn dial(
    endpoint: &Endpoint,
    deadline: Deadline,
    lead: &dyn Lead,
) -> Result<PeerSocket, Errno> {
    dial_as(endpoint, SockType::Stream, deadline, lead)
}

/// Connects a socket of some type to one address.
///
/// # Errors
/// As socket(2) and connect(2).
pub(crate) fn dial_as(
    endpoint: &Endpoint,
    kind: SockType,
    deadline: Deadline,
    lead: &dyn Lead,
) -> Result<PeerSocket, Errno> {
    let terms = (deadline, lead);
    match endpoint {
        Endpoint::Inet(address) => {
            let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            dial_socket(family, kind, &SockaddrStorage::from(*address), terms)
        }
        Endpoint::Path(path) => {
            dial_socket(AddressFamily::Unix, kind, &UnixAddr::new(path.as_path())?, terms)
        }
        Endpoint::Abstract(name) => {
            dial_socket(AddressFamily::Unix, kind, &UnixAddr::new_abstract(name)?, terms)
        }
    }
}

fn dial_socket(
    family: AddressFamily,
    kind: SockType,
    address: &dyn SockaddrLike,
    (deadline, lead): (Deadline, &dyn Lead),
) -> Result<PeerSocket, Errno> {
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    if family != AddressFamily::Unix && kind == SockType::Stream {
        // The option only saves packets.
        let _ = delay_acks(fd.as_fd());
    }
    let rights = match family {
        AddressFamily::Unix => refuse(fd.as_fd()),
        _ => Rights::Refused,
    };
    let fd = match kind {
        SockType::Stream => PeerSocket::new(fd, rights),
        _ => PeerSocket::new(fd, rights).with_messages(),
    };
    let mut patience = lead.patience().map_or(deadline, |limit| deadline.at_most(limit));
    loop {
        if deadline.expired() {
            return Err(Errno::ETIMEDOUT);
        }
        let Some(timeout) = socket_timeout(patience) else {
            lead.give_up();
            patience = deadline;
            continue;
        };
        setsockopt(&fd, sockopt::SendTimeout, &timeout)?;
        match connect(fd.as_fd().as_raw_fd(), address) {
            Ok(()) => return Ok(fd),
            // Linux continues the same attempt when connect is called again.
            Err(Errno::EINTR) => {}
            Err(Errno::EINPROGRESS | Errno::EALREADY | Errno::EAGAIN) => {
                lead.give_up();
                patience = deadline;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::lead::Follower;
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(20))
    }

    #[test]
    fn every_kind_of_address() {
        let tcp4 = TcpListener::bind("127.0.0.1:0").expect("bind");
        let name = format!("qrelay-dial-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("name");
        let local = UnixListener::bind_addr(&address).expect("bind");
        let address = tcp4.local_addr().expect("address");
        dial(&Endpoint::Inet(address), soon(), &Follower).expect("connects");
        dial(&Endpoint::Abstract(name.into()), soon(), &Follower).expect("connects");
        drop((tcp4, local));
    }

    /// The end-to-end tests have a network with IPv6 in any case.
    #[test]
    fn ipv6_where_the_machine_has_it() {
        match TcpListener::bind("[::1]:0") {
            Ok(tcp6) => {
                let address = tcp6.local_addr().expect("address");
                dial(&Endpoint::Inet(address), soon(), &Follower).expect("connects");
            }
            Err(_) => {
                let address = "[::1]:1".parse().expect("address");
                let error = dial(&Endpoint::Inet(address), soon(), &Follower).err();
                assert!(error.is_some_and(|error| error != Errno::ETIMEDOUT), "{error:?}");
            }
        }
    }

    #[test]
    fn failures() {
        let directory = tempfile::tempdir().expect("directory");
        assert_eq!(
            dial(&Endpoint::Path(directory.path().join("none")), soon(), &Follower).err(),
            Some(Errno::ENOENT)
        );
        let free = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
        assert_eq!(dial(&Endpoint::Inet(free), soon(), &Follower).err(), Some(Errno::ECONNREFUSED));
        let passed = Deadline::after(Duration::ZERO);
        assert_eq!(dial(&Endpoint::Inet(free), passed, &Follower).err(), Some(Errno::ETIMEDOUT));
    }

    #[test]
    fn a_full_backlog_times_out() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).expect("bind");
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).expect("backlog"))
            .expect("listen");
        let endpoint = Endpoint::Path(path);
        let mut held = Vec::new();
        let error = loop {
            match dial(&endpoint, soon(), &Follower) {
                Ok(fd) => held.push(fd),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Errno::ETIMEDOUT);
        drop(listener);
    }
}
