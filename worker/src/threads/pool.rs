//! The threads of a worker: they carry out what the [`Scheduler`] orders.
//!
//! Contract: every thread asks the scheduler what to do, does it with blocking I/O, and asks again.
//! After the end of the job socket the threads finish what is queued, and the last thread calls
//! `end`. The watcher is one thread more, and has nothing to do with mails: it sends reports and
//! starts threads while all others are busy.
//!
//! # Failure
//! A thread that can't be started means fewer threads. A job whose socket got lost is handed back.
//! A datagram that makes no sense ends the process, because nobody could say which clients the
//! datagram was about.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ipc::channel::{RecvBuffer, RecvError};
use qrelay_shared::sys::thread::{LUA_STACK, spawn};
use slog::{error, warn};

use crate::clock::now;
use crate::delivery::lead::{Follower, Lead};
use crate::session::progress::Step;
use crate::session::{Context, Session};
use crate::threads::counts::Moment;
use crate::threads::processors::Processors;
use crate::threads::scheduler::{
    Answer, Event, Left, Next, NextJob, Orders, Place, Reports, Scheduler, Stuck, Task, Threads,
};

/// How long a thread that leads waits for something else before another thread leads. The kernel
/// rounds it up to a few milliseconds.
const LEADERS_PATIENCE: Duration = Duration::from_millis(1);

/// How long a thread waits for something to do. Then it ends, if another thread waits too.
pub(crate) const IDLE: Duration = Duration::from_secs(30);

/// Virtual memory of the watcher's stack, in bytes.
const WATCHER_STACK: usize = 128 << 10;

/// How long the watcher pauses while all threads are busy.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);

/// How long to wait after a failure that passes by itself, such as ENOMEM or EAGAIN.
const PAUSE: Duration = Duration::from_millis(100);

/// The threads of a worker, and what they share.
pub struct Pool {
    context: Context,
    scheduler: Mutex<Scheduler<Session>>,
    processors: Processors,
    /// There is something to do.
    work: Condvar,
    /// The watcher is to look around.
    watcher: Condvar,
    end: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.scheduler.lock().fmt(f)
    }
}

impl Task for Session {
    fn since(&self) -> Duration {
        Duration::from_nanos(self.spoke())
    }

    fn handler_waits(&self) -> bool {
        Self::handler_waits(self)
    }

    fn is_brief(&self) -> bool {
        Self::is_brief(self)
    }
}

/// A thread that leads while it serves or begins a job.
struct Leader<'p> {
    pool: &'p Arc<Pool>,
    leads: Cell<bool>,
    /// Has other threads do what the thread would do next.
    tell: &'p dyn Fn(),
}

impl<'p> Leader<'p> {
    fn new(pool: &'p Arc<Pool>, tell: &'p dyn Fn()) -> Self {
        Self { pool, leads: Cell::new(true), tell }
    }
}

/// A thread that ends by a panic can't lead on.
impl Drop for Leader<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.give_up();
        }
    }
}

impl Lead for Leader<'_> {
    fn give_up(&self) {
        if self.leads.replace(false) {
            // From here on it is the next leader who makes progress.
            self.pool.context.leader.note(Step::None);
            (self.tell)();
        }
    }

    fn patience(&self) -> Option<Duration> {
        self.leads.get().then_some(LEADERS_PATIENCE)
    }

    fn await_input(&self, socket: BorrowedFd<'_>, deadline: Deadline) -> bool {
        if !self.leads.get() {
            return false;
        }
        let readable = self.pool.context.reports.wait_beside(socket, deadline);
        if readable.jobs {
            self.give_up();
        }
        readable.other
    }
}

impl Pool {
    /// Returns a pool without threads. The last thread that ends calls `end`.
    pub fn new(context: Context, end: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let connections = context.settings.worker_connections as usize;
        Arc::new(Self {
            context,
            scheduler: Mutex::new(Scheduler::new(connections)),
            processors: Processors::open(),
            work: Condvar::new(),
            watcher: Condvar::new(),
            end: Box::new(end),
        })
    }

    /// Returns what the sessions share.
    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// Starts the watcher and the first thread, which starts others as they are needed.
    ///
    /// # Errors
    /// See [`spawn`].
    pub fn run(self: &Arc<Self>) -> io::Result<()> {
        let pool = Arc::clone(self);
        spawn("watch", WATCHER_STACK, move || pool.watch())?;
        self.start()
    }

    fn start(self: &Arc<Self>) -> io::Result<()> {
        let pool = Arc::clone(self);
        spawn("mail", LUA_STACK, move || pool.thread())
    }

