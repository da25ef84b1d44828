//! Who of a worker's threads does what next.
//!
//! Contract: one thread at a time, the leader, waits at the job socket. It begins the jobs that a
//! datagram brings, as far as they go without waiting, and queues them here; each thread that
//! takes one wakes a follower if there is more to do: another job, or to lead. A thread that
//! comes back takes what is queued, so that under load nobody is woken. A leader takes a job only
//! if another thread can lead: a client's socket that is on its way from process to process makes
//! every close of a local socket on this machine start the kernel's search for sockets that nobody
//! can receive any more (as of Linux 6.18: net/unix/garbage.c), which costs more than a wake-up of
//! ours. While all threads are busy their reports may wait for each other ([`Reports::done`]);
//! [`Queue::watch`] sees to it that this isn't for long, and that there are threads enough.
//!
//! # Failure
//! A job whose socket got lost is handed back. A datagram that makes no sense is an error that
//! ends the process: nobody could say which clients it was about.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use qrelay_shared::ipc::channel::{RecvBuffer, RecvError};
use qrelay_shared::ipc::message::Job;
use slog::{Logger, warn};

use crate::job_channel::Reports;
use crate::session::Stage;
use crate::session::record::age;
use crate::threads::scheduler::Census;

/// How long a thread waits for a job before it ends, if another one waits too.
pub const IDLE: Duration = Duration::from_secs(30);

/// How often [`Queue::watch`] looks while all threads are busy.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);

/// How long the leader begins jobs of one datagram itself: when a handler has run for longer, other
/// threads do what doesn't need Lua for the rest meanwhile.
const TURN: Duration = Duration::from_millis(10);

/// How long to wait after a failure that passes by itself, such as ENOMEM.
const PAUSE: Duration = Duration::from_millis(100);

/// A job that somebody has to wait for.
pub struct Task {
    /// As the supervisor gave it.
    pub job: Job,
    /// The client's socket.
    pub client: Arc<OwnedFd>,
    /// How far it has come.
    pub stage: Stage,
}

/// The jobs that have been received and not been taken, and the threads.
pub struct Queue {
    state: Mutex<State>,
    /// There is something to do.
    work: Condvar,
    /// Nobody waits for jobs any more.
    busy: Condvar,
    logger: Logger,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Queue")
            .field("census", &state.census)
            .field("tasks", &state.tasks.len())
            .finish_non_exhaustive()
    }
}

struct State {
    census: Census,
    tasks: VecDeque<Task>,
    /// There is a leader.
    led: bool,
    /// No further jobs will come.
    ended: bool,
}

/// What a thread is to do next.
pub enum Next {
    /// Serve this job.
    Serve(Task),
    /// End: there was nothing to do for long. It isn't counted any more: who decides meanwhile
    /// whether there are threads enough must not rely on it.
    Superfluous,
    /// End, and say so ([`Queue::left`]): no further jobs will come.
    Ended,
}

/// What the leader was given.
enum Received {
    Jobs,
    /// The idle time is over.
    Nothing,
    End,
}

impl State {
    /// A thread that takes a job now leaves somebody to lead, unless nobody needs to.
    fn may_serve(&self) -> bool {
        self.led || self.ended || self.census.can_replace()
    }

    /// While all are busy, something might wait for longer than it should.
    fn needs_watching(&self, reports: &Reports) -> bool {
        let leaderless = !self.led && !self.ended;
        self.census.all_busy() && (leaderless || !self.tasks.is_empty() || reports.has_gathered())
    }
}

impl Queue {
    /// An empty queue; the first thread is about to ask for a job. At most `connections` are
    /// served at a time.
    pub fn new(connections: usize, logger: Logger) -> Self {
        let census = Census::new(connections);
        let state = State { census, tasks: VecDeque::new(), led: false, ended: false };
        Self { state: Mutex::new(state), work: Condvar::new(), busy: Condvar::new(), logger }
    }

