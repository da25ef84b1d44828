//! Resource limits: those that qrelay was started with, for programs, and qrelay's own.
//!
//! Contract: only soft limits change, so that a program can get back what qrelay was started with,
//! but for the number of descriptors, of which zygotes and all that they start get a part
//! ([`of_others`]). The supervisor reads the limits before it changes them, and tells them to its
//! zygotes.
//!
//! # Failure
//! Every error is the errno of the failed call; the limits are unchanged then.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// Bytes per unit of the shell's `ulimit -c`.
const SHELL_BLOCK: rlim_t = 512;

/// Soft limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Number of descriptors (RLIMIT_NOFILE).
    pub descriptors: rlim_t,
    /// Size of a core dump in bytes (RLIMIT_CORE).
    pub(crate) core: rlim_t,
}

/// The limits that qrelay was started with, where they are known.
static ORIGINAL: OnceLock<Limits> = OnceLock::new();

impl Limits {
    /// Returns this process's limits.
    ///
    /// # Errors
    /// As getrlimit(2).
    pub fn now() -> Result<Self, Errno> {
        Ok(Self {
            descriptors: getrlimit(Resource::RLIMIT_NOFILE)?.0,
            core: getrlimit(Resource::RLIMIT_CORE)?.0,
        })
    }

    /// Notes these limits as those that qrelay was started with. Only the first call counts.
    pub fn remember(self) {
        let _ = ORIGINAL.set(self);
    }

    /// Returns the limits that programs get; `None` if programs get this process's.
    pub(crate) fn of_programs() -> Option<Self> {
        ORIGINAL.get().copied()
    }

    /// Returns the shell's commands, on one line, that set the limits of programs where this
    /// process has others. A limit that can't be set stays as it is.
    pub fn shell_commands() -> String {
        match (Self::of_programs(), Self::now()) {
            (Some(wanted), Ok(now)) => wanted.commands_from(now),
            _ => String::new(),
        }
    }

    fn commands_from(self, now: Self) -> String {
        let mut commands = String::new();
        let mut set = |option, limit: String| {
            // Not 2>/dev/null, which would make a file where there is no such device.
            commands.push_str(&format!("ulimit -S{option} {limit} 2>&-; "));
        };
        let shown = |limit: rlim_t, unit: rlim_t| match limit {
            RLIM_INFINITY => "unlimited".to_owned(),
            limit => (limit / unit).to_string(),
        };
        if self.descriptors != now.descriptors {
            set('n', shown(self.descriptors, 1));
        }
        if self.core != now.core {
            set('c', shown(self.core, SHELL_BLOCK));
        }
        commands
    }
}

impl Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.descriptors, self.core)
    }
}

impl FromStr for Limits {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers = text.split_once(':').and_then(|(descriptors, core)| {
            Some(Self { descriptors: descriptors.parse().ok()?, core: core.parse().ok()? })
        });
        numbers.ok_or("expected two numbers with a colon between them")
    }
}

/// Raises the limit of descriptors to the hard limit. With the soft limit qrelay works too, for
/// fewer clients.
///
/// # Errors
/// As getrlimit(2) and setrlimit(2).
pub fn raise_descriptors() -> Result<(), Errno> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft == hard { Ok(()) } else { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) }
}

/// With fewer descriptors all processes have the same limit: a single message can have 253 in it
/// (SCM_MAX_FD of Linux), so that a part would be no protection.
const FEW: rlim_t = 4096;

/// Returns how many descriptors zygotes, workers and programs may have if the supervisor may have
/// `limit`.
///
/// The kernel counts the descriptors that processes of one user are passing to each other, and
/// refuses to pass more when a sender's limit is exceeded (net/unix/garbage.c and scm.c). With the
/// supervisor's limit, any worker or program could pass so many to itself that the supervisor could
/// pass no client to a worker. With a lower limit, the others are refused before the supervisor is.
/// The difference has room for what is sent at the same moment, and for the supervisor's own.
pub fn of_others(limit: rlim_t) -> rlim_t {
    if limit < FEW { limit } else { limit - limit / 4 }
}

/// Lowers the limits of descriptors to [`of_others`], for this process and all that it starts.
///
/// # Errors
/// As getrlimit(2) and setrlimit(2).
pub fn leave_descriptors() -> Result<(), Errno> {
    let limit = of_others(getrlimit(Resource::RLIMIT_NOFILE)?.0);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit)
}

/// Forbids core dumps, because they would contain mail. The limit is 1, not 0, because only 1 stops
/// the kernel from starting a program that takes dumps through a pipe (core(5), fs/coredump.c).
///
/// # Errors
/// `EPERM`: the hard limit is 0, and raising it needs a privilege. Then only dumps to files are
/// forbidden.
pub fn forbid_core_dumps() -> Result<(), Errno> {
    let (_, hard) = getrlimit(Resource::RLIMIT_CORE)?;
    setrlimit(Resource::RLIMIT_CORE, 1, hard.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Limits = Limits { descriptors: 1024, core: 0 };

    #[test]
    fn limits_survive_the_command_line() {
        for limits in [SOME, Limits { descriptors: RLIM_INFINITY, core: RLIM_INFINITY }] {
            assert_eq!(limits.to_string().parse(), Ok(limits));
        }
        for text in ["", "1", "1:", ":1", "1:2:3", "-1:2", "a:b"] {
            assert!(text.parse::<Limits>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_supervisor_keeps_a_part() {
        for (limit, others) in [(1024, 1024), (4095, 4095), (4096, 3072), (65_536, 49_152)] {
            assert_eq!(of_others(limit), others);
        }
    }

    #[test]
    fn the_shell_sets_what_differs() {
        assert_eq!(SOME.commands_from(SOME), "");
        let now = Limits { descriptors: 4096, core: 1 };
        let expected = "ulimit -Sn 1024 2>&-; ulimit -Sc 0 2>&-; ";
        assert_eq!(SOME.commands_from(now), expected);
        let wanted = Limits { descriptors: 4096, core: RLIM_INFINITY };
        assert_eq!(wanted.commands_from(now), "ulimit -Sc unlimited 2>&-; ");
        let wanted = Limits { descriptors: 4096, core: 4096 };
        assert_eq!(wanted.commands_from(now), "ulimit -Sc 8 2>&-; ");
    }
}
