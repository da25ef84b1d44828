//! Errors at the boundary of Lua.
//!
//! Contract: [`Raise`] goes into a script, [`ConfigError`] and [`HandlerError`]
//! come out of one. Texts are Lua's own: file, line, cause, without the names
//! that the binding gives to kinds of errors.
//!
//! # Failure
//! None: these are the failures.

use std::path::PathBuf;

use thiserror::Error;

/// Why a function of qrelay raises an error in the script that called it.
#[derive(Debug)]
pub enum Raise {
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

impl Raise {
    /// As an error of the binding, for callbacks that Lua calls directly.
    pub fn into_lua_error(self) -> mlua::Error {
        match self {
            Self::Text(text) => mlua::Error::RuntimeError(text),
            Self::Lua(error) => error,
        }
    }
}

/// Why a configuration can't be used. The administrator can repair each by
/// editing the file, except [`ConfigError::Internal`].
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {}: {}", path.display(), reason(cause))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        cause: std::io::Error,
    },
    /// The script has a syntax error or failed while it ran; file and line are in the text.
    #[error("{0}")]
    Script(String),
    /// The script's `reload` failed.
    #[error("{0} (in function 'reload')")]
    Reload(String),
    /// The script ran, but what it left behind makes no sense.
    #[error("{}: {message}", path.display())]
    Declaration {
        /// The script.
        path: PathBuf,
        /// Which global or setting, and what was expected.
        message: String,
    },
    /// The working directory can't be changed, or Lua can't be set up.
    #[error("{0}")]
    Internal(String),
}

/// Without the number that Rust appends.
fn reason(cause: &std::io::Error) -> String {
    match cause.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_owned(),
        None => cause.to_string(),
    }
}

/// Why a handler yielded no action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HandlerError {
    /// It failed, and the reason is already in the log, with traceback. The mail gets
    /// `Zscript failed`.
    #[error("script failed")]
    Script,
    /// The mail's deadline passed while it waited for Lua or in an operation. The mail gets
    /// `Zrelay failed`.
    #[error("the deadline passed before the handler returned")]
    Deadline,
}

/// What separates a message from its traceback.
const TRACEBACK: &str = "\nstack traceback:\n";

/// An error's message as Lua would print it, and the traceback if there is one.
pub fn describe(error: &mlua::Error) -> (String, Option<String>) {
    match error {
        mlua::Error::RuntimeError(text)
        | mlua::Error::MemoryError(text)
        | mlua::Error::GarbageCollectorError(text) => split(text),
        mlua::Error::SyntaxError { message, .. } => split(message),
        mlua::Error::CallbackError { traceback, cause } => {
            let (message, inner) = describe(cause);
            let outer = traceback.trim_start_matches(TRACEBACK.trim_start());
            (message, inner.or_else(|| Some(outer.to_owned())))
        }
        mlua::Error::WithContext { cause, .. } => describe(cause),
        other => (other.to_string(), None),
    }
}

fn split(text: &str) -> (String, Option<String>) {
    match text.split_once(TRACEBACK) {
        Some((message, traceback)) => (message.to_owned(), Some(traceback.to_owned())),
        None => (text.to_owned(), None),
    }
}
