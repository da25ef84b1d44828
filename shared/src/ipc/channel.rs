//! Channels between processes: `SOCK_SEQPACKET` pairs that carry [`super::message`]s and
//! descriptors.
//!
//! Contract: a datagram holds one message, or several where both ends expect several ([`Batch`],
//! [`Messages`]). Under load one system call and one wake-up then serve all of them. The
//! descriptors of a datagram belong to those of its messages that have one, in their order.
//!
//! A channel to a process that isn't trusted ([`Channel::foreign`]) has no descriptors in its
//! queue. Where the kernel can't refuse them, their close may wait: the closer closes such a
//! channel, and messages with descriptors are [`RecvError::Rights`].
//!
//! # Failure
//! [`SendError::Full`] is the result of a send without waiting when the other side doesn't read;
//! the caller decides how to react. [`RecvError::Malformed`] means that the other process must not
//! be trusted any more.

use std::io::IoSlice;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use serde::Serialize;

use crate::ipc::message::Direction;
use crate::sys::closer::GuardedFd;
use crate::sys::fdpass;
use crate::sys::rights::{Rights, datagram_has_rights, refuse};

/// Highest number of descriptors in one datagram, and so of jobs. With more than 8, the cost of the
/// datagram itself hardly matters (measured), but one thread would have to hand on more jobs.
pub const MAX_FDS: usize = fdpass::MAX_FDS;

/// Highest number of messages in one datagram, so that their number needs no other bound.
pub const MAX_BATCH: usize = MAX_FDS;

/// Largest datagram in bytes. A declaration with many listeners, or records with 4 KiB of
/// recipients, stays far below; the kernel's default socket buffer is 208 KiB.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// The reason why a message could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The socket's buffer is full, because the other side doesn't read fast enough.
    #[error("the socket's buffer is full")]
    Full,
    /// The other end is closed.
    #[error("the other process has closed the channel")]
    Closed,
    /// The message needs more than [`MAX_MESSAGE`] bytes, [`MAX_FDS`] descriptors or the socket's
    /// buffer.
    #[error("message of more than {MAX_MESSAGE} bytes or {MAX_FDS} descriptors")]
    TooLarge,
    /// Any other error, such as ETOOMANYREFS or ENOMEM.
    #[error("sendmsg: {0}")]
    Os(Errno),
}

/// The reason why no message could be received.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// No message is there, or the receive timeout has passed.
    #[error("no message")]
    Empty,
    /// The other side has closed or shut down its end.
    #[error("end of channel")]
    Closed,
    /// A descriptor was sent, but this process had no free one.
    #[error("a descriptor was lost: too many open files")]
    DescriptorLost,
    /// The bytes are no message of this direction.
    #[error("malformed message")]
    Malformed,
    /// The next message has descriptors that nobody expects. It was not received.
    #[error("descriptors that nobody has asked for")]
    Rights,
    /// Any other error.
    #[error("recvmsg: {0}")]
    Os(Errno),
}

/// A message with the descriptors that came with it.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// All descriptors that were sent, close-on-exec.
    pub fds: fdpass::Fds,
}

/// An end of a channel, which sends messages of `Out` and receives messages of `In`.
pub struct Channel<Out, In> {
    fd: GuardedFd,
    /// Whether each message is looked at before it is received.
    looks: bool,
    directions: PhantomData<fn(Out) -> In>,
}

impl<Out, In> std::fmt::Debug for Channel<Out, In> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Channel").field(&self.as_fd().as_raw_fd()).finish()
    }
}

impl<Out, In> AsFd for Channel<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<Out, In> From<Channel<Out, In>> for OwnedFd {
    fn from(channel: Channel<Out, In>) -> Self {
        channel.fd.into_inner()
    }
}

