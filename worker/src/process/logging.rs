//! A logger that outlives a fork.
//!
//! A logger names its process in every line, but a script keeps the logger that it was loaded with.
//! So the script's logger passes every line on to the current logger, which each process sets.

use std::sync::{Arc, PoisonError, RwLock};

use slog::{Drain, Logger, Never, OwnedKVList, Record};

/// The place of the current process's logger.
#[derive(Debug, Clone)]
pub(crate) struct Current(Arc<RwLock<Logger>>);

impl Current {
    /// Starts with this process's logger.
    pub(crate) fn new(logger: Logger) -> Self {
        Self(Arc::new(RwLock::new(logger)))
    }

    /// Returns a logger that follows every [`Current::replace`].
    pub(crate) fn logger(&self) -> Logger {
        Logger::root(self.clone(), slog::o!())
    }

    /// Makes all loggers of this `Current` write to `logger`.
    pub(crate) fn replace(&self, logger: Logger) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = logger;
    }
}

impl Drain for Current {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let current = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Drain::log(&*current, record, values)
    }
}
