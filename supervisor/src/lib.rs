//! The supervisor of qrelay: the one process that must never die or block.
//!
//! It holds the listening sockets, accepts connections and passes them to
//! workers, which it has forked by a zygote, watches, and replaces. Nothing here
//! knows Lua, and no byte of a mail is looked at.

#![forbid(unsafe_code)]

pub mod backoff;
pub mod cli;
pub mod client;
pub mod connections;
pub mod daemon;
pub mod dictionary_server;
mod dispatch;
pub mod event;
pub mod fairness;
pub mod generation;
pub mod listeners;
mod maillog;
pub mod orphans;
pub mod pond_sender;
pub mod pool;
mod rollout;
pub mod shared_dict;
pub mod signals;
pub mod systemd;
pub mod throttle;
mod workers;
pub mod zygote;
