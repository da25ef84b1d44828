//! What the threads of a worker need of the script: the seam between I/O and Lua.

use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use std::sync::Arc;
use std::time::Duration;

use crate::delivery::action::Action;
use crate::lua::state::{HandlerError, State};
use crate::mail::Mail;

/// A mail and what its handler says about it.
pub type Decision = (Box<Mail>, Result<Action, HandlerError>);

/// How far a handler has come.
pub enum Handling {
    /// It has decided.
    Decided(Decision),
    /// The rest of it waits for something, and so does who calls this.
    Waits(Box<dyn FnOnce() -> Decision + Send>),
}

impl Handling {
    /// Waits, if need be, until the handler has decided.
    pub fn finish(self) -> Decision {
        match self {
            Self::Decided(decision) => decision,
            Self::Waits(rest) => rest(),
        }
    }
}

/// The script as the session and the control thread see it.
pub trait Script: Send + Sync {
    /// Asks the listener's handler what to do with a mail; waits for nothing but for Lua. The mail
    /// comes back whatever happens.
    fn start(self: Arc<Self>, listener: usize, mail: Box<Mail>, deadline: Deadline) -> Handling;

    /// For how long the running call has held the script, and for which job; zero when none
    /// does. Takes no lock.
    fn held(&self) -> (Duration, JobId);

    /// The script's memory limit was hit although everything dead had been collected.
    fn exhausted(&self) -> bool;
}

impl Script for State {
    fn start(self: Arc<Self>, listener: usize, mail: Box<Mail>, deadline: Deadline) -> Handling {
        State::start(self, listener, mail, deadline)
    }

    fn held(&self) -> (Duration, JobId) {
        let held = State::held(self);
        (held.duration, held.job)
    }

    fn exhausted(&self) -> bool {
        State::exhausted(self)
    }
}
