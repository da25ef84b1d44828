//! Running config.lua: its text, its directory, its errors.
//!
//! # Failure
//! [`ConfigError`]: file, line and cause, in Lua's words.

use std::path::{Path, PathBuf};

use mlua::{Lua, Value};
use nix::errno::Errno;
use nix::unistd::geteuid;
use qrelay_shared::sys::safe_path::{self, Unsafe};
use qrelay_shared::system_error::shown;
use thiserror::Error;

use crate::lua::binding::convert;
use crate::lua::binding::error;
use crate::lua::binding::function;
use crate::lua::library::listen::SharedDraft;

/// Why a configuration can't be used. The administrator can repair each by editing the file, except
/// [`ConfigError::ForNow`] and [`ConfigError::Internal`].
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {}: {}", path.display(), shown(cause))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        cause: std::io::Error,
    },
    /// qrelay runs as root, and somebody else may change what it would run.
    #[error("{} is not run as root, because {cause}; let only root write it and all directories \
        above it (chown root, chmod go-w), or run qrelay as another user", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// Who may change what.
        cause: Unsafe,
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
        /// The global or setting, and what was expected.
        message: String,
    },
    /// The script failed after something had failed that may pass by itself: a look-up without an
    /// answer, a database that isn't up.
    #[error("{0}")]
    ForNow(Box<ConfigError>),
    /// The working directory can't be changed, or Lua can't be set up.
    #[error("{0}")]
    Internal(String),
}

impl ConfigError {
    /// Returns whether trying again later may help, without a change to the file.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::ForNow(_) => true,
            Self::Unreadable { cause, .. } => {
                let passing = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EIO];
                cause.raw_os_error().is_some_and(|e| passing.contains(&Errno::from_raw(e)))
            }
            _ => false,
        }
    }
}

/// Runs the script in its directory, and then its `reload` if that is asked for.
///
/// # Errors
/// See [`ConfigError`].
pub(crate) fn run(
    lua: &Lua,
    config: &Path,
    reload: bool,
    draft: &SharedDraft,
) -> Result<(), ConfigError> {
    require_safe(config)?;
    let source = std::fs::read(config)
        .map_err(|cause| ConfigError::Unreadable { path: config.to_owned(), cause })?;
    let directory = config.parent().unwrap_or(Path::new("/"));
    std::env::set_current_dir(directory)
        .map_err(|cause| ConfigError::Unreadable { path: directory.to_owned(), cause })?;
    let name = format!("@{}", config.display());
    let failed = |e: mlua::Error| ConfigError::Script(located(lua, &e, config));
    lua.load(without_shebang(&source)).set_name(name).exec().map_err(failed)?;
    if reload {
        draft.lock().enter_reload();
        run_reload(lua).map_err(|e| ConfigError::Reload(located(lua, &e, config)))?;
    }
    Ok(())
}

/// Refuses, as root, a script that others may change: its author could do everything as root.
///
/// # Errors
/// [`ConfigError::Unsafe`], or [`ConfigError::Unreadable`].
pub(crate) fn require_safe(config: &Path) -> Result<(), ConfigError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    match safe_path::check(config) {
        Ok(()) => Ok(()),
        Err(Unsafe::Unknown { cause, .. }) => {
            Err(ConfigError::Unreadable { path: config.to_owned(), cause })
        }
        Err(cause) => Err(ConfigError::Unsafe { path: config.to_owned(), cause }),
    }
}

fn run_reload(lua: &Lua) -> mlua::Result<()> {
    match lua.globals().get("reload")? {
        Value::Nil => Ok(()),
        Value::Function(reload) => reload.call(()),
        other => {
            let got = convert::describe(&other);
            let message = format!("the global reload must be a function, but it is {got}");
            Err(mlua::Error::RuntimeError(message))
        }
    }
}

/// Skips a first line that begins with `#`, which is for the shell, as the program `lua` does. The
/// line end stays, so that lines keep their numbers.
fn without_shebang(source: &[u8]) -> &[u8] {
    let source = source.strip_prefix(b"\xef\xbb\xbf").unwrap_or(source);
    match source.first() {
        Some(b'#') => &source[memchr::memchr(b'\n', source).unwrap_or(source.len())..],
        _ => source,
    }
}

/// The message with file and line; Lua's own usually has them.
fn located(lua: &Lua, error: &mlua::Error, config: &Path) -> String {
    let (message, traceback) = error::describe(error);
    let message = function::with_fields(lua, message);
    error::located(message, traceback.as_deref())
        .unwrap_or_else(|message| format!("{}: {message}", config.display()))
}
