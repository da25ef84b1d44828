//! The signals that the supervisor obeys, as bytes on a pipe that epoll watches.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};

/// Which signals have come since the last look.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pending {
    /// SIGTERM or SIGINT.
    pub(crate) stop: bool,
    /// SIGHUP.
    pub(crate) reload: bool,
    /// SIGCHLD.
    pub(crate) child: bool,
}

/// Receives the signals.
#[derive(Debug)]
pub(crate) struct Signals {
    pipe: UnixStream,
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
    child: Arc<AtomicBool>,
}

impl Signals {
    /// Takes the signals over from their default actions.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn register() -> io::Result<Self> {
        let (pipe, writer) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let signals =
            Self { pipe, stop: Arc::default(), reload: Arc::default(), child: Arc::default() };
        for (signal, flag) in [
            (SIGTERM, &signals.stop),
            (SIGINT, &signals.stop),
            (SIGHUP, &signals.reload),
            (SIGCHLD, &signals.child),
        ] {
            signal_hook::flag::register(signal, Arc::clone(flag))?;
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        Ok(signals)
    }

    /// Returns which signals have come, and forgets them.
    pub(crate) fn take(&mut self) -> Pending {
        // The bytes only wake the loop. A full pipe has woken it already.
        let _ = self.pipe.read(&mut [0; 64]);
        Pending {
            stop: self.stop.swap(false, Ordering::Relaxed),
            reload: self.reload.swap(false, Ordering::Relaxed),
            child: self.child.swap(false, Ordering::Relaxed),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
