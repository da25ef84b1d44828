//! The library `socket`: sending to stream, datagram and packet sockets.
//!
//! Contract: each operation yields and takes at most ten seconds. A socket that is made while the
//! script loads is connected in each worker at its first use; [`release`] closes sockets that were
//! connected while loading before any fork.
//!
//! # Failure
//! Misuse raises. A failure at run time is `nil, message`, see [`SocketError`].

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mlua::{AnyUserData, Lua, Value};
use nix::sys::socket::SockType;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::endpoint::Endpoint;

use crate::lua::binding::convert::{self, Argument, Options};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{Call, Class, blocking_function};
use crate::lua::binding::operation::{Completion, Operation};
use crate::lua::engine::watch::Watch;
use crate::lua::library::address;
use crate::lua::library::outgoing_socket::{OutgoingSocket, SocketError};

/// Longest time of one operation: a part of the minute that a client waits.
const LIMIT: Duration = Duration::from_secs(10);

/// The kinds of sockets by their names in options.
const KINDS: [(&str, SockType); 3] = [
    ("stream", SockType::Stream),
    ("dgram", SockType::Datagram),
    ("seqpacket", SockType::SeqPacket),
];

/// The sockets that were declared while the script loads, as application data of the Lua state.
#[derive(Default)]
struct Declared(Vec<Weak<OutgoingSocket>>);

/// A socket as userdata.
struct SocketObject(Arc<OutgoingSocket>);

/// Declares a socket that is connected later, and closed before a fork.
pub(super) fn declare(lua: &Lua, endpoints: Vec<Endpoint>, kind: SockType) -> Arc<OutgoingSocket> {
    let socket = Arc::new(OutgoingSocket::new(endpoints, kind, true));
    if let Some(mut declared) = lua.app_data_mut::<Declared>() {
        declared.0.push(Arc::downgrade(&socket));
    }
    socket
}

/// Closes, when the script has loaded, the sockets that it has connected.
pub(crate) fn release(lua: &Lua) {
    let declared = lua.remove_app_data::<Declared>().unwrap_or_default();
    declared.0.iter().filter_map(Weak::upgrade).for_each(|socket| socket.release());
}

/// Makes the global `socket` and the class of its objects.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, watch: &Arc<Watch>) -> mlua::Result<()> {
    lua.set_app_data(Declared::default());
    let mut class = Class::new(lua, "socket")?;
    class.blocking_method(
        "send",
        |_, (this, data, first, last): (Value, Value, Value, Value)| {
            let socket = socket_of(&this)?;
            let text = Argument::new("send", 1, "data").text(&data)?;
            let range = part(text.len(), &first, &last)?;
            Ok(Call::<()>::Later(Box::new(Send { socket, bytes: text[range].to_vec() })))
        },
    )?;
    class.blocking_method("close", |_, this: Value| {
        Ok(Call::<()>::Later(Box::new(Close(socket_of(&this)?))))
    })?;
    class.register::<SocketObject>(|_| ())?;
    let watch = Arc::clone(watch);
    let library = lua.create_table()?;
    let connect = blocking_function(lua, "socket:connect", move |lua, arguments| {
        connect(lua, arguments, watch.is_loading())
    })?;
    library.raw_set("connect", connect)?;
    lua.globals().set("socket", library)
}

fn socket_of(value: &Value) -> Result<Arc<OutgoingSocket>, Raise> {
    if let Value::UserData(object) = value
        && let Ok(object) = object.borrow::<SocketObject>()
    {
        return Ok(Arc::clone(&object.0));
    }
    let got = convert::describe(value);
    Err(format!("expected a socket, got {got}; call its methods with a colon, as in s:send(…)")
        .into())
}

fn connect(
    lua: &Lua,
    (this, address, options): (Value, Value, Value),
    loading: bool,
) -> Result<Call<AnyUserData>, Raise> {
    convert::library(&this, "socket:connect")?;
    let argument = Argument::new("socket:connect", 1, "address");
    // No default port.
    let endpoints = address::endpoints(&argument, &address, 0, "qmqp_resolve")?;
    let kind = kind(&options)?;
    if loading {
        let socket = declare(lua, endpoints, kind);
        return Ok(Call::Now(lua.create_any_userdata(SocketObject(socket))?));
    }
    Ok(Call::Later(Box::new(Connect(OutgoingSocket::new(endpoints, kind, false)))))
}

