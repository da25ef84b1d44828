//! What separates the processes of a generation from all others, put into the log; and the
//! supervisor's own rights, once its workers are another user's.
//!
//! # Failure
//! Capabilities that can't be given up stay, and the log says so.

use nix::sys::prctl::get_no_new_privs;
use nix::unistd::geteuid;
use qrelay_shared::settings::{Sandbox, Separation};
use qrelay_shared::sys::capability::{Capability, keep_only};
use slog::{Logger, info, warn};

/// What the supervisor needs when its workers are another user's: to make sockets where the script
/// wants them, with the owner and mode that it wants, and to signal and look at processes.
const NEEDED: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Kill,
    Capability::NetBindService,
    Capability::SysPtrace,
];

/// What a zygote needs to become another user. A zygote is root when it is executed, so it gets the
/// capabilities from the kernel. With `no_new_privs` it gets only those that the supervisor has.
const CHANGE_USER: &[Capability] = &[Capability::SetGid, Capability::SetUid];

/// The lines that are logged once in the supervisor's life.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    lack: bool,
    root: bool,
    reduced: bool,
}

impl Announcements {
    /// Says what a generation that serves from now on lacks, and gives up what the supervisor
    /// needs no longer.
    pub(super) fn switch(&mut self, log: &Logger, separation: Separation) {
        self.sandbox(log, separation);
        if !geteuid().is_root() {
            return;
        }
        match separation.user {
            Some(_) if !std::mem::replace(&mut self.reduced, true) => reduce(log),
            None if !std::mem::replace(&mut self.root, true) => {
                warn!(
                    log,
                    "zygote, workers and programs run as root: \
                    name a user, by --user or in settings{{}}"
                );
            }
            _ => {}
        }
    }

    fn sandbox(&mut self, log: &Logger, separation: Separation) {
        let sandbox = separation.sandbox;
        if sandbox == Sandbox::Off {
            warn!(
                log,
                "the sandbox is off (sandbox=false in settings{{}}): \
                a worker can signal and trace other processes of its user"
            );
        }
        if let Some(lack) = separation.lack().filter(|_| !std::mem::replace(&mut self.lack, true)) {
            warn!(log, "the sandbox is not complete: {lack}"; "sandbox" => sandbox.level());
        }
    }
}

fn reduce(log: &Logger) {
    let inherited = if get_no_new_privs() == Ok(true) { CHANGE_USER } else { &[] };
    match keep_only(&[NEEDED, inherited].concat()) {
        Ok(kept) => {
            let names: Vec<_> = kept.into_iter().map(Capability::name).collect();
            info!(log, "the supervisor keeps root's user id and these capabilities";
                "capabilities" => names.join(","));
        }
        Err(error) => warn!(log, "the supervisor keeps all capabilities"; "error" => error.desc()),
    }
}
