//! This process's way to the shared dictionaries, which live in the supervisor.
//!
//! Contract: every thread that asks has a channel of its own, opened at its first question; it
//! sends the question and waits for the answer, nobody else wakes up. What a zygote opened
//! while its script loaded must be closed ([`hang_up`]) before it forks.
//!
//! # Failure
//! [`AskError`]. A thread whose channel failed opens another one for its next question.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use qrelay_shared::dictionary::{Answer, FromDictionary, Operation, Request, ToDictionary};
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError, SendError};

use crate::deadline::Deadline;
use crate::io::socket_timeout;

/// The supervisor answers at once, or something is wrong.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The mail's time is over.
    #[error("the time for this mail is over")]
    Expired,
    /// It can't be reached.
    #[error("the shared dictionaries can't be reached: {0}")]
    Unreachable(String),
}

impl AskError {
    fn because(cause: impl ToString) -> Self {
        Self::Unreachable(cause.to_string())
    }
}

/// Hands the supervisor its end of a new channel.
pub type Opener = Box<dyn Fn(OwnedFd) -> Result<(), SendError> + Send + Sync>;

/// A thread's channel.
struct Line {
    channel: Channel<ToDictionary, FromDictionary>,
    /// Its receive timeout is [`PATIENCE`], not less.
    patient: bool,
    small: RecvBuffer,
    /// For answers with values or keys; made when it is needed.
    large: Option<RecvBuffer>,
}

thread_local! {
    static LINE: RefCell<Option<Line>> = const { RefCell::new(None) };
}

/// Closes the calling thread's channel.
pub fn hang_up() {
    LINE.set(None);
}

/// Asks, and gives the answer to `take` as soon as it is there.
///
/// # Errors
/// See [`AskError`].
pub fn ask<R>(
    opener: &Opener,
    request: &Request<'_>,
    deadline: Deadline,
    take: impl FnOnce(Answer<'_>) -> R,
) -> Result<R, AskError> {
    let mut line = match LINE.take() {
        Some(line) => line,
        None => Line::open(opener)?,
    };
    let result = line.ask(request, deadline, take);
    if result.is_ok() {
        LINE.set(Some(line));
    }
    result
}

impl Line {
    fn open(opener: &Opener) -> Result<Self, AskError> {
        let (channel, theirs) = Channel::pair().map_err(AskError::because)?;
        opener(theirs.into()).map_err(AskError::because)?;
        Ok(Self { channel, patient: false, small: RecvBuffer::small(), large: None })
    }

    fn ask<R>(
        &mut self,
        request: &Request<'_>,
        deadline: Deadline,
        take: impl FnOnce(Answer<'_>) -> R,
    ) -> Result<R, AskError> {
        self.limit(deadline)?;
        self.channel.send(request, &[]).map_err(AskError::because)?;
        let buffer = match request.operation {
            Operation::Get | Operation::Keys { .. } => {
                self.large.get_or_insert_with(RecvBuffer::new)
            }
            _ => &mut self.small,
        };
        match self.channel.recv(buffer) {
            Ok(received) => Ok(take(received.message)),
            Err(RecvError::Empty) if deadline.expired() => Err(AskError::Expired),
            Err(RecvError::Empty) => Err(AskError::because("no answer")),
            Err(error) => Err(AskError::because(error)),
        }
    }

    /// Receiving ends at the deadline, or when patience does.
    fn limit(&mut self, deadline: Deadline) -> Result<(), AskError> {
        let brief = deadline.remaining() < PATIENCE;
        if self.patient && !brief {
            return Ok(());
        }
        let timeout = socket_timeout(deadline.at_most(PATIENCE)).ok_or(AskError::Expired)?;
        setsockopt(&self.channel.as_fd(), sockopt::ReceiveTimeout, &timeout)
            .map_err(|error: Errno| AskError::because(error))?;
        self.patient = !brief;
        Ok(())
    }
}
