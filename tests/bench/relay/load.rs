//! The load generator: a number of QMQP clients, in a closed or an open loop.
//!
//! Contract: the request is built once. Each mail costs socket, connect, send, an epoll
//! registration, recv and close, and a share of an `epoll_wait`; a mail that doesn't fit the
//! socket's buffer costs further rounds. In a closed loop each client sends a mail, waits for the
//! answer and sends the next one. In an open loop mails are due at random moments, whatever has
//! been answered, and a latency counts from the moment at which the mail was due, even if it
//! started later because no client was idle. When the time is up, no new mail starts, and the
//! answers of all mails under way are awaited for `GRACE` at most. The outcome is one line on
//! stdout (`Outcome`).
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
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use crate::{
    netstring::{Extent, extent, request},
    outcome::{Answers, Outcome},
};

/// Longest wait for the next answer. The limit has to tell a slow relay from a silent one, so it
/// need not exceed qrelay's `relay_timeout`.
const GRACE: Duration = Duration::from_secs(20);

/// Key of the timer among the epoll events; the key of a mail is its client's index.
const TIMER: u64 = u64::MAX;

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
    /// Mails per second, in an open loop; 0 stands for a closed loop.
    pub rate: f64,
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
                scope.spawn(move || {
                    let pace = Pace::new(plan, index, start)?;
                    Generator::new(plan, request, share, pace, start)?.run()
                })
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

/// Returns the CPU time of this process and of its children that have ended.
pub fn own_cpu() -> io::Result<Duration> {
    let mut micros = 0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        micros += (usage.user_time() + usage.system_time()).num_microseconds();
    }
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
    /// When the mail was due; its latency counts from then.
    since: Instant,
    /// Number of bytes of the request that have been sent.
    sent: usize,
    answer: [u8; ANSWER],
    filled: usize,
}

/// When the clients of one thread start their mails.
enum Pace {
    /// As soon as the answer to the mail before has come.
    Closed,
    /// At random moments that don't depend on answers, as independent senders do.
    Open { mean: Duration, due: Instant, random: u64, timer: TimerFd },
}

impl Pace {
    fn new(plan: &Plan<'_>, index: usize, start: Instant) -> io::Result<Self> {
        if plan.rate <= 0.0 {
            return Ok(Self::Closed);
        }
        let mean = Duration::from_secs_f64(plan.threads as f64 / plan.rate);
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
        // Every slot has the same moments.
        let random = 0x9e37_79b9_7f4a_7c15 * (index as u64 + 1);
        Ok(Self::Open { mean, due: start, random, timer })
    }
}

/// The clients of one thread.
struct Generator<'a> {
    epoll: Epoll,
    socket: &'a Path,
    request: &'a [u8],
    until: Instant,
    pace: Pace,
    /// Number of mails that this thread may still start.
    left: u64,
    mails: Vec<Option<Mail>>,
    /// Indexes of the clients without a mail under way.
    idle: Vec<usize>,
    under_way: usize,
    tally: Tally,
}

impl<'a> Generator<'a> {
    /// Creates a generator with a thread's share of the clients and of the mails.
    fn new(
        plan: &Plan<'a>,
        request: &'a [u8],
        (clients, left): (usize, u64),
        pace: Pace,
        start: Instant,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        if let Pace::Open { timer, .. } = &pace {
            epoll.add(timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        }
        Ok(Self {
            epoll,
            socket: plan.socket,
            request,
            until: start + plan.duration,
            pace,
            left,
            mails: (0..clients).map(|_| None).collect(),
            idle: (0..clients).collect(),
            under_way: 0,
            tally: Tally::default(),
        })
    }

    fn run(mut self) -> io::Result<Tally> {
        let mut events = [EpollEvent::empty(); 256];
        if matches!(self.pace, Pace::Closed) {
            for client in std::mem::take(&mut self.idle) {
                self.start(client, Instant::now());
            }
        }
        let timeout = EpollTimeout::try_from(GRACE).unwrap_or(EpollTimeout::NONE);
        while self.start_due()? || self.under_way > 0 {
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            if count == 0 {
                self.tally.answers.silent += self.under_way as u64;
                break;
            }
            for event in &events[..count] {
                match event.data() {
                    TIMER => {}
                    client => self.advance(client as usize),
                }
            }
        }
        Ok(self.tally)
    }

    /// Starts the mails that are due. Returns whether more will be due.
    fn start_due(&mut self) -> io::Result<bool> {
        let Pace::Open { mean, mut due, mut random, .. } = self.pace else { return Ok(false) };
        while due < self.until && due <= Instant::now() {
            let Some(client) = self.idle.pop() else { break };
            self.start(client, due);
            // xorshift64, and from it the exponential distribution.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let share = ((random >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
            due += mean.mul_f64(-share.ln());
        }
        if let Pace::Open { due: next, random: seed, timer, .. } = &mut self.pace {
            (*next, *seed) = (due, random);
            let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            timer.set(Expiration::OneShot(wait.into()), TimerSetTimeFlags::empty())?;
        }
        Ok(due < self.until)
    }

    /// Starts a client's mail if any is left to send. A client that can't connect stays away.
    fn start(&mut self, client: usize, since: Instant) {
        let Some(left) = self.left.checked_sub(1) else { return };
        self.left = left;
        match self.connect(client, since) {
            Ok(mail) => {
                self.mails[client] = Some(mail);
                self.under_way += 1;
            }
            Err(_) => self.tally.answers.silent += 1,
        }
    }

    fn connect(&self, client: usize, since: Instant) -> io::Result<Mail> {
        let stream = UnixStream::connect(self.socket)?;
        let mut mail = Mail { stream, since, sent: 0, answer: [0; ANSWER], filled: 0 };
        mail.send(self.request)?;
        self.epoll.add(&mail.stream, mail.interest(self.request, client))?;
        Ok(mail)
    }

    fn advance(&mut self, client: usize) {
        let Some(mail) = &mut self.mails[client] else { return };
        if mail.sent < self.request.len() {
            // After an error the answer, or the end, is what counts.
            if mail.send(self.request).is_err() {
                mail.sent = self.request.len();
            }
            if mail.sent == self.request.len() {
                let mut event = mail.interest(self.request, client);
                let _ = self.epoll.modify(&mail.stream, &mut event);
            }
        }
        let Some(verdict) = mail.receive() else { return };
        self.tally.answers.count(verdict);
        let now = Instant::now();
        self.tally.latencies.push(now - mail.since);
        self.mails[client] = None;
        self.under_way -= 1;
        match self.pace {
            // At once, so that the relay has work while this thread looks at other answers.
            Pace::Closed if now < self.until => self.start(client, now),
            _ => self.idle.push(client),
        }
    }
}

impl Mail {
    /// Sends as many bytes of the request as the relay takes now.
    fn send(&mut self, request: &[u8]) -> nix::Result<()> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        while self.sent < request.len() {
            match send(self.stream.as_raw_fd(), &request[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Returns what to wait for next.
    fn interest(&self, request: &[u8], client: usize) -> EpollEvent {
        let output = match self.sent < request.len() {
            true => EpollFlags::EPOLLOUT,
            false => EpollFlags::empty(),
        };
        EpollEvent::new(EpollFlags::EPOLLIN | output, client as u64)
    }

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
