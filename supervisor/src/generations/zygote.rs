//! The zygotes: starting one for a generation, and the line to it.
//!
//! A zygote is this same binary, executed anew, with its end of the channel as
//! standard input. A standby is forked from it and speaks over a channel of its
//! own. Both are the supervisor's children.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::ids::GenerationId;
use nix::unistd::Pid;
use qrelay_shared::ipc::channel::Channel;
use qrelay_shared::ipc::message::{FromZygote, ToZygote};
use slog::Level;

/// The supervisor's end.
pub type ZygoteChannel = Channel<ToZygote, FromZygote>;

/// A process that can fork workers of one generation.
#[derive(Debug)]
pub struct Zygote {
    /// Whose configuration it holds.
    pub generation: GenerationId,
    /// Its process id; a standby's isn't known at once.
    pub pid: Option<Pid>,
    /// The line to it.
    pub channel: ZygoteChannel,
}

/// Environment of the supervisor's that no child may take for its own.
const SYSTEMD_VARIABLES: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

impl Zygote {
    /// Executes a fresh process image.
    ///
    /// # Errors
    /// Out of processes, descriptors or memory.
    pub fn spawn(generation: GenerationId, level: Level) -> io::Result<Self> {
        let (ours, theirs) = ZygoteChannel::pair()?;
        let mut command = Command::new(Path::new("/proc/self/exe"));
        command
            .args(["--log-level", level.as_str(), "zygote"])
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        for name in SYSTEMD_VARIABLES {
            command.env_remove(name);
        }
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(Self { generation, pid: Some(Pid::from_raw(pid)), channel: ours })
    }
}
