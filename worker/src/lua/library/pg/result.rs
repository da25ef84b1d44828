//! A result in Lua: rows that are fetched one after the other.
//!
//! Contract: every value is PostgreSQL's text, NULL is nil. A row's memory is freed when it is
//! fetched, so a result that a script keeps costs what it hasn't fetched.
//!
//! # Failure
//! Misuse raises. A value that isn't UTF-8 (a database without an encoding has such) is `nil,
//! message`.

use std::vec::IntoIter;

use mlua::{IntoLua, Lua, Table, Value};
use parking_lot::Mutex;

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{self, Class};
use crate::lua::library::pg::rows::{ResultRow, Rows};

/// A result as userdata.
pub(super) struct ResultObject {
    rows: Mutex<IntoIter<ResultRow>>,
    affected: u64,
}

impl ResultObject {
    /// A result from which nothing has been fetched.
    pub(super) fn new(rows: Rows) -> Self {
        Self { rows: Mutex::new(rows.rows.into_iter()), affected: rows.affected }
    }

    /// Takes the next row; the last one frees the list.
    fn next(&self) -> Option<ResultRow> {
        let mut rows = self.rows.lock();
        let row = rows.next();
        if rows.len() == 0 {
            *rows = Vec::new().into_iter();
        }
        row
    }
}

impl IntoLua for ResultObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

/// How a script finds a row's values.
#[derive(Debug, Clone, Copy)]
enum Keys {
    Names,
    Numbers,
}

/// Makes the class of results.
///
/// # Errors
/// Lua is out of memory.
pub(super) fn register(lua: &Lua) -> mlua::Result<()> {
    let mut class = Class::new(lua, "result")?;
    class.method("fetch", |lua, (this, table, mode): (Value, Value, Value)| {
        let argument = Argument::new("fetch", 1, "table");
        let given = if table.is_nil() { None } else { Some(argument.table(&table)?) };
        let keys = keys("fetch", 2, &mode, Keys::Names)?;
        with(&this, |result| fetch(lua, result, given, keys))
    })?;
    class.method("rows", |lua, (this, mode): (Value, Value)| {
        let keys = keys("rows", 1, &mode, Keys::Names)?;
        with(&this, |_| Ok(()))?;
        let next = function::internal(lua, move |lua, ()| {
            with(&this, |result| fetch(lua, result, None, keys))
        });
        Ok(next?)
    })?;
    class.method("affected", |_, this: Value| with(&this, |result| Ok(result.affected)))?;
    class.register::<ResultObject>(|_| ())
}

fn with<R>(object: &Value, f: impl FnOnce(&ResultObject) -> Result<R, Raise>) -> Result<R, Raise> {
    match object.as_userdata().and_then(|object| object.borrow::<ResultObject>().ok()) {
        Some(result) => f(&result),
        None => {
            let got = convert::describe(object);
            let what = "expected a result, got";
            Err(format!("{what} {got}; call its methods with a colon, as in result:fetch()").into())
        }
    }
}

fn keys(function: &str, position: usize, mode: &Value, default: Keys) -> Result<Keys, Raise> {
    let text = convert::text(mode)?;
    match text.as_deref() {
        None if mode.is_nil() => Ok(default),
        Some(b"a") => Ok(Keys::Names),
        Some(b"n") => Ok(Keys::Numbers),
        _ => Err(Argument::new(function, position, "mode").wrong("'a' or 'n'", mode)),
    }
}

/// The table and nil, or nil at the end, or nil and a message.
fn fetch(
    lua: &Lua,
    result: &ResultObject,
    given: Option<&Table>,
    keys: Keys,
) -> Result<(Option<Table>, Option<String>), Raise> {
    let Some(row) = result.next() else { return Ok((None, None)) };
    let table = match given {
        Some(table) => table.clone(),
        None => lua.create_table()?,
    };
    let set = |index: usize, name: &str, value: Value| match keys {
        Keys::Names => table.raw_set(name, value),
        Keys::Numbers => table.raw_set(index + 1, value),
    };
    match row {
        ResultRow::Text(row) => {
            for (index, column) in row.columns().iter().enumerate() {
                match row.try_get(index) {
                    Ok(value) => set(index, column.name(), value.into_lua(lua)?)?,
                    Err(_) => return Ok((None, Some(format!("{}: not UTF-8", column.name())))),
                }
            }
        }
        ResultRow::Values(values) => {
            for (index, (name, value)) in values.iter().enumerate() {
                let value = value.as_ref().map(|text| lua.create_string(text)).transpose()?;
                set(index, name, value.into_lua(lua)?)?;
            }
        }
    }
    Ok((Some(table), None))
}
