//! Signal masks and dispositions by the kernel's own calls, which include the signals that the C
//! library keeps for itself and hides from its callers. A launcher may have blocked or ignored
//! these as well.
//!
//! Contract: all functions may run between fork and exec, also on memory that the new process
//! shares with this one.
//!
//! # Failure
//! None: the calls fail only for invalid arguments, and for SIGKILL and SIGSTOP, which are at their
//! defaults.

use std::ops::RangeInclusive;
use std::ptr;

/// Size of the kernel's set of signals, in bytes.
const SET: usize = 8;

/// A set of signals; bit 0 of byte 0 stands for signal 1.
pub(crate) type Mask = [u8; SET];

/// No signal.
pub(crate) const NONE: Mask = [0; SET];
/// Every signal.
pub(crate) const EVERY: Mask = [u8::MAX; SET];

/// The numbers of all signals.
pub(crate) const ALL: RangeInclusive<libc::c_int> = 1..=8 * SET as libc::c_int;

/// Room for the kernel's `struct sigaction`, which is smaller on every architecture. The handler is
/// the first field (on all but MIPS), and all zeroes mean the default action.
type Action = [usize; 16];

/// Blocks exactly these signals in this thread. Returns the ones that were blocked before.
pub(crate) fn set_mask(mask: &Mask) -> Mask {
    let mut before = NONE;
    // SAFETY: both sets have the size that the last argument says.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            mask.as_ptr(),
            before.as_mut_ptr(),
            SET,
        )
    };
    before
}

/// Gives a signal its default action.
pub(crate) fn reset(signal: libc::c_int) {
    let default: Action = [0; 16];
    // SAFETY: the kernel only reads the action. The default action runs no code of this process.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            default.as_ptr(),
            ptr::null_mut::<Action>(),
            SET,
        )
    };
}

/// Returns whether a signal is ignored.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut action: Action = [0; 16];
    // SAFETY: without a new action the kernel only writes the current one, for which there is room.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            ptr::null::<Action>(),
            action.as_mut_ptr(),
            SET,
        )
    };
    action[0] == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_seen_and_reset() {
        assert!(!is_ignored(libc::SIGWINCH));
        // SAFETY: ignoring a signal runs no code of this process.
        unsafe { libc::signal(libc::SIGWINCH, libc::SIG_IGN) };
        assert!(is_ignored(libc::SIGWINCH));
        reset(libc::SIGWINCH);
        assert!(!is_ignored(libc::SIGWINCH));
    }

    #[test]
    fn a_mask_is_the_threads() {
        let before = set_mask(&EVERY);
        // The kernel leaves SIGKILL and SIGSTOP out.
        let all = set_mask(&before);
        let unblockable = 1_u64 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
        assert_eq!(u64::from_ne_bytes(all), !unblockable);
        assert_eq!(set_mask(&before), before);
    }
}
