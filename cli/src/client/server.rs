//! The QMQP server that mails are submitted to, and one submission.
//!
//! Contract: the message is sent as given, in pieces, and never copied. A `K` counts only if the
//! whole request has been written. A `Z` or `D` that comes earlier counts as well. A reply that
//! came before the connection broke still counts.
//!
//! # Failure
//! Without an answer, whatever the reason, a [`SubmitError`] has the cause.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use qrelay_shared::endpoint::Endpoint;
use qrelay_shared::exit::Exit;
use qrelay_shared::qmqp::{self, Reply, ReplyProgress, Status};
use thiserror::Error;

use crate::client::stream::Stream;
use crate::values::{seconds, socket};

/// The socket of systemd/cm4all-qrelay.socket, and of the examples.
const DEFAULT_SOCKET: &str = "/run/cm4all/qrelay/qrelay.sock";

/// A QMQP server, as the command line names it.
#[derive(Debug, Clone, clap::Args)]
pub struct Server {
    /// Where the server listens: path, @abstract, or IP address with or without port.
    #[arg(
        long, value_name = "SOCKET", env = "QRELAY_SOCKET", default_value = DEFAULT_SOCKET,
        value_parser = socket
    )]
    to: Endpoint,
    /// Longest time from connecting to the answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    timeout: Duration,
}

/// Why a mail got no answer.
#[derive(Debug, Error)]
pub enum SubmitError {
    /// The connection to the server could not be made.
    #[error("can't connect to {to}: {cause} (is qrelay running, and is this its socket?)")]
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

impl Server {
    /// Submits a mail whose message consists of `pieces`. The addresses have been validated.
    ///
    /// # Errors
    /// Returns a [`SubmitError`] if there is no answer.
    pub fn submit(
        &self,
        pieces: &[&[u8]],
        sender: &[u8],
        recipients: &[impl AsRef<[u8]>],
    ) -> Result<Reply, SubmitError> {
        let length = pieces.iter().map(|piece| piece.len()).sum();
        let around = qmqp::outgoing(|_| (), length, sender, recipients);
        let request = [&[around.head()][..], pieces, &[around.tail()]].concat();

        let deadline = Instant::now() + self.timeout;
        let to = || self.to.clone();
        let mut stream = Stream::connect(&self.to, self.timeout)
            .map_err(|cause| SubmitError::Connect { to: to(), cause: readable(cause) })?;
        let written = request.into_iter().try_for_each(|piece| write(&mut stream, piece, deadline));
        match (self.read_reply(&mut stream, deadline), written) {
            (Ok(reply), Ok(())) => Ok(reply),
            (Ok(reply), Err(_)) if reply.status != Status::Accepted => Ok(reply),
            (_, Err(cause)) => Err(SubmitError::Write { to: to(), cause }),
            (Err(error), Ok(())) => Err(error),
        }
    }

    fn read_reply(&self, stream: &mut Stream, deadline: Instant) -> Result<Reply, SubmitError> {
        let failed = |cause| SubmitError::Read { to: self.to.clone(), cause };
        let mut received = Vec::new();
        let mut chunk = [0; qmqp::MAX_REPLY];
        loop {
            limit(stream, deadline).map_err(failed)?;
            match stream.read(&mut chunk) {
                Ok(0) => return Err(SubmitError::Silence(self.to.clone())),
                Ok(count) => received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(readable(error))),
            }
            match qmqp::parse_reply(&received) {
                ReplyProgress::NeedMore => {}
                ReplyProgress::Complete(reply) => return Ok(reply),
                ReplyProgress::Malformed => return Err(SubmitError::Malformed(self.to.clone())),
            }
        }
    }
}

/// Returns the exit status that tells a caller what became of a mail.
pub fn exit_status(status: Status) -> Exit {
    match status {
        Status::Accepted => Exit::Success,
        Status::Temporary => Exit::Temporary,
        Status::Permanent => Exit::Unavailable,
    }
}

/// Limits the next operation to the time that remains until `deadline`.
fn limit(stream: &Stream, deadline: Instant) -> io::Result<()> {
    stream.set_timeout(deadline.saturating_duration_since(Instant::now()))
}

fn write(stream: &mut Stream, piece: &[u8], deadline: Instant) -> io::Result<()> {
    let mut rest = piece;
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

/// Rewords an exceeded socket timeout, which the kernel calls "resource temporarily unavailable".
fn readable(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "timed out"),
        _ => error,
    }
}
