//! Landlock: what zygote and workers forbid themselves for ever.
//!
//! A zygote enters a domain after it has run the script, and each worker enters a domain of its own
//! inside that one. A process traces, reads by `/proc/PID/mem` and the like, and signals only
//! processes of its own domain and of domains inside it: the programs that it has started. A
//! standby stays in its zygote's domain, because the kernel allows only 16 domains inside each
//! other, and a standby is forked by a standby. Files and abstract sockets stay as they are.
//!
//! Contract: the calling process has a single thread, because a domain is a thread's. Entering sets
//! `no_new_privs`, so no program gets rights by a set-user-id or set-group-id bit.
//!
//! # Failure
//! What the kernel lacks is a lower level of [`Sandbox`]. A worker that can't enter its zygote's
//! level must not serve.

use landlock::{
    AccessFs, CompatLevel, Compatible as _, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, Scope,
};
use qrelay_shared::settings::Sandbox;

/// Enters the strictest domain that the kernel has, and returns its level.
///
/// # Errors
/// The kernel has Landlock, and refuses the domain: out of memory, or too many domains inside each
/// other.
pub(super) fn enter() -> Result<Sandbox, String> {
    for (level, domain) in [(Sandbox::Full, full as Domain), (Sandbox::PtraceOnly, ptrace_only)] {
        match domain() {
            Ok(()) => return Ok(level),
            Err(error) if unsupported(&error) => {}
            Err(error) => return Err(format!("Landlock: {error}")),
        }
    }
    nothing().map_err(|error| format!("Landlock: {error}"))
}

/// Enters a further domain of the level that a zygote has reached.
///
/// # Errors
/// The kernel refuses what it has allowed to the zygote.
pub(super) fn enter_own(level: Sandbox) -> Result<(), String> {
    match level {
        Sandbox::Full => full(),
        Sandbox::PtraceOnly => ptrace_only(),
        Sandbox::Off | Sandbox::TooOld | Sandbox::Missing => Ok(()),
    }
    .map_err(|error| format!("Landlock: {error}"))
}

type Domain = fn() -> Result<(), RulesetError>;

/// Forbids to trace and to signal processes outside (Landlock ABI 6).
fn full() -> Result<(), RulesetError> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.scope(Scope::Signal)?.create()?.restrict_self().map(drop)
}

/// Forbids to trace processes outside (Landlock ABI 2). A domain must handle some right: this one
/// handles renames from one directory to another, and allows them everywhere.
fn ptrace_only() -> Result<(), RulesetError> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let created = ruleset.handle_access(AccessFs::Refer)?.create()?;
    match PathFd::new("/") {
        Ok(root) => created.add_rule(PathBeneath::new(root, AccessFs::Refer))?,
        // Without the rule renames would fail, but tracing is forbidden all the same.
        Err(_) => created,
    }
    .restrict_self()
    .map(drop)
}

/// Enters no domain, and returns why not. Sets `no_new_privs` like every level.
fn nothing() -> Result<Sandbox, RulesetError> {
    let status = Ruleset::default().scope(Scope::Signal)?.create()?.restrict_self()?;
    Ok(match status.landlock {
        LandlockStatus::Available { .. } => Sandbox::TooOld,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => Sandbox::Missing,
    })
}

/// Whether the kernel doesn't know what was asked for.
fn unsupported(error: &RulesetError) -> bool {
    matches!(error, RulesetError::Scope(_) | RulesetError::HandleAccesses(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::sys::signal::kill;
    use nix::unistd::Pid;
    use std::process::{Child, Command};

    /// What a thread in a domain may do to a process outside and to a program of its own.
    #[derive(Debug, PartialEq, Eq)]
    struct May {
        trace: [bool; 2],
        signal: [bool; 2],
        rename: bool,
    }

    fn sleeper() -> Child {
        Command::new("/bin/sleep").arg("60").spawn().expect("spawn")
    }

    fn traces(child: &Child) -> bool {
        std::fs::File::open(format!("/proc/{}/mem", child.id())).is_ok()
    }

    fn signals(child: &Child) -> bool {
        match kill(Pid::from_raw(child.id().cast_signed()), None) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error, Errno::EPERM);
                false
            }
        }
    }

    fn renames() -> bool {
        let (from, to) =
            (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
        std::fs::write(from.path().join("a"), "").expect("write");
        std::fs::rename(from.path().join("a"), to.path().join("a")).is_ok()
    }

    /// Tries everything in a thread that has entered the domain. The thread alone is in it.
    fn try_in(domain: Domain) -> Option<May> {
        let mut outside = sleeper();
        let tried = std::thread::scope(|scope| {
            let tried = scope.spawn(|| {
                if let Err(error) = domain() {
                    assert!(unsupported(&error), "{error}");
                    return None;
                }
                let mut own = sleeper();
                let may = May {
                    trace: [traces(&outside), traces(&own)],
                    signal: [signals(&outside), signals(&own)],
                    rename: renames(),
                };
                own.kill().expect("kill");
                own.wait().expect("wait");
                Some(may)
            });
            tried.join().expect("no panic")
        });
        outside.kill().expect("kill");
        outside.wait().expect("wait");
        tried
    }

    #[test]
    fn a_full_domain_forbids_to_trace_and_to_signal_others() {
        let may = May { trace: [false, true], signal: [false, true], rename: true };
        assert!(try_in(full).is_none_or(|found| found == may));
        assert!(try_in(|| Ok(())).is_some_and(|found| found != may), "without a domain");
    }

    #[test]
    fn an_older_domain_forbids_to_trace_others() {
        let may = May { trace: [false, true], signal: [true, true], rename: true };
        assert!(try_in(ptrace_only).is_none_or(|found| found == may));
    }

    #[test]
    fn a_level_can_be_entered_again() {
        let level = std::thread::spawn(|| {
            let level = enter().expect("a level");
            enter_own(level).map(|()| level)
        });
        let level = level.join().expect("no panic").expect("the same level again");
        assert_ne!(level, Sandbox::Off);
        assert_eq!(level == Sandbox::Full, try_in(full).is_some());
    }
}
