//! PostgreSQL's text form of arrays: `{1,"two, \"three\"",NULL,{4}}` (documentation, 8.15.6).
//!
//! Contract: [`encode`] writes what every server reads; [`decode`] reads what a server writes,
//! bounds such as `[0:1]=` included. A NULL is a hole, and then the table's length is in its `n`.
//!
//! # Failure
//! A value that can't be in an array raises; text that is no array is an [`ArrayError`].

use mlua::{Lua, Table, Value};
use thiserror::Error;

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::library::pg::statement;

/// Most dimensions of an array (`MAXDIM` in PostgreSQL's `utils/array.h`).
const MAX_DIMENSIONS: usize = 6;

/// Why a text is no array.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("malformed array at byte {position}: {reason}")]
pub(super) struct ArrayError {
    /// Counts from 1.
    position: usize,
    reason: &'static str,
}

/// An element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Element {
    /// NULL.
    Null,
    /// Anything but an array.
    Text(Vec<u8>),
    /// An array in an array.
    List(Vec<Element>),
}

/// A Lua list as an array.
///
/// # Errors
/// The list has an element that can't be in an array, or too many dimensions.
pub(super) fn encode(argument: &Argument<'_>, table: &Table) -> Result<Vec<u8>, Raise> {
    let mut text = Vec::new();
    encode_list(argument, table, 1, &mut text)?;
    Ok(text)
}

fn encode_list(
    argument: &Argument<'_>,
    table: &Table,
    depth: usize,
    text: &mut Vec<u8>,
) -> Result<(), Raise> {
    if depth > MAX_DIMENSIONS {
        return Err(argument.invalid(&format!("more than {MAX_DIMENSIONS} dimensions")));
    }
    let length = statement::length(argument, table)?;
    only_elements(argument, table, length)?;
    text.push(b'{');
    for index in 1..=length {
        if index > 1 {
            text.push(b',');
        }
        let value: Value = table.raw_get(index)?;
        match &value {
            Value::Nil => text.extend_from_slice(b"NULL"),
            Value::Table(inner) => encode_list(argument, inner, depth + 1, text)?,
            value => match statement::plain(value)? {
                Some(element) => quote(&element, text),
                None => {
                    let got = convert::describe(value);
                    let what = format!("element {index}: no array can contain {got}");
                    return Err(argument.invalid(&what));
                }
            },
        }
    }
    text.push(b'}');
    Ok(())
}

/// Checks that a table is a list of this length. A list without `n` has no holes.
fn only_elements(argument: &Argument<'_>, table: &Table, length: u64) -> Result<(), Raise> {
    let mut elements = 0;
    let mut counted = false;
    for pair in table.pairs::<Value, Value>() {
        let (key, _) = pair?;
        match &key {
            Value::Integer(index) if (1..=length.cast_signed()).contains(index) => elements += 1,
            Value::String(name) if *name.as_bytes() == *b"n" => counted = true,
            other => {
                let got = convert::describe(other);
                return Err(argument.invalid(&format!(
                    "expected a list, got a table with holes or with the key {got}; \
                     a list with nils needs its length in 'n'"
                )));
            }
        }
    }
    if counted || elements == length {
        return Ok(());
    }
    Err(argument.invalid("expected a list, got a table with holes; its length belongs in 'n'"))
}

