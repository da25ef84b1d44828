//! The client of the shared dictionaries, which live in the supervisor.
//!
//! Contract: a question has a channel of its own until its answer has come; then the channel is
//! idle and serves the next question. The supervisor makes every channel, and hands it out when it
//! is asked to ([`Opener`]). [`try_ask`] never waits, so it may be called while Lua is held; the
//! answer has usually come when a thread begins to wait for it. A zygote must close its channels
//! ([`close_idle`]) before it forks, because two processes with one channel would read each other's
//! answers.
//!
//! # Failure
//! [`AskError`]. A channel is closed if it failed, or if no thread waited for its answer.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::{Condvar, Mutex};
use qrelay_shared::deadline::Deadline;
use qrelay_shared::dictionary::{
    Answer, FromDictionary, FromOpener, Opened, Operation, Request, ToDictionary, ToOpener, Wish,
};
use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError, SendError};
use qrelay_shared::sys::wait::socket_timeout;

/// Longest wait for an answer. The supervisor answers at once unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// The mail's time is over.
    #[error("the time for this mail is over")]
    Expired,
    /// The dictionary server can't be reached.
    #[error("the shared dictionaries can't be reached: {0}")]
    Unreachable(String),
    /// This process has as many channels as it may have.
    #[error("the shared dictionaries can't be reached: {0}")]
    Refused(String),
}

impl AskError {
    fn because(cause: impl ToString) -> Self {
        Self::Unreachable(cause.to_string())
    }
}

/// The channel on which this process asks the supervisor for channels.
#[derive(Debug, Default)]
pub(crate) struct Opener(Option<Mutex<Channel<ToOpener, FromOpener>>>);

impl Opener {
    /// Takes the channel that the supervisor has passed; without one, no dictionary can be reached.
    pub(crate) fn new(fd: Option<OwnedFd>) -> Self {
        Self(fd.map(|fd| Mutex::new(Channel::from_fd(fd))))
    }

    /// Asks for a channel, and waits for it until the deadline or for [`PATIENCE`].
    ///
    /// An answer that comes later is taken by the next wish, which is as good as its own.
    fn open(&self, deadline: Deadline) -> Result<DictionaryChannel, AskError> {
        let Some(channel) = &self.0 else { return Err(AskError::because(SendError::Closed)) };
        let wait = deadline.at_most(PATIENCE);
        let Some(channel) = channel.try_lock_until(wait.instant()) else {
            return Err(no_answer(deadline));
        };
        let timeout = socket_timeout(wait).ok_or_else(|| no_answer(deadline))?;
        setsockopt(&channel.as_fd(), sockopt::ReceiveTimeout, &timeout)
            .map_err(AskError::because)?;
        channel.send(&Wish::Channel, &[]).map_err(AskError::because)?;
        let mut buffer = RecvBuffer::small();
        let mut received = match channel.recv(&mut buffer) {
            Ok(received) => received,
            Err(RecvError::Empty) => return Err(no_answer(deadline)),
            Err(error) => return Err(AskError::because(error)),
        };
        match (received.message, received.fds.take()) {
            (Opened::Channel, Some(fd)) => {
                Ok(DictionaryChannel { inner: Channel::from_fd(fd), patient: false })
            }
            (Opened::Channel, None) => Err(AskError::because(RecvError::DescriptorLost)),
            (Opened::Refused(cause), _) => Err(AskError::Refused(cause.into_owned())),
        }
    }
}

/// Returns the error when no answer has come in time.
fn no_answer(deadline: Deadline) -> AskError {
    match deadline.expired() {
        true => AskError::Expired,
        false => AskError::because("no answer"),
    }
}

/// A channel to the dictionary server.
struct DictionaryChannel {
    inner: Channel<ToDictionary, FromDictionary>,
    /// Whether the receive timeout is [`PATIENCE`].
    patient: bool,
}

/// The idle channels of this process.
static IDLE: Mutex<Idle<DictionaryChannel>> = Mutex::new(Idle(Vec::new()));

