//! Lua: config.lua's world.
//!
//! [`state`] is what the rest of the worker sees: load a script, run a handler.
//! Beneath it, [`monitor`] decides who may use Lua, [`watch`] how long, and
//! [`operation`] is how a handler waits without holding it; [`background`] runs
//! what isn't a handler, and [`scope`] is what ends with a run. [`function`] and
//! [`convert`] are what every library is made with: [`mail`], [`action`],
//! [`cgroup`], [`address`], [`config`] (what a script declares), [`output`] (`print` and
//! `io`), [`compat`] (names of Lua 5.1), [`sodium`], [`json`], [`jwt`],
//! [`socket`], [`control_client`], [`log`], [`every`] and [`pg`] (PostgreSQL), each with one
//! `register()`.
//!
//! # Failure
//! Misuse raises a Lua error of type string, with the caller's position, as
//! Lua's own libraries do. No error of Lua crosses [`state`] but as one of the
//! enums in [`error`].

pub mod binding;
pub mod engine;
pub mod library;
pub mod state;
