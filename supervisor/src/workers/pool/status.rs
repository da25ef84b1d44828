//! What an administrator is told about each worker. Pure.

use crate::ids::{GenerationId, WorkerId};
use crate::workers::pool::{Pool, State};

/// A worker as the pool sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::workers) struct Summary {
    /// The worker.
    pub(in crate::workers) worker: WorkerId,
    /// The generation that the worker belongs to.
    pub(in crate::workers) generation: GenerationId,
    /// Where the worker is in its life, in a word.
    pub(in crate::workers) state: &'static str,
    /// How many jobs the worker has.
    pub(in crate::workers) jobs: usize,
    /// How many jobs the worker gets at a time.
    pub(in crate::workers) credit: usize,
    /// How many jobs the worker has got in its life.
    pub(in crate::workers) mails: u64,
}

impl Pool {
    /// Describes every worker.
    pub(in crate::workers) fn summaries(&self) -> impl Iterator<Item = Summary> {
        self.workers.iter().map(|(&id, worker)| Summary {
            worker: id,
            generation: worker.generation,
            state: match worker.state {
                State::Starting { .. } => "starting",
                State::Ready => "ready",
                State::Retiring { .. } => "finishing",
                State::Dying { .. } => "dying",
            },
            jobs: worker.jobs,
            credit: self.credit(worker.generation),
            mails: worker.mails,
        })
    }
}
