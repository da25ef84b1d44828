//! Receiving descriptors by SCM_RIGHTS as owned values.
//!
//! Contract: descriptors that nobody takes are closed by the closer, because the other process may
//! have passed one whose close waits. There is room for as many as one message can have, because
//! the kernel would drop the others here and now.
//!
//! # Failure
//! A message may arrive without some of its descriptors, when this process has no free ones;
//! [`Received::descriptor_lost`] reports that.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use crate::sys::closer;

/// Highest number of descriptors of one message.
pub(crate) const MAX_FDS: usize = 8;

/// Highest number of descriptors that the kernel lets through in one message (SCM_MAX_FD).
const KERNEL_MAX_FDS: usize = 253;

/// Up to [`MAX_FDS`] descriptors, without an allocation.
#[derive(Debug, Default)]
pub struct Fds {
    slots: [Option<OwnedFd>; MAX_FDS],
}

impl Fds {
    /// Takes the first descriptor that is left.
    pub fn take(&mut self) -> Option<OwnedFd> {
        self.slots.iter_mut().find_map(Option::take)
    }

    fn push(&mut self, fd: OwnedFd) {
        match self.slots.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(fd),
            None => closer::give(fd),
        }
    }
}

impl Drop for Fds {
    fn drop(&mut self) {
        while let Some(fd) = self.take() {
            closer::give(fd);
        }
    }
}

/// The result of one recvmsg(2).
#[derive(Debug)]
pub(crate) struct Received {
    /// Length of the message in bytes.
    pub(crate) length: usize,
    /// The descriptors that came with the message.
    pub(crate) fds: Fds,
    /// Whether the message was longer than the buffer.
    pub(crate) truncated: bool,
    /// Whether the last descriptors of the message are missing, because this process had no free
    /// ones.
    pub(crate) descriptor_lost: bool,
}

/// Returns a buffer for the control messages that [`recv`] receives.
pub(crate) fn control_buffer() -> Vec<u8> {
    nix::cmsg_space!([RawFd; KERNEL_MAX_FDS])
}

/// Receives one message; its descriptors are close-on-exec. `control` comes from
/// [`control_buffer`].
///
/// If only some of the message's descriptors could be installed, they are the first ones, and they
/// are returned. In that case nix's recvmsg returns no descriptors at all, so the installed ones
/// would stay open for ever.
///
/// # Errors
/// As recvmsg(2).
pub(crate) fn recv(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeros is a valid msghdr: no name, no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = control.len() as _;
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    // SAFETY: `header` points to `buffer` and `control` with their true lengths. Both and `slice`
    // outlive the call, and no other code refers to them.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags.bits()) };
    let length = usize::try_from(Errno::result(result)?).map_err(|_| Errno::EIO)?;
    Ok(Received {
        length,
        fds: installed(&control[..header.msg_controllen.min(control.len())]),
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        descriptor_lost: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Returns the descriptors that the kernel has just installed, from the control messages that
/// recvmsg(2) left. The headers are read byte by byte, because a buffer of bytes needn't be aligned
/// for them; libc's CMSG_NXTHDR relies on the alignment.
fn installed(mut control: &[u8]) -> Fds {
    let mut fds = Fds::default();
    while let Some(header) = first_header(control) {
        // SAFETY: the function only calculates.
        let begin = unsafe { libc::CMSG_LEN(0) } as usize;
        let end = header.cmsg_len.min(control.len());
        // A message that is shorter than a header is invalid, and no other message follows it.
        let Some(data) = control.get(begin..end) else { break };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            for fd in data.as_chunks().0 {
                // SAFETY: the kernel has just installed this descriptor for this process, and no
                // other code knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(*fd)) });
            }
        }
        // SAFETY: the function only calculates.
        let space = unsafe { libc::CMSG_SPACE(data.len() as libc::c_uint) } as usize;
        control = control.get(space..).unwrap_or_default();
    }
    fds
}

/// Returns the header at the start of the control messages, if it is complete.
fn first_header(control: &[u8]) -> Option<libc::cmsghdr> {
    let bytes = control.get(..size_of::<libc::cmsghdr>())?;
    // SAFETY: the slice has as many bytes as a header, which may be unaligned and of any value.
    Some(unsafe { bytes.as_ptr().cast::<libc::cmsghdr>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, SockType};
    use nix::sys::socket::{sendmsg, socketpair};
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    /// Receives three descriptors into a part of a control buffer. Returns the number of received
    /// descriptors, and whether any were lost.
    fn receive(part: impl std::slice::SliceIndex<[u8], Output = [u8]>) -> (usize, bool) {
        let (kind, none) = (SockType::SeqPacket, SockFlag::empty());
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, none).expect("sockets");
        let three = [ours.as_raw_fd(); 3];
        let rights = [ControlMessage::ScmRights(&three)];
        let bytes = [IoSlice::new(b"abc")];
        sendmsg::<()>(theirs.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).expect("sent");
        let mut control = control_buffer();
        let (mut buffer, control) = ([0; 10], &mut control[part]);
        let mut received =
            recv(ours.as_fd(), &mut buffer, control, MsgFlags::empty()).expect("a message");
        assert_eq!((&buffer[..received.length], received.truncated), (&b"abc"[..], false));
        let mut count = 0;
        while let Some(fd) = received.fds.take() {
            nix::sys::stat::fstat(&fd).expect("an open descriptor");
            count += 1;
        }
        (count, received.descriptor_lost)
    }

    #[test]
    fn a_control_buffer_may_begin_and_end_anywhere() {
        assert_eq!(receive(..), (3, false));
        for begin in 1..8 {
            assert_eq!(receive(begin..), (3, false), "{begin}");
        }
        let header = size_of::<libc::cmsghdr>();
        for (length, count) in [(0, 0), (4, 0), (header, 0), (header + 4, 1), (header + 11, 2)] {
            assert_eq!(receive(..length), (count, true), "{length}");
        }
    }
}
