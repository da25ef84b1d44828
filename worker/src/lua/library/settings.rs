//! `settings{…}`: the table's keys into [`Settings`].
//!
//! Contract: each key has one row in `KEYS`, with its limits.
//!
//! # Failure
//! An unknown key, a wrong type or a value out of range raises an error that names the key.
//! [`consistent`] checks values against each other.

use std::time::Duration;

use mlua::{Table, Value};
use qrelay_shared::address::{MAX_ADDRESS, is_domain};
use qrelay_shared::settings::{
    ListenerDecl, MAX_DURATION, MAX_MEMORY, MAX_WORKER_CONNECTIONS, MAX_WORKERS, Settings,
};

use crate::lua::binding::convert::{self, Argument};
use crate::lua::binding::error::Raise;

/// Integers up to here are the same in Lua's integers and floats.
const MAX_INTEGER: u64 = 1 << 53;
/// Smallest memory for Lua: its libraries and a small script need some 0.3 MiB.
const MIN_LUA_MEMORY: u64 = 1 << 20;
/// Largest id of a user or group. The next one, (uid_t)-1, means "no change" to setresuid(2).
const MAX_ID: u64 = u32::MAX as u64 - 1;
/// Longest default domain in bytes, so that some local part fits in front of it.
const MAX_DOMAIN: usize = MAX_ADDRESS - "a@".len();
/// Bytes of a request beside its message (see the limits of QMQP in the documentation).
const ENVELOPE: usize = 300_000;

/// How a key's value is read, and where it is.
enum Kind {
    Duration(fn(&mut Settings) -> &mut Duration),
    Small(u64, u64, fn(&mut Settings) -> &mut u32),
    Count(u64, fn(&mut Settings) -> &mut u64),
    Bytes(u64, fn(&mut Settings) -> &mut usize),
    Share(fn(&mut Settings) -> &mut f64),
    Switch(fn(&mut Settings) -> &mut bool),
    Name(fn(&mut Settings) -> &mut Option<String>),
    Domain(fn(&mut Settings) -> &mut Option<String>),
}

/// The settings, in the order of the documentation.
const KEYS: &[(&str, Kind)] = &[
    ("workers", Kind::Small(1, MAX_WORKERS as u64, |s| &mut s.workers)),
    (
        "worker_connections",
        Kind::Small(1, MAX_WORKER_CONNECTIONS as u64, |s| &mut s.worker_connections),
    ),
    ("client_timeout", Kind::Duration(|s| &mut s.client_timeout)),
    ("request_timeout", Kind::Duration(|s| &mut s.request_timeout)),
    ("request_min_rate", Kind::Count(MAX_INTEGER, |s| &mut s.request_min_rate)),
    ("relay_timeout", Kind::Duration(|s| &mut s.relay_timeout)),
    ("handler_timeout", Kind::Duration(|s| &mut s.handler_timeout)),
    ("connect_timeout", Kind::Duration(|s| &mut s.connect_timeout)),
    ("hang_timeout", Kind::Duration(|s| &mut s.hang_timeout)),
    ("drain_timeout", Kind::Duration(|s| &mut s.drain_timeout)),
    ("worker_max_mails", Kind::Count(MAX_INTEGER, |s| &mut s.worker_max_mails)),
    ("lua_memory_limit", Kind::Bytes(MIN_LUA_MEMORY, |s| &mut s.lua_memory_limit)),
    ("mail_memory", Kind::Bytes(1 << 20, |s| &mut s.mail_memory)),
    ("shared_memory", Kind::Bytes(1 << 16, |s| &mut s.shared_memory)),
    ("shared_memory_total", Kind::Bytes(1 << 16, |s| &mut s.shared_memory_total)),
    ("max_connections_per_uid", Kind::Small(0, 1 << 20, |s| &mut s.max_connections_per_uid)),
    ("client_share", Kind::Share(|s| &mut s.client_share)),
    ("max_hops", Kind::Small(1, 1000, |s| &mut s.max_hops)),
    ("default_domain", Kind::Domain(|s| &mut s.default_domain)),
    ("sandbox", Kind::Switch(|s| &mut s.sandbox)),
    ("user", Kind::Name(|s| &mut s.user)),
    ("group", Kind::Name(|s| &mut s.group)),
];

/// Global variables that one may take for settings.
const GLOBALS: [&str; 2] = ["max_size", "log_server"];

/// Copies the keys of the table that a script passes to `settings`. After an error `settings` must
/// not be used.
///
/// # Errors
/// See the module.
pub(crate) fn apply(table: &Table, settings: &mut Settings) -> Result<(), Raise> {
    for pair in table.pairs::<Value, Value>() {
        let (key, value) = pair?;
        let name = key.as_string().map(mlua::LuaString::to_string_lossy).unwrap_or_default();
        if GLOBALS.contains(&&*name) {
            return Err(format!(
                "{name} is no setting but a global variable: write {name} = … in front of \
                 qmqp_listen"
            )
            .into());
        }
        let Some((name, kind)) = KEYS.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
            return Err(convert::unknown_name("settings", "key", &key, &known).into());
        };
        set(&Argument::Option { function: "settings", key: name }, kind, &value, settings)?;
    }
    Ok(())
}

/// Returns the names of all settings.
#[cfg(test)]
pub(crate) fn names() -> Vec<&'static str> {
    KEYS.iter().map(|(name, _)| *name).collect()
}

