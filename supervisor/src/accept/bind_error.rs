//! Why a listening socket can't be made.

use std::io;
use std::path::PathBuf;

use qrelay_shared::system_error::shown;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Another process listens on the address.
    #[error("{0} is already in use by another process")]
    InUse(String),
    /// The path is no socket.
    #[error("{0} exists and is not a socket; it was left alone")]
    NotASocket(PathBuf),
    /// Another process is binding the path.
    #[error("{0} is locked: another process is starting on this path")]
    Locked(PathBuf),
    /// The lock's path is no regular file.
    #[error("{0} exists and is not a regular file; it was left alone")]
    NotAFile(PathBuf),
    /// Another file is where the socket's file was a moment ago.
    #[error(
        "{0} was replaced by another file while it was bound; whoever may write its directory \
        can do that"
    )]
    Replaced(PathBuf),
    /// There is no directory for the socket's file.
    #[error(
        "cannot bind {path}: the directory {directory} doesn't exist; create it, for instance by \
        RuntimeDirectory= in the unit or by systemd-tmpfiles",
        path = path.display(), directory = directory.display()
    )]
    NoDirectory {
        /// Where the socket is to be.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// The port is one of those that not everybody may bind.
    #[error(
        "cannot bind {0}: ports below 1024 need CAP_NET_BIND_SERVICE, for instance by \
        AmbientCapabilities= in the unit; or let a socket unit of systemd bind the port"
    )]
    Privileged(String),
    /// The named step failed.
    #[error("cannot {0} {1}: {text}", text = shown(.2))]
    Os(&'static str, String, io::Error),
}

/// Returns what turns the system's error into that of a step.
pub(super) fn os<E: Into<io::Error>>(
    step: &'static str,
    what: impl ToString,
) -> impl FnOnce(E) -> BindError {
    move |error| BindError::Os(step, what.to_string(), error.into())
}
