//! What a script has declared, for people. Pure.

use std::fmt::Write as _;
use std::time::Duration;

use qrelay_shared::settings::{
    DEFAULT_BACKLOG, DEFAULT_MAX_SIZE, Declaration, ListenAddress, ListenerDecl, Settings,
};

/// The names of users and groups.
pub(super) struct Names {
    /// Returns a user's name, or the number.
    pub(super) user: fn(u32) -> String,
    /// Returns a group's name, or the number.
    pub(super) group: fn(u32) -> String,
}

/// Returns the listeners, and the settings that don't have their defaults, or all settings.
pub(super) fn summary(declaration: &Declaration, names: &Names, all: bool) -> String {
    let mut text = String::new();
    for listener in &declaration.listeners {
        push_listener(&mut text, listener, names, all);
    }
    text.push('\n');
    if let Some(server) = &declaration.log_server {
        push(&mut text, format_args!("log_server = {server}"));
    }
    let defaults = rows(&Settings::default());
    let mut left_out = 0;
    for ((name, value), (_, default)) in rows(&declaration.settings).into_iter().zip(defaults) {
        match (value == default, all) {
            (true, false) => left_out += 1,
            (true, true) => push(&mut text, format_args!("{name} = {value}")),
            (false, _) => push(&mut text, format_args!("{name} = {value} (default {default})")),
        }
    }
    if left_out > 0 {
        push(&mut text, format_args!("{left_out} settings have their defaults (--all shows them)"));
    }
    text
}

/// Adds a line. Writing to a string can't fail.
fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{line}");
}

fn push_listener(text: &mut String, listener: &ListenerDecl, names: &Names, all: bool) {
    let ListenerDecl { address, mode, owner, group, backlog, max_size, .. } = listener;
    push(text, format_args!("listener {address}"));
    if let ListenAddress::Path(_) = address {
        let owner = owner.map_or("the daemon's user".into(), names.user);
        let group = group.map_or("the daemon's group".into(), names.group);
        push(text, format_args!("  mode {mode:04o}, owner {owner}, group {group}"));
    }
    push(text, format_args!("  may connect: {}", clients(listener, names)));
    if *max_size != DEFAULT_MAX_SIZE || all {
        push(text, format_args!("  max_size {}", bytes(*max_size)));
    }
    if *backlog != DEFAULT_BACKLOG || all {
        push(text, format_args!("  backlog {backlog}"));
    }
}

/// Returns who may connect to a listener. Connecting to a socket file needs the right to write it.
fn clients(listener: &ListenerDecl, names: &Names) -> String {
    let ListenerDecl { address, mode, owner, group, allow, .. } = listener;
    match (address, allow) {
        (ListenAddress::Path(_), _) if mode & 0o002 != 0 => "every local user".into(),
        (ListenAddress::Path(_), _) => {
            let owner = (mode & 0o200 != 0).then(|| {
                owner.map_or("the daemon's user".into(), |id| format!("user {}", (names.user)(id)))
            });
            let group = (mode & 0o020 != 0).then(|| {
                group.map_or("the daemon's group".into(), |id| {
                    format!("group {}", (names.group)(id))
                })
            });
            let all: Vec<_> = [owner, group].into_iter().flatten().collect();
            if all.is_empty() { "root only".into() } else { all.join(", ") }
        }
        (ListenAddress::Abstract(_), _) => "every process of the network namespace".into(),
        (_, Some(networks)) if networks.is_empty() => "nobody".into(),
        (_, Some(networks)) => {
            let networks: Vec<_> = networks.iter().map(ToString::to_string).collect();
            networks.join(", ")
        }
        (ListenAddress::Inet(_), None) => "loopback addresses only".into(),
        (ListenAddress::Systemd(_), None) => "whom the socket unit lets connect".into(),
    }
}

