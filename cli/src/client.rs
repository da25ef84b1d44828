//! The client commands: `qrelay send` and `qrelay sink`.
//!
//! Both are tools for trying things out and for tests; neither needs a daemon. [`send`] submits
//! one mail over QMQP, [`sink`] is a QMQP server that shows or stores what it gets.
//!
//! Contract: each command is one function that takes an options struct and returns the exit status
//! of the process; reading the command line is somebody else's.
//!
//! # Failure
//! A message on stderr with the cause, and an [`Exit`](qrelay_shared::exit::Exit) that tells a
//! script what to do next.

pub mod send;
pub mod sink;
mod store;
mod stream;
