//! The object that stands for a decision about a mail in Lua.
//!
//! Contract: an action object is immutable and belongs to no mail; a script may keep it and return
//! it for others.
//!
//! # Failure
//! A handler's result that is no action object is a text that says so.

use mlua::{IntoLua, Lua, MultiValue, UserDataMethods as _, Value};

use crate::delivery::action::Action;
use crate::lua::binding::convert;
use crate::lua::binding::function::Class;

/// An action as userdata.
pub(crate) struct ActionObject(Action);

impl ActionObject {
    /// Makes the object of an action.
    pub(crate) fn new(action: Action) -> Self {
        Self(action)
    }
}

impl IntoLua for ActionObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

/// Makes the class of action objects.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let class = Class::new(lua, "action")?;
    class.register::<ActionObject>(|registry| {
        registry.add_meta_method("__tostring", |_, this, ()| Ok(this.0.name()));
    })
}

/// Returns the action that is a handler's last result, or the text for the log if it is none.
pub(crate) fn decision(values: MultiValue) -> Result<Action, String> {
    let last = values.back().unwrap_or(&Value::Nil);
    if let Value::UserData(object) = last
        && let Ok(object) = object.borrow::<ActionObject>()
    {
        return Ok(object.0.clone());
    }
    let got = convert::describe(last);
    let hint = match last {
        Value::Nil => "; did you forget 'return'?",
        Value::Function(_) => "; did you forget to call it?",
        _ => "",
    };
    Err(format!("the handler returned {got}, expected an action such as m:connect(address){hint}"))
}
