//! `qrelay send`: submits one mail over QMQP.
//!
//! Contract: the message is read from stdin and sent unchanged; the text of the reply is printed on
//! stdout with control characters replaced. A `K` counts only if the whole request has been
//! written. A `Z` or `D` that comes earlier counts as well. A reply that came before the connection
//! broke still counts.
//!
//! # Failure
//! The exit status says what to do next: 64 the arguments are wrong, 69 the mail is refused for
//! good, 75 try again. Without an answer, whatever the reason, the exit status is 75 and the cause
//! is printed on stderr.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use qrelay_shared::address::{is_valid, is_valid_sender, printable};
use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::{self, Reply, ReplyProgress, Status};
use qrelay_shared::system_error::shown;
use thiserror::Error;

use crate::client::stream::Stream;

/// Options of `qrelay send`.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// Address of the QMQP server.
    pub to: Endpoint,
    /// Envelope sender; empty for a bounce.
    pub sender: String,
    /// Envelope recipients, at least one.
    pub recipients: Vec<String>,
    /// Time limit for the whole exchange, from connecting to the complete answer.
    pub timeout: Duration,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum SendError {
    /// The envelope sender is not a valid mail address.
    #[error("the sender '{}' is not a mail address", printable(.0.as_bytes()))]
    Sender(String),
    /// An envelope recipient is not a valid mail address.
    #[error("the recipient '{}' is not a mail address", printable(.0.as_bytes()))]
    Recipient(String),
    /// The list of recipients is empty.
    #[error("no recipient")]
    NoRecipient,
    /// Reading the message from stdin failed.
    #[error("can't read the message from stdin: {0}")]
    Input(#[source] io::Error),
    /// The connection to the server could not be made.
    #[error("can't connect to {to}: {cause}")]
    Connect {
        to: Endpoint,
        #[source]
        cause: io::Error,
    },
    /// The connection broke while the request was written.
    #[error("{to} stopped reading: {cause}")]
    Write {
        to: Endpoint,
        #[source]
        cause: io::Error,
    },
    /// The connection broke before the reply was complete.
    #[error("no answer from {to}: {cause}")]
    Read {
        to: Endpoint,
        #[source]
        cause: io::Error,
    },
    /// The server closed the connection without a reply.
    #[error("{0} closed the connection without an answer")]
    Silence(Endpoint),
    /// The server sent bytes that are no QMQP reply.
    #[error("{0} answered something that isn't QMQP")]
    Malformed(Endpoint),
}

impl SendError {
    /// Returns the exit status for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Sender(_) | Self::Recipient(_) | Self::NoRecipient => Exit::Usage,
            _ => Exit::Temporary,
        }
    }
}

/// Runs the command on the stdin, stdout and stderr of this process.
pub fn run(options: &SendOptions) -> Exit {
    match submit(options, &mut io::stdin().lock()) {
        Ok(reply) => {
            // Writing fails only if nobody reads stdout; the exit status carries the result in any
            // case.
            let _ = writeln!(io::stdout(), "{}", printable(&reply.text));
            exit_status(reply.status)
        }
        Err(error) => {
            eprintln!("qrelay send: {}", shown(&error));
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

/// Submits one mail whose message is read from `input` to its end.
///
/// # Errors
/// Returns a [`SendError`] if the arguments are wrong or if there is no answer.
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

/// Limits the next operation to the time that remains until `deadline`.
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

/// Rewords an exceeded socket timeout, which the kernel calls "resource temporarily unavailable".
fn readable(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "timed out"),
        _ => error,
    }
}
