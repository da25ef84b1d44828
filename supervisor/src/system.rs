//! The operating system's processes, behind a seam: tests play the system themselves.
//!
//! # Failure
//! A signal to a process that has ended does nothing, as long as nobody has reaped the process.

use std::collections::HashSet;
use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpgrp};
use qrelay_shared::ipc::channel::Channel;
use qrelay_shared::ipc::message::{FromZygote, ToZygote};
use qrelay_shared::sys::limits::Limits;
use qrelay_shared::sys::proc_stat::{self, Identity, Process, Usage};
use qrelay_shared::sys::process_group::Group;
use qrelay_shared::sys::{activation, input, process};
use slog::Level;

use crate::ids::JobId;

/// How long the daemon's end waits for processes that were killed.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// The supervisor's end of the channel to a zygote.
pub(crate) type ZygoteChannel = Channel<ToZygote, FromZygote>;

/// Questions and orders to the system about processes.
pub(crate) trait System: Debug {
    /// Starts a zygote as a fresh process image.
    ///
    /// # Errors
    /// Out of processes, descriptors or memory.
    fn spawn_zygote(&self) -> io::Result<(Pid, ZygoteChannel)>;

    /// Sends a signal to a child that has not been reaped.
    fn signal(&self, pid: Pid, signal: Signal);

    /// Sends a signal to a process group. Returns whether the group has a member that this process
    /// may signal.
    fn signal_group(&self, group: Pid, signal: Signal) -> bool;

    /// Returns whether a process group has a member, a zombie included.
    fn group_exists(&self, group: Pid) -> bool;

    /// Returns a child that has ended and isn't reaped: `of` if that is given, else any.
    fn ended(&self, of: Option<Pid>) -> Option<Pid>;

    /// Reaps a child that has ended; `None` if there is no such child.
    fn reap(&self, pid: Pid) -> Option<WaitStatus>;

    /// Kills children, and reaps them when they have ended: the daemon ends. Nobody waits for long
    /// for a child that the kernel holds (an uninterruptible sleep).
    fn kill_all(&self, pids: &[Pid]) {
        for &pid in pids {
            self.signal(pid, Signal::SIGKILL);
        }
        let until = Instant::now() + LAST_PATIENCE;
        for &pid in pids {
            while self.ended(Some(pid)).is_none() && self.is_child(pid) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            if self.ended(Some(pid)).is_some() {
                self.reap(pid);
            }
        }
    }

    /// Returns whether a process is a child of this one that has not been reaped. Such a number
    /// can't become another process' before this process reaps it.
    fn is_child(&self, pid: Pid) -> bool;

    /// Returns the facts about one process; `None` if there is none, or if it is hidden.
    ///
    /// # Errors
    /// /proc can't be read.
    fn identify(&self, pid: Pid) -> io::Result<Option<Identity>>;

    /// Returns what one process takes up; `None` if there is no such process, or if it is hidden.
    fn usage(&self, pid: Pid) -> Option<Usage>;

    /// Lists the processes of the system.
    ///
    /// # Errors
    /// /proc can't be read.
    fn processes(&self) -> io::Result<Vec<Process>>;

    /// Returns what a process is for, by the mail on its standard input or among its other files.
    fn role(&self, process: Process, jobs: &HashSet<JobId>) -> Role;

    /// Returns this process' id.
    fn own_pid(&self) -> Pid;

    /// Returns the id of this process' group, to which zygotes and workers belong too.
    fn own_group(&self) -> Pid;

    /// Returns how many descriptors this process may have.
    fn descriptor_limit(&self) -> u64;
}

/// The role of a child of the supervisor, seen from the jobs of a dead worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The program of this job.
    Program(JobId),
    /// A copy of the worker that has not become this job's program yet, or a process with the
    /// job's mail that leads no group.
    Copy(JobId),
    /// Something else.
    Other,
}

/// Which zygotes live: what reaping has to know about children that are not workers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ZygotePids {
    /// Their process ids.
    pub(crate) known: Vec<Pid>,
    /// How many have not told their process ids yet.
    pub(crate) unknown: usize,
}

