//! Carrying out an action that passes the mail on: to a next hop or to a program. No Lua here.

pub mod action;
pub(crate) mod children;
pub(crate) mod connect;
pub(crate) mod dial;
mod envelope;
mod exchange;
pub(crate) mod exec;
pub(crate) mod exec_raw;
pub(crate) mod lead;
pub(crate) mod program;
pub(crate) mod resolve;

use std::sync::Arc;

use qrelay_shared::qmqp::Reply;

/// The outcome of an attempt to pass a mail on.
#[derive(Debug)]
pub(crate) struct Delivery {
    /// The reply for the client.
    pub reply: Reply,
    /// The last next hop that was tried.
    pub next_hop: Option<Arc<str>>,
    /// Whether the mail began to go out.
    pub attempted: bool,
    /// Whether the client left before the end; nobody then gets the reply.
    pub canceled: bool,
}