/// A channel has become idle.
static BECAME_IDLE: Condvar = Condvar::new();

/// A list of idle channels; the last used one is at the end. Generic, so that tests need no
/// channels.
struct Idle<T>(Vec<(T, Instant)>);

/// Most idle channels that stay open.
const MAX_IDLE: usize = 64;

/// A channel that was idle for longer is closed when another one becomes idle.
const MAX_IDLE_TIME: Duration = Duration::from_secs(30);

impl<T> Idle<T> {
    /// Takes the channel that was used last.
    fn take(&mut self) -> Option<T> {
        self.0.pop().map(|(channel, _)| channel)
    }

    /// Adds an idle channel and returns the channels to close.
    #[must_use]
    fn keep_idle(&mut self, channel: T, now: Instant) -> Vec<(T, Instant)> {
        let disused = |(_, since): &&(T, Instant)| now.duration_since(*since) > MAX_IDLE_TIME;
        let disused = self.0.iter().take_while(disused).count();
        let surplus = (self.0.len() + 1).saturating_sub(MAX_IDLE);
        let closed = self.0.drain(..disused.max(surplus)).collect();
        self.0.push((channel, now));
        closed
    }
}

thread_local! {
    /// The buffer for answers without values or keys.
    static SMALL: RefCell<Option<RecvBuffer>> = const { RefCell::new(None) };
    /// The buffer for all other answers.
    static LARGE: RefCell<Option<RecvBuffer>> = const { RefCell::new(None) };
}

/// Closes the idle channels.
pub(crate) fn close_idle() {
    IDLE.lock().0.clear();
}

/// A question that has been asked.
pub(crate) struct Asked {
    channel: DictionaryChannel,
    /// The answer may be long.
    large: bool,
}

/// Asks on an idle channel; `None` if there is none that takes the question at once.
pub(crate) fn try_ask(request: &Request<'_>) -> Option<Asked> {
    let channel = IDLE.lock().take()?;
    match channel.inner.try_send(request, &[]) {
        Ok(()) => return Some(Asked::new(channel, request)),
        Err(SendError::Closed) => {}
        // The channel can still be used.
        Err(_) => channel.keep_idle(),
    }
    None
}

/// Asks on an idle channel, or on a new one. If there can't be a new one, this waits until a
/// channel becomes idle, for [`PATIENCE`] at most.
///
/// # Errors
/// See [`AskError`].
pub(crate) fn ask(
    opener: &Opener,
    request: &Request<'_>,
    deadline: Deadline,
) -> Result<Asked, AskError> {
    if let Some(asked) = try_ask(request) {
        return Ok(asked);
    }
    let channel = match opener.open(deadline) {
        Err(AskError::Refused(cause)) => {
            wait_for_idle(deadline).ok_or(match deadline.expired() {
                true => AskError::Expired,
                false => AskError::Refused(cause),
            })?
        }
        opened => opened?,
    };
    channel.inner.send(request, &[]).map_err(AskError::because)?;
    Ok(Asked::new(channel, request))
}

fn wait_for_idle(deadline: Deadline) -> Option<DictionaryChannel> {
    let until = deadline.at_most(PATIENCE).instant();
    let mut idle = IDLE.lock();
    loop {
        if let Some(channel) = idle.take() {
            return Some(channel);
        }
        if BECAME_IDLE.wait_until(&mut idle, until).timed_out() {
            return idle.take();
        }
    }
}

impl Asked {
    fn new(channel: DictionaryChannel, request: &Request<'_>) -> Self {
        let large = matches!(request.operation, Operation::Get | Operation::Keys { .. });
        Self { channel, large }
    }

