//! The methods of a mail object that decide about it: `connect`, `discard`, `reject`, `defer`.
//!
//! # Failure
//! Wrong arguments raise; nothing is connected here.

use std::collections::HashMap;
use std::sync::Arc;

use mlua::{AnyUserData, Lua, Value};
use parking_lot::Mutex;
use qrelay_shared::address::printable;
use qrelay_shared::endpoint::{self, Parsed, QMQP_PORT};

use crate::delivery::action::{Action, Connect, Place};
use crate::lua::binding::convert::{self, Argument, MAX_TIMEOUT, Options};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::Class;
use crate::lua::library::action_object::ActionObject;
use crate::lua::library::address;
use crate::lua::library::mail_object::{This, alive};

/// Most addresses with a cached action object.
const MAX_KEPT: usize = 256;

/// Adds the methods to the class of mail objects.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn methods(class: &mut Class<'_>) -> mlua::Result<()> {
    let kept = Mutex::new(HashMap::new());
    class.method("connect", move |lua, (this, to, options): (This, Value, Value)| {
        alive(&this)?;
        if options.is_nil() {
            connect_plainly(lua, &to, &kept)
        } else {
            connect(lua, &to, &options)
        }
    })?;
    reply(class, "discard", Action::Discard)?;
    reply(class, "reject", Action::Reject)?;
    reply(class, "defer", Action::Defer)
}

/// Adds a method whose action is an answer without a next hop.
fn reply(
    class: &mut Class<'_>,
    name: &'static str,
    action: fn(Option<Arc<str>>) -> Action,
) -> mlua::Result<()> {
    class.method(name, move |_, (this, text): (This, Value)| {
        alive(&this)?;
        let text = match text {
            Value::Nil => None,
            text => {
                let bytes = Argument::new(name, 1, "text").text(&text)?;
                Some(Arc::from(&*printable(&bytes)))
            }
        };
        Ok(ActionObject::new(action(text)))
    })
}

/// Action objects by the text of their address.
type Kept = Mutex<HashMap<Vec<u8>, AnyUserData>>;

/// Returns the action of `connect(to)`. Most handlers use few addresses, so the action objects are
/// cached.
fn connect_plainly(lua: &Lua, to: &Value, kept: &Kept) -> Result<AnyUserData, Raise> {
    if let Value::String(text) = to {
        if let Some(action) = kept.lock().get(&*text.as_bytes()) {
            return Ok(action.clone());
        }
        let action = connect(lua, to, &Value::Nil)?;
        let mut kept = kept.lock();
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(text.as_bytes().to_vec(), action.clone());
        return Ok(action);
    }
    let Some(address) = address::object(to) else { return connect(lua, to, &Value::Nil) };
    if let Some(action) = address.connect.get() {
        return Ok(action.clone());
    }
    let action = connect(lua, to, &Value::Nil)?;
    Ok(address.connect.get_or_init(|| action).clone())
}

fn connect(lua: &Lua, to: &Value, options: &Value) -> Result<AnyUserData, Raise> {
    let connect = Arc::new(connect_to(to, options)?);
    Ok(lua.create_any_userdata(ActionObject::new(Action::Connect(connect)))?)
}

fn connect_to(to: &Value, options: &Value) -> Result<Connect, Raise> {
    let argument = Argument::new("connect", 1, "address");
    let mut connect =
        Connect { places: Vec::new(), random: false, timeout: None, connect_timeout: None };
    match to {
        Value::Table(_) => {
            for one in argument.list(to)? {
                add_places(&argument, &one, &mut connect.places)?;
            }
        }
        one => add_places(&argument, one, &mut connect.places)?,
    }
    if connect.places.is_empty() {
        return Err(argument.invalid("expected at least one address, got an empty list"));
    }
    let options = Options::new("connect", 2, options, &["timeout", "connect_timeout", "order"])?;
    if let Some((key, value)) = options.get("timeout")? {
        connect.timeout = Some(key.duration(&value, MAX_TIMEOUT)?);
    }
    if let Some((key, value)) = options.get("connect_timeout")? {
        connect.connect_timeout = Some(key.duration(&value, MAX_TIMEOUT)?);
    }
    if let Some((key, value)) = options.get("order")? {
        match &*key.text(&value)? {
            b"random" => connect.random = true,
            _ => return Err(key.wrong("'random'", &value)),
        }
    }
    Ok(connect)
}

/// Adds the places that a value names. A host name is looked up when a mail is relayed, without
/// Lua.
fn add_places(argument: &Argument<'_>, value: &Value, to: &mut Vec<Place>) -> Result<(), Raise> {
    if let Some(object) = address::object(value) {
        to.extend(object.endpoints().iter().cloned().map(Place::from));
        return Ok(());
    }
    let Some(text) = convert::text(value)? else {
        return Err(argument.wrong("a string or an address object", value));
    };
    to.push(match endpoint::parse(&text, QMQP_PORT) {
        Ok(Parsed::Endpoint(endpoint)) => endpoint.into(),
        Ok(Parsed::Host { host, port }) => Place::Name { host: host.into(), port },
        Err(error) => {
            return Err(argument.invalid(&format!("{}: {error}", convert::quoted(&text))));
        }
    });
    Ok(())
}
