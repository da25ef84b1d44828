//! The flight recorder: what a worker notes about each of its mails in memory that outlives it.
//!
//! Contract: the memory is an array of slots of [`SLOT`] bytes. A worker that serves a mail has one
//! slot for it, and writes as it goes along, without a system call. The supervisor reads the memory
//! when the worker is dead, or when somebody asks what is in flight.
//!
//! # Failure
//! The reader trusts no byte: a length is cut to its field, and an unknown number counts as
//! nothing. A text that was being written when the worker died is left out.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::ids::JobId;
use crate::qmqp::Status;

/// Bytes of a slot.
pub const SLOT: usize = 8 * WORDS;

/// Words of a slot.
const WORDS: usize = 128;

/// Most bytes of a sender: the longest address.
const SENDER: usize = 256;
/// Most bytes of the recipients, each with its length before it: as many of the first ones as fit.
const RECIPIENTS: usize = 448;
/// Most bytes of an account.
const ACCOUNT: usize = 128;
/// Most bytes of the name of a next hop or program.
const NEXT_HOP: usize = 128;

// The words of a slot.
const JOB: usize = 0;
const PHASE: usize = 1;
const SINCE: usize = 2;
/// Odd while the texts are being written.
const VERSION: usize = 3;
const COUNT: usize = 4;
const SIZE: usize = 5;
const RECEIVED: usize = 6;
const LENGTHS: usize = 7;
const TEXTS: usize = 8;
const SENDER_AT: usize = TEXTS;
const RECIPIENTS_AT: usize = SENDER_AT + SENDER / 8;
const ACCOUNT_AT: usize = RECIPIENTS_AT + RECIPIENTS / 8;
const NEXT_HOP_AT: usize = ACCOUNT_AT + ACCOUNT / 8;

const _: () = assert!(NEXT_HOP_AT + NEXT_HOP / 8 == WORDS, "a slot is full");

/// What a mail is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its request is being read.
    Reading,
    /// Its handler runs, or waits for its turn to run.
    Lua,
    /// Its handler waits for something.
    LuaWaits,
    /// A connection to the next hop is being made.
    Connecting,
    /// The next hop has the request, or a part of it.
    NextHop,
    /// A program runs for it.
    Program,
    /// The client's answer, which has this status, is being sent.
    Answering(Status),
    /// The client has got all of its answer, which has this status.
    Answered(Status),
}

const STATUSES: [Status; 3] = [Status::Accepted, Status::Temporary, Status::Permanent];
const ANSWERING: u64 = 16;
const ANSWERED: u64 = 32;

impl Phase {
    fn code(self) -> u64 {
        let of = |status| STATUSES.iter().position(|&other| other == status).unwrap_or(0) as u64;
        match self {
            Self::Reading => 1,
            Self::Lua => 2,
            Self::LuaWaits => 3,
            Self::Connecting => 4,
            Self::NextHop => 5,
            Self::Program => 6,
            Self::Answering(status) => ANSWERING + of(status),
            Self::Answered(status) => ANSWERED + of(status),
        }
    }

    fn from_code(code: u64) -> Option<Self> {
        let status = |first: u64| STATUSES.get((code - first) as usize).copied();
        Some(match code {
            1 => Self::Reading,
            2 => Self::Lua,
            3 => Self::LuaWaits,
            4 => Self::Connecting,
            5 => Self::NextHop,
            6 => Self::Program,
            ANSWERED.. => Self::Answered(status(ANSWERED)?),
            ANSWERING.. => Self::Answering(status(ANSWERING)?),
            _ => return None,
        })
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reading => "reading",
            Self::Lua => "lua",
            Self::LuaWaits => "lua_waits",
            Self::Connecting => "connecting",
            Self::NextHop => "next_hop",
            Self::Program => "program",
            Self::Answering(_) => "answering",
            Self::Answered(_) => "answered",
        })
    }
}

