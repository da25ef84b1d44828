//! The attributes and methods of the mail object.
//!
//! Contract: an attribute has the handler's value, else the client's. A change is checked before it
//! is made.
//!
//! # Failure
//! Wrong names and values raise; a stale object raises `Stale object`.

use std::sync::Arc;

use mlua::{BString, Lua, MetaMethod, Table, Value};
use qrelay_shared::ipc::message::Peer;
use qrelay_shared::qmqp::MAX_RECIPIENTS;
use qrelay_shared::{address, header};

use crate::lua::binding::convert::{self, Argument, Text};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::Class;
use crate::lua::binding::strings::Strings;
use crate::lua::library::action;
use crate::lua::library::cgroup;
use crate::lua::library::exec;
use crate::lua::library::mail_object::{MailObject, This, alive};
use crate::mail::Mail;

/// Header lines that a handler may insert into one mail.
const MAX_INSERTED: usize = 16;
/// Longest inserted line without its line end (RFC 5322 2.1.1).
const MAX_LINE: usize = 998;
/// Longest account in bytes.
const MAX_ACCOUNT: usize = 255;

/// Makes the class of mail objects.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let mut class = Class::new(lua, "mail")?;
    envelope(&mut class)?;
    client(&mut class)?;
    cgroup::attribute(&mut class)?;
    headers(&mut class)?;
    action::methods(&mut class)?;
    exec::methods(&mut class)?;
    class.register::<MailObject>(|_| ())
}

fn envelope(class: &mut Class<'_>) -> mlua::Result<()> {
    class.getter("sender", |lua, this: &MailObject| {
        let sender = this.with(|mail| Ok(mail.sender().to_vec()))?;
        Ok(lua.create_string(sender)?)
    })?;
    class.setter("sender", |_, this: &MailObject, value| {
        let text = Argument::Variable("sender").text(&value)?;
        this.with(|mail| {
            mail.set_sender(valid_sender(mail, &text, &value)?);
            Ok(())
        })
    })?;
    class.list_getter("recipients", |this: &MailObject| {
        this.with(|mail| Ok(mail.recipients().map(BString::from).collect()))
    })?;
    class.setter("recipients", |_, this: &MailObject, value| {
        let values = Argument::Variable("recipients").list(&value)?;
        this.with(|mail| {
            mail.set_recipients(valid_recipients(mail, &values)?);
            Ok(())
        })
    })?;
    class.getter("account", |_, this: &MailObject| {
        this.with(|mail| Ok(mail.account().map(str::to_owned)))
    })?;
    class.setter("account", |_, this: &MailObject, value| {
        let account = valid_account(&value)?;
        this.with(|mail| {
            mail.set_account(account);
            Ok(())
        })
    })
}

fn string_list(lua: &Lua, items: Vec<Vec<u8>>) -> Result<Table, Raise> {
    Ok(lua.create_sequence_from(items.into_iter().map(BString::from))?)
}

fn valid_sender(mail: &Mail, text: &[u8], value: &Value) -> Result<Vec<u8>, Raise> {
    let sender = mail.complete(text);
    if address::is_valid_sender(&sender) {
        return Ok(sender.into_owned());
    }
    Err(Argument::Variable("sender").wrong("a valid address or ''", value))
}

fn valid_recipients(mail: &Mail, values: &[Value]) -> Result<Vec<Vec<u8>>, Raise> {
    let argument = Argument::Variable("recipients");
    if values.is_empty() || values.len() > MAX_RECIPIENTS {
        let got = values.len();
        return Err(argument
            .invalid(&format!("expected a list of 1 to {MAX_RECIPIENTS} addresses, got {got}")));
    }
    let valid = |value: &Value| {
        let text = convert::text(value)?;
        let recipient = text.as_ref().map(|text| mail.complete(text));
        match recipient.filter(|recipient| address::is_valid(recipient)) {
            Some(recipient) => Ok(recipient.into_owned()),
            None => Err(argument.wrong("valid addresses", value)),
        }
    };
    values.iter().map(valid).collect()
}

fn valid_account(value: &Value) -> Result<Option<String>, Raise> {
    if value.is_nil() {
        return Ok(None);
    }
    let argument = Argument::Variable("account");
    let text = argument.text(value)?;
    let shown = address::printable(&text);
    if !(1..=MAX_ACCOUNT).contains(&text.len()) || shown.as_bytes() != &*text {
        return Err(argument.wrong("1 to 255 bytes of printable text, or nil", value));
    }
    Ok(Some(shown.into_owned()))
}

