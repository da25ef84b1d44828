//! The shared dictionaries as a service: which process may ask, on how many channels, and how much
//! of the loop's time it gets.
//!
//! Contract: every channel is made by the supervisor, and belongs to the process that it was handed
//! out to. A process gets one channel at its start, the opener, on which it asks for the others. On
//! each of those, one question at a time is asked. The channels of a process are closed as soon as
//! it has ended.
//!
//! # Failure
//! A process that asks for more channels than it may have is refused, and its script is told. A
//! process that passes descriptors, sends what can't be understood, or asks without reading the
//! answers is reported, and its channels are closed.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use qrelay_shared::admin;
use qrelay_shared::dictionary::{FromDictionary, Opened, Operation, ToDictionary};
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError, SendError};
use qrelay_shared::settings::{Declaration, Settings};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::descriptors::allot;
use crate::event::{Asker, Event, Events, NewAsker, OpenerChannel};
use crate::ids::{ChannelId, GenerationId};
use crate::services::dictionaries::Dictionaries;
use crate::watch::{Source, Watcher};

/// Highest number of channels of a zygote. Its script asks one question at a time; the others are
/// for questions whose time was over, until the end of their channels is seen.
const ZYGOTE_CHANNELS: usize = 8;

/// Cost of what is answered to one process before everybody else has a turn. What is left wakes the
/// loop again.
const SHARE: u32 = 64;
/// Cost of a new channel: several system calls, and later a close.
const CHANNEL_COST: u32 = 8;

/// The supervisor's end of a channel for questions.
type QuestionChannel = Channel<FromDictionary, ToDictionary>;

/// The dictionaries and the channels to them.
#[derive(Debug)]
pub(super) struct DictionaryServer {
    watcher: Watcher,
    /// The limit of this process's descriptors.
    descriptors: u64,
    dictionaries: Dictionaries,
    lines: FxHashMap<ChannelId, Line>,
    askers: FxHashMap<Asker, Budget>,
    /// Highest number of channels for each worker of a generation.
    allowed: BTreeMap<GenerationId, usize>,
    last: ChannelId,
    /// The number of this turn of the loop.
    turn: u64,
    /// The beginning of this turn, if there is something to free in the next one.
    busy: Option<Instant>,
    buffer: RecvBuffer,
}

/// A channel and its process.
#[derive(Debug)]
struct Line {
    asker: Asker,
    end: End,
}

#[derive(Debug)]
enum End {
    Opener(OpenerChannel),
    Questions(QuestionChannel),
}

/// What a process has, and what it may have in this turn.
#[derive(Debug)]
struct Budget {
    generation: GenerationId,
    opener: ChannelId,
    channels: FxHashSet<ChannelId>,
    /// The turn that `left` is for.
    turn: u64,
    /// The rest of the process' share.
    left: u32,
}

/// What has become of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The channel stays open. The value is the cost of what was done.
    Served(u32),
    /// The channel is of no more use.
    Closed,
    /// The process has done what no honest process does.
    Lied(&'static str),
}

impl Outcome {
    fn not_received(error: &RecvError) -> Self {
        match error {
            RecvError::Empty => Self::Served(0),
            RecvError::Rights => Self::Lied("it passed descriptors to a dictionary"),
            RecvError::Malformed => Self::Lied("it sent nonsense to a dictionary"),
            RecvError::Closed | RecvError::DescriptorLost | RecvError::Os(_) => Self::Closed,
        }
    }

    /// No answer waits while an honest process asks.
    fn not_sent(error: &SendError) -> Self {
        match error {
            SendError::Full => Self::Lied("it doesn't read what a dictionary answers"),
            SendError::Closed | SendError::TooLarge | SendError::Os(_) => Self::Closed,
        }
    }
}

impl DictionaryServer {
    /// Starts with no channel, and with the usual bounds. This process may have `descriptors`
    /// descriptors.
    pub(super) fn new(watcher: Watcher, descriptors: u64) -> Self {
        Self {
            watcher,
            descriptors,
            dictionaries: Dictionaries::default(),
            lines: FxHashMap::default(),
            askers: FxHashMap::default(),
            allowed: BTreeMap::new(),
            last: ChannelId::default(),
            turn: 0,
            busy: None,
            buffer: RecvBuffer::new(),
        }
    }

