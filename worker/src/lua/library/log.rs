//! The library `log`: records with a level and fields.
//!
//! Contract: a script's record goes where the worker's own records go, with the id of the mail
//! whose handler writes it. Fields are written in the order of their names. A record below the
//! log's level costs only the making of its arguments.
//!
//! # Failure
//! Misuse raises; the log itself never waits and never fails.

use std::sync::Arc;

use mlua::{Lua, Value};
use slog::{KV, Level, Logger, Record, Serializer};

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::function;
use crate::lua::engine::watch::Watch;

/// Longest name of a field: journald's limit (systemd.journal-fields(7)) without our prefix is
/// above this.
const MAX_NAME: usize = 48;
/// Most fields of a record.
const MAX_FIELDS: usize = 32;

/// The functions and their levels.
const LEVELS: [(&str, Level); 4] = [
    ("debug", Level::Debug),
    ("info", Level::Info),
    ("warn", Level::Warning),
    ("error", Level::Error),
];

/// Names and values, sorted.
struct Fields(Vec<(String, String)>);

impl KV for Fields {
    /// Emits the last field first, as slog does.
    fn serialize(&self, _: &Record<'_>, serializer: &mut dyn Serializer) -> slog::Result {
        for (name, value) in self.0.iter().rev() {
            serializer.emit_str(name.clone().into(), value)?;
        }
        Ok(())
    }
}

/// Makes the global `log`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, logger: &Logger, watch: &Arc<Watch>) -> mlua::Result<()> {
    let library = lua.create_table()?;
    for (name, level) in LEVELS {
        let logger = logger.clone();
        let watch = Arc::clone(watch);
        let write = function(lua, name, move |_, (text, fields): (Value, Value)| {
            let text = Argument::new(name, 1, "text").text(&text)?;
            let fields = read_fields(&Argument::new(name, 2, "fields"), &fields)?;
            let id = watch.mail().and_then(|mail| mail.id());
            write(&logger, level, &String::from_utf8_lossy(&text), id.as_deref(), fields);
            Ok(())
        })?;
        library.raw_set(name, write)?;
    }
    lua.globals().set("log", library)
}

/// Writes a record. The level must be a constant, hence the arms.
fn write(logger: &Logger, level: Level, text: &str, id: Option<&str>, fields: Fields) {
    match level {
        Level::Debug => slog::debug!(logger, "{}", text; "id" => id, fields),
        Level::Warning => slog::warn!(logger, "{}", text; "id" => id, fields),
        Level::Error => slog::error!(logger, "{}", text; "id" => id, fields),
        _ => slog::info!(logger, "{}", text; "id" => id, fields),
    }
}

fn read_fields(argument: &Argument<'_>, value: &Value) -> Result<Fields, Raise> {
    let mut fields = Vec::new();
    if value.is_nil() {
        return Ok(Fields(fields));
    }
    for pair in argument.table(value)?.pairs::<Value, Value>() {
        let (name, value) = pair?;
        fields.push((field_name(argument, &name)?, field_value(argument, &value)?));
    }
    if fields.len() > MAX_FIELDS {
        let got = fields.len();
        return Err(argument.invalid(&format!("expected at most {MAX_FIELDS}, got {got}")));
    }
    fields.sort();
    Ok(Fields(fields))
}

fn field_name(argument: &Argument<'_>, value: &Value) -> Result<String, Raise> {
    let expected = "names of letters, digits and '_', 1 to 48 bytes, no digit first";
    let Value::String(name) = value else { return Err(argument.wrong(expected, value)) };
    let bytes = name.as_bytes();
    let allowed = bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
        && bytes.first().is_some_and(|b| !b.is_ascii_digit())
        && bytes.len() <= MAX_NAME;
    if allowed { Ok(name.to_string_lossy()) } else { Err(argument.wrong(expected, value)) }
}

fn field_value(argument: &Argument<'_>, value: &Value) -> Result<String, Raise> {
    if let Some(text) = convert::text(value)? {
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    match value {
        Value::Boolean(value) => Ok(value.to_string()),
        // Addresses, a cgroup and the like show themselves.
        Value::UserData(_) => Ok(value.to_string()?),
        other => Err(argument.wrong("strings, numbers or booleans as values", other)),
    }
}
