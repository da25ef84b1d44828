//! The zygote and the workers of qrelay: Lua decides about mails, threads with blocking I/O carry
//! the decisions out.
//!
//! The rooms, each using only the rooms after it: [`process`] is the life of zygote and worker,
//! [`threads`] gives connections to threads, [`lua`] runs config.lua, [`session`] is one connection
//! from its first byte to its end, [`delivery`] carries out an action, [`mail`] is what a mail is,
//! and [`client`] who sent it. [`job_channel`] brings jobs in and takes reports out, and [`flight`]
//! notes what each mail is doing.

#![deny(unsafe_code)]
#![warn(unreachable_pub)]

pub mod client;
mod clock;
pub mod delivery;
pub mod flight;
pub mod job_channel;
pub mod lua;
pub mod mail;
pub mod process;
pub mod session;
pub mod threads;
