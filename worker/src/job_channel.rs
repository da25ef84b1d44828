//! The worker's end of its job socket: jobs come in, reports go out.
//!
//! Contract: a `Done` is never lost while the supervisor and this process live, because a credit
//! and a duplicate of the client's socket hang on it. Those of several mails travel together
//! when the threads are busy enough; whoever is about to wait sends what has gathered. Sending
//! waits; the supervisor always reads.
//!
//! # Failure
//! Once the supervisor is gone nobody wants reports, and they are dropped in silence: the
//! mails that are still here are finished all the same.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use parking_lot::Mutex;
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::channel::{Batch, Channel, Messages, RecvBuffer, RecvError, SendError};
use qrelay_shared::ipc::message::{MailRecord, Report, ToJobs, ToReports};

/// How long to wait when the kernel has no memory for a report just now.
const PAUSE: Duration = Duration::from_millis(10);

/// Reports that travel together at most: beyond, the cost of a datagram hardly shows.
const MAX_GATHERED: usize = 8;

/// Bytes of reports that are sent without waiting for more: one record can have 32 KiB of
/// recipients, and a datagram takes 128 KiB.
const MAX_FINISHED: usize = 32 * 1024;

/// The job socket, shared by all threads of a worker.
#[derive(Debug)]
pub struct Reports {
    channel: Channel<ToReports, ToJobs>,
    finished: Mutex<Finished>,
    /// `finished` isn't empty.
    gathered: AtomicBool,
}

/// Every `Done` that has not been sent.
#[derive(Debug, Default)]
struct Finished {
    batch: Batch<ToReports>,
    jobs: Vec<JobId>,
}

impl Reports {
    /// Takes the job socket. Receiving from it gives up after `idle`.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn new(channel: Channel<ToReports, ToJobs>, idle: Duration) -> Result<Self, Errno> {
        let millis = i64::try_from(idle.as_millis()).unwrap_or(i64::MAX);
        setsockopt(&channel.as_fd(), sockopt::ReceiveTimeout, &TimeVal::milliseconds(millis))?;
        Ok(Self { channel, finished: Mutex::default(), gathered: AtomicBool::new(false) })
    }

    /// Waits for jobs.
    ///
    /// # Errors
    /// See [`RecvError`]; `Empty` when the idle time is over.
    pub fn next<'b>(&self, buffer: &'b mut RecvBuffer) -> Result<Messages<'b, ToJobs>, RecvError> {
        self.channel.recv_batch(buffer)
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

    /// This job is finished. Its report may wait for others, until [`Self::flush`].
    pub fn done(&self, job: JobId, record: Option<MailRecord<'_>>) {
        let mut finished = self.finished.lock();
        // A record is far smaller than what is left of a datagram. If not: better no log line
        // than no end.
        if finished.batch.push(&Report::Done { job, record }).is_err() {
            return self.send(&Report::Done { job, record: None });
        }
        finished.jobs.push(job);
        self.gathered.store(true, Ordering::Relaxed);
        if finished.jobs.len() >= MAX_GATHERED || finished.batch.size() > MAX_FINISHED {
            self.send_finished(&mut finished);
        }
    }

    /// Whether something has gathered that [`Self::flush`] would send.
    pub fn has_gathered(&self) -> bool {
        self.gathered.load(Ordering::Relaxed)
    }

    /// Sends what has gathered.
    pub fn flush(&self) {
        if self.has_gathered() {
            self.send_finished(&mut self.finished.lock());
        }
    }

    fn send_finished(&self, finished: &mut Finished) {
        self.gathered.store(false, Ordering::Relaxed);
        if finished.jobs.is_empty() {
            return;
        }
        let sent = persist(|| self.channel.send_batch(&finished.batch));
        finished.batch.clear();
        for job in finished.jobs.drain(..) {
            // The socket's buffer is too small (net.core.wmem_default): the log lines are lost.
            if matches!(sent, Err(SendError::TooLarge)) {
                self.send(&Report::Done { job, record: None });
            }
        }
    }

    fn send(&self, report: &Report<'_>) {
        // What isn't sent now never can be: nobody is left to read it.
        let _ = persist(|| self.channel.send(report, &[]));
    }
}

/// Sends until it is sent, or never can be.
fn persist(mut send: impl FnMut() -> Result<(), SendError>) -> Result<(), SendError> {
    loop {
        match send() {
            Err(SendError::Full | SendError::Os(_)) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}
