//! The mail object that a handler gets.
//!
//! Contract: the [`Slot`] holds the mail while its handler runs. Whoever runs
//! the handler takes it back afterwards, without needing Lua; from then on the
//! object is stale, whoever kept it. Nothing is asked of Lua while the slot is
//! locked: making a string may run a finalizer of the script, which may use the
//! same mail.
//!
//! # Failure
//! Wrong names and values raise; a stale object raises `Stale object`.

use std::ops::Range;
use std::sync::Arc;

use mlua::{BString, Either, Lua, MetaMethod, MultiValue, Table, Value, Variadic};
use parking_lot::Mutex;
use qrelay_shared::ipc::message::{MailId, Peer};
use qrelay_shared::{address, header};

use crate::client::cgroup::Cgroup;
use crate::lua::binding::convert::{self, Argument, Text};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{self, Class};
use crate::lua::binding::strings::Strings;
use crate::lua::library::action;
use crate::lua::library::cgroup;
use crate::mail::Mail;

/// Header lines that a handler may insert into one mail.
const MAX_INSERTED: usize = 16;
/// Longest inserted line without its line end (RFC 5322 2.1.1).
const MAX_LINE: usize = 998;
/// Longest account in bytes.
const MAX_ACCOUNT: usize = 255;
/// Most recipients, as in a request.
const MAX_RECIPIENTS: usize = 1024;

/// Where the mail is while its handler runs. Empty it is small: it stays until Lua collects the
/// object, and Lua doesn't see how much memory it takes.
#[derive(Debug)]
pub struct Slot(Mutex<Option<Held>>);

/// What there is of a mail while its handler runs.
#[derive(Debug)]
struct Held {
    mail: Box<Mail>,
    /// The control groups that the script has asked for, the client's own first.
    cgroups: Vec<Cgroup>,
}

impl Slot {
    /// Puts the mail in.
    pub fn new(mail: Box<Mail>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Held { mail, cgroups: Vec::new() }))))
    }

    /// Takes it out; the object is stale from now on, and the groups' directories are closed.
    pub fn take(&self) -> Option<Box<Mail>> {
        self.0.lock().take().map(|held| held.mail)
    }

    /// The mail's id.
    pub fn id(&self) -> Option<MailId> {
        self.0.lock().as_ref().map(|held| held.mail.id)
    }

    /// Works on the mail and its control groups. Nothing in it may ask Lua, which could ask for
    /// this mail.
    ///
    /// # Errors
    /// What `f` raises, or that the mail is gone.
    pub fn with<R>(
        &self,
        f: impl FnOnce(&mut Mail, &mut Vec<Cgroup>) -> Result<R, Raise>,
    ) -> Result<R, Raise> {
        let mut held = self.0.lock();
        let held = held.as_mut().ok_or("Stale object")?;
        f(&mut held.mail, &mut held.cgroups)
    }
}

/// The userdata.
pub struct MailObject(Arc<Slot>);

impl MailObject {
    /// The mail in this slot.
    pub fn new(slot: Arc<Slot>) -> Self {
        Self(slot)
    }
}

/// The mail object that a method was called on.
pub type This = function::This<MailObject>;

/// The mail object that a method was called on.
///
/// # Errors
/// It is no mail, or stale.
pub fn alive(this: &This) -> Result<&MailObject, Raise> {
    match this {
        Either::Left(object) => object.with(|_| Ok(&**object)),
        Either::Right(value) => Err(format!(
            "expected a mail object, got {}; call its methods with a colon, as in m:connect(…)",
            convert::describe(value)
        )
        .into()),
    }
}

impl MailObject {
    fn with<R>(&self, f: impl FnOnce(&mut Mail) -> Result<R, Raise>) -> Result<R, Raise> {
        self.0.with(|mail, _| f(mail))
    }

    /// Where the mail is.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.0
    }
}

/// Makes the class of mail objects.
///
/// # Errors
/// Lua is out of memory.
pub fn register(lua: &Lua) -> mlua::Result<()> {
    let mut class = Class::new(lua, "mail")?;
    envelope(&mut class)?;
    client(&mut class)?;
    cgroup::attribute(&mut class)?;
    headers(&mut class)?;
    action::methods(&mut class)?;
    class.register::<MailObject>(|_| ())
}

fn envelope(class: &mut Class<'_>) -> mlua::Result<()> {
    class.getter("sender", |lua, this: &MailObject| {
        let sender = this.with(|mail| Ok(sender(mail).to_vec()))?;
        Ok(lua.create_string(sender)?)
    })?;
    class.setter("sender", |_, this: &MailObject, value| {
        let sender = valid_sender(&value)?;
        this.with(|mail| {
            mail.sender = Some(sender);
            Ok(())
        })
    })?;
    class.list_getter("recipients", |this: &MailObject| this.with(|mail| Ok(recipients(mail))))?;
    class.setter("recipients", |_, this: &MailObject, value| {
        let recipients = valid_recipients(&value)?;
        this.with(|mail| {
            mail.recipients = Some(recipients);
            Ok(())
        })
    })?;
    class.getter("account", |_, this: &MailObject| this.with(|mail| Ok(mail.account.clone())))?;
    class.setter("account", |_, this: &MailObject, value| {
        let account = valid_account(&value)?;
        this.with(|mail| {
            mail.account = account;
            Ok(())
        })
    })
}

fn sender(mail: &Mail) -> &[u8] {
    mail.sender.as_deref().unwrap_or(&mail.buffer[mail.request.sender.clone()])
}

