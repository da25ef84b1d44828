//! The processes of a daemon, as /proc shows them.
//!
//! Contract: the harness gives each daemon an environment variable that all its processes inherit.
//! The processes of a daemon are found by that variable, so that orphans are found too.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::eventually;

/// Environment variable that marks the processes of a daemon.
pub const TAG: &str = "QRELAY_TEST_TAG";

/// A process as seen at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Process id of the parent.
    pub parent: i32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// State letter of proc_pid_stat(5): `R`, `S`, `T`, `Z`, …
    pub state: char,
}

/// Returns the process with this pid if there is one; zombies count.
pub fn look(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = (stat.find('(')?, stat.rfind(')')?);
    let mut fields = stat[tail + 1..].split_whitespace();
    Some(Process {
        pid,
        name: stat[head + 1..tail].into(),
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

/// Returns the only thread of this name in a process, as soon as there is one.
#[track_caller]
pub fn thread_named(pid: i32, name: &str) -> Pid {
    eventually("a thread of this name", || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
        let named = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.ok()?.path();
            let comm = fs::read_to_string(path.join("comm")).ok()?;
            let tid = path.file_name()?.to_str()?.parse().ok()?;
            (comm.trim_end() == name).then(|| Pid::from_raw(tid))
        };
        let threads: Vec<Pid> = tasks.filter_map(named).collect();
        assert!(threads.len() <= 1, "threads {name} of {pid}");
        threads.first().copied()
    })
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Returns all processes that carry `tag`. A zombie has no environment and is not found.
pub fn tagged(tag: &str) -> Vec<Process> {
    let wanted = format!("{TAG}={tag}");
    let carries = |pid: i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == wanted.as_bytes())
    };
    pids().filter(|&pid| carries(pid)).filter_map(look).collect()
}

/// Returns the children of `parent`, including zombies.
pub fn children(parent: i32) -> Vec<Process> {
    pids().filter_map(look).filter(|process| process.parent == parent).collect()
}

/// Returns the pids of the children of `parent` with this name, sorted and without zombies.
pub fn children_named(parent: i32, name: &str) -> Vec<i32> {
    let alive = |process: &Process| process.name == name && process.state != 'Z';
    let mut found: Vec<_> = children(parent).into_iter().filter(alive).map(|p| p.pid).collect();
    found.sort_unstable();
    found
}

/// Returns the descriptors of a process, sorted by number, and what each refers to.
pub fn descriptors(pid: i32) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?))
        })
        .collect();
    found.sort();
    found
}

/// Returns the number of jobs that a worker is relaying. Apart from its three channels to the
/// supervisor, a worker has two sockets per such job, the client's and the next hop's.
pub fn relaying(worker: i32) -> usize {
    let is_socket = |path: &PathBuf| path.to_string_lossy().starts_with("socket:");
    let sockets = descriptors(worker).iter().filter(|(_, path)| is_socket(path)).count();
    sockets.saturating_sub(3) / 2
}

/// Returns a number of bytes from a file such as `status` or `smaps_rollup` of a process.
pub fn memory(pid: i32, file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect("process is there");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("key is there");
    let number = line.trim_start_matches(':').trim().trim_end_matches(" kB");
    number.parse::<u64>().expect("a number") * 1024
}

/// Returns the user and system time of a process so far, in clock ticks of 10 ms.
pub fn cpu_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("process is there");
    let tail = &stat[stat.rfind(')').expect("name") + 1..];
    let fields: Vec<_> = tail.split_whitespace().collect();
    // utime and stime are fields 14 and 15 of proc_pid_stat(5). `fields` starts with field 3.
    [11, 12].iter().map(|&at| fields[at].parse::<u64>().expect("a number")).sum()
}

/// Stops a process with SIGSTOP, and waits until none of its threads runs.
pub fn stop(pid: i32) {
    signal(pid, Signal::SIGSTOP);
    eventually("a stopped process", || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let mut states = threads.flatten().map(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().and_then(|tail| tail.trim().chars().next())
        });
        states.all(|state| state == Some('T')).then_some(())
    });
}

/// Sends a signal. A process that is gone is no error.
pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}
