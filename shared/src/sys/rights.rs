//! Descriptors that a peer passes by SCM_RIGHTS although nobody has asked for them.
//!
//! The kernel keeps passed descriptors in the receiver's queue. Whoever reads or drops the bytes
//! that they came with, or closes the socket, also drops the descriptors. The last close of some
//! files waits: that of a TCP socket with SO_LINGER for as long as its owner likes. No thread that
//! serves others may be the one that waits, so there are two lines of defence:
//!
//! - [`refuse`] has the kernel refuse descriptors (SO_PASSRIGHTS, Linux 6.16).
//! - Where it can't, a [`PeerSocket`] looks at each piece of its input before reading it. A look
//!   (MSG_PEEK) only duplicates the passed descriptors for a moment, and the queue keeps the last
//!   reference. Input with descriptors is never read, and the whole socket goes to the `closer`.
//!
//! No passed descriptor is ever received on this way, because received descriptors would fill this
//! process's table, and the kernel drops the ones that have no room.
//!
//! # Failure
//! Every error is the errno of the failed call; a buffer is unchanged then.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, setsockopt, shutdown, sockopt};
use serde::{Deserialize, Serialize};

use crate::sys::closer::GuardedFd;

/// SO_PASSRIGHTS of Linux 6.16, which the crate libc lacks.
const SO_PASSRIGHTS: c_int = 83;

/// Environment variable that turns SO_PASSRIGHTS off, so that tests cover both lines of defence.
const SWITCH: &str = "QRELAY_TEST_PASSRIGHTS";

/// Whether a socket's queue can hold passed descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rights {
    /// The kernel refuses them.
    Refused,
    /// The peer can pass descriptors.
    Possible,
}

/// Has the kernel refuse descriptors for a local socket, and for all that it accepts. Descriptors
/// that are in its queue already stay there.
pub fn refuse(socket: BorrowedFd<'_>) -> Rights {
    static OFF: OnceLock<bool> = OnceLock::new();
    if *OFF.get_or_init(|| std::env::var_os(SWITCH).is_some_and(|value| value == "off")) {
        return Rights::Possible;
    }
    let off: c_int = 0;
    // SAFETY: the pointer and the length describe a live integer.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            std::ptr::from_ref(&off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    };
    if result == 0 { Rights::Refused } else { Rights::Possible }
}

/// Returns whether the next datagram of a local socket has descriptors, without receiving it.
///
/// # Errors
/// As recvmsg(2).
pub(crate) fn datagram_has_rights(socket: BorrowedFd<'_>, flags: MsgFlags) -> Result<bool, Errno> {
    let (_, rights) = receive(socket, &mut [], flags | MsgFlags::MSG_PEEK)?;
    Ok(rights)
}

/// Calls recvmsg(2) without room for descriptors. Returns the number of bytes, and whether
/// descriptors came with them.
///
/// # Errors
/// As recvmsg(2).
fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    flags: MsgFlags,
) -> Result<(usize, bool), Errno> {
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeros is a valid msghdr: no name, no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    // SAFETY: `header` points to `slice`, and `slice` to `buffer` with its true length. Both
    // outlive the call, and no other code refers to them.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags.bits()) };
    let received = usize::try_from(Errno::result(result)?).map_err(|_| Errno::EIO)?;
    Ok((received, header.msg_flags & libc::MSG_CTRUNC != 0))
}

/// Why nothing was read from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// As recv(2).
    #[error("{0}")]
    Os(#[from] Errno),
    /// The peer has passed descriptors with the next bytes. They stay where they are, and nothing
    /// after them can be read.
    #[error("the peer has passed descriptors")]
    Rights,
}

/// The input of a peer, as a look shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// There are bytes to read.
    Data,
    /// The queue is empty, and nothing can come any more.
    End,
}

/// A connected socket, usually of a stream, whose peer isn't trusted. Dropping it closes it without
/// waiting.
#[derive(Debug)]
pub struct PeerSocket {
    fd: GuardedFd,
    rights: Rights,
    /// The input has ended, and all of it has been read.
    ended: AtomicBool,
    /// The socket has messages, so that no bytes may mean an empty message.
    messages: bool,
}

impl AsFd for PeerSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl PeerSocket {
    /// Takes a socket from which nothing has been read. Urgent data counts as part of its input
    /// from now on if descriptors can come, because the kernel drops urgent data, and what was
    /// passed with it, in the middle of other calls (net/unix/af_unix.c, `manage_oob`).
    pub fn new(fd: OwnedFd, rights: Rights) -> Self {
        if rights == Rights::Possible {
            // The call can't fail for a socket.
            let _ = setsockopt(&fd, sockopt::OobInline, &true);
        }
        Self::prepared(fd, rights)
    }

