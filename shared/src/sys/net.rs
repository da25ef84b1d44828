//! Options and calls for sockets that nix lacks: receiving into memory that has not been written
//! before, delayed acknowledgements, and the length of a queue.
//!
//! # Failure
//! Every error is the errno of the failed call; a buffer is unchanged then.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

/// Receives into the spare capacity of `buffer`. Returns the number of received bytes, which is 0
/// at the end of the stream, and when there is no spare capacity.
///
/// # Errors
/// As recv(2).
pub fn recv_append(
    socket: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    flags: MsgFlags,
) -> Result<usize, Errno> {
    let spare = buffer.spare_capacity_mut();
    // SAFETY: the kernel writes at most `spare.len()` bytes to `spare`. The bytes need not be
    // initialised for that, and no other code refers to them.
    let received = unsafe {
        libc::recv(socket.as_raw_fd(), spare.as_mut_ptr().cast(), spare.len(), flags.bits())
    };
    let received = usize::try_from(Errno::result(received)?).map_err(|_| Errno::EIO)?;
    // SAFETY: the kernel has just written `received` bytes after the old length, within the
    // capacity.
    unsafe { buffer.set_len(buffer.len() + received) };
    Ok(received)
}

/// Makes a TCP socket send its acknowledgements with its data where it can, from the handshake on:
/// the request carries the acknowledgement that ends the handshake, and the end of the connection
/// carries the one for the reply. A short exchange then needs two packets less, on both sides
/// (tcp(7), TCP_QUICKACK).
///
/// # Errors
/// As setsockopt(2).
pub fn delay_acks(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let off: libc::c_int = 0;
    // SAFETY: the pointer and the length describe a live integer.
    Errno::result(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_QUICKACK,
            std::ptr::from_ref(&off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Returns how many connections wait at a TCP socket that listens, and how many may wait
/// (tcp(7), TCP_INFO; for such a socket, `tcp_get_info` of net/ipv4/tcp.c puts both into fields
/// with other names).
///
/// # Errors
/// As getsockopt(2).
pub fn tcp_backlog(socket: BorrowedFd<'_>) -> Result<(u32, u32), Errno> {
    // SAFETY: every bit pattern is a valid value of this struct of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the pointers describe live memory of the length that is passed.
    Errno::result(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut length,
        )
    })?;
    Ok((info.tcpi_unacked, info.tcpi_sacked))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn appends_within_capacity() {
        let (mut a, b) = UnixStream::pair().expect("pair");
        a.write_all(b"hello world").expect("write");
        let mut buffer = Vec::with_capacity(64);
        buffer.extend_from_slice(b"> ");
        buffer.shrink_to(7);
        let room = buffer.capacity() - buffer.len();
        let first = recv_append(b.as_fd(), &mut buffer, MsgFlags::empty()).expect("recv");
        assert_eq!(first, room.min(11));
        buffer.reserve_exact(64);
        drop(a);
        while recv_append(b.as_fd(), &mut buffer, MsgFlags::empty()).expect("recv") > 0 {}
        assert_eq!(buffer, b"> hello world");
    }

    #[test]
    fn says_when_nothing_is_there() {
        let (_a, b) = UnixStream::pair().expect("pair");
        let mut buffer = Vec::with_capacity(8);
        let nothing = recv_append(b.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        assert_eq!(nothing, Err(Errno::EAGAIN));
    }
}
