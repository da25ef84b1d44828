//! The threads of a worker, driven as the supervisor drives them, with a script in Rust.

mod connections;
mod harness;
mod threads;
