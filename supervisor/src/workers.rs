//! The workers: their processes, which of them gets the next job, and what they leave behind.

pub mod backoff;
pub mod dispatch;
pub mod orphans;
pub mod pool;
pub mod processes;
