//! What the scenarios are written with.
//!
//! [`Site`] is a temporary directory with a config.lua, [`Daemon`] a running qrelay, [`Client`] a
//! QMQP client that can do everything wrong, [`Sink`] a next hop that can too.
//!
//! # Failure
//! Everything panics with what was expected and what was seen: these are tests.

pub mod client;
pub mod daemon;
pub mod mail;
pub mod notify;
pub mod postgres;
pub mod processes;
pub mod record;
pub mod sink;
pub mod target;

pub use client::{Client, Outcome, burst, submit};
pub use daemon::{Daemon, Site, run};
pub use mail::Mail;
pub use record::{Gate, PATIENCE, eventually};
pub use sink::{Reply, Sink};
pub use target::Target;

/// Whether the numbers of the requirements are to be shown, on a machine that does nothing else
/// (`QRELAY_FULL=1`): more mails, tighter limits.
pub fn full() -> bool {
    std::env::var_os("QRELAY_FULL").is_some_and(|value| value == "1")
}
