//! The libraries that a script sees, each with one `register()`.

pub(crate) mod action;
pub(crate) mod action_object;
pub(crate) mod address;
pub(crate) mod cgroup;
pub(crate) mod compat;
pub(crate) mod control_client;
pub(crate) mod dictionary_client;
pub(crate) mod every;
pub(crate) mod exec;
pub(crate) mod exit;
pub(crate) mod json;
pub(crate) mod jwt;
pub(crate) mod listen;
pub(crate) mod log;
pub(crate) mod mail;
pub(crate) mod mail_object;
pub(crate) mod outgoing_socket;
pub(crate) mod output;
pub(crate) mod pg;
pub(crate) mod settings;
pub(crate) mod shared;
pub(crate) mod shell;
pub(crate) mod sleep;
pub(crate) mod socket;

pub(crate) mod sodium;

use std::sync::Arc;

use mlua::{Lua, Value};
use slog::Logger;

use crate::lua::binding::error::{self, Names};
use crate::lua::engine::output::Output;
use crate::lua::engine::watch::Watch;
use crate::lua::library::listen::SharedDraft;
use crate::lua::library::shared::SharedOpener;

/// The objects that the libraries share with the owner of the Lua state.
pub(crate) struct Libraries<'a> {
    /// The clock of the state.
    pub watch: &'a Arc<Watch>,
    /// The script's standard streams.
    pub output: &'a Arc<Output>,
    /// The worker's log.
    pub logger: &'a Logger,
    /// The script's declarations.
    pub draft: &'a SharedDraft,
    /// The way to the shared dictionaries.
    pub dictionaries: &'a SharedOpener,
    /// The part of `pg` that lives beside the Lua state.
    pub pg: &'a Arc<pg::Library>,
}

/// Registers every library: one line for each.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, with: &Libraries<'_>) -> mlua::Result<()> {
    output::register(lua, with.output)?;
    compat::register(lua)?;
    shell::register(lua)?;
    exit::register(lua, with.watch, with.logger, with.draft)?;
    listen::register(lua, with.draft)?;
    address::register(lua, with.watch)?;
    action_object::register(lua)?;
    cgroup::register(lua)?;
    mail::register(lua)?;
    shared::register(lua, with.dictionaries, with.draft)?;
    sodium::register(lua)?;
    json::register(lua)?;
    jwt::register(lua)?;
    socket::register(lua, with.watch)?;
    control_client::register(lua, with.watch)?;
    log::register(lua, with.logger, with.watch)?;
    every::register(lua, with.watch)?;
    pg::register(lua, with.watch, with.pg)?;
    sleep::register(lua)?;
    error::set_names(names(lua)?);
    Ok(())
}

/// Returns the names of the global variables, and of the functions in global tables.
fn names(lua: &Lua) -> mlua::Result<Names> {
    let mut names = Names { globals: Vec::new(), fields: Vec::new() };
    for pair in lua.globals().pairs::<Value, Value>() {
        let (Value::String(name), value) = pair? else { continue };
        names.globals.push(name.to_string_lossy());
        let Value::Table(table) = value else { continue };
        for pair in table.pairs::<Value, Value>() {
            if let (Value::String(name), Value::Function(_)) = pair? {
                names.fields.push(name.to_string_lossy());
            }
        }
    }
    Ok(names)
}
