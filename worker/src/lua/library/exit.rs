//! `os.exit`: ends the worker that runs the script, and says so first.
//!
//! Contract: in a worker the log has a line before the process ends, because the worker's death
//! alone doesn't explain itself. While the script loads, and in a trial, the call raises instead.
//! The script can't be used then, even if it catches the error.
//!
//! # Failure
//! While the script loads, and in a trial, every call raises.

use std::sync::Arc;

use mlua::{Function, Lua, MultiValue, Table};
use slog::{Logger, error};

use crate::lua::binding::error::Raise;
use crate::lua::binding::function::internal;
use crate::lua::engine::watch::Watch;
use crate::lua::library::listen::SharedDraft;

/// Replaces the function.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(
    lua: &Lua,
    watch: &Arc<Watch>,
    logger: &Logger,
    draft: &SharedDraft,
) -> mlua::Result<()> {
    let os: Table = lua.globals().get("os")?;
    let exit: Function = os.get("exit")?;
    let (watch, logger, draft) = (Arc::clone(watch), logger.clone(), Arc::clone(draft));
    let wrapped = internal(lua, move |lua, arguments: MultiValue| -> Result<(), Raise> {
        draft.lock().leave(watch.is_loading(), || place(lua))?;
        let id = watch.mail().and_then(|mail| mail.id());
        error!(logger, "os.exit ends this worker, and its clients are told to try again later";
            "id" => id.as_deref(), "place" => place(lua));
        qrelay_shared::log::report_rest(&logger);
        Ok(exit.call(arguments)?)
    })?;
    os.set("exit", wrapped)
}

/// Returns file and line of the innermost function of the script that is running: `pcall`, for
/// instance, has neither.
fn place(lua: &Lua) -> String {
    let place = |level| {
        lua.inspect_stack(level, |frame| {
            let source = frame.source();
            let file = source.source.as_deref().and_then(|source| source.strip_prefix('@'));
            Some(format!("{}:{}", file?, frame.current_line()?))
        })
    };
    let places = (1..).map_while(place);
    places.flatten().next().unwrap_or_else(|| "the script".to_owned())
}
