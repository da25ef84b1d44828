//! The log of every process: an entry with fields in the journal when stderr leads to the journal,
//! else one readable line per record on stderr.
//!
//! Contract: writing never waits, except in a process that [`Patience`] allows to wait. A line has
//! at most `LINE_MAX` bytes, which a pipe takes in one piece. A line contains no control
//! characters, whatever a mail or a script put into it. Records go to standard error while journald
//! is away.
//!
//! A record with a tag is an error that may happen for every mail. The tag names, separated by
//! commas, the fields that make a difference between errors with the same message; a word that is
//! no field makes none. The same error again within a minute is counted instead of logged, unless
//! the process has [`Patience::Unlimited`].
//!
//! # Failure
//! A line that can't be written at once is dropped and counted. The count is written before the
//! next line that can be written. After a line of which only a part could be written, as on a full
//! disk, the next line starts anew.

mod counted;
mod repeats;
mod stderr;
mod tear;
mod writer;

pub use counted::{next_report, report_repeats, report_rest};

use std::borrow::Cow;
use std::fmt::{Arguments, Write as _};
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use slog::{Drain, KV, Key, Level, Logger, OwnedKVList, Record, Serializer};

use crate::admin::Deliveries;
use crate::log::stderr::Stderr;
use crate::system_error::without_numbers;

/// Longest line in bytes: PIPE_BUF, up to which writes to a pipe are atomic (pipe(7)).
pub(crate) const LINE_MAX: usize = 4096;

/// Longest value of a field in bytes, so that no entry exceeds the size of a datagram to journald.
const VALUE_MAX: usize = LINE_MAX;

/// Longest message in bytes, so that the text of a script's error can't push the mail's id out of
/// the line.
const MESSAGE_MAX: usize = LINE_MAX / 4 * 3;

/// Memory in bytes for a line of usual length.
const LINE_ROOM: usize = 512;

/// Socket of systemd-journald for its native protocol.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Lines of this process that were lost and not reported yet.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Records of this process that were to be written, and those that were lost.
static ALL: AtomicU64 = AtomicU64::new(0);
static ALL_LOST: AtomicU64 = AtomicU64::new(0);

/// What a line tells.
#[derive(Debug, Clone, Copy)]
enum Content {
    /// Something new.
    Record,
    /// That so many lines, which are counted already, were lost.
    Losses(u64),
}

/// Counts a line as lost.
fn lose(content: Content) {
    let lines = match content {
        Content::Losses(lines) => lines,
        Content::Record => {
            ALL_LOST.fetch_add(1, Ordering::Relaxed);
            1
        }
    };
    LOST.fetch_add(lines, Ordering::Relaxed);
}

/// Counts the records of this process that were written, and those that were lost.
pub fn deliveries() -> Deliveries {
    let lost = ALL_LOST.load(Ordering::Relaxed);
    Deliveries { sent: ALL.load(Ordering::Relaxed).saturating_sub(lost), lost }
}

/// Whether writing the log may hold up the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Writing never waits. If every write may wait, as to a file, a thread writes. The process
    /// calls [`report_repeats`] and [`report_rest`].
    None,
    /// Writing may wait for a file, because the process has to have a single thread.
    Unlimited,
}

/// Creates the logger of this process; `process` is its name in every line. A process has to call
/// this function again after its fork, because a line also contains the process id.
pub fn init(level: Level, process: &'static str, patience: Patience) -> Logger {
    // The process that forked this one reports its lost lines and its errors itself.
    LOST.store(0, Ordering::Relaxed);
    counted::forget();
    let output = Output {
        counts: patience == Patience::None,
        process,
        origin: format!(" {process}[{}]: ", std::process::id()),
        journal: journal(),
        stderr: Stderr::open(patience),
        second: Mutex::new((u64::MAX, String::new())),
    };
    Logger::root(slog::LevelFilter::new(output, level).fuse(), slog::o!())
}

/// Waits for lines that are still to be written, for half a second at most: the process ends by
/// _exit(2). The other ways to end need no call.
pub fn finish() {
    writer::finish();
}

