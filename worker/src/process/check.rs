//! `qrelay check`: loads config.lua as a zygote would, and shows what it declares.
//!
//! Contract: nothing is bound, forked or sent. The script's own side effects happen. Outside of
//! systemd every socket of systemd counts as passed.
//!
//! # Failure
//! The script's error, with file and line; or the script takes longer than the daemon would let it.

use std::fmt::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use qrelay_shared::settings::{Declaration, ListenAddress, ListenerDecl, Settings};
use qrelay_shared::sys::signals::disregard;
use slog::Logger;

use crate::lua::config::ConfigError;
use crate::lua::state::{LoadOptions, Purpose, State};
use crate::process::account;
use crate::process::hints::hints;

/// Loads the script at an absolute path, and describes what the script declares, one line per item.
/// If there is a variable `LISTEN_FDNAMES`, it says which names `systemd['…']` may have, as for the
/// daemon. On `dictionaries` the script gets channels to shared dictionaries, which only this check
/// sees.
///
/// # Errors
/// See [`ConfigError`].
pub fn check(
    config: &Path,
    logger: Logger,
    dictionaries: Option<OwnedFd>,
) -> Result<Checked, ConfigError> {
    // Rust's runtime ignores the signal, and so would the script's programs.
    disregard(Signal::SIGPIPE);
    let (_state, declaration) = State::load(trial_options(config, logger, dictionaries))?;
    if let Some(account) = account::declared(&declaration.settings) {
        account::check(&account)
            .map_err(|message| ConfigError::Declaration { path: config.to_owned(), message })?;
    }
    let note = geteuid().is_root().then(|| note(&declaration.settings));
    // The script has been read a moment ago; without its text there is nothing to hint at.
    let source = std::fs::read(config).unwrap_or_default();
    let hints = hints(&String::from_utf8_lossy(&source));
    let hints =
        hints.into_iter().map(|(line, hint)| format!("{}:{line}: {hint}", config.display()));
    Ok(Checked { text: describe(&declaration), note, hints: hints.collect() })
}

/// Returns how a script is loaded that is only tried.
pub(super) fn trial_options(
    config: &Path,
    logger: Logger,
    dictionaries: Option<OwnedFd>,
) -> LoadOptions {
    let names = std::env::var("LISTEN_FDNAMES").ok();
    let split =
        |names: String| names.split(':').filter(|n| !n.is_empty()).map(str::to_owned).collect();
    LoadOptions {
        config: config.to_owned(),
        reload: false,
        systemd: names.map(split),
        purpose: Purpose::Trial,
        logger,
        dictionaries,
    }
}

/// The result of a check.
pub struct Checked {
    /// What the script declares, one line per item.
    pub text: String,
    /// What may be meant otherwise than it works here, each with file and line.
    pub hints: Vec<String>,
    /// What the result doesn't say, if there is something.
    pub note: Option<String>,
}

/// Returns what a check by root says about the daemon.
fn note(settings: &Settings) -> String {
    let who = match &settings.user {
        Some(user) => format!("as user '{user}'"),
        None => "as the user that its unit or --user names".to_owned(),
    };
    format!(
        "the script was checked as root, but the daemon runs it {who}, who may not be allowed to \
         read, write or connect to everything that root may: runuser -u USER -- qrelay check shows \
         that"
    )
}

fn describe(declaration: &Declaration) -> String {
    let mut text = String::new();
    for listener in &declaration.listeners {
        text.push_str(&listener_line(listener));
    }
    if let Some(server) = &declaration.log_server {
        push(&mut text, "log_server", &server.to_string());
    }
    push_settings(&mut text, &declaration.settings);
    text
}

/// Adds a line. Writing to a string can't fail.
fn push(text: &mut String, name: &str, value: &str) {
    let _ = writeln!(text, "{name} = {value}");
}

fn listener_line(listener: &ListenerDecl) -> String {
    let mut line = format!("listener {}", listener.address);
    if matches!(listener.address, ListenAddress::Path(_)) {
        let _ = write!(line, " mode={:04o}", listener.mode);
    }
    for (name, id) in [("owner", listener.owner), ("group", listener.group)] {
        if let Some(id) = id {
            let _ = write!(line, " {name}={id}");
        }
    }
    if let Some(allow) = &listener.allow {
        let networks: Vec<String> = allow.iter().map(ToString::to_string).collect();
        let _ = write!(line, " allow={}", networks.join(","));
    }
    let _ = writeln!(line, " backlog={} max_size={}", listener.backlog, listener.max_size);
    line
}

fn push_settings(text: &mut String, settings: &Settings) {
    let seconds = |duration: Duration| duration.as_secs_f64().to_string();
    let values = [
        ("workers", settings.workers.to_string()),
        ("worker_connections", settings.worker_connections.to_string()),
        ("client_timeout", seconds(settings.client_timeout)),
        ("request_timeout", seconds(settings.request_timeout)),
        ("request_min_rate", settings.request_min_rate.to_string()),
        ("relay_timeout", seconds(settings.relay_timeout)),
        ("handler_timeout", seconds(settings.handler_timeout)),
        ("connect_timeout", seconds(settings.connect_timeout)),
        ("hang_timeout", seconds(settings.hang_timeout)),
        ("drain_timeout", seconds(settings.drain_timeout)),
        ("worker_max_mails", settings.worker_max_mails.to_string()),
        ("lua_memory_limit", settings.lua_memory_limit.to_string()),
        ("mail_memory", settings.mail_memory.to_string()),
        ("shared_memory", settings.shared_memory.to_string()),
        ("shared_memory_total", settings.shared_memory_total.to_string()),
        ("max_connections_per_uid", settings.max_connections_per_uid.to_string()),
        ("client_share", settings.client_share.to_string()),
        ("max_hops", settings.max_hops.to_string()),
        ("sandbox", settings.sandbox.to_string()),
    ];
    for (name, value) in values {
        push(text, name, &value);
    }
    for (name, value) in [
        ("default_domain", &settings.default_domain),
        ("user", &settings.user),
        ("group", &settings.group),
    ] {
        if let Some(value) = value {
            push(text, name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_listeners_and_settings() {
        let path = ListenerDecl {
            address: ListenAddress::Path("/run/in".into()),
            mode: 0o640,
            owner: Some(7),
            group: None,
            backlog: 9,
            max_size: 1024,
            allow: None,
        };
        let inet = ListenerDecl {
            address: ListenAddress::Inet(([127, 0, 0, 1], 628).into()),
            allow: Some(vec!["10.0.0.0/8".parse().expect("network")]),
            owner: None,
            ..path
        };
        let settings =
            Settings { client_timeout: Duration::from_millis(2500), ..Settings::default() };
        let declaration =
            Declaration { listeners: vec![path, inet], settings, ..Declaration::default() };
        let text = describe(&declaration);
        assert!(
            text.starts_with(
                "listener /run/in mode=0640 owner=7 backlog=9 max_size=1024\n\
                 listener 127.0.0.1:628 allow=10.0.0.0/8 backlog=9 max_size=1024\n\
                 workers = "
            ),
            "{text}"
        );
        assert!(text.contains("\nclient_timeout = 2.5\n"), "{text}");
        assert!(text.ends_with("max_hops = 50\nsandbox = true\n"), "{text}");
    }
}