    /// Starts a thread that is counted already. Returns whether the system had a thread.
    fn start_another(self: &Arc<Self>) -> bool {
        let Err(error) = self.start() else { return true };
        warn!(self.context.logger, # "error", "no further thread"; "error" => %error);
        let (left, threads) = self.scheduler.lock().not_started();
        self.obey(threads);
        self.watcher.notify_one();
        if left == Left::Nobody {
            (self.end)();
        }
        false
    }

    /// The life of a thread.
    fn thread(self: Arc<Self>) {
        let mut buffer = RecvBuffer::small();
        let mut event = Event::Started;
        loop {
            let Orders { threads, reports, next } = self.orders(event);
            self.obey(threads);
            match reports {
                Reports::Leave => {}
                Reports::Send => self.context.reports.flush(),
                Reports::LeaveToWatcher => drop(self.watcher.notify_one()),
            }
            event = match next {
                Next::Serve(session) => {
                    session.finish(&self.context, &Follower);
                    Event::Finished
                }
                Next::ServeLeading(session) => {
                    let tell = || {
                        let threads = self.scheduler.lock().give_up();
                        self.obey(threads);
                    };
                    let leader = Leader::new(&self, &tell);
                    session.finish(&self.context, &leader);
                    if leader.leads.get() { Event::FinishedLeading } else { Event::Finished }
                }
                Next::Lead => match self.lead(&mut buffer) {
                    Ok(event) => event,
                    Err(error) => {
                        let logger = &self.context.logger;
                        error!(logger, "the job socket can't be understood"; "error" => %error);
                        return (self.end)();
                    }
                },
                Next::Report => {
                    self.context.reports.flush();
                    Event::Reported
                }
                Next::Retire | Next::End(Left::Others) => return,
                Next::End(Left::Nobody) => {
                    // The other threads have ended, and all that they have gathered is seen here.
                    self.context.reports.flush();
                    return (self.end)();
                }
            };
        }
    }

    /// Waits until there is something to do.
    fn orders(&self, event: Event) -> Orders<Session> {
        let moment = self.moment();
        let mut scheduler = self.scheduler.lock();
        let mut answer = scheduler.event(event, moment);
        loop {
            match answer {
                Answer::Act(orders) => return orders,
                Answer::Wait => {
                    let idle = self.work.wait_for(&mut scheduler, IDLE).timed_out();
                    let event = if idle { Event::Idle } else { Event::Woken };
                    answer = scheduler.event(event, self.moment());
                }
            }
        }
    }

    fn moment(&self) -> Moment {
        let now = now();
        Moment { now, idle: self.processors.are_idle(now) }
    }

    fn obey(self: &Arc<Self>, threads: Threads) {
        match threads {
            Threads::Leave => {}
            Threads::WakeOne => drop(self.work.notify_one()),
            Threads::WakeAll => drop(self.work.notify_all()),
            Threads::Start => drop(self.start_another()),
            Threads::CallWatcher => drop(self.watcher.notify_one()),
        }
    }

    /// As leader: receives a datagram, and begins or queues its jobs.
    fn lead(self: &Arc<Self>, buffer: &mut RecvBuffer) -> Result<Event, RecvError> {
        self.context.leader.note(Step::Receives);
        let led = self.receive(buffer);
        if !matches!(led, Ok(Event::Finished)) {
            self.context.leader.note(Step::None);
        }
        led
    }

    fn receive(self: &Arc<Self>, buffer: &mut RecvBuffer) -> Result<Event, RecvError> {
        let Context { reports, logger, .. } = &self.context;
        let next = reports.next(buffer);
        self.context.leader.note(Step::Begins);
        let mut messages = match next {
            Ok(messages) => messages,
            Err(RecvError::Empty) => return Ok(Event::Quiet),
            Err(RecvError::Closed) => return Ok(Event::Closed),
            Err(RecvError::Os(errno)) => {
                warn!(logger, # "error", "no job can be received"; "error" => errno.desc());
                reports.flush();
                std::thread::sleep(PAUSE);
                return Ok(Event::Received);
            }
            Err(error) => return Err(error),
        };
        let received = now();
        let mut jobs = VecDeque::new();
        let mut lost = false;
        while let Some(message) = messages.next() {
            let job = message?;
            match messages.fds.take() {
                Some(client) => jobs.push_back(Session::new(&self.context, job, client)),
                None => {
                    reports.lost(job.job);
                    lost = true;
                }
            }
        }
        let jobs = RefCell::new(jobs);
        // The other jobs of the datagram can't wait for the one that has to be waited for.
        let tell = || {
            for session in jobs.take() {
                self.queue(session, Place { received, last: false });
            }
            let threads = self.scheduler.lock().relieve();
            self.obey(threads);
        };
        let leader = Leader::new(self, &tell);
        let mut next = NextJob::Begin;
        let first = || jobs.borrow_mut().pop_front();
        while let Some(mut session) = first() {
            if next == NextJob::Begin {
                session.begin(&self.context, &leader);
            }
            next = match session.is_over() {
                true => NextJob::after(now().saturating_sub(received)),
                false => self.queue(session, Place { received, last: jobs.borrow().is_empty() }),
            };
        }
        if lost {
            warn!(logger, # "message", "connections were lost: too many open files");
            reports.flush();
            std::thread::sleep(PAUSE);
        }
        Ok(if leader.leads.get() { Event::Received } else { Event::Finished })
    }

    /// As leader: queues a job. Returns how the next one is queued.
    fn queue(self: &Arc<Self>, session: Session, place: Place) -> NextJob {
        let now = now();
        let queued = self.scheduler.lock().queue(session, place, now);
        self.obey(queued.threads);
        queued.next
    }

    /// The life of the watcher, which never ends.
    fn watch(self: &Arc<Self>) {
        let reports = &self.context.reports;
        loop {
            let mut scheduler = self.scheduler.lock();
            // A thread that leaves its reports to the watcher takes the lock after gathering them,
            // so that looking under the lock overlooks none.
            while !scheduler.needs_watching(reports.has_gathered()) {
                self.watcher.wait(&mut scheduler);
            }
            drop(scheduler);
            std::thread::sleep(WATCH_INTERVAL);
            reports.flush();
            let moment = self.moment();
            let stuck = self.scheduler.lock().stuck(moment);
            let needed = match stuck {
                Stuck::Start(needed) => needed,
                Stuck::Ask if reports.has_job() => self.scheduler.lock().job_waits(moment),
                Stuck::Ask => 0,
            };
            let started = (0..needed).filter(|_| self.start_another()).count();
            if started < needed {
                std::thread::sleep(PAUSE);
            }
        }
    }
}
