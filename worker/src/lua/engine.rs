//! The Lua state, who may use it, and for how long.

pub mod background;
pub mod monitor;
pub mod scope;
pub mod watch;
