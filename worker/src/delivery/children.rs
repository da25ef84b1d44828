//! The programs that this worker runs.
//!
//! Contract: the supervisor knows every program from its start until just before it is reaped, so
//! that it can end the programs of a worker that dies. A process that isn't reaped keeps its
//! number, and a group has the number of its leader, so neither the supervisor nor the worker ever
//! signals a stranger. A [`Child`] ends by being reaped; a dropped one is killed first. No program
//! outlives a worker that ends itself ([`Children::kill_all`]).
//!
//! # Failure
//! A program that can't be started is an errno. A program that was started is always reaped, if
//! need be by a thread of its own ([`Child::abandon`]).

use std::collections::HashSet;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use parking_lot::{Mutex, RwLock};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::sys::process::reap;
use qrelay_shared::sys::process_group::{self, FIRST_PAUSE, Group, Others, VANISH, next_pause};
use qrelay_shared::sys::spawn::{Program, Started, spawn};

use crate::job_channel::Reports;

/// How long [`Children::kill_all`] waits for programs that are just being started.
const START: Duration = Duration::from_secs(1);

/// The programs of a worker.
#[derive(Debug)]
pub(crate) struct Children {
    reports: Arc<Reports>,
    running: Mutex<Vec<Group>>,
    /// Shared by the threads that start a program and list it; exclusive, for good, once all
    /// programs have been killed.
    starting: RwLock<()>,
    scan: Mutex<Scan>,
}

/// A scan of the system's processes. One scan serves all threads, because it takes about 15 µs per
/// process.
#[derive(Debug)]
struct Scan {
    began: Instant,
    /// The earliest start of the next scan.
    next: Instant,
    /// Process groups that had a living member; `None` if the scan failed.
    living: Option<HashSet<Pid>>,
}

impl Scan {
    fn now() -> Self {
        let began = Instant::now();
        let living = process_group::living().ok();
        let ended = Instant::now();
        Self { began, next: ended + process_group::pause_after_scan(ended - began), living }
    }
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProgramExit {
    /// With this status.
    Status(i32),
    /// By a signal.
    Signal(Signal),
    /// Unknown: the status could not be read, and must not count as a success.
    Unknown,
}

impl fmt::Display for ProgramExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => f.write_str(signal.as_str()),
            Self::Unknown => f.write_str("unknown end"),
        }
    }
}

impl Children {
    /// A list without programs.
    pub(crate) fn new(reports: Arc<Reports>) -> Arc<Self> {
        let now = Instant::now();
        let scan = Mutex::new(Scan { began: now, next: now, living: None });
        Arc::new(Self { reports, running: Mutex::default(), starting: RwLock::default(), scan })
    }

    /// Whether members of a process group may be left. The answer can be late, but "gone" is never
    /// older than `since`.
    fn others(&self, group: Group, since: Instant) -> Others {
        let mut scan = self.scan.lock();
        if scan.next <= Instant::now() {
            *scan = Scan::now();
        }
        match &scan.living {
            Some(living) if scan.began >= since && !living.contains(&group.id()) => Others::Gone,
            _ => Others::MayLive,
        }
    }

    /// Starts a program for a mail. The program's standard input names the mail, so that the
    /// supervisor recognizes the program if the worker dies before it has reported it. The
    /// descriptor becomes readable when the program ends.
    ///
    /// After [`Self::kill_all`] this waits for ever.
    ///
    /// # Errors
    /// See [`spawn`].
    pub(crate) fn start(
        self: &Arc<Self>,
        job: JobId,
        program: &Program<'_>,
    ) -> Result<(Child, OwnedFd), Errno> {
        let starting = self.starting.read();
        let Started { pid, process } = spawn(program)?;
        // A new process has a number above 1 that isn't our group's, so this doesn't fail.
        let group = Group::led_by(pid).ok_or(Errno::ESRCH)?;
        self.running.lock().push(group);
        drop(starting);
        self.reports.child(job, pid);
        Ok((Child { children: Arc::clone(self), job, group, reaped: false }, process))
    }

    /// Kills all programs with their process groups, for a process that ends right afterwards: from
    /// now on no program can be started or reaped. A program that takes longer than [`START`] to be
    /// executed, from a disk that is gone for example, is not waited for.
    pub(crate) fn kill_all(&self) {
        std::mem::forget(self.starting.try_write_for(START));
        let running = self.running.lock();
        for group in &*running {
            let _ = group.signal(Signal::SIGKILL);
        }
        std::mem::forget(running);
    }
}

