//! The load generator: a fixed number of QMQP clients. Each client sends a mail, waits for the
//! answer and sends the next one.
//!
//! Contract: the request is built once. Each mail costs socket, connect, send, an epoll
//! registration, recv and close, and a share of an `epoll_wait`. When the time is up, no new mail
//! starts, and the answers of all mails under way are awaited for `GRACE` at most. The outcome is
//! one line on stdout (`Outcome`).
//!
//! # Failure
//! A client whose connection fails, or ends without a complete answer, counts as silent. A client
//! that can't connect sends no more mails in this run.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        resource::{UsageWho, getrusage},
        socket::{MsgFlags, recv, send},
        time::TimeValLike,
    },
};

use crate::{
    netstring::{Extent, extent, request},
    outcome::{Answers, Outcome},
};

/// Longest wait for the next answer. The limit has to tell a slow relay from a silent one, so it
/// need not exceed qrelay's `relay_timeout`.
const GRACE: Duration = Duration::from_secs(20);

/// Largest answer in bytes, with room to spare: qrelay cuts the text to 255 bytes.
const ANSWER: usize = 512;

/// The load of one slot.
pub struct Plan<'a> {
    /// Socket of the measured relay.
    pub socket: &'a Path,
    /// Number of clients that send at the same time.
    pub clients: usize,
    /// Number of threads over which the clients are spread.
    pub threads: usize,
    /// Size of each message in bytes.
    pub size: usize,
    /// Time during which mails are started.
    pub duration: Duration,
    /// Highest number of mails to start.
    pub mails: u64,
}

/// Sends mails as planned, and sums up their answers and times.
pub fn run(plan: &Plan<'_>) -> io::Result<Outcome> {
    let request = request(plan.size);
    let start = Instant::now();
    let tallies = thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads)
            .map(|index| {
                let clients = (plan.clients + index) / plan.threads;
                let mails = plan.mails / plan.threads as u64;
                let more = u64::from((index as u64) < plan.mails % plan.threads as u64);
                let request = &request;
                let share = (clients, mails + more);
                scope.spawn(move || Generator::new(plan, request, share, start)?.run())
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
            .collect::<io::Result<Vec<Tally>>>()
    })?;
    let elapsed = start.elapsed();
    let mut answers = Answers::default();
    let mut latencies = Vec::new();
    for tally in tallies {
        answers += tally.answers;
        latencies.extend(tally.latencies);
    }
    Ok(Outcome::new(answers, elapsed, &mut latencies, own_cpu()?))
}

/// Sends one mail and returns its whole answer.
pub fn submit(socket: &Path, size: usize) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(GRACE))?;
    stream.write_all(&request(size))?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Returns the first byte of the text of a complete answer.
pub fn verdict(answer: &[u8]) -> Option<u8> {
    let colon = answer.iter().position(|byte| *byte == b':')?;
    match extent(answer) {
        Extent::Total(total) if answer.len() == total => answer.get(colon + 1).copied(),
        _ => None,
    }
}

fn own_cpu() -> io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(micros.unsigned_abs()))
}

/// The answers that one thread received, with their times.
#[derive(Default)]
struct Tally {
    answers: Answers,
    latencies: Vec<Duration>,
}

/// A mail under way.
struct Mail {
    stream: UnixStream,
    started: Instant,
    answer: [u8; ANSWER],
    filled: usize,
}

/// The clients of one thread.
struct Generator<'a> {
    epoll: Epoll,
    socket: &'a Path,
    request: &'a [u8],
    until: Instant,
    /// Number of mails that this thread may still start.
    left: u64,
    mails: Vec<Option<Mail>>,
    under_way: usize,
    tally: Tally,
}

impl<'a> Generator<'a> {
    /// Creates a generator with a thread's share of the clients and of the mails.
    fn new(
        plan: &Plan<'a>,
        request: &'a [u8],
        (clients, left): (usize, u64),
        start: Instant,
    ) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            socket: plan.socket,
            request,
            until: start + plan.duration,
            left,
            mails: (0..clients).map(|_| None).collect(),
            under_way: 0,
            tally: Tally::default(),
        })
    }

    fn run(mut self) -> io::Result<Tally> {
        for client in 0..self.mails.len() {
            self.start(client, Instant::now());
        }
        let mut events = [EpollEvent::empty(); 64];
        let timeout = EpollTimeout::try_from(GRACE).unwrap_or(EpollTimeout::NONE);
        while self.under_way > 0 {
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            if count == 0 {
                self.tally.answers.silent += self.under_way as u64;
                break;
            }
            for event in &events[..count] {
                self.receive(event.data() as usize);
            }
        }
        Ok(self.tally)
    }

    /// Starts a client's next mail if any is left to send. A client that can't connect stays idle.
    fn start(&mut self, client: usize, now: Instant) {
        let Some(left) = self.left.checked_sub(1) else { return };
        self.left = left;
        match self.submit(client, now) {
            Ok(mail) => {
                self.mails[client] = Some(mail);
                self.under_way += 1;
            }
            Err(_) => self.tally.answers.silent += 1,
        }
    }

    fn submit(&self, client: usize, now: Instant) -> io::Result<Mail> {
        let stream = UnixStream::connect(self.socket)?;
        let mut rest = self.request;
        while !rest.is_empty() {
            rest = &rest[send(stream.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL)?..];
        }
        self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, client as u64))?;
        Ok(Mail { stream, started: now, answer: [0; ANSWER], filled: 0 })
    }

    fn receive(&mut self, client: usize) {
        let Some(mail) = &mut self.mails[client] else { return };
        let Some(verdict) = mail.receive() else { return };
        let now = Instant::now();
        self.tally.answers.count(verdict);
        self.tally.latencies.push(now - mail.started);
        self.mails[client] = None;
        self.under_way -= 1;
        if now < self.until {
            self.start(client, now);
        }
    }
}

impl Mail {
    /// Reads the bytes that have arrived. Returns the first byte of the complete answer, 0 for
    /// silence, and `None` while the answer is incomplete.
    fn receive(&mut self) -> Option<u8> {
        let free = &mut self.answer[self.filled..];
        match recv(self.stream.as_raw_fd(), free, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Some(0),
            Ok(count) => self.filled += count,
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            Err(_) => return Some(0),
        }
        let answer = &self.answer[..self.filled];
        match extent(answer) {
            Extent::Total(total) if answer.len() >= total => {
                let colon = answer.iter().position(|byte| *byte == b':')?;
                Some(if answer[total - 1] == b',' { answer[colon + 1] } else { 0 })
            }
            Extent::Malformed => Some(0),
            Extent::Total(_) | Extent::Unknown => None,
        }
    }
}
