//! The operating system where nix has no safe call for it: the only module
//! with unsafe code. Each function is small, safe to call, and says why its
//! unsafe part is sound.

pub mod activation;
pub mod fdpass;
pub mod input;
pub mod net;
pub mod pidfd;
pub mod proc_stat;
pub mod process;
pub mod process_group;
pub mod spawn;
pub mod thread;
pub mod wait;
pub mod xattr;
