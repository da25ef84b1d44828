//! Who the client is: its process, and the control group of that process.

pub mod cache;
pub mod cgroup;
pub mod process;
pub mod socket;
