//! The libraries that a script sees, each with one `register()`.

pub mod action;
pub mod action_object;
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
pub mod mail_object;
pub mod outgoing_socket;
pub mod output;
pub mod pg;
pub mod settings;
pub mod shared;
pub mod sleep;
pub mod socket;

pub mod sodium;

use std::sync::Arc;

use mlua::Lua;
use slog::Logger;

use crate::lua::engine::output::Output;
use crate::lua::engine::watch::Watch;
use crate::lua::library::listen::SharedDraft;
use crate::lua::library::shared::SharedOpener;

/// What the libraries share with the owner of the Lua state.
pub struct Libraries<'a> {
    /// The clock of the state.
    pub watch: &'a Arc<Watch>,
    /// The script's standard streams.
    pub output: &'a Arc<Output>,
    /// The worker's log.
    pub logger: &'a Logger,
    /// What the script declares.
    pub draft: &'a SharedDraft,
    /// The way to the shared dictionaries.
    pub dictionaries: &'a SharedOpener,
    /// What `pg` keeps beside the state.
    pub pg: &'a Arc<pg::Library>,
}

/// Registers every library: one line for each.
///
/// # Errors
/// Lua is out of memory.
pub fn register(lua: &Lua, with: &Libraries<'_>) -> mlua::Result<()> {
    output::register(lua, with.output)?;
    compat::register(lua)?;
    listen::register(lua, with.draft)?;
    address::register(lua, with.watch)?;
    action_object::register(lua)?;
    cgroup::register(lua)?;
    mail::register(lua)?;
    shared::register(lua, with.dictionaries)?;
    sodium::register(lua)?;
    json::register(lua)?;
    jwt::register(lua)?;
    socket::register(lua, with.watch)?;
    control_client::register(lua, with.watch)?;
    log::register(lua, with.logger, with.watch)?;
    every::register(lua, with.watch)?;
    pg::register(lua, with.watch, with.pg)?;
    sleep::register(lua)
}
