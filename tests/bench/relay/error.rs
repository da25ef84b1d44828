//! The reasons why a benchmark run ends without a result.
//!
//! Contract: the whole benchmark has one error enum; `main` prints the error and exits with status
//! 1.
//!
//! # Failure
//! Each variant says what the person who started the benchmark can do about it.

use std::{io, path::PathBuf, process::ExitStatus};

/// An error of the benchmark itself or of a program that it measures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The operating system refused something that the benchmark needs.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
    /// A measured program ended before it had answered a mail.
    #[error("{name} ended with {status} before it answered a mail (its messages: --log FILE)")]
    Ended { name: String, status: ExitStatus },
    /// A measured program runs, but its first mail got no `K` in time.
    #[error("{name} didn't answer K on {socket}: {last}", socket = socket.display())]
    NoAnswer { name: String, socket: PathBuf, last: String },
    /// A C program can't be compiled.
    #[error("cc can't compile {source_file}: {status}", source_file = source_file.display())]
    Compiler { source_file: PathBuf, status: ExitStatus },
    /// The load generator or the sink printed an unexpected line.
    #[error("{role} reported {line:?}")]
    Report { role: &'static str, line: String },
    /// Mails were answered with something other than `K`, which makes every number meaningless.
    #[error("{0} answers were not K")]
    NotAccepted(u64),
    /// qrelay executes more instructions per mail than recorded.
    #[error("{0} counts have grown or aren't recorded: with a reason, record them anew (--write)")]
    Instructions(u32),
    /// Mails got no answer at all.
    #[error("of {mails} mails only {answered} were answered")]
    Unanswered { mails: u64, answered: u64 },
    /// The measured worker ended and another took its place, which would hide growth.
    #[error("the worker ended and was replaced (its reason: --log FILE)")]
    Replaced,
    /// A process holds more than its limit.
    #[error("the {name} has grown: {before} {what} after the first step, {after} at the end")]
    Grew { name: &'static str, what: &'static str, before: u64, after: u64 },
}

/// Adds the attempted action to an I/O error.
pub fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> BenchError {
    let what = what.into();
    move |source| BenchError::System { what, source: source.into() }
}