impl<Out: Direction, In: Direction> Channel<Out, In> {
    /// Creates a channel and returns both ends, the second with the directions swapped. Both are
    /// close-on-exec.
    ///
    /// # Errors
    /// Returns the error of socketpair(2), such as a lack of descriptors or memory.
    pub fn pair() -> Result<(Self, Channel<In, Out>), Errno> {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self::from_fd(a), Channel::from_fd(b)))
    }

    /// Makes a channel of a descriptor that is one end of such a pair.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd: GuardedFd::from(fd), looks: false, directions: PhantomData }
    }

    /// Trusts the process that the other end is for no more than a client: no message that comes
    /// has descriptors, because the kernel refuses them. If it can't, each message is looked at
    /// first, and the closer closes this end. To be called before anybody else has the other end.
    pub fn foreign(mut self) -> Self {
        if refuse(self.as_fd()) == Rights::Possible {
            self.looks = true;
            self.fd.leave_to_closer();
        }
        self
    }

    /// Sends a message, and waits while the buffer is full.
    ///
    /// # Errors
    /// See [`SendError`]; never `Full`.
    pub fn send(
        &self,
        message: &Out::Message<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        encoded(message, |bytes| self.send_bytes(bytes, fds, MsgFlags::empty()))
    }

    /// Sends a message without waiting.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn try_send(
        &self,
        message: &Out::Message<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        encoded(message, |bytes| self.send_bytes(bytes, fds, MsgFlags::MSG_DONTWAIT))
    }

    /// Sends all messages of a batch in one datagram, and waits while the buffer is full.
    ///
    /// # Errors
    /// See [`SendError`]; never `Full`.
    pub fn send_batch(&self, batch: &Batch<Out>) -> Result<(), SendError> {
        self.send_bytes(&batch.bytes, &[], MsgFlags::empty())
    }

    /// Sends all messages of a batch in one datagram without waiting, with `fds` for those of them
    /// that have one.
    ///
    /// # Errors
    /// See [`SendError`]; none of the messages was sent then.
    pub fn try_send_batch(
        &self,
        batch: &Batch<Out>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        self.send_bytes(&batch.bytes, fds, MsgFlags::MSG_DONTWAIT)
    }

    fn send_bytes(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<(), SendError> {
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(SendError::TooLarge);
        }
        let mut raw = [-1; MAX_FDS];
        for (slot, fd) in raw.iter_mut().zip(fds) {
            *slot = fd.as_raw_fd();
        }
        let rights = [ControlMessage::ScmRights(&raw[..fds.len()])];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(
                self.as_fd().as_raw_fd(),
                &[IoSlice::new(bytes)],
                control,
                flags,
                None,
            ) {
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

    /// Receives one message into `buffer`. Waits until a message comes, or until the receive
    /// timeout of the socket, if it has one.
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn recv<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Received<In::Message<'b>>, RecvError> {
        self.recv_batch(buffer)?.only()
    }

    /// Receives one message if one is there.
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn try_recv<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Received<In::Message<'b>>, RecvError> {
        self.try_recv_batch(buffer)?.only()
    }

    /// Receives the messages of one datagram, and waits for it as [`Self::recv`] does.
    ///
    /// # Errors
    /// See [`RecvError`]; lost descriptors are reported in [`Messages::descriptor_lost`] instead.
    pub fn recv_batch<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Messages<'b, In>, RecvError> {
        self.recv_flags(buffer, MsgFlags::empty())
    }

    /// Receives the messages of one datagram if one is there.
    ///
    /// # Errors
    /// See [`RecvError`]; lost descriptors are reported in [`Messages::descriptor_lost`] instead.
    pub fn try_recv_batch<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Messages<'b, In>, RecvError> {
        self.recv_flags(buffer, MsgFlags::MSG_DONTWAIT)
    }

    /// Returns whether the next message has descriptors that nobody expects.
    fn look(&self, flags: MsgFlags) -> Result<bool, Errno> {
        if self.looks { datagram_has_rights(self.as_fd(), flags) } else { Ok(false) }
    }

    fn recv_flags<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
        flags: MsgFlags,
    ) -> Result<Messages<'b, In>, RecvError> {
        let RecvBuffer { bytes, control } = buffer;
        let received = loop {
            let attempt = match self.look(flags) {
                Ok(false) => fdpass::recv(self.as_fd(), bytes, control, flags),
                Ok(true) => return Err(RecvError::Rights),
                Err(error) => Err(error),
            };
            match attempt {
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
        if received.truncated {
            return Err(RecvError::Malformed);
        }
        let bytes = buffer.bytes.get(..received.length).ok_or(RecvError::Malformed)?;
        let descriptor_lost = received.descriptor_lost;
        let fds = received.fds;
        Ok(Messages { bytes, left: MAX_BATCH, fds, descriptor_lost, direction: PhantomData })
    }
}

