//! A connection on a thread of its own.
//!
//! Contract: the thread takes tasks from its pool's queue, one at a time, and connects when it has
//! to; a connection that turns out to be broken before a request has left is made again. The
//! database client has no time limit. The caller of a task has one and abandons the task when it is
//! over: the statement is cancelled, and the thread ends when the server answers or the connection
//! breaks.
//!
//! # Failure
//! An error is the answer. A panic ends the thread, and with it the task's channel.

use std::sync::Arc;

use qrelay_shared::sys::thread::spawn;

use crate::lua::library::pg::session::{Answer, Request, Session};
use crate::lua::library::pg::target::{Cancel, ConnectFailure, Connection, Target};
use crate::lua::library::pg::task::{Stage, Task};

/// Virtual memory of a connection's thread: a TLS handshake of an unoptimised build takes less than
/// half of it (measured), everything else a fraction.
pub(super) const STACK_SIZE: usize = 512 << 10;

/// Has the server cancel the statement of an abandoned connection.
pub(super) fn cancel(cancel: Arc<Cancel>) {
    // Without a thread the statement goes on until its end.
    let _ = spawn("pg-cancel", STACK_SIZE, move || cancel.run());
}

/// The pool of a connection's thread, as the thread sees it.
pub(super) trait Tasks {
    /// Returns the server that connections lead to.
    fn target(&self) -> &Target;

    /// Waits for the next task; none if there can be no more.
    fn next(&mut self) -> Option<Task>;

    /// Counts the task as over; false if nobody waits for it, and the thread isn't counted any
    /// more.
    fn finish(&mut self) -> bool;
}

/// Starts a thread that works on tasks until there can be no more. The thread makes `tasks` itself,
/// so that nothing is counted for a thread that doesn't start.
///
/// # Errors
/// There is no thread to be had.
pub(super) fn start<T: Tasks>(tasks: impl FnOnce() -> T + Send + 'static) -> std::io::Result<()> {
    spawn("pg", STACK_SIZE, move || Worker { tasks: tasks(), connection: None }.run())
}

impl From<ConnectFailure> for Answer {
    fn from(failure: ConnectFailure) -> Self {
        let ConnectFailure { message, may_pass } = failure;
        if may_pass { Self::Unreachable(message) } else { Self::Failed(message) }
    }
}

struct Worker<T> {
    /// Dropped before `tasks`: a caller that waits for the thread's end wants this to be closed.
    connection: Option<(Session, Arc<Cancel>)>,
    tasks: T,
}

impl<T: Tasks> Worker<T> {
    fn run(mut self) {
        while let Some(task) = self.tasks.next() {
            let wanted = task.stage.run(self.connection.as_ref().map(|(_, cancel)| cancel));
            let answer = if wanted { self.work(&task) } else { None };
            if !self.tasks.finish() {
                break;
            }
            if let Some(answer) = answer {
                // The caller may have given up just now.
                let _ = task.answers.send(answer);
            }
        }
    }

    /// Does a task to its end and returns its last answer, if there is one.
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
                Err(failure) => return failure.into(),
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

    fn connected(&mut self, stage: &Stage) -> Result<&mut Session, ConnectFailure> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let Connection { client, cancel, pooling } = self.tasks.target().connect()?;
                let cancel = Arc::new(cancel);
                if !stage.run(Some(&cancel)) {
                    return Err("nobody waits any more".to_owned().into());
                }
                (Session::new(client, pooling), cancel)
            }
        };
        Ok(&mut self.connection.insert(connection).0)
    }
}
