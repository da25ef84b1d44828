//! Giving up capabilities (capabilities(7)) that a process doesn't need.
//!
//! # Failure
//! Every error is the errno of the failed call.

use nix::errno::Errno;

/// A capability: its number in include/uapi/linux/capability.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Capability {
    /// Change the owner of a file.
    Chown = 0,
    /// Pass by the modes of files and directories.
    DacOverride = 1,
    /// Change the mode of another user's file.
    Fowner = 3,
    /// Signal another user's process.
    Kill = 5,
    /// Become a member of other groups.
    SetGid = 6,
    /// Become another user.
    SetUid = 7,
    /// Bind a port below 1024.
    NetBindService = 10,
    /// Look at another user's process in /proc.
    SysPtrace = 19,
}

impl Capability {
    /// Returns the name as capabilities(7) has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chown => "CAP_CHOWN",
            Self::DacOverride => "CAP_DAC_OVERRIDE",
            Self::Fowner => "CAP_FOWNER",
            Self::Kill => "CAP_KILL",
            Self::SetGid => "CAP_SETGID",
            Self::SetUid => "CAP_SETUID",
            Self::NetBindService => "CAP_NET_BIND_SERVICE",
            Self::SysPtrace => "CAP_SYS_PTRACE",
        }
    }
}

/// `_LINUX_CAPABILITY_VERSION_3`: sets of 64 bits, in two parts.
const VERSION: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`. Process 0 is the calling thread.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up all capabilities of the calling thread but these, and returns those of them that it
/// has. A program that the process executes as root gets its capabilities as before, unless the
/// process has `no_new_privs`.
///
/// # Errors
/// As capget(2) and capset(2).
pub fn keep_only(wanted: &[Capability]) -> Result<Vec<Capability>, Errno> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads and writes one header and, in this version, two sets; both have
    // that layout and outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    Errno::result(result)?;
    let permitted = u64::from(sets[0].permitted) | u64::from(sets[1].permitted) << 32;
    let kept: Vec<_> =
        wanted.iter().copied().filter(|which| permitted >> *which as u32 & 1 == 1).collect();
    let bits = kept.iter().fold(0_u64, |bits, which| bits | 1 << *which as u32);
    for (part, shift) in sets.iter_mut().zip([0, 32]) {
        let bits = (bits >> shift) as u32;
        *part = Sets { effective: bits, permitted: bits, inheritable: 0 };
    }
    // SAFETY: the kernel reads one header and two sets, as above.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    Errno::result(result)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effective() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("CapEff");
        u64::from_str_radix(line.trim(), 16).expect("hexadecimal")
    }

    #[test]
    fn what_is_not_named_is_given_up() {
        // Capabilities belong to a thread, so only this thread gives its own up.
        let (before, kept, after) = std::thread::spawn(|| {
            let before = effective();
            let kept = keep_only(&[Capability::Kill, Capability::SysPtrace]).expect("capset");
            (before, kept, effective())
        })
        .join()
        .expect("no panic");
        assert_eq!(after, before & (1 << 5 | 1 << 19));
        assert_eq!(after.count_ones() as usize, kept.len());
        assert!(kept.iter().all(|which| after >> *which as u32 & 1 == 1));
    }
}