/// What is noted of a mail once its request is complete.
#[derive(Debug)]
pub struct Envelope<'a, R> {
    /// Envelope sender.
    pub sender: &'a [u8],
    /// All envelope recipients.
    pub recipients: R,
    /// The account that the script has set.
    pub account: &'a str,
    /// Bytes of the message with inserted lines.
    pub size: u64,
    /// Bytes of the request's payload.
    pub received: u64,
}

/// The worker's side of a slot.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'m>(&'m [AtomicU64; WORDS]);

impl<'m> Writer<'m> {
    /// Returns the slot with this index; `None` if the memory is too small.
    pub fn new(memory: &'m [AtomicU64], index: usize) -> Option<Self> {
        let (slots, _) = memory.as_chunks();
        slots.get(index).map(Self)
    }

    /// Begins to note a job.
    pub fn begin(self, job: JobId, since: u64) {
        for word in &self.0[COUNT..TEXTS] {
            word.store(0, Ordering::Relaxed);
        }
        self.enter(Phase::Reading, since);
        self.0[JOB].store(job.0, Ordering::Release);
    }

    /// Ends the job: the slot names no mail any more.
    pub fn end(self) {
        self.0[JOB].store(0, Ordering::Release);
    }

    /// Notes what the mail does from now on. `since` is a time in nanoseconds of CLOCK_BOOTTIME.
    pub fn enter(self, phase: Phase, since: u64) {
        self.0[SINCE].store(since, Ordering::Relaxed);
        self.0[PHASE].store(phase.code(), Ordering::Release);
    }

    /// Notes the envelope.
    pub fn envelope<'r, R>(self, envelope: Envelope<'_, R>)
    where
        R: IntoIterator<Item = &'r [u8]>,
    {
        let mut bytes = [0; RECIPIENTS];
        let (mut used, mut count) = (0, 0);
        for recipient in envelope.recipients {
            count += 1;
            let length = u8::try_from(recipient.len()).ok();
            if let Some(length) = length
                && let Some(room) = bytes.get_mut(used..used + 1 + recipient.len())
            {
                room[0] = length;
                room[1..].copy_from_slice(recipient);
                used += room.len();
            }
        }
        let (sender, account) =
            (cut(envelope.sender, SENDER), cut(envelope.account.as_bytes(), ACCOUNT));
        self.write(|slot| {
            slot[COUNT].store(count, Ordering::Relaxed);
            slot[SIZE].store(envelope.size, Ordering::Relaxed);
            slot[RECEIVED].store(envelope.received, Ordering::Relaxed);
            let lengths = [sender.len(), used, account.len(), 0].map(|length| length as u64);
            slot[LENGTHS].store(pack(lengths), Ordering::Relaxed);
            store(&slot[SENDER_AT..], sender);
            store(&slot[RECIPIENTS_AT..], &bytes[..used]);
            store(&slot[ACCOUNT_AT..], account);
        });
    }

    /// Notes the account that the script sets.
    pub fn account(self, account: &str) {
        self.replace(2, ACCOUNT_AT, cut(account.as_bytes(), ACCOUNT));
    }

    /// Notes where the mail goes.
    pub fn next_hop(self, name: &str) {
        self.replace(3, NEXT_HOP_AT, cut(name.as_bytes(), NEXT_HOP));
    }

    /// Replaces the text whose length is at `place` among the lengths.
    fn replace(self, place: usize, at: usize, text: &[u8]) {
        self.write(|slot| {
            let mut lengths = unpack(slot[LENGTHS].load(Ordering::Relaxed));
            lengths[place] = text.len() as u64;
            slot[LENGTHS].store(pack(lengths), Ordering::Relaxed);
            store(&slot[at..], text);
        });
    }

    fn write(self, write: impl FnOnce(&[AtomicU64; WORDS])) {
        let version = self.0[VERSION].load(Ordering::Relaxed) | 1;
        self.0[VERSION].store(version, Ordering::Relaxed);
        fence(Ordering::Release);
        write(self.0);
        self.0[VERSION].store(version.wrapping_add(1), Ordering::Release);
    }
}

