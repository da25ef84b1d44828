//! The processes of the system, as /proc/PID/stat shows them (proc_pid_stat(5)).
//!
//! Contract: a list is no snapshot. A process that begins while the list is read may be missing,
//! and a process that ends may be there. A process whose main thread has ended before its other
//! threads counts as ended.
//!
//! # Failure
//! Without /proc, or without a free descriptor to read it, there is no list. A process that ends
//! while it is read, or that is hidden from the caller (hidepid), is left out.

use std::fs::File;
use std::io::{self, Read};
use std::str::SplitAsciiWhitespace;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{Pid, SysconfVar, sysconf};

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

/// Facts that tell a process from another one that had, or will have, the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The process as in a list.
    pub process: Process,
    /// Id of the session.
    pub session: Pid,
    /// Whether the main thread has ended or is ending. The kernel gives the children of a process
    /// to another parent only when all of its threads are ending.
    pub ending: bool,
    /// Start time in clock ticks since the boot. A number is not reused within a tick.
    pub started: u64,
}

/// `PF_EXITING` of include/linux/sched.h: the thread is ending.
const ENDING: u32 = 0x4;

/// Returns the facts about one process; `None` if there is no such process, or if the process is
/// hidden from the caller.
///
/// # Errors
/// Returns an error if a descriptor or memory is lacking.
pub fn identify(pid: Pid) -> io::Result<Option<Identity>> {
    read(pid, |stat| parse_identity(pid, stat))
}

/// What a process takes up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Its processor time, that of its children not included.
    pub cpu: Duration,
    /// Number of its threads.
    pub threads: u64,
    /// Its resident memory in bytes.
    pub rss: u64,
}

/// Returns what one process takes up; `None` if there is no such process, if it is hidden from the
/// caller, or if a descriptor is lacking.
pub fn usage(pid: Pid) -> Option<Usage> {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten()?;
    let (ticks, page) = (u64::try_from(ticks).ok()?, u64::try_from(page).ok()?);
    read(pid, |stat| parse_usage(stat, ticks, page)).ok()?
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
        all.extend(look(Pid::from_raw(pid))?);
    }
    Ok(all)
}

fn look(pid: Pid) -> io::Result<Option<Process>> {
    read(pid, |stat| parse(pid, stat))
}

/// Longest content of /proc/PID/stat in bytes, with room to spare: the name has at most 64 bytes,
/// and each of the 51 numbers at most 20 digits (fs/proc/array.c, `do_task_stat`).
const MAX_STAT: usize = 2048;

/// Reads the file in one call, and parses it.
fn read<T>(pid: Pid, parse: impl FnOnce(&[u8]) -> Option<T>) -> io::Result<Option<T>> {
    let mut stat = [0; MAX_STAT];
    let read = File::open(format!("/proc/{pid}/stat")).and_then(|mut file| file.read(&mut stat));
    match read {
        Ok(length) => Ok(stat.get(..length).and_then(parse)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Err(error),
            _ => Ok(None),
        },
    }
}

/// Parses the content of /proc/PID/stat.
fn parse(pid: Pid, stat: &[u8]) -> Option<Process> {
    parse_process(pid, &mut fields(stat)?)
}

/// Returns the fields after the second one, which is in parentheses and may contain any bytes.
fn fields(stat: &[u8]) -> Option<SplitAsciiWhitespace<'_>> {
    let after = stat.iter().rposition(|&byte| byte == b')')?;
    Some(str::from_utf8(&stat[after + 1..]).ok()?.split_ascii_whitespace())
}

/// Parses the fields 6, 9 and 22 (session, flags, start time) too.
fn parse_identity(pid: Pid, stat: &[u8]) -> Option<Identity> {
    let mut fields = fields(stat)?;
    let process = parse_process(pid, &mut fields)?;
    let session = Pid::from_raw(fields.next()?.parse().ok()?);
    let flags: u32 = fields.nth(2)?.parse().ok()?;
    let started = fields.nth(12)?.parse().ok()?;
    let ending = !process.alive || flags & ENDING != 0;
    Some(Identity { process, session, ending, started })
}

/// Parses the fields 14, 15, 20 and 24 (user time, system time, threads, resident pages).
fn parse_usage(stat: &[u8], ticks: u64, page: u64) -> Option<Usage> {
    let mut fields = fields(stat)?;
    let mut number = |skipped: usize| fields.nth(skipped)?.parse::<u64>().ok();
    let spent = number(11)? + number(0)?;
    let threads = number(4)?;
    let rss = number(3)?.checked_mul(page)?;
    let cpu = Duration::from_secs_f64(spent as f64 / ticks.max(1) as f64);
    Some(Usage { cpu, threads, rss })
}

/// Parses state, parent and group.
fn parse_process(pid: Pid, fields: &mut SplitAsciiWhitespace<'_>) -> Option<Process> {
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
    fn usage_is_counted_in_bytes_and_seconds() {
        let line = b"7 (a) b) S 3 7 5 0 -1 4194304 1 2 3 4 150 50 7 8 20 0 9 0 8899 4096 12 18";
        let expected = Usage { cpu: Duration::from_secs(2), threads: 9, rss: 12 * 4096 };
        assert_eq!(parse_usage(line, 100, 4096), Some(expected));
        assert_eq!(parse_usage(b"7 (a) S 3 7 5", 100, 4096), None);
        let own = usage(Pid::this()).expect("this process");
        assert!(own.threads >= 1 && own.rss > 100_000, "{own:?}");
    }

    #[test]
    fn an_identity_is_parsed_from_the_whole_line() {
        let (pid, number) = (Pid::from_raw(7), Pid::from_raw);
        let tail = "0 -1 FLAGS 1 2 3 4 5 6 7 8 20 0 1 0 8899 4096 1";
        let table = [("S", "4194304", true, false), ("R", "4194308", true, true)];
        let table = table.into_iter().chain([("Z", "4194304", false, true)]);
        for (state, flags, alive, ending) in table {
            let line = format!("7 (a) b) {state} 3 7 5 {}", tail.replace("FLAGS", flags));
            let process = Process { pid, parent: number(3), group: pid, alive };
            let expected = Identity { process, session: number(5), ending, started: 8899 };
            assert_eq!(parse_identity(pid, line.as_bytes()), Some(expected), "{line}");
        }
        assert_eq!(parse_identity(pid, b"7 (sh) S 3 7 5 0 -1 0 1"), None);
    }

    #[test]
    fn a_process_that_ends_is_identified_until_it_is_reaped() {
        let mut child = Command::new("/bin/sleep").arg("60").process_group(0).spawn().expect("a");
        let pid = Pid::from_raw(child.id().cast_signed());
        let running = identify(pid).expect("/proc").expect("runs");
        assert_eq!((running.process.parent, running.process.group), (Pid::this(), pid));
        assert_eq!(Some(running.session), nix::unistd::getsid(None).ok());
        assert!(running.process.alive && !running.ending);
        child.kill().expect("kill");
        let ended = loop {
            let now = identify(pid).expect("/proc").expect("isn't reaped");
            if !now.process.alive {
                break now;
            }
            std::thread::yield_now();
        };
        assert!(ended.ending);
        assert_eq!((ended.started, ended.session), (running.started, running.session));
        assert_eq!((ended.process.parent, ended.process.group), (Pid::this(), pid));
        child.wait().expect("wait");
        assert_eq!(identify(pid).expect("/proc"), None);
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
        let look = |pid| look(pid).expect("/proc");
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
