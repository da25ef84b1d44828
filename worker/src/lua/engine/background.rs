//! Functions of the script that run without a mail, in a worker: timers and callbacks.
//!
//! Contract: the caller's thread runs the function as a handler is run, as a coroutine that may
//! wait, with the budget of a handler (`handler_timeout`) and, for what it waits for, the time of a
//! mail (`relay_timeout`).
//!
//! # Failure
//! Errors are logged, with traceback, or counted. A panic costs its own run. The caller goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use mlua::{Function, Lua, Value};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::ids::JobId;
use qrelay_shared::ids::WorkerId;
use qrelay_shared::settings::Settings;
use slog::Logger;

use crate::lua::binding::error;
use crate::lua::engine::monitor::{Monitor, Progress, RunContext, Stop};
use crate::lua::engine::output::Output;

/// Everything that is needed to run a function without a mail.
pub(crate) struct Background {
    monitor: Arc<Monitor>,
    output: Arc<Output>,
    logger: Logger,
    settings: Settings,
    worker: WorkerId,
}

impl Background {
    /// Runs functions by this monitor, in this worker.
    pub(crate) fn new(
        monitor: Arc<Monitor>,
        output: Arc<Output>,
        logger: Logger,
        settings: Settings,
        worker: WorkerId,
    ) -> Self {
        Self { monitor, output, logger, settings, worker }
    }

    /// Returns the logger for errors.
    pub(crate) fn logger(&self) -> &Logger {
        &self.logger
    }

    /// Runs the function to its end; `what` names it in the log.
    pub(crate) fn call(
        &self,
        what: &str,
        function: &Function,
        argument: impl FnOnce(&Lua) -> mlua::Result<Value>,
    ) {
        let deadline = Deadline::after(self.settings.relay_timeout);
        let budget = self.settings.handler_timeout;
        let job =
            RunContext { number: JobId::default(), handler: None, mail: None, deadline, budget };
        let run = || match self.monitor.start(&job, function, argument, drop)? {
            Progress::Finished(()) => Ok(()),
            Progress::Waits(suspended) => self.monitor.finish(&job, suspended, drop),
        };
        let result = catch_unwind(AssertUnwindSafe(run));
        self.output.flush(None);
        // A panic has been logged.
        if let Ok(Err(stop)) = result {
            self.failed(what, stop);
        }
    }

    fn failed(&self, what: &str, stop: Stop) {
        let Self { logger, worker, settings, .. } = self;
        match stop {
            Stop::Deadline | Stop::NotBegun => {
                let limit = settings.relay_timeout.as_secs_f64();
                slog::error!(logger, # "worker", "{}: given up after waiting for {} s", what, limit;
                    "worker" => worker);
            }
            Stop::Error { message, traceback } => {
                slog::error!(logger, # "worker", "{}: {}", what, message; "worker" => worker,
                    "traceback" => traceback.as_deref().map(error::in_one_line));
            }
        }
    }
}
