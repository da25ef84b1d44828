//! How Rust functions and objects become Lua's.
//!
//! Contract: a function that raises does so with the position of the script's line, like Lua's own
//! libraries; where a script catches the error, it gets a string (`prelude.lua` wraps `pcall` and
//! its like). A function that may have to wait returns a mark and an operation to a wrapper, which
//! yields it. Whatever a script calls takes only as many arguments as it has parameters (see
//! [`super::arguments`]).
//!
//! # Failure
//! [`Raise`] of the wrapped function. Making functions fails only when Lua's memory is exhausted.

use mlua::{
    BString, Either, FromLuaMulti, Function, IntoLua, IntoLuaMulti, LightUserData, Lua, MultiValue,
    Table, UserDataRef, UserDataRegistry, Value, Variadic,
};

use crate::lua::binding::arguments::{self, Arguments, Name};
use crate::lua::binding::convert;
use crate::lua::binding::error::Raise;
use crate::lua::binding::operation::{Operation, Pending};

/// The address of this byte is the mark; a script can't make light userdata.
static WAIT: u8 = b'W';

/// Returns the mark, which a function that has to wait returns before its operation. No script can
/// have this value.
pub(crate) fn mark() -> LightUserData {
    LightUserData(std::ptr::from_ref(&WAIT).cast_mut().cast())
}

/// The object before the dot or colon: usually of the class's type, checked by the method itself.
pub(crate) type This<T> = Either<UserDataRef<T>, Value>;

/// The wrappers that `prelude.lua` returns, kept as application data of the Lua state.
struct Prelude {
    awaiting: Function,
    class: Function,
    list: Function,
    raised: Function,
}

/// Keeps the wrappers that `prelude.lua` returned; without them no class and no function that waits
/// can be made.
///
/// # Errors
/// A wrapper is missing.
pub(crate) fn set_wrappers(lua: &Lua, exports: &Table) -> mlua::Result<()> {
    lua.set_app_data(Prelude {
        awaiting: exports.get("awaiting")?,
        class: exports.get("class")?,
        list: exports.get("list")?,
        raised: exports.get("raised")?,
    });
    Ok(())
}

fn prelude(lua: &Lua) -> mlua::Result<mlua::AppDataRef<'_, Prelude>> {
    lua.app_data_ref::<Prelude>()
        .ok_or_else(|| mlua::Error::RuntimeError("the prelude is not installed".into()))
}

/// Returns the message of an error, with the table's fields if a script raised a table. Called
/// while Lua is held.
pub(crate) fn with_fields(lua: &Lua, message: String) -> String {
    if !message.starts_with("table: 0x") {
        return message;
    }
    let shown = prelude(lua).map(|prelude| prelude.raised.clone());
    shown.and_then(|shown| shown.call::<String>(message.as_str())).unwrap_or(message)
}

/// The result of a function that may have to wait.
pub(crate) enum Call<R> {
    /// The function returns these values at once.
    Now(R),
    /// The function waits for the operation, whose results become its own.
    Later(Box<dyn Operation>),
}

impl<R: IntoLuaMulti> IntoLuaMulti for Call<R> {
    fn into_lua_multi(self, lua: &Lua) -> mlua::Result<MultiValue> {
        match self {
            Self::Now(values) => values.into_lua_multi(lua),
            Self::Later(operation) => {
                let pending = lua.create_any_userdata(Pending::new(operation))?;
                (mark(), pending).into_lua_multi(lua)
            }
        }
    }
}

/// A function that never waits; one whose name has a colon is called on its library.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn function<A, R>(
    lua: &Lua,
    name: &'static str,
    f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: Arguments,
    R: IntoLuaMulti + 'static,
{
    counted(lua, Name::Function(name), f)
}

/// Makes a function that only Lua or `prelude.lua` calls: a metamethod or an iterator. Surplus
/// arguments are ignored.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn internal<A, R>(
    lua: &Lua,
    f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: FromLuaMulti + 'static,
    R: IntoLuaMulti + 'static,
{
    boxed(lua, Box::new(f))
}

/// Makes a function that is called through a pointer. All functions of one signature then share the
/// binding's code around them, which is larger than their own: a mail passes many of them, and the
/// processor's instruction cache is small.
fn boxed<A, R>(lua: &Lua, f: Boxed<A, R>) -> mlua::Result<Function>
where
    A: FromLuaMulti + 'static,
    R: IntoLuaMulti + 'static,
{
    lua.create_function(move |lua, arguments| f(lua, arguments).map_err(mlua::Error::from))
}

