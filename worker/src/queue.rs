//! Who of a worker's threads takes the next job.
//!
//! Contract: one thread at a time, the leader, waits at the job socket. A datagram may bring
//! several jobs; they are queued here, and each thread that takes one wakes a follower if there
//! is more to do: another job, or to lead. A thread that comes back takes what is queued or
//! leads, so that under load nobody is woken. While all threads are busy their reports may wait
//! for each other ([`Reports::done`]); [`Queue::watch`] sees to it that this isn't for long, and
//! that there are threads enough.
//!
//! # Failure
//! A job whose socket got lost is handed back. A datagram that makes no sense is an error that
//! ends the process: nobody could say which clients it was about.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use qrelay_shared::ipc::channel::{RecvBuffer, RecvError};
use qrelay_shared::ipc::message::Job;
use slog::{Logger, warn};

use crate::record::age;
use crate::report::Reports;
use crate::threads::Census;

/// How long a thread waits for a job before it ends, if another one waits too.
pub const IDLE: Duration = Duration::from_secs(30);

/// How often [`Queue::watch`] looks while all threads are busy.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);

/// How long to wait after a failure that passes by itself, such as ENOMEM.
const PAUSE: Duration = Duration::from_millis(100);

/// A job and its client's socket.
pub type Client = (Job, OwnedFd);

/// The jobs that have been received and not been taken, and the threads.
#[derive(Debug)]
pub struct Queue {
    state: Mutex<State>,
    /// There is something to do.
    work: Condvar,
    /// Nobody waits for jobs any more.
    busy: Condvar,
    logger: Logger,
}

#[derive(Debug)]
struct State {
    census: Census,
    jobs: VecDeque<Client>,
    /// There is a leader.
    led: bool,
    /// No further jobs will come.
    ended: bool,
}

/// What the leader was given.
enum Received {
    Jobs,
    /// The idle time is over.
    Nothing,
    End,
}

impl Queue {
    /// An empty queue; the first of at most `threads` threads is about to ask for a job.
    pub fn new(threads: usize, logger: Logger) -> Self {
        let state =
            State { census: Census::new(threads), jobs: VecDeque::new(), led: false, ended: false };
        Self { state: Mutex::new(state), work: Condvar::new(), busy: Condvar::new(), logger }
    }

    /// Waits for a job, for a thread that is new or has `served` one; `start` is to start another
    /// thread, which is counted already. None: the thread is to end.
    ///
    /// # Errors
    /// The job socket can't be understood.
    pub fn next(
        &self,
        served: bool,
        reports: &Reports,
        buffer: &mut RecvBuffer,
        start: impl FnOnce(),
    ) -> Result<Option<Client>, RecvError> {
        let mut state = self.state.lock();
        if served {
            state.census.came_back();
        }
        let mut told = false;
        loop {
            if let Some(client) = state.jobs.pop_front() {
                self.taken(state, &client.0, reports, start);
                return Ok(Some(client));
            }
            if state.ended {
                return Ok(None);
            }
            if !state.led {
                state.led = true;
                drop(state);
                let received = self.receive(reports, buffer)?;
                state = self.state.lock();
                state.led = false;
                match received {
                    Received::Jobs => {}
                    Received::End => self.end(&mut state),
                    Received::Nothing if state.census.may_end() => {
                        self.work.notify_one();
                        return Ok(None);
                    }
                    Received::Nothing => {}
                }
            } else if !told {
                told = true;
                MutexGuard::unlocked(&mut state, || reports.flush());
            } else if self.work.wait_for(&mut state, IDLE).timed_out()
                && state.led
                && state.jobs.is_empty()
                && state.census.may_end()
            {
                return Ok(None);
            }
        }
    }

    /// This thread is about to serve a job.
    fn taken(
        &self,
        mut state: MutexGuard<'_, State>,
        job: &Job,
        reports: &Reports,
        start: impl FnOnce(),
    ) {
        let another = state.census.took_job(age(job.spoke));
        let more = !state.led || !state.jobs.is_empty();
        let all_busy = state.census.all_busy();
        drop(state);
        if another {
            start();
        } else if more {
            self.work.notify_one();
        }
        if all_busy {
            self.busy.notify_one();
        } else {
            reports.flush();
        }
    }

    /// As leader: gets jobs into the queue, waiting for some if there are none yet.
    fn receive(&self, reports: &Reports, buffer: &mut RecvBuffer) -> Result<Received, RecvError> {
        let mut received = reports.try_next(buffer);
        if matches!(received, Err(RecvError::Empty)) {
            reports.flush();
            received = reports.next(buffer);
        }
        let mut messages = match received {
            Ok(messages) => messages,
            Err(RecvError::Empty) => return Ok(Received::Nothing),
            Err(RecvError::Closed) => return Ok(Received::End),
            Err(RecvError::Os(errno)) => {
                warn!(self.logger, "no job can be received"; "error" => errno.desc());
                reports.flush();
                std::thread::sleep(PAUSE);
                return Ok(Received::Jobs);
            }
            Err(error) => return Err(error),
        };
        let mut lost = false;
        while let Some(message) = messages.next() {
            let job = message?;
            match messages.fds.take() {
                Some(client) => self.state.lock().jobs.push_back((job, client)),
                None => {
                    reports.lost(job.job);
                    lost = true;
                }
            }
        }
        if lost {
            warn!(self.logger, "connections were lost: too many open files");
            // The others mustn't wait meanwhile.
            self.work.notify_one();
            reports.flush();
            std::thread::sleep(PAUSE);
        }
        Ok(Received::Jobs)
    }

    fn end(&self, state: &mut State) {
        state.ended = true;
        self.work.notify_all();
    }

    /// The thread that was to be started couldn't be. True: there is none left.
    pub fn not_started(&self) -> bool {
        let none_left = self.state.lock().census.not_started();
        self.busy.notify_one();
        none_left
    }

    /// A thread ends. True: it was the last.
    pub fn left(&self) -> bool {
        self.state.lock().census.ended()
    }

    /// Waits until all threads are busy and there is something to see to, then a little; says how
    /// many threads more are needed, which are counted already.
    pub fn watch(&self, reports: &Reports) -> usize {
        let taken = {
            let mut state = self.state.lock();
            while !(state.census.is_short() || state.census.all_busy() && reports.has_gathered()) {
                self.busy.wait(&mut state);
            }
            state.census.taken()
        };
        std::thread::sleep(WATCH_INTERVAL);
        reports.flush();
        let more = reports.has_job();
        let mut state = self.state.lock();
        if more || !state.jobs.is_empty() { state.census.stuck(taken) } else { 0 }
    }
}
