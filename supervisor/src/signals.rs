//! The signals that the supervisor obeys, as bytes on a pipe that epoll watches.
//!
//! Contract: [`Caught::catch`] is the first thing that the process does, and opens no descriptor. A
//! signal that came since the start of the process, even while the launcher's signal mask blocked
//! it, is obeyed as soon as the loop runs.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qrelay_shared::sys::signals;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1};

/// Which signals have come since the last look.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pending {
    /// SIGTERM or SIGINT.
    pub(crate) stop: bool,
    /// SIGHUP.
    pub(crate) reload: bool,
    /// SIGCHLD.
    pub(crate) child: bool,
    /// SIGUSR1.
    pub(crate) status: bool,
}

/// Signals that are noted, and wake nobody yet.
#[derive(Debug, Default)]
pub(crate) struct Caught {
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
    child: Arc<AtomicBool>,
    status: Arc<AtomicBool>,
}

impl Caught {
    /// Takes the signals over from their default actions. From now on no signal ends the process
    /// that isn't meant to.
    ///
    /// # Errors
    /// None is known: every one of these signals can be caught.
    pub(crate) fn catch() -> io::Result<Self> {
        let caught = Self::default();
        for (signal, flag) in caught.flags() {
            signal_hook::flag::register(signal, Arc::clone(flag))?;
        }
        signals::disregard_strays();
        Ok(caught)
    }

    fn flags(&self) -> [(i32, &Arc<AtomicBool>); 5] {
        [
            (SIGTERM, &self.stop),
            (SIGINT, &self.stop),
            (SIGHUP, &self.reload),
            (SIGCHLD, &self.child),
            (SIGUSR1, &self.status),
        ]
    }
}

/// Receives the signals.
#[derive(Debug)]
pub(crate) struct Signals {
    pipe: UnixStream,
    caught: Caught,
}

impl Signals {
    /// Has the signals wake the loop.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn new(caught: Caught) -> io::Result<Self> {
        let (pipe, mut writer) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        for (signal, _) in caught.flags() {
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        // Signals may have come before.
        writer.write_all(b"x")?;
        Ok(Self { pipe, caught })
    }

    /// Returns which signals have come, and forgets them.
    pub(crate) fn take(&mut self) -> Pending {
        // The bytes only wake the loop. A full pipe has woken it already.
        let _ = self.pipe.read(&mut [0; 64]);
        let Caught { stop, reload, child, status } = &self.caught;
        let [stop, reload, child, status] =
            [stop, reload, child, status].map(|flag| flag.swap(false, Ordering::Relaxed));
        Pending { stop, reload, child, status }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
