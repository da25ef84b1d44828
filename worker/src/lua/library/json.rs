//! The library `json`.
//!
//! Contract: a sequence is an array, any other table an object, `{}` an object; integers and floats
//! stay what they are. Tables nest at most [`MAX_DEPTH`] deep in either direction, checked before
//! descending, so that neither a hostile text nor a cycle can exhaust the stack. Metatables are
//! ignored. The keys of an object are written in order, so that equal tables give equal text.
//!
//! # Failure
//! A value that JSON can't express raises an error that names its place. A text that isn't JSON is
//! `nil, message`.

use std::cell::Cell;
use std::ffi::c_void;
use std::fmt;

use mlua::{Lua, MultiValue, Table, Value};
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};

use crate::lua::binding::convert::{self, Argument, Options};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::Class;
use crate::lua::binding::function::function;

/// Deepest nesting of arrays and objects.
pub(crate) const MAX_DEPTH: usize = 128;

/// Longest text that `json.dump` makes: 16 MiB, the default size of a whole mail.
const MAX_TEXT: usize = 16 << 20;

/// Most values in a text that `json.dump` makes: about a second's work. Without the limit a small
/// table that is in many places of a larger one could make any number of values.
const MAX_VALUES: usize = 1 << 20;

/// Longest text of a value that is neither a string nor a table, with the punctuation beside it, in
/// bytes.
const SHORT: usize = 32;

/// The value `json.null`.
#[derive(Debug, Clone, Copy)]
struct Null;

/// The value of `json.null` in a Lua state.
struct NullValue(Value);

fn null(lua: &Lua) -> Value {
    lua.app_data_ref::<NullValue>().map_or(Value::Nil, |null| null.0.clone())
}

fn is_null(value: &Value) -> bool {
    matches!(value, Value::UserData(object) if object.is::<Null>())
}

/// Makes the global `json`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    Class::new(lua, "json.null")?.register::<Null>(|registry| {
        use mlua::UserDataMethods as _;
        registry.add_meta_method("__tostring", |_, _, ()| Ok("null"));
    })?;
    let null = Value::UserData(lua.create_any_userdata(Null)?);
    let json = lua.create_table()?;
    json.raw_set("null", &null)?;
    lua.set_app_data(NullValue(null));
    let dump = function(lua, "json.dump", |lua, value: Value| {
        let text = dump(&value).map_err(|e| e.into_raise("json.dump"))?;
        Ok(lua.create_string(text)?)
    })?;
    json.raw_set("dump", dump)?;
    let parse = function(lua, "json.parse", |lua, (text, options): (Value, Value)| {
        let text = Argument::new("json.parse", 1, "text").text(&text)?;
        let options = Options::new("json.parse", 2, &options, &["null"])?;
        let nulls = match options.get("null")? {
            None => false,
            Some((_, Value::Boolean(nulls))) => nulls,
            Some((argument, other)) => return Err(argument.wrong("a boolean", &other)),
        };
        let results = match parse(lua, &text, nulls)? {
            Ok(value) => [value, Value::Nil],
            Err(message) => [Value::Nil, Value::String(lua.create_string(message)?)],
        };
        let count = if results[1].is_nil() { 1 } else { 2 };
        Ok(MultiValue::from_iter(results.into_iter().take(count)))
    })?;
    json.raw_set("parse", parse)?;
    lua.globals().set("json", json)
}

/// Why a value has no JSON.
pub(super) enum DumpError {
    /// JSON has no such value; the text names the value and its place.
    Value(String),
    /// Lua is out of memory.
    Lua(mlua::Error),
}

impl DumpError {
    /// The error that `function` raises.
    pub(super) fn into_raise(self, function: &str) -> Raise {
        match self {
            Self::Value(text) => format!("{function}: {text}").into(),
            Self::Lua(error) => error.into(),
        }
    }
}

impl From<mlua::Error> for DumpError {
    fn from(error: mlua::Error) -> Self {
        Self::Lua(error)
    }
}