    /// Describes every dictionary, in the order of their names.
    pub(super) fn shown(&self) -> Vec<admin::Dictionary> {
        self.dictionaries.shown()
    }

    /// Follows these settings' bounds on memory.
    pub(super) fn set_bounds(&mut self, settings: &Settings) {
        self.dictionaries.set_bounds(settings);
    }

    /// Learns which dictionaries a generation's script has named, and how many mails each of its
    /// workers may have.
    pub(super) fn declared(&mut self, generation: GenerationId, declaration: &Declaration) {
        let allotment = allot(self.descriptors, declaration);
        self.allowed.insert(generation, allotment.channels);
        self.dictionaries.declared(generation, &declaration.dictionaries);
    }

    /// Forgets a generation of which no process is left, and frees what only that one needed.
    pub(super) fn generation_ended(&mut self, generation: GenerationId) {
        self.allowed.remove(&generation);
        self.dictionaries.generation_ended(generation);
    }

    /// Begins a turn of the loop, in which each process has its share again.
    pub(super) fn begin_turn(&mut self, now: Instant) {
        self.turn += 1;
        self.busy = self.dictionaries.free_some().then_some(now);
    }

    /// Returns when [`Self::begin_turn`] has something to do, if ever.
    pub(super) fn next_turn(&self) -> Option<Instant> {
        self.busy
    }

    /// Lets a process ask. If its opener can't be watched, it is closed, which the process sees.
    pub(super) fn asker_came(&mut self, new: NewAsker) {
        let NewAsker { asker, generation, opener } = new;
        let id = self.last.advance();
        if self.watcher.add(&opener, Source::Dictionary(id)).is_ok() {
            let channels = FxHashSet::default();
            let budget = Budget { generation, opener: id, channels, turn: self.turn, left: SHARE };
            self.lines.insert(id, Line { asker, end: End::Opener(opener) });
            self.askers.insert(asker, budget);
        }
    }

    /// Closes the channels of a process.
    pub(super) fn asker_gone(&mut self, asker: Asker) {
        let Some(budget) = self.askers.remove(&asker) else { return };
        self.close(budget.opener);
        for id in budget.channels {
            self.close(id);
        }
    }

    fn close(&mut self, id: ChannelId) {
        match self.lines.remove(&id).map(|line| line.end) {
            Some(End::Opener(channel)) => self.watcher.remove(&channel),
            Some(End::Questions(channel)) => self.watcher.remove(&channel),
            None => {}
        }
    }

    /// Answers what is asked on a channel, unless its process has had its share of this turn.
    pub(super) fn on_ready(&mut self, id: ChannelId, now: Instant, events: &mut Events) {
        let Some(line) = self.lines.get(&id) else { return };
        let asker = line.asker;
        let Some(budget) = self.askers.get_mut(&asker) else { return };
        if budget.turn != self.turn {
            (budget.turn, budget.left) = (self.turn, SHARE);
        }
        if budget.left == 0 {
            return;
        }
        let generation = budget.generation;
        let outcome = match &line.end {
            End::Opener(_) => self.on_wish(id, asker),
            End::Questions(_) => self.on_question(id, generation, now),
        };
        match outcome {
            Outcome::Served(cost) => {
                if let Some(budget) = self.askers.get_mut(&asker) {
                    budget.left = budget.left.saturating_sub(cost);
                }
            }
            Outcome::Closed => {
                self.close(id);
                if let Some(budget) = self.askers.get_mut(&asker) {
                    budget.channels.remove(&id);
                }
            }
            Outcome::Lied(complaint) => {
                self.asker_gone(asker);
                events.push_back(Event::AskerLied { asker, complaint });
            }
        }
    }

    fn on_question(&mut self, id: ChannelId, generation: GenerationId, now: Instant) -> Outcome {
        let Some(Line { end: End::Questions(channel), .. }) = self.lines.get(&id) else {
            return Outcome::Closed;
        };
        let request = match channel.try_recv(&mut self.buffer) {
            Ok(received) => received.message,
            Err(error) => return Outcome::not_received(&error),
        };
        let cost = match request.operation {
            // All keys may have to be looked at.
            Operation::Keys { .. } => SHARE,
            _ => 1,
        };
        let answer = self.dictionaries.answer(generation, request, now);
        match channel.try_send(&answer, &[]) {
            Ok(()) => Outcome::Served(cost),
            Err(error) => Outcome::not_sent(&error),
        }
    }

