//! What a client is told that no worker serves, and why, for the log. Pure.

use qrelay_shared::qmqp::{Reply, Status};
use qrelay_shared::texts::{ACCESS_DENIED, MALFORMED_INPUT, REQUEST_TIMED_OUT, TRY_AGAIN as AGAIN};

/// An answer without a worker.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) text: &'static str,
    pub(super) cause: &'static str,
}

impl Refusal {
    pub(super) const NOT_ALLOWED: Self = Self::now(ACCESS_DENIED, "address not allowed");
    pub(super) const TOO_MANY: Self = Self::now(AGAIN, "max_connections_per_uid");
    pub(super) const GIVES_WAY: Self = Self::now(AGAIN, "gave way to other clients");
    pub(super) const NO_WORKER: Self = Self::now(AGAIN, "no worker was free in time");
    pub(super) const UNSERVABLE: Self = Self::now(AGAIN, "no worker has this listener");
    pub(super) const STOPPING: Self = Self::now(AGAIN, "qrelay stops");
    pub(super) const SOCKET_LOST: Self = Self::now(AGAIN, "the worker had no descriptor");
    pub(super) const WORKER_DIED: Self = Self::now(AGAIN, "the worker died");
    pub(super) const SILENT: Self = Self::now(REQUEST_TIMED_OUT, "the client said nothing");
    pub(super) const DESCRIPTORS: Self = Self {
        status: Status::Permanent,
        text: MALFORMED_INPUT,
        cause: "the client has passed descriptors",
    };

    const fn now(text: &'static str, cause: &'static str) -> Self {
        Self { status: Status::Temporary, text, cause }
    }

    /// Returns the answer.
    pub(super) fn reply(&self) -> Reply {
        Reply { status: self.status, text: self.text.into() }
    }
}
