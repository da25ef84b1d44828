//! `print`, `io.write`, `io.stdout` and `io.stderr`: a script's lines go to the
//! log, with the id of the mail whose handler wrote them.
//!
//! Contract: one record per line. What is written without a line end waits for
//! it, up to `LINE_MAX` bytes, and at the latest until the script has loaded
//! or the handler returns. The log escapes control characters.
//!
//! # Failure
//! None: the log never waits and never fails.

use std::sync::Arc;

use mlua::{Lua, MultiValue, Value};
use parking_lot::Mutex;
use slog::Logger;

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::{self, Raise};
use crate::lua::binding::function::Class;
use crate::lua::engine::watch::Watch;

/// Longest line; what is longer becomes several.
const LINE_MAX: usize = 2048;

/// Where lines go.
pub struct Log {
    logger: Logger,
    watch: Arc<Watch>,
    /// Unfinished lines of stdout and stderr.
    partial: Mutex<[Vec<u8>; 2]>,
}

/// One of the standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

impl Log {
    /// Lines go to this logger.
    pub fn new(logger: Logger, watch: Arc<Watch>) -> Arc<Self> {
        Arc::new(Self { logger, watch, partial: Mutex::default() })
    }

    /// One record; `id` is that of the mail whose handler wrote it.
    fn emit(&self, stream: Stream, text: &[u8], id: Option<&str>) {
        let text = String::from_utf8_lossy(text);
        match (stream, id) {
            (Stream::Stdout, Some(id)) => slog::info!(self.logger, "{}", text; "id" => id),
            (Stream::Stdout, None) => slog::info!(self.logger, "{}", text),
            (Stream::Stderr, Some(id)) => slog::warn!(self.logger, "{}", text; "id" => id),
            (Stream::Stderr, None) => slog::warn!(self.logger, "{}", text),
        }
    }

    fn write(&self, stream: Stream, text: &[u8]) {
        let partial = &mut self.partial.lock()[stream as usize];
        partial.extend_from_slice(text);
        if memchr::memchr(b'\n', text).is_none() && partial.len() <= LINE_MAX {
            return;
        }
        let id = self.watch.mail().and_then(|mail| mail.id());
        while let Some(end) = memchr::memchr(b'\n', partial) {
            self.emit_long(stream, &partial[..end], id.as_deref());
            partial.drain(..=end);
        }
        if partial.len() > LINE_MAX {
            self.emit_long(stream, partial, id.as_deref());
            partial.clear();
        }
    }

    fn emit_long(&self, stream: Stream, line: &[u8], id: Option<&str>) {
        if line.is_empty() {
            return self.emit(stream, line, id);
        }
        line.chunks(LINE_MAX).for_each(|part| self.emit(stream, part, id));
    }

    /// Writes what still waits for its line end, for the mail whose handler is done if there is one.
    pub fn flush(&self, id: Option<&str>) {
        let mut partial = self.partial.lock();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let line = &mut partial[stream as usize];
            if !line.is_empty() {
                self.emit_long(stream, line, id);
                line.clear();
            }
        }
    }
}

/// The stream whose method was called. What else Lua's own streams would ignore is ignored here,
/// and what they would obey can't be.
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

/// What a standard stream can't do, as the C library would say it.
fn refused(reason: &'static str) -> (Value, &'static str) {
    (Value::Nil, reason)
}

fn class(lua: &Lua, log: &Arc<Log>) -> mlua::Result<()> {
    let mut class = Class::new(lua, "stream")?;
    let out = Arc::clone(log);
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
    let out = Arc::clone(log);
    class.method("flush", move |_, mut all: MultiValue| {
        first(&all)?;
        out.flush(out.watch.mail().and_then(|mail| mail.id()).as_deref());
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
pub fn register(lua: &Lua, log: &Arc<Log>) -> mlua::Result<()> {
    class(lua, log)?;
    let lines = Arc::clone(log);
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
