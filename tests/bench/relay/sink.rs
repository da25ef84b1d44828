//! The sink: the next hop of every measured relay, a QMQP server on TCP loopback that reads a request and
//! says `K`.
//!
//! Contract: prints its port as the first line on stdout, then serves until the process is ended. A
//! request that has arrived by the time it is accepted costs accept4, recv, send and close; one that hasn't
//! costs an epoll registration more. Every thread has its own epoll instance on the shared listener.
//!
//! # Failure
//! A request that is malformed or cut short is hung up on.

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

/// What every complete request is answered with.
const REPLY: &[u8] = b"12:Kok 12345678,";

/// Marks the listener among the events; connections are marked with their descriptor.
const LISTENER: u64 = u64::MAX;

/// Longest prefix that is kept to find the length: ten digits and the colon.
const PREFIX: usize = 11;

/// Serves on a free port of 127.0.0.1 with `threads` threads.
pub fn run(threads: usize) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // std's backlog is 128, less than the clients that one may ask for.
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

/// A request on its way in; its bytes are counted, not kept.
struct Connection {
    stream: TcpStream,
    prefix: Vec<u8>,
    received: usize,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self { stream, prefix: Vec::new(), received: 0 }
    }

    /// Reads what is there and answers when the request is complete; true when the connection is over.
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
                    // A relay that is gone doesn't get its answer; its client counts that.
                    let _ = send(fd, REPLY, MsgFlags::MSG_NOSIGNAL);
                }
                true
            }
            Extent::Malformed => true,
            Extent::Total(_) | Extent::Unknown => false,
        }
    }
}
