//! The supervisor of qrelay: the one process that must never die or block.
//!
//! The supervisor holds the listening sockets, accepts connections and passes them to workers. The
//! workers are forked by a zygote; the supervisor watches and replaces them. No module here knows
//! Lua or takes a mail apart.
//!
//! Five owners share the work, and each alone changes its state: `accept` (listeners and clients),
//! `workers` (processes, jobs, programs), `generations` (configurations and zygotes), `services`
//! (logs, dictionaries, systemd) and `admin` (administrators' commands). An owner tells the others
//! what has happened by an `event`, and [`daemon`] passes each event on.

#![forbid(unsafe_code)]

mod accept;
mod admin;
mod backoff;
mod connected;
pub mod daemon;
mod descriptors;
mod event;
mod generations;
mod ids;
pub mod services;
mod signals;
mod system;
mod watch;
mod workers;
