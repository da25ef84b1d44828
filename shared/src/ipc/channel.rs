//! One end of a `SOCK_SEQPACKET` pair that carries [`super::message`]s and descriptors.
//!
//! # Failure
//! [`SendError::Full`] is what a non-blocking send gets when the other side
//! doesn't read; the caller decides what that means. [`RecvError::Malformed`]
//! means the other process is not to be trusted any more.

use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use super::message::Direction;
use crate::sys::fdpass;

/// Most descriptors that one message carries (a worker's two sockets).
pub const MAX_FDS: usize = 2;

/// Largest datagram: a declaration with many listeners, or a record with 32 KiB
/// of recipients, stays far below; the kernel's default socket buffer is 208 KiB.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Why a message could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The other side doesn't read fast enough.
    #[error("the socket's buffer is full")]
    Full,
    /// The other process is gone.
    #[error("the other process has closed the channel")]
    Closed,
    /// The message can't be encoded within [`MAX_MESSAGE`].
    #[error("message of more than {MAX_MESSAGE} bytes")]
    TooLarge,
    /// Anything else, such as ETOOMANYREFS or ENOMEM.
    #[error("sendmsg: {0}")]
    Os(Errno),
}

/// Why no message could be received.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// Nothing there now, or the receive timeout ran out.
    #[error("no message")]
    Empty,
    /// The other side has closed, or shut down, its end.
    #[error("end of channel")]
    Closed,
    /// A descriptor was sent but this process had none free.
    #[error("a descriptor was lost: too many open files")]
    DescriptorLost(Option<u64>),
    /// The bytes are no message of this direction.
    #[error("malformed message")]
    Malformed,
    /// Anything else.
    #[error("recvmsg: {0}")]
    Os(Errno),
}

/// A message with the descriptors that came with it.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// As many as were sent, all close-on-exec.
    pub fds: fdpass::Fds,
}

/// One end: sends `Out`, receives `In`.
pub struct Channel<Out, In> {
    fd: OwnedFd,
    directions: PhantomData<fn(Out) -> In>,
}

impl<Out, In> std::fmt::Debug for Channel<Out, In> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Channel").field(&self.fd.as_raw_fd()).finish()
    }
}

impl<Out, In> AsFd for Channel<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<Out, In> From<Channel<Out, In>> for OwnedFd {
    fn from(channel: Channel<Out, In>) -> Self {
        channel.fd
    }
}

impl<Out: Direction, In: Direction> Channel<Out, In> {
    /// A new pair: the other end has the directions swapped. Both are close-on-exec.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn pair() -> Result<(Self, Channel<In, Out>), Errno> {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self::from_fd(a), Channel::from_fd(b)))
    }

    /// Takes a descriptor that is one end of such a pair.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, directions: PhantomData }
    }

    /// Sends, waiting while the buffer is full.
    ///
    /// # Errors
    /// See [`SendError`]; never `Full`.
    pub fn send(
        &self,
        message: &Out::Message<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        self.send_flags(message, fds, MsgFlags::MSG_NOSIGNAL)
    }

    /// Sends without waiting.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn try_send(
        &self,
        message: &Out::Message<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        self.send_flags(message, fds, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)
    }

    fn send_flags(
        &self,
        message: &Out::Message<'_>,
        fds: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<(), SendError> {
        let mut small = [0; 1024];
        let large;
        let bytes: &[u8] = match postcard::to_slice(message, &mut small) {
            Ok(bytes) => bytes,
            Err(_) => {
                large = postcard::to_stdvec(message).map_err(|_| SendError::TooLarge)?;
                &large
            }
        };
        if bytes.len() > MAX_MESSAGE {
            return Err(SendError::TooLarge);
        }
        let mut raw = [-1; MAX_FDS];
        let count = fds.len().min(MAX_FDS);
        for (slot, fd) in raw.iter_mut().zip(fds) {
            *slot = fd.as_raw_fd();
        }
        let rights = [ControlMessage::ScmRights(&raw[..count])];
        let control: &[ControlMessage<'_>] = if count == 0 { &[] } else { &rights };
        loop {
            match sendmsg::<()>(self.fd.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(SendError::Full),
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => {
                    return Err(SendError::Closed);
                }
                Err(Errno::EMSGSIZE) => return Err(SendError::TooLarge),
                Err(error) => return Err(SendError::Os(error)),
            }
        }
    }

    /// Receives one message into `buffer`, waiting for it (at most the socket's
    /// receive timeout, if it has one).
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn recv<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Received<In::Message<'b>>, RecvError> {
        self.recv_flags(buffer, MsgFlags::empty())
    }

    /// Receives one message if there is one.
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn try_recv<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Received<In::Message<'b>>, RecvError> {
        self.recv_flags(buffer, MsgFlags::MSG_DONTWAIT)
    }

    fn recv_flags<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
        flags: MsgFlags,
    ) -> Result<Received<In::Message<'b>>, RecvError> {
        let received = loop {
            match fdpass::recv(self.fd.as_fd(), &mut IoSliceMut::new(&mut buffer.bytes), flags) {
                Ok(received) => break received,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(RecvError::Empty),
                Err(Errno::ECONNRESET) => return Err(RecvError::Closed),
                Err(error) => return Err(RecvError::Os(error)),
            }
        };
        if received.length == 0 {
            return Err(RecvError::Closed);
        }
        let bytes = buffer.bytes.get(..received.length).ok_or(RecvError::Malformed)?;
        if received.truncated {
            return Err(RecvError::Malformed);
        }
        if received.descriptor_lost {
            // The first field of a `Job` is its number: enough to report it lost.
            return Err(RecvError::DescriptorLost(
                postcard::take_from_bytes::<u64>(bytes).ok().map(|(job, _)| job),
            ));
        }
        let message = postcard::from_bytes(bytes).map_err(|_| RecvError::Malformed)?;
        Ok(Received { message, fds: received.fds })
    }
}

/// Room for one message; reused, so that receiving allocates nothing.
#[derive(Debug)]
pub struct RecvBuffer {
    bytes: Box<[u8]>,
}

impl RecvBuffer {
    /// A buffer for any message.
    pub fn new() -> Self {
        Self { bytes: vec![0; MAX_MESSAGE].into_boxed_slice() }
    }

    /// A buffer for messages that are known to be short, such as a [`super::message::Job`].
    pub fn small() -> Self {
        Self { bytes: vec![0; 256].into_boxed_slice() }
    }
}

impl Default for RecvBuffer {
    fn default() -> Self {
        Self::new()
    }
}
