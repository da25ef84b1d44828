//! What administrators see of listeners and of connections that no worker has.

use std::collections::BTreeMap;
use std::time::Instant;

use qrelay_shared::admin;

use crate::accept::Acceptor;
use crate::accept::connections::{Connection, State};
use crate::event::Origin;
use crate::ids::JobId;

/// A connection, as a list of mails shows it.
#[derive(Debug)]
pub(crate) struct Shown {
    /// The connection.
    pub(crate) job: JobId,
    /// Where it came from.
    pub(crate) origin: Origin,
    /// When it was accepted.
    pub(crate) accepted: Instant,
}

impl Acceptor {
    /// Describes the listening sockets.
    pub(crate) fn shown(&self) -> Vec<admin::Listener> {
        let mut counts: BTreeMap<_, (u64, u64)> = BTreeMap::new();
        for (listener, with_worker) in self.connections.places() {
            let (held, all) = counts.entry(listener).or_default();
            *all += 1;
            *held += u64::from(!with_worker);
        }
        let shown = self.listeners.iter().map(|(id, listener)| {
            let (held, connections) = counts.get(&id).copied().unwrap_or_default();
            let queue = listener.queue();
            admin::Listener {
                address: listener.name().to_string(),
                mode: listener.mode().map(|mode| format!("{mode:04o}")),
                held,
                connections,
                backlog: queue.map(|queue| queue.waiting),
                backlog_limit: queue.map(|queue| queue.limit),
            }
        });
        shown.collect()
    }

    /// Counts the connections whose clients have begun to speak, and that no worker has.
    pub(crate) fn waiting(&self) -> usize {
        self.connections.unserved().filter(|(_, c)| c.state == State::Waiting).count()
    }

    /// Returns the next connections, at most `most`, that wait for a worker, after this one.
    pub(crate) fn waiting_after(&self, after: JobId, most: usize) -> Vec<Shown> {
        let waiting = self.connections.unserved();
        let waiting = waiting.filter(|&(job, c)| c.state == State::Waiting && job > after);
        let mut waiting: Vec<_> = waiting.collect();
        waiting.sort_unstable_by_key(|&(job, _)| job);
        waiting.truncate(most);
        waiting.into_iter().map(|(job, connection)| shown(job, connection)).collect()
    }

    /// Returns a connection.
    pub(crate) fn connection(&self, job: JobId) -> Option<Shown> {
        self.connections.get(job).map(|connection| shown(job, connection))
    }
}

fn shown(job: JobId, connection: &Connection) -> Shown {
    Shown { job, origin: connection.origin(), accepted: connection.accepted }
}
