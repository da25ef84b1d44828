//! The binding: how Rust functions and values meet Lua's.
//!
//! [`function`] makes functions and classes, which take [`arguments`], [`convert`] values, raise an
//! [`error`] and wait by an [`operation`]. [`strings`] keeps Lua strings that are needed often.

pub mod arguments;
pub mod convert;
pub mod error;
pub mod function;
pub mod operation;
pub mod strings;
