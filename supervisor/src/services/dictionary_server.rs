//! The shared dictionaries as a service: a question comes on a channel on which nobody
//! else asks before it is answered.
//!
//! # Failure
//! A channel on which something can't be understood, or whose owner doesn't read
//! its answers, is closed.

use std::os::fd::OwnedFd;
use std::time::Instant;

use qrelay_shared::dictionary::{FromDictionary, ToDictionary};
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError};
use qrelay_shared::settings::Settings;
use rustc_hash::FxHashMap;

use crate::daemon::Daemon;
use crate::event::{Source, Watcher};
use crate::ids::ChannelId;
use crate::services::dictionaries::Dictionaries;

type Line = Channel<FromDictionary, ToDictionary>;

/// The dictionaries and the channels to them.
#[derive(Debug, Default)]
pub(crate) struct DictionaryServer {
    dictionaries: Dictionaries,
    lines: FxHashMap<ChannelId, Line>,
    last: ChannelId,
}

impl DictionaryServer {
    /// A worker has opened a channel. One that can't be watched is closed, which its owner sees.
    pub(crate) fn add_line(&mut self, fd: OwnedFd, watcher: &Watcher) {
        let id = self.last.advance();
        let line = Line::from_fd(fd);
        if watcher.add(&line, Source::Dictionary(id)).is_ok() {
            self.lines.insert(id, line);
        }
    }

    /// Answers what a channel asks; false when it is to be closed.
    fn serve(&mut self, id: ChannelId, limit: usize, buffer: &mut RecvBuffer) -> bool {
        let Some(line) = self.lines.get(&id) else { return false };
        // There is no second question before the answer.
        let request = match line.try_recv(buffer) {
            Ok(received) => received.message,
            Err(RecvError::Empty) => return true,
            Err(_) => return false,
        };
        let answer = self.dictionaries.answer(request, limit, Instant::now());
        line.try_send(&answer, &[]).is_ok()
    }
}

/// Answers what one channel asks, with dictionaries that nobody else sees, until it is closed.
pub fn serve_alone(fd: OwnedFd) {
    let limit = Settings::default().shared_memory;
    let (line, mut dictionaries, mut buffer) =
        (Line::from_fd(fd), Dictionaries::default(), RecvBuffer::new());
    while let Ok(received) = line.recv(&mut buffer) {
        let answer = dictionaries.answer(received.message, limit, Instant::now());
        if line.send(&answer, &[]).is_err() {
            return;
        }
    }
}

impl Daemon {
    /// A question has come.
    pub(crate) fn on_dictionary(&mut self, line: ChannelId) {
        let limit = self
            .current_settings()
            .map_or_else(|| Settings::default().shared_memory, |settings| settings.shared_memory);
        let Some(mut buffer) = self.buffer.take() else { return };
        if !self.dictionaries.serve(line, limit, &mut buffer)
            && let Some(line) = self.dictionaries.lines.remove(&line)
        {
            self.watcher.remove(&line);
        }
        self.buffer = Some(buffer);
    }
}
