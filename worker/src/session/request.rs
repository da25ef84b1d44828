//! Reads one request from a client.
//!
//! Contract: memory is taken as bytes arrive, never for a length that was only announced. A request
//! that is larger than [`BUFFER_SIZE`] is counted against the worker's [`Budget`].
//!
//! # Failure
//! A request is refused as soon as its bytes show that it can't become valid, when its client is
//! silent or slow for too long, or when it gives way to another one ([`Readings`]). A client that
//! leaves before the request's last comma gets no answer.

use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::MsgFlags;
use parking_lot::Mutex;
use qrelay_shared::client::Client;
use qrelay_shared::deadline::Deadline;
use qrelay_shared::qmqp::{Limits, Progress, Reply, RequestError, progress};
use qrelay_shared::sys::rights::{PeerError, PeerSocket};
use qrelay_shared::sys::wait::wait;
use qrelay_shared::texts;

use crate::mail::memory::{Budget, Holding};
use crate::session::readings::{Reading, Readings};

/// Bytes of a new buffer: most mails fit.
pub(crate) const BUFFER_SIZE: usize = 64 * 1024;

/// Largest buffer in bytes that counts as small, and is kept without being counted.
const SMALL_BUFFER_SIZE: usize = 256 * 1024;

/// How many small buffers are kept.
const SMALL_BUFFERS: usize = 16;

/// Which requests are accepted, and what they may cost.
#[derive(Debug)]
pub(crate) struct Terms<'w> {
    /// Limits of the listener.
    pub(crate) limits: Limits<'w>,
    /// Longest silence of the client.
    pub(crate) client_timeout: Duration,
    /// Longest time for the whole request.
    pub(crate) request_timeout: Duration,
    /// Fewest bytes per second on average, once `client_timeout` is over; 0 is any number.
    pub(crate) min_rate: u64,
    /// Longest time to wait for memory.
    pub(crate) memory_timeout: Duration,
    /// Whom memory is counted for.
    pub(crate) client: Client,
    /// Memory for large requests.
    pub(crate) budget: &'w Budget,
    /// Where a small buffer goes in whose place a large one is used.
    pub(crate) buffers: &'w Buffers,
    /// The requests that are waited for.
    pub(crate) readings: &'w Readings,
}

/// The result of reading.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// The first `total` bytes of the buffer are the request's netstring.
    Complete {
        /// Length of the request; more bytes may have been received.
        total: usize,
        /// No thread waited for a part of the request, so that the last byte may have come long
        /// ago, while the connection waited for a worker.
        at_once: bool,
    },
    /// The request breaks a rule. The client may still be sending.
    Invalid(RequestError),
    /// The rest of the request isn't waited for: the answer, and why. The client may still be
    /// sending.
    Refused(Reply, &'static str),
    /// The client has passed descriptors. What it has sent can't be read.
    Rights,
    /// The client left; no answer is due.
    Gone,
}

impl<'w> Terms<'w> {
    /// Reads what is there into an empty buffer. Returns nothing if the request isn't complete.
    pub(crate) fn try_read(&self, client: &PeerSocket, buffer: &mut Vec<u8>) -> Option<Incoming> {
        make_room(buffer);
        match receive(client, buffer) {
            Ok(0) => return Some(Incoming::Gone),
            Ok(_) => {}
            Err(PeerError::Os(Errno::EAGAIN)) => return None,
            Err(PeerError::Os(_)) => return Some(Incoming::Gone),
            Err(PeerError::Rights) => return Some(Incoming::Rights),
        }
        match progress(buffer, &self.limits) {
            Ok(Progress::Complete { total }) => Some(Incoming::Complete { total, at_once: true }),
            Ok(Progress::NeedMore { .. }) => None,
            Err(error) => Some(Incoming::Invalid(error)),
        }
    }

    /// Reads until the request is complete or refused. `buffer` is empty, or has what
    /// [`Self::try_read`] got. The caller keeps the holding of memory as long as the buffer of a
    /// complete request.
    pub(crate) fn read(
        &self,
        client: &Arc<PeerSocket>,
        buffer: &mut Vec<u8>,
    ) -> (Incoming, Option<Holding<'w>>) {
        make_room(buffer);
        let mut run = self.run(client);
        let incoming = run.read(buffer);
        let complete = matches!(incoming, Incoming::Complete { .. });
        let memory = run.memory.filter(|_| complete);
        if let Some(memory) = &memory {
            memory.complete();
        }
        (incoming, memory)
    }

