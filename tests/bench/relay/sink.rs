//! The sink: the next hop of every measured relay. The sink is a QMQP server on TCP loopback that
//! reads a request and answers `K`.
//!
//! Contract: the sink prints its port as the first line on stdout, then serves until the process is
//! ended. A request that has arrived by the time it is accepted costs accept4, recv, send and
//! close. A later request costs an epoll registration more. Every thread has its own epoll instance
//! on the shared listener.
//!
//! # Failure
//! The connection of a malformed or incomplete request is closed without an answer.

use std::{
    collections::HashMap,
    io::{self, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread,
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{Backlog, MsgFlags, listen, recv, send},
    },
};

use crate::netstring::{Extent, extent};

/// Answer to every complete request.
const REPLY: &[u8] = b"12:Kok 12345678,";

/// Key of the listener among the epoll events; the key of a connection is its descriptor.
const LISTENER: u64 = u64::MAX;

/// Number of bytes kept from the start of a request, enough for its length: ten digits and the
/// colon.
const PREFIX: usize = 11;

/// Serves on a free port of 127.0.0.1 with `threads` threads.
pub fn run(threads: usize) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // std listens with a backlog of 128, which is less than the highest number of clients.
    listen(&listener, Backlog::new(4096)?)?;
    listener.set_nonblocking(true)?;
    println!("{}", listener.local_addr()?.port());
    io::stdout().flush()?;
    thread::scope(|scope| {
        let servers: Vec<_> = (0..threads).map(|_| scope.spawn(|| serve(&listener))).collect();
        servers.into_iter().filter_map(|server| server.join().ok()).collect()
    })
}

fn serve(listener: &TcpListener) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let shared = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
    epoll.add(listener, EpollEvent::new(shared, LISTENER))?;
    let mut unfinished = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                accept_all(listener, &epoll, &mut unfinished, &mut buffer)?;
            } else if let Some(connection) = unfinished.get_mut(&event.data())
                && connection.advance(&mut buffer)
            {
                unfinished.remove(&event.data());
            }
        }
    }
}

fn accept_all(
    listener: &TcpListener,
    epoll: &Epoll,
    unfinished: &mut HashMap<u64, Connection>,
    buffer: &mut [u8],
) -> io::Result<()> {
    while let Ok((stream, _)) = listener.accept() {
        let mut connection = Connection::new(stream);
        if !connection.advance(buffer) {
            let key = connection.stream.as_raw_fd() as u64;
            epoll.add(&connection.stream, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
            unfinished.insert(key, connection);
        }
    }
    Ok(())
}

/// A request of which a part has arrived; its bytes are counted, not kept.
struct Connection {
    stream: TcpStream,
    prefix: Vec<u8>,
    received: usize,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self { stream, prefix: Vec::new(), received: 0 }
    }

    /// Reads the bytes that have arrived, and answers the request once it is complete. Returns true
    /// when the connection is over.
    fn advance(&mut self, buffer: &mut [u8]) -> bool {
        let fd = self.stream.as_raw_fd();
        let count = match recv(fd, buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(count) if count > 0 => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return false,
            Ok(_) | Err(_) => return true,
        };
        let missing = PREFIX.saturating_sub(self.prefix.len()).min(count);
        self.prefix.extend_from_slice(&buffer[..missing]);
        self.received += count;
        match extent(&self.prefix) {
            Extent::Total(total) if self.received >= total => {
                if buffer[count - 1] == b',' {
                    // If the relay has closed the connection, its client counts the missing answer.
                    let _ = send(fd, REPLY, MsgFlags::MSG_NOSIGNAL);
                }
                true
            }
            Extent::Malformed => true,
            Extent::Total(_) | Extent::Unknown => false,
        }
    }
}
