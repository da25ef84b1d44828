//! Requests to shared dictionaries, and the answers to them.
//!
//! Every channel is made by the supervisor. A worker or zygote gets one at its start, the opener,
//! on which it asks for the others.
//!
//! Limits: keys have up to [`MAX_KEY`] bytes, strings up to [`MAX_VALUE`]. A worker checks both
//! where the script's values are converted, and the supervisor checks them again.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ipc::message::Direction;

/// Longest key in bytes.
pub const MAX_KEY: usize = 256;
/// Longest string value in bytes.
pub const MAX_VALUE: usize = 64 * 1024;
/// Longest name of a dictionary in bytes; a name consists of `a-z`, `0-9` and `_`.
pub const MAX_NAME: usize = 64;
/// Highest number of dictionaries, because a script that makes names up must not fill the memory.
pub const MAX_DICTIONARIES: usize = 256;
/// Highest number of keys that one `keys()` returns. The supervisor also limits their bytes, so
/// that an answer fits a message.
pub const MAX_KEYS: usize = 10_000;

/// Returns whether `name` is a valid name of a dictionary.
pub fn is_name(name: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// A value that can be stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Value<'a> {
    /// A string of any bytes.
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
    /// Returns the same value without borrowed memory.
    pub fn into_owned(self) -> Value<'static> {
        match self {
            Self::String(bytes) => Value::String(Cow::Owned(bytes.into_owned())),
            Self::Integer(number) => Value::Integer(number),
            Self::Float(number) => Value::Float(number),
            Self::Boolean(truth) => Value::Boolean(truth),
        }
    }

    /// Returns the bytes that the value occupies on the heap.
    pub fn heap_size(&self) -> usize {
        match self {
            Self::String(bytes) => bytes.len(),
            _ => 0,
        }
    }
}

/// An operation on a dictionary. Every operation is atomic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Operation<'a> {
    /// Reads the value of a key.
    Get,
    /// Stores a value under a key.
    Set {
        /// The value to store.
        #[serde(borrow)]
        value: Value<'a>,
        /// Time until the key is removed; `None` means never.
        ttl: Option<Duration>,
    },
    /// Stores a value under a key if the key doesn't exist.
    Add {
        /// The value to store.
        #[serde(borrow)]
        value: Value<'a>,
        /// Time until the key is removed; `None` means never.
        ttl: Option<Duration>,
    },
    /// Adds to the number under a key. A missing key starts at 0, and only then `ttl` applies.
    Increment {
        /// The number to add, an integer or a float.
        #[serde(borrow)]
        by: Value<'a>,
        /// Time until the key is removed; `None` means never.
        ttl: Option<Duration>,
    },
    /// Removes a key.
    Delete,
    /// Lists keys of the dictionary. The key of the request is not used.
    Keys {
        /// Highest number of keys to return.
        max: u32,
    },
}

/// A request for one operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request<'a> {
    /// Name of the dictionary.
    pub dictionary: &'a str,
    /// The key to read or change.
    pub key: &'a [u8],
    /// The operation.
    pub operation: Operation<'a>,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer<'a> {
    /// The value of the key, or `None` if the key doesn't exist.
    Value(#[serde(borrow)] Option<Value<'a>>),
    /// Whether a value was stored or removed.
    Changed(bool),
    /// The keys that were asked for.
    Keys(Vec<Cow<'a, [u8]>>),
    /// The operation failed; the text is the message for the script.
    Failed(Cow<'a, str>),
}

/// The wish of a process on its opener, the channel by which it gets channels for its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// One more channel.
    Channel,
}

/// The answer to a [`Wish`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opened<'a> {
    /// The message carries the process' end of a new channel.
    Channel,
    /// There is no channel; the text is the cause, for the script.
    Refused(#[serde(borrow)] Cow<'a, str>),
}

/// Direction from a worker or zygote to the supervisor on the opener.
#[derive(Debug)]
pub enum ToOpener {}
impl Direction for ToOpener {
    type Message<'a> = Wish;
}

/// Direction from the supervisor to a worker or zygote on the opener: one answer for each wish.
#[derive(Debug)]
pub enum FromOpener {}
impl Direction for FromOpener {
    type Message<'a> = Opened<'a>;
}

/// Direction from a worker or zygote to the supervisor.
#[derive(Debug)]
pub enum ToDictionary {}
impl Direction for ToDictionary {
    type Message<'a> = Request<'a>;
}

/// Direction from the supervisor to a worker or zygote: one answer for each request, in the order
/// of the requests.
#[derive(Debug)]
pub enum FromDictionary {}
impl Direction for FromDictionary {
    type Message<'a> = Answer<'a>;
}
