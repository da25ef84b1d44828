//! One client of the control socket: what it has sent, and what it has yet to get.
//!
//! Contract: no call waits, and both buffers are bounded. A client that sends faster than it is
//! served isn't read any more; one that doesn't read its answers isn't served any more.
//!
//! # Failure
//! A connection that is broken, or over which descriptors come, is over.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use qrelay_shared::admin::{Answer, Body, Command, REQUEST_MAX, Request, VERSION};
use qrelay_shared::sys::rights::{MoreInput, PeerError, PeerSocket};

use crate::event::Cursor;
use crate::ids::GenerationId;

/// Bytes that are read at a time.
const PIECE: usize = 4096;

/// What a client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// For nothing: it is to say something.
    Idle,
    /// For the answer to a request that the owner has been told.
    Answer,
    /// For more of the list of mails, from here on; so many have been listed.
    List(Cursor, u64),
    /// For a part of the list that the owner has been asked for; so many have been listed.
    Part(u64),
    /// For the outcome of the first reload after this generation.
    Reload(GenerationId),
    /// For the end of the daemon.
    Stop,
}

/// Whether anything can still be done for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// The connection goes on.
    On,
    /// The connection is over.
    Over,
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    /// Its socket.
    pub(super) socket: PeerSocket,
    /// What it waits for.
    pub(super) waits: Waits,
    /// When it is closed, unless it waits for the end of something.
    pub(super) until: Instant,
    /// What its socket is watched for.
    pub(super) watched: Option<Interest>,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Nothing more will come from it.
    ended: bool,
    /// Nothing more will be said to it than what is in `output`.
    closing: bool,
}

/// What a socket is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// Bytes to read.
    Input,
    /// Room to write.
    Output,
    /// The end of the connection, of which only half is left.
    Hangup,
}

impl Client {
    /// Takes a new connection.
    pub(super) fn new(socket: PeerSocket, until: Instant) -> Self {
        Self {
            socket,
            waits: Waits::Idle,
            until,
            watched: None,
            input: Vec::new(),
            output: Vec::new(),
            ended: false,
            closing: false,
        }
    }

    /// Returns what the socket has to be watched for.
    pub(super) fn interest(&self) -> Option<Interest> {
        if !self.output.is_empty() {
            return Some(Interest::Output);
        }
        if self.ended && matches!(self.waits, Waits::Reload(_) | Waits::Stop) {
            return Some(Interest::Hangup);
        }
        let reads = !self.ended && !self.has_line() && self.input.len() < REQUEST_MAX;
        reads.then_some(Interest::Input)
    }

    /// Returns whether a request waits to be served.
    pub(super) fn wants_service(&self) -> bool {
        self.output.is_empty()
            && match self.waits {
                Waits::Idle => self.has_line() || self.input.len() >= REQUEST_MAX,
                Waits::List(..) => true,
                Waits::Answer | Waits::Part(_) | Waits::Reload(_) | Waits::Stop => false,
            }
    }

    /// Returns whether the client has said nothing that isn't served, and has read every answer.
    pub(super) fn is_silent(&self) -> bool {
        self.waits == Waits::Idle && self.output.is_empty() && !self.wants_service()
    }

    /// Returns whether the connection has nothing to wait for any more.
    pub(super) fn is_over(&self) -> bool {
        let silent = self.ended && self.waits == Waits::Idle && !self.has_line();
        self.output.is_empty() && (self.closing || silent)
    }

    /// Returns whether the input has a whole request. The end of the input ends a line.
    fn has_line(&self) -> bool {
        !self.closing && (self.input.contains(&b'\n') || self.ended && !self.input.is_empty())
    }

