//! The script as the rest of the worker sees it: the seam between I/O and Lua.
//!
//! Contract: a session knows a [`Script`] by this trait alone; `lua` implements the trait.
//!
//! # Failure
//! A handler that yields no action is a [`HandlerError`], and gives its mail back.

use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::message::DatabaseState;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::texts;
use thiserror::Error;

use crate::delivery::action::Action;
use crate::mail::Mail;

/// Why a handler yielded no action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HandlerError {
    /// The handler failed, and the log has the reason already, with a traceback. The mail gets
    /// `Zscript failed`.
    #[error("script failed")]
    Script,
    /// The mail's deadline passed before the handler could begin. The mail gets `Ztry again later`.
    #[error("the deadline passed before the handler began")]
    NotBegun,
    /// The mail's deadline passed while the handler waited in an operation. The mail gets
    /// `Zrelay failed`.
    #[error("the deadline passed before the handler returned")]
    Deadline,
}

impl HandlerError {
    /// Returns the answer to the client.
    pub(crate) fn reply(self) -> Reply {
        Reply::temporary(match self {
            Self::Script => texts::SCRIPT_FAILED,
            Self::NotBegun => texts::TRY_AGAIN,
            Self::Deadline => texts::RELAY_FAILED,
        })
    }
}

/// A mail, and what its handler decided.
pub type Decision = (Box<Mail>, Result<Action, HandlerError>);

/// How far a handler has come.
pub enum Handling {
    /// The handler has decided.
    Decided(Decision),
    /// The handler waits for something. Calling this function waits as well, and runs the rest.
    Waits(Box<dyn FnOnce() -> Decision + Send>),
}

impl Handling {
    /// Returns whether the handler has decided, and its action waits for a next hop at most.
    pub(crate) fn is_brief(&self) -> bool {
        match self {
            Self::Decided((_, Ok(action))) => action.is_brief(),
            Self::Decided((_, Err(_))) | Self::Waits(_) => false,
        }
    }

    /// Returns whether the handler has decided, and nothing has to be waited for.
    pub(crate) fn is_settled(&self) -> bool {
        match self {
            Self::Decided((_, Ok(action))) => action.is_own(),
            Self::Decided((_, Err(_))) => true,
            Self::Waits(_) => false,
        }
    }

    /// Waits, if need be, until the handler has decided.
    pub fn finish(self) -> Decision {
        match self {
            Self::Decided(decision) => decision,
            Self::Waits(rest) => rest(),
        }
    }
}

/// A script, as far as sessions and the control thread need it.
pub trait Script: Send + Sync {
    /// Asks the listener's handler what to do with a mail. Waits for nothing but Lua. The mail
    /// comes back whatever happens.
    fn start(self: Arc<Self>, listener: usize, mail: Box<Mail>, deadline: Deadline) -> Handling;

    /// Returns for how long the running call has held the script, and for which job; zero if no
    /// call runs. Takes no lock.
    fn held(&self) -> (Duration, JobId);

    /// Returns file and line of the handler that the running call belongs to; empty if that isn't
    /// known. Takes no lock.
    fn place(&self) -> &str {
        ""
    }

    /// Returns whether the script's memory limit was hit even after a full garbage collection.
    fn exhausted(&self) -> bool;

    /// Returns the script's memory in bytes when a handler was called last. Takes no lock.
    fn memory(&self) -> u64 {
        0
    }

    /// Describes the script's pools of connections to databases, at most
    /// [`MAX_DATABASES`](qrelay_shared::ipc::message::MAX_DATABASES); `None` if they can't be
    /// looked at without waiting.
    fn databases(&self) -> Option<Vec<DatabaseState>> {
        Some(Vec::new())
    }
}
