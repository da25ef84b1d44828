//! What each of this worker's mails is doing: in memory that outlives this process, for the
//! supervisor ([`qrelay_shared::flight`]), and added up as times, for the log.
//!
//! Contract: nothing here calls the system but for the clock. A mail keeps its slot until its
//! report has been sent, because until then the supervisor counts on this process to answer.
//!
//! # Failure
//! Without memory, or with more mails than slots, only the times are noted.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use qrelay_shared::flight::{Envelope, Phase, SLOT, Writer};
use qrelay_shared::ids::JobId;
use qrelay_shared::ipc::message::{Job, Times};

use crate::clock::now;

/// The memory for this worker's mails, and which slots are free.
pub struct Recorder {
    memory: &'static [AtomicU64],
    /// The slot that was used last comes last, so that few pages are in use.
    free: Mutex<Vec<usize>>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("words", &self.memory.len()).finish_non_exhaustive()
    }
}

/// A mail's place in the memory; dropping it frees the place.
#[derive(Debug)]
pub(crate) struct Slot {
    recorder: Arc<Recorder>,
    index: usize,
    writer: Writer<'static>,
}

impl Recorder {
    /// Takes the memory, which may have no slot.
    pub fn new(memory: &'static [AtomicU64]) -> Arc<Self> {
        let slots = size_of_val(memory) / SLOT;
        Arc::new(Self { memory, free: Mutex::new((0..slots).rev().collect()) })
    }

    fn take(self: &Arc<Self>, job: JobId, since: Duration) -> Option<Slot> {
        let index = self.free.lock().pop()?;
        let writer = Writer::new(self.memory, index)?;
        writer.begin(job, nanoseconds(since));
        Some(Slot { recorder: Arc::clone(self), index, writer })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.writer.end();
        self.recorder.free.lock().push(self.index);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What the time of a mail is counted as.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Queue,
    Read,
    Lua,
    Hop,
    Answer,
}

impl From<Phase> for Kind {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Reading => Self::Read,
            Phase::Lua | Phase::LuaWaits => Self::Lua,
            Phase::Connecting | Phase::NextHop | Phase::Program => Self::Hop,
            Phase::Answering(_) | Phase::Answered(_) => Self::Answer,
        }
    }
}

/// One mail's notes.
#[derive(Debug)]
pub(crate) struct Flight {
    slot: Option<Slot>,
    writer: Option<Writer<'static>>,
    kind: Cell<Kind>,
    since: Cell<Duration>,
    spent: [Cell<Duration>; 5],
}

impl Flight {
    /// Begins with a job that has been received and waits for a thread.
    pub(crate) fn new(recorder: &Arc<Recorder>, job: &Job) -> Self {
        let spoke = Duration::from_nanos(job.spoke);
        let slot = recorder.take(job.job, spoke);
        let flight = Self {
            writer: slot.as_ref().map(|slot| slot.writer),
            slot,
            kind: Cell::new(Kind::Queue),
            since: Cell::new(spoke),
            spent: Default::default(),
        };
        // Until its first byte the client took its time.
        flight.add(Kind::Read, spoke.saturating_sub(Duration::from_nanos(job.accepted)));
        flight
    }

    /// Notes what the mail does from now on.
    pub(crate) fn enter(&self, phase: Phase) {
        let now = now();
        self.add(self.kind.get(), now.saturating_sub(self.since.get()));
        self.since.set(now);
        self.kind.set(phase.into());
        if let Some(writer) = self.writer {
            writer.enter(phase, nanoseconds(now));
        }
    }

    fn add(&self, kind: Kind, time: Duration) {
        let spent = &self.spent[kind as usize];
        spent.set(spent.get() + time);
    }

    /// Notes the envelope.
    pub(crate) fn envelope<'r, R>(&self, envelope: Envelope<'_, R>)
    where
        R: IntoIterator<Item = &'r [u8]>,
    {
        if let Some(writer) = self.writer {
            writer.envelope(envelope);
        }
    }

    /// Returns where the mail's account is to be noted when the script sets it.
    pub(crate) fn writer(&self) -> Option<Writer<'static>> {
        self.writer
    }

    /// Notes where the mail goes.
    pub(crate) fn next_hop(&self, name: &str) {
        if let Some(writer) = self.writer {
            writer.next_hop(name);
        }
    }

    /// Returns the times until the last [`Self::enter`].
    pub(crate) fn times(&self) -> Times {
        let of = |kind: Kind| {
            u64::try_from(self.spent[kind as usize].get().as_micros()).unwrap_or(u64::MAX)
        };
        Times {
            queue: of(Kind::Queue),
            read: of(Kind::Read),
            lua: of(Kind::Lua),
            hop: of(Kind::Hop),
        }
    }

    /// Takes the slot, which the caller keeps until the report has been sent. Nothing may be noted
    /// any more.
    pub(crate) fn land(&mut self) -> Option<Slot> {
        self.writer = None;
        self.slot.take()
    }
}

#[cfg(test)]
impl Flight {
    /// Notes for a test that reads none.
    pub(crate) fn unrecorded() -> Self {
        let kind = Cell::new(Kind::Queue);
        Self { slot: None, writer: None, kind, since: Cell::default(), spent: Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrelay_shared::flight::read;
    use qrelay_shared::ids::ListenerId;
    use qrelay_shared::ipc::message::Peer;
    use qrelay_shared::sys::recorder::{create, flights, map};
    use qrelay_shared::sys::rights::Rights;
    use std::os::fd::AsFd;

    fn job(number: u64) -> Job {
        let spoke = nanoseconds(now());
        Job {
            job: JobId(number),
            listener: 0,
            listening: ListenerId(1),
            peer: Peer::Local { pid: None, uid: 0, gid: 0 },
            rights: Rights::Refused,
            accepted: spoke.saturating_sub(2_000_000),
            spoke,
        }
    }

    #[test]
    fn slots_are_used_again() {
        let memory = create(2).expect("memory");
        let recorder = Recorder::new(map(memory.as_fd()).expect("a mapping"));
        let jobs = || -> Vec<u64> {
            flights(&memory).expect("readable").iter().map(|flight| flight.job.0).collect()
        };
        let mut first = Flight::new(&recorder, &job(1));
        let second = Flight::new(&recorder, &job(2));
        let third = Flight::new(&recorder, &job(3));
        assert_eq!(jobs(), [1, 2], "there is no place for the third");
        third.enter(Phase::Lua);
        let slot = first.land();
        first.enter(Phase::Lua);
        assert_eq!(jobs(), [1, 2]);
        drop(slot);
        let fourth = Flight::new(&recorder, &job(4));
        assert_eq!(jobs(), [4, 2]);
        drop((second, fourth));
        assert!(jobs().is_empty());
        assert!(read(&[0; SLOT]).is_none());
    }

    #[test]
    fn times_are_added_up() {
        let recorder = Recorder::new(&[]);
        let flight = Flight::new(&recorder, &job(1));
        assert_eq!(flight.times().read, 2000, "from the accept to the first byte");
        flight.enter(Phase::Lua);
        let queue = flight.times().queue;
        flight.enter(Phase::LuaWaits);
        flight.enter(Phase::NextHop);
        assert_eq!(flight.times().queue, queue, "that is over");
        assert_eq!(flight.times().hop, 0, "not over yet");
    }
}