fn cut(bytes: &[u8], most: usize) -> &[u8] {
    &bytes[..bytes.len().min(most)]
}

fn store(words: &[AtomicU64], bytes: &[u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_ne_bytes(whole), Ordering::Relaxed);
    }
}

fn pack(lengths: [u64; 4]) -> u64 {
    lengths.iter().rev().fold(0, |packed, length| packed << 16 | length & 0xffff)
}

fn unpack(packed: u64) -> [u64; 4] {
    [0, 16, 32, 48].map(|shift| packed >> shift & 0xffff)
}

/// What a slot says about a mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flight {
    /// The mail's job.
    pub job: JobId,
    /// What the mail does.
    pub phase: Phase,
    /// Since when, in nanoseconds of CLOCK_BOOTTIME.
    pub since: u64,
    /// Envelope sender, as received or as the script has set it.
    pub sender: Vec<u8>,
    /// The first envelope recipients.
    pub recipients: Vec<Vec<u8>>,
    /// Number of all recipients; 0 while the request isn't complete.
    pub recipient_count: u32,
    /// The account that the script has set; empty if none is known.
    pub account: String,
    /// The next hop or program; empty if none is known.
    pub next_hop: String,
    /// Bytes of the message.
    pub size: u64,
    /// Bytes of the request's payload.
    pub received: u64,
}

