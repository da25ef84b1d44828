//! The sink: the next hop of every measured relay. The sink is a QMQP server on TCP loopback or on
//! a local socket that reads a request and answers `K`, at once or after a delay.
//!
//! Contract: the sink prints its address as the first line on stdout, then serves until the process
//! is ended. A request that has arrived by the time it is accepted costs accept4, recv, send and
//! close. A later request costs an epoll registration more. The bytes of a large request over TCP
//! are dropped in the kernel, without being copied, but for the last ones. Every thread has its own
//! epoll instance on the shared listener.
//!
//! # Failure
//! The connection of a malformed or incomplete request is closed without an answer.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, Write},
    net::{Ipv4Addr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{Backlog, MsgFlags, listen, recv, send},
    },
};

use crate::{
    bare::BACKLOG,
    hop::NextHop,
    netstring::{Extent, extent},
};

/// Answer to every complete request.
const REPLY: &[u8] = b"12:Kok 12345678,";

/// Key of the listener among the epoll events; the key of a connection is its descriptor.
const LISTENER: u64 = u64::MAX;

/// Number of bytes kept from the start of a request, enough for its length: ten digits and the
/// colon.
const PREFIX: usize = 11;

/// Most bytes of a request that are read, or dropped, by one call.
const BUFFER: usize = 256 << 10;

/// The listening socket.
enum Listener {
    Tcp(TcpListener),
    Local(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(listener) => listener.accept()?.0.into(),
            Self::Local(listener) => listener.accept()?.0.into(),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Local(listener) => listener.as_fd(),
        }
    }
}

/// Serves with `threads` threads on the local socket `path`, or without one on a free port of
/// 127.0.0.1. Every answer comes `delay` after its request.
pub fn run(threads: usize, delay: Duration, path: Option<&Path>) -> io::Result<()> {
    let (listener, address) = match path {
        Some(path) => {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            (Listener::Local(listener), NextHop::Local(path.to_owned()))
        }
        None => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            listener.set_nonblocking(true)?;
            let port = listener.local_addr()?.port();
            (Listener::Tcp(listener), NextHop::Tcp(port))
        }
    };
    // std listens with a backlog of 128.
    listen(&listener, Backlog::new(BACKLOG)?)?;
    println!("{address}");
    io::stdout().flush()?;
    thread::scope(|scope| {
        let serve = || Server::new(&listener, delay)?.run();
        let servers: Vec<_> = (0..threads).map(|_| scope.spawn(serve)).collect();
        servers.into_iter().filter_map(|server| server.join().ok()).collect()
    })
}

/// One thread of the sink.
struct Server<'a> {
    listener: &'a Listener,
    delay: Duration,
    epoll: Epoll,
    unfinished: HashMap<u64, Connection>,
    /// Complete requests and when to answer them, in this order.
    waiting: VecDeque<(Instant, OwnedFd)>,
    buffer: Vec<u8>,
}

impl<'a> Server<'a> {
    fn new(listener: &'a Listener, delay: Duration) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let shared = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        epoll.add(listener, EpollEvent::new(shared, LISTENER))?;
        let (unfinished, waiting) = (HashMap::new(), VecDeque::new());
        Ok(Self { listener, delay, epoll, unfinished, waiting, buffer: vec![0; BUFFER] })
    }

    fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Err(Errno::EINTR) => 0,
                other => other?,
            };
            for event in &events[..count] {
                if event.data() == LISTENER {
                    self.accept_all()?;
                } else if let Some(connection) = self.unfinished.remove(&event.data()) {
                    self.advance(connection);
                }
            }
            self.answer_due();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let Some((due, _)) = self.waiting.front() else { return EpollTimeout::NONE };
        // epoll counts milliseconds; a timeout that is rounded down would make the thread spin.
        let wait = due.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::ZERO)
    }

    fn accept_all(&mut self) -> io::Result<()> {
        while let Ok(stream) = self.listener.accept() {
            let prefix = Vec::new();
            self.advance(Connection { stream, prefix, received: 0, registered: false });
        }
        Ok(())
    }

    /// Reads what has arrived, and answers a complete request, or puts it in the queue.
    fn advance(&mut self, mut connection: Connection) {
        let discard = matches!(self.listener, Listener::Tcp(_));
        match connection.advance(&mut self.buffer, discard) {
            Progress::Over => {}
            Progress::Complete if self.delay.is_zero() => answer(&connection.stream),
            Progress::Complete => {
                // The connection is readable as soon as the relay closes it: without interest.
                if connection.registered {
                    let _ = self.epoll.delete(&connection.stream);
                }
                self.waiting.push_back((Instant::now() + self.delay, connection.stream));
            }
            Progress::More => {
                let key = connection.stream.as_raw_fd() as u64;
                let event = EpollEvent::new(EpollFlags::EPOLLIN, key);
                if connection.registered || self.epoll.add(&connection.stream, event).is_ok() {
                    connection.registered = true;
                    self.unfinished.insert(key, connection);
                }
            }
        }
    }

    fn answer_due(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let due = self.waiting.partition_point(|(due, _)| *due <= now);
        self.waiting.drain(..due).for_each(|(_, stream)| answer(&stream));
    }
}

fn answer(stream: &OwnedFd) {
    // If the relay has closed the connection, its client counts the missing answer.
    let _ = send(stream.as_raw_fd(), REPLY, MsgFlags::MSG_NOSIGNAL);
}

/// What has arrived of a request.
enum Progress {
    More,
    Complete,
    /// The request can't become complete.
    Over,
}

/// A request of which a part has arrived; its bytes are counted, not kept.
struct Connection {
    stream: OwnedFd,
    prefix: Vec<u8>,
    received: usize,
    registered: bool,
}

impl Connection {
    /// Reads bytes that have arrived. With `discard`, those before the last ones aren't copied.
    fn advance(&mut self, buffer: &mut [u8], discard: bool) -> Progress {
        let known = match extent(&self.prefix) {
            Extent::Total(total) => total - self.received,
            Extent::Malformed => return Progress::Over,
            Extent::Unknown => 0,
        };
        // tcp(7): with MSG_TRUNC the bytes are dropped, and the buffer isn't written.
        let (room, flags) = match discard && known > PREFIX {
            true => ((known - 1).min(buffer.len()), MsgFlags::MSG_TRUNC),
            false => (buffer.len(), MsgFlags::empty()),
        };
        let flags = flags | MsgFlags::MSG_DONTWAIT;
        let count = match recv(self.stream.as_raw_fd(), &mut buffer[..room], flags) {
            Ok(count) if count > 0 => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return Progress::More,
            Ok(_) | Err(_) => return Progress::Over,
        };
        if self.received < PREFIX {
            let missing = (PREFIX - self.prefix.len()).min(count);
            self.prefix.extend_from_slice(&buffer[..missing]);
        }
        self.received += count;
        match extent(&self.prefix) {
            Extent::Total(total) if self.received >= total && buffer[count - 1] == b',' => {
                Progress::Complete
            }
            Extent::Total(total) if self.received < total => Progress::More,
            Extent::Unknown => Progress::More,
            Extent::Total(_) | Extent::Malformed => Progress::Over,
        }
    }
}
