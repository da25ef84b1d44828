//! Lua values into Rust values, the same way for every library.
//!
//! Contract: a number is accepted where text is expected, a numeric string where a number is. An
//! integral float within ±2^53 is written without `.0`. Tables of options have known keys only.
//!
//! # Failure
//! [`Raise::Text`], which names the argument, the expected type and the value.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use mlua::{BorrowedBytes, Table, Value};

use crate::lua::binding::error::Raise;
use crate::lua::binding::nearest::nearest;

/// The integers that a float holds exactly: up to 2^53.
pub(crate) const EXACT: f64 = 9_007_199_254_740_992.0;

/// Longest time that an action or a wait may be given, in seconds.
pub(crate) const MAX_TIMEOUT: f64 = 3600.0;

/// An argument, attribute or option, as error messages call it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument<'a> {
    /// Of a function or method; the position counts from 1, the object of a method not included.
    Positional {
        /// The function.
        function: &'a str,
        /// The position, from 1.
        position: usize,
        /// The argument's name in the documentation.
        name: &'a str,
    },
    /// A key in a table of options.
    Option {
        /// The function.
        function: &'a str,
        /// The key.
        key: &'a str,
    },
    /// An attribute or global variable that is assigned.
    Variable(&'a str),
}

impl fmt::Display for Argument<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Positional { function, position, name } => {
                write!(f, "bad argument #{position} to '{function}' ({name}")
            }
            Self::Option { function, key } => write!(f, "bad option '{key}' of '{function}' ("),
            Self::Variable(name) => write!(f, "bad value for '{name}' ("),
        }
    }
}

impl<'a> Argument<'a> {
    /// Argument number `position` of `function`.
    pub(crate) fn new(function: &'a str, position: usize, name: &'a str) -> Self {
        Self::Positional { function, position, name }
    }

    /// Returns the error that names what is expected instead of `value`.
    pub(crate) fn wrong(&self, expected: &str, value: &Value) -> Raise {
        self.invalid(&format!("expected {expected}, got {}", describe(value)))
    }

    /// The error with this reason.
    pub(crate) fn invalid(&self, reason: &str) -> Raise {
        let colon = if matches!(self, Self::Positional { .. }) { ": " } else { "" };
        Raise::Text(format!("{self}{colon}{reason})"))
    }

    /// The value as text.
    ///
    /// # Errors
    /// The value is neither a string nor a number.
    pub(crate) fn text<'v>(&self, value: &'v Value) -> Result<Text<'v>, Raise> {
        text(value)?.ok_or_else(|| self.wrong("a string", value))
    }

    /// The value as a finite number from `min` to `max`.
    ///
    /// # Errors
    /// The value is no such number, or out of range.
    pub(crate) fn number(&self, value: &Value, min: f64, max: f64) -> Result<f64, Raise> {
        let expected = || format!("a number from {} to {}", plain(min), plain(max));
        match number(value) {
            Some(n) if n >= min && n <= max => Ok(n),
            Some(n) => Err(self.invalid(&format!("expected {}, got {}", expected(), plain(n)))),
            None => Err(self.wrong(&expected(), value)),
        }
    }

    /// The value as an integer from `min` to `max`; fractions are an error.
    ///
    /// # Errors
    /// The value is no such number, or out of range.
    pub(crate) fn integer(&self, value: &Value, min: u64, max: u64) -> Result<u64, Raise> {
        let n = self.number(value, min as f64, max as f64)?;
        if n.fract() == 0.0 {
            return Ok(n as u64);
        }
        Err(self.invalid(&format!("expected an integer from {min} to {max}, got {}", plain(n))))
    }

    /// The value as a time limit in seconds: more than 0, at most `max`.
    ///
    /// # Errors
    /// The value is no such number, or out of range.
    pub(crate) fn duration(&self, value: &Value, max: f64) -> Result<Duration, Raise> {
        match number(value) {
            Some(n) if n > 0.0 && n <= max => Ok(Duration::from_secs_f64(n).max(SHORTEST)),
            _ => {
                let expected = format!("seconds, more than 0 and at most {}", plain(max));
                Err(self.wrong(&expected, value))
            }
        }
    }

    /// The value as a table.
    ///
    /// # Errors
    /// The value is no table.
    pub(crate) fn table<'v>(&self, value: &'v Value) -> Result<&'v Table, Raise> {
        value.as_table().ok_or_else(|| self.wrong("a table", value))
    }

    /// The value as a list: the table's elements from 1 on.
    ///
    /// # Errors
    /// The value is no table, or has other keys.
    pub(crate) fn list(&self, value: &Value) -> Result<Vec<Value>, Raise> {
        let table = value.as_table().ok_or_else(|| self.wrong("a list", value))?;
        let list = table.sequence_values().collect::<mlua::Result<Vec<Value>>>()?;
        if table.pairs::<Value, Value>().count() == list.len() {
            return Ok(list);
        }
        Err(self.invalid("expected a list, got a table with other keys or holes"))
    }
}

