//! The `qrelay` command.
fn main() {}
