//! The shared dictionaries as a service: a question comes on a channel on which nobody else asks
//! before it is answered.
//!
//! # Failure
//! A channel on which something can't be understood, or whose owner doesn't read its answers, is
//! closed.

use std::os::fd::OwnedFd;
use std::time::Instant;

use qrelay_shared::dictionary::{FromDictionary, ToDictionary};
use qrelay_shared::ipc::channel::{Channel, Descriptors, RecvBuffer, RecvError};
use qrelay_shared::settings::Settings;
use qrelay_shared::sys::closer;
use rustc_hash::FxHashMap;

use crate::ids::ChannelId;
use crate::services::dictionaries::Dictionaries;
use crate::watch::{Source, Watcher};

type DictionaryChannel = Channel<FromDictionary, ToDictionary>;

/// The dictionaries and the channels to them.
#[derive(Debug)]
pub(super) struct DictionaryServer {
    watcher: Watcher,
    dictionaries: Dictionaries,
    /// Bound of a dictionary in bytes.
    limit: usize,
    channels: FxHashMap<ChannelId, DictionaryChannel>,
    last: ChannelId,
    buffer: RecvBuffer,
}

/// Whether a channel stays open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    Open,
    Broken,
}

impl DictionaryServer {
    /// Starts with no channel, and with the usual bound.
    pub(super) fn new(watcher: Watcher) -> Self {
        Self {
            watcher,
            dictionaries: Dictionaries::default(),
            limit: Settings::default().shared_memory,
            channels: FxHashMap::default(),
            last: ChannelId::default(),
            buffer: RecvBuffer::new(),
        }
    }

    /// Sets the bound of a dictionary in bytes.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Takes over a channel that was opened. A channel that can't be watched is closed, which its
    /// owner sees.
    pub(super) fn open(&mut self, fd: OwnedFd) {
        let id = self.last.advance();
        let channel = DictionaryChannel::from_fd(fd).foreign(Descriptors::Unexpected);
        if self.watcher.add(&channel, Source::Dictionary(id)).is_ok() {
            self.channels.insert(id, channel);
        }
    }

    /// Answers what a channel asks, or closes it.
    pub(super) fn on_question(&mut self, id: ChannelId, now: Instant) {
        if self.serve(id, now) == Served::Broken
            && let Some(channel) = self.channels.remove(&id)
        {
            self.watcher.remove(&channel);
        }
    }

    fn serve(&mut self, id: ChannelId, now: Instant) -> Served {
        let Some(channel) = self.channels.get(&id) else { return Served::Broken };
        // There is no second question before the answer.
        let request = match channel.try_recv(&mut self.buffer) {
            Ok(mut received) => match received.fds.take() {
                Some(fd) => {
                    closer::give(fd);
                    return Served::Broken;
                }
                None => received.message,
            },
            Err(RecvError::Empty) => return Served::Open,
            Err(_) => return Served::Broken,
        };
        let answer = self.dictionaries.answer(request, self.limit, now);
        match channel.try_send(&answer, &[]) {
            Ok(()) => Served::Open,
            Err(_) => Served::Broken,
        }
    }
}

/// Answers what one channel asks, with dictionaries that nobody else sees, until it is closed.
pub fn serve_alone(fd: OwnedFd) {
    let limit = Settings::default().shared_memory;
    let (channel, mut dictionaries, mut buffer) =
        (DictionaryChannel::from_fd(fd), Dictionaries::default(), RecvBuffer::new());
    while let Ok(received) = channel.recv(&mut buffer) {
        let answer = dictionaries.answer(received.message, limit, Instant::now());
        if channel.send(&answer, &[]).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use qrelay_shared::dictionary::{Answer, Operation, Request, Value};

    use super::*;
    use crate::watch::Poller;

    /// A server, what it is watched by, and the other end of a channel to it.
    fn server() -> (DictionaryServer, Poller, Channel<ToDictionary, FromDictionary>) {
        let poller = Poller::new().expect("epoll");
        let mut server = DictionaryServer::new(poller.watcher());
        let (ours, theirs) = DictionaryChannel::pair().expect("a pair");
        server.open(ours.into());
        (server, poller, theirs)
    }

    fn serve(server: &mut DictionaryServer, poller: &mut Poller) -> usize {
        let mut sources = Vec::new();
        poller.wait(Duration::ZERO, &mut sources).expect("epoll_wait");
        for source in &sources {
            let Source::Dictionary(channel) = *source else { panic!("{source:?}") };
            server.on_question(channel, Instant::now());
        }
        sources.len()
    }

    #[test]
    fn a_question_is_answered() {
        let (mut server, mut poller, channel) = server();
        let by = Value::Integer(2);
        let operation = Operation::Increment { by, ttl: None };
        let request = Request { dictionary: "d", key: b"k", operation };
        channel.send(&request, &[]).expect("room");
        assert_eq!(serve(&mut server, &mut poller), 1);
        let mut buffer = RecvBuffer::new();
        let answer = channel.try_recv(&mut buffer).expect("an answer").message;
        assert_eq!(answer, Answer::Value(Some(Value::Integer(2))));
    }

    #[test]
    fn a_channel_ends_with_its_owner() {
        let (mut server, mut poller, channel) = server();
        assert_eq!(serve(&mut server, &mut poller), 0);
        drop(channel);
        assert_eq!(serve(&mut server, &mut poller), 1);
        assert_eq!(serve(&mut server, &mut poller), 0, "it isn't watched any more");
        assert!(server.channels.is_empty());
    }
}
