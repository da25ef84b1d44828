//! How Rust meets Lua: functions, their arguments, conversions, errors.

pub mod arguments;
pub mod convert;
pub mod error;
pub mod function;
pub mod operation;
pub mod strings;
