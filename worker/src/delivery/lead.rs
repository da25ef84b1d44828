//! Serving a mail without letting others wait for the thread.
//!
//! The thread that receives a job may serve it itself, and go on being the one that receives. Then
//! no other thread is woken for the mail. But as soon as something else is there to do, or the mail
//! has to wait for something that can't be waited for together with jobs, another thread has to
//! receive.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use qrelay_shared::deadline::Deadline;

/// The duty of a thread to receive jobs, if it has it.
pub(crate) trait Lead {
    /// Has another thread receive jobs from now on. Called before a wait; costs nothing the second
    /// time.
    fn give_up(&self);

    /// Returns for how long the thread may wait for something else before it has to give up, if it
    /// has anything to give up.
    fn patience(&self) -> Option<Duration>;

    /// Waits until a socket can be read, a job has come or the time is over. If a job has come,
    /// another thread receives it. Returns whether the socket can be read.
    fn await_input(&self, socket: BorrowedFd<'_>, deadline: Deadline) -> bool;
}

/// A thread that has no such duty.
#[derive(Debug)]
pub(crate) struct Follower;

impl Lead for Follower {
    fn give_up(&self) {}

    fn patience(&self) -> Option<Duration> {
        None
    }

    fn await_input(&self, _: BorrowedFd<'_>, _: Deadline) -> bool {
        false
    }
}
