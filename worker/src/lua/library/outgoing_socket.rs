//! A socket over which a script sends to a server, such as a log server.
//!
//! Contract: nothing is received. A socket that was declared while the script loads is connected at
//! its first use, and again after a failure; [`OutgoingSocket::release`] closes it before a fork,
//! so that every worker has its own. Threads that use one socket at the same time wait for each
//! other. A message of a datagram or packet socket goes out whole or not at all.
//!
//! # Failure
//! [`SocketError`]. A stream that failed in the middle is closed, because nobody knows how much has
//! arrived.

use std::os::fd::{AsFd as _, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, SockType, send, setsockopt, shutdown, sockopt};
use parking_lot::{Mutex, MutexGuard};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::sys::rights::{PeerError, PeerSocket};
use qrelay_shared::sys::wait::socket_timeout;
use thiserror::Error;

use crate::delivery::dial::dial_as;
use crate::delivery::lead::Follower;

/// Why nothing could be sent.
#[derive(Debug, Error)]
pub(crate) enum SocketError {
    /// No address accepts a connection; this is the last one's error.
    #[error("cannot connect to {endpoint}: {}", errno.desc())]
    Connect {
        /// The last address.
        endpoint: String,
        /// The system's error.
        errno: Errno,
    },
    /// The connection failed.
    #[error("cannot send to {endpoint}: {}", errno.desc())]
    Send {
        /// Every address of the connection.
        endpoint: String,
        /// The system's error.
        errno: Errno,
    },
    /// The socket was closed, by the script or after a failure.
    #[error("the socket is closed")]
    Closed,
    /// The deadline passed.
    #[error("timed out")]
    TimedOut,
}

#[derive(Debug)]
enum State {
    Unconnected,
    Connected(PeerSocket),
    Closed,
}

/// A socket of a script.
#[derive(Debug)]
pub(crate) struct OutgoingSocket {
    /// Tried in this order.
    endpoints: Vec<Endpoint>,
    kind: SockType,
    /// Whether a lost connection is made again.
    declared: bool,
    state: Mutex<State>,
}

impl OutgoingSocket {
    /// A socket that isn't connected yet; `declared` if that happened while the script loads.
    pub(crate) fn new(endpoints: Vec<Endpoint>, kind: SockType, declared: bool) -> Self {
        Self { endpoints, kind, declared, state: Mutex::new(State::Unconnected) }
    }