    /// Waits for the answer and passes it to `take`.
    ///
    /// # Errors
    /// See [`AskError`].
    pub(crate) fn answer<R>(
        self,
        deadline: Deadline,
        take: impl FnOnce(Answer<'_>) -> R,
    ) -> Result<R, AskError> {
        let Self { mut channel, large } = self;
        channel.limit(deadline)?;
        let (buffers, new): (_, fn() -> RecvBuffer) =
            if large { (&LARGE, RecvBuffer::new) } else { (&SMALL, RecvBuffer::small) };
        let mut buffer = buffers.take().unwrap_or_else(new);
        let result = match channel.inner.recv(&mut buffer) {
            Ok(received) => Ok(take(received.message)),
            Err(RecvError::Empty) => Err(no_answer(deadline)),
            Err(error) => Err(AskError::because(error)),
        };
        buffers.set(Some(buffer));
        if result.is_ok() {
            channel.keep_idle();
        }
        result
    }
}

impl DictionaryChannel {
    /// Keeps the channel for the next question.
    fn keep_idle(self) {
        let closed = IDLE.lock().keep_idle(self, Instant::now());
        BECAME_IDLE.notify_one();
        drop(closed);
    }

    /// Limits receiving to the deadline and to [`PATIENCE`].
    fn limit(&mut self, deadline: Deadline) -> Result<(), AskError> {
        let brief = deadline.remaining() < PATIENCE;
        if self.patient && !brief {
            return Ok(());
        }
        let timeout = socket_timeout(deadline.at_most(PATIENCE)).ok_or(AskError::Expired)?;
        setsockopt(&self.inner.as_fd(), sockopt::ReceiveTimeout, &timeout)
            .map_err(|error: Errno| AskError::because(error))?;
        self.patient = !brief;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::PollFlags;
    use qrelay_shared::sys::wait::wait;
    use std::sync::Arc;

    type Theirs = Channel<FromDictionary, ToDictionary>;

    /// Grants every wish, by a thread that keeps its ends of the channels in `opened`.
    fn opener(opened: Arc<Mutex<Vec<Theirs>>>) -> Opener {
        let (opener, theirs) = Channel::<ToOpener, FromOpener>::pair().expect("a pair");
        std::thread::spawn(move || {
            let mut buffer = RecvBuffer::small();
            while theirs.recv(&mut buffer).is_ok() {
                let (ours, asker) = Theirs::pair().expect("a pair");
                opened.lock().push(ours);
                let sent = theirs.send(&Opened::Channel, &[asker.as_fd()]);
                sent.expect("the opener is read");
            }
        });
        Opener::new(Some(opener.into()))
    }

    #[test]
    fn a_wish_that_is_not_granted_is_an_error() {
        let soon = Deadline::after(Duration::from_secs(60));
        let (opener, theirs) = Channel::<ToOpener, FromOpener>::pair().expect("a pair");
        let opener = Opener::new(Some(opener.into()));
        let open = |deadline| opener.open(deadline).map(drop).map_err(|error| error.to_string());
        let reached = |cause| Err(format!("the shared dictionaries can't be reached: {cause}"));
        theirs.send(&Opened::Refused("no".into()), &[]).expect("room");
        assert_eq!(open(soon), reached("no"));
        theirs.send(&Opened::Channel, &[]).expect("room");
        assert_eq!(open(soon), reached("a descriptor was lost: too many open files"));
        let over = Deadline::after(Duration::from_millis(1));
        assert_eq!(open(over), Err("the time for this mail is over".into()));
        drop(theirs);
        assert!(open(soon).is_err());
        assert!(Opener::default().open(soon).is_err());
    }

    fn question(key: &[u8]) -> Request<'_> {
        Request { dictionary: "d", key, operation: Operation::Delete }
    }

    /// The key of the next question, which is answered.
    fn answer(channel: &Theirs) -> Vec<u8> {
        let mut buffer = RecvBuffer::new();
        let key = channel.recv(&mut buffer).expect("a question").message.key.to_vec();
        channel.send(&Answer::Changed(true), &[]).expect("answered");
        key
    }

    fn changed(asked: Asked) -> bool {
        let deadline = Deadline::after(Duration::from_secs(60));
        asked.answer(deadline, |answer| matches!(answer, Answer::Changed(true))).expect("an answer")
    }

    fn expired(asked: Asked) -> bool {
        let answer = asked.answer(Deadline::after(Duration::from_millis(1)), |_| ());
        matches!(answer, Err(AskError::Expired))
    }

