//! `qrelay try`: asks the script about a mail, and shows its decision.
//!
//! # Failure
//! The exit status tells what is wrong: 64 the mail can't come in this way, 78 the script can't be
//! used or its handler has failed, 75 the same if trying again later may help, 1 the action is
//! another one than was expected.

use std::io::Read as _;
use std::net::IpAddr;

use nix::unistd::{Group, Uid, User};
use qrelay_shared::exit::Exit;
use qrelay_shared::system_error::shown;
use qrelay_supervisor::services::dictionary_server;
use qrelay_worker::process::trial::{LoadFailed, Report, Trial, TrialClient, TrialMail};

use crate::output::print;
use crate::script::Script;

/// Largest id of a user or group. The next one, (uid_t)-1, is none.
const MAX_ID: u32 = u32::MAX - 1;

/// Ask the script about the mail that is read from standard input, and print its decision; relay
/// nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  qrelay try --config ./config.lua --uid 1000 --sender a@example.com b@example.org < mail

Exit status: 0 the handler has decided, 1 not as --expect says, 64 usage,
75 the script can't be used now, 78 the script can't be used or its handler has failed.")]
pub struct Args {
    /// The client's user, name or number [default: the caller].
    #[arg(long, value_name = "USER", value_parser = user)]
    uid: Option<Owner>,
    /// The client's group, name or number [default: the user's own].
    #[arg(long, value_name = "GROUP", value_parser = group)]
    gid: Option<u32>,
    /// The client's process [default: this command].
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// The client's control group, as in /proc/PID/cgroup [default: the process' own].
    #[arg(long, value_name = "PATH", value_parser = cgroup)]
    cgroup: Option<String>,
    /// The client's IP address, for a listener on a TCP port or of systemd.
    #[arg(long, value_name = "IP", conflicts_with_all = ["uid", "gid", "pid", "cgroup"])]
    peer: Option<IpAddr>,
    /// The listener that the mail comes through, by its address [default: the first].
    #[arg(long, value_name = "ADDRESS")]
    listener: Option<String>,
    /// Envelope sender ('' for a bounce).
    #[arg(long)]
    sender: String,
    /// Fail unless this is the action.
    #[arg(
        long, value_name = "ACTION",
        value_parser = ["connect", "reject", "defer", "discard", "exec", "exec_raw"]
    )]
    expect: Option<String>,
    /// Print the decision as a JSON object.
    #[arg(long)]
    json: bool,
    /// Envelope recipients.
    #[arg(required = true, value_name = "RECIPIENT")]
    recipients: Vec<String>,
}

/// A user, and the group that a process of this user has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: u32,
}

/// Runs the command.
pub fn run(script: &Script, args: Args) -> Exit {
    let mut message = Vec::new();
    if let Err(error) = std::io::stdin().lock().read_to_end(&mut message) {
        eprintln!("qrelay: can't read the message from stdin: {}", shown(&error));
        return Exit::System;
    }
    let Args { uid, gid, pid, cgroup, peer, listener, sender, expect, json, recipients } = args;
    let gid = gid.or(uid.map(|owner| owner.gid));
    let client = TrialClient { uid: uid.map(|owner| owner.uid), gid, pid, cgroup, peer };
    let mail = TrialMail { client, listener, sender, recipients, message };
    let limit = script.limit();
    let trial = Trial::load(&script.config, script.level, dictionary_server::alone());
    drop(limit);
    let trial = match trial {
        Ok(trial) => trial,
        Err(LoadFailed { error, log }) => {
            log.iter().for_each(|record| eprintln!("qrelay: log: {record}"));
            eprintln!("qrelay: {}", shown(&error));
            return if error.may_pass() { Exit::Temporary } else { Exit::Config };
        }
    };
    match trial.ask(&mail) {
        Ok(report) => {
            let printed = print(&if json { report.json() } else { report.to_string() });
            match judge(&report, expect.as_deref()) {
                Exit::Success => printed,
                exit => exit,
            }
        }
        Err(error) => {
            eprintln!("qrelay: {error}");
            Exit::Usage
        }
    }
}

/// Returns the exit status for a report.
fn judge(report: &Report, expected: Option<&str>) -> Exit {
    if report.error.is_some() {
        return Exit::Config;
    }
    match expected {
        Some(expected) if report.action != Some(expected) => {
            let got = report.action.map_or("there is no action".to_owned(), |action| {
                format!("the action is {action}")
            });
            eprintln!("qrelay: expected {expected}, but {got}");
            Exit::Refused
        }
        _ => Exit::Success,
    }
}

fn user(text: &str) -> Result<Owner, String> {
    let entry = match id(text) {
        Some(id) => User::from_uid(Uid::from_raw(id)),
        None => User::from_name(text),
    };
    match (entry.map_err(|error| error.desc())?, id(text)) {
        (Some(entry), _) => Ok(Owner { uid: entry.uid.as_raw(), gid: entry.gid.as_raw() }),
        // A user's own group usually has the user's number.
        (None, Some(id)) => Ok(Owner { uid: id, gid: id }),
        (None, None) => Err("there is no such user".to_owned()),
    }
}

fn group(text: &str) -> Result<u32, String> {
    if let Some(id) = id(text) {
        return Ok(id);
    }
    match Group::from_name(text).map_err(|error| error.desc())? {
        Some(group) => Ok(group.gid.as_raw()),
        None => Err("there is no such group".to_owned()),
    }
}

fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

fn cgroup(text: &str) -> Result<String, String> {
    match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err("expected a path from the root of the control groups, such as /a/b".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_have_names_and_numbers() {
        let nobody = User::from_name("nobody").ok().flatten().expect("nobody");
        let owner = Owner { uid: nobody.uid.as_raw(), gid: nobody.gid.as_raw() };
        assert_eq!(user("nobody"), Ok(owner));
        assert_eq!(user(&owner.uid.to_string()), Ok(owner));
        assert_eq!(user("4294967293"), Ok(Owner { uid: 4294967293, gid: 4294967293 }));
        assert_eq!(user("4294967295"), Err("there is no such user".to_owned()));
        assert_eq!(group("root"), Ok(0));
        assert_eq!(group("77"), Ok(77));
        assert_eq!(group("-1"), Err("there is no such group".to_owned()));
    }
}