/// A program that has been started and not reaped yet.
#[derive(Debug)]
pub(crate) struct Child {
    children: Arc<Children>,
    job: JobId,
    group: Group,
    reaped: bool,
}

impl Child {
    /// Returns the number of the program's process and of its group.
    pub(crate) fn pid(&self) -> Pid {
        self.group.id()
    }

    /// Sends a signal to the program's process group. A signal that isn't permitted, because the
    /// program has become another user's, is no error: the program then ends when it wants to.
    pub(crate) fn signal_group(&self, signal: Signal) {
        let _ = self.group.signal(signal);
    }

    /// Whether members of the program's group may be left, itself or others. The answer can be
    /// late, but "gone" is never older than `since`.
    pub(crate) fn others(&self, since: Instant) -> Others {
        self.children.others(self.group, since)
    }

    /// Waits for the program's end.
    pub(crate) fn reap(mut self) -> ProgramExit {
        self.finish()
    }

    /// Ends, after the program's end, the rest of its group, and waits until nothing is left. The
    /// leader is reaped after SIGKILL, because only an unreaped leader keeps the group's number.
    pub(crate) fn reap_group(self) {
        let group = self.group;
        self.signal_group(Signal::SIGKILL);
        self.reap();
        let (limit, mut pause) = (Deadline::after(VANISH), FIRST_PAUSE);
        while !group.is_empty() && !limit.expired() {
            std::thread::sleep(pause);
            pause = next_pause(pause);
        }
    }

    /// Leaves the program to a thread that only waits for its end.
    pub(crate) fn abandon(self) {
        let waiting = std::thread::Builder::new().spawn(move || self.reap());
        // Without a thread the closure was dropped, which waits here.
        drop(waiting);
    }

    fn finish(&mut self) -> ProgramExit {
        self.reaped = true;
        let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(self.pid()), ended) == Err(Errno::EINTR) {}
        self.children.running.lock().retain(|&group| group != self.group);
        self.children.reports.child_gone(self.job);
        match reap(self.pid()) {
            Ok(WaitStatus::Exited(_, status)) => ProgramExit::Status(status),
            Ok(WaitStatus::Signaled(_, signal, _)) => ProgramExit::Signal(signal),
            // Nobody else reaps this process's children, so this doesn't happen.
            _ => ProgramExit::Unknown,
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

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use qrelay_shared::ipc::channel::{Channel, RecvBuffer};
    use qrelay_shared::ipc::message::{ToJobs, ToReports};

    use super::*;

    /// A number of seconds that no other program sleeps.
    const SLEEP: &str = "543.21";

    /// Returns how many of this test's programs live.
    fn alive() -> usize {
        let entries = fs::read_dir("/proc").expect("/proc").flatten();
        let runs = entries.filter(|entry| {
            // A zombie has no command line.
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).any(|word| word == SLEEP.as_bytes())
        });
        runs.count()
    }

    #[test]
    fn no_program_is_started_after_the_last_one_was_killed() {
        let (channel, supervisor) = Channel::<ToReports, ToJobs>::pair().expect("a pair");
        std::thread::spawn(move || {
            let mut buffer = RecvBuffer::new();
            while supervisor.recv(&mut buffer).is_ok() {}
        });
        let reports = Reports::new(channel, Duration::from_secs(60)).expect("a socket");
        let children = Children::new(Arc::new(reports));
        for _ in 0..8 {
            let children = Arc::clone(&children);
            std::thread::spawn(move || {
                let null = File::options().read(true).write(true).open("/dev/null").expect("open");
                let arguments = [c"/bin/sleep".to_owned(), c"543.21".to_owned()];
                let stdio = [null.as_fd(); 3];
                let program = Program { arguments: &arguments, environment: &[], stdio };
                loop {
                    std::mem::forget(children.start(JobId(1), &program).expect("started"));
                }
            });
        }
        let limit = Instant::now() + Duration::from_secs(60);
        while alive() < 20 {
            assert!(Instant::now() < limit, "no programs");
        }
        children.kill_all();
        while alive() > 0 {
            assert!(Instant::now() < limit, "{} programs are left", alive());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
