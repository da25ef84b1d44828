//! Parameters of statements: Lua values as the literals of an `EXECUTE`.
//!
//! Contract: every parameter is a string literal without a type, which the server reads like
//! libpq's parameters without types; none can end its literal, whatever bytes it has and however
//! the session has set `standard_conforming_strings`. Bytes that are no UTF-8 are written as
//! escapes, so that the server, not the client, says what it thinks of them.
//!
//! # Failure
//! A parameter of a type that has no text raises; one with a NUL can't be sent.

use mlua::{Table, Value};

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;

/// Most parameters of a statement (the protocol's count is 16 bits wide).
pub(super) const MAX_PARAMETERS: u64 = 65_535;

/// A parameter's text, as the server reads it; `None` is NULL.
pub(super) type Parameter = Option<Vec<u8>>;

/// Returns the parameters in a Lua table, or the number of the parameter that has a NUL, which no
/// text in PostgreSQL can have.
///
/// # Errors
/// A parameter has no text.
pub(super) fn parameters(
    argument: &Argument<'_>,
    table: &Table,
) -> Result<Result<Vec<Parameter>, u64>, Raise> {
    let mut parameters = Vec::new();
    for index in 1..=length(argument, table)? {
        let value: Value = table.raw_get(index)?;
        match (&value, plain(&value)?) {
            (Value::Nil, _) => parameters.push(None),
            (_, Some(text)) if memchr::memchr(0, &text).is_some() => return Ok(Err(index)),
            (_, Some(text)) => parameters.push(Some(text)),
            (value, None) => {
                let got = convert::describe(value);
                let hint = if value.is_table() { "; pg:encode_array makes text of it" } else { "" };
                return Err(argument.invalid(&format!("parameter {index} is {got}{hint}")));
            }
        }
    }
    Ok(Ok(parameters))
}

/// Parameters as the literals of an `EXECUTE`, in parentheses unless there are none.
pub(super) fn literals(parameters: &[Parameter]) -> String {
    let mut sql = String::new();
    for (index, parameter) in parameters.iter().enumerate() {
        sql.push(if index == 0 { '(' } else { ',' });
        match parameter {
            Some(text) => push_literal(&mut sql, text),
            None => sql.push_str("NULL"),
        }
    }
    if !parameters.is_empty() {
        sql.push(')');
    }
    sql
}

/// A list's length: its `n` if it has one, as table.pack leaves it.
///
/// # Errors
/// The field `n` is no length.
pub(super) fn length(argument: &Argument<'_>, table: &Table) -> Result<u64, Raise> {
    let n: Value = table.raw_get("n")?;
    let length =
        if n.is_nil() { table.raw_len() as f64 } else { convert::number(&n).unwrap_or(-1.0) };
    if (0.0..=MAX_PARAMETERS as f64).contains(&length) && length.fract() == 0.0 {
        return Ok(length as u64);
    }
    let length = if n.is_nil() { length.to_string() } else { convert::describe(&n) };
    Err(argument.invalid(&format!("expected a length from 0 to {MAX_PARAMETERS}, got {length}")))
}

/// A value's text, with which the server makes the same value; `None` if it has none.
pub(super) fn plain(value: &Value) -> Result<Option<Vec<u8>>, Raise> {
    Ok(match value {
        Value::Boolean(true) => Some(b"1".to_vec()),
        Value::Boolean(false) => Some(b"0".to_vec()),
        Value::Number(n) if n.is_nan() => Some(b"NaN".to_vec()),
        // Lua's own text has 14 digits, too few to be the same number again.
        Value::Number(n) if n.fract() != 0.0 => Some(format!("{n:?}").into_bytes()),
        // Without an exponent it can be a bigint, too.
        Value::Number(n) => Some(format!("{n:.0}").into_bytes()),
        other => convert::text(other)?.map(|text| text.to_vec()),
    })
}

/// Appends a literal, which ends where the value does.
pub(super) fn push_literal(sql: &mut String, value: &[u8]) {
    let text = str::from_utf8(value).ok();
    if let Some(text) = text.filter(|text| !text.contains('\\')) {
        sql.push('\'');
        text.split_inclusive('\'').for_each(|part| {
            sql.push_str(part);
            if part.ends_with('\'') {
                sql.push('\'');
            }
        });
        return sql.push('\'');
    }
    // The space keeps the E from joining what precedes it.
    sql.push_str(" E'");
    match text {
        Some(text) => text.chars().for_each(|c| push_escaped(sql, c)),
        None => value.iter().for_each(|&byte| {
            if byte.is_ascii() {
                push_escaped(sql, char::from(byte));
            } else {
                sql.push_str(&format!("\\x{byte:02x}"));
            }
        }),
    }
    sql.push('\'');
}

fn push_escaped(sql: &mut String, c: char) {
    if c == '\'' || c == '\\' {
        sql.push(c);
    }
    sql.push(c);
}

/// An identifier in quotes.
pub(super) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn literal(value: &[u8]) -> String {
        let mut sql = String::new();
        push_literal(&mut sql, value);
        sql
    }

    #[test]
    fn literals_end_where_the_value_does() {
        assert_eq!(literal(b""), "''");
        assert_eq!(literal(b"42"), "'42'");
        assert_eq!(literal(b"'; DROP TABLE x --"), "'''; DROP TABLE x --'");
        assert_eq!(literal(b"''"), "''''''");
        assert_eq!(literal(b"\\'"), r" E'\\'''");
        assert_eq!(literal("ä\\".as_bytes()), r" E'ä\\'");
        assert_eq!(literal(b"a\xff'"), r" E'a\xff'''");
        assert_eq!(literal(b"$1 -- /* $$"), "'$1 -- /* $$'");
    }

    #[test]
    fn lists_of_literals() {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        assert_eq!(literals(&[]), "");
        assert_eq!(literals(&[text("a")]), "('a')");
        assert_eq!(literals(&[None, text("\\"), text("b")]), r"(NULL, E'\\','b')");
    }

    #[test]
    fn numbers_keep_their_value() {
        let shown = |n: f64| plain(&Value::Number(n)).ok().flatten().map(String::from_utf8);
        for (n, text) in [
            (0.1 + 0.2, "0.30000000000000004"),
            (2.0, "2"),
            (-1e-7, "-1e-7"),
            (2.0_f64.powi(60), "1152921504606846976"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(shown(n), Some(Ok(text.to_owned())));
        }
    }

    #[test]
    fn identifiers_are_quoted() {
        assert_eq!(quote_identifier("a\"b"), "\"a\"\"b\"");
    }
}