/// Returns a socket to send to journald, if standard error leads to the journal.
fn journal() -> Option<UnixDatagram> {
    if !libsystemd::logging::connected_to_journal() {
        return None;
    }
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

struct Output {
    /// Whether errors are counted: only in a process that reports them in time.
    counts: bool,
    process: &'static str,
    /// Name and id of the process, as they appear in a line.
    origin: String,
    /// Sends entries to journald. The socket isn't connected, because journald may make its own
    /// anew.
    journal: Option<UnixDatagram>,
    stderr: Stderr,
    /// The second of the last line, as a number since the epoch and as text.
    second: Mutex<(u64, String)>,
}

impl Drain for Output {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        if self.counts && !record.tag().is_empty() {
            let write = |record: &Record<'_>| {
                let Ok(()) = self.log(record, &slog::o!().into());
            };
            if !counted::is_new(record, write) {
                return Ok(());
            }
        }
        let mut fields = Fields::new(self.journal.is_some());
        // Writing into memory can't fail.
        let _ = record.kv().serialize(record, &mut fields);
        let _ = values.serialize(record, &mut fields);
        let lost = LOST.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let mut fields = Fields::new(self.journal.is_some());
            let _ = fields.emit_u64("lost".into(), lost);
            self.emit(Level::Warning, "log lines were lost", fields, Content::Losses(lost));
        }
        self.emit(record.level(), &formatted(record.msg()), fields, Content::Record);
        ALL.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Output {
    /// Writes a line. If that fails, the line counts as lost.
    fn emit(&self, level: Level, message: &str, fields: Fields, content: Content) {
        let Fields { mut line, entry } = fields;
        line.prepend_cut(&printable(message).0, MESSAGE_MAX);
        let line = line.cut();
        let written = self.send(level, &line, entry).unwrap_or_else(|| {
            let mut line = line;
            line.prepend(&self.origin);
            line.prepend(level_name(level));
            self.prepend_time(&mut line);
            self.stderr.write(line.cut().get(), content)
        });
        if !written {
            lose(content);
        }
    }

    /// Sends a record to journald. Returns whether journald has it; nothing if there is no
    /// journald, so that standard error has to do.
    fn send(&self, level: Level, line: &Prepended, entry: Option<Prepended>) -> Option<bool> {
        let (journal, entry) = (self.journal.as_ref()?, entry?);
        let head =
            format!("PRIORITY={}\nSYSLOG_IDENTIFIER={}\nMESSAGE=", priority(level), self.process);
        match journal.send_to(&[head.as_bytes(), line.get(), entry.get()].concat(), JOURNAL) {
            Ok(_) => Some(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Some(false),
            Err(_) => None,
        }
    }

    /// Prepends the time with milliseconds. Formatting the date is slow, so its text is kept for
    /// the lines of the same second.
    fn prepend_time(&self, line: &mut Prepended) {
        let now = UNIX_EPOCH.elapsed().unwrap_or_default();
        let mut second = self.second.lock().unwrap_or_else(PoisonError::into_inner);
        if second.0 != now.as_secs() {
            *second = (now.as_secs(), date(now.as_secs()));
        }
        line.prepend("Z ");
        line.prepend(&itoa::Buffer::new().format(1000 + now.subsec_millis())[1..]);
        line.prepend(".");
        line.prepend(second.1.trim_end_matches('Z'));
    }
}

/// The last second of the year 9999, in seconds since 1970. RFC 3339 has no later times.
const LAST_SECOND: u64 = 253_402_300_799;

/// Returns a number of seconds since 1970 as text. A later time than RFC 3339 has, which a faked
/// clock may tell, counts as [`LAST_SECOND`].
fn date(seconds: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND));
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Flag of a byte that makes the value appear in quotes in a line.
const QUOTED: u8 = 1;
/// Flag of a byte that gets a backslash in quotes.
const BACKSLASHED: u8 = 2;
/// Flag of a byte that is not printable ASCII.
const UNPRINTABLE: u8 = 4;
/// Flag of a byte that begins what Rust appends to a system error's text.
const NUMBERED: u8 = 8;

/// The flags of each byte. Control characters have [`BACKSLASHED`], because they become text with a
/// backslash.
const FLAGS: [u8; 256] = {
    let mut flags = [UNPRINTABLE | BACKSLASHED; 256];
    let mut byte = b' ';
    while byte <= b'~' {
        flags[byte as usize] = match byte {
            b' ' | b'=' => QUOTED,
            b'"' => QUOTED | BACKSLASHED,
            b'\\' => BACKSLASHED,
            b'(' => NUMBERED,
            _ => 0,
        };
        byte += 1;
    }
    flags
};

