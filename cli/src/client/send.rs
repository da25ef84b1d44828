//! `qrelay send`: submits one mail over QMQP.
//!
//! Contract: the message comes from stdin as it is, the reply's text goes to stdout, made
//! printable. As everywhere in QMQP, `K` counts only once the whole request is written, an earlier
//! `Z` or `D` stands, and a broken connection is no answer but doesn't hide one that came before.
//!
//! # Failure
//! The exit code says what to do next: 64 the arguments are wrong, 69 refused for good, 75 try
//! again. No answer, whatever the reason, is 75 with the cause on stderr.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use qrelay_shared::address::{is_valid, is_valid_sender, printable};
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::{self, Reply, ReplyProgress, Status};
use thiserror::Error;

use crate::client::stream::Stream;

/// What `qrelay send` is asked to do.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// The QMQP server.
    pub to: Endpoint,
    /// Envelope sender; empty for a bounce.
    pub sender: String,
    /// Envelope recipients, at least one.
    pub recipients: Vec<String>,
    /// For everything from connecting to the answer.
    pub timeout: Duration,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum SendError {
    /// The sender can't be used.
    #[error("the sender {0:?} is not a mail address")]
    Sender(String),
    /// A recipient can't be used.
    #[error("the recipient {0:?} is not a mail address")]
    Recipient(String),
    /// Nobody to send to.
    #[error("no recipient")]
    NoRecipient,
    /// The message can't be read.
    #[error("can't read the message from stdin: {0}")]
    Input(#[source] io::Error),
    /// The server isn't there.
    #[error("can't connect to {to}: {cause}")]
    Connect {
        /// The server.
        to: Endpoint,
        /// The system's reason.
        #[source]
        cause: io::Error,
    },
    /// The connection broke while the request was written.
    #[error("{to} stopped reading: {cause}")]
    Write {
        /// The server.
        to: Endpoint,
        /// The system's reason.
        #[source]
        cause: io::Error,
    },
    /// The connection broke before the reply was complete.
    #[error("no answer from {to}: {cause}")]
    Read {
        /// The server.
        to: Endpoint,
        /// The system's reason.
        #[source]
        cause: io::Error,
    },
    /// The server hung up.
    #[error("{0} closed the connection without an answer")]
    Silence(Endpoint),
    /// The server doesn't speak QMQP.
    #[error("{0} answered something that isn't QMQP")]
    Malformed(Endpoint),
}

impl SendError {
    /// The exit status of the process.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Sender(_) | Self::Recipient(_) | Self::NoRecipient => Exit::Usage,
            _ => Exit::Temporary,
        }
    }
}

/// Runs the command with the process' own stdin, stdout and stderr.
pub fn run(options: &SendOptions) -> Exit {
    match submit(options, &mut io::stdin().lock()) {
        Ok(reply) => {
            // Whoever closed stdout doesn't want the text; the exit code says it all.
            let _ = writeln!(io::stdout(), "{}", printable(&reply.text));
            exit_status(reply.status)
        }
        Err(error) => {
            eprintln!("qrelay send: {error}");
            error.exit()
        }
    }
}

fn exit_status(status: Status) -> Exit {
    match status {
        Status::Accepted => Exit::Success,
        Status::Temporary => Exit::Temporary,
        Status::Permanent => Exit::Unavailable,
    }
}

/// Submits the mail whose message `input` holds.
///
/// # Errors
/// [`SendError`] when there is no answer.
pub fn submit(options: &SendOptions, input: &mut dyn Read) -> Result<Reply, SendError> {
    check_envelope(options)?;
    let mut message = Vec::new();
    input.read_to_end(&mut message).map_err(SendError::Input)?;
    let sender = options.sender.as_bytes();
    let request = qmqp::encode_request(&message, sender, &options.recipients);

    let deadline = Instant::now() + options.timeout;
    let to = || options.to.clone();
    let mut stream = Stream::connect(&options.to, options.timeout)
        .map_err(|cause| SendError::Connect { to: to(), cause })?;
    let written = write_request(&mut stream, &request, deadline);
    match (read_reply(&mut stream, deadline, &options.to), written) {
        (Ok(reply), Ok(())) => Ok(reply),
        (Ok(reply), Err(_)) if reply.status != Status::Accepted => Ok(reply),
        (_, Err(cause)) => Err(SendError::Write { to: to(), cause }),
        (Err(error), Ok(())) => Err(error),
    }
}

fn check_envelope(options: &SendOptions) -> Result<(), SendError> {
    if !is_valid_sender(options.sender.as_bytes()) {
        return Err(SendError::Sender(options.sender.clone()));
    }
    if options.recipients.is_empty() {
        return Err(SendError::NoRecipient);
    }
    match options.recipients.iter().find(|address| !is_valid(address.as_bytes())) {
        Some(bad) => Err(SendError::Recipient(bad.clone())),
        None => Ok(()),
    }
}

/// Sets what remains until `deadline` as the limit of the next operation.
fn limit(stream: &Stream, deadline: Instant) -> io::Result<()> {
    stream.set_timeout(deadline.saturating_duration_since(Instant::now()))
}

fn write_request(stream: &mut Stream, request: &[u8], deadline: Instant) -> io::Result<()> {
    let mut rest = request;
    while !rest.is_empty() {
        limit(stream, deadline)?;
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(readable(error)),
        }
    }
    Ok(())
}

fn read_reply(stream: &mut Stream, deadline: Instant, to: &Endpoint) -> Result<Reply, SendError> {
    let failed = |cause| SendError::Read { to: to.clone(), cause };
    let mut received = Vec::new();
    let mut chunk = [0; qmqp::MAX_REPLY];
    loop {
        limit(stream, deadline).map_err(failed)?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(SendError::Silence(to.clone())),
            Ok(count) => received.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(readable(error))),
        }
        match qmqp::parse_reply(&received) {
            ReplyProgress::NeedMore => {}
            ReplyProgress::Complete(reply) => return Ok(reply),
            ReplyProgress::Malformed => return Err(SendError::Malformed(to.clone())),
        }
    }
}

/// The kernel calls an exceeded socket timeout "resource temporarily unavailable".
fn readable(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "timed out"),
        _ => error,
    }
}
