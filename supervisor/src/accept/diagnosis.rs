//! What only the kernel knows about a listening socket (sock_diag(7)): which file a local socket
//! was bound to, and how many connections wait to be accepted. The path says nothing about the
//! file: whoever may write the directory can put another file there at any moment.
//!
//! # Failure
//! Every error is the errno of the failed call. The calls never wait.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::sys::stat::fstat;
use qrelay_shared::sys::net;

/// `SOCK_DIAG_BY_FAMILY` of include/uapi/linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST` of include/uapi/linux/netlink.h.
const REQUEST: u16 = 1;
/// `UDIAG_SHOW_VFS` and `UNIX_DIAG_VFS` of include/uapi/linux/unix_diag.h.
const SHOW_FILE: u32 = 2;
const FILE: u16 = 1;
/// `UDIAG_SHOW_RQLEN` and `UNIX_DIAG_RQLEN` of include/uapi/linux/unix_diag.h.
const SHOW_QUEUE: u32 = 16;
const QUEUE: u16 = 4;
/// Sizes of `struct nlmsghdr`, `struct unix_diag_msg` and `struct nlattr`, in bytes.
const HEADER: usize = 16;
const MESSAGE: usize = 16;
const ATTRIBUTE: usize = 4;

/// Returns the lower 32 bits of the number of the inode that a socket was bound to; `None` if the
/// kernel can't say.
pub(super) fn bound_inode(socket: &OwnedFd) -> Option<u32> {
    // A kernel without unix_diag, or a sandbox without AF_NETLINK, refuses one of the calls.
    let answer = answer_of(&query(fstat(socket).ok()?.st_ino as u32, SHOW_FILE)).ok()?;
    word(attribute(&answer, FILE)?, 0)
}

/// A queue of connections that aren't accepted yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Queue {
    /// Number of connections in it.
    pub(super) waiting: u64,
    /// Most connections in it.
    pub(super) limit: u64,
}

/// Returns the queue of a local socket that listens; `None` if the kernel can't say.
pub(super) fn queue(socket: impl AsFd) -> Option<Queue> {
    let answer = answer_of(&query(fstat(socket).ok()?.st_ino as u32, SHOW_QUEUE)).ok()?;
    // struct unix_diag_rqlen.
    let lengths = attribute(&answer, QUEUE)?;
    Some(Queue { waiting: word(lengths, 0)?.into(), limit: word(lengths, 1)?.into() })
}

/// Returns the queue of a TCP socket that listens; `None` if the kernel can't say.
pub(super) fn tcp_queue(socket: impl AsFd) -> Option<Queue> {
    let (waiting, limit) = net::tcp_backlog(socket.as_fd()).ok()?;
    Some(Queue { waiting: waiting.into(), limit: limit.into() })
}

/// Returns the request about the socket with this number, in the machine's byte order.
fn query(socket: u32, show: u32) -> Vec<u8> {
    // struct unix_diag_req: family, protocol and padding; states; socket; what to show; cookie.
    let family = u32::from_ne_bytes([libc_family(), 0, 0, 0]);
    let body = [family, u32::MAX, socket, show, u32::MAX, u32::MAX];
    let length = (HEADER + size_of_val(&body)) as u32;
    let mut bytes = Vec::with_capacity(HEADER + size_of_val(&body));
    bytes.extend(length.to_ne_bytes());
    bytes.extend([BY_FAMILY, REQUEST].iter().flat_map(|half| half.to_ne_bytes()));
    bytes.extend([0; 8]);
    bytes.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
    bytes
}

fn libc_family() -> u8 {
    AddressFamily::Unix as u8
}

fn answer_of(query: &[u8]) -> Result<Vec<u8>, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let line =
        socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkSockDiag)?;
    send(line.as_raw_fd(), query, MsgFlags::empty())?;
    let mut answer = vec![0; 4096];
    // The kernel has answered by the time that `send` returns.
    let length = recv(line.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    Ok(answer)
}

/// Returns a word of an attribute's value.
fn word(value: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(4 * at..)?.get(..4)?.try_into().ok()?))
}

/// Returns the value of an attribute in an answer.
fn attribute(answer: &[u8], wanted: u16) -> Option<&[u8]> {
    let half = |at: &[u8]| Some(u16::from_ne_bytes(at.get(..2)?.try_into().ok()?));
    if half(answer.get(4..)?)? != BY_FAMILY {
        return None;
    }
    let mut rest = answer.get(HEADER + MESSAGE..)?;
    loop {
        let (length, kind) = (usize::from(half(rest)?), half(rest.get(2..)?)?);
        let value = rest.get(ATTRIBUTE..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(ATTRIBUTE)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn the_kernel_knows_the_file_after_it_was_moved_and_removed() {
        let path = format!("/tmp/qrelay-inode-{}", std::process::id());
        let socket = OwnedFd::from(UnixListener::bind(&path).expect("bind"));
        let inode = std::fs::metadata(&path).expect("a file").ino() as u32;
        assert_eq!(bound_inode(&socket), Some(inode));
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "").expect("another file");
        assert_eq!(bound_inode(&socket), Some(inode));
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn the_kernel_knows_what_waits() {
        let path = format!("/tmp/qrelay-queue-{}", std::process::id());
        let local = UnixListener::bind(&path).expect("bind");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = tcp.local_addr().expect("address");
        let _clients: Vec<_> =
            (0..3).map(|_| (UnixStream::connect(&path), TcpStream::connect(address))).collect();
        for queue in [queue(&local), tcp_queue(&tcp)] {
            let queue = queue.expect("the kernel says it");
            assert_eq!(queue.waiting, 3, "{queue:?}");
            assert!(queue.limit >= 3, "{queue:?}");
        }
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn what_is_no_answer() {
        let (socket, _other) = UnixStream::pair().expect("pair");
        assert_eq!(bound_inode(&socket.into()), None, "a socket without a file");
        let inode_in = |answer: &[u8]| word(attribute(answer, FILE)?, 0);
        let good = |length: u16, kind: u16| {
            let mut bytes = vec![0; HEADER + MESSAGE];
            bytes[4] = BY_FAMILY.to_ne_bytes()[0];
            bytes[5] = BY_FAMILY.to_ne_bytes()[1];
            bytes.extend([length, kind].iter().flat_map(|half| half.to_ne_bytes()));
            bytes.extend([7_u32, 9].iter().flat_map(|word| word.to_ne_bytes()));
            bytes
        };
        assert_eq!(inode_in(&good(12, FILE)), Some(7));
        for bytes in [good(12, 3), good(0, 3), good(3, FILE), good(4, FILE), good(90, FILE)] {
            assert_eq!(inode_in(&bytes), None, "{bytes:?}");
        }
        for length in 0..good(12, FILE).len() - 4 {
            assert_eq!(inode_in(&good(12, FILE)[..length]), None, "{length}");
        }
    }
}
