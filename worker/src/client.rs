//! The client: its socket, its process, and the control group of the process.

pub(crate) mod cache;
pub(crate) mod cgroup;
pub(crate) mod process;
pub mod socket;
