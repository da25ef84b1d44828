//! Addresses of sockets in Lua: `qmqp_resolve`, `log_resolve`, `control_resolve`.
//!
//! Contract: an address object is immutable, holds at least one endpoint, shows them with
//! `tostring` and compares by them. A host name is looked up on a thread of its own, which is
//! abandoned at the deadline, since the system's resolver has no time limit; while the script
//! loads, on the calling thread, since the zygote must stay single-threaded.
//!
//! # Failure
//! A text that is no address, or a look-up that fails, raises.

use std::sync::OnceLock;

use mlua::{AnyUserData, IntoLua, Lua, UserDataMethods as _, Value};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::endpoint::{self, CONTROL_PORT, Endpoint, POND_PORT, Parsed, QMQP_PORT};

use crate::delivery::resolve::{LookupError, look_up, look_up_until};
use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{self, Call, Class};
use crate::lua::binding::operation::{Completion, Operation};
use crate::lua::engine::watch::Watch;

/// An address as userdata.
#[derive(Debug)]
pub(crate) struct AddressObject {
    endpoints: Vec<Endpoint>,
    /// The action object that connects here, made at the first use.
    pub(super) connect: OnceLock<AnyUserData>,
}

impl AddressObject {
    /// An address of these endpoints; at least one.
    fn new(endpoints: Vec<Endpoint>) -> Self {
        Self { endpoints, connect: OnceLock::new() }
    }

    /// Returns the endpoints.
    pub(super) fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }
}

impl IntoLua for AddressObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

impl std::fmt::Display for AddressObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{endpoint}")?;
        }
        Ok(())
    }
}

/// Returns the address object behind a value, if the value is one.
pub(crate) fn object(value: &Value) -> Option<mlua::UserDataRef<AddressObject>> {
    value.as_userdata().and_then(|object| object.borrow().ok())
}

/// Returns the endpoints of an address object, or of a string without a host name. `resolver` is
/// the name of the Lua function for host names, for error messages.
///
/// # Errors
/// The value is neither.
pub(crate) fn endpoints(
    argument: &Argument<'_>,
    value: &Value,
    port: u16,
    resolver: &str,
) -> Result<Vec<Endpoint>, Raise> {
    if let Some(object) = object(value) {
        return Ok(object.endpoints.clone());
    }
    let Some(text) = convert::text(value)? else {
        return Err(argument.wrong("a string or an address object", value));
    };
    match endpoint::parse(&text, port) {
        Ok(Parsed::Endpoint(endpoint)) => Ok(vec![endpoint]),
        Ok(Parsed::Host { .. }) => {
            let text = convert::quoted(&text);
            Err(argument.invalid(&format!(
                "expected a numeric address, a path or an @name, got {text}; \
                 {resolver}({text}) makes an address object of a host name"
            )))
        }
        Err(error) => Err(argument.invalid(&format!("{}: {error}", convert::quoted(&text)))),
    }
}

/// Makes the class of address objects and the three functions.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, watch: &std::sync::Arc<Watch>) -> mlua::Result<()> {
    let class = Class::new(lua, "address")?;
    class.register::<AddressObject>(|registry| {
        registry.add_meta_method("__tostring", |_, this, ()| Ok(this.to_string()));
        registry.add_meta_function("__eq", |_, (a, b): (Value, Value)| {
            Ok(matches!((object(&a), object(&b)), (Some(a), Some(b)) if a.endpoints == b.endpoints))
        });
    })?;
    let resolvers = [
        ("qmqp_resolve", QMQP_PORT),
        ("log_resolve", POND_PORT),
        ("control_resolve", CONTROL_PORT),
    ];
    for (name, port) in resolvers {
        let watch = std::sync::Arc::clone(watch);
        let resolve = function::blocking_function(lua, name, move |_, address: Value| {
            resolve(name, &address, port, watch.is_loading())
        })?;
        lua.globals().set(name, resolve)?;
    }
    Ok(())
}

fn resolve(
    function: &'static str,
    address: &Value,
    port: u16,
    here: bool,
) -> Result<Call<AddressObject>, Raise> {
    let argument = Argument::new(function, 1, "address");
    let text = argument.text(address)?;
    match endpoint::parse(&text, port) {
        Ok(Parsed::Endpoint(endpoint)) => Ok(Call::Now(AddressObject::new(vec![endpoint]))),
        Ok(Parsed::Host { host, port }) => Ok(Call::Later(Box::new(Lookup { host, port, here }))),
        Err(error) => Err(argument.invalid(&format!("{}: {error}", convert::quoted(&text)))),
    }
}

/// Asks the system's resolver.
struct Lookup {
    host: String,
    port: u16,
    /// Whether the calling thread does the look-up.
    here: bool,
}

impl Operation for Lookup {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        let found = match self.here {
            true => look_up(&self.host, self.port),
            false => look_up_until(&self.host, self.port, deadline),
        };
        match found {
            Ok(found) => {
                let endpoints = found.into_iter().map(Endpoint::Inet).collect();
                Completion::values(AddressObject::new(endpoints))
            }
            Err(LookupError::TimedOut) => Completion::Expired,
            Err(LookupError::Failed(message)) => Completion::raise(message),
            Err(LookupError::Unanswered(message)) => Completion::raise(message).passing(),
        }
    }
}
