//! The control thread: answers the supervisor's pings, and notices the supervisor's end.
//!
//! Contract: the thread takes no lock and doesn't touch Lua, so that it answers whatever the other
//! threads do.
//!
//! # Failure
//! [`run`] returns when the supervisor is gone. The worker then finishes its mails within the drain
//! time.

use std::time::Duration;

use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError, SendError};
use qrelay_shared::ipc::message::{Control, FromControl, Pong, ToControl};

use crate::session::script::Script;

/// How long to wait after a failure that passes by itself, such as ENOMEM.
const PAUSE: Duration = Duration::from_millis(10);

/// Answers pings until the supervisor is gone, or a message can't be understood.
pub(crate) fn run(channel: &Channel<FromControl, ToControl>, script: &dyn Script) {
    let mut buffer = RecvBuffer::small();
    loop {
        match channel.recv(&mut buffer) {
            Ok(received) => match received.message {
                Control::Ping { sequence } => {
                    if let Err(SendError::Closed) = channel.send(&pong(sequence, script), &[]) {
                        return;
                    }
                }
            },
            Err(RecvError::Empty) => {}
            Err(RecvError::Os(_)) => std::thread::sleep(PAUSE),
            Err(RecvError::Closed | RecvError::Malformed | RecvError::DescriptorLost) => return,
        }
    }
}

fn pong(sequence: u64, script: &dyn Script) -> Pong {
    let (held, job) = script.held();
    let held = u64::try_from(held.as_millis()).unwrap_or(u64::MAX);
    Pong { sequence, held, job, exhausted: script.exhausted() }
}
