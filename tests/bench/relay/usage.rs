//! CPU time and memory of a process and everything below it, from /proc.
//!
//! Contract: the module only reads. CPU time includes the living processes of the tree and all
//! children that these have reaped, so that a worker that ends between two readings still counts.
//!
//! # Failure
//! A process that ends while it is read is left out; the next reading finds its CPU time at its
//! parent.

use std::{collections::HashMap, fs, thread, time::Duration};

use nix::unistd::{SysconfVar, sysconf};
use serde_json::{Value, json};

/// The numbers of one process from /proc/PID/stat that are used here.
struct Stat {
    parent: u32,
    name: String,
    ticks: u64,
}

/// Memory of one process, in KiB.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Process id.
    pub pid: u32,
    /// Process name (comm).
    pub name: String,
    /// Resident set.
    pub resident: u64,
    /// Part of the resident set that no other process shares (`Private_*` of smaps_rollup).
    pub private: u64,
}

/// Returns the user and system time of `root` and all processes below it.
pub fn cpu(root: u32) -> Duration {
    let ticks: u64 = tree(root).iter().map(|(_, stat)| stat.ticks).sum();
    let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100).unsigned_abs();
    Duration::from_micros(ticks * 1_000_000 / hertz)
}

/// Returns the memory of `root` and of all processes below it, `root` first.
pub fn memory(root: u32) -> Vec<Memory> {
    tree(root)
        .into_iter()
        .filter_map(|(pid, stat)| {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            Some(Memory {
                pid,
                name: stat.name,
                resident: sum_of(&rollup, "Rss:"),
                private: sum_of(&rollup, "Private_"),
            })
        })
        .collect()
}

/// Lets the highest resident set of `root` and of all processes below it count from now.
pub fn reset_peak(root: u32) {
    for (pid, _) in tree(root) {
        // proc_pid_clear_refs(5): 5 resets the peak. A process that has ended needs none.
        let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
    }
}

/// Returns the sum of the highest resident sets of `root` and of all processes below it, in KiB.
pub fn peak(root: u32) -> u64 {
    let status = |pid| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    tree(root).iter().map(|(pid, _)| sum_of(&status(pid), "VmHWM:")).sum()
}

/// Returns the number of entries in a directory of /proc/PID: `fd` has the descriptors, `task` the
/// threads.
pub fn entries(pid: u32, directory: &str) -> usize {
    fs::read_dir(format!("/proc/{pid}/{directory}")).map_or(0, Iterator::count)
}

/// Describes the machine, for those who read the numbers elsewhere.
pub fn machine() -> Value {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        line.split_once(':').map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "processor": field("/proc/cpuinfo", "model name"),
        "cpus": thread::available_parallelism().map_or(1, usize::from),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": kernel.trim(),
    })
}

/// Returns the sum of the KiB in the lines that start with `prefix`.
fn sum_of(rollup: &str, prefix: &str) -> u64 {
    let lines = rollup.lines().filter(|line| line.starts_with(prefix));
    lines.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

/// Returns `root` and the processes below it, each after its parent.
fn tree(root: u32) -> Vec<(u32, Stat)> {
    let mut all = processes();
    let mut found: Vec<(u32, Stat)> = all.remove_entry(&root).into_iter().collect();
    let mut next = 0;
    while next < found.len() {
        let parent = found[next].0;
        let mut children: Vec<u32> =
            all.iter().filter(|(_, stat)| stat.parent == parent).map(|(pid, _)| *pid).collect();
        children.sort_unstable();
        found.extend(children.iter().filter_map(|pid| all.remove_entry(pid)));
        next += 1;
    }
    found
}

fn processes() -> HashMap<u32, Stat> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, stat(pid)?))).collect()
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (front, back) = text.rsplit_once(')')?;
    let (_, name) = front.split_once('(')?;
    // The fields of proc_pid_stat(5) start with number 3 here, the state. Number 4 is ppid; 14 to
    // 17 are utime, stime, cutime and cstime in clock ticks.
    let fields: Vec<&str> = back.split_ascii_whitespace().collect();
    let ticks = fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Some(Stat { parent: fields.get(1)?.parse().ok()?, name: name.to_owned(), ticks })
}
