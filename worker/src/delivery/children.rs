//! The programs that this worker runs.
//!
//! Contract: the supervisor knows of every program from its start until just before it is
//! reaped, so that it can end those of a worker that dies; and since a process that isn't
//! reaped keeps its number, and its group that of its leader, neither it nor we ever signal a
//! stranger. Whoever has a [`Child`] gets rid of it by reaping it; a dropped one is killed first. No
//! program outlives the worker that wants to end, either ([`Children::kill_all`]).
//!
//! # Failure
//! A program that can't be started is an errno. Once started it is always reaped, by a thread
//! of its own if it has to be ([`Child::abandon`]).

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use parking_lot::Mutex;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::sys::proc_stat;
use qrelay_shared::sys::process::reap;
use qrelay_shared::sys::spawn::{Program, spawn};

use crate::job_channel::Reports;

/// How long the rest of a process group may take to vanish after SIGKILL. What takes longer hangs
/// in the kernel, and doesn't come back to do anything.
const VANISH: Duration = Duration::from_secs(1);
/// How often it is looked at: it is usually gone at once.
const GLANCE: Duration = Duration::from_millis(1);

/// All programs of a worker.
#[derive(Debug)]
pub struct Children {
    reports: Arc<Reports>,
    running: Mutex<Vec<Pid>>,
    look: Mutex<Look>,
}

/// A look at the system's processes. It serves all threads, so that the time it takes (15 µs per
/// process) isn't spent by each of them.
#[derive(Debug)]
struct Look {
    began: Instant,
    /// No further one before that.
    rested: Instant,
    /// Process groups that had a living member; nothing if it can't be known.
    living: Option<HashSet<Pid>>,
}

/// So many times what a look took passes before the next one.
const REST: u32 = 10;

impl Look {
    fn now() -> Self {
        let began = Instant::now();
        let living = proc_stat::processes().ok().map(|all| {
            all.into_iter().filter(|process| process.alive).map(|process| process.group).collect()
        });
        let ended = Instant::now();
        Self { began, rested: ended + (ended - began) * REST, living }
    }
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this status.
    Status(i32),
    /// By a signal.
    Signal(Signal),
    /// Somehow: nothing is known, least of all a success.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => f.write_str(signal.as_str()),
            Self::Unknown => f.write_str("unknown end"),
        }
    }
}

impl Children {
    /// None so far.
    pub fn new(reports: Arc<Reports>) -> Arc<Self> {
        let now = Instant::now();
        let look = Mutex::new(Look { began: now, rested: now, living: None });
        Arc::new(Self { reports, running: Mutex::default(), look })
    }

    /// Whether a process group may have a living member. The answer can be late, but "no" is
    /// never older than `since`.
    fn may_live(&self, group: Pid, since: Instant) -> bool {
        let mut look = self.look.lock();
        if look.rested <= Instant::now() {
            *look = Look::now();
        }
        look.began < since || look.living.as_ref().is_none_or(|living| living.contains(&group))
    }

    /// Starts a program for a mail. Its standard input names the mail, by which the supervisor
    /// recognizes it if we die before we have reported it.
    ///
    /// # Errors
    /// See [`spawn`].
    pub fn start(self: &Arc<Self>, job: JobId, program: &Program<'_>) -> Result<Child, Errno> {
        let pid = spawn(program)?;
        self.running.lock().push(pid);
        self.reports.child(job, pid);
        Ok(Child { children: Arc::clone(self), job, pid, reaped: false })
    }

    /// Kills all programs with everything in their process groups, for a process that ends right
    /// after that: none of them can be reaped, and no other one reported, from now on.
    pub fn kill_all(&self) {
        let running = self.running.lock();
        for &pid in &*running {
            let _ = killpg(pid, Signal::SIGKILL);
        }
        std::mem::forget(running);
    }
}

/// A program that has been started and not reaped yet.
#[derive(Debug)]
pub struct Child {
    children: Arc<Children>,
    job: JobId,
    pid: Pid,
    reaped: bool,
}

impl Child {
    /// Its process id, and that of its group.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal to its process group. That it isn't allowed to (a program may have become
    /// another user's) is no error: the program then ends when it wants to.
    pub fn signal_group(&self, signal: Signal) {
        let _ = killpg(self.pid, signal);
    }

    /// Whether a member of its process group may not have ended, itself or another. The answer can
    /// be late, but "no" is never older than `since`.
    pub fn group_may_live(&self, since: Instant) -> bool {
        self.children.may_live(self.pid, since)
    }

    /// Waits for its end.
    pub fn reap(mut self) -> Exit {
        self.finish()
    }

    /// After its end: ends the rest of its group, which can be named as long as its leader isn't
    /// reaped, and waits until nothing is left.
    pub fn reap_group(self) {
        let group = self.pid;
        self.signal_group(Signal::SIGKILL);
        self.reap();
        let limit = Deadline::after(VANISH);
        // A signal of 0 does nothing, should the number be another group's by now.
        while killpg(group, None) != Err(Errno::ESRCH) && !limit.expired() {
            std::thread::sleep(GLANCE);
        }
    }

    /// Leaves it to a thread that does nothing but wait for its end.
    pub fn abandon(self) {
        let waiting = std::thread::Builder::new().spawn(move || self.reap());
        // Without a thread it was dropped, which waits here.
        drop(waiting);
    }

    fn finish(&mut self) -> Exit {
        self.reaped = true;
        let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(self.pid), ended) == Err(Errno::EINTR) {}
        self.children.running.lock().retain(|&pid| pid != self.pid);
        self.children.reports.child_gone(self.job);
        match reap(self.pid) {
            Ok(WaitStatus::Exited(_, status)) => Exit::Status(status),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal),
            // Nobody else reaps our children, so this doesn't happen.
            _ => Exit::Unknown,
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal_group(Signal::SIGKILL);
            self.finish();
        }
    }
}
