//! The processes of the system, as /proc/PID/stat shows them (proc_pid_stat(5)).
//!
//! Contract: a list is no snapshot. A process that begins while the list is read may be missing,
//! and a process that ends may be there. A process whose main thread has ended before its other
//! threads counts as ended.
//!
//! # Failure
//! Without /proc, or without a free descriptor to read it, there is no list. A process that ends
//! while it is read, or that is hidden from the caller (hidepid), is left out.

use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;

/// A process at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: Pid,
    /// Process id of the parent at that moment.
    pub parent: Pid,
    /// Id of the process group.
    pub group: Pid,
    /// Whether the process hasn't ended: it is neither a zombie nor about to vanish.
    pub alive: bool,
}

/// Returns all processes of the system.
///
/// # Errors
/// Returns an error if /proc can't be read, for example for lack of descriptors.
pub fn processes() -> io::Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        all.extend(look(pid)?);
    }
    Ok(all)
}

fn look(pid: i32) -> io::Result<Option<Process>> {
    match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(stat) => Ok(parse(Pid::from_raw(pid), &stat)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Err(error),
            _ => Ok(None),
        },
    }
}

/// Parses the content of /proc/PID/stat. The second field is in parentheses and may contain any
/// bytes; after it come state, parent and group.
fn parse(pid: Pid, stat: &[u8]) -> Option<Process> {
    let after = stat.iter().rposition(|&byte| byte == b')')?;
    let mut fields = str::from_utf8(&stat[after + 1..]).ok()?.split_ascii_whitespace();
    let alive = !matches!(fields.next()?, "Z" | "X" | "x");
    let mut id = || fields.next()?.parse().ok().map(Pid::from_raw);
    Some(Process { pid, parent: id()?, group: id()?, alive })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{getpgrp, getppid};
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    #[test]
    fn names_may_contain_anything() {
        let pid = Pid::from_raw(7);
        let process = |parent, group, alive| {
            let (parent, group) = (Pid::from_raw(parent), Pid::from_raw(group));
            Some(Process { pid, parent, group, alive })
        };
        let table: [(&[u8], _); 5] = [
            (b"7 (sleep) S 3 5 5 0 -1", process(3, 5, true)),
            (b"7 (a) Z 1 (b\n\xff) R 3 5 5", process(3, 5, true)),
            (b"7 (sh) Z 3 7 5", process(3, 7, false)),
            (b"7 (sh) R 3", None),
            (b"", None),
        ];
        for (stat, expected) in table {
            assert_eq!(parse(pid, stat), expected, "{stat:?}");
        }
    }

    #[test]
    fn we_are_there() {
        let all = processes().expect("/proc");
        let own = all.into_iter().find(|process| process.pid == Pid::this());
        let expected =
            Process { pid: Pid::this(), parent: getppid(), group: getpgrp(), alive: true };
        assert_eq!(own, Some(expected));
    }

    #[test]
    fn a_group_lives_as_long_as_a_member() {
        let mut leader = Command::new("/bin/sleep").arg("60").process_group(0).spawn().expect("a");
        let group = leader.id().cast_signed();
        let mut other =
            Command::new("/bin/sleep").arg("60").process_group(group).spawn().expect("b");
        let group = Pid::from_raw(group);
        leader.kill().expect("kill");
        let look = |pid: Pid| look(pid.as_raw()).expect("/proc");
        let is_alive = |group| {
            let all = processes().expect("/proc");
            all.iter().any(|process| process.alive && process.group == group)
        };
        while look(group).is_some_and(|process| process.alive) {
            std::thread::yield_now();
        }
        assert!(is_alive(group), "the leader is a zombie, the other one lives");
        other.kill().expect("kill");
        other.wait().expect("wait");
        assert!(!is_alive(group), "only the zombie is left");
        leader.wait().expect("wait");
    }
}