    /// Connects the socket, unless it is connected.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub(crate) fn open(&self, deadline: Deadline) -> Result<(), SocketError> {
        self.connect(&mut *self.lock(deadline)?, deadline).map(drop)
    }

    /// Sends all of the bytes, as one message if the socket has messages.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub(crate) fn send(&self, bytes: &[u8], deadline: Deadline) -> Result<(), SocketError> {
        let mut state = self.lock(deadline)?;
        if self.declared && self.has_ended(&state) {
            *state = State::Unconnected;
        }
        let used_before = matches!(*state, State::Connected(_));
        match self.send_once(&mut state, bytes, deadline) {
            // The receiver has been restarted, and a message that failed has reached nobody.
            Err(SocketError::Send { .. })
                if used_before && self.has_messages() && matches!(*state, State::Unconnected) =>
            {
                self.send_once(&mut state, bytes, deadline)
            }
            result => result,
        }
    }

    /// Closes the socket for good. Input from the peer of a stream is dropped first, because
    /// closing with unread input resets the connection, and the peer could lose what it has not
    /// read yet.
    ///
    /// # Errors
    /// Another thread uses the socket until the deadline.
    pub(crate) fn close(&self, deadline: Deadline) -> Result<(), SocketError> {
        let mut state = self.lock(deadline)?;
        if let State::Connected(fd) = std::mem::replace(&mut *state, State::Closed)
            && !self.has_messages()
        {
            let _ = shutdown(fd.as_fd().as_raw_fd(), Shutdown::Write);
            drop_input(&fd);
        }
        Ok(())
    }

    /// Closes the socket before a fork; the next use connects it again.
    pub(crate) fn release(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Connected(_)) {
            *state = State::Unconnected;
        }
    }

    fn lock(&self, deadline: Deadline) -> Result<MutexGuard<'_, State>, SocketError> {
        self.state.try_lock_until(deadline.instant()).ok_or(SocketError::TimedOut)
    }

    fn has_messages(&self) -> bool {
        self.kind != SockType::Stream
    }

    /// Whether the peer of a stream has ended it meanwhile.
    fn has_ended(&self, state: &State) -> bool {
        match state {
            State::Connected(fd) => !self.has_messages() && drop_input(fd),
            State::Unconnected | State::Closed => false,
        }
    }

    fn connect<'a>(
        &self,
        state: &'a mut State,
        deadline: Deadline,
    ) -> Result<&'a PeerSocket, SocketError> {
        if matches!(state, State::Unconnected) {
            *state = State::Connected(self.dial(deadline)?);
        }
        match state {
            State::Connected(fd) => Ok(fd),
            State::Unconnected | State::Closed => Err(SocketError::Closed),
        }
    }

    fn dial(&self, deadline: Deadline) -> Result<PeerSocket, SocketError> {
        let mut error = SocketError::Closed;
        for endpoint in &self.endpoints {
            match dial_as(endpoint, self.kind, deadline, &Follower) {
                Ok(fd) => return Ok(fd),
                Err(Errno::ETIMEDOUT) if deadline.expired() => {
                    return Err(SocketError::TimedOut);
                }
                Err(errno) => {
                    error = SocketError::Connect { endpoint: endpoint.to_string(), errno };
                }
            }
        }
        Err(error)
    }

    fn send_once(
        &self,
        state: &mut State,
        bytes: &[u8],
        deadline: Deadline,
    ) -> Result<(), SocketError> {
        let fd = self.connect(state, deadline)?;
        let Err(errno) = send_all(fd, bytes, deadline) else { return Ok(()) };
        if self.is_fatal(errno) {
            *state = if self.declared { State::Unconnected } else { State::Closed };
        }
        if errno == Errno::ETIMEDOUT && deadline.expired() {
            return Err(SocketError::TimedOut);
        }
        let shown: Vec<String> = self.endpoints.iter().map(ToString::to_string).collect();
        Err(SocketError::Send { endpoint: shown.join(", "), errno })
    }

    /// Whether an error ends the connection, not just the message.
    fn is_fatal(&self, errno: Errno) -> bool {
        let passes =
            matches!(errno, Errno::EMSGSIZE | Errno::ETIMEDOUT | Errno::ENOBUFS | Errno::ENOMEM);
        !self.has_messages() || !passes
    }
}

fn send_all(fd: &PeerSocket, mut bytes: &[u8], deadline: Deadline) -> Result<(), Errno> {
    loop {
        let timeout = socket_timeout(deadline).ok_or(Errno::ETIMEDOUT)?;
        setsockopt(fd, sockopt::SendTimeout, &timeout)?;
        match send(fd.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            // Only a stream takes a part.
            Ok(taken) if taken < bytes.len() => bytes = &bytes[taken..],
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(Errno::ETIMEDOUT),
            Err(errno) => return Err(errno),
        }
    }
}