/// The shortest time limit: a limit above 0 never becomes 0 by rounding.
const SHORTEST: Duration = Duration::from_nanos(1);

/// Text that may be borrowed from Lua.
pub(crate) enum Text<'a> {
    /// A Lua string's bytes.
    Lua(BorrowedBytes),
    /// The text of a number or an object.
    Other(Cow<'a, str>),
}

impl std::ops::Deref for Text<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Lua(bytes) => bytes,
            Self::Other(text) => text.as_bytes(),
        }
    }
}

/// A string or a number as text; `None` for other values.
pub(crate) fn text(value: &Value) -> Result<Option<Text<'static>>, Raise> {
    Ok(match value {
        Value::String(string) => Some(Text::Lua(string.as_bytes())),
        Value::Integer(n) => Some(Text::Other(n.to_string().into())),
        Value::Number(n) => Some(Text::Other(float_text(*n).into())),
        _ => None,
    })
}

/// A float as text: what `tostring` makes of it (`%.14g`), but integers without `.0`.
fn float_text(n: f64) -> String {
    if n.fract() == 0.0 && n.abs() <= EXACT {
        return format!("{n:.0}");
    }
    if !n.is_finite() {
        return n.to_string().to_ascii_lowercase();
    }
    // Rounded to 14 digits first, which may change the exponent.
    let scientific = format!("{n:.13e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let without_zeros = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if (-4..14).contains(&exponent) {
        let decimals = usize::try_from(13 - exponent).unwrap_or(0);
        return without_zeros(&format!("{n:.decimals$}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", without_zeros(mantissa), exponent.abs())
}

/// A number, or a string that is one; NaN is none.
pub(crate) fn number(value: &Value) -> Option<f64> {
    let n = match value {
        Value::Integer(n) => *n as f64,
        Value::Number(n) => *n,
        Value::String(string) => parse_number(&string.as_bytes())?,
        _ => return None,
    };
    (!n.is_nan()).then_some(n)
}

/// Decimal numbers as Lua reads them, and hexadecimal integers.
fn parse_number(text: &[u8]) -> Option<f64> {
    let text = str::from_utf8(text).ok()?.trim_ascii();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok().map(|n| n as f64);
    }
    // Rust would also accept words such as "inf".
    let numeric = text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    text.parse().ok().filter(|_| numeric)
}

/// Returns a number as people write it.
fn plain(n: f64) -> String {
    if n.fract() == 0.0 && n.abs() <= EXACT { format!("{n:.0}") } else { n.to_string() }
}

/// Returns the description of a value for an error message: the type, and the value if it is short.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Nil => "nil".into(),
        Value::Boolean(b) => b.to_string(),
        Value::Integer(n) => n.to_string(),
        Value::Number(n) => plain(*n),
        Value::String(text) => quoted(&text.as_bytes()),
        Value::UserData(object) => {
            object.type_name().map_or("userdata".into(), |name| format!("a {}", name.display()))
        }
        other => format!("a {}", other.type_name()),
    }
}

/// Longest part of a foreign string in an error message, in bytes.
const QUOTE_MAX: usize = 80;