/// Adds the attributes of the client.
fn client(class: &mut Class<'_>) -> mlua::Result<()> {
    class.getter("pid", |_, this: &MailObject| {
        this.with(|mail| match *mail.peer() {
            Peer::Local { pid, .. } => Ok(pid),
            Peer::Remote(_) => Ok(None),
        })
    })?;
    class.getter("uid", |_, this: &MailObject| {
        this.with(|mail| match *mail.peer() {
            Peer::Local { uid, .. } => Ok(Some(uid)),
            Peer::Remote(_) => Ok(None),
        })
    })?;
    class.getter("gid", |_, this: &MailObject| {
        this.with(|mail| match *mail.peer() {
            Peer::Local { gid, .. } => Ok(Some(gid)),
            Peer::Remote(_) => Ok(None),
        })
    })?;
    class.getter("peer", |_, this: &MailObject| this.with(|mail| Ok(peer(mail.peer()))))?;
    let names = Strings::default();
    class.getter("listener", move |lua, this: &MailObject| {
        let listener = this.with(|mail| Ok(Arc::clone(mail.listener())))?;
        Ok(names.get(lua, &listener.into())?)
    })?;
    class.getter("id", |lua, this: &MailObject| {
        let id = this.with(|mail| Ok(mail.id()))?;
        Ok(lua.create_string(&*id)?)
    })?;
    class.getter("size", |_, this: &MailObject| this.with(|mail| Ok(mail.message().len())))
}

/// Returns the client's IP address, or the words of the `Received` line.
fn peer(peer: &Peer) -> String {
    match peer {
        Peer::Local { pid: Some(pid), uid, .. } => {
            let (mut first, mut second) = (itoa::Buffer::new(), itoa::Buffer::new());
            ["PID=", first.format(*pid), " UID=", second.format(*uid)].concat()
        }
        Peer::Local { pid: None, uid, .. } => format!("UID={uid}"),
        Peer::Remote(address) => address.to_string(),
    }
}

fn headers(class: &mut Class<'_>) -> mlua::Result<()> {
    class.method("header", |lua, (this, name): (This, Value)| {
        let mail = alive(&this)?;
        let name = header_name("header", &name)?;
        let value = mail.with(|mail| Ok(header::header_value(mail.message(), &name)))?;
        Ok(value.map(|value| lua.create_string(value)).transpose()?)
    })?;
    class.method("headers", |lua, (this, name): (This, Value)| {
        let mail = alive(&this)?;
        let name = header_name("headers", &name)?;
        string_list(lua, mail.with(|mail| Ok(header::headers(mail.message(), &name)))?)
    })?;
    class.method("insert_header", |_, (this, name, value): (This, Value, Value)| {
        let mail = alive(&this)?;
        let name = header_name("insert_header", &name)?;
        let value = header_value(&name, &value)?;
        mail.with(|mail| {
            if mail.inserted().count() >= MAX_INSERTED {
                return Err(format!("insert_header: at most {MAX_INSERTED} lines per mail").into());
            }
            mail.insert_header(&name, &value);
            Ok(())
        })
    })?;
    class.method("remove_header", |_, (this, name): (This, Value)| {
        let mail = alive(&this)?;
        let name = header_name("remove_header", &name)?;
        mail.with(|mail| Ok(remove_header(mail, &name)))
    })
}

fn header_name<'v>(function: &str, value: &'v Value) -> Result<Text<'v>, Raise> {
    let argument = Argument::new(function, 1, "name");
    let name = argument.text(value)?;
    if header::valid_header_name(&name) {
        return Ok(name);
    }
    Err(argument.wrong("a field name of printable characters without ':'", value))
}

/// Returns the value for a field of this name, if it can be inserted.
fn header_value<'v>(name: &[u8], value: &'v Value) -> Result<Text<'v>, Raise> {
    let argument = Argument::new("insert_header", 2, "value");
    let text = match convert::text(value)? {
        Some(text) => text,
        None if has_tostring(value)? => Text::Other(value.to_string()?.into()),
        None => return Err(argument.wrong("a string", value)),
    };
    if !header::valid_header_value(&text) {
        let got = convert::quoted(&text);
        return Err(argument.invalid(&format!("expected printable ASCII characters, got {got}")));
    }
    let length = name.len() + 2 + text.len();
    if length > MAX_LINE {
        return Err(
            argument.invalid(&format!("the line has {length} bytes, expected at most {MAX_LINE}"))
        );
    }
    Ok(text)
}

fn has_tostring(value: &Value) -> Result<bool, Raise> {
    Ok(match value {
        Value::Table(table) => match table.metatable() {
            Some(metatable) => !metatable.raw_get::<Value>("__tostring")?.is_nil(),
            None => false,
        },
        Value::UserData(object) => object.metatable()?.contains(MetaMethod::ToString)?,
        _ => false,
    })
}

/// Removes all fields of this name and returns their number.
fn remove_header(mail: &mut Mail, name: &[u8]) -> usize {
    let fields = header::field_ranges(mail.message(), name);
    let count = fields.len();
    mail.remove_fields(fields);
    count
}
