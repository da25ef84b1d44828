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

/// Longest message: what a script's error says must not push the mail's id out of the line.
const MESSAGE_MAX: usize = LINE_MAX / 4 * 3;

/// Where the native protocol of systemd-journald is spoken.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Makes the process's logger; `process` names it in every line. Call it again
/// after a fork.
pub fn init(level: Level, process: &'static str) -> Logger {
    let output =
        Output { process, pid: std::process::id(), sink: Sink::open(), lost: AtomicU64::new(0) };
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
    pid: u32,
    sink: Sink,
    lost: AtomicU64,
}

impl Drain for Output {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        let mut fields = Fields::default();
        // Serializing into a string can't fail.
        let _ = record.kv().serialize(record, &mut fields);
        let _ = values.serialize(record, &mut fields);
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0
            && !self.emit(Level::Warning, "log lines were lost", &Fields::single("lost", lost))
        {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
        let mut message = Escaped(record.msg()).to_string();
        cut(&mut message, MESSAGE_MAX);
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
        let mut line = String::with_capacity(512);
        let _ = write!(
            line,
            "{now} {} {}[{}]: {message}{fields}",
            level_name(level),
            self.process,
            self.pid,
        );
        cut(&mut line, LINE_MAX - 1);
        line.push('\n');
        line.into_bytes()
    }

    fn journal_entry(&self, level: Level, message: &str, fields: &Fields) -> Vec<u8> {
        let mut entry = String::with_capacity(1024);
        let mut text = format!("{message}{fields}");
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
    const MARK: &str = "…";
    if text.len() > max {
        let mut end = max - MARK.len();
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

    fn push(&mut self, key: impl Into<Key>, value: &fmt::Arguments<'_>) {
        let start = self.values.len();
        // Writing to a string can't fail.
        let _ = write!(self.values, "{}", Escaped(value));
        self.pairs.push((key.into(), start..self.values.len()));
    }

    /// In the order in which they were written in the source; slog serializes the last first.
    fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().rev().map(|(key, range)| (key.as_str(), &self.values[range.clone()]))
    }
}

/// As the tail of a line.
impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|(key, value)| {
            if !value.is_empty() && !value.contains([' ', '"', '=']) {
                write!(f, " {key}={value}")
            } else if value.contains('"') {
                write!(f, " {key}=\"{}\"", value.replace('"', "\\\""))
            } else {
                write!(f, " {key}=\"{value}\"")
            }
        })
    }
}

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.push(key, value);
        Ok(())
    }

    /// Absent is absent.
    fn emit_none(&mut self, _: Key) -> slog::Result {
        Ok(())
    }
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
        // Nearly everything that is logged is plain ASCII.
        if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
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
        assert_eq!(fields.to_string(), " a=x b=\"x y\\\"z\" c=\"\"");
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        let mut text = "é".repeat(100);
        cut(&mut text, 20);
        assert!(text.len() <= 20 && text.ends_with('…'));
    }
}