    /// Reads and drops the rest of a request that was refused for good, until the client closes its
    /// side, with the time limits of a request. Closing earlier would reset the connection, and a
    /// client that loses its answer in this way sends the same mail again and again.
    pub(crate) fn drop_rest(&self, client: &Arc<PeerSocket>) {
        self.run(client).drop_rest();
    }

    fn run<'t>(&'t self, client: &'t Arc<PeerSocket>) -> Run<'t, 'w> {
        Run {
            terms: self,
            client,
            deadline: Deadline::after(self.request_timeout),
            slowest: Instant::now() + self.client_timeout,
            reading: None,
            memory: None,
        }
    }
}

/// A request on its way.
struct Run<'t, 'w> {
    terms: &'t Terms<'w>,
    client: &'t Arc<PeerSocket>,
    deadline: Deadline,
    /// When the slowest client that is allowed would have sent its first byte.
    slowest: Instant,
    /// Since the client was first waited for.
    reading: Option<Reading<'t>>,
    memory: Option<Holding<'w>>,
}

impl Run<'_, '_> {
    fn read(&mut self, buffer: &mut Vec<u8>) -> Incoming {
        let timed_out =
            || Incoming::Refused(Reply::temporary(texts::REQUEST_TIMED_OUT), "timed out");
        let try_again = |why| Incoming::Refused(Reply::temporary(texts::TRY_AGAIN), why);
        // Whether the last call has taken all that had come, so that another one would find
        // nothing.
        let mut drained = false;
        loop {
            let total = match progress(buffer, &self.terms.limits) {
                Ok(Progress::Complete { total }) => {
                    return Incoming::Complete { total, at_once: self.reading.is_none() };
                }
                Ok(Progress::NeedMore { total }) => total,
                Err(error) => return Incoming::Invalid(error),
            };
            if self.deadline.expired() {
                return timed_out();
            }
            if buffer.len() == buffer.capacity() && !self.grow(buffer, total) {
                return try_again("no memory");
            }
            if drained {
                match self.wait(buffer.len()) {
                    Ok(true) => {}
                    Ok(false) => return timed_out(),
                    Err(_) => return Incoming::Gone,
                }
            }
            match receive(self.client, buffer) {
                Ok(0) if self.reading.as_ref().is_some_and(Reading::gives_way) => {
                    return try_again("gave way");
                }
                Ok(0) => return Incoming::Gone,
                Ok(_) => drained = buffer.len() < buffer.capacity(),
                Err(PeerError::Os(Errno::EAGAIN)) => drained = true,
                Err(PeerError::Os(_)) => return Incoming::Gone,
                Err(PeerError::Rights) => return Incoming::Rights,
            }
        }
    }

    fn drop_rest(&mut self) {
        let mut scratch = [0; 16 * 1024];
        let mut dropped = 0;
        while !self.deadline.expired() {
            match self.client.recv(&mut scratch, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return,
                Ok(length) => dropped += length,
                Err(PeerError::Os(Errno::EINTR)) => {}
                Err(PeerError::Os(Errno::EAGAIN)) if self.wait(dropped) == Ok(true) => {}
                Err(_) => return,
            }
        }
    }

    /// Waits for bytes, after `received` have come. Returns whether more came in time.
    fn wait(&mut self, received: usize) -> Result<bool, Errno> {
        let Terms { readings, client_timeout, min_rate, .. } = *self.terms;
        let reading =
            self.reading.get_or_insert_with(|| readings.begin(self.terms.client, self.client));
        reading.received(received);
        let mut until = self.deadline.at_most(client_timeout);
        if min_rate > 0 {
            let needed = Duration::from_secs_f64(received as f64 / min_rate as f64);
            until = until.min(Deadline::at(self.slowest + needed));
        }
        Ok(!wait(self.client.as_fd(), PollFlags::POLLIN, until)?.is_empty())
    }

