//! The log of every process: structured fields to the journal when stderr is
//! the journal, else one readable line per record on stderr.
//!
//! Contract: writing never waits. A line is written whole or not at all (it is
//! at most [`LINE_MAX`] bytes, which a pipe takes in one piece), and holds no
//! control characters, whatever a mail or a script put into it.
//!
//! # Failure
//! What can't be written at once is counted, and the count is written before
//! the next line that can be.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::{IoSlice, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use slog::{Drain, KV, Key, Level, Logger, OwnedKVList, Record, Serializer};

/// Longest line: PIPE_BUF, up to which writes to a pipe are atomic (pipe(7)).
pub const LINE_MAX: usize = 4096;

/// Longest value of a field: no record is larger than a datagram to journald may be.
const VALUE_MAX: usize = LINE_MAX;

/// Longest message: what a script's error says must not push the mail's id out of the line.
const MESSAGE_MAX: usize = LINE_MAX / 4 * 3;

/// Bytes that a usual line fits in.
const LINE_ROOM: usize = 512;

/// Where the native protocol of systemd-journald is spoken.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Makes the process's logger; `process` names it in every line. Call it again
/// after a fork.
pub fn init(level: Level, process: &'static str) -> Logger {
    let output = Output {
        process,
        pid: std::process::id().to_string(),
        sink: Sink::open(),
        lost: AtomicU64::new(0),
    };
    Logger::root(slog::LevelFilter::new(output, level).fuse(), slog::o!())
}

/// How lines leave the process.
enum Sink {
    /// Connected to journald.
    Journal(UnixDatagram),
    /// Standard error is some other socket.
    Socket(OwnedFd),
    /// A description of our own, so that O_NONBLOCK is nobody else's.
    NonBlocking(std::fs::File),
    /// A pipe or terminal that belongs to somebody else: it is asked before each line whether it
    /// has room.
    Polled,
    /// A regular file, which never makes a writer wait for a reader.
    Plain,
}

impl Sink {
    fn open() -> Self {
        if libsystemd::logging::connected_to_journal()
            && let Ok(socket) = UnixDatagram::unbound()
            && socket.connect(JOURNAL).is_ok()
        {
            return Self::Journal(socket);
        }
        let kind = std::fs::metadata("/proc/self/fd/2").map(|m| m.file_type());
        match kind {
            Ok(kind) if kind.is_socket() => {
                nix::unistd::dup(std::io::stderr()).map_or(Self::Plain, Self::Socket)
            }
            Ok(kind) if kind.is_fifo() || kind.is_char_device() => OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open("/proc/self/fd/2")
                .map_or(Self::Polled, Self::NonBlocking),
            _ => Self::Plain,
        }
    }

    /// Whether the whole line was taken.
    fn write(&self, line: &[u8]) -> bool {
        match self {
            Self::Journal(socket) => send_now(socket.as_raw_fd(), line),
            Self::Socket(fd) => send_now(fd.as_raw_fd(), line),
            Self::NonBlocking(file) => {
                let mut file = file;
                file.write_vectored(&[IoSlice::new(line)]).is_ok_and(|n| n == line.len())
            }
            Self::Polled => {
                let stderr = std::io::stderr();
                let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                // A pipe that is ready takes PIPE_BUF without making us wait (pipe(7)).
                poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
                    && std::io::stderr().write_all(line).is_ok()
            }
            Self::Plain => std::io::stderr().write_all(line).is_ok(),
        }
    }
}

fn send_now(fd: std::os::fd::RawFd, bytes: &[u8]) -> bool {
    send(fd, bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).is_ok_and(|n| n == bytes.len())
}

struct Output {
    process: &'static str,
    pid: String,
    sink: Sink,
    lost: AtomicU64,
}

