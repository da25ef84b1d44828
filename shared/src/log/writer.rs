//! The thread that writes to standard error when every write may wait.
//!
//! Contract: [`put`] takes a line and returns at once. The thread starts with the first line and
//! ends with the process, whose end waits for the lines that are left, but not for long.
//!
//! # Failure
//! At most [`ROOM`] bytes wait. A further line is refused, and so is every line for which the
//! system has no thread. A line that the thread can't write is counted by [`crate::log::lose`].

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::uio::writev;

use crate::log::tear::Tear;
use crate::log::{Content, lose};
use crate::sys::{process, thread};

/// Most bytes that wait: some 300 mails' lines, a burst that a slow disk may take a while for.
const ROOM: usize = 64 << 10;

/// Virtual memory of the thread's stack, in bytes.
const STACK: usize = 128 << 10;

/// How long the end of the process waits for lines.
const PATIENCE: Duration = Duration::from_millis(500);

/// A line, and what is lost with it.
struct Line {
    bytes: Box<[u8]>,
    content: Content,
}

/// The lines that wait, and what the thread does.
struct Queue {
    lines: VecDeque<Line>,
    bytes: usize,
    started: bool,
    writing: bool,
}

static QUEUE: Mutex<Queue> =
    Mutex::new(Queue { lines: VecDeque::new(), bytes: 0, started: false, writing: false });
static MORE: Condvar = Condvar::new();
static LESS: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    // Nothing panics while it holds the lock.
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leaves a line to the thread. Returns false if the line is lost.
pub(super) fn put(line: &[u8], content: Content) -> bool {
    let mut queue = queue();
    if queue.bytes + line.len() > ROOM {
        return false;
    }
    if !queue.started {
        queue.started = thread::spawn("log", STACK, write_all).is_ok();
        if !queue.started {
            return false;
        }
        process::at_exit(finish);
    }
    queue.bytes += line.len();
    queue.lines.push_back(Line { bytes: line.into(), content });
    MORE.notify_one();
    true
}

/// Waits until no line is left, for [`PATIENCE`] at most.
pub(super) extern "C" fn finish() {
    let left = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
    // What comes of it makes no difference: the process ends.
    let _ = LESS.wait_timeout_while(queue(), PATIENCE, left);
}

fn write_all() {
    let tear = Tear::default();
    let mut queue = queue();
    loop {
        let Some(line) = queue.lines.pop_front() else {
            queue.writing = false;
            LESS.notify_all();
            queue = MORE.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        queue.bytes -= line.bytes.len();
        queue.writing = true;
        drop(queue);
        if !tear.write(&line.bytes, |parts| writev(std::io::stderr(), parts)) {
            lose(line.content);
        }
        queue = self::queue();
    }
}
