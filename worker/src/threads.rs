//! The threads of a worker.
//!
//! [`pool`] has the threads; `scheduler` decides what they do, and `counts` how many there are.
//! `processors` tells whether more of them could gain anything.

mod counts;
pub mod pool;
mod processors;
mod scheduler;