/// Encodes a message, on the stack if it is short.
fn encoded<M: Serialize>(
    message: &M,
    then: impl FnOnce(&[u8]) -> Result<(), SendError>,
) -> Result<(), SendError> {
    let mut short = [0; 1024];
    match postcard::to_slice(message, &mut short) {
        Ok(bytes) => then(bytes),
        Err(_) => then(&postcard::to_stdvec(message).map_err(|_| SendError::TooLarge)?),
    }
}

/// Messages that are sent in one datagram, in their order.
pub struct Batch<Out> {
    bytes: Vec<u8>,
    direction: PhantomData<fn(Out)>,
}

impl<Out> std::fmt::Debug for Batch<Out> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl<Out> Default for Batch<Out> {
    fn default() -> Self {
        Self { bytes: Vec::new(), direction: PhantomData }
    }
}

impl<Out: Direction> Batch<Out> {
    /// Adds a message to the batch.
    ///
    /// # Errors
    /// Returns [`SendError::TooLarge`] if the message doesn't fit in the rest of [`MAX_MESSAGE`].
    pub fn push(&mut self, message: &Out::Message<'_>) -> Result<(), SendError> {
        encoded(message, |bytes| {
            if self.bytes.len() + bytes.len() > MAX_MESSAGE {
                return Err(SendError::TooLarge);
            }
            self.bytes.extend_from_slice(bytes);
            Ok(())
        })
    }

    /// Returns the size of all messages in bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Removes all messages. Memory for some short messages is kept for the next ones.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(16 * 1024);
    }
}

/// The messages of a received datagram, as an iterator.
pub struct Messages<'b, In> {
    bytes: &'b [u8],
    /// How many messages the rest may have.
    left: usize,
    /// The descriptors that were sent, all close-on-exec, without the lost ones.
    pub fds: fdpass::Fds,
    /// Whether the last descriptors of the datagram are missing, because this process had no free
    /// ones.
    pub descriptor_lost: bool,
    direction: PhantomData<fn() -> In>,
}

impl<In> std::fmt::Debug for Messages<'_, In> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Messages").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl<'b, In: Direction> Messages<'b, In> {
    /// Returns whether all messages have been taken out.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns the only message of the datagram, or an error if there are several.
    fn only(mut self) -> Result<Received<In::Message<'b>>, RecvError> {
        if self.descriptor_lost {
            return Err(RecvError::DescriptorLost);
        }
        let message = self.next().unwrap_or(Err(RecvError::Malformed))?;
        match self.bytes.is_empty() {
            true => Ok(Received { message, fds: self.fds }),
            false => Err(RecvError::Malformed),
        }
    }
}

impl<'b, In: Direction> Iterator for Messages<'b, In> {
    type Item = Result<In::Message<'b>, RecvError>;

    /// Returns the next message. No message follows a malformed one, and more than [`MAX_BATCH`]
    /// messages are malformed.
    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.bytes);
        let left = self.left.checked_sub(1);
        match left.and_then(|left| Some((left, postcard::take_from_bytes(bytes).ok()?))) {
            Some((left, (message, rest))) => {
                (self.bytes, self.left) = (rest, left);
                Some(Ok(message))
            }
            None => Some(Err(RecvError::Malformed)),
        }
    }
}

/// Memory for one datagram, reused so that receiving allocates nothing.
#[derive(Debug)]
pub struct RecvBuffer {
    bytes: Box<[u8]>,
    control: Vec<u8>,
}

impl RecvBuffer {
    /// Returns a buffer for datagrams of every size.
    pub fn new() -> Self {
        Self::with_size(MAX_MESSAGE)
    }

    /// Returns a buffer for messages that are known to be short, such as [`MAX_FDS`] times
    /// [`super::message::Job`].
    pub fn small() -> Self {
        Self::with_size(1024)
    }

    fn with_size(size: usize) -> Self {
        Self { bytes: vec![0; size].into_boxed_slice(), control: fdpass::control_buffer() }
    }
}

impl Default for RecvBuffer {
    fn default() -> Self {
        Self::new()
    }
}