    /// Hands out a channel, or refuses it.
    fn on_wish(&mut self, id: ChannelId, asker: Asker) -> Outcome {
        let Some(Line { end: End::Opener(opener), .. }) = self.lines.get(&id) else {
            return Outcome::Closed;
        };
        if let Err(error) = opener.try_recv(&mut self.buffer) {
            return Outcome::not_received(&error);
        }
        let made = self.make(asker);
        let Some(Line { end: End::Opener(opener), .. }) = self.lines.get(&id) else {
            return Outcome::Closed;
        };
        let (made, sent) = match made {
            Ok((made, theirs)) => {
                (Some(made), opener.try_send(&Opened::Channel, &[theirs.as_fd()]))
            }
            Err(cause) => (None, opener.try_send(&Opened::Refused(cause.into()), &[])),
        };
        match sent {
            Ok(()) => {
                if let (Some(made), Some(budget)) = (made, self.askers.get_mut(&asker)) {
                    budget.channels.insert(made);
                }
                Outcome::Served(CHANNEL_COST)
            }
            Err(error) => {
                if let Some(made) = made {
                    self.close(made);
                }
                Outcome::not_sent(&error)
            }
        }
    }

    /// Makes a channel for a process. Returns its number and the process' end.
    ///
    /// # Errors
    /// A text for the script.
    fn make(&mut self, asker: Asker) -> Result<(ChannelId, OwnedFd), &'static str> {
        let allowed = self.askers.get(&asker).filter(|budget| {
            let most = match asker {
                Asker::Zygote(_) => ZYGOTE_CHANNELS,
                Asker::Worker(_) => {
                    self.allowed.get(&budget.generation).copied().unwrap_or_default()
                }
            };
            budget.channels.len() < most
        });
        allowed.ok_or("too many questions at once")?;
        let (ours, theirs) = QuestionChannel::pair().map_err(|errno| errno.desc())?;
        let ours = ours.foreign();
        let id = self.last.advance();
        self.watcher.add(&ours, Source::Dictionary(id)).map_err(|errno| errno.desc())?;
        self.lines.insert(id, Line { asker, end: End::Questions(ours) });
        Ok((id, theirs.into()))
    }
}

/// Returns an opener for the script of one process, with dictionaries that nobody else sees. They
/// last until the opener and all channels are closed; a thread answers on each. `None` if the
/// system has no thread or no sockets.
pub fn alone() -> Option<OwnedFd> {
    let (opener, theirs) = OpenerChannel::pair().ok()?;
    std::thread::Builder::new().spawn(move || serve_alone(&opener)).ok()?;
    Some(theirs.into())
}

fn serve_alone(opener: &OpenerChannel) {
    let dictionaries = Arc::new(Mutex::new(Dictionaries::default()));
    let mut buffer = RecvBuffer::new();
    while opener.recv(&mut buffer).is_ok() {
        let Ok((channel, theirs)) = QuestionChannel::pair() else { return };
        let theirs = OwnedFd::from(theirs);
        let own = Arc::clone(&dictionaries);
        let answering = std::thread::Builder::new().spawn(move || answer_alone(&channel, &own));
        if answering.is_err() || opener.send(&Opened::Channel, &[theirs.as_fd()]).is_err() {
            return;
        }
    }
}

/// Answers on one channel until it is closed.
fn answer_alone(channel: &QuestionChannel, dictionaries: &Mutex<Dictionaries>) {
    let mut buffer = RecvBuffer::new();
    while let Ok(received) = channel.recv(&mut buffer) {
        let mut dictionaries = dictionaries.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = dictionaries.answer(GenerationId::default(), received.message, Instant::now());
        if channel.send(&answer, &[]).is_err() {
            return;
        }
    }
}

#[cfg(test)]
#[path = "dictionary_server_tests.rs"]
mod tests;