    /// Waits for a job, for a thread that is new or has `served` one. `begin` serves a job as far
    /// as it goes without waiting; `start` is to start another thread, which is counted already.
    ///
    /// # Errors
    /// The job socket can't be understood.
    pub fn next(
        &self,
        served: bool,
        reports: &Reports,
        buffer: &mut RecvBuffer,
        begin: impl Fn(&Job, &Arc<OwnedFd>) -> Stage,
        start: impl FnOnce(),
    ) -> Result<Next, RecvError> {
        let mut state = self.state.lock();
        match served {
            true => state.census.came_back(),
            false => state.census.woke(),
        }
        let mut told = false;
        loop {
            if state.may_serve()
                && let Some(task) = state.tasks.pop_front()
            {
                self.taken(state, &task, reports, start);
                return Ok(Next::Serve(task));
            }
            if state.ended {
                return Ok(Next::Ended);
            }
            if !state.led {
                match self.lead(&mut state, reports, buffer, &begin)? {
                    Received::Jobs => {}
                    Received::Nothing if state.census.has_waiting() => {
                        state.census.ended();
                        self.work.notify_one();
                        return Ok(Next::Superfluous);
                    }
                    Received::Nothing => {}
                    Received::End => {
                        state.ended = true;
                        self.work.notify_all();
                    }
                }
            } else if !told {
                told = true;
                MutexGuard::unlocked(&mut state, || reports.flush());
            } else if self.wait(&mut state) {
                state.census.ended();
                return Ok(Next::Superfluous);
            }
        }
    }

    /// Waits for something to do. True: there was nothing for long.
    fn wait(&self, state: &mut MutexGuard<'_, State>) -> bool {
        state.census.waits();
        let idle = self.work.wait_for(state, IDLE).timed_out();
        state.census.woke();
        idle && state.led && state.tasks.is_empty()
    }

    /// This thread is about to serve a job.
    fn taken(
        &self,
        mut state: MutexGuard<'_, State>,
        task: &Task,
        reports: &Reports,
        start: impl FnOnce(),
    ) {
        let leaderless = !state.led && !state.ended;
        let (age, waits) = (age(task.job.spoke), task.stage.waits());
        let another = state.census.took_job(age, waits, leaderless);
        let more = leaderless || !state.tasks.is_empty();
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

    /// Gets jobs into the queue, waiting for some if there are none yet.
    fn lead(
        &self,
        state: &mut MutexGuard<'_, State>,
        reports: &Reports,
        buffer: &mut RecvBuffer,
        begin: impl Fn(&Job, &Arc<OwnedFd>) -> Stage,
    ) -> Result<Received, RecvError> {
        state.led = true;
        let all_busy = state.census.all_busy();
        let received = MutexGuard::unlocked(state, || {
            if all_busy {
                self.busy.notify_one();
            } else {
                reports.flush();
            }
            self.receive(reports, buffer, begin)
        })?;
        state.led = false;
        Ok(received)
    }

    /// As leader: receives a datagram.
    fn receive(
        &self,
        reports: &Reports,
        buffer: &mut RecvBuffer,
        begin: impl Fn(&Job, &Arc<OwnedFd>) -> Stage,
    ) -> Result<Received, RecvError> {
        let mut messages = match reports.next(buffer) {
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
        let began = Instant::now();
        while let Some(message) = messages.next() {
            let job = message?;
            match messages.fds.take() {
                Some(client) => {
                    let client = Arc::new(client);
                    let stage = match began.elapsed() < TURN {
                        true => begin(&job, &client),
                        false => Stage::untouched(),
                    };
                    self.add(Task { job, client, stage }, messages.is_empty());
                }
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

    /// A job has come as far as it does without waiting; the leader may have others to begin.
    fn add(&self, task: Task, last: bool) {
        let mut state = self.state.lock();
        state.tasks.push_back(task);
        // One is for the leader itself, if it can be replaced.
        let wake = state.census.has_waiting() && !(last && state.tasks.len() == 1);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// The thread that was to be started couldn't be. True: there is none left.
    pub fn not_started(&self) -> bool {
        let none_left = self.state.lock().census.not_started();
        self.busy.notify_one();
        none_left
    }

    /// A thread ends because no further jobs will come. True: it was the last.
    pub fn left(&self) -> bool {
        self.state.lock().census.ended()
    }

    /// Waits until all threads are busy and there is something to see to, then a little; says how
    /// many threads more are needed, which are counted already.
    pub fn watch(&self, reports: &Reports) -> usize {
        let taken = {
            let mut state = self.state.lock();
            while !state.needs_watching(reports) {
                self.busy.wait(&mut state);
            }
            state.census.taken()
        };
        std::thread::sleep(WATCH_INTERVAL);
        reports.flush();
        let mut state = self.state.lock();
        let leaderless = !state.led && !state.ended;
        let more = !state.tasks.is_empty() || leaderless && reports.has_job();
        if more { state.census.stuck(taken) } else { 0 }
    }
}
