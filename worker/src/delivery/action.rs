//! The decision of a handler as plain data: neither Lua nor I/O.
//!
//! An action belongs to no mail. A script may return one action for many mails, so it is cheap to
//! share.

use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::qmqp::Reply;
use qrelay_shared::texts;

/// The decision about one mail.
#[derive(Debug, Clone)]
pub enum Action {
    /// Relay by QMQP.
    Connect(Arc<Connect>),
    /// Run a program that speaks QMQP on its stdin and stdout.
    Exec(Arc<Exec>),
    /// Run a program that reads the bare message.
    ExecRaw(Arc<Exec>),
    /// Pretend delivery (`K`), with this text instead of `discarded`.
    Discard(Option<Arc<str>>),
    /// Refuse for good (`D`), with this text instead of `rejected`.
    Reject(Option<Arc<str>>),
    /// Refuse for now (`Z`), with this text instead of `deferred`.
    Defer(Option<Arc<str>>),
}

/// Where to relay, and how long to try.
#[derive(Debug)]
pub struct Connect {
    /// Tried in this order until one accepts the connection; never empty.
    pub places: Vec<Place>,
    /// Try them in random order instead.
    pub random: bool,
    /// Replaces the mail's deadline, for all addresses together.
    pub timeout: Option<Duration>,
    /// Per address, instead of the setting.
    pub connect_timeout: Option<Duration>,
}

/// Where a mail may go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// An address.
    Address(NextHop),
    /// A name whose addresses are looked up for each mail.
    Name {
        /// The host's name.
        host: Arc<str>,
        /// The port.
        port: u16,
    },
}

impl From<Endpoint> for Place {
    fn from(endpoint: Endpoint) -> Self {
        Self::Address(endpoint.into())
    }
}

/// An address to which a mail may go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// The address.
    pub endpoint: Endpoint,
    /// The address as text for the log: made once, not for each mail.
    pub name: Arc<str>,
}

impl From<Endpoint> for NextHop {
    fn from(endpoint: Endpoint) -> Self {
        let name = endpoint.to_string().into();
        Self { endpoint, name }
    }
}

/// The program to run.
#[derive(Debug)]
pub struct Exec {
    /// Path of the program (contains a `/`), then its arguments.
    pub arguments: Vec<CString>,
    /// The whole environment, as `NAME=value`.
    pub environment: Vec<CString>,
    /// Replaces the mail's deadline.
    pub timeout: Option<Duration>,
}

/// Returns the answer of [`Action::Discard`].
pub(crate) fn discarded(own: &Option<Arc<str>>) -> Reply {
    Reply::accepted(own.as_deref().unwrap_or(texts::DISCARDED))
}

/// Returns the answer of [`Action::Reject`].
pub(crate) fn rejected(own: &Option<Arc<str>>) -> Reply {
    Reply::permanent(own.as_deref().unwrap_or(texts::REJECTED))
}

/// Returns the answer of [`Action::Defer`].
pub(crate) fn deferred(own: &Option<Arc<str>>) -> Reply {
    Reply::temporary(own.as_deref().unwrap_or(texts::DEFERRED))
}

impl Action {
    /// Returns whether the action hands the mail to nobody.
    pub(crate) fn is_own(&self) -> bool {
        matches!(self, Self::Discard(_) | Self::Reject(_) | Self::Defer(_))
    }

    /// Returns whether the action waits for a next hop at most: not for a program, and not for a
    /// name to be looked up.
    pub(crate) fn is_brief(&self) -> bool {
        match self {
            Self::Connect(connect) => {
                connect.places.iter().all(|place| matches!(place, Place::Address(_)))
            }
            Self::Exec(_) | Self::ExecRaw(_) => false,
            Self::Discard(_) | Self::Reject(_) | Self::Defer(_) => true,
        }
    }

    /// The action's name in the log.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Exec(_) => "exec",
            Self::ExecRaw(_) => "exec_raw",
            Self::Discard(_) => "discard",
            Self::Reject(_) => "reject",
            Self::Defer(_) => "defer",
        }
    }

    /// The time limit that the script gave to this action.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        match self {
            Self::Connect(connect) => connect.timeout,
            Self::Exec(exec) | Self::ExecRaw(exec) => exec.timeout,
            Self::Discard(_) | Self::Reject(_) | Self::Defer(_) => None,
        }
    }
}