/// Returns a value's JSON, without white space.
///
/// # Errors
/// See [`DumpError`].
pub(super) fn dump(value: &Value) -> Result<Vec<u8>, DumpError> {
    let mut writer = Writer { text: Vec::new(), values: 0, path: Vec::new() };
    writer.value(value)?;
    Ok(writer.text)
}

/// Returns the length of a string in JSON, with its quotes.
fn escaped_length(bytes: &[u8]) -> usize {
    let length = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
        0..0x20 => 6,
        _ => 1,
    };
    2 + bytes.iter().map(length).sum::<usize>()
}

/// A step on the path from the outermost value to the value that is being written.
enum Step {
    Index(usize),
    Key(Vec<u8>),
}

struct Writer {
    text: Vec<u8>,
    values: usize,
    /// The tables around the current value, by identity, with the step into each.
    path: Vec<(*const c_void, Step)>,
}

impl Writer {
    fn value(&mut self, value: &Value) -> Result<(), DumpError> {
        self.values += 1;
        self.reserve(SHORT)?;
        if self.values > MAX_VALUES {
            return Err(self.wrong(&format!("more than {MAX_VALUES} values")));
        }
        match value {
            Value::Nil => self.text.extend_from_slice(b"null"),
            _ if is_null(value) => self.text.extend_from_slice(b"null"),
            Value::Boolean(true) => self.text.extend_from_slice(b"true"),
            Value::Boolean(false) => self.text.extend_from_slice(b"false"),
            Value::Integer(n) => self.text.extend_from_slice(n.to_string().as_bytes()),
            Value::Number(n) if n.is_finite() => self.serialize(n)?,
            Value::Number(_) => return Err(self.wrong("a number that is not finite")),
            Value::String(text) => self.string(&text.as_bytes())?,
            Value::Table(table) => self.table(table)?,
            other => return Err(self.wrong(&convert::describe(other))),
        }
        Ok(())
    }

    /// Checks that there is room for this many bytes, and for the end of every open table.
    fn reserve(&mut self, bytes: usize) -> Result<(), DumpError> {
        if self.text.len() + bytes + self.path.len() <= MAX_TEXT {
            return Ok(());
        }
        Err(self.wrong("the text would be longer than 16 MiB"))
    }

    fn string(&mut self, bytes: &[u8]) -> Result<(), DumpError> {
        match str::from_utf8(bytes) {
            Ok(text) => {
                self.reserve(escaped_length(bytes))?;
                self.serialize(text)
            }
            Err(_) => Err(self.wrong(&format!("{} is not UTF-8", convert::quoted(bytes)))),
        }
    }

    fn serialize<T: serde::Serialize + ?Sized>(&mut self, value: &T) -> Result<(), DumpError> {
        serde_json::to_writer(&mut self.text, value)
            .map_err(|error| DumpError::Value(error.to_string()))
    }

    fn table(&mut self, table: &Table) -> Result<(), DumpError> {
        if self.path.len() >= MAX_DEPTH {
            return Err(self.wrong(&format!("nested deeper than {MAX_DEPTH}")));
        }
        let pointer = table.to_pointer();
        if self.path.iter().any(|(open, _)| *open == pointer) {
            return Err(self.wrong("a table that contains itself"));
        }
        match table.raw_len() {
            0 => self.object(table),
            length => self.array(table, length),
        }
    }

    fn array(&mut self, table: &Table, length: usize) -> Result<(), DumpError> {
        let (mut all, mut within) = (0, 0);
        table.for_each(|key: Value, _: Value| {
            all += 1;
            let index = key.as_integer().and_then(|n| usize::try_from(n).ok());
            within += usize::from(index.is_some_and(|n| (1..=length).contains(&n)));
            Ok(())
        })?;
        if (all, within) != (length, length) {
            return Err(self.wrong("a table that is neither a sequence nor has only string keys"));
        }
        self.path.push((table.to_pointer(), Step::Index(0)));
        for index in 1..=length {
            self.text.push(if index == 1 { b'[' } else { b',' });
            self.step(Step::Index(index));
            self.value(&table.raw_get(index)?)?;
        }
        self.path.pop();
        self.text.push(b']');
        Ok(())
    }