/// Drops the input that has been received, without waiting for more. Returns whether the peer has
/// ended the stream.
fn drop_input(fd: &PeerSocket) -> bool {
    /// Most reads; a peer that sends faster is not waited for.
    const READS: usize = 64;
    let mut buffer = [0; 4096];
    for _ in 0..READS {
        match fd.recv(&mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(1..) | Err(PeerError::Os(Errno::EINTR)) => {}
            Err(PeerError::Os(Errno::EAGAIN)) => return false,
            Ok(0) | Err(_) => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::recv;
    use std::io::Read;
    use std::net::TcpListener;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    fn tcp() -> (TcpListener, Vec<Endpoint>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let endpoint = Endpoint::Inet(listener.local_addr().expect("address"));
        (listener, vec![endpoint])
    }

    fn accepted(listener: &TcpListener) -> String {
        let mut text = String::new();
        listener.accept().expect("accept").0.read_to_string(&mut text).expect("read");
        text
    }

    #[test]
    fn a_stream_of_large_pieces() {
        let (listener, endpoints) = tcp();
        let reader = std::thread::spawn(move || accepted(&listener).len());
        let socket = OutgoingSocket::new(endpoints, SockType::Stream, false);
        let piece = vec![b'x'; 3 << 20];
        socket.send(&piece, soon()).expect("sent");
        socket.send(&piece, soon()).expect("sent");
        socket.close(soon()).expect("closed");
        assert_eq!(reader.join().expect("read"), 6 << 20);
        assert!(matches!(socket.send(b"x", soon()), Err(SocketError::Closed)));
    }

    #[test]
    fn a_declared_stream_is_connected_again() {
        let (listener, endpoints) = tcp();
        let socket = OutgoingSocket::new(endpoints, SockType::Stream, true);
        socket.send(b"one", soon()).expect("sent");
        socket.release();
        assert_eq!(accepted(&listener), "one");
        socket.send(b"two", soon()).expect("sent");
        let (peer, _) = listener.accept().expect("accept");
        drop(peer);
        // The end of the second connection arrives at once over loopback, and is noticed.
        while !socket.has_ended(&socket.state.lock()) {
            std::thread::yield_now();
        }
        socket.send(b"three", soon()).expect("sent");
        socket.release();
        assert_eq!(accepted(&listener), "three");
    }

    #[test]
    fn a_receiver_of_messages_may_be_restarted() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let mut buffer = [0; 10];
        let first = UnixDatagram::bind(&path).expect("bind");
        let endpoints = vec![Endpoint::Path(path.clone())];
        let declared = OutgoingSocket::new(endpoints.clone(), SockType::Datagram, true);
        let other = OutgoingSocket::new(endpoints, SockType::Datagram, false);
        for socket in [&declared, &other] {
            socket.send(b"a", soon()).expect("sent");
            assert_eq!(first.recv(&mut buffer).expect("received"), 1);
        }
        drop(first);
        std::fs::remove_file(&path).expect("removed");
        let second = UnixDatagram::bind(&path).expect("bind");
        declared.send(b"bc", soon()).expect("sent");
        assert_eq!(second.recv(&mut buffer).expect("received"), 2);
        let error = other.send(b"d", soon()).expect_err("the first receiver is gone");
        assert!(error.to_string().ends_with("Connection refused"), "{error}");
        assert!(matches!(other.send(b"d", soon()), Err(SocketError::Closed)));
    }

    #[test]
    fn packets_keep_their_bounds() {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, UnixAddr, accept, bind, listen, socket,
        };
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
                .expect("socket");
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).expect("path")).expect("bind");
        listen(&listener, Backlog::new(1).expect("backlog")).expect("listen");
        let socket = OutgoingSocket::new(vec![Endpoint::Path(path)], SockType::SeqPacket, false);
        socket.send(b"one", soon()).expect("sent");
        socket.send(b"three", soon()).expect("sent");
        let peer = accept(listener.as_raw_fd()).expect("accept");
        let mut buffer = [0; 10];
        assert_eq!(recv(peer, &mut buffer, MsgFlags::empty()), Ok(3));
        assert_eq!(recv(peer, &mut buffer, MsgFlags::empty()), Ok(5));
        nix::unistd::close(peer).expect("closed");
    }

    #[test]
    fn who_reads_nothing_is_not_waited_for() {
        let (listener, endpoints) = tcp();
        let socket = OutgoingSocket::new(endpoints, SockType::Stream, false);
        let short = Deadline::after(Duration::from_millis(50));
        let error = socket.send(&vec![0; 64 << 20], short).expect_err("a full buffer");
        assert!(matches!(error, SocketError::TimedOut), "{error}");
        assert!(matches!(socket.send(b"x", soon()), Err(SocketError::Closed)));
        drop(listener);
    }

    #[test]
    fn a_message_that_is_too_long_costs_only_itself() {
        let receiver = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        let endpoint = Endpoint::Inet(receiver.local_addr().expect("address"));
        let socket = OutgoingSocket::new(vec![endpoint], SockType::Datagram, false);
        let error = socket.send(&[0; 70_000], soon()).expect_err("too long");
        assert!(matches!(error, SocketError::Send { errno: Errno::EMSGSIZE, .. }), "{error}");
        socket.send(b"x", soon()).expect("sent");
    }
}
