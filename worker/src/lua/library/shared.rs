//! The library `shared`: dictionaries that all workers and generations have in common.
//!
//! Contract: every method is one atomic operation, done by the supervisor. Waiting for the answer
//! yields, like a query. A short question goes out before the wait if a channel is idle, so it may
//! take effect although nobody waits for the answer any more. Keys and names are checked here, so
//! that a mistake raises where it was made.
//!
//! # Failure
//! Wrong arguments raise. A failure to store, or to reach the supervisor, is `nil, message`.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use mlua::{IntoLua, Lua, MultiValue, UserDataRef, Value as LuaValue};
use parking_lot::RwLock;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::dictionary::{
    Answer, MAX_KEY, MAX_KEYS, MAX_NAME, MAX_VALUE, Operation as Question, Request, Value, is_name,
};

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{self, Call, Class};
use crate::lua::binding::operation::{Completion, Operation};
use crate::lua::library::dictionary_client::{AskError, Asked, Opener, ask, try_ask};
use crate::lua::library::listen::SharedDraft;

/// Longest life of a key in seconds: about thirty years.
const MAX_TTL: f64 = 1e9;

/// Longest value that is sent while Lua is held, in bytes: a page, copied in 1 µs.
const SHORT: usize = 4096;

/// Default limit of `keys()`.
const DEFAULT_KEYS: u64 = 1000;

/// The way to the supervisor, replaced after a fork.
pub(crate) type SharedOpener = Arc<RwLock<Opener>>;

/// A dictionary as userdata.
struct Dictionary {
    name: Arc<str>,
    opener: SharedOpener,
}

/// Makes the class of dictionaries and the global `shared`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, opener: &SharedOpener, draft: &SharedDraft) -> mlua::Result<()> {
    let mut class = Class::new(lua, "shared dictionary")?;
    class.blocking_method("get", |_, (this, key): (LuaValue, LuaValue)| {
        question(&this, "get", &key, Question::Get)
    })?;
    class.blocking_method("set", |_, (this, key, value, ttl): Stored| {
        let (value, ttl) = (stored("set", &value)?, lifetime("set", 3, &ttl)?);
        question(&this, "set", &key, Question::Set { value, ttl })
    })?;
    class.blocking_method("add", |_, (this, key, value, ttl): Stored| {
        let (value, ttl) = (stored("add", &value)?, lifetime("add", 3, &ttl)?);
        question(&this, "add", &key, Question::Add { value, ttl })
    })?;
    class.blocking_method("incr", |_, (this, key, by, ttl): Stored| {
        let (by, ttl) = (summand(&by)?, lifetime("incr", 3, &ttl)?);
        question(&this, "incr", &key, Question::Increment { by, ttl })
    })?;
    class.blocking_method("delete", |_, (this, key): (LuaValue, LuaValue)| {
        question(&this, "delete", &key, Question::Delete)
    })?;
    class.blocking_method("keys", |_, (this, max): (LuaValue, LuaValue)| {
        let max = match max {
            LuaValue::Nil => DEFAULT_KEYS,
            max => Argument::new("keys", 1, "max").integer(&max, 1, MAX_KEYS as u64)?,
        };
        ask_about(&this, "keys", b"", Question::Keys { max: max as u32 })
    })?;
    class.register::<Dictionary>(|_| {})?;

    let library = lua.create_table()?;
    let (opener, draft) = (Arc::clone(opener), Arc::clone(draft));
    let new =
        function::function(lua, "shared:new", move |lua, (this, name): (LuaValue, LuaValue)| {
            convert::library(&this, "shared:new")?;
            let argument = Argument::new("new", 1, "name");
            let text = argument.text(&name)?;
            let valid = str::from_utf8(&text).ok().filter(|name| is_name(name.as_bytes()));
            let Some(name) = valid else {
                let expected = format!("1 to {MAX_NAME} of a-z, 0-9 and _");
                return Err(argument.wrong(&expected, &name));
            };
            draft.lock().name_dictionary(name);
            let dictionary = Dictionary { name: name.into(), opener: Arc::clone(&opener) };
            Ok(lua.create_any_userdata(dictionary)?)
        })?;
    library.raw_set("new", new)?;
    lua.globals().raw_set("shared", library)
}

type Stored = (LuaValue, LuaValue, LuaValue, LuaValue);

/// A question about one key.
fn question(
    this: &LuaValue,
    method: &str,
    key: &LuaValue,
    question: Question<'static>,
) -> Result<Call<()>, Raise> {
    dictionary(this, method)?;
    let argument = Argument::new(method, 1, "key");
    let text = argument.text(key)?;
    if text.len() > MAX_KEY {
        let length = text.len();
        return Err(argument.invalid(&format!("expected at most {MAX_KEY} bytes, got {length}")));
    }
    ask_about(this, method, &text, question)
}

fn dictionary(this: &LuaValue, method: &str) -> Result<UserDataRef<Dictionary>, Raise> {
    let object = this.as_userdata().and_then(|object| object.borrow::<Dictionary>().ok());
    object.ok_or_else(|| format!("call '{method}' with a colon, as in d:{method}(…)").into())
}

