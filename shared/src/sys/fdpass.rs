//! Receiving descriptors by SCM_RIGHTS as owned values.
//!
//! # Failure
//! A message may arrive without some of its descriptors when this process has none
//! free; that is reported in [`Received::descriptor_lost`].

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

/// Most descriptors that one message brings.
pub const MAX_FDS: usize = 8;

/// Up to [`MAX_FDS`] descriptors, without an allocation.
#[derive(Debug, Default)]
pub struct Fds {
    slots: [Option<OwnedFd>; MAX_FDS],
}

impl Fds {
    /// Takes the first one that is left.
    pub fn take(&mut self) -> Option<OwnedFd> {
        self.slots.iter_mut().find_map(Option::take)
    }

    fn push(&mut self, fd: OwnedFd) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(fd);
        }
    }
}

/// What one `recvmsg` brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes of the message.
    pub length: usize,
    /// The descriptors.
    pub fds: Fds,
    /// The message was longer than the buffer.
    pub truncated: bool,
    /// Descriptors were sent that this process could not take: the last ones.
    pub descriptor_lost: bool,
}

/// Room for the control messages that [`recv`] takes.
pub fn control_buffer() -> Vec<u8> {
    nix::cmsg_space!([RawFd; MAX_FDS])
}

/// Receives one message; descriptors are close-on-exec. `control` is from [`control_buffer`].
///
/// When only some of the message's descriptors could be installed, these are the first ones;
/// nix's recvmsg doesn't name them then, and they would stay open for ever.
///
/// # Errors
/// As recvmsg(2).
pub fn recv(
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
    // SAFETY: `header` points to `buffer` and `control` with their true lengths; they and `slice`
    // outlive the call, and nobody else has them.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags.bits()) };
    let length = usize::try_from(Errno::result(result)?).map_err(|_| Errno::EIO)?;
    Ok(Received {
        length,
        fds: installed(&header),
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        descriptor_lost: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// The descriptors that the kernel has installed; `header` is as recvmsg(2) left it.
fn installed(header: &libc::msghdr) -> Fds {
    let mut fds = Fds::default();
    // SAFETY: `header` describes control messages that the kernel has written.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: the pointer is null or to a whole header within the control buffer (cmsg(3)).
    while let Some(control) = unsafe { next.as_ref() } {
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: data follows the header; its length is what remains of `cmsg_len`.
            let (data, head) = unsafe { (libc::CMSG_DATA(control), libc::CMSG_LEN(0)) };
            let bytes = control.cmsg_len.saturating_sub(head as usize);
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: the index is within the data, which may be unaligned.
                let fd = unsafe { data.cast::<RawFd>().add(index).read_unaligned() };
                // SAFETY: the kernel has just installed this descriptor for us and nobody else
                // knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: as for the first one.
        next = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    fds
}
