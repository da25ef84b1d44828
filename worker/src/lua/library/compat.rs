//! Names of Lua 5.1 and LuaJIT, for scripts that were written for them: aliases where 5.3 has the
//! thing, hints where it hasn't.
//!
//! # Failure
//! `ffi`, `jit`, `setfenv`, `getfenv`, `module` and `newproxy` raise, with a hint.

use mlua::Lua;

use crate::lua::binding::error::CHUNK;

/// Defines the globals, and `bit` as a module, too.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    lua.load(include_str!("compat.lua")).set_name(format!("={CHUNK}")).exec()
}
