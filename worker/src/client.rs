//! Who the client is: its process, and the control group of that process.

pub(crate) mod cache;
pub(crate) mod cgroup;
pub(crate) mod process;
pub mod socket;
