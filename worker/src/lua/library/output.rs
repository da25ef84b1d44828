//! `print`, `io.write`, `io.stdout` and `io.stderr`: a script's lines go to the log.
//!
//! # Failure
//! Misuse raises; what a standard stream can't do is `nil, message`, as in Lua.

use std::sync::Arc;

use mlua::{Lua, MultiValue, Value};

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::{self, Raise};
use crate::lua::binding::function::Class;
use crate::lua::engine::output::{Output, Stream};

/// Returns the stream whose method was called. Further arguments are ignored, as Lua's own streams
/// ignore most of them.
fn first(arguments: &MultiValue) -> Result<Stream, Raise> {
    stream(arguments.front().unwrap_or(&Value::Nil))
}

fn stream(value: &Value) -> Result<Stream, Raise> {
    if let Value::UserData(object) = value
        && let Ok(stream) = object.borrow::<Stream>()
    {
        return Ok(*stream);
    }
    Err("expected a stream; call its methods with a colon".into())
}

/// Returns the result of a call that a standard stream can't do, in the C library's words.
fn refused(reason: &'static str) -> (Value, &'static str) {
    (Value::Nil, reason)
}

fn class(lua: &Lua, output: &Arc<Output>) -> mlua::Result<()> {
    let mut class = Class::new(lua, "stream")?;
    let out = Arc::clone(output);
    class.method("write", move |_, mut arguments: MultiValue| {
        let this = arguments.pop_front().unwrap_or(Value::Nil);
        let stream = stream(&this)?;
        for (index, value) in arguments.iter().enumerate() {
            let text = convert::text(value)?.ok_or_else(|| {
                Argument::new("write", index + 1, "text").wrong("a string", value)
            })?;
            out.write(stream, &text);
        }
        Ok(this)
    })?;
    let out = Arc::clone(output);
    class.method("flush", move |_, mut all: MultiValue| {
        first(&all)?;
        out.flush_now();
        Ok(all.pop_front())
    })?;
    class.method("setvbuf", |_, all: MultiValue| first(&all).map(|_| true))?;
    class.method("close", |_, all: MultiValue| {
        first(&all).map(|_| refused("cannot close standard file"))
    })?;
    class.method("seek", |_, all: MultiValue| first(&all).map(|_| refused("Illegal seek")))?;
    class
        .method("read", |_, all: MultiValue| first(&all).map(|_| refused("Bad file descriptor")))?;
    class.register::<Stream>(|_| ())
}

/// Replaces `print`, `io.write` and the standard streams.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, output: &Arc<Output>) -> mlua::Result<()> {
    class(lua, output)?;
    let lines = Arc::clone(output);
    let line = lua.create_function(move |_, text: mlua::LuaString| {
        lines.write(Stream::Stdout, &text.as_bytes());
        lines.write(Stream::Stdout, b"\n");
        Ok(())
    })?;
    let is_stream = lua.create_function(|_, value: Value| {
        Ok(matches!(value, Value::UserData(object) if object.is::<Stream>()))
    })?;
    let stdout = lua.create_any_userdata(Stream::Stdout)?;
    let stderr = lua.create_any_userdata(Stream::Stderr)?;
    lua.load(include_str!("output.lua"))
        .set_name(format!("={}", error::CHUNK))
        .call((line, is_stream, stdout, stderr))
}
