//! Errors at the boundary of Lua.
//!
//! Contract: [`Raise`] goes into a script. Texts are Lua's own: file, line, cause, without the
//! binding's names for kinds of errors.
//!
//! # Failure
//! None: this module defines the failures.

use thiserror::Error;

/// Why a function of qrelay raises an error in the script that called it.
#[derive(Debug)]
pub(crate) enum Raise {
    /// Misuse; the text names the argument and what was expected.
    Text(String),
    /// Lua itself failed (out of memory, an error in a metamethod).
    Lua(mlua::Error),
}

impl From<mlua::Error> for Raise {
    fn from(error: mlua::Error) -> Self {
        Self::Lua(error)
    }
}

impl From<String> for Raise {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Raise {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// [`Raise::Text`] while Lua passes it on. The type distinguishes it from errors of other origin.
#[derive(Debug, Error)]
#[error("{0}")]
struct Misuse(String);

impl From<Raise> for mlua::Error {
    fn from(raise: Raise) -> Self {
        match raise {
            Raise::Text(text) => Self::external(Misuse(text)),
            Raise::Lua(error) => error,
        }
    }
}

/// The text between a message and its traceback.
const TRACEBACK: &str = "\nstack traceback:\n";

/// The name, in a traceback, of qrelay's own code in Lua.
pub(crate) const CHUNK: &str = "[qrelay]";

/// An error's message as Lua would print it, position included, and the traceback if there is one.
pub(crate) fn describe(error: &mlua::Error) -> (String, Option<String>) {
    match error {
        mlua::Error::RuntimeError(text)
        | mlua::Error::MemoryError(text)
        | mlua::Error::GarbageCollectorError(text) => split(text),
        mlua::Error::SyntaxError { message, .. } => split(message),
        mlua::Error::CallbackError { traceback, cause } => {
            let (message, inner) = describe(cause);
            let traceback = traceback.strip_prefix(&TRACEBACK[1..]).unwrap_or(traceback);
            let message = if is_ours(cause) { with_position(&message, traceback) } else { message };
            (message, inner.or_else(|| Some(traceback.to_owned())))
        }
        mlua::Error::WithContext { cause, .. } => describe(cause),
        other => (other.to_string(), None),
    }
}

/// Whether an error comes from Rust and has no position yet.
fn is_ours(error: &mlua::Error) -> bool {
    matches!(
        error,
        mlua::Error::ExternalError(_)
            | mlua::Error::BadArgument { .. }
            | mlua::Error::FromLuaConversionError { .. }
    )
}

fn with_position(message: &str, traceback: &str) -> String {
    match position(traceback) {
        Some(position) => format!("{position}: {message}"),
        None => message.to_owned(),
    }
}

/// File and line of the innermost frame that is the script's.
pub(crate) fn position(traceback: &str) -> Option<&str> {
    traceback.lines().map(str::trim).find_map(|frame| {
        let (position, _) = frame.split_once(": in ")?;
        let (chunk, line) = position.rsplit_once(':')?;
        (chunk != CHUNK && line.parse::<u32>().is_ok()).then_some(position)
    })
}

fn split(text: &str) -> (String, Option<String>) {
    match text.split_once(TRACEBACK) {
        Some((message, traceback)) => (without_string(message), Some(traceback.to_owned())),
        None => (without_string(text), None),
    }
}

/// Removes the string that Lua's parser quotes in a syntax error: a password may be in it.
fn without_string(message: &str) -> String {
    let strings = [" near ''", " near '\"", " near '[[", " near '[="];
    let start = strings.iter().filter_map(|start| message.find(start)).min();
    start.map_or_else(|| message.to_owned(), |start| format!("{} near a string", &message[..start]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syntax_error_quotes_no_string() {
        let lua = mlua::Lua::new();
        for source in [
            "x = 's3cret\ny = 1",
            "x = \"s3cret\n",
            "x = 'a' 's3cret'",
            "f{'a' [[s3cret]]}",
            "f{'a' [==[s3cret]==]}",
            "x = 's3cret\\q'",
        ] {
            let error = lua.load(source).exec().expect_err(source);
            let (message, _) = describe(&error);
            assert!(message.ends_with(" near a string"), "{source}: {message}");
        }
        let error = lua.load("x = [1]").exec().expect_err("a bracket");
        assert!(describe(&error).0.ends_with(" near '['"), "{error}");
    }
}
