//! The connections of one `pg:new`: limited in number, made when they are needed, used again.
//!
//! Contract: tasks wait in one queue, from which the connections' threads take them. A connection
//! goes on with the next task without sleeping in between. A [`Lease`] keeps a connection over
//! several requests. Abandoned connections are limited as well: a server that doesn't answer costs
//! at most twice as many threads as there may be connections.
//!
//! # Failure
//! [`Refusal`]. A mail that gives up waiting learns no reason, so the reason goes to the log.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded, unbounded};
use parking_lot::{Condvar, Mutex};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ipc::message::{DatabaseState, MAX_DATABASE_NAME, MailId};
use qrelay_shared::system_error::shown;
use slog::Logger;

use crate::lua::library::pg::connection::{self, Tasks};
use crate::lua::library::pg::rows::Rows;
use crate::lua::library::pg::session::{Answer, Request};
use crate::lua::library::pg::target::Target;
use crate::lua::library::pg::task::{Abandoned, Finish, Stage, Task};

/// How long the end of loading waits for connections that the script has opened.
pub(super) const CLOSE_TIME: Duration = Duration::from_secs(5);

/// The log's name for what a mail waits for until a thread has begun with its task.
const FREE: &str = "a free connection";
/// The log's name for what a mail waits for when the server has its statement.
const ANSWER: &str = "an answer";

/// Longest part of a statement in the log, in bytes.
const SHOWN: usize = 60;

/// Where a request comes from, for the log.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// The mail whose handler asks, if a handler asks.
    pub id: Option<MailId>,
    /// The beginning of the statement.
    statement: String,
}

impl Origin {
    /// Returns the origin of a request that this mail's handler makes.
    pub(super) fn new(id: Option<MailId>, request: &Request) -> Self {
        let statement = request.statement();
        let start = &statement.as_bytes()[..statement.len().min(SHOWN)];
        Self { id, statement: String::from_utf8_lossy(start).into_owned() }
    }
}

/// Why there is no result.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The deadline passed.
    Expired,
    /// The reason of the server or the system.
    Failed(String),
    /// Why there is no connection, which may pass by itself.
    Unreachable(String),
}

/// The connections.
pub(super) struct Pool {
    shared: Arc<Shared>,
    queue: Mutex<Queue>,
}

/// The queue of tasks. Its threads end when its last sender is gone.
struct Queue {
    tasks: Sender<Task>,
    taken: Receiver<Task>,
}

impl Queue {
    fn new() -> Self {
        let (tasks, taken) = unbounded();
        Self { tasks, taken }
    }
}

/// The part of a pool that its threads share.
struct Shared {
    target: Arc<Target>,
    max: usize,
    logger: Logger,
    state: Mutex<State>,
    /// A thread has ended.
    ended: Condvar,
    /// Requests that got no connection.
    unserved: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Threads that take tasks.
    threads: usize,
    /// Tasks in the queue or in work, but for abandoned work.
    outstanding: usize,
    /// Threads with work that nobody waits for any more.
    abandoned: usize,
}

impl Shared {
    /// Logs what a mail waited for when its time was over.
    fn given_up(&self, waiting_for: &str, origin: &Origin) {
        if waiting_for != ANSWER {
            self.unserved.fetch_add(1, Ordering::Relaxed);
        }
        slog::warn!(self.logger, # "server,waited_for", "pg: a mail's time is over";
            "id" => origin.id.as_deref(), "waited_for" => waiting_for,
            "server" => self.target.name(), "statement" => &origin.statement);
    }

    /// Starts a thread if there is work for it and there may be one more.
    fn grow(self: &Arc<Self>, state: &mut State, taken: &Receiver<Task>) -> io::Result<()> {
        let needed = state.outstanding > state.threads;
        if !needed || state.threads >= self.max || state.abandoned >= self.max {
            return Ok(());
        }
        let (shared, taken) = (Arc::clone(self), taken.clone());
        connection::start(move || PoolThread::new(shared, taken))?;
        state.threads += 1;
        Ok(())
    }
}

