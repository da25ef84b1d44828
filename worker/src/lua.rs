//! Lua: config.lua's world.
//!
//! [`state`] is what the room of the processes sees: it loads a script ([`config`]) and runs its
//! handlers. A session sees it through its own trait only, which `script` implements. The rooms
//! below it, each using only those after it: `library` has what a script
//! sees, one file or folder per library, each with one `register()`; `engine` decides who may use
//! Lua, and for how long; `binding` is how Rust functions and values meet Lua's.
//!
//! # Failure
//! Misuse raises a Lua error of type string, with the caller's position, as Lua's own libraries do.
//! An error of Lua leaves this room only as [`config::ConfigError`] or
//! [`crate::session::script::HandlerError`].

pub(crate) mod binding;
pub mod config;
pub(crate) mod engine;
pub(crate) mod library;
mod script;
pub mod state;
