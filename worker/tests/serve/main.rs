//! The threads of a worker with a script in Rust. The tests take the part of the supervisor.

mod connections;
mod harness;
mod threads;
