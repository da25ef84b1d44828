//! Signal masks and dispositions by the kernel's own calls, which include the signals that the C
//! library keeps for itself and hides from its callers. A launcher may have blocked or ignored
//! these as well, and anybody may send them.
//!
//! Contract: all functions but [`disregard`] and [`disregard_strays`] may run between fork and
//! exec, also on memory that the new process shares with this one.
//!
//! # Failure
//! None: the calls fail only for invalid arguments, and for SIGKILL and SIGSTOP, which are at their
//! defaults.

use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::ptr;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

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

/// Signals that by default end a process, and by which nobody tells qrelay to end: timers, limits,
/// and what other programs have uses of their own for.
const STRAYS: [libc::c_int; 9] = [
    libc::SIGUSR1,
    libc::SIGALRM,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];

/// The first real-time signal of the kernel. The C library keeps the first two for itself, and its
/// callers can't set up those.
const FIRST_REAL_TIME: libc::c_int = 32;

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

/// Signals of the calling thread wait until they are released, or until the thread sets its mask in
/// another way.
#[derive(Debug)]
pub struct Held {
    before: Mask,
    /// The mask is the thread's, so the value stays in its thread.
    _here: PhantomData<*const ()>,
}

impl Held {
    /// Has signals wait from now on.
    #[expect(clippy::new_without_default, reason = "the constructor has an effect")]
    pub fn new() -> Self {
        Self { before: set_mask(&EVERY), _here: PhantomData }
    }

    /// Lets the signals come that have waited.
    pub fn release(self) {
        set_mask(&self.before);
    }
}

/// Gives a signal its default action.
pub(crate) fn reset(signal: libc::c_int) {
    set_action(signal, &[0; 16]);
}

/// Returns whether a signal is ignored.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    action(signal)[0] == libc::SIG_IGN
}

/// Makes a signal do nothing, by a handler: a program that this process executes would inherit
/// SIG_IGN, and gets the default action in place of a handler. System calls go on where they can.
pub fn disregard(signal: Signal) {
    extern "C" fn nothing(_: libc::c_int) {}
    // The handler runs for one signal at a time, so that many signals at once need little stack.
    let nothing = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::all());
    // SAFETY: the handler does nothing. No other handler of this process is replaced that anybody
    // still needs, as the caller says.
    let _ = unsafe { sigaction(signal, &nothing) };
}

/// Makes every signal do nothing that by default would end this process although nobody wants that.
/// Signals that have a handler keep it.
pub fn disregard_strays() {
    disregard(Signal::SIGUSR2);
    // The handler as the kernel has it also fits signals that the C library hides.
    let nothing = action(libc::SIGUSR2);
    for signal in STRAYS.into_iter().chain(FIRST_REAL_TIME..=*ALL.end()) {
        if [libc::SIG_DFL, libc::SIG_IGN].contains(&action(signal)[0]) {
            set_action(signal, &nothing);
        }
    }
}

fn action(signal: libc::c_int) -> Action {
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
    action
}

fn set_action(signal: libc::c_int, action: &Action) {
    // SAFETY: the kernel only reads the action. The action runs no code, or the handler of another
    // signal, which takes any signal.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            action.as_ptr(),
            ptr::null_mut::<Action>(),
            SET,
        )
    };
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
    fn a_stray_signal_ends_nothing() {
        // SAFETY: ignoring a signal runs no code of this process.
        unsafe { libc::signal(libc::SIGPWR, libc::SIG_IGN) };
        disregard_strays();
        let ours = action(libc::SIGUSR2)[0];
        for signal in STRAYS.into_iter().chain([libc::SIGUSR2]).chain(32..=64) {
            let handler = action(signal)[0];
            assert!(handler > libc::SIG_IGN, "{signal}");
            if handler != ours {
                // The C library's handler, which expects signals of this process to be its own.
                continue;
            }
            // SAFETY: the call only sends a signal to this thread.
            let sent =
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
            assert_eq!(sent, 0, "{signal}");
        }
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
