//! The process of a client, safe against the reuse of its number.
//!
//! Contract: a [`Client`] holds the process that connected, whoever accepted the connection. What
//! was read about its number in /proc was about that process if [`Client::check`] succeeds before
//! and after: as long as the process isn't reaped, nobody else gets the number. The kernel (since
//! 6.13) or else /proc/self/fdinfo says whether it is.
//!
//! # Failure
//! [`IdentityError`]; a client that has exited has no identity any more.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::{Pid, SysconfVar, sysconf};
use qrelay_shared::sys::pidfd;
use thiserror::Error;

/// Why a client's process isn't known.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum IdentityError {
    /// The process has ended, and another process may have its number by now.
    #[error("the client has exited")]
    Exited,
    /// The process lives, and /proc doesn't show it (hidepid in proc(5)).
    #[error(
        "/proc hides the client's process: mount it without hidepid, and leave ProtectProc= out \
        of the unit"
    )]
    Hidden,
    /// A call to the system failed.
    #[error("{0}: {1}")]
    Os(&'static str, Errno),
}

/// A client's process.
#[derive(Debug)]
pub(crate) struct Client {
    pid: Pid,
    process: OwnedFd,
}

impl Client {
    /// The process behind a local connection, to be checked, `pid` being its number when it
    /// connected and `accepted` when the connection was accepted, in nanoseconds of CLOCK_BOOTTIME.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub(crate) fn of(
        socket: BorrowedFd<'_>,
        pid: Pid,
        accepted: u64,
    ) -> Result<Self, IdentityError> {
        let process = match pidfd::of_peer(socket) {
            Ok(process) => process,
            Err(Errno::ESRCH | Errno::EINVAL) => return Err(IdentityError::Exited),
            Err(Errno::ENOPROTOOPT) => return Self::by_number(pid, accepted),
            Err(error) => return Err(IdentityError::Os("SO_PEERPIDFD", error)),
        };
        Ok(Self { pid, process })
    }

    /// Before Linux 6.5, and in a trial: the process that has the number, if it had it when the
    /// connection was accepted.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub(crate) fn by_number(pid: Pid, accepted: u64) -> Result<Self, IdentityError> {
        let process = pidfd::open(pid).map_err(|error| match error {
            Errno::ESRCH => IdentityError::Exited,
            error => IdentityError::Os("pidfd_open", error),
        })?;
        let client = Self { pid, process };
        let stat = client.read("stat")?;
        client.check()?;
        match start_time(&stat, ticks_per_second()) {
            Some(started) if started <= accepted => Ok(client),
            _ => Err(IdentityError::Exited),
        }
    }

    /// Returns a file that /proc has about the number of the process. The caller has to check
    /// afterwards that the process still has the number.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub(super) fn read(&self, file: &str) -> Result<Vec<u8>, IdentityError> {
        use IdentityError::{Exited, Hidden, Os};
        match read(&format!("/proc/{}/{file}", self.pid)) {
            Err(Exited | Os(_, Errno::EPERM | Errno::EACCES)) if self.check().is_ok() => {
                Err(Hidden)
            }
            other => other,
        }
    }

    /// Checks that the process still has its number. Returns the id of its control group of version
    /// 2, where the kernel tells it.
    ///
    /// # Errors
    /// [`IdentityError::Exited`] if the process has been reaped.
    pub(crate) fn check(&self) -> Result<Option<u64>, IdentityError> {
        match pidfd::info(self.process.as_fd()) {
            Ok(info) if info.pid == self.pid => return Ok(info.cgroup),
            Ok(_) => return Err(IdentityError::Exited),
            // An old kernel, or one of 6.13 to 6.15, which says ESRCH of a living process whose
            // parent is in another pid namespace.
            Err(_) => {}
        }
        let number = self.process.as_fd().as_raw_fd();
        let info = read(&format!("/proc/self/fdinfo/{number}"))?;
        match fdinfo_pid(&info) {
            Some(pid) if pid == self.pid.as_raw() => Ok(None),
            _ => Err(IdentityError::Exited),
        }
    }
}

/// A file in /proc; one that isn't there belonged to a process that is gone.
///
/// # Errors
/// See [`IdentityError`].
pub(crate) fn read(path: &str) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ESRCH) => IdentityError::Exited,
        other => IdentityError::Os("/proc", other.unwrap_or(Errno::EIO)),
    })
}

/// The `Pid:` of a pidfd's fdinfo: -1 once the process has been reaped, 0 for a process that has no
/// number here.
fn fdinfo_pid(info: &[u8]) -> Option<i32> {
    let mut lines = info.split(|&byte| byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(b"Pid:"))?;
    str::from_utf8(value).ok()?.trim().parse().ok()
}

/// When a process started, in nanoseconds since boot, from proc_pid_stat(5). It is rounded down to
/// a tick (10 ms as a rule), so a client that connects at once isn't mistaken for a later one.
fn start_time(stat: &[u8], ticks_per_second: u64) -> Option<u64> {
    // The second field is in parentheses and may contain anything; field 22 is what we want.
    let after = stat.iter().rposition(|&byte| byte == b')')?;
    let mut fields = str::from_utf8(&stat[after + 1..]).ok()?.split_ascii_whitespace();
    let ticks: u64 = fields.nth(19)?.parse().ok()?;
    ticks.checked_mul(1_000_000_000 / ticks_per_second.max(1))
}

/// USER_HZ: 100 on every architecture that we run on, but ask.
fn ticks_per_second() -> u64 {
    let value = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    value.and_then(|ticks| u64::try_from(ticks).ok()).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    #[test]
    fn numbers_of_descriptors() {
        let info = b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t7\nPid:\t4711\nNSpid:\t4711\n";
        assert_eq!(fdinfo_pid(info), Some(4711));
        assert_eq!(fdinfo_pid(b"Pid:\t-1\n"), Some(-1));
        assert_eq!(fdinfo_pid(b"NSpid:\t1\n"), None);
        assert_eq!(fdinfo_pid(b""), None);
    }

    #[test]
    fn start_times() {
        let stat = b"12 (a) b) (c) S 1 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 250 9 10\n";
        assert_eq!(start_time(stat, 100), Some(2_500_000_000));
        assert_eq!(start_time(b"12 (a) S 1", 100), None);
        assert_eq!(start_time(b"", 100), None);
    }

    #[test]
    fn the_peer_of_a_socket() {
        let (ours, _theirs) = UnixStream::pair().expect("pair");
        let client = Client::of(ours.as_fd(), Pid::this(), u64::MAX).expect("it is us");
        assert!(client.check().is_ok());
        // Before Linux 6.5 only the time of accepting tells that another process has the number.
        let other = Client::of(ours.as_fd(), Pid::parent(), 0);
        let checked = other.and_then(|client| client.check());
        assert_eq!(checked, Err(IdentityError::Exited), "not the process that connected");
    }

    #[test]
    fn by_its_number() {
        assert!(Client::by_number(Pid::this(), u64::MAX).is_ok());
        let before = Client::by_number(Pid::this(), 0);
        assert_eq!(before.err(), Some(IdentityError::Exited), "it started later");
        let gone = Client::by_number(Pid::from_raw(i32::MAX), u64::MAX);
        assert_eq!(gone.err(), Some(IdentityError::Exited));
    }

    #[test]
    fn a_process_that_ends() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().expect("spawn");
        let pid = Pid::from_raw(child.id().cast_signed());
        let client = Client::by_number(pid, u64::MAX).expect("alive");
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert_eq!(client.check(), Err(IdentityError::Exited));
    }
}
