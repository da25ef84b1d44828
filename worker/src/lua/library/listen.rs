//! The declarations of a script: `qmqp_listen`, `settings`, `systemd`, `max_size`, `log_server`.
//!
//! Contract: while the script loads, a [`Draft`] collects listeners, handlers and settings;
//! [`Draft::finish`] makes the [`Declaration`] of them. The draft is not locked during a call to
//! Lua, because the call may run a finalizer. Owners' names are looked up once, here, so that a
//! replaced worker doesn't depend on them.
//!
//! # Failure
//! Wrong arguments raise in the script. A mistake that only shows at the end (no listener at all, a
//! wrong `log_server`) is an error of [`Draft::finish`].

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use mlua::{Function, Lua, UserDataMethods as _, Value};
use nix::unistd::{Group, User};
use parking_lot::Mutex;
use qrelay_shared::dictionary::MAX_DICTIONARIES;
use qrelay_shared::endpoint::{self, Endpoint, POND_PORT, Parsed};
use qrelay_shared::network::Network;
use qrelay_shared::settings::{
    DEFAULT_BACKLOG, DEFAULT_MAX_SIZE, DEFAULT_MODE, Declaration, ListenAddress, ListenerDecl,
    Separation, Settings,
};

use crate::lua::binding::convert::{self, Argument, Options};
use crate::lua::binding::error::{self, Raise};
use crate::lua::binding::function;
use crate::lua::library::address;
use crate::lua::library::settings;

/// Smallest `max_size` in bytes: room for a message's header.
const MIN_MAX_SIZE: f64 = 1024.0;
/// Largest `max_size` in bytes: 1 GiB.
const MAX_MAX_SIZE: f64 = 1_073_741_824.0;
/// Largest backlog: what `listen(2)` takes on every kernel (`net.core.somaxconn` cuts it further).
const MAX_BACKLOG: u64 = 65_535;

/// The options of `qmqp_listen`.
const OPTIONS: &[&str] = &["mode", "owner", "group", "backlog", "max_size", "allow"];
/// The options of a socket file only.
const FILE_OPTIONS: &[&str] = &["mode", "owner", "group"];

/// The phase of loading, which decides whether a declaration is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Loading,
    Reload,
    Finished,
}

/// The declarations so far.
pub(crate) struct Draft {
    phase: Phase,
    listeners: Vec<ListenerDecl>,
    handlers: Vec<Function>,
    settings: Settings,
    /// Whether the script has set `mail_memory` itself.
    own_mail_memory: bool,
    /// Names of the shared dictionaries that the script has made handles for.
    dictionaries: BTreeSet<String>,
    /// FileDescriptorNames of the sockets that systemd passed; `None` if any socket counts as
    /// passed, because the script is only tried.
    systemd: Option<Vec<String>>,
    purpose: Purpose,
    /// The place of a call of `os.exit` that was refused.
    left: Option<String>,
    /// The global `max_size` at the last listener.
    max_size: Value,
}

/// What a script runs for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To decide about mails.
    Serve,
    /// To be checked or tried: it must not end the process, which never forks.
    Trial,
}

/// The draft, shared with the functions that add to it.
pub(crate) type SharedDraft = Arc<Mutex<Draft>>;

/// The userdata behind the global `systemd` and what indexing it yields.
struct Systemd(Option<String>);

impl Draft {
    /// Returns a draft without declarations.
    pub(crate) fn new(systemd: Option<Vec<String>>, purpose: Purpose) -> SharedDraft {
        Arc::new(Mutex::new(Self {
            phase: Phase::Loading,
            listeners: Vec::new(),
            handlers: Vec::new(),
            settings: Settings::default(),
            own_mail_memory: false,
            dictionaries: BTreeSet::new(),
            systemd,
            purpose,
            left: None,
            max_size: Value::Nil,
        }))
    }

    /// Notes that the script calls `os.exit`.
    ///
    /// # Errors
    /// The process has to go on, because it loads the script or only tries it.
    pub(super) fn leave(
        &mut self,
        loading: bool,
        place: impl FnOnce() -> String,
    ) -> Result<(), Raise> {
        if !loading && self.purpose == Purpose::Serve {
            return Ok(());
        }
        self.left = Some(place());
        Err(match loading {
            true => "os.exit is no way to end a script: return, or raise an error".into(),
            false => "os.exit would end the worker: return an action, or raise an error".into(),
        })
    }

    /// Returns the place of a call of `os.exit` that was refused.
    pub(crate) fn left(&self) -> Option<&str> {
        self.left.as_deref()
    }

