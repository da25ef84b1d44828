//! Something to be done on a connection, and how far it is.
//!
//! Contract: the caller who waits for a task and the thread that works on it share a [`Stage`], so
//! that each learns when the other is gone.
//!
//! # Failure
//! None.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use crate::lua::library::pg::session::{Answer, Request};
use crate::lua::library::pg::target::Cancel;

/// Something to be done on a connection.
pub(super) struct Task {
    /// The first request.
    pub request: Request,
    /// Further requests; the connection is kept until their sender is gone.
    pub more: Option<Receiver<Request>>,
    /// Where answers go.
    pub answers: Sender<Answer>,
    /// How far it is.
    pub stage: Arc<Stage>,
}

/// How far a task is, shared by the caller and by the thread that works on it.
#[derive(Default)]
pub(super) struct Stage(Mutex<Step>);

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
    /// Marks the task as over.
    Done,
}

/// The work that was abandoned.
pub(super) enum Abandoned {
    /// Nothing that would go on.
    Idle,
    /// A thread that works on it.
    Working(Option<Arc<Cancel>>),
}

/// The meaning of a task's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// Somebody waits for the answer.
    Answer,
    /// The task was abandoned before a thread worked on it.
    Skipped,
    /// The task was abandoned during the work.
    Abandoned,
}

impl Stage {
    /// Notes that work begins, or that its connection is known. Returns false if nobody waits for
    /// the task.
    pub(super) fn run(&self, cancel: Option<&Arc<Cancel>>) -> bool {
        let mut step = self.0.lock();
        let wanted = matches!(*step, Step::Queued | Step::Running(_));
        if wanted {
            *step = Step::Running(cancel.cloned());
        }
        wanted
    }

    /// Marks the task as over.
    pub(super) fn finish(&self) -> Finish {
        match std::mem::replace(&mut *self.0.lock(), Step::Done) {
            Step::Abandoned => Finish::Abandoned,
            Step::Skipped => Finish::Skipped,
            Step::Queued | Step::Running(_) | Step::Done => Finish::Answer,
        }
    }

    /// Marks the task as abandoned.
    pub(super) fn abandon(&self) -> Abandoned {
        let mut step = self.0.lock();
        let next = if matches!(*step, Step::Queued) { Step::Skipped } else { Step::Abandoned };
        match std::mem::replace(&mut *step, next) {
            Step::Running(cancel) => Abandoned::Working(cancel),
            _ => Abandoned::Idle,
        }
    }
}
