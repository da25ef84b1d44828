//! The part of the engine that is written in Lua, and what it needs of Rust.
//!
//! Contract: `prelude.lua` wraps functions that may have to wait so that they yield their
//! operation, and Lua's own `pcall`, `coroutine.wrap` and their like so that they can't hide the
//! end of a handler's time.
//!
//! # Failure
//! Lua is out of memory.

use std::sync::Arc;
use std::time::Duration;

use mlua::{AnyUserData, Lua, Table, UserDataRef, Value};
use qrelay_shared::deadline::Deadline;

use crate::lua::binding::error;
use crate::lua::binding::function::{self, internal};
use crate::lua::binding::operation::{Completion, Pending};
use crate::lua::engine::watch::Watch;

/// Does an operation where a function can't yield: while the script loads, or below a C function.
/// In a handler Lua stays locked meanwhile, so the time counts as running time and ends with the
/// budget.
fn block(watch: &Watch, pending: &Pending) {
    if let Some(operation) = pending.take() {
        let limit = watch.remaining().min(FOREVER);
        let outcome = operation.run(Deadline::after(limit));
        if let Completion::Passing(_) = outcome {
            watch.note_passing();
        }
        pending.finish(outcome);
    }
}

/// Longest wait while a script loads; the supervisor's `--boot-timeout` ends loading earlier.
const FOREVER: Duration = Duration::from_secs(86_400);

/// Runs `prelude.lua`: wraps coroutines and `pcall`, and gives the binding its wrappers.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn install(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<()> {
    lua.register_userdata_type::<Pending>(|registry| {
        use mlua::UserDataFields as _;
        registry.add_meta_field("__name", "operation");
    })?;
    let exports: Table = lua
        .load(include_str!("prelude.lua"))
        .set_name(format!("={}", error::CHUNK))
        .call((function::mark(), natives(lua, watch)?))?;
    function::set_wrappers(lua, &exports)
}

/// Makes the Rust functions that `prelude.lua` calls.
fn natives(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<Table> {
    let native = lua.create_table()?;
    let clock = Arc::clone(watch);
    let block = lua.create_function(move |_, pending: UserDataRef<Pending>| {
        block(&clock, &pending);
        Ok(())
    })?;
    native.raw_set("block", block)?;
    let results = internal(lua, |lua, pending: AnyUserData| {
        // The borrow must end before the results are made, which may run Lua code.
        let results = pending.borrow::<Pending>()?.results()?;
        results(lua)
    })?;
    native.raw_set("results", results)?;
    let message = lua.create_function(|lua, reason: Value| match reason {
        Value::Error(error) => lua.create_string(error::describe(&error).0).map(Value::String),
        other => Ok(other),
    })?;
    native.raw_set("message", message)?;
    let frames = lua.create_function(|lua, text: mlua::LuaString| {
        lua.create_string(error::without_own_frames(&text.to_string_lossy()))
    })?;
    native.raw_set("frames", frames)?;
    let clock = Arc::clone(watch);
    native.raw_set("stop", lua.create_function(move |lua, ()| clock.stop(lua))?)?;
    native.raw_set("flags", watch.flags(lua)?)?;
    Ok(native)
}