/// A function of this signature.
type Boxed<A, R> = Box<dyn Fn(&Lua, A) -> Result<R, Raise> + Send>;

/// A function that raises if it gets too many arguments.
fn counted<A, R>(
    lua: &Lua,
    name: Name,
    f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: Arguments,
    R: IntoLuaMulti + 'static,
{
    internal(lua, move |lua, raw: A::Raw| f(lua, arguments::checked(name, raw)?))
}

/// A function that may have to wait; the wait yields to whoever runs the handler.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn blocking_function<A, R>(
    lua: &Lua,
    name: &'static str,
    f: impl Fn(&Lua, A) -> Result<Call<R>, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: Arguments,
    R: IntoLuaMulti + 'static,
{
    waiting(lua, Name::Function(name), f)
}

fn waiting<A, R>(
    lua: &Lua,
    name: Name,
    f: impl Fn(&Lua, A) -> Result<Call<R>, Raise> + Send + 'static,
) -> mlua::Result<Function>
where
    A: Arguments,
    R: IntoLuaMulti + 'static,
{
    let raw = counted(lua, name, f)?;
    let awaiting = prelude(lua)?.awaiting.clone();
    awaiting.call(raw)
}

/// The methods and attributes of a kind of object, while they are collected.
pub(crate) struct Class<'a> {
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
    pub(crate) fn new(lua: &'a Lua, name: &'static str) -> mlua::Result<Self> {
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
    pub(crate) fn method<A, R>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, A) -> Result<R, Raise> + Send + 'static,
    ) -> mlua::Result<()>
    where
        A: Arguments,
        R: IntoLuaMulti + 'static,
    {
        self.readable.push(name);
        self.methods.raw_set(name, counted(self.lua, Name::Method(name), f)?)
    }

    /// Adds a method that may have to wait.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn blocking_method<A, R>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, A) -> Result<Call<R>, Raise> + Send + 'static,
    ) -> mlua::Result<()>
    where
        A: Arguments,
        R: IntoLuaMulti + 'static,
    {
        self.readable.push(name);
        self.methods.raw_set(name, waiting(self.lua, Name::Method(name), f)?)
    }

    /// Adds a method that is written in Lua.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn lua_method(&mut self, name: &'static str, method: Function) -> mlua::Result<()> {
        self.readable.push(name);
        self.methods.raw_set(name, method)
    }

    /// Adds a readable attribute.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn getter<T: 'static, R: IntoLua>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, &T) -> Result<R, Raise> + Send + 'static,
    ) -> mlua::Result<()> {
        self.readable.push(name);
        let get = internal(self.lua, move |lua, this: UserDataRef<T>| -> Result<Value, Raise> {
            Ok(f(lua, &this)?.into_lua(lua)?)
        })?;
        self.getters.raw_set(name, get)
    }

    /// Adds a readable attribute that is a new list of strings each time. They pass through Lua's
    /// stack, so some thousands at most.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn list_getter<T: 'static>(
        &mut self,
        name: &'static str,
        f: impl Fn(&T) -> Result<Variadic<BString>, Raise> + Send + 'static,
    ) -> mlua::Result<()> {
        self.readable.push(name);
        let items = internal(self.lua, move |_, this: UserDataRef<T>| f(&this))?;
        let list = prelude(self.lua)?.list.clone();
        self.getters.raw_set(name, list.call::<Function>(items)?)
    }

    /// Makes an attribute writable.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn setter<T: 'static>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Lua, &T, Value) -> Result<(), Raise> + Send + 'static,
    ) -> mlua::Result<()> {
        self.writable.push(name);
        let set = internal(self.lua, move |lua, (this, value): (UserDataRef<T>, Value)| {
            f(lua, &this, value)
        })?;
        self.setters.raw_set(name, set)
    }

    /// Makes it the class of all userdata of type `T`; `more` may add metamethods.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn register<T: 'static>(
        self,
        more: impl FnOnce(&mut UserDataRegistry<T>),
    ) -> mlua::Result<()> {
        use mlua::UserDataFields as _;
        let Self { lua, name, methods, getters, setters, readable, writable } = self;
        let unknown =
            internal(lua, move |_, (key, writing): (Value, bool)| -> Result<(), Raise> {
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
