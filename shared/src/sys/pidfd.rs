//! Descriptors of processes. A process that is named by a descriptor can't be mistaken for a later
//! process with the same pid.
//!
//! # Failure
//! Every error is the errno of the failed call.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// `SO_PEERPIDFD` of include/uapi/asm-generic/socket.h (Linux 6.5). Architectures with other
/// numbers of socket options (alpha, mips, parisc, sparc) are not supported.
const SO_PEERPIDFD: libc::c_int = 77;

/// `PIDFD_GET_INFO` of include/uapi/linux/pidfd.h (Linux 6.13), `_IOWR(0xff, 11, …)` of 64 bytes.
/// Architectures with another encoding of ioctls (mips, powerpc, sparc) return `ENOTTY`, as old
/// kernels do.
const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;

/// Flag in the mask of `struct pidfd_info` that asks for the id of the control group.
const PIDFD_INFO_CGROUPID: u64 = 1 << 2;

/// `struct pidfd_info`, first version.
#[repr(C)]
#[derive(Default)]
struct RawInfo {
    mask: u64,
    cgroup_id: u64,
    pid: u32,
    /// Eleven fields of 32 bits that are not asked for.
    rest: [u32; 11],
}

// The size is a part of the ioctl's number.
const _: () = assert!(size_of::<RawInfo>() == 64);

/// Facts about a process, all from one point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Process id in the pid namespace of this process.
    pub pid: Pid,
    /// Control group (version 2): the inode number of the group's directory, which is never reused.
    pub cgroup: Option<u64>,
}

/// Returns facts about a process that hasn't been reaped.
///
/// # Errors
/// `ESRCH` when the process has been reaped, has no pid in this namespace, or (Linux 6.13 to 6.15)
/// its parent has none; `ENOTTY` or `EINVAL` before Linux 6.13.
pub fn info(process: BorrowedFd<'_>) -> Result<Info, Errno> {
    let mut raw = RawInfo { mask: PIDFD_INFO_CGROUPID, ..RawInfo::default() };
    // SAFETY: the kernel writes at most the 64 bytes that the request's number says, which `raw`
    // has, and it outlives the call.
    let result = unsafe { libc::ioctl(process.as_raw_fd(), PIDFD_GET_INFO, &raw mut raw) };
    Errno::result(result)?;
    let pid = i32::try_from(raw.pid).map_err(|_| Errno::ESRCH)?;
    let cgroup = (raw.mask & PIDFD_INFO_CGROUPID != 0).then_some(raw.cgroup_id);
    Ok(Info { pid: Pid::from_raw(pid), cgroup })
}

/// Returns a close-on-exec descriptor of the process that has this pid now. The descriptor becomes
/// readable when the process ends.
///
/// # Errors
/// As pidfd_open(2); `ESRCH` when there is no such process.
pub fn open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two integers and touches no memory of the process.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just installed this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns a close-on-exec descriptor of the process that connected this local socket, also if
/// another process accepted the connection.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.5; `ESRCH` or `EINVAL` when the process is gone; `ENODATA` when the
/// socket has no peer.
pub fn of_peer(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` has room for the `length` bytes that the kernel writes at most, and both outlive
    // the call.
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
    // SAFETY: the kernel has just installed this descriptor for this process.
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
    fn says_who_it_is() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().expect("spawn");
        let pid = Pid::from_raw(child.id().cast_signed());
        let process = open(pid).expect("pidfd");
        let old = match info(process.as_fd()) {
            Ok(info) => {
                assert_eq!(info.pid, pid);
                false
            }
            Err(error) => matches!(error, Errno::ENOTTY | Errno::EINVAL),
        };
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert!(old || info(process.as_fd()) == Err(Errno::ESRCH));
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
