//! The exchange of a request and its reply with a next hop, over a connected socket.
//!
//! Contract: the request goes out in one call if the kernel takes it, else the reply is watched for
//! between the calls. A `Z` or `D` may come early, and counts even if the connection broke; a `K`
//! counts only once the whole request is written. The first netstring is the reply, whatever
//! follows.
//!
//! # Failure
//! [`ExchangeError`]; the mail may have been accepted all the same, as with every protocol that
//! loses its connection at the wrong moment.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, sendmsg, setsockopt, sockopt};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::qmqp::{Reply, ReplyProgress, Status, parse_reply};
use qrelay_shared::sys::rights::{PeerError, PeerSocket};
use qrelay_shared::sys::wait::{socket_timeout, wait};
use thiserror::Error;

use crate::delivery::lead::Lead;

/// Most pieces that one sendmsg(2) takes (UIO_MAXIOV of Linux).
const MAX_PIECES: usize = 1024;

/// Buffer for a reply, in bytes: more than a usual reply has.
const ROOM: usize = 256;

/// Why there is no reply.
#[derive(Debug, Error)]
pub(super) enum ExchangeError {
    /// Writing or reading failed.
    #[error("{0}")]
    Os(#[from] Errno),
    /// The next hop closed the connection before its reply was complete.
    #[error("the connection was closed without a reply")]
    Closed,
    /// The next hop said `K` before it had the whole request.
    #[error("accepted before the request was complete")]
    Early,
    /// The answer is no QMQP reply.
    #[error("malformed reply")]
    Malformed,
    /// The next hop has passed descriptors.
    #[error("the next hop has passed descriptors")]
    Rights,
    /// The deadline passed.
    #[error("timeout")]
    TimedOut,
}

/// How writing ended.
enum Written {
    /// The kernel has taken everything.
    All,
    /// The next hop takes no more; it may have sent a reply.
    Broken(Errno),
    /// The reply was there first.
    Answered(Reply),
}

/// Sends the request, whose `pieces` are not empty, and reads the reply. What `pieces` are
/// afterwards is unspecified.
///
/// # Errors
/// See [`ExchangeError`].
pub(super) fn exchange(
    socket: &PeerSocket,
    pieces: &mut [IoSlice<'_>],
    deadline: Deadline,
    lead: &dyn Lead,
) -> Result<Reply, ExchangeError> {
    let mut incoming = Incoming::default();
    match write(socket, pieces, (deadline, lead), &mut incoming)? {
        Written::All => {
            if lead.await_input(socket.as_fd(), deadline)
                && let Some(reply) = incoming.read(socket)?
            {
                return Ok(reply);
            }
            // Only a part of the reply has come, or a job.
            lead.give_up();
            incoming.wait(socket, deadline)
        }
        Written::Answered(reply) => not_accepted(reply, ExchangeError::Early),
        Written::Broken(error) => {
            lead.give_up();
            match incoming.wait(socket, deadline) {
                Ok(reply) => not_accepted(reply, ExchangeError::Early),
                Err(ExchangeError::Closed) => Err(error.into()),
                Err(other) => Err(other),
            }
        }
    }
}

fn not_accepted(reply: Reply, error: ExchangeError) -> Result<Reply, ExchangeError> {
    if reply.status == Status::Accepted { Err(error) } else { Ok(reply) }
}

fn write(
    socket: &PeerSocket,
    mut left: &mut [IoSlice<'_>],
    (deadline, lead): (Deadline, &dyn Lead),
    incoming: &mut Incoming,
) -> Result<Written, ExchangeError> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    while !left.is_empty() {
        let now = &left[..left.len().min(MAX_PIECES)];
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), now, &[], flags, None) {
            Ok(sent) => IoSlice::advance_slices(&mut left, sent),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {}
            Err(error @ (Errno::EPIPE | Errno::ECONNRESET)) => return Ok(Written::Broken(error)),
            Err(error) => return Err(error.into()),
        }
        // The kernel takes no more now. Even if it soon does, because the next hop reads as fast as
        // this thread writes, a reply must be seen.
        if !left.is_empty() {
            lead.give_up();
            if let Some(reply) = incoming.watch(socket, deadline)? {
                return Ok(Written::Answered(reply));
            }
        }
    }
    Ok(Written::All)
}

