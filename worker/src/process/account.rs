//! Changing from root to the user that zygote and workers are to be.
//!
//! Contract: real, effective and saved ids, and the supplementary groups, are the account's
//! afterwards, no capability is left, and there is no way back. All of that is verified.
//!
//! # Failure
//! A text for the administrator: the account doesn't exist, the process isn't root, or the kernel
//! has done something else than it was asked for. The caller must end then.

use std::ffi::CString;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::unistd::{
    Gid, Group, Uid, User, getegid, geteuid, getgrouplist, getgroups, getresgid, getresuid,
    seteuid, setgroups, setresgid, setresuid,
};
use qrelay_shared::settings::{Account, Settings};

/// The ids of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ids {
    user: Uid,
    group: Gid,
    groups: Vec<Gid>,
}

/// Returns the account that a script's settings name.
pub(super) fn declared(settings: &Settings) -> Option<Account> {
    settings.user.clone().map(|user| Account { user, group: settings.group.clone() })
}

/// Says whether the account can be used.
///
/// # Errors
/// See the module.
pub(super) fn check(account: &Account) -> Result<(), String> {
    resolve(account).map(drop)
}

/// Becomes the account, for ever. Returns the user id and the group id, or `None` if the process
/// was the account already. The process stays dumpable: it reads its own files in /proc, and the
/// supervisor, which may be no more than the same user, reads which mail a program has.
///
/// A change of the user takes the signal at the parent's end away (prctl(2)).
///
/// # Errors
/// See the module.
pub(super) fn become_account(account: &Account) -> Result<Option<(u32, u32)>, String> {
    let ids = resolve(account)?;
    if !geteuid().is_root() {
        return match (geteuid(), getegid()) == (ids.user, ids.group) {
            true => Ok(None),
            false => Err(format!(
                "user '{}': only root can change to it, and this process has the user id {} and \
                 the group id {}",
                account.user,
                geteuid(),
                getegid()
            )),
        };
    }
    let failed = |what: &'static str| {
        move |error: Errno| format!("user '{}': {what}: {}", account.user, error.desc())
    };
    setgroups(&ids.groups).map_err(failed("setgroups"))?;
    setresgid(ids.group, ids.group, ids.group).map_err(failed("setresgid"))?;
    setresuid(ids.user, ids.user, ids.user).map_err(failed("setresuid"))?;
    verify(&ids).map_err(|what| format!("user '{}': {what}", account.user))?;
    prctl::set_dumpable(true).map_err(failed("PR_SET_DUMPABLE"))?;
    Ok(Some((ids.user.as_raw(), ids.group.as_raw())))
}

/// Looks the account up.
fn resolve(account: &Account) -> Result<Ids, String> {
    let Account { user: name, group } = account;
    let entry = match name.parse() {
        Ok(id) => User::from_uid(Uid::from_raw(id)),
        Err(_) => User::from_name(name),
    }
    .map_err(|error| format!("user '{name}': {}", error.desc()))?;
    let user = match (&entry, name.parse()) {
        (Some(entry), _) => entry.uid,
        (None, Ok(id)) => Uid::from_raw(id),
        (None, Err(_)) => return Err(format!("user '{name}': there is no such user")),
    };
    if user.is_root() {
        return Err(format!("user '{name}' is root: leave it out, or name another user"));
    }
    let group = match (group, &entry) {
        (Some(group), _) => group_id(group)?,
        (None, Some(entry)) => entry.gid,
        (None, None) => {
            return Err(format!("user '{name}' isn't in the user database: name a group, too"));
        }
    };
    let groups = match entry {
        Some(entry) => {
            let name = CString::new(entry.name).unwrap_or_default();
            getgrouplist(&name, group).map_err(|error| format!("getgrouplist: {}", error.desc()))?
        }
        None => vec![group],
    };
    Ok(Ids { user, group, groups })
}

fn group_id(name: &str) -> Result<Gid, String> {
    if let Ok(id) = name.parse() {
        return Ok(Gid::from_raw(id));
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(format!("group '{name}': there is no such group")),
        Err(error) => Err(format!("group '{name}': {}", error.desc())),
    }
}

/// Checks that the process is what it was to become, and can't go back.
fn verify(ids: &Ids) -> Result<(), &'static str> {
    let users = getresuid().map_err(|_| "getresuid failed")?;
    if [users.real, users.effective, users.saved] != [ids.user; 3] {
        return Err("the user ids are others");
    }
    let groups = getresgid().map_err(|_| "getresgid failed")?;
    if [groups.real, groups.effective, groups.saved] != [ids.group; 3] {
        return Err("the group ids are others");
    }
    if sorted(getgroups().map_err(|_| "getgroups failed")?) != sorted(ids.groups.clone()) {
        return Err("the supplementary groups are others");
    }
    if seteuid(Uid::from_raw(0)) != Err(Errno::EPERM) {
        return Err("the process can become root again");
    }
    let status = std::fs::read_to_string("/proc/self/status").map_err(|_| "/proc can't be read")?;
    match without_capabilities(&status) {
        true => Ok(()),
        false => Err("capabilities are left"),
    }
}

fn sorted(groups: Vec<Gid>) -> Vec<u32> {
    let mut groups: Vec<_> = groups.into_iter().map(Gid::as_raw).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// Whether this file `status` of /proc shows no capability in force, usable, or kept over exec.
fn without_capabilities(status: &str) -> bool {
    let none = |name| {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        value.is_some_and(|value| value.trim().bytes().all(|digit| digit == b'0'))
    };
    none("CapEff:") && none("CapPrm:") && none("CapAmb:")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(user: &str, group: Option<&str>) -> Account {
        Account { user: user.into(), group: group.map(str::to_owned) }
    }

    #[test]
    fn accounts_are_found_by_name_and_by_number() {
        let nobody = User::from_name("nobody").ok().flatten().expect("nobody");
        let number = nobody.uid.to_string();
        let by_name = resolve(&account("nobody", None)).expect("by name");
        assert_eq!((by_name.user, by_name.group), (nobody.uid, nobody.gid));
        assert_eq!(resolve(&account(&number, None)), Ok(by_name));
        let with_group = resolve(&account("nobody", Some("root"))).expect("with a group");
        assert_eq!(with_group.group, Gid::from_raw(0));
        let unknown = resolve(&account("4294967293", Some("77"))).expect("a number");
        assert_eq!((unknown.user, unknown.groups), (Uid::from_raw(4294967293), vec![77.into()]));
    }

    #[test]
    fn accounts_that_cannot_be_used() {
        for (user, group, error) in [
            ("no-such-user", None, "user 'no-such-user': there is no such user"),
            ("nobody", Some("no-such-group"), "group 'no-such-group': there is no such group"),
            ("root", None, "user 'root' is root: leave it out, or name another user"),
            ("0", None, "user '0' is root: leave it out, or name another user"),
            ("4294967293", None, "user '4294967293' isn't in the user database: name a group, too"),
        ] {
            assert_eq!(resolve(&account(user, group)), Err(error.to_owned()));
        }
    }

    #[test]
    fn every_set_of_capabilities_counts() {
        let status = |eff, prm, amb| format!("CapEff:\t{eff}\nCapPrm:\t{prm}\nCapAmb:\t{amb}\n");
        assert!(without_capabilities(&status("0000", "0000", "0000")));
        for (eff, prm, amb) in [("1", "0", "0"), ("0", "80", "0"), ("0", "0", "0400")] {
            assert!(!without_capabilities(&status(eff, prm, amb)));
        }
        assert!(!without_capabilities(""));
    }
}
