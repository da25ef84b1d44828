//! The bare relay: the floor that qrelay is measured against. The bare relay takes QMQP on a local
//! socket and sends it on over TCP, without Lua, processes, log or checks.
//!
//! Contract: `THREADS` threads serve the socket. Each mail costs exactly accept4, read, socket,
//! connect, write, read, write and two closes, as long as request and reply fit one read each.
//!
//! # Failure
//! The client of a failed mail is hung up on without an answer, and the benchmark fails.

use std::{
    io,
    net::{Ipv4Addr, TcpStream},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
};

use nix::unistd::{read, write};

use crate::netstring::{Extent, extent};

/// Number of threads of the bare relay; each carries one mail at a time.
pub const THREADS: usize = 32;

/// Largest request in bytes.
const BUFFER: usize = 2 << 20;

/// Relays from the socket `path` to 127.0.0.1:`port` until the process is ended.
pub fn run(path: &Path, port: u16) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| serve(&listener, port));
        }
    });
    Ok(())
}

fn serve(listener: &UnixListener, port: u16) {
    let mut buffer = vec![0; BUFFER];
    loop {
        if let Ok((client, _)) = listener.accept() {
            // The load generator counts the missing answer, so the error needs no report here.
            let _ = relay(client, port, &mut buffer);
        }
    }
}

fn relay(client: UnixStream, port: u16, buffer: &mut [u8]) -> io::Result<()> {
    let length = read_request(&client, buffer)?;
    let next_hop = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    write_all(&next_hop, &buffer[..length])?;
    let mut reply = [0; 512];
    let received = read(&next_hop, &mut reply)?;
    drop(next_hop);
    write_all(&client, &reply[..received])
}

/// Reads until the request is complete, and returns its size in bytes.
///
/// The bare relay calls `read` and `write` directly, because std uses recv and send on sockets.
fn read_request(client: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    loop {
        match read(client, &mut buffer[filled..])? {
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

fn write_all(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        bytes = &bytes[write(to.as_fd(), bytes)?..];
    }
    Ok(())
}
