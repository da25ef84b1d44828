//! The library `control_client`: commands to beng-proxy.
//!
//! Contract: a client sends datagrams and receives nothing. Each worker connects its clients at
//! their first use, and again when the server was restarted. A builder collects commands; any
//! client may send it, more than once.
//!
//! # Failure
//! Misuse raises and leaves the builder as it was. A failure at run time is `nil, message`.

use std::sync::Arc;

use mlua::{IntoLua, Lua, MultiValue, Value};
use nix::sys::socket::SockType;
use qrelay_shared::beng_control::{Command, ControlError, Datagram};
use qrelay_shared::endpoint::CONTROL_PORT;

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::Call;
use crate::lua::binding::function::Class;
use crate::lua::binding::function::function;
use crate::lua::engine::watch::Watch;
use crate::lua::library::address;
use crate::lua::library::outgoing_socket::OutgoingSocket;
use crate::lua::library::socket;

/// The userdata of a client.
struct ClientObject(Arc<OutgoingSocket>);

/// The userdata of a builder.
struct Builder(Datagram);

/// The commands that take one argument each.
const COMMANDS: [(&str, Command); 9] = [
    ("fade_children", Command::FadeChildren),
    ("flush_filter_cache", Command::FlushFilterCache),
    ("discard_session", Command::DiscardSession),
    ("flush_http_cache", Command::FlushHttpCache),
    ("terminate_children", Command::TerminateChildren),
    ("disconnect_database", Command::DisconnectDatabase),
    ("reset_limiter", Command::ResetLimiter),
    ("reject_client", Command::RejectClient),
    ("tarpit_client", Command::TarpitClient),
];

/// Makes the global `control_client` and the classes of its objects.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<()> {
    builder(lua)?;
    client(lua)?;
    let watch = Arc::clone(watch);
    let library = lua.create_table()?;
    let new = function(lua, "control_client:new", move |lua, (this, address): (Value, Value)| {
        convert::library(&this, "control_client:new")?;
        let argument = Argument::new("control_client:new", 1, "address");
        let endpoints = address::endpoints(&argument, &address, CONTROL_PORT, "control_resolve")?;
        let socket = if watch.is_loading() {
            socket::declare(lua, endpoints, SockType::Datagram)
        } else {
            Arc::new(OutgoingSocket::new(endpoints, SockType::Datagram, true))
        };
        Ok(lua.create_any_userdata(ClientObject(socket))?)
    })?;
    library.raw_set("new", new)?;
    lua.globals().set("control_client", library)
}

fn client(lua: &Lua) -> mlua::Result<()> {
    let mut class = Class::new(lua, "control_client")?;
    class.method("build", |lua, this: Value| {
        client_of(&this)?;
        Ok(lua.create_any_userdata(Builder(Datagram::new()))?)
    })?;
    class.blocking_method("send", |_, (this, builder): (Value, Value)| {
        let socket = client_of(&this)?;
        let argument = Argument::new("control_client:send", 1, "builder");
        let Some(object) = builder.as_userdata().and_then(|o| o.borrow::<Builder>().ok()) else {
            return Err(argument.wrong("what c:build() returns", &builder));
        };
        if object.0.is_empty() {
            return Err(argument.invalid("it has no commands"));
        }
        let bytes = object.0.as_bytes().to_vec();
        Ok(Call::<()>::Later(Box::new(socket::Send { socket, bytes })))
    })?;
    class.register::<ClientObject>(|_| ())
}

fn client_of(value: &Value) -> Result<Arc<OutgoingSocket>, Raise> {
    if let Value::UserData(object) = value
        && let Ok(object) = object.borrow::<ClientObject>()
    {
        return Ok(Arc::clone(&object.0));
    }
    let got = convert::describe(value);
    Err(format!("expected a control client, got {got}; call its methods with a colon").into())
}

fn builder(lua: &Lua) -> mlua::Result<()> {
    let mut class = Class::new(lua, "control builder")?;
    for (name, command) in COMMANDS {
        class.method(name, move |lua, arguments: MultiValue| {
            add(lua, name, arguments, |datagram, texts| {
                texts.iter().try_for_each(|text| datagram.push(command, text))
            })
        })?;
    }
    class.method("cancel_job", |lua, arguments: MultiValue| {
        // The first argument is the builder itself.
        let got = arguments.len().saturating_sub(1);
        if got != 2 {
            return Err(format!(
                "cancel_job: expected a partition and a job id, got {got} arguments"
            )
            .into());
        }
        add(lua, "cancel_job", arguments, |datagram, texts| match texts {
            [partition, id] => datagram.cancel_job(partition, id),
            _ => Ok(()),
        })
    })?;
    class.register::<Builder>(|_| ())
}

/// Adds commands to the builder that is the first argument, all or none, and returns it.
fn add(
    lua: &Lua,
    name: &str,
    mut arguments: MultiValue,
    push: impl FnOnce(&mut Datagram, &[Vec<u8>]) -> Result<(), ControlError>,
) -> Result<Value, Raise> {
    let this = arguments.pop_front().unwrap_or(Value::Nil);
    let Some(mut builder) = this.as_userdata().and_then(|o| o.borrow_mut::<Builder>().ok()) else {
        let got = convert::describe(&this);
        return Err(format!(
            "expected a control builder, got {got}; call its methods with a colon"
        )
        .into());
    };
    if arguments.is_empty() {
        return Err(format!("{name}: expected at least one argument").into());
    }
    let texts = arguments.iter().enumerate().map(|(index, value)| {
        Argument::new(name, index + 1, "argument").text(value).map(|text| text.to_vec())
    });
    let texts = texts.collect::<Result<Vec<_>, Raise>>()?;
    let mut datagram = builder.0.clone();
    push(&mut datagram, &texts).map_err(|error| format!("{name}: {error}"))?;
    builder.0 = datagram;
    drop(builder);
    Ok(this.into_lua(lua)?)
}
