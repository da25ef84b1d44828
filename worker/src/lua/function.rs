//! How Rust functions and objects become Lua's.
//!
//! Contract: a function made here raises misuse as a Lua string with the
//! caller's position, like Lua's own libraries: it returns a mark and the
//! message to a wrapper written in Lua (`prelude.lua`), which calls `error`. A
//! function that may have to wait returns another mark and an operation, and
//! the wrapper yields it. Both cost one short Lua call.
//!
//! # Failure
//! [`Raise`] of the wrapped function. Making functions fails only when Lua's
//! memory is exhausted.

use std::sync::Arc;

use mlua::{
    AnyUserData, FromLuaMulti, Function, IntoLuaMulti, LightUserData, Lua, MultiValue, Table,
    UserDataRegistry, Value,
};

use super::convert;
use super::error::Raise;
use super::operation::{Operation, Pending};
use super::watch::Watch;
use crate::deadline::Deadline;

/// Addresses of these are the marks; a script can't make light userdata.
static RAISE: u8 = b'R';
static WAIT: u8 = b'W';

fn mark(of: &'static u8) -> LightUserData {
    LightUserData(std::ptr::from_ref(of).cast_mut().cast())
}

/// The wrappers of `prelude.lua`, kept as application data of the Lua state.
struct Prelude {
    checked: Function,
    awaiting: Function,
    class: Function,
}

/// What a wrapped function returns to its wrapper.
enum Reply<R> {
    Values(R),
    Raise(String),
    Wait(Box<dyn Operation>),
}

impl<R: IntoLuaMulti> IntoLuaMulti for Reply<R> {
    fn into_lua_multi(self, lua: &Lua) -> mlua::Result<MultiValue> {
        match self {
            Self::Values(values) => values.into_lua_multi(lua),
            Self::Raise(message) => (mark(&RAISE), message).into_lua_multi(lua),
            Self::Wait(operation) => {
                let pending = lua.create_any_userdata(Pending::new(operation))?;
                (mark(&WAIT), pending).into_lua_multi(lua)
            }
        }
    }
}

impl<R> Reply<R> {
    fn from_result(result: Result<R, Raise>) -> mlua::Result<Self> {
        match result {
            Ok(values) => Ok(Self::Values(values)),
            Err(Raise::Text(message)) => Ok(Self::Raise(message)),
            Err(Raise::Lua(error)) => Err(error),
        }
    }
}

/// What a function that may have to wait does.
pub enum Call<R> {
    /// It needn't.
    Now(R),
    /// The operation's results are the function's.
    Later(Box<dyn Operation>),
}

/// A function whose wrapper is not made yet, or that is never called but through `prelude.class`.
fn raw<A, R>(
    lua: &Lua,
    f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: FromLuaMulti,
    R: IntoLuaMulti,
{
    lua.create_function(move |lua, arguments| Reply::from_result(f(lua, arguments)))
}

fn prelude(lua: &Lua) -> mlua::Result<mlua::AppDataRef<'_, Prelude>> {
    lua.app_data_ref::<Prelude>()
        .ok_or_else(|| mlua::Error::RuntimeError("the prelude is not installed".into()))
}

