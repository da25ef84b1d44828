//! `os.execute` and `io.popen`: a shell command starts with no signal blocked, and with the limits
//! that qrelay was started with.
//!
//! The C library's functions do the work. A process that they start inherits the signal mask of the
//! calling thread, and threads of qrelay block signals; so the mask is empty during the call. The
//! limits belong to the whole process; so the shell sets them, before the command and on the same
//! line, because messages of the shell contain line numbers.
//!
//! # Failure
//! Arguments of the wrong type raise. Everything else is as in Lua.

use mlua::{Function, Lua, LuaString, MultiValue, Table, Value};
use qrelay_shared::sys::limits::Limits;
use qrelay_shared::sys::thread::SignalsUnblocked;

use crate::lua::binding::convert::Argument;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::internal;

/// Replaces both functions.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let os: Table = lua.globals().get("os")?;
    let execute: Function = os.get("execute")?;
    let wrapped = internal(lua, move |lua, command: Value| {
        // Without a command the question is whether there is a shell.
        let command = match &command {
            Value::Nil => Value::Nil,
            given => Value::String(prepared(lua, "execute", given)?),
        };
        Ok(unblocked(&execute, command)?)
    })?;
    os.set("execute", wrapped)?;

    let io: Table = lua.globals().get("io")?;
    let popen: Function = io.get("popen")?;
    let wrapped = internal(lua, move |lua, (command, mode): (Value, Value)| {
        let command = prepared(lua, "popen", &command)?;
        if !matches!(mode, Value::Nil) {
            let argument = Argument::new("popen", 2, "mode");
            if !matches!(&*argument.text(&mode)?, b"r" | b"w") {
                return Err(argument.wrong("'r' or 'w'", &mode));
            }
        }
        Ok(unblocked(&popen, (command, mode))?)
    })?;
    io.set("popen", wrapped)
}

/// Returns the command with what sets the limits in front of it.
fn prepared(lua: &Lua, name: &'static str, command: &Value) -> Result<LuaString, Raise> {
    let command = Argument::new(name, 1, "command").text(command)?;
    let mut line = Limits::shell_commands().into_bytes();
    line.extend_from_slice(&command);
    Ok(lua.create_string(line)?)
}

/// Calls a function while this thread blocks no signal.
fn unblocked(function: &Function, arguments: impl mlua::IntoLuaMulti) -> mlua::Result<MultiValue> {
    let _unblocked = SignalsUnblocked::new();
    function.call(arguments)
}
