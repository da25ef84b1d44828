//! A logger that outlives a fork.
//!
//! A logger names its process in every line, but the script keeps the one that it was loaded
//! with. So that one passes everything on to another, which each process replaces by its own.

use std::sync::{Arc, PoisonError, RwLock};

use slog::{Drain, Logger, Never, OwnedKVList, Record};

/// Where the current process's logger is kept.
#[derive(Debug, Clone)]
pub struct Current(Arc<RwLock<Logger>>);

impl Current {
    /// Starts with this process's logger.
    pub fn new(logger: Logger) -> Self {
        Self(Arc::new(RwLock::new(logger)))
    }

    /// The logger that follows every [`Current::replace`].
    pub fn logger(&self) -> Logger {
        Logger::root(self.clone(), slog::o!())
    }

    /// Makes all loggers from here write to this one.
    pub fn replace(&self, logger: Logger) {
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