/// A function that never waits.
///
/// # Errors
/// Lua is out of memory.
pub fn function<A, R>(
    lua: &Lua,
    f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: FromLuaMulti,
    R: IntoLuaMulti,
{
    let raw = raw(lua, f)?;
    let checked = prelude(lua)?.checked.clone();
    checked.call(raw)
}

/// A function that may have to wait; the wait yields to whoever runs the handler.
///
/// # Errors
/// Lua is out of memory.
pub fn blocking<A, R>(
    lua: &Lua,
    f: impl Fn(&Lua, A) -> Result<Call<R>, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: FromLuaMulti,
    R: IntoLuaMulti,
{
    let raw = lua.create_function(move |lua, arguments| match f(lua, arguments) {
        Ok(Call::Now(values)) => Ok(Reply::Values(values)),
        Ok(Call::Later(operation)) => Ok(Reply::Wait(operation)),
        Err(error) => Reply::from_result(Err(error)),
    })?;
    let awaiting = prelude(lua)?.awaiting.clone();
    awaiting.call(raw)
}

/// The methods and attributes of a kind of object, while they are collected.
pub struct Class<'a> {
    lua: &'a Lua,
    name: &'static str,
    methods: Table,
    getters: Table,
    setters: Table,
    readable: Vec<&'static str>,
    writable: Vec<&'static str>,
}

impl<'a> Class<'a> {
    /// A kind of object that `tostring` and error messages call by this name.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub fn new(lua: &'a Lua, name: &'static str) -> mlua::Result<Self> {
        Ok(Self {
            lua,
            name,
            methods: lua.create_table()?,
            getters: lua.create_table()?,
            setters: lua.create_table()?,
            readable: Vec::new(),
            writable: Vec::new(),
        })
    }

    /// Adds a method that never waits; its first argument is the object.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub fn method<A, R>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
    ) -> mlua::Result<()>
    where
        A: FromLuaMulti,
        R: IntoLuaMulti,
    {
        self.readable.push(name);
        self.methods.raw_set(name, function(self.lua, f)?)
    }

    /// Adds a method that may have to wait.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub fn blocking_method<A, R>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, A) -> Result<Call<R>, Raise> + Send + 'static,
    ) -> mlua::Result<()>
    where
        A: FromLuaMulti,
        R: IntoLuaMulti,
    {
        self.readable.push(name);
        self.methods.raw_set(name, blocking(self.lua, f)?)
    }

    /// Adds a readable attribute.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub fn getter<R: IntoLuaMulti>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, Value) -> Result<R, Raise> + Send + 'static,
    ) -> mlua::Result<()> {
        self.readable.push(name);
        self.getters.raw_set(name, raw(self.lua, f)?)
    }

    /// Makes an attribute writable.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub fn setter(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, (Value, Value)) -> Result<(), Raise> + Send + 'static,
    ) -> mlua::Result<()> {
        self.writable.push(name);
        self.setters.raw_set(name, raw(self.lua, f)?)
    }

    /// Makes it the class of all userdata of type `T`; `more` may add metamethods.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub fn register<T: 'static>(
        self,
        more: impl FnOnce(&mut UserDataRegistry<T>),
    ) -> mlua::Result<()> {
        use mlua::UserDataFields as _;
        let Self { lua, name, methods, getters, setters, readable, writable } = self;
        let unknown = raw(lua, move |_, (key, writing): (Value, bool)| -> Result<(), Raise> {
            let known = if writing { &writable } else { &readable };
            let what = if writing { "writable attribute" } else { "attribute or method" };
            Err(convert::unknown_name(name, what, &key, known).into())
        })?;
        let class = prelude(lua)?.class.clone();
        let (index, newindex): (Function, Function) =
            class.call((methods, getters, setters, unknown))?;
        lua.register_userdata_type::<T>(move |registry| {
            registry.add_meta_field("__name", name);
            registry.add_meta_field("__index", index);
            registry.add_meta_field("__newindex", newindex);
            more(registry);
        })
    }
}

/// Carries out an operation where nobody can be yielded to: while the script loads, or below a C
/// function. In a handler this holds up Lua, so it counts as running and ends with the budget.
fn block(watch: &Watch, pending: &Pending) {
    if let Some(operation) = pending.take() {
        let limit = watch.remaining().min(FOREVER);
        pending.finish(operation.run(Deadline::after(limit)));
    }
}

/// No configuration loads longer; the supervisor's `--boot-timeout` ends it before.
const FOREVER: std::time::Duration = std::time::Duration::from_secs(86_400);

/// Runs `prelude.lua`: wraps coroutines, and keeps the wrappers for [`function`], [`blocking`] and
/// [`Class`].
///
/// # Errors
/// Lua is out of memory.
pub fn install(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<()> {
    lua.register_userdata_type::<Pending>(|registry| {
        use mlua::UserDataFields as _;
        registry.add_meta_field("__name", "operation");
    })?;
    let native = lua.create_table()?;
    let clock = Arc::clone(watch);
    native.raw_set(
        "block",
        lua.create_function(move |_, pending: AnyUserData| {
            block(&clock, &*pending.borrow::<Pending>()?);
            Ok(())
        })?,
    )?;
    native.raw_set(
        "results",
        raw(lua, |lua, pending: AnyUserData| pending.borrow::<Pending>()?.results(lua))?,
    )?;
    let clock = Arc::clone(watch);
    native.raw_set("stop", lua.create_function(move |lua, ()| clock.stop(lua))?)?;
    native.raw_set("flags", watch.flags(lua)?)?;
    let exports: Table = lua.load(include_str!("prelude.lua")).set_name("=[qrelay]").call((
        mark(&RAISE),
        mark(&WAIT),
        native,
    ))?;
    lua.set_app_data(Prelude {
        checked: exports.get("checked")?,
        awaiting: exports.get("awaiting")?,
        class: exports.get("class")?,
    });
    Ok(())
}
