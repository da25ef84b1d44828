//! Zygote and workers of qrelay: Lua decides about mails, threads with blocking I/O carry out
//! what it decided.
//!
//! [`zygote`] is the process that evaluates config.lua and forks; [`process`] is a worker's
//! life; [`serve`], [`queue`] and [`threads`] are its threads; [`session`] is one connection, from
//! [`request`] to [`reply`], with [`relay`] between them; [`lua`] is everything about the script.

#![deny(unsafe_code)]

pub mod client;
pub mod delivery;
pub mod job_channel;
pub mod lua;
pub mod mail;
pub mod process;
pub mod session;
pub mod threads;
