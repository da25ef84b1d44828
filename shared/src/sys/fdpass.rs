//! Receiving descriptors by SCM_RIGHTS as owned values.
//!
//! # Failure
//! A message may arrive without its descriptors when this process has none
//! free; that is reported in [`Received::descriptor_lost`].

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

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
    /// Descriptors were sent that this process could not take.
    pub descriptor_lost: bool,
}

/// Room for the control messages that [`recv`] takes.
pub fn control_buffer() -> Vec<u8> {
    nix::cmsg_space!([std::os::fd::RawFd; MAX_FDS])
}

/// Receives one message; descriptors are close-on-exec. `control` is from [`control_buffer`].
///
/// # Errors
/// As recvmsg(2).
pub fn recv(
    socket: BorrowedFd<'_>,
    buffer: &mut IoSliceMut<'_>,
    control: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(control),
        flags | MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Fds::default();
    let mut descriptor_lost = message.flags.contains(MsgFlags::MSG_CTRUNC);
    match message.cmsgs() {
        Ok(messages) => {
            for control in messages {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    for fd in raw {
                        // SAFETY: the kernel has just installed this descriptor for us
                        // and nobody else knows its number.
                        fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
            }
        }
        Err(_) => descriptor_lost = true,
    }
    Ok(Received {
        length: message.bytes,
        fds,
        truncated: message.flags.contains(MsgFlags::MSG_TRUNC),
        descriptor_lost,
    })
}
