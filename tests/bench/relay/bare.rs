//! The bare relay: the floor that qrelay is measured against. The bare relay takes QMQP on a local
//! socket and sends it on, without Lua, processes, log or checks.
//!
//! Contract: a number of threads serve the socket. Each mail costs exactly accept4, recv, socket,
//! connect, send, recv, send and two closes, as long as request and reply fit one call each. A
//! discarded mail costs accept4, recv, send and close.
//!
//! # Failure
//! The client of a failed mail is hung up on without an answer, and the benchmark fails.

use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixListener,
    },
    path::Path,
    thread,
};

use nix::sys::socket::{Backlog, MsgFlags, listen, recv, send};

use crate::{
    hop::NextHop,
    netstring::{Extent, extent},
};

/// Largest request in bytes. Pages that no request reaches cost no memory.
const BUFFER: usize = 17 << 20;

/// Connections that may wait for a relay to accept them: more than there are clients.
pub const BACKLOG: i32 = 4096;

/// Answer to a mail that goes nowhere.
const DISCARDED: &[u8] = b"10:Kdiscarded,";

/// Relays from the socket `path` to `hop` until the process is ended. Each of the threads carries
/// one mail at a time.
pub fn run(path: &Path, hop: &NextHop, threads: usize) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    // std listens with a backlog of 128.
    listen(&listener, Backlog::new(BACKLOG)?)?;
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| serve(&listener, hop));
        }
    });
    Ok(())
}

fn serve(listener: &UnixListener, hop: &NextHop) {
    let mut buffer = buffer();
    loop {
        if let Ok((client, _)) = listener.accept() {
            // The load generator counts the missing answer, so the error needs no report here.
            let _ = relay(client.as_raw_fd(), hop, &mut buffer);
        }
    }
}

/// Returns a thread's memory for requests.
pub fn buffer() -> Vec<u8> {
    vec![0; BUFFER]
}

/// Carries one mail from its client to the next hop, and the answer back.
pub fn relay(client: RawFd, hop: &NextHop, buffer: &mut [u8]) -> io::Result<()> {
    let length = read_request(client, buffer)?;
    let Some(next_hop) = hop.connect()? else { return send_all(client, DISCARDED) };
    send_all(next_hop.as_raw_fd(), &buffer[..length])?;
    let mut reply = [0; 512];
    let received = recv(next_hop.as_raw_fd(), &mut reply, MsgFlags::empty())?;
    drop(next_hop);
    send_all(client, &reply[..received])
}

/// Reads until the request is complete, and returns its size in bytes.
fn read_request(client: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    loop {
        match recv(client, &mut buffer[filled..], MsgFlags::empty())? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
        match extent(&buffer[..filled]) {
            Extent::Total(total) if filled >= total => return Ok(filled),
            Extent::Malformed => return Err(io::ErrorKind::InvalidData.into()),
            Extent::Total(_) | Extent::Unknown => {}
        }
    }
}

fn send_all(to: RawFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        bytes = &bytes[send(to, bytes, MsgFlags::MSG_NOSIGNAL)?..];
    }
    Ok(())
}
