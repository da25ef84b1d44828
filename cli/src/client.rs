//! The client commands: `qrelay send`, `qrelay sendmail` and `qrelay sink`.
//!
//! [`sendmail`] submits the mails of programs over QMQP. [`send`] and [`sink`] are tools for trying
//! things out and for tests: [`send`] submits messages as they are, and [`sink`] is a QMQP server
//! that shows or stores the mails it receives.
//!
//! Contract: each command is one function that takes an options struct and returns the exit status
//! of the process. The module [`cli`](crate::cli) reads the command line.
//!
//! # Failure
//! The cause is printed on stderr. The [`Exit`](qrelay_shared::exit::Exit) tells a calling script
//! what to do next.

use std::fmt::Display;
use std::io::{self, Write as _};

use qrelay_shared::system_error::shown;

mod date;
mod input;
pub mod send;
pub mod sendmail;
mod server;
pub mod sink;
mod store;
pub mod stream;

/// Prints a line about a command on stderr. A failure is ignored: whoever reads nothing there has
/// the exit status.
fn say(command: &str, text: &impl Display) {
    let _ = writeln!(io::stderr(), "qrelay {command}: {}", shown(text));
}