/// Reads the slot that begins `bytes`; `None` if it names no mail.
pub fn read(bytes: &[u8; SLOT]) -> Option<Flight> {
    let (words, _) = bytes.as_chunks::<8>();
    let word = |at: usize| words.get(at).map_or(0, |word| u64::from_ne_bytes(*word));
    let job = Some(JobId(word(JOB))).filter(|&job| job != JobId::default())?;
    let phase = Phase::from_code(word(PHASE))?;
    let mut flight = Flight {
        job,
        phase,
        since: word(SINCE),
        sender: Vec::new(),
        recipients: Vec::new(),
        recipient_count: 0,
        account: String::new(),
        next_hop: String::new(),
        size: 0,
        received: 0,
    };
    if word(VERSION) & 1 == 1 {
        return Some(flight);
    }
    let lengths = unpack(word(LENGTHS));
    let text = |at: usize, place: usize, most: usize| {
        let length = (lengths[place] as usize).min(most);
        bytes.get(8 * at..8 * at + length).unwrap_or_default()
    };
    let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    flight.sender = text(SENDER_AT, 0, SENDER).to_vec();
    let mut rest = text(RECIPIENTS_AT, 1, RECIPIENTS);
    while let Some((&length, after)) = rest.split_first()
        && let Some((recipient, after)) = after.split_at_checked(usize::from(length))
    {
        flight.recipients.push(recipient.to_vec());
        rest = after;
    }
    flight.account = lossy(text(ACCOUNT_AT, 2, ACCOUNT));
    flight.next_hop = lossy(text(NEXT_HOP_AT, 3, NEXT_HOP));
    flight.recipient_count = u32::try_from(word(COUNT)).unwrap_or(u32::MAX);
    flight.size = word(SIZE);
    flight.received = word(RECEIVED);
    Some(flight)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(slots: usize) -> Vec<AtomicU64> {
        (0..slots * WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    fn bytes(memory: &[AtomicU64], index: usize) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        let words = &memory[index * WORDS..][..WORDS];
        for (chunk, word) in bytes.chunks_mut(8).zip(words) {
            chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes
    }

    fn envelope<'a>(
        sender: &'a [u8],
        recipients: &'a [&'a [u8]],
        account: &'a str,
    ) -> Envelope<'a, impl Iterator<Item = &'a [u8]>> {
        let recipients = recipients.iter().copied();
        Envelope { sender, recipients, account, size: 5, received: 7 }
    }

    #[test]
    fn what_is_written_is_read() {
        let memory = memory(2);
        assert_eq!(read(&bytes(&memory, 1)), None);
        let slot = Writer::new(&memory, 1).expect("a slot");
        slot.begin(JobId(9), 100);
        let flight = read(&bytes(&memory, 1)).expect("a mail");
        assert_eq!((flight.job, flight.phase, flight.since), (JobId(9), Phase::Reading, 100));
        assert_eq!((flight.recipient_count, &*flight.sender), (0, &b""[..]));
        slot.envelope(envelope(b"sender@x", &[b"r1@x", b"recipient-2@x"], "site"));
        slot.enter(Phase::NextHop, 200);
        slot.next_hop("192.0.2.1:628");
        slot.account("another");
        let flight = read(&bytes(&memory, 1)).expect("a mail");
        let expected = Flight {
            job: JobId(9),
            phase: Phase::NextHop,
            since: 200,
            sender: b"sender@x".to_vec(),
            recipients: vec![b"r1@x".to_vec(), b"recipient-2@x".to_vec()],
            recipient_count: 2,
            account: "another".into(),
            next_hop: "192.0.2.1:628".into(),
            size: 5,
            received: 7,
        };
        assert_eq!(flight, expected);
        slot.end();
        assert_eq!((read(&bytes(&memory, 0)), read(&bytes(&memory, 1))), (None, None));
        slot.begin(JobId(10), 300);
        let flight = read(&bytes(&memory, 1)).expect("a mail");
        assert!(flight.sender.is_empty() && flight.next_hop.is_empty(), "{flight:?}");
        assert!(Writer::new(&memory, 2).is_none());
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let memory = memory(1);
        let slot = Writer::new(&memory, 0).expect("a slot");
        slot.begin(JobId(1), 0);
        let (long, short) = ([b'r'; 254], b"s@x");
        slot.envelope(envelope(&[b's'; 300], &[&long, &long, short], &"a".repeat(500)));
        slot.next_hop(&"n".repeat(500));
        let flight = read(&bytes(&memory, 0)).expect("a mail");
        assert_eq!(flight.recipients, [long.to_vec(), short.to_vec()]);
        assert_eq!(flight.recipient_count, 3);
        let lengths = (flight.sender.len(), flight.account.len(), flight.next_hop.len());
        assert_eq!(lengths, (SENDER, ACCOUNT, NEXT_HOP));
    }

    #[test]
    fn every_phase_survives() {
        let answers = STATUSES.map(|s| [Phase::Answering(s), Phase::Answered(s)]);
        let others = [
            Phase::Reading,
            Phase::Lua,
            Phase::LuaWaits,
            Phase::Connecting,
            Phase::NextHop,
            Phase::Program,
        ];
        for phase in others.into_iter().chain(answers.into_iter().flatten()) {
            assert_eq!(Phase::from_code(phase.code()), Some(phase));
        }
        for code in [0, 7, 15, 19, 31, 35, u64::MAX] {
            assert_eq!(Phase::from_code(code), None, "{code}");
        }
    }

    #[test]
    fn no_byte_is_trusted() {
        let mut bytes = [0xff; SLOT];
        assert_eq!(read(&bytes), None, "no such phase");
        bytes[8 * PHASE..8 * PHASE + 8].copy_from_slice(&1u64.to_ne_bytes());
        assert!(read(&bytes).expect("a mail").sender.is_empty(), "half written");
        bytes[8 * VERSION..8 * VERSION + 8].copy_from_slice(&2u64.to_ne_bytes());
        let flight = read(&bytes).expect("a mail");
        assert_eq!(flight.sender.len(), SENDER);
        assert_eq!(flight.recipients.len(), 1);
        assert!(flight.account.chars().all(|c| c == char::REPLACEMENT_CHARACTER));
    }
}
