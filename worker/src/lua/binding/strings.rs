//! Lua strings that are needed again and again.
//!
//! Contract: a text that is shared, such as a listener's name, is made into a Lua string once, and
//! found again by where it is in memory: making a string costs five times as much as looking for
//! it. At most [`MAX_KEPT`] are kept.
//!
//! # Failure
//! Lua is out of memory.

use std::sync::Arc;

use mlua::{Lua, LuaString};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

/// Most strings that are kept, with their texts.
const MAX_KEPT: usize = 256;

/// The strings by the addresses of their texts.
#[derive(Default)]
pub(crate) struct Strings(Mutex<FxHashMap<usize, Kept>>);

struct Kept {
    string: LuaString,
    /// Keeps the text alive, so that no other text gets its address.
    _text: Arc<[u8]>,
}

impl Strings {
    /// The string of a shared text.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn get(&self, lua: &Lua, text: &Arc<[u8]>) -> mlua::Result<LuaString> {
        let address = text.as_ptr().addr();
        if let Some(kept) = self.0.lock().get(&address) {
            return Ok(kept.string.clone());
        }
        // Not while the lock is held: this may run a finalizer of the script, which may ask again.
        let string = lua.create_string(text)?;
        let mut kept = self.0.lock();
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(address, Kept { string: string.clone(), _text: Arc::clone(text) });
        Ok(string)
    }
}
