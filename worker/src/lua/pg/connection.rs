//! One connection on a thread of its own.
//!
//! Contract: the thread connects, then answers one request at a time, until nobody can ask any
//! more. The database client has no time limit; who asks has one, and a connection that doesn't
//! answer by it is abandoned: its statement is cancelled, and its thread ends when the server says
//! something or the connection breaks.
//!
//! # Failure
//! [`Asked::Expired`] makes the connection useless, and so does [`Answer::Lost`].

use std::io;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::session::{Answer, Request, Session};
use super::target::{Cancel, Target};
use crate::deadline::Deadline;
use crate::serve::block_signals;

/// Virtual memory of a connection's thread: a TLS handshake of an unoptimised build takes less
/// than half of it (measured), everything else a fraction.
pub const STACK_SIZE: usize = 512 << 10;

/// The asking side.
pub struct Connection {
    /// Its number in the pool.
    pub number: u64,
    requests: Sender<Request>,
    answers: Receiver<Answer>,
    opened: Receiver<Result<Cancel, String>>,
    cancel: Option<Cancel>,
}

/// What asking led to.
#[derive(Debug)]
pub enum Asked<T> {
    /// An answer.
    Answered(T),
    /// None in time.
    Expired,
}

impl Connection {
    /// Starts to connect. `ended` is dropped at the end of the thread.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn open<E: Send + 'static>(number: u64, target: Arc<Target>, ended: E) -> io::Result<Self> {
        // Channels without room: the receiver is nearly always waiting already, and goes to sleep at
        // once, while it would first look for a message for some time if there were room for one.
        let (requests, asked) = bounded::<Request>(0);
        let (answer, answers) = bounded(0);
        let (open, opened) = bounded(1);
        let serve = move || {
            let _ended = ended;
            block_signals();
            match target.connect() {
                Ok((client, cancel)) => {
                    // Whoever asks may have given up.
                    if open.send(Ok(cancel)).is_ok() {
                        serve(Session::new(client), &asked, &answer);
                    }
                }
                Err(message) => drop(open.send(Err(message))),
            }
        };
        thread::Builder::new().name("pg".into()).stack_size(STACK_SIZE).spawn(serve)?;
        Ok(Self { number, requests, answers, opened, cancel: None })
    }

    /// Waits until it is connected.
    pub fn opened(&mut self, deadline: Deadline) -> Asked<Result<(), String>> {
        match self.opened.recv_deadline(deadline.instant()) {
            Ok(Ok(cancel)) => {
                self.cancel = Some(cancel);
                Asked::Answered(Ok(()))
            }
            Ok(Err(message)) => Asked::Answered(Err(message)),
            Err(RecvTimeoutError::Timeout) => Asked::Expired,
            Err(RecvTimeoutError::Disconnected) => Asked::Answered(Err(BROKEN.into())),
        }
    }

    /// Asks and waits for the answer.
    pub fn ask(&self, request: Request, deadline: Deadline) -> Asked<Answer> {
        let lost = |unsent| Asked::Answered(Answer::Lost { message: BROKEN.into(), unsent });
        if self.requests.send(request).is_err() {
            return lost(true);
        }
        match self.answers.recv_deadline(deadline.instant()) {
            Ok(answer) => Asked::Answered(answer),
            Err(RecvTimeoutError::Timeout) => Asked::Expired,
            Err(RecvTimeoutError::Disconnected) => lost(false),
        }
    }

    /// Gives it up while it works.
    pub fn abandon(self) {
        let Some(cancel) = self.cancel else { return };
        let thread = thread::Builder::new().name("pg-cancel".into()).stack_size(STACK_SIZE);
        // Without a thread the statement goes on until its end.
        let _ = thread.spawn(move || cancel.run());
    }
}

/// The thread is gone, for a reason that nobody foresaw.
const BROKEN: &str = "the connection's thread has ended";

fn serve(mut session: Session, requests: &Receiver<Request>, answers: &Sender<Answer>) {
    while let Ok(request) = requests.recv() {
        let answer = session.answer(&request);
        let lost = matches!(answer, Answer::Lost { .. });
        if answers.send(answer).is_err() || lost {
            break;
        }
    }
}
