//! Functions of the script that run without a mail, in a worker: callbacks.
//!
//! Contract: the caller's thread runs the function as a handler is run, as a coroutine that may
//! wait, with the budget of a handler (`handler_timeout`) and, for what it waits for, the time of a
//! mail (`relay_timeout`).
//!
//! # Failure
//! Errors are logged, with traceback. The caller goes on.

use std::sync::Arc;

use mlua::{Function, Lua, Value};
use qrelay_shared::settings::Settings;
use slog::Logger;

use super::monitor::{Job, Monitor, Stop};
use super::output::Log;
use crate::deadline::Deadline;

/// Virtual memory of a thread that runs Lua, as of those that serve mails.
pub const STACK_SIZE: usize = crate::serve::STACK_SIZE;

/// What running a function takes.
pub struct Background {
    monitor: Arc<Monitor>,
    log: Arc<Log>,
    logger: Logger,
    settings: Settings,
}

impl Background {
    /// Runs functions by this monitor.
    pub fn new(monitor: Arc<Monitor>, log: Arc<Log>, logger: Logger, settings: Settings) -> Self {
        Self { monitor, log, logger, settings }
    }

    /// Where errors go.
    pub fn logger(&self) -> &Logger {
        &self.logger
    }

    /// Runs the function to its end; `what` names it in the log.
    pub fn call(
        &self,
        what: &str,
        function: &Function,
        argument: impl FnOnce(&Lua) -> mlua::Result<Value>,
    ) {
        let deadline = Deadline::after(self.settings.relay_timeout);
        let budget = self.settings.handler_timeout;
        let job = Job { function, number: 0, mail: None, deadline, budget };
        let result = self.monitor.run(&job, argument, |_| ());
        self.log.flush(None);
        match result {
            Ok(()) => {}
            Err(Stop::Deadline) => {
                slog::error!(self.logger, "{} failed: its time is over", what);
            }
            Err(Stop::Error { message, traceback }) => {
                slog::error!(self.logger, "{} failed: {}", what, message);
                for frame in traceback.iter().flat_map(|text| text.lines()) {
                    slog::error!(self.logger, "  {}", frame.trim_start());
                }
            }
        }
    }
}
