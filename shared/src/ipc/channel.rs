//! One end of a `SOCK_SEQPACKET` pair that carries [`super::message`]s and descriptors.
//!
//! Contract: a datagram holds one message, or several where both ends say so ([`Batch`],
//! [`Messages`]): under load one system call and one wake-up do for all of them. Its descriptors
//! belong to those of its messages that have one, in their order.
//!
//! # Failure
//! [`SendError::Full`] is what a non-blocking send gets when the other side
//! doesn't read; the caller decides what that means. [`RecvError::Malformed`]
//! means the other process is not to be trusted any more.

use std::io::IoSlice;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use serde::Serialize;

use crate::ipc::message::Direction;
use crate::sys::fdpass;

/// Most descriptors that one datagram carries, hence most jobs: beyond some 8 the cost of the
/// datagram itself hardly shows (measured), while one thread has to hand more and more on.
pub const MAX_FDS: usize = fdpass::MAX_FDS;

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
    /// It can't be sent within [`MAX_MESSAGE`] bytes, [`MAX_FDS`] descriptors and the socket's
    /// buffer.
    #[error("message of more than {MAX_MESSAGE} bytes or {MAX_FDS} descriptors")]
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
    DescriptorLost,
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
        encoded(message, |bytes| self.send_bytes(bytes, fds, MsgFlags::empty()))
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
        encoded(message, |bytes| self.send_bytes(bytes, fds, MsgFlags::MSG_DONTWAIT))
    }

    /// As [`Self::send`], all messages of a batch at once.
    ///
    /// # Errors
    /// See [`SendError`]; never `Full`.
    pub fn send_batch(&self, batch: &Batch<Out>) -> Result<(), SendError> {
        self.send_bytes(&batch.bytes, &[], MsgFlags::empty())
    }

    /// As [`Self::try_send`], all messages of a batch at once, each with one of the descriptors.
    ///
    /// # Errors
    /// See [`SendError`]; nothing was sent then.
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
        self.recv_batch(buffer)?.only()
    }

    /// Receives one message if there is one.
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn try_recv<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Received<In::Message<'b>>, RecvError> {
        self.try_recv_batch(buffer)?.only()
    }

    /// Receives the messages of one datagram, waiting for it as [`Self::recv`] does.
    ///
    /// # Errors
    /// See [`RecvError`]; lost descriptors are no error here.
    pub fn recv_batch<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Messages<'b, In>, RecvError> {
        self.recv_flags(buffer, MsgFlags::empty())
    }

    /// Receives the messages of one datagram if there is one.
    ///
    /// # Errors
    /// See [`RecvError`]; lost descriptors are no error here.
    pub fn try_recv_batch<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Messages<'b, In>, RecvError> {
        self.recv_flags(buffer, MsgFlags::MSG_DONTWAIT)
    }

    fn recv_flags<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
        flags: MsgFlags,
    ) -> Result<Messages<'b, In>, RecvError> {
        let RecvBuffer { bytes, control } = buffer;
        let received = loop {
            match fdpass::recv(self.fd.as_fd(), bytes, control, flags) {
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
        Ok(Messages { bytes, fds: received.fds, descriptor_lost, direction: PhantomData })
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

/// Messages that travel in one datagram, in their order.
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
    /// Adds a message.
    ///
    /// # Errors
    /// It can't be encoded within what is left of [`MAX_MESSAGE`].
    pub fn push(&mut self, message: &Out::Message<'_>) -> Result<(), SendError> {
        encoded(message, |bytes| {
            if self.bytes.len() + bytes.len() > MAX_MESSAGE {
                return Err(SendError::TooLarge);
            }
            self.bytes.extend_from_slice(bytes);
            Ok(())
        })
    }

    /// Bytes of all of them.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Takes all out; memory for some short ones is kept.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(16 * 1024);
    }
}

/// What one datagram brought: an iterator over its messages.
pub struct Messages<'b, In> {
    bytes: &'b [u8],
    /// As many as were sent, all close-on-exec, unless some were lost.
    pub fds: fdpass::Fds,
    /// Descriptors were sent that this process could not take: the last ones.
    pub descriptor_lost: bool,
    direction: PhantomData<fn() -> In>,
}

impl<In> std::fmt::Debug for Messages<'_, In> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Messages").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl<'b, In: Direction> Messages<'b, In> {
    /// Whether all of them have been taken out.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The datagram's one message.
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

    /// The next message; nothing follows one that is malformed.
    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes.is_empty() {
            return None;
        }
        match postcard::take_from_bytes(std::mem::take(&mut self.bytes)) {
            Ok((message, rest)) => {
                self.bytes = rest;
                Some(Ok(message))
            }
            Err(_) => Some(Err(RecvError::Malformed)),
        }
    }
}

/// Room for one datagram; reused, so that receiving allocates nothing.
#[derive(Debug)]
pub struct RecvBuffer {
    bytes: Box<[u8]>,
    control: Vec<u8>,
}

impl RecvBuffer {
    /// A buffer for any datagram.
    pub fn new() -> Self {
        Self::with_size(MAX_MESSAGE)
    }

    /// A buffer for messages that are known to be short, such as [`MAX_FDS`] of
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
