//! What a script logs while it is tried.
//!
//! # Failure
//! None: records are kept in memory.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qrelay_shared::address::printable;
use qrelay_shared::log::level_name;
use serde::Serialize;
use slog::{Drain, KV as _, Level, LevelFilter, Logger, Never, OwnedKVList, Serializer};

/// A record of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Level, as in the lines of the daemon's log.
    pub level: &'static str,
    /// Message.
    pub text: String,
    /// Values by their names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text.replace('\t', "\\t");
        write!(f, "{}: {}", self.level, printable(text.as_bytes()))?;
        for (name, value) in &self.fields {
            write!(f, " {name}={}", printable(value.as_bytes()))?;
        }
        Ok(())
    }
}

/// The records so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Records(Arc<Mutex<Vec<Record>>>);

impl Records {
    /// Returns a logger whose records of this level and above are kept here.
    pub(super) fn logger(&self, level: Level) -> Logger {
        Logger::root(LevelFilter::new(self.clone(), level).fuse(), slog::o!())
    }

    /// Takes the records out.
    pub(super) fn take(&self) -> Vec<Record> {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Record>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drain for Records {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &slog::Record<'_>, _: &OwnedKVList) -> Result<(), Never> {
        let mut fields = Fields::default();
        // Writing into memory can't fail.
        let _ = record.kv().serialize(record, &mut fields);
        let level = level_name(record.level());
        let text = record.msg().to_string();
        self.lock().push(Record { level, text, fields: fields.0 });
        Ok(())
    }
}

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.0.insert(key.to_string(), value.to_string());
        Ok(())
    }

    fn emit_none(&mut self, _: slog::Key) -> slog::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_kept_with_their_fields() {
        let records = Records::default();
        let logger = records.logger(Level::Info);
        slog::debug!(logger, "not kept");
        slog::warn!(logger, "to\x1bo {}", 1; "b" => 2, "a" => Some("x"), "c" => None::<u8>);
        let lines: Vec<_> = records.take().iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["warn: to?o 1 a=x b=2"]);
        assert_eq!(records.take(), []);
    }
}
