//! The supervisor of qrelay: the one process that must never die or block.
//!
//! It holds the listening sockets, accepts connections and passes them to
//! workers, which it has forked by a zygote, watches, and replaces. Nothing here
//! knows Lua, and no byte of a mail is looked at.

#![forbid(unsafe_code)]

pub mod accept;
pub mod daemon;
pub mod event;
pub mod generations;
pub mod ids;
pub mod services;
pub mod signals;
pub mod workers;
