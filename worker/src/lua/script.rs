//! The script that a session asks is a Lua [`State`].

use std::sync::Arc;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::message::DatabaseState;

use crate::lua::state::State;
use crate::mail::Mail;
use crate::session::script::{Handling, Script};

impl Script for State {
    fn start(self: Arc<Self>, listener: usize, mail: Box<Mail>, deadline: Deadline) -> Handling {
        State::start(self, listener, mail, deadline)
    }

    fn held(&self) -> (Duration, JobId) {
        let held = State::held(self);
        (held.duration, held.job)
    }

    fn place(&self) -> &str {
        State::place(self)
    }

    fn exhausted(&self) -> bool {
        State::exhausted(self)
    }

    fn memory(&self) -> u64 {
        State::memory(self)
    }

    fn databases(&self) -> Option<Vec<DatabaseState>> {
        State::databases(self)
    }
}
