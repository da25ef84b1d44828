//! The client commands: `qrelay send` and `qrelay sink`.
//!
//! Both are tools for trying things out and for tests, and need no daemon. [`send`] submits
//! mails over QMQP. [`sink`] is a QMQP server that shows or stores the mails it receives.
//!
//! Contract: each command is one function that takes an options struct and returns the exit status
//! of the process. The module [`cli`](crate::cli) reads the command line.
//!
//! # Failure
//! The cause is printed on stderr. The [`Exit`](qrelay_shared::exit::Exit) tells a calling script
//! what to do next.

mod input;
pub mod send;
mod server;
pub mod sink;
mod store;
pub mod stream;