/// The reply as far as it has come. Its length is limited, because a reply that is too long is
/// malformed.
#[derive(Default)]
struct Incoming(Vec<u8>);

impl Incoming {
    /// Waits until more can be written, or a reply is there.
    fn watch(
        &mut self,
        socket: &PeerSocket,
        deadline: Deadline,
    ) -> Result<Option<Reply>, ExchangeError> {
        let ready = wait(socket.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT, deadline)?;
        if ready.is_empty() || deadline.expired() {
            return Err(ExchangeError::TimedOut);
        }
        if !ready.contains(PollFlags::POLLIN) {
            return Ok(None);
        }
        self.look(socket)
    }

    /// Reads the available part of a reply, without waiting.
    fn look(&mut self, socket: &PeerSocket) -> Result<Option<Reply>, ExchangeError> {
        match self.receive(socket, MsgFlags::MSG_DONTWAIT) {
            Ok(received) => self.take(received),
            Err(PeerError::Rights) => Err(ExchangeError::Rights),
            // The next write reports any connection error.
            Err(PeerError::Os(_)) => Ok(None),
        }
    }

    /// Reads what has come of a reply, when nothing more is to be written.
    fn read(&mut self, socket: &PeerSocket) -> Result<Option<Reply>, ExchangeError> {
        match self.receive(socket, MsgFlags::MSG_DONTWAIT) {
            Ok(received) => self.take(received),
            Err(PeerError::Os(Errno::EAGAIN | Errno::EINTR)) => Ok(None),
            Err(PeerError::Os(error)) => Err(error.into()),
            Err(PeerError::Rights) => Err(ExchangeError::Rights),
        }
    }

    /// Waits for the whole reply.
    fn wait(&mut self, socket: &PeerSocket, deadline: Deadline) -> Result<Reply, ExchangeError> {
        loop {
            let timeout = socket_timeout(deadline).ok_or(ExchangeError::TimedOut)?;
            setsockopt(socket, sockopt::ReceiveTimeout, &timeout)?;
            match self.receive(socket, MsgFlags::empty()) {
                Ok(received) => {
                    if let Some(reply) = self.take(received)? {
                        return Ok(reply);
                    }
                }
                Err(PeerError::Os(Errno::EINTR | Errno::EAGAIN)) => {}
                Err(PeerError::Os(error)) => return Err(error.into()),
                Err(PeerError::Rights) => return Err(ExchangeError::Rights),
            }
        }
    }

    fn receive(&mut self, socket: &PeerSocket, flags: MsgFlags) -> Result<usize, PeerError> {
        self.0.reserve(ROOM);
        socket.recv_append(&mut self.0, flags)
    }

