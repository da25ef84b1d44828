//! The exit statuses of all commands, from sysexits.h where it has one.

/// The exit status of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The command succeeded.
    Success = 0,
    /// What was asked for is refused; or `status`: the daemon doesn't serve; or `try`: the action
    /// is another one than was expected.
    Refused = 1,
    /// The daemon isn't running, as systemctl(1) says it.
    NotRunning = 3,
    /// The daemon may not be asked by this user, as systemctl(1) says it.
    NoPermission = 4,
    /// EX_USAGE: the command line is wrong.
    Usage = 64,
    /// EX_DATAERR: what was given as a mail can't be sent as one.
    Data = 65,
    /// EX_NOINPUT: a file can't be read.
    NoInput = 66,
    /// EX_UNAVAILABLE: a mail was refused for good.
    Unavailable = 69,
    /// EX_OSERR: the system refused something, such as a socket that is in use.
    System = 71,
    /// EX_TEMPFAIL: a mail was refused for now, or got no answer; or config.lua can't be used now,
    /// and trying again later may help.
    Temporary = 75,
    /// EX_PROTOCOL: what answers isn't the daemon, or one of another version.
    Protocol = 76,
    /// EX_CONFIG: config.lua can't be used, and trying again won't help.
    Config = 78,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
