//! Carrying out what a handler decided, where that means handing the mail to somebody else.
//! No Lua here.

pub mod action;
pub(crate) mod children;
pub(crate) mod connect;
pub(crate) mod dial;
mod envelope;
mod exchange;
pub(crate) mod exec;
pub(crate) mod exec_raw;
pub(crate) mod program;

use std::sync::Arc;

use qrelay_shared::qmqp::Reply;

/// What became of an attempt to hand a mail on.
#[derive(Debug)]
pub(crate) struct Delivery {
    /// For the client.
    pub reply: Reply,
    /// Where the mail went, or was to go: the last that was tried.
    pub next_hop: Option<Arc<str>>,
    /// The mail began to go out.
    pub attempted: bool,
    /// The client left before it was over; the reply is for nobody.
    pub canceled: bool,
}
