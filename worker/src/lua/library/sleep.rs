//! The global `sleep`.
//!
//! # Failure
//! Wrong arguments raise.

use std::time::Duration;

use mlua::{Lua, Value};
use qrelay_shared::deadline::Deadline;

use crate::lua::binding::convert::{Argument, MAX_TIMEOUT};
use crate::lua::binding::function::{Call, blocking_function};
use crate::lua::binding::operation::{Completion, Operation};

/// Makes the global.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let sleep = blocking_function(lua, "sleep", |_, seconds: Value| {
        let argument = Argument::new("sleep", 1, "seconds");
        let seconds = argument.number(&seconds, 0.0, MAX_TIMEOUT)?;
        Ok(Call::<()>::Later(Box::new(Sleep(Duration::from_secs_f64(seconds)))))
    })?;
    lua.globals().set("sleep", sleep)
}

#[derive(Debug)]
struct Sleep(Duration);

impl Operation for Sleep {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        let remaining = deadline.remaining();
        std::thread::sleep(self.0.min(remaining));
        if self.0 > remaining { Completion::Expired } else { Completion::values(()) }
    }
}
