//! `qrelay check`: loads config.lua as a zygote would, and shows what it declares.
//!
//! Contract: nothing is bound, forked or sent. The script's own side effects happen. Outside of
//! systemd every socket of systemd counts as passed.
//!
//! # Failure
//! The script's error, with file and line; or the script takes longer than the daemon would let it.

mod hints;
mod places;
mod summary;

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Group, Uid, User, geteuid};
use qrelay_shared::settings::{Declaration, Settings};
use qrelay_shared::sys::signals::disregard;
use slog::Logger;

use self::hints::hints;
use self::summary::{Names, summary};
use crate::lua::config::ConfigError;
use crate::lua::state::{LoadOptions, Purpose, State};
use crate::process::account;

/// Loads the script at an absolute path. If there is a variable `LISTEN_FDNAMES`, it says which
/// names `systemd['…']` may have, as for the daemon. On `dictionaries` the script gets channels to
/// shared dictionaries, which only this check sees.
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
    let (state, declaration) = State::load(trial_options(config, logger, dictionaries))?;
    if let Some(account) = account::declared(&declaration.settings) {
        account::check(&account)
            .map_err(|message| ConfigError::Declaration { path: config.to_owned(), message })?;
    }
    let mut warnings = state.warnings().to_vec();
    warnings.extend(places::warnings(&declaration));
    let note = geteuid().is_root().then(|| note(&declaration.settings));
    // The script has been read a moment ago; without its text there is nothing to hint at.
    let source = std::fs::read(config).unwrap_or_default();
    let hints = hints(&String::from_utf8_lossy(&source));
    let hints =
        hints.into_iter().map(|(line, hint)| format!("{}:{line}: {hint}", config.display()));
    Ok(Checked { warnings, hints: hints.collect(), note, declaration })
}

/// The result of a check.
pub struct Checked {
    /// What has no effect, or will fail when the daemon starts.
    pub warnings: Vec<String>,
    /// What may be meant otherwise than it works here, each with file and line.
    pub hints: Vec<String>,
    /// What the result doesn't say, if there is something.
    pub note: Option<String>,
    declaration: Declaration,
}

impl Checked {
    /// Returns how many listeners the script has.
    pub fn listeners(&self) -> usize {
        self.declaration.listeners.len()
    }

    /// Returns what the script declares: its listeners, and the settings that don't have their
    /// defaults, or all settings.
    pub fn summary(&self, all: bool) -> String {
        summary(&self.declaration, &Names { user: user_name, group: group_name }, all)
    }
}

fn user_name(id: u32) -> String {
    let user = User::from_uid(Uid::from_raw(id)).ok().flatten();
    user.map_or_else(|| id.to_string(), |user| user.name)
}

fn group_name(id: u32) -> String {
    let group = Group::from_gid(Gid::from_raw(id)).ok().flatten();
    group.map_or_else(|| id.to_string(), |group| group.name)
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

/// Returns what a check by root says about the daemon.
fn note(settings: &Settings) -> String {
    let who = match &settings.user {
        Some(user) => format!("as user '{user}'"),
        None => "as the user that its unit or --user names".to_owned(),
    };
    format!(
        "the script was checked as root, so files that it makes belong to root now, but the daemon \
         runs it {who}, who may not be allowed to read, write or connect to everything that root \
         may: runuser -u USER -- qrelay check shows that"
    )
}
