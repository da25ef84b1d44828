//! `os.exit`: ends the process that runs the script, and says so first.
//!
//! Contract: in a worker the log has a line before the process ends, because the worker's death
//! alone doesn't explain itself. While the script loads, the supervisor says it. In a trial the
//! script goes on with an error, and the declaration is refused.
//!
//! # Failure
//! In a trial, every call raises.

use std::sync::Arc;

use mlua::{Function, Lua, MultiValue, Table};
use slog::{Logger, error};

use crate::lua::binding::error::Raise;
use crate::lua::binding::function::internal;
use crate::lua::engine::watch::Watch;
use crate::lua::library::listen::SharedDraft;

/// Replaces the function. In a trial, such as `qrelay check`, it ends nothing.
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
        if watch.is_loading() {
            draft.lock().leave(&place(lua))?;
        } else {
            let id = watch.mail().and_then(|mail| mail.id());
            error!(logger, "os.exit ends this worker, and its clients are told to try again later";
                "id" => id.as_deref(), "place" => place(lua));
            qrelay_shared::log::report_rest(&logger);
        }
        Ok(exit.call(arguments)?)
    })?;
    os.set("exit", wrapped)
}

/// Returns file and line of the call.
fn place(lua: &Lua) -> String {
    let place = lua.inspect_stack(1, |frame| {
        let source = frame.source();
        let file = source.source.as_deref().and_then(|source| source.strip_prefix('@'));
        Some(format!("{}:{}", file?, frame.current_line()?))
    });
    place.flatten().unwrap_or_else(|| "the script".to_owned())
}