    /// Whether the other end is closed, here and in every child of another test, which has a copy
    /// until it executes its program.
    fn closed(channel: &Theirs) -> bool {
        let soon = Deadline::after(Duration::from_secs(10));
        let mut buffer = RecvBuffer::new();
        loop {
            wait(channel.as_fd(), PollFlags::POLLIN, soon).expect("poll");
            match channel.try_recv(&mut buffer) {
                Ok(_) => {}
                Err(error) => return matches!(error, RecvError::Closed),
            }
        }
    }

    #[test]
    fn few_channels_stay_open() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let numbers = |closed: Vec<(u32, Instant)>| -> Vec<u32> {
            closed.into_iter().map(|(channel, _)| channel).collect()
        };
        let mut idle = Idle(Vec::new());
        for (number, seconds) in [(1, 0), (2, 10), (3, 20)] {
            assert!(idle.keep_idle(number, after(seconds)).is_empty());
        }
        assert_eq!(idle.take(), Some(3), "the last used one");
        assert_eq!(numbers(idle.keep_idle(3, after(41))), [1, 2]);
        for number in 4..4 + 63 {
            assert!(idle.keep_idle(number, after(41)).is_empty());
        }
        assert_eq!(numbers(idle.keep_idle(99, after(41))), [3]);
    }

    // One test, since all of them would share the idle channels.
    #[test]
    fn one_channel_for_each_question_at_a_time() {
        let opened = Arc::new(Mutex::new(Vec::<Theirs>::new()));
        let opener = opener(Arc::clone(&opened));
        let later = Deadline::after(Duration::from_secs(60));
        let asks = |key| ask(&opener, &question(key), later).expect("asked");
        assert!(try_ask(&question(b"0")).is_none(), "it would have to open a channel");
        let (first, second) = (asks(b"1"), asks(b"2"));
        assert_eq!(opened.lock().len(), 2);
        // The answers come in another order.
        assert_eq!(answer(&opened.lock()[1]), b"2");
        assert!(changed(second));
        let third = try_ask(&question(b"3")).expect("one is idle");
        assert_eq!(answer(&opened.lock()[1]), b"3");
        assert_eq!(answer(&opened.lock()[0]), b"1");
        assert!(changed(third) && changed(first));

        // Answers that nobody waits for any more aren't taken for those of the next questions.
        drop(try_ask(&question(b"4")).expect("one is idle"));
        assert!(expired(asks(b"5")));
        assert!(opened.lock().iter().all(closed));
        let next = asks(b"6");
        assert_eq!(answer(&opened.lock()[2]), b"6");
        assert!(changed(next));

        // One that the supervisor has closed costs no question.
        opened.lock().clear();
        assert!(try_ask(&question(b"7")).is_none());
        let next = asks(b"8");
        assert_eq!(answer(&opened.lock()[0]), b"8");
        assert!(changed(next));

        close_idle();
        assert!(opened.lock().iter().all(closed));

        // Without a further channel a question waits until one is idle.
        let (refusing, theirs) = Channel::<ToOpener, FromOpener>::pair().expect("a pair");
        let refusing = Opener::new(Some(refusing.into()));
        let held = asks(b"9");
        theirs.send(&Opened::Refused("no more".into()), &[]).expect("room");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ask(&refusing, &question(b"10"), later).map(changed));
            assert_eq!(
                theirs.recv(&mut RecvBuffer::small()).expect("a wish").message,
                Wish::Channel
            );
            assert_eq!(answer(&opened.lock()[1]), b"9");
            assert!(changed(held));
            assert_eq!(answer(&opened.lock()[1]), b"10");
            assert!(waiting.join().expect("no panic").expect("asked"));
        });
        let over = Deadline::after(Duration::from_millis(1));
        let _held = asks(b"11");
        theirs.send(&Opened::Refused("no more".into()), &[]).expect("room");
        let refused = ask(&refusing, &question(b"12"), over);
        assert!(matches!(refused, Err(AskError::Expired)));
    }
}
