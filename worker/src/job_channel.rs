//! The worker's end of its job socket: jobs come in, reports go out.
//!
//! Contract: a `Done` is never lost while the supervisor and this process live, because the
//! supervisor keeps a credit and a duplicate of the client's socket until then. While the threads
//! are busy, the `Done` of several mails travel together; a thread that is about to wait sends what
//! has gathered. Sending waits for room in the socket; the supervisor always reads.
//!
//! # Failure
//! Once the supervisor is gone, reports are dropped in silence, because nobody reads them. The
//! mails that are still here are finished all the same.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use parking_lot::Mutex;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::channel::{
    Batch, Channel, MAX_BATCH, Messages, RecvBuffer, RecvError, SendError,
};
use qrelay_shared::ipc::message::{MailRecord, Report, ToJobs, ToReports};

use crate::flight::Slot;

/// How long to wait if the kernel has no memory for a report.
const PAUSE: Duration = Duration::from_millis(10);

/// Bytes of gathered reports that are sent without waiting for more. One record can have 4 KiB of
/// recipients, and a datagram takes 128 KiB.
const MAX_FINISHED: usize = 32 * 1024;

/// The job socket, shared by all threads of a worker.
#[derive(Debug)]
pub struct Reports {
    channel: Channel<ToReports, ToJobs>,
    finished: Mutex<Finished>,
    /// Whether `finished` has reports, readable without its lock.
    gathered: AtomicBool,
}

/// What can be read after a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Readable {
    /// A job waits in the job socket, or no further ones come.
    pub(crate) jobs: bool,
    /// The other socket can be read.
    pub(crate) other: bool,
}

/// Every `Done` that hasn't been sent, encoded, and its job.
#[derive(Debug, Default)]
struct Finished {
    batch: Batch<ToReports>,
    jobs: Vec<JobId>,
    /// The places of these jobs in the flight recorder.
    slots: Vec<Slot>,
}

impl Reports {
    /// Takes the job socket. [`Self::next`] gives up after `idle`.
    ///
    /// # Errors
    /// See setsockopt(2).
    pub fn new(channel: Channel<ToReports, ToJobs>, idle: Duration) -> Result<Self, Errno> {
        let millis = i64::try_from(idle.as_millis()).unwrap_or(i64::MAX);
        setsockopt(&channel.as_fd(), sockopt::ReceiveTimeout, &TimeVal::milliseconds(millis))?;
        Ok(Self { channel, finished: Mutex::default(), gathered: AtomicBool::new(false) })
    }

    /// Waits for a datagram of jobs.
    ///
    /// # Errors
    /// See [`RecvError`]; `Empty` when the idle time is over.
    pub(crate) fn next<'b>(
        &self,
        buffer: &'b mut RecvBuffer,
    ) -> Result<Messages<'b, ToJobs>, RecvError> {
        self.channel.recv_batch(buffer)
    }

    /// Returns whether a job waits in the socket.
    pub(crate) fn has_job(&self) -> bool {
        let mut fds = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Waits until `other` can be read, a job waits in the socket, or the time is over.
    pub(crate) fn wait_beside(&self, other: BorrowedFd<'_>, deadline: Deadline) -> Readable {
        let mut fds = [self.channel.as_fd(), other].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let limit = PollTimeout::try_from(deadline.remaining()).unwrap_or(PollTimeout::MAX);
        // After an error or a signal another thread leads, which is always right.
        match poll(&mut fds, limit) {
            Ok(_) => Readable {
                jobs: fds[0].any().unwrap_or(true),
                other: fds[1].any().unwrap_or(false),
            },
            Err(_) => Readable { jobs: true, other: false },
        }
    }

    /// Reports that this worker can take jobs.
    pub(crate) fn ready(&self) {
        self.send(&Report::Ready);
    }

    /// Reports that a job came without its socket: the supervisor answers the client.
    pub(crate) fn lost(&self, job: JobId) {
        self.send(&Report::Lost { job });
    }

    /// Reports a program that runs for a job, as leader of a process group.
    pub(crate) fn child(&self, job: JobId, pid: Pid) {
        self.send(&Report::Child { job, pid: pid.as_raw() });
    }

    /// Reports that the job's program has ended and is about to be reaped.
    pub(crate) fn child_gone(&self, job: JobId) {
        self.send(&Report::ChildGone { job });
    }

    /// Reports that a job may take longer than a drain.
    pub(crate) fn timeout(&self, job: JobId, timeout: Duration) {
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.send(&Report::Timeout { job, milliseconds });
    }

    /// Reports that a job is finished, and then frees its slot. The report may wait for others,
    /// until [`Self::flush`].
    pub(crate) fn done(&self, job: JobId, record: Option<MailRecord<'_>>, slot: Option<Slot>) {
        let mut finished = self.finished.lock();
        // A record is far smaller than the room that is left in a datagram. If one isn't, its log
        // line is lost, but not the end of its job.
        if finished.batch.push(&Report::Done { job, record }).is_err() {
            return self.send(&Report::Done { job, record: None });
        }
        finished.jobs.push(job);
        finished.slots.extend(slot);
        self.gathered.store(true, Ordering::Relaxed);
        if finished.jobs.len() >= MAX_BATCH || finished.batch.size() > MAX_FINISHED {
            self.send_finished(&mut finished);
        }
    }

    /// Returns whether [`Self::flush`] would send anything.
    pub(crate) fn has_gathered(&self) -> bool {
        self.gathered.load(Ordering::Relaxed)
    }

    /// Sends what has gathered. Without the lock if nothing has, because every thread asks after
    /// every job; who has locked what another thread locked after gathering overlooks nothing.
    pub(crate) fn flush(&self) {
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
        finished.slots.clear();
    }

    fn send(&self, report: &Report<'_>) {
        // An error means that nobody is left to read the report.
        let _ = persist(|| self.channel.send(report, &[]));
    }
}

/// Sends again while the kernel lacks memory. Returns how that ended.
fn persist(mut send: impl FnMut() -> Result<(), SendError>) -> Result<(), SendError> {
    loop {
        match send() {
            Err(SendError::Full | SendError::Os(_)) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}