    /// Enters the phase in which the script's function `reload` runs.
    pub(crate) fn enter_reload(&mut self) {
        self.phase = Phase::Reload;
    }

    /// Returns the final declaration and the handler of each listener.
    ///
    /// # Errors
    /// A text that names what is missing or wrong.
    pub(crate) fn finish(&mut self, lua: &Lua) -> Result<(Declaration, Vec<Function>), String> {
        self.phase = Phase::Finished;
        if let Some(place) = &self.left {
            return Err(format!("the script calls os.exit at {place}, which is no way to end it"));
        }
        if self.listeners.is_empty() {
            return Err("no listener: the script must call qmqp_listen() at least once".into());
        }
        if !self.own_mail_memory {
            settings::fit_mail_memory(&mut self.settings, &self.listeners);
        }
        settings::consistent(&self.settings, &self.listeners)?;
        let declaration = Declaration {
            listeners: self.listeners.clone(),
            settings: self.settings.clone(),
            log_server: log_server(lua)?,
            dictionaries: std::mem::take(&mut self.dictionaries).into_iter().collect(),
            separation: Separation::default(),
        };
        Ok((declaration, std::mem::take(&mut self.handlers)))
    }

    /// Notes a shared dictionary that the script has made a handle for, so that the dictionary is
    /// kept before its first use. No use can follow beyond [`MAX_DICTIONARIES`].
    pub(crate) fn name_dictionary(&mut self, name: &str) {
        if self.phase != Phase::Finished && self.dictionaries.len() < MAX_DICTIONARIES {
            self.dictionaries.insert(name.to_owned());
        }
    }

    /// Whether the script listens on `systemd`, but no socket is left for it.
    fn listens_in_vain(&self) -> bool {
        let Some(passed) = &self.systemd else { return false };
        let claimed = |name: &String| {
            let by_name = ListenAddress::Systemd(Some(name.clone()));
            self.listeners.iter().any(|listener| listener.address == by_name)
        };
        self.listeners.iter().any(|listener| listener.address == ListenAddress::Systemd(None))
            && passed.iter().all(claimed)
    }

    /// Returns warnings about what has no effect, or not the one that was meant.
    ///
    /// # Errors
    /// Lua is out of memory.
    pub(crate) fn oddities(&self, lua: &Lua) -> mlua::Result<Vec<String>> {
        let globals = lua.globals();
        let mut warnings = Vec::new();
        if self.listens_in_vain() {
            warnings.push("the script listens on systemd, which passed no sockets for it".into());
        }
        if !globals.raw_get::<Value>("settings")?.is_function() {
            warnings.push(
                "settings was assigned, so it set nothing: call it, as in settings{…}".into(),
            );
        }
        let max_size: Value = globals.raw_get("max_size")?;
        if !max_size.is_nil() && max_size != self.max_size {
            warnings.push(format!(
                "max_size was set to {} after the last qmqp_listen, so no listener has it: set it \
                 before",
                convert::describe(&max_size)
            ));
        }
        let reload: Value = globals.raw_get("reload")?;
        if !reload.is_nil() && !reload.is_function() {
            let got = convert::describe(&reload);
            warnings.push(format!("reload is {got}, but must be a function: SIGHUP will fail"));
        }
        for name in settings::plain_names() {
            let value: Value = globals.raw_get(name)?;
            let scalar = value.is_integer() || value.is_number() || value.is_string();
            if scalar || value.is_boolean() {
                warnings.push(format!(
                    "the global variable {name} sets nothing: write settings{{{name} = {}}}",
                    convert::describe(&value)
                ));
            }
        }
        Ok(warnings)
    }
}

/// Defines the globals.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua, draft: &SharedDraft) -> mlua::Result<()> {
    let globals = lua.globals();
    let listening = Arc::clone(draft);
    let listen =
        function::function(lua, "qmqp_listen", move |lua, arguments: (Value, Value, Value)| {
            qmqp_listen(lua, &listening, arguments)
        })?;
    globals.set("qmqp_listen", listen)?;
    let setting = Arc::clone(draft);
    let settings = function::function(lua, "settings", move |_, table: Value| {
        setting.lock().only_while_loading("settings")?;
        let mut settings = setting.lock().settings.clone();
        let table = Argument::new("settings", 1, "settings").table(&table)?;
        settings::apply(table, &mut settings)?;
        let own_mail_memory = settings::has_mail_memory(table)?;
        let mut draft = setting.lock();
        draft.settings = settings;
        draft.own_mail_memory |= own_mail_memory;
        Ok(())
    })?;
    globals.set("settings", settings)?;
    globals.set("max_size", DEFAULT_MAX_SIZE)?;
    systemd(lua, draft)
}