fn recipients(mail: &Mail) -> Variadic<BString> {
    match &mail.recipients {
        Some(list) => list.iter().map(|recipient| BString::from(&**recipient)).collect(),
        None => {
            let ranges = mail.request.recipients.iter();
            ranges.map(|range| BString::from(&mail.buffer[range.clone()])).collect()
        }
    }
}

fn string_list(lua: &Lua, items: Vec<Vec<u8>>) -> Result<Table, Raise> {
    Ok(lua.create_sequence_from(items.into_iter().map(BString::from))?)
}

fn valid_sender(value: &Value) -> Result<Vec<u8>, Raise> {
    let argument = Argument::Variable("sender");
    let text = argument.text(value)?;
    if address::is_valid_sender(&text) {
        return Ok(text.to_vec());
    }
    Err(argument.wrong("a valid address or ''", value))
}

fn valid_recipients(value: &Value) -> Result<Vec<Vec<u8>>, Raise> {
    let argument = Argument::Variable("recipients");
    let values = argument.list(value)?;
    if values.is_empty() || values.len() > MAX_RECIPIENTS {
        let got = values.len();
        return Err(argument
            .invalid(&format!("expected a list of 1 to {MAX_RECIPIENTS} addresses, got {got}")));
    }
    let valid = |value: &Value| match convert::text(value)? {
        Some(text) if address::is_valid(&text) => Ok(text.to_vec()),
        _ => Err(argument.wrong("valid addresses", value)),
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

/// Facts about the client and the connection.
fn client(class: &mut Class<'_>) -> mlua::Result<()> {
    class.getter("pid", |_, this: &MailObject| {
        this.with(|mail| match mail.peer {
            Peer::Local { pid, .. } => Ok(pid),
            Peer::Remote(_) => Ok(None),
        })
    })?;
    class.getter("uid", |_, this: &MailObject| {
        this.with(|mail| match mail.peer {
            Peer::Local { uid, .. } => Ok(Some(uid)),
            Peer::Remote(_) => Ok(None),
        })
    })?;
    class.getter("gid", |_, this: &MailObject| {
        this.with(|mail| match mail.peer {
            Peer::Local { gid, .. } => Ok(Some(gid)),
            Peer::Remote(_) => Ok(None),
        })
    })?;
    class.getter("peer", |_, this: &MailObject| this.with(|mail| Ok(peer(&mail.peer))))?;
    let names = Strings::default();
    class.getter("listener", move |lua, this: &MailObject| {
        let listener = this.with(|mail| Ok(Arc::clone(&mail.listener)))?;
        Ok(names.get(lua, &listener.into())?)
    })?;
    class.getter("id", |lua, this: &MailObject| {
        let id = this.with(|mail| Ok(mail.id))?;
        Ok(lua.create_string(&*id)?)
    })?;
    class.getter("size", |_, this: &MailObject| this.with(|mail| Ok(mail.request.message.len())))
}

/// An IP address, or the words of the `Received` line.
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
        let value = mail.with(|mail| Ok(header::header_value(message(mail), &name)))?;
        Ok(value.map(|value| lua.create_string(value)).transpose()?)
    })?;
    class.method("headers", |lua, (this, name): (This, Value)| {
        let mail = alive(&this)?;
        let name = header_name("headers", &name)?;
        string_list(lua, mail.with(|mail| Ok(header::headers(message(mail), &name)))?)
    })?;
    class.method("insert_header", |_, (this, name, value): (This, Value, Value)| {
        let mail = alive(&this)?;
        let name = header_name("insert_header", &name)?;
        let value = header_value(&name, &value)?;
        mail.with(|mail| {
            if mail.inserted.count() >= MAX_INSERTED {
                return Err(format!("insert_header: at most {MAX_INSERTED} lines per mail").into());
            }
            mail.inserted.insert(&name, &value);
            Ok(())
        })
    })?;
    class.method("remove_header", |_, (this, name): (This, Value)| {
        let mail = alive(&this)?;
        let name = header_name("remove_header", &name)?;
        mail.with(|mail| Ok(remove_header(mail, &name)))
    })
}

fn message(mail: &Mail) -> &[u8] {
    &mail.buffer[mail.request.message.clone()]
}

fn header_name<'v>(function: &str, value: &'v Value) -> Result<Text<'v>, Raise> {
    let argument = Argument::new(function, 1, "name");
    let name = argument.text(value)?;
    if header::valid_header_name(&name) {
        return Ok(name);
    }
    Err(argument.wrong("a field name of printable characters without ':'", value))
}

/// What can be inserted as the value of a field with this name.
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

/// Marks all fields of that name to be left out; how many there are.
fn remove_header(mail: &mut Mail, name: &[u8]) -> usize {
    let start = mail.request.message.start;
    let fields = header::field_ranges(message(mail), name);
    let count = fields.len();
    let ranges = fields.into_iter().map(|range| range.start + start..range.end + start);
    mail.removed.extend(ranges);
    mail.removed.sort_by_key(|range: &Range<usize>| range.start);
    mail.removed.dedup();
    count
}

/// What a handler's last result is, if it is an action.
pub fn decision(values: MultiValue) -> Result<crate::delivery::action::Action, String> {
    let last = values.back().unwrap_or(&Value::Nil);
    if let Value::UserData(object) = last
        && let Ok(object) = object.borrow::<action::ActionObject>()
    {
        return Ok(object.action().clone());
    }
    let got = convert::describe(last);
    Err(format!("the handler returned {got}, expected an action such as m:connect(address)"))
}
