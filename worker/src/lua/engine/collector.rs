//! Lua's garbage collector: its pace, and the limit of memory.
//!
//! # Failure
//! Lua is out of memory.

use mlua::Lua;
use mlua::state::{GcIncParams, GcMode};

/// When the collector begins again, in percent of what it left. An object with a finalizer, as each
/// mail has some, survives the cycle that finds it dead, and counts as left. If a script keeps `s`
/// bytes and all garbage is such objects, each cycle leaves `s (p - 1) / (2 - p)` bytes of them
/// with a pause of `p` times what was left; with `p` = 2, Lua's own value, always more. With 1.4
/// Lua's memory stays below 2.4 `s`.
const GC_PAUSE: i32 = 140;

/// How fast the collector works, where 200 is the rate of allocation: so fast that each cycle is
/// done at once, some 2 ms per MiB that the script keeps. Otherwise it falls behind: when Lua 5.3
/// gives a finalizer to an object that was made where a sweep begins (luaC_checkfinalizer in
/// lgc.c), it frees all dead objects up to the next living one, counts them as memory that may be
/// taken before the collector goes on, and so leaves as many of the next mails'. With a table of
/// 300 KiB and 20 times the rate of allocation a worker grew by 100 bytes per mail.
const GC_STEP_MULTIPLIER: i32 = 1_000_000_000;

/// Part of the memory limit that may be in use after a full collection.
const FULL: f64 = 0.9;

/// Sets the collector's pace and a first memory limit, in bytes.
///
/// # Errors
/// None is known; the binding's type has one.
pub(crate) fn set_up(lua: &Lua, limit: usize) -> mlua::Result<()> {
    let pace = GcIncParams::default().pause(GC_PAUSE).step_multiplier(GC_STEP_MULTIPLIER);
    lua.gc_set_mode(GcMode::Incremental(pace));
    lua.set_memory_limit(limit).map(drop)
}

/// Collects what loading left behind, and sets the memory limit, in bytes.
///
/// # Errors
/// A finalizer of the script fails.
pub(crate) fn limit_memory(lua: &Lua, limit: usize) -> mlua::Result<()> {
    lua.gc_collect()?;
    lua.gc_collect()?;
    lua.set_memory_limit(limit).map(drop)
}

/// Whether Lua's memory is full of what the script keeps; collects garbage if it seems full.
pub(crate) fn is_full(lua: &Lua, limit: usize) -> bool {
    let full = limit as f64 * FULL;
    if lua.used_memory() as f64 <= full {
        return false;
    }
    // The first cycle may have begun before the garbage became garbage.
    let collected = lua.gc_collect().and_then(|()| lua.gc_collect());
    collected.is_err() || lua.used_memory() as f64 > full
}
