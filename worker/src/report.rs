//! The worker's end of its job socket: jobs come in, reports go out.
//!
//! Contract: a `Done` is never lost while the supervisor lives, because a credit and a
//! duplicate of the client's socket hang on it. Sending waits; the supervisor always reads.
//!
//! # Failure
//! Once the supervisor is gone nobody wants reports, and they are dropped in silence: the
//! mails that are still here are finished all the same.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use qrelay_shared::ipc::channel::{Channel, Received, RecvBuffer, RecvError, SendError};
use qrelay_shared::ipc::message::{Job, JobId, MailRecord, Report, ToJobs, ToReports};

/// How long to wait when the kernel has no memory for a report just now.
const PAUSE: Duration = Duration::from_millis(10);

/// The job socket, shared by all threads of a worker.
#[derive(Debug)]
pub struct Reports {
    channel: Channel<ToReports, ToJobs>,
}

impl Reports {
    /// Takes the job socket. Receiving from it gives up after `idle`.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn new(channel: Channel<ToReports, ToJobs>, idle: Duration) -> Result<Self, Errno> {
        let millis = i64::try_from(idle.as_millis()).unwrap_or(i64::MAX);
        setsockopt(&channel.as_fd(), sockopt::ReceiveTimeout, &TimeVal::milliseconds(millis))?;
        Ok(Self { channel })
    }

    /// Waits for a job.
    ///
    /// # Errors
    /// See [`RecvError`]; `Empty` when the idle time is over.
    pub fn next_job(&self, buffer: &mut RecvBuffer) -> Result<Received<Job>, RecvError> {
        self.channel.recv(buffer)
    }

    /// Whether a job is queued.
    pub fn has_job(&self) -> bool {
        let mut fds = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// This worker can take jobs.
    pub fn ready(&self) {
        self.send(&Report::Ready);
    }

    /// The client of this job is to be answered by the supervisor.
    pub fn lost(&self, job: JobId) {
        self.send(&Report::Lost { job });
    }

    /// A program, leader of its own process group, runs for this job.
    pub fn child(&self, job: JobId, pid: Pid) {
        self.send(&Report::Child { job, pid: pid.as_raw() });
    }

    /// That program has ended and is about to be reaped.
    pub fn child_gone(&self, job: JobId) {
        self.send(&Report::ChildGone { job });
    }

    /// This job may take that long.
    pub fn timeout(&self, job: JobId, timeout: Duration) {
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.send(&Report::Timeout { job, milliseconds });
    }

    /// This job is finished.
    pub fn done(&self, job: JobId, record: Option<MailRecord<'_>>) {
        self.send(&Report::Done { job, record });
    }

    fn send(&self, report: &Report<'_>) {
        loop {
            match self.channel.send(report, &[]) {
                Ok(()) | Err(SendError::Closed) => return,
                Err(SendError::TooLarge) => match report {
                    // Better without a log line than without an end.
                    Report::Done { job, record: Some(_) } => return self.done(*job, None),
                    _ => return,
                },
                Err(SendError::Full | SendError::Os(_)) => std::thread::sleep(PAUSE),
            }
        }
    }
}
