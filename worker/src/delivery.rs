//! Carrying out what a handler decided, where that means handing the mail to somebody else.
//! No Lua here.

pub mod action;
pub mod children;
pub mod connect;
pub(crate) mod dial;
mod envelope;
mod exchange;
pub mod exec;
pub mod exec_raw;
pub mod program;

use std::sync::Arc;

use qrelay_shared::qmqp::Reply;

/// What became of an attempt to hand a mail on.
#[derive(Debug)]
pub struct Delivery {
    /// For the client.
    pub reply: Reply,
    /// Where the mail went, or was to go: the last that was tried.
    pub next_hop: Option<Arc<str>>,
    /// The mail began to go out.
    pub attempted: bool,
    /// The client left before it was over; the reply is for nobody.
    pub canceled: bool,
}
