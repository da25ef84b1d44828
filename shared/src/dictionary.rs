//! What a shared dictionary is asked, and what it answers.
//!
//! Limits: keys up to [`MAX_KEY`] bytes, strings up to [`MAX_VALUE`]; both are
//! checked where the script's values are converted, and again by the supervisor.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ipc::message::Direction;

/// Bytes of a key.
pub const MAX_KEY: usize = 256;
/// Bytes of a string.
pub const MAX_VALUE: usize = 64 * 1024;
/// Bytes of a dictionary's name, of `a-z`, `0-9` and `_`.
pub const MAX_NAME: usize = 64;
/// Keys that one `keys()` returns at most, and bytes in all, so that an answer fits a message.
pub const MAX_KEYS: usize = 10_000;

/// Whether a dictionary may be called so.
pub fn is_name(name: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// Anything that can be stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Value<'a> {
    /// Any bytes.
    #[serde(borrow)]
    String(Cow<'a, [u8]>),
    /// A Lua integer.
    Integer(i64),
    /// A Lua float.
    Float(f64),
    /// A boolean.
    Boolean(bool),
}

impl Value<'_> {
    /// The same value, borrowing nothing.
    pub fn into_owned(self) -> Value<'static> {
        match self {
            Self::String(bytes) => Value::String(Cow::Owned(bytes.into_owned())),
            Self::Integer(number) => Value::Integer(number),
            Self::Float(number) => Value::Float(number),
            Self::Boolean(truth) => Value::Boolean(truth),
        }
    }

    /// Bytes of memory beyond the value itself.
    pub fn heap_size(&self) -> usize {
        match self {
            Self::String(bytes) => bytes.len(),
            _ => 0,
        }
    }
}

/// One operation on one dictionary; each is atomic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Operation<'a> {
    /// The value of a key.
    Get,
    /// Stores a value, for as long as `ttl` says.
    Set {
        /// What to store.
        #[serde(borrow)]
        value: Value<'a>,
        /// Until it is forgotten.
        ttl: Option<Duration>,
    },
    /// As `Set`, unless the key is there.
    Add {
        /// What to store.
        #[serde(borrow)]
        value: Value<'a>,
        /// Until it is forgotten.
        ttl: Option<Duration>,
    },
    /// Adds to a number; a missing key starts at 0, and only then `ttl` counts.
    Increment {
        /// An integer or a float.
        #[serde(borrow)]
        by: Value<'a>,
        /// Until it is forgotten.
        ttl: Option<Duration>,
    },
    /// Forgets a key.
    Delete,
    /// The keys that are there; the request's own key is not used.
    Keys {
        /// How many at most.
        max: u32,
    },
}

/// A question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request<'a> {
    /// Which dictionary.
    pub dictionary: &'a str,
    /// Which key.
    pub key: &'a [u8],
    /// What to do.
    pub operation: Operation<'a>,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer<'a> {
    /// The key's value, if there is one.
    Value(#[serde(borrow)] Option<Value<'a>>),
    /// Whether it was stored or deleted.
    Changed(bool),
    /// The keys.
    Keys(Vec<Cow<'a, [u8]>>),
    /// It can't be done: the message for the script.
    Failed(Cow<'a, str>),
}

/// Asker → supervisor.
#[derive(Debug)]
pub enum ToDictionary {}
impl Direction for ToDictionary {
    type Message<'a> = Request<'a>;
}

/// Supervisor → asker; one answer for each question, in their order.
#[derive(Debug)]
pub enum FromDictionary {}
impl Direction for FromDictionary {
    type Message<'a> = Answer<'a>;
}
