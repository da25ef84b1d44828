//! The tools with which the scenarios are written.
//!
//! [`Site`] is a temporary directory with a config.lua, [`Daemon`] a running qrelay. [`Client`] is
//! a QMQP client and [`Sink`] a next hop, and both can break every rule of the protocol.
//!
//! # Failure
//! Every function panics with what it expected and what it saw, so that the calling test fails.

pub mod client;
pub mod control_group;
pub mod daemon;
pub mod machine;
pub mod mail;
pub mod network;
pub mod notify;
pub mod pooler;
pub mod postgres;
pub mod processes;
pub mod record;
pub mod sink;
pub mod slow_file;
pub mod target;
pub mod web;

pub use client::{Client, Outcome, burst, submit};
pub use daemon::{Daemon, Site, run};
pub use mail::Mail;
pub use record::{Gate, PATIENCE, eventually};
pub use sink::{Reply, Sink};
pub use target::Target;

/// Returns whether the tests are to show the numbers of the requirements: more mails, tighter
/// limits. `QRELAY_FULL=1` asks for that, on a machine that does nothing else.
pub fn full() -> bool {
    std::env::var_os("QRELAY_FULL").is_some_and(|value| value == "1")
}