/// A thread's entry in the counts of its pool, until it is dropped.
struct PoolThread {
    shared: Arc<Shared>,
    taken: Receiver<Task>,
    /// Of the task in work.
    stage: Option<Arc<Stage>>,
    abandoned: bool,
}

impl PoolThread {
    /// For a thread that [`Shared::grow`] starts.
    fn new(shared: Arc<Shared>, taken: Receiver<Task>) -> Self {
        Self { shared, taken, stage: None, abandoned: false }
    }

    fn count_finished(&mut self) -> bool {
        let Some(stage) = self.stage.take() else { return true };
        match stage.finish() {
            Finish::Answer | Finish::Skipped => {
                self.shared.state.lock().outstanding -= 1;
                true
            }
            Finish::Abandoned => {
                self.abandoned = true;
                false
            }
        }
    }
}

impl Tasks for PoolThread {
    fn target(&self) -> &Target {
        &self.shared.target
    }

    fn next(&mut self) -> Option<Task> {
        let task = self.taken.recv().ok()?;
        self.stage = Some(Arc::clone(&task.stage));
        Some(task)
    }

    fn finish(&mut self) -> bool {
        self.count_finished()
    }
}

impl Drop for PoolThread {
    fn drop(&mut self) {
        self.count_finished();
        let mut state = self.shared.state.lock();
        if self.abandoned {
            state.abandoned -= 1;
        } else {
            state.threads -= 1;
        }
        // If no thread can be started, the callers wait until their deadlines.
        let _ = self.shared.grow(&mut state, &self.taken);
        drop(state);
        self.shared.ended.notify_all();
    }
}

impl Pool {
    /// No connections yet.
    pub(super) fn new(target: Arc<Target>, max: usize, logger: &Logger) -> Arc<Self> {
        let (logger, state, ended) = (logger.clone(), Mutex::default(), Condvar::new());
        let shared =
            Arc::new(Shared { target, max, logger, state, ended, unserved: AtomicU64::new(0) });
        Arc::new(Self { shared, queue: Mutex::new(Queue::new()) })
    }

    /// Returns the database of the connections.
    pub(super) fn target(&self) -> &Arc<Target> {
        &self.shared.target
    }

    /// Describes the pool; `None` if that would have to wait.
    pub(super) fn described(&self) -> Option<DatabaseState> {
        let Shared { target, max, state, unserved, .. } = &*self.shared;
        let state = state.try_lock()?;
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let mut name = target.label();
        while name.len() > MAX_DATABASE_NAME {
            name.pop();
        }
        Some(DatabaseState {
            name,
            limit: number(*max),
            connections: number(state.threads),
            outstanding: number(state.outstanding),
            errors: unserved.load(Ordering::Relaxed),
        })
    }

