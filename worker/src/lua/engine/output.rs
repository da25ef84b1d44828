//! A script's standard streams: their lines go to the log, with the id of the mail whose handler
//! wrote them.
//!
//! Contract: one record per line. What is written without a line end waits for it, up to `LINE_MAX`
//! bytes, and at the latest until the script has loaded or the handler returns. The log escapes
//! control characters.
//!
//! # Failure
//! None: the log never waits and never fails.

use std::sync::Arc;

use parking_lot::Mutex;
use slog::Logger;

use crate::lua::engine::watch::Watch;

/// Longest line; what is longer becomes several.
const LINE_MAX: usize = 2048;

/// The way of a script's lines to the log.
pub(crate) struct Output {
    logger: Logger,
    watch: Arc<Watch>,
    /// Unfinished lines of stdout and stderr.
    partial: Mutex<[Vec<u8>; 2]>,
}

/// A standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Level info.
    Stdout,
    /// Level warning.
    Stderr,
}

impl Output {
    /// Lines go to this logger.
    pub(crate) fn new(logger: Logger, watch: Arc<Watch>) -> Arc<Self> {
        Arc::new(Self { logger, watch, partial: Mutex::default() })
    }

    /// Writes one record; `id` is the id of the mail whose handler wrote the line.
    fn emit(&self, stream: Stream, text: &[u8], id: Option<&str>) {
        let text = String::from_utf8_lossy(text);
        match (stream, id) {
            (Stream::Stdout, Some(id)) => slog::info!(self.logger, "{}", text; "id" => id),
            (Stream::Stdout, None) => slog::info!(self.logger, "{}", text),
            (Stream::Stderr, Some(id)) => slog::warn!(self.logger, "{}", text; "id" => id),
            (Stream::Stderr, None) => slog::warn!(self.logger, "{}", text),
        }
    }

    /// Adds text to a stream's line, and writes the lines that are complete.
    pub(crate) fn write(&self, stream: Stream, text: &[u8]) {
        let partial = &mut self.partial.lock()[stream as usize];
        partial.extend_from_slice(text);
        if memchr::memchr(b'\n', text).is_none() && partial.len() <= LINE_MAX {
            return;
        }
        let id = self.watch.mail().and_then(|mail| mail.id());
        while let Some(end) = memchr::memchr(b'\n', partial) {
            self.emit_long(stream, &partial[..end], id.as_deref());
            partial.drain(..=end);
        }
        if partial.len() > LINE_MAX {
            self.emit_long(stream, partial, id.as_deref());
            partial.clear();
        }
    }

    fn emit_long(&self, stream: Stream, line: &[u8], id: Option<&str>) {
        if line.is_empty() {
            return self.emit(stream, line, id);
        }
        line.chunks(LINE_MAX).for_each(|part| self.emit(stream, part, id));
    }

    /// Writes what still waits for its line end, for the mail whose handler runs.
    pub(crate) fn flush_now(&self) {
        self.flush(self.watch.mail().and_then(|mail| mail.id()).as_deref());
    }

    /// Writes what still waits for its line end, for the mail whose handler is done if there is
    /// one.
    pub(crate) fn flush(&self, id: Option<&str>) {
        let mut partial = self.partial.lock();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let line = &mut partial[stream as usize];
            if !line.is_empty() {
                self.emit_long(stream, line, id);
                line.clear();
            }
        }
    }
}
