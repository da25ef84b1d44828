//! The thread that writes to standard error when every write may wait.
//!
//! Contract: [`put`] takes a line and returns at once. The thread writes all lines that wait by one
//! system call, and is woken for the first of them. The thread starts with the first line and
//! ends with the process, whose end waits for the lines that are left, but not for long.
//!
//! # Failure
//! At most [`ROOM`] bytes wait, beside those that are being written. A further line is refused, and
//! so is every line for which the system has no thread. A line that the thread can't write is
//! counted by [`crate::log::lose`].

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

/// Where a line ends in the text, and what is lost with it.
struct Line {
    end: usize,
    content: Content,
}

/// Lines one after the other.
struct Lines {
    text: Vec<u8>,
    lines: Vec<Line>,
}

/// The lines that wait, and what the thread does.
struct Queue {
    waiting: Lines,
    started: bool,
    /// The thread writes, or has been woken to write.
    writing: bool,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    waiting: Lines { text: Vec::new(), lines: Vec::new() },
    started: false,
    writing: false,
});
static MORE: Condvar = Condvar::new();
static LESS: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    // Nothing panics while it holds the lock.
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leaves a line to the thread. Returns false if the line is lost.
pub(super) fn put(line: &[u8], content: Content) -> bool {
    let mut queue = queue();
    if queue.waiting.text.len() + line.len() > ROOM {
        return false;
    }
    if !queue.started {
        queue.started = thread::spawn("log", STACK, write_all).is_ok();
        if !queue.started {
            return false;
        }
        process::at_exit(finish);
    }
    queue.waiting.text.extend_from_slice(line);
    let end = queue.waiting.text.len();
    queue.waiting.lines.push(Line { end, content });
    // Waking the thread is a system call, which is needed only for the first of several lines.
    if !std::mem::replace(&mut queue.writing, true) {
        MORE.notify_one();
    }
    true
}

/// Waits until no line is left, for [`PATIENCE`] at most.
pub(super) extern "C" fn finish() {
    let left = |queue: &mut Queue| queue.writing || !queue.waiting.lines.is_empty();
    // What comes of it makes no difference: the process ends.
    let _ = LESS.wait_timeout_while(queue(), PATIENCE, left);
}

fn write_all() {
    let tear = Tear::default();
    let mut batch = Lines { text: Vec::new(), lines: Vec::new() };
    let mut queue = queue();
    loop {
        if queue.waiting.lines.is_empty() {
            queue.writing = false;
            LESS.notify_all();
            queue = MORE.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        // The memory of both is used again and again.
        std::mem::swap(&mut batch, &mut queue.waiting);
        queue.writing = true;
        drop(queue);
        let written = tear.write_some(&batch.text, |parts| writev(std::io::stderr(), parts));
        batch.lines.iter().filter(|line| line.end > written).for_each(|line| lose(line.content));
        batch.text.clear();
        batch.lines.clear();
        queue = self::queue();
    }
}