fn kind(options: &Value) -> Result<SockType, Raise> {
    let options = Options::new("socket:connect", 2, options, &["type"])?;
    let Some((argument, value)) = options.get("type")? else { return Ok(SockType::Stream) };
    let name = argument.text(&value)?;
    let known = KINDS.iter().find(|(known, _)| *known.as_bytes() == *name);
    known
        .map(|(_, kind)| *kind)
        .ok_or_else(|| argument.wrong("'stream', 'dgram' or 'seqpacket'", &value))
}

/// The part of a text of that length from place `first` to `last`, as in `string.sub`.
fn part(length: usize, first: &Value, last: &Value) -> Result<Range<usize>, Raise> {
    let place = |position, name, value: &Value, default: f64| {
        let argument = Argument::new("send", position, name);
        let place = if value.is_nil() {
            default
        } else {
            argument.number(value, f64::NEG_INFINITY, f64::INFINITY)?
        };
        if place.fract() != 0.0 {
            return Err(argument.wrong("an integer", value));
        }
        let from_start = if place < 0.0 { length as f64 + 1.0 + place } else { place };
        // Clamped to what the text has; a cast of a float saturates.
        Ok::<usize, Raise>((from_start as usize).min(length + 1))
    };
    let start = place(2, "i", first, 1.0)?.max(1) - 1;
    let end = place(3, "j", last, -1.0)?.min(length);
    Ok(start..end.max(start))
}

/// Makes an operation's failure its result: at the mail's own deadline the handler ends.
pub(super) fn failure(error: &SocketError, deadline: Deadline) -> Completion {
    if matches!(error, SocketError::TimedOut) && deadline.expired() {
        return Completion::Expired;
    }
    let failure = Completion::failure(error.to_string());
    if matches!(error, SocketError::Closed) { failure } else { failure.passing() }
}

/// `socket:connect(…)` at run time.
struct Connect(OutgoingSocket);

impl Operation for Connect {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        let Self(socket) = *self;
        if let Err(error) = socket.open(deadline.at_most(LIMIT)) {
            return failure(&error, deadline);
        }
        Completion::Done(Box::new(move |lua| {
            let object = lua.create_any_userdata(SocketObject(Arc::new(socket)))?;
            Ok(mlua::IntoLuaMulti::into_lua_multi(object, lua)?)
        }))
    }
}

/// `s:send(…)`; its result is the number of bytes.
pub(super) struct Send {
    /// Over which.
    pub(super) socket: Arc<OutgoingSocket>,
    /// The bytes to send.
    pub(super) bytes: Vec<u8>,
}

impl Operation for Send {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        match self.socket.send(&self.bytes, deadline.at_most(LIMIT)) {
            Ok(()) => Completion::values(self.bytes.len()),
            Err(error) => failure(&error, deadline),
        }
    }
}

/// `s:close()`.
struct Close(Arc<OutgoingSocket>);

impl Operation for Close {
    fn run(self: Box<Self>, deadline: Deadline) -> Completion {
        match self.0.close(deadline.at_most(LIMIT)) {
            Ok(()) => Completion::values(true),
            Err(error) => failure(&error, deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_string_sub() {
        let table = [
            (Value::Nil, Value::Nil, "hello"),
            (Value::Integer(2), Value::Nil, "ello"),
            (Value::Integer(2), Value::Integer(3), "el"),
            (Value::Integer(-2), Value::Nil, "lo"),
            (Value::Integer(0), Value::Integer(-2), "hell"),
            (Value::Integer(-100), Value::Number(100.0), "hello"),
            (Value::Integer(4), Value::Integer(2), ""),
            (Value::Integer(6), Value::Nil, ""),
            (Value::Integer(1), Value::Integer(0), ""),
            (Value::Integer(1), Value::Integer(-100), ""),
            (Value::Integer(i64::MIN), Value::Integer(i64::MAX), "hello"),
        ];
        for (first, last, expected) in table {
            let range = part(5, &first, &last).unwrap_or_else(|error| panic!("{error:?}"));
            assert_eq!(&"hello"[range], expected, "{first:?} {last:?}");
        }
        assert!(part(5, &Value::Number(1.5), &Value::Nil).is_err());
        assert!(part(0, &Value::Nil, &Value::Nil).is_ok_and(|range| range.is_empty()));
    }
}
