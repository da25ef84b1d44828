//! Zygote and workers of qrelay: Lua decides about mails, threads with blocking I/O carry out
//! what it decided.
//!
//! [`zygote`] is the process that evaluates config.lua and forks; [`process`] is a worker's
//! life; [`serve`], [`queue`] and [`threads`] are its threads; [`session`] is one connection, from
//! [`request`] to [`reply`], with [`relay`] between them; [`lua`] is everything about the script.

#![deny(unsafe_code)]

pub mod action;
pub mod cgroup;
pub mod check;
pub mod children;
pub mod clients;
pub mod connection;
pub mod control;
pub mod deadline;
pub mod dictionary;
pub mod identity;
mod io;
mod logging;
pub mod lua;
pub mod mail;
pub mod memory;
pub mod peer;
pub mod process;
pub mod queue;
pub mod record;
pub mod relay;
pub mod reply;
pub mod report;
pub mod request;
pub mod script;
pub mod serve;
pub mod session;
pub mod threads;
pub mod zygote;
