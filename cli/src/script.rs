//! A script that a command loads itself: where the script is, and how long loading may take.
//!
//! # Failure
//! A script that takes too long ends the process: see [`Script::limit`].

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use qrelay_shared::exit::Exit;
use slog::Level;

/// A script, and the terms on which it is loaded.
#[derive(Debug, Clone)]
pub struct Script {
    /// The script, absolute.
    pub config: PathBuf,
    /// Log records of this level and above.
    pub level: Level,
    /// Longest time for loading.
    pub boot_timeout: Duration,
}

/// Loading has a time limit until this is dropped.
#[derive(Debug)]
pub struct Limit {
    _loading: Sender<()>,
}

impl Script {
    /// Limits the time for loading, as the daemon does. If the limit passes, the process ends with
    /// a message, because a script can't be interrupted wherever it is.
    pub fn limit(&self) -> Limit {
        let (loading, end) = channel();
        let (path, limit) = (self.config.display().to_string(), self.boot_timeout);
        std::thread::spawn(move || {
            if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!(
                    "qrelay: {path}: the script has run for {} s and would not be loaded \
                     (--boot-timeout)",
                    limit.as_secs_f64()
                );
                std::process::exit(Exit::Config as i32);
            }
        });
        Limit { _loading: loading }
    }
}
