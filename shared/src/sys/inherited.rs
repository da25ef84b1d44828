//! What a process inherits from its launcher and must not keep: open descriptors, blocked signals,
//! ignored signals.
//!
//! Contract: [`discard`] is the first call of a daemon, before the daemon opens anything.
//! Descriptors 0, 1 and 2 need nothing here: Rust's runtime opens those that are closed on
//! /dev/null before `main`.
//!
//! # Failure
//! Every error is the errno of the failed call.

use nix::errno::Errno;

use crate::sys::{activation, signals};

/// Closes the launcher's descriptors except for 0, 1, 2 and passed sockets, and resets signals.
///
/// # Errors
/// /proc/self/fd can't be read although the kernel lacks close_range(2).
pub fn discard() -> Result<(), Errno> {
    reset_signals();
    // A count that can't be read is an error that ends the start.
    close_from(activation::FIRST + activation::count().unwrap_or(0))
}

/// Blocks no signal, and sets every ignored signal to its default action, except for SIGPIPE:
/// Rust's runtime ignores it so that writing to a closed socket is an error. A zygote needs this,
/// too, because posix_spawn(3) ignores the signals that the C library keeps for itself.
pub fn reset_signals() {
    signals::set_mask(&signals::NONE);
    for signal in signals::ALL {
        if signal != libc::SIGPIPE && signals::is_ignored(signal) {
            signals::reset(signal);
        }
    }
}

/// Closes every descriptor from `first` on.
fn close_from(first: u32) -> Result<(), Errno> {
    match close_range(first) {
        // A system call filter answers EPERM for a call that it doesn't know.
        Err(Errno::ENOSYS | Errno::EPERM) => close_listed(first),
        other => other,
    }
}

fn close_range(first: u32) -> Result<(), Errno> {
    // SAFETY: the descriptors are the launcher's. Nothing in this process owns any of them.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    Errno::result(result).map(drop)
}

/// Closes the descriptors that /proc/self/fd lists.
fn close_listed(first: u32) -> Result<(), Errno> {
    let entries = std::fs::read_dir("/proc/self/fd")
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // The list ends before anything is closed, because reading the list needs a descriptor itself.
    let numbers: Vec<libc::c_int> = numbers.collect();
    for number in numbers {
        if u32::try_from(number).is_ok_and(|number| number >= first) {
            // SAFETY: as in `close_range`. The descriptor of the list itself is closed already, so
            // closing its number fails.
            unsafe { libc::close(number) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    /// A number that no other test of this process reaches.
    const HIGH: libc::c_int = 900;

    fn is_open(number: libc::c_int) -> bool {
        // SAFETY: F_GETFD only looks at the number.
        unsafe { libc::fcntl(number, libc::F_GETFD) != -1 }
    }

    #[test]
    fn both_ways_close_what_is_left_open() {
        for close in [close_range, close_listed] {
            let null = File::open("/dev/null").expect("/dev/null");
            let moved = nix::fcntl::fcntl(&null, nix::fcntl::FcntlArg::F_DUPFD(HIGH));
            let moved = moved.expect("a high descriptor");
            close(HIGH as u32).expect("closed");
            assert!(!is_open(moved), "{moved}");
            assert!(is_open(null.as_raw_fd()));
        }
    }
}
