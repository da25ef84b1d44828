//! This process's way to the shared dictionaries, which live in the supervisor.
//!
//! Contract: a question goes out at once, on a channel of its own, and whoever has to wait takes
//! the answer from there: by then it usually has come, and nobody else wakes up. Channels are used again.
//! What a zygote opened while its script loaded must be closed ([`hang_up`]) before it forks.
//!
//! # Failure
//! [`AskError`]. A channel that failed, or whose answer nobody waited for, is closed.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::Mutex;
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

/// A channel.
struct Line {
    channel: Channel<ToDictionary, FromDictionary>,
    /// Its receive timeout is [`PATIENCE`], not less.
    patient: bool,
    small: RecvBuffer,
    /// For answers with values or keys; made when it is needed.
    large: Option<RecvBuffer>,
}

/// Channels that nobody uses just now, to be used again; most of them are closed when many mails
/// have asked at once.
static IDLE: Mutex<Vec<Line>> = Mutex::new(Vec::new());

/// As many stay open.
const MAX_IDLE: usize = 64;

/// Closes those that nobody uses.
pub fn hang_up() {
    IDLE.lock().clear();
}

/// A question that has been asked.
pub struct Asked {
    line: Line,
    /// The answer may be long.
    large: bool,
}

/// Asks.
///
/// # Errors
/// See [`AskError`].
pub fn ask(opener: &Opener, request: &Request<'_>) -> Result<Asked, AskError> {
    let idle = IDLE.lock().pop();
    let line = match idle {
        Some(line) => line,
        None => Line::open(opener)?,
    };
    line.channel.send(request, &[]).map_err(AskError::because)?;
    let large = matches!(request.operation, Operation::Get | Operation::Keys { .. });
    Ok(Asked { line, large })
}

impl Asked {
    /// Gives the answer to `take` as soon as it is there.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn answer<R>(
        self,
        deadline: Deadline,
        take: impl FnOnce(Answer<'_>) -> R,
    ) -> Result<R, AskError> {
        let Self { mut line, large } = self;
        let result = line.answer(large, deadline, take)?;
        let mut idle = IDLE.lock();
        if idle.len() < MAX_IDLE {
            idle.push(line);
        }
        Ok(result)
    }
}

impl Line {
    fn open(opener: &Opener) -> Result<Self, AskError> {
        let (channel, theirs) = Channel::pair().map_err(AskError::because)?;
        opener(theirs.into()).map_err(AskError::because)?;
        Ok(Self { channel, patient: false, small: RecvBuffer::small(), large: None })
    }

    fn answer<R>(
        &mut self,
        large: bool,
        deadline: Deadline,
        take: impl FnOnce(Answer<'_>) -> R,
    ) -> Result<R, AskError> {
        self.limit(deadline)?;
        let buffer = match large {
            true => self.large.get_or_insert_with(RecvBuffer::new),
            false => &mut self.small,
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    type Theirs = Channel<FromDictionary, ToDictionary>;

    fn question(key: &[u8]) -> Request<'_> {
        Request { dictionary: "d", key, operation: Operation::Delete }
    }

    /// The key of the next question, which is answered.
    fn answer(line: &Theirs) -> Vec<u8> {
        let mut buffer = RecvBuffer::new();
        let key = line.recv(&mut buffer).expect("a question").message.key.to_vec();
        line.send(&Answer::Changed(true), &[]).expect("answered");
        key
    }

    fn changed(asked: Asked) -> bool {
        let deadline = Deadline::after(Duration::from_secs(60));
        asked.answer(deadline, |answer| matches!(answer, Answer::Changed(true))).expect("an answer")
    }

    #[test]
    fn one_channel_for_each_question_at_a_time() {
        let opened = Arc::new(Mutex::new(Vec::<Theirs>::new()));
        let keep = Arc::clone(&opened);
        let opener: Opener = Box::new(move |fd| {
            keep.lock().push(Theirs::from_fd(fd));
            Ok(())
        });
        let first = ask(&opener, &question(b"1")).expect("asked");
        let second = ask(&opener, &question(b"2")).expect("asked");
        assert_eq!(opened.lock().len(), 2);
        // The answers come in another order.
        assert_eq!(answer(&opened.lock()[1]), b"2");
        assert!(changed(second));
        let third = ask(&opener, &question(b"3")).expect("asked");
        assert_eq!(opened.lock().len(), 2, "it was idle");
        assert_eq!(answer(&opened.lock()[1]), b"3");
        assert_eq!(answer(&opened.lock()[0]), b"1");
        assert!(changed(third) && changed(first));

        // One that nobody waits for leaves no answer for the next.
        drop(ask(&opener, &question(b"4")).expect("asked"));
        let closed = |line: &Theirs| {
            let mut buffer = RecvBuffer::new();
            while line.try_recv(&mut buffer).is_ok() {}
            matches!(line.try_recv(&mut buffer), Err(RecvError::Closed))
        };
        assert_eq!(opened.lock().iter().filter(|line| closed(line)).count(), 1);

        hang_up();
        assert!(opened.lock().iter().all(closed));
    }
}