    /// Sends a request and waits for its result.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub(super) fn ask(
        &self,
        request: Request,
        id: Option<MailId>,
        deadline: Deadline,
    ) -> Result<Rows, Refusal> {
        let origin = Origin::new(id, &request);
        let (answers, answered) = bounded(0);
        let stage = Arc::new(Stage::default());
        let task = Task { request, more: None, answers, stage: Arc::clone(&stage) };
        self.enqueue(task, &origin, deadline)?;
        self.caller(stage, answered).wait(&origin, deadline)
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub(super) fn begin(&self, id: Option<MailId>, deadline: Deadline) -> Result<Lease, Refusal> {
        let origin = Origin::new(id, &Request::Begin);
        let ((answers, answered), (requests, more)) = (bounded(0), bounded(0));
        let stage = Arc::new(Stage::default());
        let more = Some(more);
        let task = Task { request: Request::Begin, more, answers, stage: Arc::clone(&stage) };
        self.enqueue(task, &origin, deadline)?;
        let caller = self.caller(stage, answered);
        caller.wait(&origin, deadline)?;
        Ok(Lease { requests, caller, id: origin.id })
    }

    /// Ends every thread as soon as it is idle, and waits for the ends.
    pub(super) fn close(&self, deadline: Deadline) {
        *self.queue.lock() = Queue::new();
        let mut state = self.shared.state.lock();
        while state.threads + state.abandoned > 0 {
            if self.shared.ended.wait_until(&mut state, deadline.instant()).timed_out() {
                break;
            }
        }
    }

    /// Puts a task into the queue. While no thread exists and none may be started, waits for the
    /// end of an abandoned thread.
    fn enqueue(&self, task: Task, origin: &Origin, deadline: Deadline) -> Result<(), Refusal> {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        while state.threads == 0 && state.abandoned >= shared.max {
            if shared.ended.wait_until(&mut state, deadline.instant()).timed_out() {
                shared.given_up(FREE, origin);
                return Err(Refusal::Expired);
            }
        }
        let queue = self.queue.lock();
        state.outstanding += 1;
        if let Err(error) = shared.grow(&mut state, &queue.taken)
            && state.threads == 0
        {
            state.outstanding -= 1;
            return Err(Refusal::Failed(format!("no thread for a connection: {}", shown(&error))));
        }
        drop(state);
        // The queue has a receiver of its own.
        let _ = queue.tasks.send(task);
        Ok(())
    }

    fn caller(&self, stage: Arc<Stage>, answers: Receiver<Answer>) -> Caller {
        let shared = Arc::clone(&self.shared);
        Caller { shared, taken: self.queue.lock().taken.clone(), stage, answers }
    }
}

/// Waits for the answers to a task.
struct Caller {
    shared: Arc<Shared>,
    taken: Receiver<Task>,
    stage: Arc<Stage>,
    answers: Receiver<Answer>,
}

impl Caller {
    fn wait(&self, origin: &Origin, deadline: Deadline) -> Result<Rows, Refusal> {
        match self.answers.recv_deadline(deadline.instant()) {
            Ok(Answer::Done(rows)) => Ok(rows),
            Ok(Answer::Failed(message) | Answer::Lost { message, .. }) => {
                Err(Refusal::Failed(message))
            }
            Ok(Answer::Unreachable(message)) => {
                self.shared.unserved.fetch_add(1, Ordering::Relaxed);
                Err(Refusal::Unreachable(message))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Refusal::Failed("the connection's thread has ended".into()))
            }
            Err(RecvTimeoutError::Timeout) => {
                self.abandon(origin);
                Err(Refusal::Expired)
            }
        }
    }

    fn abandon(&self, origin: &Origin) {
        // The state is locked first, so that the thread's end is counted afterwards.
        let mut state = self.shared.state.lock();
        let Abandoned::Working(cancel) = self.stage.abandon() else {
            return self.shared.given_up(FREE, origin);
        };
        let waited_for = if cancel.is_some() { ANSWER } else { "a new connection" };
        self.shared.given_up(waited_for, origin);
        state.threads -= 1;
        state.outstanding -= 1;
        state.abandoned += 1;
        // If no thread can be started, the callers wait until their deadlines.
        let _ = self.shared.grow(&mut state, &self.taken);
        drop(state);
        if let Some(token) = cancel {
            connection::cancel(token);
        }
    }
}

/// A connection that one transaction has to itself.
pub(super) struct Lease {
    requests: Sender<Request>,
    caller: Caller,
    id: Option<MailId>,
}

impl Lease {
    /// Sends a request of the transaction and waits for its result.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub(super) fn ask(&self, request: Request, deadline: Deadline) -> Result<Rows, Refusal> {
        let origin = Origin::new(self.id, &request);
        match self.requests.send_deadline(request, deadline.instant()) {
            Ok(()) => self.caller.wait(&origin, deadline),
            Err(SendTimeoutError::Timeout(_)) => Err(Refusal::Expired),
            Err(SendTimeoutError::Disconnected(_)) => {
                Err(Refusal::Failed("the connection is gone".into()))
            }
        }
    }
}