/// Returns the names that are unlikely to be a script's own variables.
pub(crate) fn plain_names() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|(name, _)| *name).filter(|name| name.contains('_') || *name == "workers")
}

fn set(
    argument: &Argument<'_>,
    kind: &Kind,
    value: &Value,
    settings: &mut Settings,
) -> Result<(), Raise> {
    match kind {
        Kind::Duration(field) => {
            *field(settings) = argument.duration(value, MAX_DURATION.as_secs_f64())?;
        }
        Kind::Small(min, max, field) => {
            *field(settings) = argument.integer(value, *min, *max)? as u32;
        }
        Kind::Count(max, field) => *field(settings) = argument.integer(value, 0, *max)?,
        Kind::Bytes(min, field) => {
            *field(settings) = argument.integer(value, *min, MAX_MEMORY as u64)? as usize;
        }
        Kind::Share(field) => {
            let share = argument.number(value, 0.0, 1.0)?;
            if share == 0.0 {
                return Err(argument.wrong("a number above 0, at most 1", value));
            }
            *field(settings) = share;
        }
        Kind::Switch(field) => match value {
            Value::Boolean(on) => *field(settings) = *on,
            _ => return Err(argument.wrong("true or false", value)),
        },
        Kind::Name(field) => *field(settings) = Some(name(argument, value)?),
        Kind::Domain(field) => *field(settings) = Some(domain(argument, value)?),
    }
    Ok(())
}

/// Reads the name of a user or group, or its number.
fn name(argument: &Argument<'_>, value: &Value) -> Result<String, Raise> {
    if matches!(value, Value::Integer(_) | Value::Number(_)) {
        return Ok(argument.integer(value, 0, MAX_ID)?.to_string());
    }
    let text = argument.text(value)?;
    match std::str::from_utf8(&text) {
        Ok(name) if !name.is_empty() && !name.contains('\0') => Ok(name.to_owned()),
        _ => Err(argument.wrong("a name or a number", value)),
    }
}

/// Reads the domain of an address.
fn domain(argument: &Argument<'_>, value: &Value) -> Result<String, Raise> {
    let text = argument.text(value)?;
    match std::str::from_utf8(&text) {
        Ok(domain) if domain.len() <= MAX_DOMAIN && is_domain(&text) => Ok(domain.to_owned()),
        _ => Err(argument.wrong("a domain, such as example.com", value)),
    }
}

/// Whether the table that a script passes to `settings` has the key `mail_memory`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn has_mail_memory(table: &Table) -> Result<bool, Raise> {
    Ok(!table.raw_get::<Value>("mail_memory")?.is_nil())
}

/// Raises `mail_memory`, unless the script has set it, to the need of the listeners.
pub(crate) fn fit_mail_memory(settings: &mut Settings, listeners: &[ListenerDecl]) {
    let largest = listeners.iter().map(|listener| listener.max_size).max().unwrap_or_default();
    settings.mail_memory = settings.mail_memory.max(largest + ENVELOPE);
}

/// Checks the final values against each other and against the listeners.
///
/// # Errors
/// A text that names the settings.
pub(crate) fn consistent(settings: &Settings, listeners: &[ListenerDecl]) -> Result<(), String> {
    let Settings { handler_timeout, hang_timeout, mail_memory, .. } = settings;
    if settings.group.is_some() && settings.user.is_none() {
        return Err("settings: group needs user, because only together they say who runs".into());
    }
    if hang_timeout <= handler_timeout {
        return Err(format!(
            "settings: hang_timeout ({} s) must be longer than handler_timeout ({} s), or every \
             handler that is too slow costs its worker",
            hang_timeout.as_secs_f64(),
            handler_timeout.as_secs_f64()
        ));
    }
    let largest = listeners.iter().map(|listener| listener.max_size).max().unwrap_or_default();
    if *mail_memory < largest + ENVELOPE {
        return Err(format!(
            "settings: mail_memory ({mail_memory} bytes) must be at least max_size + {ENVELOPE} \
             ({} bytes), or the largest mails never fit",
            largest + ENVELOPE
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The manual page qrelay-config(5) is made of the same file.
    #[test]
    fn the_documentation_has_every_setting() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(page).expect("the documentation");
        let section = page.split("\n## ").find(|part| part.starts_with("Settings\n"));
        let rows = section.expect("a section").lines().skip_while(|line| !line.starts_with("### "));
        // The sandbox has a table of its own behind the settings.
        let rows = rows.take_while(|line| !line.starts_with("#### "));
        let mut documented: Vec<&str> =
            rows.filter_map(|row| row.strip_prefix("| `")?.split('`').next()).collect();
        let mut known: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
        documented.sort_unstable();
        known.sort_unstable();
        assert_eq!(documented, known);
    }

    #[test]
    fn the_default_memory_for_mails_follows_the_largest_mail() {
        let listener = |max_size| ListenerDecl {
            address: qrelay_shared::settings::ListenAddress::Abstract(b"x".to_vec()),
            mode: 0,
            owner: None,
            group: None,
            backlog: 1,
            max_size,
            allow: None,
        };
        let mut settings = Settings::default();
        fit_mail_memory(&mut settings, &[listener(1 << 20)]);
        assert_eq!(settings, Settings::default());
        let large = [listener(1 << 30)];
        fit_mail_memory(&mut settings, &large);
        assert!(consistent(&settings, &large).is_ok());
        settings.mail_memory -= 1;
        assert!(consistent(&settings, &large).is_err());
    }
}
