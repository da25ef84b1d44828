//! The libraries that a script sees, each with one `register()`.

pub mod action;
pub mod address;
pub mod cgroup;
pub mod compat;
pub mod control_client;
pub mod dictionary_client;
pub mod every;
pub mod exec;
pub mod json;
pub mod jwt;
pub mod listen;
pub mod log;
pub mod mail;
pub mod output;
pub mod pg;
pub mod settings;
pub mod shared;
pub mod socket;
pub mod socket_connection;
pub mod sodium;
