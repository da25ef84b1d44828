//! One connection on a thread of its own.
//!
//! Contract: the thread takes tasks from its pool's queue, one at a time, and connects when it has
//! to; a connection that turns out to be broken before a request has left is made again. The
//! database client has no time limit; who asks has one, and abandons the task when it is over: the
//! statement is cancelled, and the thread ends when the server says something or the connection
//! breaks.
//!
//! # Failure
//! What goes wrong is the answer. A panic ends the thread, and with it the task's channel.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use qrelay_shared::sys::thread::spawn;

use crate::lua::library::pg::pool::{Seat, Shared};
use crate::lua::library::pg::session::{Answer, Request, Session};
use crate::lua::library::pg::target::Cancel;

/// Virtual memory of a connection's thread: a TLS handshake of an unoptimised build takes less
/// than half of it (measured), everything else a fraction.
pub const STACK_SIZE: usize = 512 << 10;

/// Something to be done on a connection.
pub struct Task {
    /// What is asked first.
    pub request: Request,
    /// What is asked afterwards: the connection is kept until nobody can ask any more.
    pub more: Option<Receiver<Request>>,
    /// Where answers go.
    pub answers: Sender<Answer>,
    /// How far it is.
    pub stage: Arc<Stage>,
}

/// How far a task is: known to who asked and to the thread that works on it.
#[derive(Default)]
pub struct Stage(Mutex<Step>);

#[derive(Default)]
enum Step {
    /// Nobody works on it.
    #[default]
    Queued,
    /// A connection works on it, or is being made for it.
    Running(Option<Arc<Cancel>>),
    /// Nobody waits for it, and nobody has begun with it.
    Skipped,
    /// Nobody waits for it any more.
    Abandoned,
    /// It is over.
    Done,
}

/// What was abandoned.
pub enum Abandoned {
    /// Nothing that would go on.
    Idle,
    /// A thread that works on it.
    Working(Option<Arc<Cancel>>),
}

/// What the end of a task means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// Somebody waits for the answer.
    Answer,
    /// It was abandoned before anybody worked on it.
    Skipped,
    /// It was abandoned meanwhile.
    Abandoned,
}

impl Stage {
    /// Work begins, or its connection is known; false if nobody waits.
    fn run(&self, cancel: Option<&Arc<Cancel>>) -> bool {
        let mut step = self.0.lock();
        let wanted = matches!(*step, Step::Queued | Step::Running(_));
        if wanted {
            *step = Step::Running(cancel.cloned());
        }
        wanted
    }

    /// It is over.
    pub fn finish(&self) -> Finish {
        match std::mem::replace(&mut *self.0.lock(), Step::Done) {
            Step::Abandoned => Finish::Abandoned,
            Step::Skipped => Finish::Skipped,
            Step::Queued | Step::Running(_) | Step::Done => Finish::Answer,
        }
    }

    /// Nobody waits any more.
    pub fn abandon(&self) -> Abandoned {
        let mut step = self.0.lock();
        let next = if matches!(*step, Step::Queued) { Step::Skipped } else { Step::Abandoned };
        match std::mem::replace(&mut *step, next) {
            Step::Running(cancel) => Abandoned::Working(cancel),
            _ => Abandoned::Idle,
        }
    }
}

/// Has the server cancel what an abandoned connection is doing.
pub fn cancel(cancel: Arc<Cancel>) {
    // Without a thread the statement goes on until its end.
    let _ = spawn("pg-cancel", STACK_SIZE, move || cancel.run());
}

/// Starts a thread that works on tasks until there can be no more.
///
/// # Errors
/// There is no thread to be had.
pub fn start(shared: Arc<Shared>, tasks: Receiver<Task>) -> std::io::Result<()> {
    let worker = Worker { seat: Seat::new(shared, tasks), connection: None };
    spawn("pg", STACK_SIZE, move || worker.run())
}

struct Worker {
    /// Dropped before the seat: whoever waits for the thread's end wants this to be closed.
    connection: Option<(Session, Arc<Cancel>)>,
    seat: Seat,
}

impl Worker {
    fn run(mut self) {
        while let Some(task) = self.seat.next() {
            let wanted = task.stage.run(self.connection.as_ref().map(|(_, cancel)| cancel));
            let answer = if wanted { self.work(&task) } else { None };
            if !self.seat.finish() {
                break;
            }
            if let Some(answer) = answer {
                // Who asked may have given up just now.
                let _ = task.answers.send(answer);
            }
        }
    }

    /// Does a task to its end; its last answer, if there is one.
    fn work(&mut self, task: &Task) -> Option<Answer> {
        let answer = self.answer(&task.request, &task.stage);
        let (Some(more), Answer::Done(_)) = (&task.more, &answer) else { return Some(answer) };
        let mut next = answer;
        while task.answers.send(next).is_ok() {
            let Ok(request) = more.recv() else { break };
            next = match &mut self.connection {
                Some((session, _)) => session.answer(&request),
                None => Answer::Failed("the connection is gone".into()),
            };
            if let Answer::Lost { message, .. } = next {
                self.connection = None;
                next = Answer::Failed(message);
            }
        }
        // The server rolls back what was begun.
        self.connection.take_if(|(session, _)| session.is_in_transaction());
        None
    }

    fn answer(&mut self, request: &Request, stage: &Stage) -> Answer {
        let mut again = true;
        loop {
            let session = match self.connected(stage) {
                Ok(session) => session,
                Err(message) => return Answer::Failed(message),
            };
            match session.answer(request) {
                Answer::Lost { message, unsent } => {
                    self.connection = None;
                    if !(unsent && std::mem::take(&mut again)) {
                        return Answer::Failed(message);
                    }
                }
                answer => return answer,
            }
        }
    }

    fn connected(&mut self, stage: &Stage) -> Result<&mut Session, String> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let (client, cancel) = self.seat.target().connect()?;
                let cancel = Arc::new(cancel);
                if !stage.run(Some(&cancel)) {
                    return Err("nobody waits any more".into());
                }
                (Session::new(client), cancel)
            }
        };
        Ok(&mut self.connection.insert(connection).0)
    }
}