    fn object(&mut self, table: &Table) -> Result<(), DumpError> {
        let mut members = self.members(table)?;
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.path.push((table.to_pointer(), Step::Index(0)));
        self.text.push(b'{');
        for (index, (key, value)) in members.into_iter().enumerate() {
            if index > 0 {
                self.text.push(b',');
            }
            self.step(Step::Key(key.clone()));
            self.string(&key)?;
            self.text.push(b':');
            self.value(&value)?;
        }
        self.path.pop();
        self.text.push(b'}');
        Ok(())
    }

    fn members(&self, table: &Table) -> Result<Vec<(Vec<u8>, Value)>, DumpError> {
        let members = table.pairs::<Value, Value>().map(|pair| match pair? {
            (Value::String(key), value) => Ok((key.as_bytes().to_vec(), value)),
            (key, _) => {
                let key = convert::describe(&key);
                Err(self.wrong(&format!("the key {key}, which is no string")))
            }
        });
        members.collect()
    }

    /// Sets what is written next of the innermost table.
    fn step(&mut self, step: Step) {
        if let Some((_, current)) = self.path.last_mut() {
            *current = step;
        }
    }

    /// Returns the error for a value that can't be written, with its place.
    fn wrong(&self, what: &str) -> DumpError {
        /// Most steps of a path that a message shows.
        const SHOWN: usize = 8;
        let mut text = format!("not JSON: {what}");
        if !self.path.is_empty() {
            text.push_str(", at value");
        }
        for (_, step) in self.path.iter().take(SHOWN) {
            match step {
                Step::Index(index) => text.push_str(&format!("[{index}]")),
                Step::Key(key) => text.push_str(&format!("[{}]", convert::quoted(key))),
            }
        }
        if self.path.len() > SHOWN {
            text.push('…');
        }
        DumpError::Value(text)
    }
}

/// Returns the value of a JSON text, or the reason why the text is no JSON. With `nulls`, null is
/// `json.null`; else null is left out.
///
/// # Errors
/// Lua is out of memory.
pub(super) fn parse(lua: &Lua, text: &[u8], nulls: bool) -> Result<Result<Value, String>, Raise> {
    let failed = Cell::new(None);
    let null = if nulls { null(lua) } else { Value::Nil };
    let reader = Reader { lua, null: &null, depth: 0, failed: &failed };
    let mut source = serde_json::Deserializer::from_slice(text);
    source.disable_recursion_limit();
    let value = reader.deserialize(&mut source).and_then(|value| source.end().map(|()| value));
    match failed.take() {
        Some(error) => Err(Raise::Lua(error)),
        None => Ok(value.map_err(|error| format!("not JSON: {error}"))),
    }
}

/// Builds Lua values while the text is read.
#[derive(Clone, Copy)]
struct Reader<'a> {
    lua: &'a Lua,
    null: &'a Value,
    /// Arrays and objects around the value.
    depth: usize,
    /// Lua's own error, which the parser can't carry.
    failed: &'a Cell<Option<mlua::Error>>,
}

impl Reader<'_> {
    fn inner<E: de::Error>(mut self) -> Result<Self, E> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(self)
    }

    fn lua<T, E: de::Error>(&self, result: mlua::Result<T>) -> Result<T, E> {
        result.map_err(|error| {
            let text = E::custom("Lua failed");
            self.failed.set(Some(error));
            text
        })
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(self.null.clone())
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    /// Integers beyond Lua's become floats, as in Lua's own source code.
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Number(value as f64), Value::Integer))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Number(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.lua(self.lua.create_string(value).map(Value::String))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let table = self.lua(self.lua.create_table())?;
        let mut index = 0;
        while let Some(element) = sequence.next_element_seed(inner)? {
            index += 1;
            if !element.is_nil() {
                self.lua(table.raw_set(index, element))?;
            }
        }
        Ok(Value::Table(table))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let table = self.lua(self.lua.create_table())?;
        while let Some(key) = map.next_key_seed(inner)? {
            let value = map.next_value_seed(inner)?;
            self.lua(table.raw_set(key, value))?;
        }
        Ok(Value::Table(table))
    }
}
