//! Answers a client in such a way that the client can read the answer.
//!
//! Contract: the end of the stream follows the reply at once. Closing a socket with unread data in
//! it resets the connection, and the client then loses the reply. So [`linger`] comes before a
//! close where data may be unread.
//!
//! # Failure
//! A client that is gone, or doesn't read, gets no answer. No error is reported.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, send};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::sys::rights::{Look, MoreInput, PeerError, PeerSocket};
use qrelay_shared::sys::wait::wait;

use crate::delivery::lead::Lead;

/// How long a reply (at most 262 bytes) may wait for a client that doesn't read.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the rest of a request is read and dropped.
const LINGER: Duration = Duration::from_secs(2);

/// Sends the reply and ends the stream.
pub(crate) fn answer(client: &PeerSocket, reply: &Reply, input: MoreInput, lead: &dyn Lead) {
    // A client that doesn't get the whole reply sees the stream end early, and tries again later.
    let _ = send_all(client.as_fd(), &reply.encode(), SEND_TIMEOUT, lead);
    client.end_output(input);
}

fn send_all(
    client: BorrowedFd<'_>,
    mut bytes: &[u8],
    timeout: Duration,
    lead: &dyn Lead,
) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let mut deadline = None;
    while !bytes.is_empty() {
        match send(client.as_raw_fd(), bytes, flags) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                lead.give_up();
                let deadline = *deadline.get_or_insert_with(|| Deadline::after(timeout));
                if wait(client, PollFlags::POLLOUT, deadline)?.is_empty() {
                    return Err(Errno::ETIMEDOUT);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns whether the client has sent something after its request, which [`linger`] drops.
pub(crate) fn has_surplus(client: &PeerSocket) -> bool {
    client.look() == Ok(Look::Data)
}

/// Reads and drops bytes until the client has closed its side, for at most [`LINGER`]. Bytes that
/// came with descriptors end it.
pub(crate) fn linger(client: &PeerSocket) {
    let mut scratch = [0; 16 * 1024];
    let deadline = Deadline::after(LINGER);
    while !deadline.expired() {
        match client.recv(&mut scratch, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return,
            Ok(_) | Err(PeerError::Os(Errno::EINTR)) => {}
            Err(PeerError::Os(Errno::EAGAIN)) => {
                match wait(client.as_fd(), PollFlags::POLLIN, deadline) {
                    Ok(ready) if !ready.is_empty() => {}
                    _ => return,
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;

    use qrelay_shared::sys::rights::Rights;

    use crate::delivery::lead::Follower;

    fn pair(rights: Rights) -> (UnixStream, PeerSocket) {
        let (client, server) = UnixStream::pair().expect("pair");
        (client, PeerSocket::new(server.into(), rights))
    }

    #[test]
    fn the_reply_survives_unread_input() {
        for rights in [Rights::Refused, Rights::Possible] {
            let (mut client, server) = pair(rights);
            client.write_all(&[b'x'; 100_000]).expect("write");
            answer(&server, &Reply::permanent("malformed input"), MoreInput::Likely, &Follower);
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    linger(&server);
                    drop(server);
                });
                let mut reply = String::new();
                client.read_to_string(&mut reply).expect("no reset");
                assert_eq!(reply, "16:Dmalformed input,");
                client.shutdown(std::net::Shutdown::Write).expect("shutdown");
            });
        }
    }

    #[test]
    fn surplus_is_dropped() {
        let (mut client, server) = pair(Rights::Refused);
        answer(&server, &Reply::accepted("ok"), MoreInput::Unlikely, &Follower);
        assert!(!has_surplus(&server));
        client.write_all(b"surplus").expect("write");
        client.shutdown(std::net::Shutdown::Write).expect("shutdown");
        assert!(has_surplus(&server));
        linger(&server);
        drop(server);
        let mut reply = String::new();
        client.read_to_string(&mut reply).expect("no reset");
        assert_eq!(reply, "3:Kok,");
    }

    #[test]
    fn surplus_is_dropped_where_descriptors_can_come() {
        let (mut client, server) = pair(Rights::Possible);
        client.write_all(b"surplus").expect("write");
        answer(&server, &Reply::accepted("ok"), MoreInput::Unlikely, &Follower);
        assert!(has_surplus(&server));
        linger(&server);
        client.write_all(b"more").expect_err("the stream is over");
        drop(server);
        let mut reply = String::new();
        client.read_to_string(&mut reply).expect("no reset");
        assert_eq!(reply, "3:Kok,");
    }

    #[test]
    fn a_client_that_does_not_read_is_given_up() {
        let soon = Duration::from_millis(5);
        let (client, server) = UnixStream::pair().expect("pair");
        server.set_nonblocking(true).expect("nonblocking");
        loop {
            match (&server).write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(send_all(server.as_fd(), b"3:Kok,", soon, &Follower), Err(Errno::ETIMEDOUT));
        drop(client);
        assert_eq!(send_all(server.as_fd(), b"3:Kok,", soon, &Follower), Err(Errno::EPIPE));
    }
}
