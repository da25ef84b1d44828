//! The life of a worker: a process with a script of its own and threads that do blocking I/O.
//!
//! Contract: every I/O thread waits for something to do, and waits again: it begins the jobs that
//! come, or serves one to its end; which of them does what, `queue` says. At the end of the job
//! socket they finish what they have, and the last one ends the process. The main thread answers
//! on the control socket and never waits for the others.
//!
//! # Failure
//! A thread that can't be had means fewer threads. A panic costs its own mail (`Z`).

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::ipc::channel::RecvBuffer;
use qrelay_shared::ipc::message::Job;
use qrelay_shared::settings::{Declaration, Settings};
use qrelay_shared::sys::thread::{LUA_STACK, spawn};
use slog::{Logger, error, warn};

use crate::delivery::children::Children;
use crate::job_channel::Reports;
use crate::mail::memory::Budget;
use crate::session::request::Buffers;
use crate::session::script::Script;
use crate::session::{Session, Stage};
use crate::threads::queue::{Next, Queue, Task};

/// Virtual memory of the thread that starts others, in bytes.
const WATCH_STACK: usize = 128 << 10;

/// How long to wait for a thread that couldn't be had.
const PAUSE: Duration = Duration::from_millis(100);

/// What a session needs to know about its listener.
#[derive(Debug)]
pub struct Listener {
    /// The address, as written in the configuration.
    pub name: Arc<str>,
    /// Bytes of a message.
    pub max_size: usize,
}

/// What all threads of a worker share.
pub struct Worker {
    /// By [`Job::listener`].
    pub listeners: Vec<Listener>,
    /// Of the worker's generation.
    pub settings: Settings,
    /// First part of every mail's id.
    pub instance: String,
    /// Decides about mails.
    pub script: Arc<dyn Script>,
    /// Memory for messages.
    pub(crate) budget: Budget,
    /// What requests are read into.
    pub buffers: Buffers,
    /// Jobs come from here, and what became of them goes back.
    pub reports: Arc<Reports>,
    /// The programs that run for mails.
    pub(crate) children: Arc<Children>,
    /// Names the process.
    pub logger: Logger,
    queue: Queue,
    end: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Worker {
    /// A worker without threads. The last thread that ends calls `end`.
    pub fn new(
        declaration: &Declaration,
        instance: String,
        script: Arc<dyn Script>,
        reports: Reports,
        logger: Logger,
        end: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let listeners = declaration.listeners.iter().map(|listener| Listener {
            name: listener.address.to_string().into(),
            max_size: listener.max_size,
        });
        let settings = declaration.settings.clone();
        let reports = Arc::new(reports);
        Arc::new(Self {
            listeners: listeners.collect(),
            budget: Budget::new(settings.mail_memory),
            buffers: Buffers::default(),
            queue: Queue::new(settings.worker_connections as usize, logger.clone()),
            settings,
            instance,
            script,
            children: Children::new(Arc::clone(&reports)),
            reports,
            logger,
            end: Box::new(end),
        })
    }

    /// Starts the first threads; they start others as they are needed.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub fn run(self: &Arc<Self>) -> io::Result<()> {
        let worker = Arc::clone(self);
        spawn("watch", WATCH_STACK, move || worker.watch())?;
        self.start()
    }

    fn start(self: &Arc<Self>) -> io::Result<()> {
        let worker = Arc::clone(self);
        spawn("mail", LUA_STACK, move || worker.thread())
    }

    /// Starts a thread that has been counted already. False: there is none for us.
    fn start_another(self: &Arc<Self>) -> bool {
        let Err(error) = self.start() else { return true };
        warn!(self.logger, "no further thread"; "error" => %error);
        if self.queue.not_started() {
            (self.end)();
        }
        false
    }

    /// Starts threads when all are busy and nobody takes the jobs that are queued. Never ends.
    fn watch(self: &Arc<Self>) {
        loop {
            let needed = self.queue.watch(&self.reports);
            let started = (0..needed).filter(|_| self.start_another()).count();
            if started < needed {
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn thread(self: Arc<Self>) {
        let mut message = RecvBuffer::small();
        let mut served = false;
        loop {
            let start = || {
                self.start_another();
            };
            let begin = |job: &Job, client: &Arc<OwnedFd>| self.begin(job, client);
            match self.queue.next(served, &self.reports, &mut message, begin, start) {
                Ok(Next::Serve(task)) => self.finish(task),
                Ok(Next::Superfluous) => return,
                Ok(Next::Ended) => break,
                Err(error) => {
                    error!(self.logger, "the job socket can't be understood"; "error" => %error);
                    return (self.end)();
                }
            }
            served = true;
        }
        self.reports.flush();
        if self.queue.left() {
            (self.end)();
        }
    }

    /// Serves a job as far as it goes without waiting.
    fn begin(&self, job: &Job, client: &Arc<OwnedFd>) -> Stage {
        let session = Session::new(self, job, client);
        catch_unwind(AssertUnwindSafe(|| session.begin())).unwrap_or_else(|panic| {
            self.log_panic(job, &*panic);
            Stage::failed()
        })
    }

    /// Serves a job to its end.
    fn finish(&self, task: Task) {
        let Task { job, client, stage } = task;
        let session = Session::new(self, &job, &client);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| session.finish(stage))) {
            // If the mail had been answered, this answer fails.
            self.log_panic(&job, &*panic);
            session.finish(Stage::failed());
        }
    }

    fn log_panic(&self, job: &Job, panic: &(dyn Any + Send)) {
        let cause = panic.downcast_ref::<String>().map(String::as_str);
        let cause = cause.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
        error!(self.logger, "internal error"; "job" => job.job, "panic" => cause);
    }
}