/// Writes an element in quotes, which every element may have, and which distinguish the word NULL
/// from a NULL.
fn quote(element: &[u8], text: &mut Vec<u8>) {
    text.push(b'"');
    for &byte in element {
        if byte == b'"' || byte == b'\\' {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text.push(b'"');
}

/// An array's elements.
///
/// # Errors
/// The text is no array.
pub(super) fn decode(text: &[u8]) -> Result<Vec<Element>, ArrayError> {
    let mut reader = Reader { text, position: 0 };
    reader.skip_bounds();
    let list = reader.list(1)?;
    reader.skip_spaces();
    if reader.position == text.len() { Ok(list) } else { Err(reader.error("text after its end")) }
}

struct Reader<'a> {
    text: &'a [u8],
    position: usize,
}

impl Reader<'_> {
    fn error(&self, reason: &'static str) -> ArrayError {
        ArrayError { position: self.position + 1, reason }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.position).copied()
    }

    fn skip_spaces(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.position += 1;
        }
    }

    /// Skips subscripts before the array, which are there when they don't begin at 1:
    /// `[0:1][2:3]={…}`.
    fn skip_bounds(&mut self) {
        self.skip_spaces();
        if self.peek() == Some(b'[')
            && let Some(equals) = memchr::memchr(b'=', self.text)
            && self.text[..equals].iter().all(|b| b.is_ascii_digit() || b"[]:+- ".contains(b))
        {
            self.position = equals + 1;
        }
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Element>, ArrayError> {
        self.skip_spaces();
        if self.peek() != Some(b'{') {
            return Err(self.error("expected '{'"));
        }
        if depth > MAX_DIMENSIONS {
            return Err(self.error("too many dimensions"));
        }
        self.position += 1;
        let mut list = Vec::new();
        self.skip_spaces();
        if self.peek() == Some(b'}') {
            self.position += 1;
            return Ok(list);
        }
        loop {
            list.push(self.element(depth)?);
            self.skip_spaces();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b'}') => break self.position += 1,
                _ => return Err(self.error("expected ',' or '}'")),
            }
        }
        Ok(list)
    }

    fn element(&mut self, depth: usize) -> Result<Element, ArrayError> {
        self.skip_spaces();
        match self.peek() {
            Some(b'{') => self.list(depth + 1).map(Element::List),
            Some(b'"') => self.quoted().map(Element::Text),
            _ => self.bare(),
        }
    }

    fn quoted(&mut self) -> Result<Vec<u8>, ArrayError> {
        let mut value = Vec::new();
        loop {
            self.position += 1;
            match self.peek() {
                None => return Err(self.error("a quote is not closed")),
                Some(b'"') => break self.position += 1,
                Some(b'\\') => {
                    self.position += 1;
                    value.push(self.peek().ok_or_else(|| self.error("a quote is not closed"))?);
                }
                Some(byte) => value.push(byte),
            }
        }
        Ok(value)
    }

    /// Reads an element up to the next delimiter; escaped delimiters and spaces belong to it.
    fn bare(&mut self) -> Result<Element, ArrayError> {
        let (mut value, mut kept, mut escaped) = (Vec::new(), 0, false);
        while let Some(byte) = self.peek().filter(|byte| !b",{}\"".contains(byte)) {
            self.position += 1;
            if byte == b'\\' {
                value.push(self.peek().ok_or_else(|| self.error("it ends with a backslash"))?);
                self.position += 1;
                (kept, escaped) = (value.len(), true);
            } else {
                value.push(byte);
                kept = if byte.is_ascii_whitespace() { kept } else { value.len() };
            }
        }
        value.truncate(kept);
        if value.is_empty() {
            return Err(self.error("an element is missing"));
        }
        let null = !escaped && value.eq_ignore_ascii_case(b"NULL");
        Ok(if null { Element::Null } else { Element::Text(value) })
    }
}

/// A list as a Lua table.
///
/// # Errors
/// Lua is out of memory.
pub(super) fn to_table(lua: &Lua, list: &[Element]) -> mlua::Result<Table> {
    let table = lua.create_table_with_capacity(list.len(), 0)?;
    for (element, index) in list.iter().zip(1..) {
        match element {
            Element::Null => {}
            Element::Text(text) => table.raw_set(index, lua.create_string(text)?)?,
            Element::List(inner) => table.raw_set(index, to_table(lua, inner)?)?,
        }
    }
    if list.contains(&Element::Null) {
        table.raw_set("n", list.len())?;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Element {
        Element::Text(text.as_bytes().to_vec())
    }

    #[test]
    fn what_servers_write() {
        let table: &[(&str, Vec<Element>)] = &[
            ("{}", vec![]),
            ("{a,b}", vec![text("a"), text("b")]),
            (r#"{"a,b","c\"d\\"}"#, vec![text("a,b"), text(r#"c"d\"#)]),
            (r#"{NULL,"NULL",null}"#, vec![Element::Null, text("NULL"), Element::Null]),
            ("{{1},{2}}", vec![Element::List(vec![text("1")]), Element::List(vec![text("2")])]),
            ("[0:1]={7,8}", vec![text("7"), text("8")]),
            (r#" { a b , "" , c\  } "#, vec![text("a b"), text(""), text("c ")]),
            (r"{\NULL}", vec![text("NULL")]),
        ];
        for (array, expected) in table {
            assert_eq!(decode(array.as_bytes()).as_ref(), Ok(expected), "{array}");
        }
    }

    #[test]
    fn what_is_no_array() {
        for array in ["", "a", "{", "{a", "{a,", "{a,}", "{,a}", "{\"a", "{\"a\\", "{a}b", "{a\\"] {
            assert!(decode(array.as_bytes()).is_err(), "{array}");
        }
        assert!(decode(&[b'{'; 100_000]).is_err());
        assert_eq!(
            decode(b"{a}b").map_err(|e| e.to_string()),
            Err("malformed array at byte 4: text after its end".into())
        );
    }
}