    /// Makes room for more bytes. Returns whether the budget allowed it.
    fn grow(&mut self, buffer: &mut Vec<u8>, total: Option<usize>) -> bool {
        // A full buffer has a length: `progress` refuses so many digits.
        let Some(total) = total else { return false };
        let missing = total.saturating_sub(buffer.len()).max(1);
        let more = missing.min(buffer.len());
        let Terms { budget, buffers, client, memory_timeout, .. } = *self.terms;
        let first = self.memory.is_none();
        let memory = self.memory.get_or_insert_with(|| budget.open(client, total));
        if first
            && total > SMALL_BUFFER_SIZE
            && let Some(mut kept) = memory.kept(total)
        {
            kept.extend_from_slice(buffer);
            // A first buffer is never large.
            drop(buffers.give(mem::replace(buffer, kept)));
            return true;
        }
        let begin = Instant::now();
        let allowed = memory.grow(more, self.deadline.at_most(memory_timeout));
        // The client isn't slow while its bytes have no room.
        self.slowest += begin.elapsed();
        allowed && buffer.try_reserve_exact(more).is_ok()
    }
}

/// Makes room for what most requests need.
fn make_room(buffer: &mut Vec<u8>) {
    buffer.reserve(BUFFER_SIZE.saturating_sub(buffer.len()));
}

/// Receives what is there, without waiting.
fn receive(client: &PeerSocket, buffer: &mut Vec<u8>) -> Result<usize, PeerError> {
    loop {
        match client.recv_append(buffer, MsgFlags::MSG_DONTWAIT) {
            Err(PeerError::Os(Errno::EINTR)) => {}
            result => return result,
        }
    }
}