impl Drain for Output {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        let mut fields = Fields::with_room();
        // Serializing into a string can't fail.
        let _ = record.kv().serialize(record, &mut fields);
        let _ = values.serialize(record, &mut fields);
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0
            && !self.emit(Level::Warning, "log lines were lost", &Fields::single("lost", lost))
        {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
        let message = match record.msg().as_str() {
            Some(text) if is_plain(text) && text.len() <= MESSAGE_MAX => Cow::Borrowed(text),
            _ => {
                let mut message = Escaped(record.msg()).to_string();
                cut(&mut message, MESSAGE_MAX);
                Cow::Owned(message)
            }
        };
        if !self.emit(record.level(), &message, &fields) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Output {
    fn emit(&self, level: Level, message: &str, fields: &Fields) -> bool {
        let bytes = match self.sink {
            Sink::Journal(_) => self.journal_entry(level, message, fields),
            _ => self.line(level, message, fields),
        };
        self.sink.write(&bytes)
    }

    fn line(&self, level: Level, message: &str, fields: &Fields) -> Vec<u8> {
        let now = humantime::format_rfc3339_millis(std::time::SystemTime::now());
        let mut line = String::with_capacity(LINE_ROOM);
        let _ = write!(line, "{now} ");
        for part in [level_name(level), " ", self.process, "[", &self.pid, "]: ", message] {
            line.push_str(part);
        }
        fields.append_to(&mut line);
        cut(&mut line, LINE_MAX - 1);
        line.push('\n');
        line.into_bytes()
    }

    fn journal_entry(&self, level: Level, message: &str, fields: &Fields) -> Vec<u8> {
        let mut entry = String::with_capacity(1024);
        let mut text = String::with_capacity(LINE_ROOM);
        text.push_str(message);
        fields.append_to(&mut text);
        cut(&mut text, LINE_MAX);
        let _ = write!(
            entry,
            "PRIORITY={}\nSYSLOG_IDENTIFIER={}\nMESSAGE={text}\n",
            priority(level),
            self.process
        );
        for (key, value) in fields.iter() {
            let _ = write!(entry, "QRELAY_");
            entry.extend(key.chars().map(|c| match c.to_ascii_uppercase() {
                c @ ('A'..='Z' | '0'..='9') => c,
                _ => '_',
            }));
            let _ = writeln!(entry, "={value}");
        }
        entry.into_bytes()
    }
}

/// Cuts at a character boundary, and shows that it did.
fn cut(text: &mut String, max: usize) {
    cut_tail(text, 0, max);
}

/// The same for what comes after `start`.
fn cut_tail(text: &mut String, start: usize, max: usize) {
    const MARK: &str = "…";
    if text.len() - start > max {
        let mut end = start + max - MARK.len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(MARK);
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::Critical => "crit",
        Level::Error => "error",
        Level::Warning => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

/// Syslog's severities (RFC 5424, 6.2.1).
fn priority(level: Level) -> u8 {
    match level {
        Level::Critical => 2,
        Level::Error => 3,
        Level::Warning => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A record's fields: names, and where their escaped values are in one string.
#[derive(Default)]
struct Fields {
    values: String,
    pairs: Vec<(Key, Range<usize>)>,
}

impl Fields {
    fn single(key: impl Into<Key>, value: u64) -> Self {
        let mut fields = Self::default();
        fields.push(key, &format_args!("{value}"));
        fields
    }

    /// Empty, with memory for those of a mail.
    fn with_room() -> Self {
        Self { values: String::with_capacity(LINE_ROOM), pairs: Vec::with_capacity(16) }
    }

    fn push(&mut self, key: impl Into<Key>, value: &fmt::Arguments<'_>) {
        let start = self.values.len();
        // Writing to a string can't fail.
        let _ = write!(self.values, "{}", Escaped(value));
        cut_tail(&mut self.values, start, VALUE_MAX);
        self.pairs.push((key.into(), start..self.values.len()));
    }

    /// As [`Self::push`], of a text that needs no escaping.
    fn push_plain(&mut self, key: Key, value: &str) -> slog::Result {
        let start = self.values.len();
        self.values.push_str(value);
        cut_tail(&mut self.values, start, VALUE_MAX);
        self.pairs.push((key, start..self.values.len()));
        Ok(())
    }

    fn push_integer(&mut self, key: Key, value: impl itoa::Integer) -> slog::Result {
        self.push_plain(key, itoa::Buffer::new().format(value))
    }

    /// In the order in which they were written in the source; slog serializes the last first.
    fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().rev().map(|(key, range)| (key.as_str(), &self.values[range.clone()]))
    }

    /// Writes them as the tail of a line.
    fn append_to(&self, line: &mut String) {
        for (key, value) in self.iter() {
            let escaped;
            let (quote, value) = match quoting(value) {
                Quoting::None => ("", value),
                Quoting::Plain => ("\"", value),
                Quoting::Escaped => {
                    escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
                    ("\"", &*escaped)
                }
            };
            for part in [" ", key, "=", quote, value, quote] {
                line.push_str(part);
            }
        }
    }
}

/// How a value stands in a line, so that nothing in it looks like another field.
enum Quoting {
    None,
    Plain,
    /// With a backslash before quotes and backslashes.
    Escaped,
}

fn quoting(value: &str) -> Quoting {
    match memchr::memchr3(b' ', b'"', b'=', value.as_bytes()) {
        None if value.is_empty() => Quoting::Plain,
        None => Quoting::None,
        Some(_) if value.contains(['"', '\\']) => Quoting::Escaped,
        Some(_) => Quoting::Plain,
    }
}

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.push(key, value);
        Ok(())
    }

    fn emit_str(&mut self, key: Key, value: &str) -> slog::Result {
        if is_plain(value) {
            return self.push_plain(key, value);
        }
        self.push(key, &format_args!("{value}"));
        Ok(())
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

    /// Absent is absent.
    fn emit_none(&mut self, _: Key) -> slog::Result {
        Ok(())
    }
}

/// Whether a text is printable ASCII, as nearly everything is that is logged.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// Shows a text with its control characters made harmless.
struct Escaped<'a, T: ?Sized>(&'a T);

impl<T: fmt::Display + ?Sized> fmt::Display for Escaped<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaper(f), "{}", self.0)
    }
}

