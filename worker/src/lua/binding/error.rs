//! Errors at the boundary of Lua.
//!
//! Contract: [`Raise`] goes into a script. Texts are Lua's own: file, line, cause, without the
//! binding's names for kinds of errors.
//!
//! # Failure
//! None: this module defines the failures.

use std::sync::OnceLock;

use thiserror::Error;

use crate::lua::binding::nearest::nearest;

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

/// The names that a script finds, for messages about a name that is near one of them.
#[derive(Debug)]
pub(crate) struct Names {
    /// Global variables.
    pub globals: Vec<String>,
    /// Functions in the global tables.
    pub fields: Vec<String>,
}

/// The same names in every Lua state.
static NAMES: OnceLock<Names> = OnceLock::new();

/// Keeps the names; only the first call has an effect, because all states have the same names.
pub(crate) fn set_names(names: Names) {
    let _ = NAMES.set(names);
}

/// Adds, to Lua's message about a name that has no value, the nearest name that has one.
fn with_near_name(message: String) -> String {
    let Some(names) = NAMES.get().filter(|_| message.contains(" a nil value (")) else {
        return message;
    };
    for (kind, known) in [
        (" (global '", &names.globals),
        (" (field '", &names.fields),
        (" (method '", &names.fields),
    ] {
        let rest = message.split_once(kind).map(|(_, rest)| rest);
        let Some(name) = rest.and_then(|rest| rest.strip_suffix("')")) else { continue };
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        if let Some(near) = nearest(name, &known).filter(|near| *near != name) {
            return format!("{message}; did you mean '{near}'?");
        }
    }
    message
}

/// Leaves out of a traceback what is qrelay's own: the frames of its code in Lua, and what they
/// called. The outermost of such frames stays, without its position, if it has the name by which
/// the script called it.
fn script_frames(traceback: &str) -> String {
    let frames: Vec<&str> = traceback.lines().map(str::trim).collect();
    let own = |frame: &&str| frame.starts_with(CHUNK);
    let mut shown = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        let (next, before) = (frames.get(index + 1), index.checked_sub(1).map(|i| &frames[i]));
        let is_inner = next.is_some_and(own) && (own(frame) || frame.starts_with("[C]"));
        let is_call = *frame == "(...tail calls...)"
            && before.is_some_and(|before| own(before) || before.starts_with("[C]"));
        let nameless = own(frame) && frame.contains(": in function <");
        if is_inner || is_call || nameless || *frame == "[C]: in ?" {
            continue;
        }
        match frame.split_once(": in ").filter(|_| own(frame)) {
            Some((_, name)) => shown.push(format!("[C]: in {name}")),
            None => shown.push((*frame).to_owned()),
        }
    }
    shown.join("\n")
}

/// An error's message as Lua would print it, position included, and the traceback if there is one.
pub(crate) fn describe(error: &mlua::Error) -> (String, Option<String>) {
    let (message, traceback) = parts(error);
    (with_near_name(message), traceback.map(|frames| script_frames(&frames)))
}

/// Returns the frames of a traceback as Lua writes it, without what is qrelay's own.
pub(crate) fn frames(traceback: &str) -> Option<String> {
    traceback.split_once('\n').map(|(_, frames)| script_frames(frames))
}

/// Returns the frames of a traceback in one line, for a field of a log line.
pub(crate) fn in_one_line(frames: &str) -> String {
    frames.lines().collect::<Vec<_>>().join("; ")
}

/// Returns a text with a traceback at its end, without the frames that are qrelay's own.
pub(crate) fn without_own_frames(text: &str) -> String {
    let (message, head) = match text.strip_prefix(&TRACEBACK[1..]) {
        Some(_) => ("", &TRACEBACK[1..]),
        None => (text.split_once(TRACEBACK).map_or(text, |(message, _)| message), TRACEBACK),
    };
    let Some(traceback) = text[message.len()..].strip_prefix(head) else { return text.to_owned() };
    let frames = script_frames(traceback);
    let frames = frames.lines().map(|frame| format!("\t{frame}"));
    format!("{message}{head}{}", frames.collect::<Vec<_>>().join("\n"))
}

fn parts(error: &mlua::Error) -> (String, Option<String>) {
    match error {
        mlua::Error::RuntimeError(text)
        | mlua::Error::MemoryError(text)
        | mlua::Error::GarbageCollectorError(text) => split(text),
        mlua::Error::SyntaxError { message, .. } => split(message),
        mlua::Error::CallbackError { traceback, cause } => {
            let (message, inner) = parts(cause);
            let traceback = traceback.strip_prefix(&TRACEBACK[1..]).unwrap_or(traceback);
            let message = if is_ours(cause) { with_position(&message, traceback) } else { message };
            (message, inner.or_else(|| Some(traceback.to_owned())))
        }
        mlua::Error::WithContext { cause, .. } => parts(cause),
        other => (other.to_string(), None),
    }
}

/// Returns a message that begins with file and line, if the message or the traceback has them.
/// Lua's own messages usually do: `config.lua:12: …`, or `lua: config.lua:12: …` where a module
/// failed to load.
pub(crate) fn located(message: String, traceback: Option<&str>) -> Result<String, String> {
    let has_position = message.split(": ").next().is_some_and(|position| {
        position.rsplit(':').next().is_some_and(|line| line.parse::<u32>().is_ok())
    });
    if has_position {
        return Ok(message);
    }
    match traceback.and_then(position) {
        Some(position) => Ok(format!("{position}: {message}")),
        None => Err(message),
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
fn position(traceback: &str) -> Option<&str> {
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
    fn a_traceback_has_no_frames_of_qrelay() {
        let traceback = "\t[C]: in function 'error'\n\t[qrelay]:129: in function <[qrelay]:124>\n\
            \t(...tail calls...)\n\tconfig.lua:6: in function <config.lua:4>\n\t[C]: in ?";
        assert_eq!(script_frames(traceback), "config.lua:6: in function <config.lua:4>");
        let traceback = "[C]: in upvalue 'f'\n[qrelay]:31: in field 'connect'\n\
            config.lua:18: in function <config.lua:4>\n(...tail calls...)";
        let shown = "[C]: in field 'connect'\nconfig.lua:18: in function <config.lua:4>\n\
            (...tail calls...)";
        assert_eq!(script_frames(traceback), shown);
    }

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