    /// Takes another process's socket, for which [`Self::new`] was called there.
    pub fn prepared(fd: OwnedFd, rights: Rights) -> Self {
        Self { fd: GuardedFd::from(fd), rights, ended: AtomicBool::new(false), messages: false }
    }

    /// Has the socket taken for one with messages instead of a stream.
    pub fn with_messages(mut self) -> Self {
        self.messages = true;
        self
    }

    /// Returns whether descriptors can come.
    pub fn rights(&self) -> Rights {
        self.rights
    }

    /// Looks at the input without reading or waiting.
    ///
    /// # Errors
    /// See [`PeerError`]; EAGAIN if nothing has come.
    pub fn look(&self) -> Result<Look, PeerError> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match self.peek(&mut [0], flags)? {
            0 => Ok(Look::End),
            _ => Ok(Look::Data),
        }
    }

    fn peek(&self, buffer: &mut [u8], flags: MsgFlags) -> Result<usize, PeerError> {
        // SAFETY: the two types have the same layout, and the kernel only writes bytes that are
        // initialised.
        let buffer = unsafe { &mut *(std::ptr::from_mut(buffer) as *mut [MaybeUninit<u8>]) };
        self.peek_into(buffer, flags)
    }

    fn peek_into(
        &self,
        buffer: &mut [MaybeUninit<u8>],
        flags: MsgFlags,
    ) -> Result<usize, PeerError> {
        match receive(self.fd.as_fd(), buffer, flags | MsgFlags::MSG_PEEK)? {
            (_, true) => Err(PeerError::Rights),
            (0, false) => {
                self.ended.store(true, Ordering::Relaxed);
                Ok(0)
            }
            (received, false) => Ok(received),
        }
    }

    /// Reads into `buffer`, which isn't empty. Returns the number of bytes, which is 0 at the end
    /// of the input.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub fn recv(&self, buffer: &mut [u8], flags: MsgFlags) -> Result<usize, PeerError> {
        if self.rights == Rights::Refused {
            return Ok(recv(self.fd.as_fd().as_raw_fd(), buffer, flags)?);
        }
        let length = self.peek(buffer, flags)?;
        if length == 0 {
            return Ok(0);
        }
        // Just these bytes were looked at, and nobody else reads: no descriptors are among them.
        let seen = buffer.get_mut(..length).unwrap_or_default();
        Ok(recv(self.fd.as_fd().as_raw_fd(), seen, MsgFlags::MSG_DONTWAIT)?)
    }

    /// Reads into the spare capacity of `buffer`, which isn't empty. Returns the number of bytes,
    /// which is 0 at the end of the input.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub fn recv_append(&self, buffer: &mut Vec<u8>, flags: MsgFlags) -> Result<usize, PeerError> {
        if self.rights == Rights::Refused {
            return Ok(crate::sys::net::recv_append(self.fd.as_fd(), buffer, flags)?);
        }
        let spare = buffer.spare_capacity_mut();
        let length = self.peek_into(spare, flags)?;
        if length == 0 {
            return Ok(0);
        }
        // Just these bytes were looked at, and nobody else reads: no descriptors are among them.
        let seen = spare.get_mut(..length).unwrap_or_default();
        let (received, _) = receive(self.fd.as_fd(), seen, MsgFlags::MSG_DONTWAIT)?;
        // SAFETY: the kernel has just written `received` bytes after the old length, within the
        // capacity.
        unsafe { buffer.set_len(buffer.len() + received) };
        Ok(received)
    }

    /// Ends the answer to the peer, which may still send. If descriptors can come, the peer's
    /// sending ends as well when `input` says that none is expected: closing costs less then.
    pub fn end_output(&self, input: MoreInput) {
        let how = match (input, self.rights) {
            (MoreInput::Unlikely, Rights::Possible) => Shutdown::Both,
            _ => Shutdown::Write,
        };
        // The connection may be broken already.
        let _ = shutdown(self.fd.as_fd().as_raw_fd(), how);
    }

    /// Ends the peer's sending: whoever waits for its bytes reads what is there, and then the end.
    pub fn end_input(&self) {
        // The connection may be broken already.
        let _ = shutdown(self.fd.as_fd().as_raw_fd(), Shutdown::Read);
    }

    /// Returns whether the queue holds nothing, and nothing can come any more.
    fn is_over(&self) -> bool {
        !self.messages && (self.ended.load(Ordering::Relaxed) || self.look() == Ok(Look::End))
    }
}

/// Whether more of a peer's input is expected after the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoreInput {
    /// The whole request has been read.
    Unlikely,
    /// A part of the request is unread.
    Likely,
}

impl Drop for PeerSocket {
    fn drop(&mut self) {
        if self.rights == Rights::Refused || self.is_over() {
            return;
        }
        let _ = shutdown(self.fd.as_fd().as_raw_fd(), Shutdown::Both);
        if !self.is_over() {
            self.fd.leave_to_closer();
        }
    }
}
