//! Printing the result of a command.
//!
//! # Failure
//! A text that can't be written makes the exit status [`Exit::System`].

use std::io::{self, Write as _};

use qrelay_shared::exit::Exit;
use qrelay_shared::system_error::shown;

/// Prints a text. A reader that has read enough and is gone is no failure.
pub fn print(text: &str) -> Exit {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("qrelay: standard output: {}", shown(&error));
            Exit::System
        }
        _ => Exit::Success,
    }
}
