//! The errors that this process counts, and the lines that say how often.
//!
//! Contract: counting costs the lines without a tag nothing. No lock is held while a line is
//! written.
//!
//! # Failure
//! None. What was counted is lost if the process is killed.

use std::fmt::Arguments;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use slog::{KV, Key, Level, Logger, Record, Serializer, b, record};

use crate::log::repeats::{Problem, Repeated, Repeats};

/// Most characters of a message by which it is known again.
const KNOWN_BY: usize = 1000;

/// One table, because a process has one log.
static REPEATS: Mutex<Repeats> = Mutex::new(Repeats::new());

/// Forgets what another process has counted, which has forked this one.
pub(super) fn forget() {
    *table() = Repeats::new();
}

/// Returns whether an error is to be logged because it isn't merely counted. Has `write` write what
/// is to be reported before.
#[cold]
pub(super) fn is_new(record: &Record<'_>, write: impl Fn(&Record<'_>)) -> bool {
    let message = record.msg().to_string();
    let message = message.lines().next().unwrap_or_default().chars().take(KNOWN_BY).collect();
    let problem = Problem { level: record.level(), message, fields: Named::of(record) };
    let mut ended = Vec::new();
    let new = table().note(problem, Instant::now(), &mut ended);
    ended.iter().for_each(|repeated| report(repeated, &write));
    new
}

/// Reports counted errors whose minute is over. Waits for nothing.
pub fn report_repeats(logger: &Logger, now: Instant) {
    // While another thread notes an error, there will be a better moment.
    let due = REPEATS.try_lock().map_or(Vec::new(), |mut repeats| repeats.due(now));
    due.iter().for_each(|repeated| report(repeated, |record| logger.log(record)));
}

/// Returns when [`report_repeats`] has something to do, if ever.
pub fn next_report() -> Option<Instant> {
    table().next_report()
}

/// Reports all counted errors, because the process ends.
pub fn report_rest(logger: &Logger) {
    let rest = table().rest(Instant::now());
    rest.iter().for_each(|repeated| report(repeated, |record| logger.log(record)));
}

fn table() -> MutexGuard<'static, Repeats> {
    REPEATS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes how often an error was counted.
fn report(repeated: &Repeated, write: impl FnOnce(&Record<'_>)) {
    let Repeated { problem: Problem { level, message, fields }, count, seconds } = repeated;
    let (count, fields) = (grouped(*count), Fixed(fields));
    let text = format_args!("{message}: repeated {count} times in {seconds} s");
    // The level of a record is a constant.
    match level {
        Level::Critical | Level::Error => write(&record!(Level::Error, "", &text, b!(fields))),
        Level::Warning => write(&record!(Level::Warning, "", &text, b!(fields))),
        Level::Info | Level::Debug | Level::Trace => {
            write(&record!(Level::Info, "", &text, b!(fields)));
        }
    }
}

/// Returns a number with commas between its thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Fields whose values are known.
struct Fixed<'f>(&'f [(String, String)]);

impl KV for Fixed<'_> {
    fn serialize(&self, _: &Record<'_>, serializer: &mut dyn Serializer) -> slog::Result {
        // The last one first, as slog does it.
        self.0
            .iter()
            .rev()
            .try_for_each(|(key, value)| serializer.emit_str(Key::from(key.clone()), value))
    }
}

/// Collects the fields that a tag names.
struct Named<'t> {
    tag: &'t str,
    fields: Vec<(String, String)>,
}

impl Named<'_> {
    fn of(record: &Record<'_>) -> Vec<(String, String)> {
        let mut named = Named { tag: record.tag(), fields: Vec::new() };
        // Writing into memory can't fail.
        let _ = record.kv().serialize(record, &mut named);
        named.fields.reverse();
        named.fields
    }
}

impl Serializer for Named<'_> {
    fn emit_arguments(&mut self, key: Key, value: &Arguments<'_>) -> slog::Result {
        if self.tag.split(',').any(|name| name == key.as_str()) {
            self.fields.push((key.as_str().to_owned(), value.to_string()));
        }
        Ok(())
    }

    /// Leaves out a field without a value.
    fn emit_none(&mut self, _: Key) -> slog::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_told_apart() {
        for (number, text) in [(0, "0"), (999, "999"), (1240, "1,240"), (1_000_000, "1,000,000")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_tag_names_the_fields_that_count() {
        let fields = b!("id" => "x", "next_hop" => "h", "error" => None::<&str>, "error2" => 7);
        let named =
            Named::of(&record!(Level::Info, "next_hop,error,error2", &format_args!("m"), fields));
        let expected = [("next_hop", "h"), ("error2", "7")];
        assert_eq!(named, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
}
