//! The threads of a worker.
//!
//! [`pool`] has the threads; `scheduler` decides what they do, and `counts` how many there are.

mod counts;
pub mod pool;
mod scheduler;
