//! The binding: how Rust functions and values meet Lua's.
//!
//! [`function`] makes functions and classes, which take [`arguments`], [`convert`] values, raise an
//! [`error`] and wait by an [`operation`]. [`strings`] keeps Lua strings that are needed often, and
//! [`mod@nearest`] finds the name that somebody may have meant.

pub(crate) mod arguments;
pub(crate) mod convert;
pub(crate) mod error;
pub(crate) mod function;
pub(crate) mod nearest;
pub(crate) mod operation;
pub(crate) mod strings;