/// Returns the text with its control characters escaped and without the numbers of system errors,
/// and the flags of all its bytes.
fn printable(text: &str) -> (Cow<'_, str>, u8) {
    let flags = text.bytes().fold(0, |flags, byte| flags | FLAGS[usize::from(byte)]);
    match flags & UNPRINTABLE {
        0 if flags & NUMBERED != 0 => (without_numbers(text), flags),
        0 => (Cow::Borrowed(text), flags),
        _ => (Cow::Owned(escape(&without_numbers(text))), flags),
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => escaped.push_str("\\n"),
            '\t' => escaped.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(escaped, "\\x{:02x}", c as u32);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Returns the formatted text; a literal is not copied.
fn formatted<'a>(text: &Arguments<'a>) -> Cow<'a, str> {
    text.as_str().map_or_else(|| Cow::Owned(text.to_string()), Cow::Borrowed)
}

/// A text that is written from its end to its start, because slog serializes the last field first.
struct Prepended {
    bytes: Vec<u8>,
    /// Index of the text's first byte.
    start: usize,
}

impl Prepended {
    /// Returns an empty text with memory for a line of usual length.
    fn new() -> Self {
        // The memory is filled with spaces, because for zeros the slower calloc would be called.
        Self { bytes: vec![b' '; LINE_ROOM], start: LINE_ROOM }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    #[inline]
    fn prepend(&mut self, text: &str) {
        if text.len() > self.start {
            self.grow(text.len());
        }
        let end = self.start;
        self.start -= text.len();
        self.bytes[self.start..end].copy_from_slice(text.as_bytes());
    }

    #[cold]
    fn grow(&mut self, room: usize) {
        let room = room.max(self.bytes.len());
        self.bytes.splice(..self.start, std::iter::repeat_n(0, room));
        self.start = room;
    }

    /// Prepends a text that is cut to `max` bytes at a character boundary; a cut text ends with an
    /// ellipsis.
    fn prepend_cut(&mut self, text: &str, max: usize) {
        const MARK: &str = "…";
        if text.len() <= max {
            return self.prepend(text);
        }
        let mut end = max - MARK.len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.prepend(MARK);
        self.prepend(&text[..end]);
    }

    /// Cuts the line, which ends with a newline, to `LINE_MAX` bytes.
    fn cut(self) -> Self {
        if self.get().len() <= LINE_MAX {
            return self;
        }
        let mut cut = Self::new();
        cut.prepend("\n");
        cut.prepend_cut(&String::from_utf8_lossy(self.get()), LINE_MAX - 1);
        cut
    }
}

/// Returns the name of a level as a line has it.
pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::Critical => "crit",
        Level::Error => "error",
        Level::Warning => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

/// Returns the severity of syslog for a level (RFC 5424, 6.2.1).
fn priority(level: Level) -> u8 {
    match level {
        Level::Critical => 2,
        Level::Error => 3,
        Level::Warning => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// The fields of a record: the end of a line and, for the journal, of an entry.
struct Fields {
    line: Prepended,
    entry: Option<Prepended>,
}

impl Fields {
    fn new(journal: bool) -> Self {
        let mut line = Prepended::new();
        line.prepend("\n");
        Self { line, entry: journal.then(Prepended::new) }
    }

    /// Prepends a field with a printable value, in quotes if a part of the value could be taken for
    /// another field.
    fn push(&mut self, key: &str, value: &str, flags: u8) -> slog::Result {
        if let Some(entry) = &mut self.entry {
            entry.prepend("\n");
            entry.prepend_cut(value, VALUE_MAX);
            entry.prepend("=");
            entry.prepend(&journal_name(key));
        }
        let line = &mut self.line;
        if flags & QUOTED == 0 && !value.is_empty() {
            line.prepend(value);
        } else {
            line.prepend("\"");
            match flags & BACKSLASHED {
                0 => line.prepend(value),
                _ => line.prepend(&value.replace('\\', "\\\\").replace('"', "\\\"")),
            }
            line.prepend("\"");
        }
        line.prepend("=");
        line.prepend(key);
        line.prepend(" ");
        Ok(())
    }

    fn push_integer(&mut self, key: Key, value: impl itoa::Integer) -> slog::Result {
        self.push(key.as_str(), itoa::Buffer::new().format(value), 0)
    }
}

/// Returns the name of a field in the journal.
fn journal_name(key: &str) -> String {
    let name = key.chars().map(|c| match c.to_ascii_uppercase() {
        c @ ('A'..='Z' | '0'..='9') => c,
        _ => '_',
    });
    "QRELAY_".chars().chain(name).collect()
}

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &Arguments<'_>) -> slog::Result {
        self.emit_str(key, &formatted(value))
    }

    fn emit_str(&mut self, key: Key, value: &str) -> slog::Result {
        let (value, flags) = printable(value);
        self.push(key.as_str(), &value, flags)
    }

    fn emit_u32(&mut self, key: Key, value: u32) -> slog::Result {
        self.push_integer(key, value)
    }

    fn emit_i32(&mut self, key: Key, value: i32) -> slog::Result {
        self.push_integer(key, value)
    }

    fn emit_u64(&mut self, key: Key, value: u64) -> slog::Result {
        self.push_integer(key, value)
    }

    fn emit_usize(&mut self, key: Key, value: usize) -> slog::Result {
        self.push_integer(key, value)
    }

    /// Leaves out a field without a value.
    fn emit_none(&mut self, _: Key) -> slog::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(text: &Prepended) -> &str {
        std::str::from_utf8(text.get()).expect("UTF-8")
    }

    /// Returns fields with these values, the first value first in the line.
    fn fields(values: &[&str]) -> Fields {
        let mut fields = Fields::new(true);
        for (value, key) in values.iter().zip(["a", "b-b", "c"]).rev() {
            fields.emit_str(key.into(), value).expect("into memory");
        }
        fields
    }

    #[test]
    fn every_time_has_a_date() {
        let table = [
            (0, "1970-01-01T00:00:00Z"),
            (LAST_SECOND, "9999-12-31T23:59:59Z"),
            (LAST_SECOND + 1, "9999-12-31T23:59:59Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ];
        for (seconds, expected) in table {
            assert_eq!(date(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        let (text, flags) = printable("a\nb\tc\x1b[0m\u{9b}é");
        assert_eq!((&*text, flags & QUOTED), ("a\\nb\\tc\\x1b[0m\\x9bé", 0));
    }

    #[test]
    fn fields_are_quoted_when_ambiguous() {
        for (values, shown) in [
            (["x", "x y\"z", ""], r#" a=x b-b="x y\"z" c="""#),
            ([r"a\b", r"a b\", "x=y"], r#" a=a\b b-b="a b\\" c="x=y""#),
            (["a\nb", "a\nb c", "é é"], r#" a=a\nb b-b="a\\nb c" c="é é""#),
            (["é", r#"x \" s=K"#, "\t"], r#" a=é b-b="x \\\" s=K" c=\t"#),
        ] {
            assert_eq!(show(&fields(values.as_slice()).line), format!("{shown}\n"));
        }
    }

    #[test]
    fn the_journal_gets_values_as_they_are() {
        let entry = fields(&["x\ny", "x \"y\"", ""]).entry.expect("an entry");
        assert_eq!(show(&entry), "QRELAY_A=x\\ny\nQRELAY_B_B=x \"y\"\nQRELAY_C=\n");
    }

    #[test]
    fn long_values_are_cut() {
        let entry = fields(&["short", &"x".repeat(VALUE_MAX + 1), &"é".repeat(VALUE_MAX)]).entry;
        let entry = entry.expect("an entry");
        let values: Vec<_> = show(&entry).lines().filter_map(|line| line.split_once('=')).collect();
        assert_eq!(values[0].1, "short");
        for ((_, value), end) in values[1..].iter().zip(["x…", "é…"]) {
            assert!(value.len() <= VALUE_MAX && value.ends_with(end), "{}", value.len());
        }
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        for odd in ["x", ""] {
            let line = fields(&[odd, &"é".repeat(LINE_MAX), "last"]).line.cut();
            assert!(show(&line).len() <= LINE_MAX && show(&line).ends_with("é…\n"));
        }
    }
}
