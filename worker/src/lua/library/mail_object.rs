//! The object that stands for a mail in Lua.
//!
//! Contract: the object refers to the [`Slot`] of the mail. The object is stale once the handler
//! has ended and the slot is empty.
//!
//! # Failure
//! A stale object, or another value in its place, raises.

use std::sync::{Arc, OnceLock};

use mlua::{AnyUserData, Either};

use crate::lua::binding::convert;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function;
use crate::lua::engine::slot::Slot;
use crate::mail::Mail;

/// A mail as userdata.
pub(crate) struct MailObject {
    slot: Arc<Slot>,
    /// The object of the client's control group, made at the first use.
    pub(super) cgroup: OnceLock<AnyUserData>,
}

impl MailObject {
    /// Makes the object of the mail in this slot.
    pub(crate) fn new(slot: Arc<Slot>) -> Self {
        Self { slot, cgroup: OnceLock::new() }
    }
}

/// The mail object that a method was called on.
pub(crate) type This = function::This<MailObject>;

/// The mail object that a method was called on.
///
/// # Errors
/// The value is no mail object, or is stale.
pub(crate) fn alive(this: &This) -> Result<&MailObject, Raise> {
    match this {
        Either::Left(object) => object.with(|_| Ok(&**object)),
        Either::Right(value) => Err(format!(
            "expected a mail object, got {}; call its methods with a colon, as in m:connect(…)",
            convert::describe(value)
        )
        .into()),
    }
}

impl MailObject {
    /// Works on the mail. `f` must not call Lua, which could call for this mail.
    ///
    /// # Errors
    /// The error of `f`, or `Stale object` if the mail is gone.
    pub(crate) fn with<R>(
        &self,
        f: impl FnOnce(&mut Mail) -> Result<R, Raise>,
    ) -> Result<R, Raise> {
        self.slot.with(|mail, _| f(mail))
    }

    /// Returns the slot of the mail.
    pub(crate) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}
