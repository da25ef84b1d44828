//! The connections of one `pg:new`: at most so many, opened when they are needed, used again.
//!
//! Contract: [`Pool::ask`] takes a free connection, opens one, or waits for one, until the
//! deadline. A [`Lease`] keeps a connection over several requests. Only a connection that is ready
//! for anything goes back. Connections that were abandoned count as well, so that a server which
//! doesn't answer costs at most twice as many threads as there may be connections.
//!
//! # Failure
//! [`Refusal`]. What the server says about a statement is an answer.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::connection::{Asked, Connection};
use super::session::{Answer, Request, Rows};
use super::target::Target;
use crate::deadline::Deadline;

/// Why there is no result.
#[derive(Debug)]
pub enum Refusal {
    /// The deadline passed.
    Expired,
    /// The server's, or the system's, reason.
    Failed(String),
}

/// The connections.
pub struct Pool {
    target: Arc<Target>,
    max: usize,
    state: Mutex<State>,
    /// A connection came back, or a thread ended.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Connection>,
    /// Idle ones, leased ones, and those that are being opened.
    open: usize,
    /// The numbers of connections whose threads are alive.
    threads: BTreeSet<u64>,
    /// Those of them that nobody waits for any more.
    abandoned: BTreeSet<u64>,
    counter: u64,
}

/// Notes the end of a connection's thread.
struct Ended {
    pool: Weak<Pool>,
    number: u64,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            let mut state = pool.state.lock();
            state.threads.remove(&self.number);
            state.abandoned.remove(&self.number);
            drop(state);
            pool.changed.notify_all();
        }
    }
}

impl Pool {
    /// No connections yet.
    pub fn new(target: Arc<Target>, max: usize) -> Arc<Self> {
        Arc::new(Self { target, max, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Where the connections lead.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Has a request answered. One that never left, because its connection had broken, is sent
    /// again once.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn ask(self: &Arc<Self>, request: &Request, deadline: Deadline) -> Result<Rows, Refusal> {
        let mut again = true;
        loop {
            let mut lease = self.lease(deadline)?;
            match lease.try_ask(request.clone(), deadline)? {
                Answer::Done(rows) => return Ok(rows),
                Answer::Lost { unsent: true, .. } if again => again = false,
                Answer::Failed(message) | Answer::Lost { message, .. } => {
                    return Err(Refusal::Failed(message));
                }
            }
        }
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn begin(self: &Arc<Self>, deadline: Deadline) -> Result<Lease, Refusal> {
        let mut again = true;
        loop {
            let mut lease = self.lease(deadline)?;
            match lease.try_ask(Request::Begin, deadline)? {
                Answer::Done(_) => {
                    lease.busy = true;
                    return Ok(lease);
                }
                Answer::Lost { unsent: true, .. } if again => again = false,
                Answer::Failed(message) | Answer::Lost { message, .. } => {
                    return Err(Refusal::Failed(message));
                }
            }
        }
    }

    /// Closes every connection, and waits for the end of their threads: those that work on
    /// something end after it.
    pub fn close(&self, deadline: Deadline) {
        let mut state = self.state.lock();
        let idle = std::mem::take(&mut state.idle);
        state.open -= idle.len();
        drop(idle);
        while !state.threads.is_empty() {
            if self.changed.wait_until(&mut state, deadline.instant()).timed_out() {
                break;
            }
        }
    }

    fn lease(self: &Arc<Self>, deadline: Deadline) -> Result<Lease, Refusal> {
        let mut state = self.state.lock();
        loop {
            if let Some(connection) = state.idle.pop() {
                return Ok(self.leased(connection));
            }
            if state.open < self.max && state.abandoned.len() < self.max {
                break;
            }
            if self.changed.wait_until(&mut state, deadline.instant()).timed_out() {
                return Err(Refusal::Expired);
            }
        }
        state.open += 1;
        state.counter += 1;
        let number = state.counter;
        state.threads.insert(number);
        drop(state);
        let ended = Ended { pool: Arc::downgrade(self), number };
        match Connection::open(number, Arc::clone(&self.target), ended) {
            Ok(connection) => self.wait_for(connection, deadline),
            Err(error) => {
                self.closed();
                Err(Refusal::Failed(format!("no thread for a connection: {error}")))
            }
        }
    }

    fn wait_for(
        self: &Arc<Self>,
        mut connection: Connection,
        deadline: Deadline,
    ) -> Result<Lease, Refusal> {
        match connection.opened(deadline) {
            Asked::Answered(Ok(())) => Ok(self.leased(connection)),
            Asked::Answered(Err(message)) => {
                self.closed();
                Err(Refusal::Failed(message))
            }
            Asked::Expired => {
                self.abandon(connection);
                Err(Refusal::Expired)
            }
        }
    }

    fn leased(self: &Arc<Self>, connection: Connection) -> Lease {
        Lease { pool: Arc::clone(self), connection: Some(connection), busy: false }
    }

    /// A connection isn't there any more.
    fn closed(&self) {
        self.state.lock().open -= 1;
        self.changed.notify_one();
    }

    fn abandon(&self, connection: Connection) {
        let mut state = self.state.lock();
        state.open -= 1;
        if state.threads.contains(&connection.number) {
            state.abandoned.insert(connection.number);
        }
        drop(state);
        self.changed.notify_one();
        connection.abandon();
    }

    /// When one connection has broken, the idle ones probably have, too.
    fn distrust(&self) {
        let mut state = self.state.lock();
        let idle = std::mem::take(&mut state.idle);
        state.open -= idle.len();
    }

    fn give_back(&self, connection: Connection) {
        self.state.lock().idle.push(connection);
        self.changed.notify_one();
    }
}

/// How long a fork waits for connections to end that were opened while the script was loaded.
pub const CLOSE_TIME: Duration = Duration::from_secs(5);

/// A connection that somebody has for himself.
pub struct Lease {
    pool: Arc<Pool>,
    connection: Option<Connection>,
    /// It is in the middle of something: it can't be given to others.
    busy: bool,
}

impl Lease {
    /// Has a request of a transaction answered.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn ask(&mut self, request: Request, deadline: Deadline) -> Result<Rows, Refusal> {
        let ends = matches!(request, Request::Commit | Request::Rollback);
        match self.try_ask(request, deadline)? {
            Answer::Done(rows) => {
                self.busy &= !ends;
                Ok(rows)
            }
            Answer::Failed(message) => {
                self.busy &= !ends;
                Err(Refusal::Failed(message))
            }
            Answer::Lost { message, .. } => Err(Refusal::Failed(message)),
        }
    }

    fn try_ask(&mut self, request: Request, deadline: Deadline) -> Result<Answer, Refusal> {
        let Some(connection) = self.connection.take() else {
            return Err(Refusal::Failed("the connection is gone".into()));
        };
        match connection.ask(request, deadline) {
            Asked::Answered(answer @ Answer::Lost { .. }) => {
                drop(connection);
                self.pool.distrust();
                self.pool.closed();
                Ok(answer)
            }
            Asked::Answered(answer) => {
                self.connection = Some(connection);
                Ok(answer)
            }
            Asked::Expired => {
                self.pool.abandon(connection);
                Err(Refusal::Expired)
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        match self.connection.take() {
            Some(connection) if self.busy => {
                // The server rolls back what was begun.
                drop(connection);
                self.pool.closed();
            }
            Some(connection) => self.pool.give_back(connection),
            None => {}
        }
    }
}
