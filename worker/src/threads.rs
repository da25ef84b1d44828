//! The threads of a worker, and what they hand each other.

pub mod pool;
pub mod queue;
pub mod scheduler;
