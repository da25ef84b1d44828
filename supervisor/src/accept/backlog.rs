//! The end of a listener: nobody new gets in, and what is in its backlog is still accepted.
//!
//! A listener ends because the daemon stops, or because the current generation lacks it. Then its
//! connections are bound to the generation that knows it.
//!
//! # Failure
//! Out of descriptors, the backlog of a local socket is kept and tried again. What a TCP port has
//! got meanwhile is lost, which its clients see as a reset.

use std::time::Instant;

use qrelay_shared::client::Client;

use crate::accept::connections::{Accepted, State};
use crate::accept::listeners::Socket;
use crate::accept::{Acceptor, DISARM};
use crate::event::{Event, Events};
use crate::ids::{GenerationId, ListenerId};

/// A listener that nobody can connect to any more, and whose backlog could not be emptied because
/// descriptors ran out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ending {
    listener: ListenerId,
    serves: Serves,
}

/// Names the generation that serves the connections in the backlog of an ending listener.
#[derive(Debug, Clone, Copy)]
pub(super) enum Serves {
    /// The generation and the listener's number there; a later generation lacks the listener.
    Old(GenerationId, u32),
    /// The current generation: the daemon stops.
    Current,
}

/// Whether a backlog was emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backlog {
    Empty,
    MayHoldMore,
}

impl Acceptor {
    /// Refuses new connections on a listener, and accepts what is in its backlog: at once if there
    /// are descriptors enough.
    pub(super) fn end_listener(
        &mut self,
        id: ListenerId,
        serves: Serves,
        now: Instant,
        events: &mut Events,
    ) {
        self.listeners.refuse_new(id, &self.watcher);
        self.empty_backlog(Ending { listener: id, serves }, now, events);
    }

    fn empty_backlog(&mut self, ending: Ending, now: Instant, events: &mut Events) {
        let Ending { listener: id, serves } = ending;
        let left = self.accept_all(id, now, events);
        if let Serves::Old(generation, number) = serves {
            self.bind(id, generation, number, events);
        }
        let local = self.listeners.get(id).is_some_and(|l| matches!(l.socket(), Socket::Unix(_)));
        // More clients could connect to a TCP port, unless what it has is lost.
        if left == Backlog::MayHoldMore && local {
            self.next_try = Some(now + DISARM);
            return self.endings.push(ending);
        }
        self.listeners.stop_listening(id);
        if matches!(serves, Serves::Old(..)) {
            self.listeners.close(id);
        }
    }

    /// Accepts all that is in a backlog, before the listener is closed.
    fn accept_all(&mut self, id: ListenerId, now: Instant, events: &mut Events) -> Backlog {
        loop {
            match self.accept_batch(id, now, events) {
                Accepted::More => {}
                Accepted::Empty => return Backlog::Empty,
                Accepted::Exhausted(error) => {
                    self.pause(&format!("accept: {error}"), now);
                    return Backlog::MayHoldMore;
                }
            }
        }
    }

    /// Binds the listener's unserved connections to the generation that knows the listener.
    fn bind(
        &mut self,
        listener: ListenerId,
        generation: GenerationId,
        number: u32,
        events: &mut Events,
    ) {
        let unbound = self
            .connections
            .unserved()
            .filter(|(_, c)| c.listener == listener && c.bound.is_none())
            .map(|(job, c)| (job, c.state, Client::from(c.peer)));
        for (job, state, client) in unbound.collect::<Vec<_>>() {
            self.connections.bind(job, generation, number);
            if state == State::Waiting {
                events.push_back(Event::Bound { job, client, generation });
            }
        }
    }

    /// Accepts what is left in the backlogs of ending listeners.
    pub(super) fn retry_endings(&mut self, now: Instant, events: &mut Events) {
        for ending in std::mem::take(&mut self.endings) {
            self.empty_backlog(ending, now, events);
        }
    }

    /// Returns whether connections in a backlog wait for this generation's workers.
    pub(super) fn is_in_backlog(&self, generation: GenerationId) -> bool {
        self.endings.iter().any(|ending| match ending.serves {
            Serves::Old(old, _) => old == generation,
            Serves::Current => self.is_current(generation),
        })
    }
}