fn ask_about(
    this: &LuaValue,
    method: &str,
    key: &[u8],
    question: Question<'static>,
) -> Result<Call<()>, Raise> {
    let dictionary = dictionary(this, method)?;
    let (name, opener) = (&dictionary.name, &dictionary.opener);
    let asked = is_short(&question)
        .then(|| try_ask(&Request { dictionary: name, key, operation: question.clone() }));
    let pending: Box<dyn Operation> = match asked.flatten() {
        Some(asked) => Box::new(Wait(asked)),
        None => Box::new(Ask {
            name: Arc::clone(name),
            opener: Arc::clone(opener),
            key: key.to_vec(),
            question,
        }),
    };
    Ok(Call::Later(pending))
}

/// Whether sending the question takes so little time that Lua may be held.
fn is_short(question: &Question<'_>) -> bool {
    match question {
        Question::Set { value: Value::String(value), .. }
        | Question::Add { value: Value::String(value), .. } => value.len() <= SHORT,
        _ => true,
    }
}

/// A question that has not been sent.
struct Ask {
    name: Arc<str>,
    opener: SharedOpener,
    key: Vec<u8>,
    question: Question<'static>,
}

impl Operation for Ask {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        if deadline.expired() {
            return Completion::Expired;
        }
        let Self { name, opener, key, question } = *self;
        let request = Request { dictionary: &name, key: &key, operation: question };
        let asked = ask(&opener.read(), &request, deadline);
        told(asked.and_then(|asked| asked.answer(deadline, outcome)))
    }
}

/// A question that has been sent.
struct Wait(Asked);

impl Operation for Wait {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        told(self.0.answer(deadline, outcome))
    }
}

fn told(answer: Result<Completion, AskError>) -> Completion {
    answer.unwrap_or_else(|error| match error {
        AskError::Expired => Completion::Expired,
        error => Completion::failure(error.to_string()),
    })
}

/// Returns the results of a method.
fn outcome(answer: Answer<'_>) -> Completion {
    match answer {
        Answer::Value(value) => {
            let value = value.map(Value::into_owned);
            Completion::Done(Box::new(move |lua| {
                Ok(MultiValue::from_iter([lua_value(lua, value)?]))
            }))
        }
        Answer::Changed(changed) => Completion::values(changed),
        Answer::Keys(keys) => {
            let keys: Vec<Vec<u8>> = keys.into_iter().map(Cow::into_owned).collect();
            Completion::Done(Box::new(move |lua| {
                let keys = keys.iter().map(|key| lua.create_string(key));
                let list = lua.create_sequence_from(keys.collect::<mlua::Result<Vec<_>>>()?)?;
                Ok(MultiValue::from_iter([LuaValue::Table(list)]))
            }))
        }
        Answer::Failed(message) => Completion::failure(message.into_owned()),
    }
}

fn lua_value(lua: &Lua, value: Option<Value<'static>>) -> mlua::Result<LuaValue> {
    match value {
        None => Ok(LuaValue::Nil),
        Some(Value::String(bytes)) => lua.create_string(&bytes).map(LuaValue::String),
        Some(Value::Integer(number)) => number.into_lua(lua),
        Some(Value::Float(number)) => Ok(LuaValue::Number(number)),
        Some(Value::Boolean(truth)) => Ok(LuaValue::Boolean(truth)),
    }
}

fn stored(method: &str, value: &LuaValue) -> Result<Value<'static>, Raise> {
    let argument = Argument::new(method, 2, "value");
    match value {
        LuaValue::String(text) if text.as_bytes().len() > MAX_VALUE => {
            let length = text.as_bytes().len();
            Err(argument.invalid(&format!("expected at most {MAX_VALUE} bytes, got {length}")))
        }
        LuaValue::String(text) => Ok(Value::String(Cow::Owned(text.as_bytes().to_vec()))),
        LuaValue::Integer(number) => Ok(Value::Integer(*number)),
        LuaValue::Number(number) => Ok(Value::Float(*number)),
        LuaValue::Boolean(truth) => Ok(Value::Boolean(*truth)),
        other => Err(argument.wrong("a string, a number or a boolean", other)),
    }
}

/// Returns the amount that `incr` adds, 1 by default.
fn summand(value: &LuaValue) -> Result<Value<'static>, Raise> {
    match value {
        LuaValue::Nil => Ok(Value::Integer(1)),
        LuaValue::Integer(number) => Ok(Value::Integer(*number)),
        LuaValue::Number(number) => Ok(Value::Float(*number)),
        other => match convert::number(other) {
            Some(n) if n.fract() == 0.0 && n.abs() < convert::EXACT => Ok(Value::Integer(n as i64)),
            Some(n) => Ok(Value::Float(n)),
            None => Err(Argument::new("incr", 2, "by").wrong("a number", other)),
        },
    }
}

fn lifetime(method: &str, position: usize, ttl: &LuaValue) -> Result<Option<Duration>, Raise> {
    match ttl {
        LuaValue::Nil => Ok(None),
        ttl => Argument::new(method, position, "ttl").duration(ttl, MAX_TTL).map(Some),
    }
}