    /// Reads a piece of what has come.
    pub(super) fn read(&mut self) -> Life {
        self.input.reserve(PIECE);
        match self.socket.recv_append(&mut self.input, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.ended = true,
            Ok(_) | Err(PeerError::Os(Errno::EAGAIN | Errno::EINTR)) => {}
            Err(_) => return Life::Over,
        }
        Life::On
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// The reason why the line is no request; nothing after it is looked at.
    pub(super) fn next_request(&mut self) -> Result<Command, String> {
        let end = self.input.iter().position(|&byte| byte == b'\n');
        if end.is_none() && !self.ended {
            return Err(format!("a request has at most {REQUEST_MAX} bytes"));
        }
        let rest = end.map_or_else(Vec::new, |end| self.input.split_off(end + 1));
        let line = std::mem::replace(&mut self.input, rest);
        parse(&line)
    }

    /// Adds an answer to what the client has to get, and sends what it takes now.
    pub(super) fn say(&mut self, body: Body) -> Life {
        self.add(body);
        self.send()
    }

    /// Adds an answer to what the client has to get.
    pub(super) fn add(&mut self, body: Body) {
        if self.closing {
            return;
        }
        self.closing = matches!(body, Body::Error { .. });
        // Maps with keys that are no strings, the only failure, don't occur.
        if serde_json::to_writer(&mut self.output, &Answer::from(body)).is_ok() {
            self.output.push(b'\n');
        }
    }

    /// Sends what the client takes now.
    pub(super) fn send(&mut self) -> Life {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let fd = self.socket.as_fd().as_raw_fd();
        let mut sent = 0;
        let life = loop {
            if sent == self.output.len() {
                break Life::On;
            }
            match send(fd, &self.output[sent..], flags) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break Life::On,
                Err(_) => break Life::Over,
            }
        };
        self.output.drain(..sent);
        if self.output.is_empty() {
            // A long answer's memory isn't kept for the next one.
            self.output = Vec::new();
            if self.closing {
                self.socket.end_output(MoreInput::Likely);
            }
        }
        life
    }
}

/// Parses a request.
fn parse(line: &[u8]) -> Result<Command, String> {
    let value: serde_json::Value =
        serde_json::from_slice(line).map_err(|error| format!("no JSON object: {error}"))?;
    match value.get("version").map(|version| version.as_u64()) {
        Some(Some(version)) if version == u64::from(VERSION) => {}
        Some(Some(version)) => {
            return Err(format!(
                "this daemon speaks version {VERSION} of the protocol, not {version}: use the \
                 qrelay that runs"
            ));
        }
        _ => return Err(format!("\"version\":{VERSION} is missing")),
    }
    serde_json::from_value(value)
        .map(|request: Request| request.command)
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        for (line, expected) in [
            (r#"{"version":1,"command":"status"}"#, Command::Status),
            (r#" {"command":"mails", "version":1, "more":[]} "#, Command::Mails),
            (r#"{"version":1,"command":"reload"}"#, Command::Reload),
            (r#"{"version":1,"command":"stop"}"#, Command::Stop { now: false }),
            (r#"{"version":1,"command":"stop","now":true}"#, Command::Stop { now: true }),
        ] {
            assert_eq!(parse(line.as_bytes()), Ok(expected), "{line}");
        }
    }

    #[test]
    fn what_is_no_request() {
        for (line, part) in [
            ("", "no JSON object"),
            ("status", "no JSON object"),
            ("\u{0}\u{ff}", "no JSON object"),
            ("[]", "is missing"),
            ("7", "is missing"),
            (r#"{"command":"status"}"#, "is missing"),
            (r#"{"version":"1","command":"status"}"#, "is missing"),
            (r#"{"version":2,"command":"status"}"#, "not 2: use the qrelay that runs"),
            (r#"{"version":1}"#, "command"),
            (r#"{"version":1,"command":"explode"}"#, "unknown variant `explode`"),
            (r#"{"version":1,"command":"stop","now":7}"#, "boolean"),
        ] {
            let error = parse(line.as_bytes()).expect_err(line);
            assert!(error.contains(part), "{line}: {error}");
        }
        let deep = "[".repeat(60_000);
        assert!(parse(deep.as_bytes()).is_err(), "no stack is used up");
    }
}