/// A string in an error message: printable, in quotes, cut.
pub(crate) fn quoted(text: &[u8]) -> String {
    let shown = qrelay_shared::address::printable(&text[..text.len().min(QUOTE_MAX)]);
    let dots = if text.len() > QUOTE_MAX { "…" } else { "" };
    format!("'{shown}{dots}'")
}

/// Checks that a function of a library was called with a colon, as its name is written.
///
/// # Errors
/// The first argument is no library.
pub(crate) fn library(this: &Value, name: &str) -> Result<(), Raise> {
    match this {
        Value::Table(_) => Ok(()),
        other => {
            Err(format!("call it with a colon, as in {name}(…); got {}", describe(other)).into())
        }
    }
}

/// A table of options, whose keys are all known.
pub(crate) struct Options<'a> {
    function: &'a str,
    table: Option<&'a Table>,
}

impl<'a> Options<'a> {
    /// Checks the keys; nil is a table without any.
    ///
    /// # Errors
    /// It is no table, or a key is unknown.
    pub(crate) fn new(
        function: &'a str,
        position: usize,
        value: &'a Value,
        known: &[&str],
    ) -> Result<Self, Raise> {
        if value.is_nil() {
            return Ok(Self { function, table: None });
        }
        let table = Argument::new(function, position, "options").table(value)?;
        for pair in table.pairs::<Value, Value>() {
            let (key, _) = pair?;
            if !is_one_of(&key, known) {
                return Err(unknown_name(function, "option", &key, known).into());
            }
        }
        Ok(Self { function, table: Some(table) })
    }

    /// The value of a key, if it has one, with its name for error messages.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn get(&self, key: &'a str) -> Result<Option<(Argument<'a>, Value)>, Raise> {
        let Some(table) = self.table else { return Ok(None) };
        let value: Value = table.raw_get(key)?;
        let argument = Argument::Option { function: self.function, key };
        Ok((!value.is_nil()).then_some((argument, value)))
    }
}

fn is_one_of(key: &Value, known: &[&str]) -> bool {
    let Value::String(key) = key else { return false };
    known.iter().any(|known| *known.as_bytes() == *key.as_bytes())
}

/// The error for a name that isn't known to `subject`, with the nearest one that is.
pub(crate) fn unknown_name(subject: &str, what: &str, key: &Value, known: &[&str]) -> String {
    let mut message = format!("{subject} has no {what} {}", describe(key));
    if let Value::String(key) = key
        && let Some(nearest) = nearest(&key.to_string_lossy(), known)
    {
        message.push_str(&format!("; did you mean '{nearest}'?"));
    } else if !known.is_empty() {
        message.push_str(&format!("; there is {}", known.join(", ")));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_text_without_a_fraction_of_zero() {
        let shown = |value: Value| {
            let text = text(&value).ok().flatten();
            text.map(|text| String::from_utf8_lossy(&text).into_owned())
        };
        assert_eq!(shown(Value::Integer(-7)).as_deref(), Some("-7"));
        assert_eq!(shown(Value::Number(42.0)).as_deref(), Some("42"));
        assert_eq!(shown(Value::Number(EXACT)).as_deref(), Some("9007199254740992"));
        assert_eq!(shown(Value::Boolean(true)), None);
    }

    #[test]
    fn floats_are_written_as_lua_does() {
        let table = [
            (0.1 + 0.2, "0.3"),
            (1.0 / 3.0, "0.33333333333333"),
            (-2.5, "-2.5"),
            (1e300, "1e+300"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (123_456_789.125, "123456789.125"),
            (99_999_999_999_999.5, "1e+14"),
            (1e18, "1e+18"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (n, expected) in table {
            assert_eq!(float_text(n), expected, "{n:?}");
        }
    }

    #[test]
    fn numeric_strings_are_numbers() {
        let table = [
            ("5", Some(5.0)),
            (" 0x10 ", Some(16.0)),
            ("1e3", Some(1000.0)),
            ("1.5", Some(1.5)),
            ("inf", None),
            ("nan", None),
            ("", None),
            ("5 s", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_number(text.as_bytes()), expected, "{text:?}");
        }
    }
}
