//! A QMQP client that can follow every rule of the protocol and break every rule.
//!
//! Contract: [`Client::outcome`] reads to the end of the connection and returns what the client was
//! told: one reply (the first netstring counts), silence, a reset, garbage, or no answer in time.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::daemon::Daemon;
use super::mail::{Mail, split};
use super::record::PATIENCE;
use super::target::Target;

/// A connection of a client or of a sink.
#[derive(Debug)]
pub enum Stream {
    /// A local socket.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Stream {
    /// Limits the time of each following read.
    pub fn set_read_timeout(&self, timeout: Duration) {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
        }
        .expect("read timeout");
    }

    /// Limits the time of each following write.
    pub fn set_write_timeout(&self, timeout: Duration) {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Self::Unix(stream) => stream.set_write_timeout(timeout),
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
        }
        .expect("write timeout");
    }

    /// Shuts down one or both directions. A connection that is gone already is no error.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    /// Closes the connection by a reset instead of an end. A local socket needs no option for a
    /// reset: the kernel resets it when it is closed with unread data.
    pub fn reset(self) {
        if let Self::Tcp(stream) = &self {
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger)
                .expect("SO_LINGER");
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The answer to a client.
#[derive(Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A reply: status byte and text. Bytes after the first netstring are ignored.
    Reply(Vec<u8>),
    /// The connection was closed without a single byte.
    Silence,
    /// The connection was reset before a complete reply.
    Reset,
    /// Bytes that are no reply.
    Garbage(Vec<u8>),
    /// No complete reply in time.
    Timeout,
    /// A complete reply and then a reset, which could have cost another client the reply.
    ReplyThenReset(Vec<u8>),
}

impl fmt::Display for Outcome {
    /// Writes the reply as it is, such as `Kok`, and everything else in angle brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply(reply) => f.write_str(&String::from_utf8_lossy(reply)),
            Self::Silence => f.write_str("<silence>"),
            Self::Reset => f.write_str("<reset>"),
            Self::Garbage(bytes) => write!(f, "<garbage {:?}>", String::from_utf8_lossy(bytes)),
            Self::Timeout => f.write_str("<no answer in time>"),
            Self::ReplyThenReset(reply) => {
                write!(f, "<{:?}, then reset>", String::from_utf8_lossy(reply))
            }
        }
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Outcome {
    /// Returns the status byte, or `-` if there is no clean reply.
    pub fn status(&self) -> char {
        match self {
            Self::Reply(reply) => char::from(reply[0]),
            _ => '-',
        }
    }
}

impl PartialEq<&str> for Outcome {
    fn eq(&self, other: &&str) -> bool {
        match self {
            Self::Reply(reply) => reply == other.as_bytes(),
            _ => self.to_string().as_str() == *other,
        }
    }
}

/// The client's end of a connection.
#[derive(Debug)]
pub struct Client {
    /// The connection, for anything that the methods don't offer.
    pub stream: Stream,
    received: Vec<u8>,
}

impl Client {
    /// Connects, with a limit of [`PATIENCE`] for each write.
    #[track_caller]
    pub fn connect(to: impl Into<Target>) -> Self {
        let to = to.into();
        match to.connect() {
            Ok(stream) => {
                stream.set_write_timeout(PATIENCE);
                Self { stream, received: Vec::new() }
            }
            Err(error) => panic!("connect to {to}: {error}"),
        }
    }

    /// Sends all of `bytes`. An error is ignored, because the outcome shows what the server did.
    pub fn send(&mut self, bytes: &[u8]) -> &mut Self {
        let _ = self.stream.write_all(bytes);
        self
    }

    /// Sends all of `bytes` and returns whether the server took them.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Shuts down the sending side.
    pub fn half_close(&mut self) -> &mut Self {
        self.stream.shutdown(Shutdown::Write);
        self
    }

    /// Reads to the end of the connection, for [`PATIENCE`] at most.
    pub fn outcome(&mut self) -> Outcome {
        self.outcome_within(PATIENCE)
    }

    /// Reads to the end of the connection, for `timeout` at most. After a timeout the reading can
    /// be continued by another call.
    pub fn outcome_within(&mut self, timeout: Duration) -> Outcome {
        let deadline = Instant::now() + timeout;
        let mut chunk = [0; 4096];
        let mut reset = false;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Outcome::Timeout;
            }
            self.stream.set_read_timeout(left);
            match self.stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    reset = true;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!("reading a reply: {error}"),
            }
        }
        judge(std::mem::take(&mut self.received), reset)
    }
}

fn judge(received: Vec<u8>, reset: bool) -> Outcome {
    match split(&received) {
        Some((reply @ [b'K' | b'Z' | b'D', ..], [])) if reset => {
            Outcome::ReplyThenReset(reply.to_vec())
        }
        Some((reply @ [b'K' | b'Z' | b'D', ..], [])) => Outcome::Reply(reply.to_vec()),
        _ if reset => Outcome::Reset,
        _ if received.is_empty() => Outcome::Silence,
        _ => Outcome::Garbage(received),
    }
}

/// Sends one mail and returns its outcome.
#[track_caller]
pub fn submit(to: impl Into<Target>, mail: &Mail) -> Outcome {
    Client::connect(to).send(&mail.request()).outcome()
}

/// Sends `count` mails at once, each of which must be answered with `answer`. Returns the time
/// until the last answer.
pub fn burst(daemon: &Daemon, answer: &str, count: usize) -> Duration {
    let started = Instant::now();
    let mut clients: Vec<_> = (0..count)
        .map(|_| {
            let mut client = Client::connect(daemon.path("in"));
            client.send(&Mail::new("x").request());
            client
        })
        .collect();
    for client in &mut clients {
        assert_eq!(client.outcome(), answer, "{}", daemon.text());
    }
    started.elapsed()
}
