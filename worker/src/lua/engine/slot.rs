//! The place of a mail while its handler runs.
//!
//! Contract: the thread that runs the handler puts the mail in and takes it back afterwards,
//! without needing Lua. From then on the slot is empty for every object that still refers to it.
//! Nothing is asked of Lua while the slot is locked: making a string may run a finalizer of the
//! script, which may use the same mail.
//!
//! # Failure
//! An empty slot raises `Stale object`.

use std::sync::Arc;

use parking_lot::Mutex;
use qrelay_shared::ipc::message::MailId;

use crate::client::cgroup::Cgroup;
use crate::lua::binding::error::Raise;
use crate::mail::Mail;

/// The place of a mail while its handler runs. An empty slot is small, because it stays until Lua
/// collects the mail object, and Lua doesn't count its memory.
#[derive(Debug)]
pub(crate) struct Slot(Mutex<Option<Content>>);

/// A mail and what belongs to it while its handler runs.
#[derive(Debug)]
struct Content {
    mail: Box<Mail>,
    /// The control groups that the script has asked for, the client's own first.
    cgroups: Vec<Cgroup>,
}

impl Slot {
    /// Puts the mail in.
    pub(crate) fn new(mail: Box<Mail>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Content { mail, cgroups: Vec::new() }))))
    }

    /// Takes the mail out. The mail object is stale from now on, and the groups' directories are
    /// closed.
    pub(crate) fn take(&self) -> Option<Box<Mail>> {
        self.0.lock().take().map(|held| held.mail)
    }

    /// The mail's id.
    pub(crate) fn id(&self) -> Option<MailId> {
        self.0.lock().as_ref().map(|held| held.mail.id())
    }

    /// Works on the mail and its control groups. `f` must not call Lua, which could call for this
    /// mail.
    ///
    /// # Errors
    /// The error of `f`, or `Stale object` if the mail is gone.
    pub(crate) fn with<R>(
        &self,
        f: impl FnOnce(&mut Mail, &mut Vec<Cgroup>) -> Result<R, Raise>,
    ) -> Result<R, Raise> {
        let mut held = self.0.lock();
        let held = held.as_mut().ok_or("Stale object")?;
        f(&mut held.mail, &mut held.cgroups)
    }
}