    /// Parses the reply after `received` more bytes.
    fn take(&self, received: usize) -> Result<Option<Reply>, ExchangeError> {
        if received == 0 {
            return Err(ExchangeError::Closed);
        }
        match parse_reply(&self.0) {
            ReplyProgress::Complete(reply) => Ok(Some(reply)),
            ReplyProgress::NeedMore => Ok(None),
            ReplyProgress::Malformed => Err(ExchangeError::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::lead::Follower;
    use qrelay_shared::sys::rights::Rights;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    /// Sends `size` bytes to a next hop that behaves as `server` does.
    fn run(size: usize, server: impl FnOnce(TcpStream) + Send) -> String {
        run_within(Duration::from_secs(20), size, server)
    }

    fn run_within(limit: Duration, size: usize, server: impl FnOnce(TcpStream) + Send) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (peer, _) = listener.accept().expect("accept");
        let message = vec![b'x'; size];
        std::thread::scope(|scope| {
            scope.spawn(|| server(peer));
            let socket = PeerSocket::new(client.into(), Rights::Refused);
            let deadline = Deadline::after(limit);
            let mut pieces = [&b"head"[..], &message, b"tail"].map(IoSlice::new);
            match exchange(&socket, &mut pieces, deadline, &Follower) {
                Ok(reply) => String::from_utf8_lossy(&reply.encode()).into_owned(),
                Err(error) => error.to_string(),
            }
        })
    }

    fn read(stream: &mut TcpStream, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        stream.read_exact(&mut bytes).expect("read");
        bytes
    }

    const SMALL: usize = 10;
    /// More than the kernel buffers.
    const LARGE: usize = 64 << 20;

    #[test]
    fn everything_arrives_and_the_first_reply_counts() {
        for size in [SMALL, LARGE] {
            let reply = run(size, |mut stream| {
                let bytes = read(&mut stream, size + 8);
                assert!(bytes.starts_with(b"head") && bytes.ends_with(b"tail"));
                stream.write_all(b"003:Kok,3:Zno,").expect("write");
            });
            assert_eq!(reply, "3:Kok,");
        }
    }

    #[test]
    fn a_reply_in_pieces() {
        let reply = run(SMALL, |mut stream| {
            read(&mut stream, SMALL + 8);
            for byte in b"3:Zno," {
                stream.write_all(&[*byte]).expect("write");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert_eq!(reply, "3:Zno,");
    }

    #[test]
    fn an_early_refusal_stands() {
        let reply = run(LARGE, |mut stream| {
            stream.write_all(b"3:Dno,").expect("write");
            // Left open and unread: only the reply can end the exchange.
            let _ = stream.read(&mut [0; 1]);
            std::thread::sleep(Duration::from_millis(100));
        });
        assert_eq!(reply, "3:Dno,");
    }

    #[test]
    fn an_early_acceptance_is_none() {
        let reply = run(LARGE, |mut stream| {
            stream.write_all(b"3:Kok,").expect("write");
            let _ = stream.read(&mut [0; 1]);
            std::thread::sleep(Duration::from_millis(100));
        });
        assert_eq!(reply, "accepted before the request was complete");
    }

    #[test]
    fn an_early_acceptance_is_none_even_if_all_is_read() {
        for _ in 0..10 {
            let reply = run(LARGE, |mut stream| {
                stream.write_all(b"3:Kok,").expect("write");
                let mut chunk = [0; 1 << 20];
                while matches!(stream.read(&mut chunk), Ok(1..)) {}
            });
            assert_eq!(reply, "accepted before the request was complete");
        }
    }

    #[test]
    fn a_refusal_survives_a_broken_connection() {
        let reply = run(LARGE, |mut stream| {
            read(&mut stream, 1000);
            stream.write_all(b"3:Zno,").expect("write");
        });
        assert_eq!(reply, "3:Zno,");
    }

    #[test]
    fn no_reply() {
        for size in [SMALL, LARGE] {
            let reply = run(size, |mut stream| {
                read(&mut stream, SMALL + 8);
            });
            assert!(
                reply == "the connection was closed without a reply"
                    || reply == Errno::EPIPE.to_string()
                    || reply == Errno::ECONNRESET.to_string(),
                "{reply}"
            );
        }
        let reply = run(SMALL, |mut stream| {
            read(&mut stream, SMALL + 8);
            stream.write_all(b"3:K").expect("write");
        });
        assert_eq!(reply, "the connection was closed without a reply");
    }

    #[test]
    fn nonsense() {
        for nonsense in [&b"HTTP/1.1 400\r\n"[..], b"2:Xx,", b"99999:K", &[b'0'; 5000]] {
            let reply = run(SMALL, |mut stream| {
                read(&mut stream, SMALL + 8);
                let _ = stream.write_all(nonsense);
                let _ = stream.read(&mut [0; 1]);
            });
            assert_eq!(reply, "malformed reply");
        }
    }

    #[test]
    fn silence() {
        for size in [SMALL, LARGE] {
            let reply = run_within(Duration::from_millis(100), size, |mut stream| {
                // Until the sender has given up; what it has sent isn't read before.
                std::thread::sleep(Duration::from_millis(300));
                let _ = stream.read(&mut [0; 1]);
                drop(stream);
            });
            assert_eq!(reply, "timeout");
        }
    }
}
