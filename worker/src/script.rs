//! What the threads of a worker need of the script: the seam between I/O and Lua.

use std::time::Duration;

use crate::action::Action;
use crate::deadline::Deadline;
use crate::lua::state::{HandlerError, State};
use crate::mail::Mail;

/// The script as the session and the control thread see it.
pub trait Script: Send + Sync {
    /// Asks the listener's handler what to do with a mail; blocks this thread until it says.
    /// The mail comes back whatever happens.
    ///
    /// # Errors
    /// See [`HandlerError`].
    fn handle(
        &self,
        listener: usize,
        mail: Mail,
        deadline: Deadline,
    ) -> (Mail, Result<Action, HandlerError>);

    /// For how long the running call has held the script, and for which job; zero when none
    /// does. Takes no lock.
    fn held(&self) -> (Duration, u64);

    /// The script's memory limit was hit although everything dead had been collected.
    fn exhausted(&self) -> bool;
}

impl Script for State {
    fn handle(
        &self,
        listener: usize,
        mail: Mail,
        deadline: Deadline,
    ) -> (Mail, Result<Action, HandlerError>) {
        State::handle(self, listener, mail, deadline)
    }

    fn held(&self) -> (Duration, u64) {
        let held = State::held(self);
        (held.duration, held.job)
    }

    fn exhausted(&self) -> bool {
        State::exhausted(self)
    }
}
