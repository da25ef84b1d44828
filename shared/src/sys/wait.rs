//! Waiting for a socket until a deadline.
//!
//! # Failure
//! An interrupted wait continues for the rest of its time.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};

use crate::deadline::Deadline;

/// Waits until one of `events`, an error or a hang-up is there, and returns what is there. The
/// result is empty when the deadline has passed.
///
/// # Errors
/// As ppoll(2), but never `EINTR`.
pub fn wait(
    socket: BorrowedFd<'_>,
    events: PollFlags,
    deadline: Deadline,
) -> Result<PollFlags, Errno> {
    loop {
        let mut polled = [PollFd::new(socket.as_fd(), events)];
        match ppoll(&mut polled, Some(TimeSpec::from(deadline.remaining())), None) {
            Ok(_) => return Ok(polled[0].revents().unwrap_or(PollFlags::empty())),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Returns the time until the deadline, as a timeout of a socket; `None` when the deadline has
/// passed.
///
/// The timeout is rounded up to a microsecond, because a socket takes zero as no timeout at all.
pub fn socket_timeout(deadline: Deadline) -> Option<TimeVal> {
    let remaining = deadline.remaining();
    let micros = remaining.as_nanos().div_ceil(1000);
    (remaining > Duration::ZERO)
        .then(|| TimeVal::microseconds(i64::try_from(micros).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn waits_for_input_and_for_the_end() {
        let (mut a, b) = UnixStream::pair().expect("pair");
        let soon = Deadline::after(Duration::from_millis(1));
        let nothing = wait(b.as_fd(), PollFlags::POLLIN, soon).expect("poll");
        assert!(nothing.is_empty());
        a.write_all(b"x").expect("write");
        let late = Deadline::after(Duration::from_secs(10));
        let ready = wait(b.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT, late).expect("poll");
        assert_eq!(ready, PollFlags::POLLIN | PollFlags::POLLOUT);
        drop(a);
        let ready = wait(b.as_fd(), PollFlags::empty(), late).expect("poll");
        assert!(ready.contains(PollFlags::POLLHUP));
    }

    #[test]
    fn a_timeout_is_never_forever() {
        assert_eq!(socket_timeout(Deadline::after(Duration::ZERO)), None);
        let second = socket_timeout(Deadline::after(Duration::from_secs(1))).expect("future");
        assert!(second.num_microseconds() > 900_000 && second.num_microseconds() <= 1_000_000);
    }
}
