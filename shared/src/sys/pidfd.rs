//! Descriptors of processes: a process named so can't be mistaken for another one that got its
//! number later.
//!
//! # Failure
//! The kernel's errno.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// `SO_PEERPIDFD` of include/uapi/asm-generic/socket.h (Linux 6.5); the architectures that
/// number socket options otherwise (alpha, mips, parisc, sparc) are not supported.
const SO_PEERPIDFD: libc::c_int = 77;

/// A descriptor of the process that has this number now, close-on-exec. It becomes readable
/// when the process ends.
///
/// # Errors
/// As pidfd_open(2); `ESRCH` when there is no such process.
pub fn open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just installed this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor of the process that connected this local socket, close-on-exec, whoever
/// accepted the connection.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.5; `ESRCH` or `EINVAL` when the process is gone; `ENODATA` when
/// the socket has no peer.
pub fn of_peer(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` has room for the `length` bytes that the kernel writes at most, and both
    // outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    if fd < 0 {
        return Err(Errno::ESRCH);
    }
    // SAFETY: the kernel has just installed this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    use std::process::Command;

    fn ended(fd: &OwnedFd, timeout: PollTimeout) -> bool {
        poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) == Ok(1)
    }

    #[test]
    fn tells_when_a_process_ends() {
        let own = open(Pid::this()).expect("pidfd");
        assert!(!ended(&own, PollTimeout::ZERO));
        let mut child = Command::new("/bin/true").spawn().expect("spawn");
        let fd = open(Pid::from_raw(child.id().cast_signed())).expect("pidfd");
        assert!(ended(&fd, PollTimeout::from(10_000u16)));
        child.wait().expect("wait");
        assert_eq!(open(Pid::from_raw(i32::MAX)).err(), Some(Errno::ESRCH));
    }

    #[test]
    fn names_the_peer() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("pair");
        match of_peer(a.as_fd()) {
            Ok(fd) => assert!(!ended(&fd, PollTimeout::ZERO)),
            Err(error) => assert_eq!(error, Errno::ENOPROTOOPT, "only old kernels can't"),
        }
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        assert!(of_peer(tcp.as_fd()).is_err());
    }
}
