//! System calls for which nix has no safe function, and /proc. The module is the only one with
//! unsafe code. Each function with unsafe code is small, safe to call, and says why its unsafe part
//! is sound.

pub mod activation;
pub mod capability;
pub mod closer;
pub(crate) mod fdpass;
pub mod inherited;
pub mod input;
pub mod limits;
pub mod lookup;
pub(crate) mod memfd;
pub mod net;
pub mod pidfd;
pub mod proc_stat;
pub mod process;
pub mod process_group;
pub mod recorder;
pub mod rights;
pub mod safe_path;
pub mod seccomp;
pub mod signals;
pub mod spawn;
pub mod thread;
pub mod title;
pub mod wait;
pub mod xattr;
