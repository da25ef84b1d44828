//! Standard error as the destination of lines, whatever it is.
//!
//! Contract: writing never waits, unless [`Patience::Unlimited`] allows that. A line that follows a
//! line of which only a part could be written begins with a newline.
//!
//! # Failure
//! A line that can't be written at once is dropped. The caller counts it, or the thread that
//! writes.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, sendmsg};
use nix::sys::uio::writev;

use crate::log::tear::Tear;
use crate::log::{Content, Patience, writer};

/// Standard error of this process.
pub(super) struct Stderr {
    way: Way,
    tear: Tear,
}

/// How a line is written.
enum Way {
    /// Standard error is a socket, whose sender says that it doesn't wait.
    Socket(OwnedFd),
    /// Standard error, opened anew, so that O_NONBLOCK doesn't affect other users of the file.
    NonBlocking(&'static File),
    /// A file, whose disk or server may be slow, or a pipe or terminal that can't be opened anew. A
    /// thread writes.
    Thread,
    /// As [`Self::Thread`], in a process that has to have a single thread. Before each line,
    /// poll(2) says whether there is room.
    Direct,
}

impl Stderr {
    /// Looks at what standard error is.
    pub(super) fn open(patience: Patience) -> Self {
        let kind = std::fs::metadata("/proc/self/fd/2").map(|m| m.file_type());
        let anew = match kind {
            Ok(kind) if kind.is_socket() => {
                nix::unistd::dup(std::io::stderr()).ok().map(Way::Socket)
            }
            Ok(kind) if kind.is_fifo() || kind.is_char_device() => {
                opened_anew().map(Way::NonBlocking)
            }
            Ok(kind) if kind.is_file() => {
                append();
                None
            }
            _ => None,
        };
        let otherwise = match patience {
            Patience::None => Way::Thread,
            Patience::Unlimited => Way::Direct,
        };
        Self { way: anew.unwrap_or(otherwise), tear: Tear::default() }
    }

    /// Writes a line, or leaves it to the thread that writes. Returns false if the line is lost
    /// now. `content` says what has to be counted if the line is lost later.
    pub(super) fn write(&self, line: &[u8], content: Content) -> bool {
        match &self.way {
            Way::Socket(fd) => self.tear.write(line, |parts| {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(fd.as_raw_fd(), parts, &[], flags, None)
            }),
            Way::NonBlocking(file) => self.tear.write(line, |parts| writev(file, parts)),
            Way::Thread => writer::put(line, content),
            Way::Direct => {
                let stderr = std::io::stderr();
                let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                // A pipe that is ready takes PIPE_BUF bytes without waiting (pipe(7)).
                poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
                    && self.tear.write(line, |parts| writev(&stderr, parts))
            }
        }
    }
}

/// Returns standard error, opened anew for writing without waiting. The file stays open, because a
/// process that has become another user can't open it any more.
fn opened_anew() -> Option<&'static File> {
    static OPENED: OnceLock<File> = OnceLock::new();
    if OPENED.get().is_none() {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let _ = OPENED.set(options.open("/proc/self/fd/2").ok()?);
    }
    OPENED.get()
}

/// Has every line go to the end of the file. So an administrator who truncates the file gets its
/// space back, and the lines after that don't leave a hole.
fn append() {
    let stderr = std::io::stderr();
    if let Ok(flags) = fcntl(&stderr, FcntlArg::F_GETFL) {
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_APPEND;
        let _ = fcntl(&stderr, FcntlArg::F_SETFL(flags));
    }
}