/// Small buffers for the next requests: empty, and of at most [`SMALL_BUFFER_SIZE`].
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// Returns the buffer that was used last, because its memory is in the processor's caches.
    pub(crate) fn take(&self) -> Vec<u8> {
        self.0.lock().pop().unwrap_or_default()
    }

    /// Takes back a buffer, and keeps it if there is room. Returns it if it isn't small.
    pub(crate) fn give(&self, mut buffer: Vec<u8>) -> Option<Vec<u8>> {
        if buffer.capacity() > SMALL_BUFFER_SIZE {
            return Some(buffer);
        }
        buffer.clear();
        let mut kept = self.0.lock();
        if kept.len() < SMALL_BUFFERS {
            kept.push(buffer);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrelay_shared::client::Share;
    use qrelay_shared::qmqp::encode_request;
    use qrelay_shared::sys::rights::Rights;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    const CLIENT: Client = Client::Uid(1);

    fn budget(limit: usize) -> Budget {
        Budget::new(limit, Share::new(1.0))
    }

    fn read(budget: &Budget, write: impl FnOnce(UnixStream) + Send) -> (Vec<u8>, String) {
        let readings = Readings::new(10);
        let terms = Terms {
            limits: Limits { max_size: 1_000_000, default_domain: None },
            client_timeout: Duration::from_millis(300),
            request_timeout: Duration::from_millis(600),
            min_rate: 0,
            memory_timeout: Duration::from_millis(5),
            client: CLIENT,
            budget,
            buffers: &Buffers::default(),
            readings: &readings,
        };
        read_on(&terms, write)
    }

    fn read_on(terms: &Terms<'_>, write: impl FnOnce(UnixStream) + Send) -> (Vec<u8>, String) {
        let (client, server) = UnixStream::pair().expect("pair");
        let mut buffer = Vec::new();
        let shown = std::thread::scope(|scope| {
            scope.spawn(|| write(client));
            let server = Arc::new(PeerSocket::new(server.into(), Rights::Possible));
            let (incoming, memory) = match terms.try_read(&server, &mut buffer) {
                Some(incoming) => (incoming, None),
                None => terms.read(&server, &mut buffer),
            };
            match incoming {
                Incoming::Complete { total, .. } => {
                    buffer.truncate(total);
                    format!("complete {}", memory.is_some())
                }
                Incoming::Refused(reply, _) => {
                    String::from_utf8_lossy(&reply.encode()).into_owned()
                }
                Incoming::Invalid(error) => {
                    let reply = Reply::permanent(error.reply_text());
                    String::from_utf8_lossy(&reply.encode()).into_owned()
                }
                Incoming::Rights => "rights".into(),
                Incoming::Gone => "gone".into(),
            }
        });
        (buffer, shown)
    }

    fn request(size: usize) -> Vec<u8> {
        encode_request(&vec![b'x'; size], b"s@x", ["r@x"])
    }

    #[test]
    fn reads_whole_requests() {
        let budget = budget(1_000_000);
        for size in [0, 1000, 60_000, 65_536, 300_000, 1_000_000] {
            let bytes = request(size);
            let (got, shown) = read(&budget, |mut client| {
                client.write_all(&bytes).expect("write");
                // The request ends before these bytes.
                let _ = client.write_all(b"surplus");
            });
            assert_eq!(shown, format!("complete {}", bytes.len() > BUFFER_SIZE), "{size}");
            assert!(got == bytes, "{size}");
        }
        assert!(budget.open(CLIENT, 1_000_000).grow(1_000_000, Deadline::after(Duration::ZERO)));
    }

    #[test]
    fn reads_byte_by_byte() {
        let bytes = request(30);
        let (got, shown) = read(&budget(0), |mut client| {
            for byte in &bytes {
                client.write_all(&[*byte]).expect("write");
                std::thread::yield_now();
            }
        });
        assert_eq!((got, &*shown), (bytes, "complete false"));
    }

    #[test]
    fn refuses() {
        let budget = budget(1_000_000);
        let table: [(&[u8], &str); 4] = [
            (b"GET / HTTP/1.0\r\n", "16:Dmalformed input,"),
            (b"9999999:", "18:Dmessage too large,"),
            (b"20:1:", "18:Zrequest timed out,"),
            (b"", "18:Zrequest timed out,"),
        ];
        for (bytes, expected) in table {
            let mut kept = None;
            let (_, shown) = read(&budget, |mut client| {
                client.write_all(bytes).expect("write");
                kept = Some(client);
            });
            assert_eq!(shown, expected);
        }
    }

    #[test]
    fn a_truncated_request_gets_no_answer() {
        let bytes = request(100_000);
        for length in [0, 1, 10, 70_000, bytes.len() - 1] {
            let (_, shown) = read(&budget(1_000_000), |mut client| {
                client.write_all(&bytes[..length]).expect("write");
            });
            assert_eq!(shown, "gone", "{length}");
        }
    }

    #[test]
    fn a_drip_is_stopped() {
        let (_, shown) = read(&budget(0), |mut client| {
            let _ = client.write_all(b"9000:8000:");
            while client.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        assert_eq!(shown, "18:Zrequest timed out,");
    }

    #[test]
    fn who_sends_too_slowly_is_stopped() {
        let (budget, readings) = (budget(0), Readings::new(10));
        let terms = Terms {
            limits: Limits { max_size: 1_000_000, default_domain: None },
            client_timeout: Duration::from_millis(50),
            request_timeout: Duration::from_secs(60),
            min_rate: 10_000,
            memory_timeout: Duration::ZERO,
            client: CLIENT,
            budget: &budget,
            buffers: &Buffers::default(),
            readings: &readings,
        };
        // A byte every 5 ms is never silent for long. The first write that fails ends the client.
        let (_, shown) = read_on(&terms, |mut client| {
            let _ = client.write_all(b"9000:8000:");
            while client.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        assert_eq!(shown, "18:Zrequest timed out,");
    }

    #[test]
    fn without_memory_there_is_no_mail() {
        let budget = budget(1000);
        let held = budget.open(CLIENT, 1);
        assert!(held.grow(1, Deadline::after(Duration::ZERO)));
        held.complete();
        let bytes = request(100_000);
        let (_, shown) = read(&budget, |mut client| {
            let _ = client.write_all(&bytes);
        });
        assert_eq!(shown, "16:Ztry again later,");
        drop(held);
    }

    #[test]
    fn small_buffers_are_kept() {
        let buffers = Buffers::default();
        let large = buffers.give(vec![0; SMALL_BUFFER_SIZE + 1]).expect("a large buffer");
        assert_eq!((large.len(), buffers.take().capacity()), (SMALL_BUFFER_SIZE + 1, 0));
        assert_eq!(buffers.give(vec![0; SMALL_BUFFER_SIZE]), None);
        let buffer = buffers.take();
        assert!(buffer.is_empty() && buffer.capacity() == SMALL_BUFFER_SIZE);
        for _ in 0..=SMALL_BUFFERS {
            assert_eq!(buffers.give(vec![0]), None);
        }
        assert_eq!(buffers.0.lock().len(), SMALL_BUFFERS);
    }
}