/// The global `systemd`, whose keys are the names of the sockets that were passed.
fn systemd(lua: &Lua, draft: &SharedDraft) -> mlua::Result<()> {
    let passed = Arc::clone(draft);
    let index = function::internal(lua, move |_, (_, key): (Value, Value)| {
        let passed = passed.lock().systemd.clone();
        let name = key.as_string().map(mlua::LuaString::to_string_lossy).unwrap_or_default();
        if let Some(passed) = passed.filter(|passed| !passed.contains(&name)) {
            let known: Vec<&str> = passed.iter().map(String::as_str).collect();
            return Err(convert::unknown_name("systemd", "socket named", &key, &known).into());
        }
        Ok(SystemdValue(Systemd(Some(name))))
    })?;
    lua.register_userdata_type::<Systemd>(|registry| {
        use mlua::UserDataFields as _;
        registry.add_meta_field("__name", "systemd");
        registry.add_meta_field("__index", index);
        registry.add_meta_method("__tostring", |_, this, ()| {
            Ok(ListenAddress::Systemd(this.0.clone()).to_string())
        });
    })?;
    lua.globals().set("systemd", SystemdValue(Systemd(None)))
}

/// Becomes userdata.
struct SystemdValue(Systemd);

impl mlua::IntoLua for SystemdValue {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self.0).map(Value::UserData)
    }
}

impl Draft {
    fn only_while_loading(&self, function: &str) -> Result<(), Raise> {
        match self.phase {
            Phase::Loading => Ok(()),
            Phase::Reload => Err(format!("{function} can't be called in reload()").into()),
            Phase::Finished => {
                Err(format!("{function} can only be called while the script loads").into())
            }
        }
    }
}

fn qmqp_listen(
    lua: &Lua,
    draft: &SharedDraft,
    (place, handler, options): (Value, Value, Value),
) -> Result<(), Raise> {
    draft.lock().only_while_loading("qmqp_listen")?;
    let argument = Argument::new("qmqp_listen", 1, "where");
    let address = listen_address(&argument, &place)?;
    if draft.lock().listeners.iter().any(|listener| listener.address == address) {
        return Err(argument.invalid(&format!("{address} is already listened on")));
    }
    let Value::Function(handler) = handler else {
        return Err(Argument::new("qmqp_listen", 2, "handler").wrong("a function", &handler));
    };
    let options = Options::new("qmqp_listen", 3, &options, OPTIONS)?;
    let max_size = global_max_size(lua)?;
    let listener = listener(address, &options, max_size)?;
    let mut draft = draft.lock();
    draft.max_size = lua.globals().raw_get("max_size")?;
    draft.listeners.push(listener);
    draft.handlers.push(handler);
    Ok(())
}

fn listen_address(argument: &Argument<'_>, place: &Value) -> Result<ListenAddress, Raise> {
    const EXPECTED: &str = "an absolute path, '@name', 'IP:port' or the variable systemd";
    if let Value::UserData(object) = place
        && let Ok(object) = object.borrow::<Systemd>()
    {
        return Ok(ListenAddress::Systemd(object.0.clone()));
    }
    let Value::String(text) = place else { return Err(argument.wrong(EXPECTED, place)) };
    let text = text.as_bytes();
    if &*text == b"systemd" {
        return Err(argument.invalid(
            "the string 'systemd' is no address; \
             did you mean the variable systemd, without quotes?",
        ));
    }
    match endpoint::parse(&text, 0) {
        Ok(Parsed::Endpoint(Endpoint::Path(path))) => Ok(ListenAddress::Path(tidy(path))),
        Ok(Parsed::Endpoint(Endpoint::Abstract(name))) => Ok(ListenAddress::Abstract(name)),
        Ok(Parsed::Endpoint(Endpoint::Inet(address))) => Ok(ListenAddress::Inet(address)),
        Err(error) if !is_word(&text) => {
            Err(argument.invalid(&format!("{}: {error}", convert::quoted(&text))))
        }
        Ok(Parsed::Host { .. }) | Err(_) => Err(argument.wrong(EXPECTED, place)),
    }
}

/// Whether a text isn't meant to be an IP address, a path or an `@name`.
fn is_word(text: &[u8]) -> bool {
    let is_address = matches!(endpoint::parse(text, 1), Ok(Parsed::Endpoint(_)));
    let has_digits_only = text.iter().all(|b| b"0123456789.:[]".contains(b));
    !is_address && !has_digits_only && !text.starts_with(b"/") && !text.starts_with(b"@")
}

/// Removes doubled slashes and `.`, so that one file has one name.
fn tidy(path: PathBuf) -> PathBuf {
    path.components().collect()
}

