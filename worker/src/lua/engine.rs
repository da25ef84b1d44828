//! The Lua state, who may use it, and for how long.

pub mod background;
pub mod monitor;
pub mod operation;
pub mod scope;
pub mod state;
pub mod watch;
