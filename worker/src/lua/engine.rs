//! The engine: who may use the Lua state, for how long, and with how much memory.
//!
//! [`monitor`] lets one thread at a time run Lua, [`watch`] is its clock and [`collector`] its
//! garbage collector. [`slot`] holds a mail while its handler runs, [`scope`] what ends with a run,
//! [`output`] what a script prints. [`background`] runs functions without a mail. [`prelude`] is
//! the part in Lua.

pub(crate) mod background;
pub(crate) mod collector;
pub(crate) mod monitor;
pub(crate) mod output;
pub(crate) mod prelude;
pub(crate) mod scope;
pub(crate) mod slot;
pub(crate) mod watch;