struct Escaper<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escaper<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if is_plain(text) {
            return self.0.write_str(text);
        }
        let mut rest = text;
        while let Some(at) = rest.find(char::is_control) {
            self.0.write_str(&rest[..at])?;
            let mut chars = rest[at..].chars();
            match chars.next() {
                Some('\n') => self.0.write_str("\\n")?,
                Some('\t') => self.0.write_str("\\t")?,
                Some(c) => write!(self.0, "\\x{:02x}", c as u32)?,
                None => {}
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(Escaped("a\nb\tc\x1b[0m\u{9b}é").to_string(), "a\\nb\\tc\\x1b[0m\\x9bé");
    }

    #[test]
    fn fields_are_quoted_when_ambiguous() {
        let mut fields = Fields::default();
        fields.push("c", &format_args!(""));
        fields.push("b", &format_args!("x y\"z"));
        fields.push("a", &format_args!("x"));
        let mut line = String::new();
        fields.append_to(&mut line);
        assert_eq!(line, " a=x b=\"x y\\\"z\" c=\"\"");
        for (value, shown) in
            [(r"a\b", r" k=a\b"), (r"a b\", r#" k="a b\\""#), (r#"x \" s=K"#, r#" k="x \\\" s=K""#)]
        {
            let mut fields = Fields::default();
            fields.push("k", &format_args!("{value}"));
            let mut line = String::new();
            fields.append_to(&mut line);
            assert_eq!(line, shown);
        }
    }

    #[test]
    fn long_values_are_cut() {
        let mut fields = Fields::default();
        fields.push("c", &format_args!("{}", "é".repeat(VALUE_MAX)));
        fields.emit_str("b".into(), &"x".repeat(VALUE_MAX + 1)).expect("into memory");
        fields.push("a", &format_args!("short"));
        let values: Vec<_> = fields.iter().map(|(_, value)| value).collect();
        assert_eq!(values[0], "short");
        assert!(values[1].len() <= VALUE_MAX && values[1].ends_with("x…"), "{}", values[1].len());
        assert!(values[2].len() <= VALUE_MAX && values[2].ends_with("é…"), "{}", values[2].len());
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        let mut text = "é".repeat(100);
        cut(&mut text, 20);
        assert!(text.len() <= 20 && text.ends_with('…'));
    }
}
