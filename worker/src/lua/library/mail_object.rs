//! The object that stands for a mail in Lua.
//!
//! Contract: the object leads to the [`Slot`] of the mail. The object is stale once the handler has
//! ended, and other users of it learn so from the slot.
//!
//! # Failure
//! A stale object, or another value in its place, raises.

use std::sync::Arc;

use mlua::Either;

use crate::lua::binding::convert;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function;
use crate::lua::engine::slot::Slot;
use crate::mail::Mail;

/// The userdata.
pub(crate) struct MailObject(Arc<Slot>);

impl MailObject {
    /// The mail in this slot.
    pub(crate) fn new(slot: Arc<Slot>) -> Self {
        Self(slot)
    }
}

/// The mail object that a method was called on.
pub(crate) type This = function::This<MailObject>;

/// The mail object that a method was called on.
///
/// # Errors
/// It is no mail, or stale.
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
    /// Works on the mail. Nothing in `f` may ask Lua, which could ask for this mail.
    ///
    /// # Errors
    /// What `f` raises, or that the mail is gone.
    pub(crate) fn with<R>(
        &self,
        f: impl FnOnce(&mut Mail) -> Result<R, Raise>,
    ) -> Result<R, Raise> {
        self.0.with(|mail, _| f(mail))
    }

    /// Where the mail is.
    pub(crate) fn slot(&self) -> &Arc<Slot> {
        &self.0
    }
}