/// The real system.
#[derive(Debug)]
pub(crate) struct Linux {
    /// Least severe level that a zygote logs.
    pub(crate) level: Level,
    /// The limits that programs get.
    pub(crate) limits: Limits,
}

/// This process's own program, also if another one has its path by now.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Bytes of a zygote's first argument, so that there is room for the longest title.
const TITLE_ROOM: usize = 80;

/// Environment of the supervisor's that no child may take for its own.
const SYSTEMD_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

impl System for Linux {
    /// Executes this same binary anew, with the zygote's end of the channel as standard input.
    fn spawn_zygote(&self) -> io::Result<(Pid, ZygoteChannel)> {
        let (ours, theirs) = ZygoteChannel::pair()?;
        let ours = ours.foreign();
        let mut command = Command::new(Path::new(OWN_PROGRAM));
        command
            .arg0(format!("{:TITLE_ROOM$}", "qrelay: zygote"))
            .args(["--log-level", self.level.as_str(), "zygote", "--limits"])
            .arg(self.limits.to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        for name in SYSTEMD_VARIABLES.into_iter().chain(activation::VARIABLES) {
            command.env_remove(name);
        }
        let child = command.spawn().map_err(|error| match error.kind() {
            // /proc isn't mounted.
            io::ErrorKind::NotFound => io::Error::other(format!("{OWN_PROGRAM}: {error}")),
            _ => error,
        })?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok((Pid::from_raw(pid), ours))
    }

    fn signal(&self, pid: Pid, signal: Signal) {
        // The process may have ended already.
        let _ = kill(pid, signal);
    }

    fn signal_group(&self, group: Pid, signal: Signal) -> bool {
        Group::led_by(group).is_some_and(|group| group.signal(signal).is_ok())
    }

    fn group_exists(&self, group: Pid) -> bool {
        Group::led_by(group).is_some_and(|group| !group.is_empty())
    }

    fn ended(&self, of: Option<Pid>) -> Option<Pid> {
        process::ended_child(of)
    }

    fn reap(&self, pid: Pid) -> Option<WaitStatus> {
        process::reap(pid).ok()
    }

    fn is_child(&self, pid: Pid) -> bool {
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        // EINVAL stands for a child that was ended by a signal which nix has no name for.
        pid.as_raw() > 1 && waitid(Id::Pid(pid), look) != Err(Errno::ECHILD)
    }

    fn identify(&self, pid: Pid) -> io::Result<Option<Identity>> {
        proc_stat::identify(pid)
    }

    fn usage(&self, pid: Pid) -> Option<Usage> {
        proc_stat::usage(pid)
    }

    fn processes(&self) -> io::Result<Vec<Process>> {
        proc_stat::processes()
    }

    fn role(&self, process: Process, jobs: &HashSet<JobId>) -> Role {
        let read = input::mail_of(process.pid).filter(|job| jobs.contains(job));
        // A program leads its group from its first instruction on. A process in a group that
        // another process leads may have joined strangers, who must not be signalled with it.
        let leads = process.group == process.pid && process.group != getpgrp();
        if let Some(job) = read.filter(|_| leads) {
            return Role::Program(job);
        }
        let open = input::mails_of(process.pid).into_iter().find(|job| jobs.contains(job));
        open.map_or(Role::Other, Role::Copy)
    }

    fn own_pid(&self) -> Pid {
        Pid::this()
    }

    fn own_group(&self) -> Pid {
        getpgrp()
    }

    fn descriptor_limit(&self) -> u64 {
        // getrlimit fails only for a resource that the kernel doesn't know.
        Limits::now().map_or(0, |limits| limits.descriptors)
    }
}

/// Returns the time in nanoseconds of CLOCK_BOOTTIME, which workers use as well.
pub(crate) fn boottime() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// Puts a wait status into words.
pub(crate) fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, core) => {
            format!("{signal}{}", if core { " (core dumped)" } else { "" })
        }
        // Not asked for, and no end.
        _ => "a change of its state".to_owned(),
    }
}

#[cfg(test)]
#[path = "system/fake.rs"]
pub(crate) mod fake;
