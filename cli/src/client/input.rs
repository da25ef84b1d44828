//! Standard input, from which a message is read.
//!
//! Contract: reading fails when the kernel says so. The standard library takes a descriptor that
//! isn't open for reading as an empty file, and a mail without its message would be sent.
//!
//! # Failure
//! Every error is an `io::Error`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

/// Returns standard input as a file.
pub fn stdin() -> io::Result<File> {
    io::stdin().as_fd().try_clone_to_owned().map(File::from)
}
