//! Operations: the blocking work of a handler, done while other threads use Lua.
//!
//! Contract: a library function that would block returns an [`Operation`]. It travels out of the
//! handler's coroutine to a thread that may wait (see [`crate::lua::engine::monitor`]), which
//! carries it out, or waits for what is under way already, with Lua unlocked and puts the
//! [`Completion`] into the same object, from where the waiting function takes it. An operation
//! holds no Lua values: dropping one would wait for Lua.
//!
//! # Failure
//! An operation that can't be done in time says [`Completion::Expired`]; that ends the handler.
//! Other failures are values (`nil, message`) or raise in the script, as the operation decides.

use mlua::{IntoLuaMulti, Lua, MultiValue};
use parking_lot::Mutex;
use qrelay_shared::deadline::Deadline;

use crate::lua::binding::error::Raise;

/// Blocking work, done without Lua.
pub(crate) trait Operation: Send {
    /// Does the work on the calling thread, by the deadline.
    fn run(self: Box<Self>, deadline: Deadline) -> Completion;
}

/// Makes an operation's results into Lua values, once Lua is held again.
pub(crate) type Results = Box<dyn FnOnce(&Lua) -> Result<MultiValue, Raise> + Send>;

/// How an operation ended.
pub(crate) enum Completion {
    /// The function returns, or raises, this.
    Done(Results),
    /// The function returns, or raises, this: a failure that may pass by itself.
    Passing(Results),
    /// The deadline passed.
    Expired,
}

impl Completion {
    /// The function returns these values.
    pub(crate) fn values<R: IntoLuaMulti + Send + 'static>(values: R) -> Self {
        Self::Done(Box::new(move |lua| Ok(values.into_lua_multi(lua)?)))
    }

    /// The function returns `nil, message`.
    pub(crate) fn failure(message: String) -> Self {
        Self::values((mlua::Value::Nil, message))
    }

    /// A failure that may pass by itself.
    pub(crate) fn passing(self) -> Self {
        match self {
            Self::Done(results) => Self::Passing(results),
            other => other,
        }
    }

    /// The function raises this.
    pub(crate) fn raise(message: String) -> Self {
        Self::Done(Box::new(move |_| Err(Raise::Text(message))))
    }
}

/// An operation as Lua sees it: a userdata without methods.
pub(crate) struct Pending(Mutex<Stage>);

enum Stage {
    Ready(Box<dyn Operation>),
    Running,
    Done(Completion),
}

impl Pending {
    /// Not yet begun.
    pub(crate) fn new(operation: Box<dyn Operation>) -> Self {
        Self(Mutex::new(Stage::Ready(operation)))
    }

    /// Takes the work; only the first call gets it.
    pub(crate) fn take(&self) -> Option<Box<dyn Operation>> {
        let mut stage = self.0.lock();
        match std::mem::replace(&mut *stage, Stage::Running) {
            Stage::Ready(operation) => Some(operation),
            other => {
                *stage = other;
                None
            }
        }
    }

    /// Stores how the operation ended.
    pub(crate) fn finish(&self, outcome: Completion) {
        *self.0.lock() = Stage::Done(outcome);
    }

    /// Takes the results of the operation, once.
    ///
    /// # Errors
    /// The operation isn't done, or was given up.
    pub(crate) fn results(&self) -> Result<Results, Raise> {
        match std::mem::replace(&mut *self.0.lock(), Stage::Running) {
            Stage::Done(Completion::Done(results) | Completion::Passing(results)) => Ok(results),
            Stage::Done(Completion::Expired) => Err("the time for this mail is over".into()),
            Stage::Ready(_) | Stage::Running => {
                Err("the operation was interrupted: its coroutine was resumed by the script".into())
            }
        }
    }
}