/// Returns the settings in the order of the documentation, with units.
pub(super) fn rows(settings: &Settings) -> Vec<(&'static str, String)> {
    let or_none = |name: &Option<String>| name.clone().unwrap_or_else(|| "none".into());
    let unless_zero = |count: u64, zero: &str| match count {
        0 => format!("0 ({zero})"),
        count => count.to_string(),
    };
    vec![
        ("workers", settings.workers.to_string()),
        ("worker_connections", settings.worker_connections.to_string()),
        ("client_timeout", seconds(settings.client_timeout)),
        ("request_timeout", seconds(settings.request_timeout)),
        ("request_min_rate", format!("{} bytes/s", settings.request_min_rate)),
        ("relay_timeout", seconds(settings.relay_timeout)),
        ("handler_timeout", seconds(settings.handler_timeout)),
        ("connect_timeout", seconds(settings.connect_timeout)),
        ("hang_timeout", seconds(settings.hang_timeout)),
        ("drain_timeout", seconds(settings.drain_timeout)),
        ("worker_max_mails", unless_zero(settings.worker_max_mails, "never")),
        ("lua_memory_limit", bytes(settings.lua_memory_limit)),
        ("mail_memory", bytes(settings.mail_memory)),
        ("shared_memory", bytes(settings.shared_memory)),
        ("shared_memory_total", bytes(settings.shared_memory_total)),
        (
            "max_connections_per_uid",
            unless_zero(settings.max_connections_per_uid.into(), "no limit"),
        ),
        ("client_share", settings.client_share.to_string()),
        ("max_hops", settings.max_hops.to_string()),
        ("default_domain", or_none(&settings.default_domain)),
        ("sandbox", settings.sandbox.to_string()),
        ("user", or_none(&settings.user)),
        ("group", or_none(&settings.group)),
    ]
}

fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}

/// Returns a number of bytes, in the largest unit that leaves no fraction.
fn bytes(number: usize) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fitting = |shift: u32| number >= 1 << shift && number.trailing_zeros() >= shift;
    match units.into_iter().find(|(shift, _)| fitting(*shift)) {
        Some((shift, unit)) => format!("{} {unit}", number >> shift),
        None => format!("{number} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lua::library::settings::names;

    const NAMES: Names = Names { user: |id| format!("u{id}"), group: |id| format!("g{id}") };

    fn path(mode: u32, owner: Option<u32>, group: Option<u32>) -> ListenerDecl {
        ListenerDecl {
            address: ListenAddress::Path("/run/in".into()),
            mode,
            owner,
            group,
            backlog: DEFAULT_BACKLOG,
            max_size: DEFAULT_MAX_SIZE,
            allow: None,
        }
    }

    #[test]
    fn who_may_connect() {
        let other = |address, allow: Option<&[&str]>| ListenerDecl {
            address,
            allow: allow.map(|all| all.iter().map(|n| n.parse().expect("network")).collect()),
            ..path(0o666, None, None)
        };
        let inet = || ListenAddress::Inet(([127, 0, 0, 1], 628).into());
        for (listener, expected) in [
            (path(0o666, None, Some(7)), "every local user"),
            (path(0o662, None, None), "every local user"),
            (path(0o664, Some(7), None), "user u7, the daemon's group"),
            (path(0o620, Some(7), Some(8)), "user u7, group g8"),
            (path(0o600, None, Some(8)), "the daemon's user"),
            (path(0o060, Some(7), Some(8)), "group g8"),
            (path(0o444, Some(7), Some(8)), "root only"),
            (
                other(ListenAddress::Abstract(b"x".to_vec()), None),
                "every process of the network namespace",
            ),
            (other(inet(), None), "loopback addresses only"),
            (other(inet(), Some(&["10.0.0.0/8", "::1"])), "10.0.0.0/8, ::1/128"),
            (other(inet(), Some(&[])), "nobody"),
            (other(ListenAddress::Systemd(None), None), "whom the socket unit lets connect"),
        ] {
            assert_eq!(clients(&listener, &NAMES), expected, "{listener:?}");
        }
    }

    #[test]
    fn only_what_differs_is_shown() {
        let listener = ListenerDecl { backlog: 9, ..path(0o640, Some(7), None) };
        let settings = Settings {
            client_timeout: Duration::from_millis(2500),
            lua_memory_limit: 1 << 30,
            shared_memory: 65537,
            user: Some("mail".into()),
            ..Settings::default()
        };
        let declaration =
            Declaration { listeners: vec![listener], settings, ..Declaration::default() };
        assert_eq!(
            summary(&declaration, &NAMES, false),
            "listener /run/in\n  \
               mode 0640, owner u7, group the daemon's group\n  \
               may connect: user u7\n  \
               backlog 9\n\
             \n\
             client_timeout = 2.5 s (default 5 s)\n\
             lua_memory_limit = 1 GiB (default 256 MiB)\n\
             shared_memory = 65537 bytes (default 16 MiB)\n\
             user = mail (default none)\n\
             18 settings have their defaults (--all shows them)\n"
        );
        let all = summary(&declaration, &NAMES, true);
        for part in ["  max_size 16 MiB\n", "\nrelay_timeout = 55 s\n", "\nsandbox = true\n"] {
            assert!(all.contains(part), "{part:?} in {all}");
        }
        assert!(!all.contains("--all"), "{all}");
    }

    #[test]
    fn every_setting_has_a_row() {
        let rows = rows(&Settings::default());
        assert_eq!(rows.iter().map(|(name, _)| *name).collect::<Vec<_>>(), names());
    }
}