fn listener(
    address: ListenAddress,
    options: &Options<'_>,
    max_size: usize,
) -> Result<ListenerDecl, Raise> {
    let mut listener = ListenerDecl {
        address,
        mode: DEFAULT_MODE,
        owner: None,
        group: None,
        backlog: DEFAULT_BACKLOG,
        max_size,
        allow: None,
    };
    if !matches!(listener.address, ListenAddress::Path(_)) {
        for key in FILE_OPTIONS {
            if let Some((key, _)) = options.get(key)? {
                return Err(key.invalid("only a listener with a path has it"));
            }
        }
    }
    if let Some((key, value)) = options.get("mode")? {
        listener.mode = mode(&key, &value)?;
    }
    if let Some((key, value)) = options.get("owner")? {
        listener.owner = Some(owner(&key, &value)?);
    }
    if let Some((key, value)) = options.get("group")? {
        listener.group = Some(group(&key, &value)?);
    }
    if let Some((key, value)) = options.get("backlog")? {
        listener.backlog = key.integer(&value, 1, MAX_BACKLOG)? as u32;
    }
    if let Some((key, value)) = options.get("max_size")? {
        listener.max_size = key.number(&value, MIN_MAX_SIZE, MAX_MAX_SIZE)? as usize;
    }
    if let Some((key, value)) = options.get("allow")? {
        if matches!(listener.address, ListenAddress::Path(_) | ListenAddress::Abstract(_)) {
            return Err(key.invalid("only a listener on an IP address, or systemd, has it"));
        }
        listener.allow = Some(networks(&key, &value)?);
    }
    Ok(listener)
}

/// The global `max_size` as it is now.
fn global_max_size(lua: &Lua) -> Result<usize, Raise> {
    let value: Value = lua.globals().get("max_size")?;
    if value.is_nil() {
        return Ok(DEFAULT_MAX_SIZE);
    }
    let size = Argument::Variable("max_size").number(&value, MIN_MAX_SIZE, MAX_MAX_SIZE)?;
    Ok(size as usize)
}

/// Reads an octal string; a number is refused, because Lua would read it as decimal.
fn mode(key: &Argument<'_>, value: &Value) -> Result<u32, Raise> {
    let parsed = match value {
        Value::String(text) => str::from_utf8(&text.as_bytes())
            .ok()
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| u32::from_str_radix(digits, 8).ok()),
        _ => None,
    };
    parsed
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| key.wrong("an octal string from '0' to '0777', such as '0660'", value))
}

fn owner(key: &Argument<'_>, value: &Value) -> Result<u32, Raise> {
    id(key, value, "user", |name| {
        User::from_name(name).map(|user| user.map(|user| user.uid.as_raw()))
    })
}

fn group(key: &Argument<'_>, value: &Value) -> Result<u32, Raise> {
    id(key, value, "group", |name| {
        Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw()))
    })
}

/// A name's id, or the number itself; (uid_t)-1 means "no change" to chown(2) and is none.
fn id(
    key: &Argument<'_>,
    value: &Value,
    what: &str,
    find: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, Raise> {
    if convert::number(value).is_some() {
        return Ok(key.integer(value, 0, u64::from(u32::MAX - 1))? as u32);
    }
    let text = key.text(value)?;
    let name = String::from_utf8_lossy(&text);
    let invalid = |reason: &str| key.invalid(&format!("{}: {reason}", convert::quoted(&text)));
    match find(&name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(invalid(&format!("there is no such {what}"))),
        Err(error) => Err(invalid(error.desc())),
    }
}

fn networks(key: &Argument<'_>, value: &Value) -> Result<Vec<Network>, Raise> {
    let network = |value: &Value| -> Result<Network, Raise> {
        let text = key.text(value)?;
        let parsed = String::from_utf8_lossy(&text).parse::<Network>();
        parsed.map_err(|error| key.invalid(&format!("{}: {error}", convert::quoted(&text))))
    };
    key.list(value)?.iter().map(network).collect()
}

/// The global `log_server` as it is now.
fn log_server(lua: &Lua) -> Result<Option<Endpoint>, String> {
    let value: Value = lua.globals().get("log_server").map_err(|e| e.to_string())?;
    if value.is_nil() {
        return Ok(None);
    }
    let argument = Argument::Variable("log_server");
    let found = address::endpoints(&argument, &value, POND_PORT, "log_resolve");
    found.map(|list| list.into_iter().next()).map_err(|error| match error {
        Raise::Text(text) => text,
        Raise::Lua(error) => error::describe(&error).0,
    })
}
