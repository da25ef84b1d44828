//! The control thread: answers the supervisor's pings, reports counted errors, frees memory that no
//! mail needs, and notices the supervisor's end.
//!
//! Contract: the thread waits for no lock and doesn't touch Lua, so that it answers whatever the
//! other threads do.
//!
//! # Failure
//! [`run`] returns when the supervisor is gone. The worker then finishes its mails within the drain
//! time.

use std::time::{Duration, Instant};

use qrelay_shared::ipc::channel::{Channel, RecvBuffer, RecvError, SendError};
use qrelay_shared::ipc::message::{
    Control, DatabaseState, FromControl, MAX_PLACE, Pong, ToControl,
};
use qrelay_shared::log::report_repeats;
use slog::debug;

use crate::session::Context;
use crate::session::progress::Observer;

/// How long to wait after a failure that passes by itself, such as ENOMEM.
const PAUSE: Duration = Duration::from_millis(10);

/// Answers pings until the supervisor is gone, or a message can't be understood.
pub(crate) fn run(channel: &Channel<FromControl, ToControl>, context: &Context) {
    let mut observer = Observer::new(Instant::now());
    let mut databases = Vec::new();
    let mut buffer = RecvBuffer::small();
    loop {
        match channel.recv(&mut buffer) {
            Ok(received) => match received.message {
                Control::Ping { sequence } => {
                    if let Err(SendError::Closed) =
                        channel.send(&pong(sequence, context, &mut observer, &mut databases), &[])
                    {
                        return;
                    }
                    report_repeats(&context.logger, Instant::now());
                    context.budget.tidy();
                }
            },
            Err(RecvError::Empty) => {}
            Err(RecvError::Os(_)) => std::thread::sleep(PAUSE),
            Err(error) => {
                debug!(context.logger, "no more orders"; "cause" => %error);
                return;
            }
        }
    }
}

/// Describes the worker. `databases` is what was told of the databases last, and is told again if
/// they can't be looked at.
fn pong(
    sequence: u64,
    context: &Context,
    observer: &mut Observer,
    databases: &mut Vec<DatabaseState>,
) -> Pong {
    let Context { script, leader, reports, .. } = context;
    let stuck = observer.look(leader.read(), || reports.has_job(), Instant::now());
    let (held, job) = script.held();
    let place = match held.is_zero() {
        true => String::new(),
        false => script.place().chars().take(MAX_PLACE / 4).collect(),
    };
    let (held, stuck) = (milliseconds(held), milliseconds(stuck));
    if let Some(seen) = script.databases() {
        *databases = seen;
    }
    Pong {
        sequence,
        held,
        stuck,
        job,
        place,
        exhausted: script.exhausted(),
        lua_bytes: script.memory(),
        databases: databases.clone(),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
