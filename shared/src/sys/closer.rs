//! Closing what may wait: threads that serve nobody.
//!
//! Contract: [`give`] takes a descriptor and returns at once. A thread then reads what is in the
//! socket's queue, and so drops the descriptors that were passed with it, and closes the socket. A
//! close that waits because of SO_LINGER is interrupted by a signal after [`PATIENCE`]; the kernel
//! finishes it in the background. A thread ends when it has had nothing to do for a while.
//!
//! The process's end needs no such care: the kernel lets no process that ends linger.
//!
//! # Failure
//! There are at most [`MAX_THREADS`] threads. What they can't take is kept open, and so is
//! everything if the system has no thread: a thread that serves others never closes it.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};

/// Most threads at a time.
const MAX_THREADS: usize = 2;

/// How long a close may wait, in nanoseconds.
const PATIENCE: libc::c_long = 2_000_000;

/// Interrupts a close that waits. By default the signal is ignored, so it ends no process that
/// doesn't expect it.
const INTERRUPT: Signal = Signal::SIGURG;

/// How long a thread waits for something to do.
const IDLE: Duration = Duration::from_secs(5);

/// Virtual memory of a thread's stack, in bytes.
const STACK: usize = 128 << 10;

/// What is to be closed, and who does it.
struct Queue {
    waiting: VecDeque<OwnedFd>,
    threads: usize,
    idle: usize,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue { waiting: VecDeque::new(), threads: 0, idle: 0 });
static MORE: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    // Nothing panics while it holds the lock.
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has another thread close a descriptor.
pub fn give(fd: OwnedFd) {
    let mut queue = queue();
    queue.waiting.push_back(fd);
    if queue.idle > 0 {
        return MORE.notify_one();
    }
    if queue.threads < MAX_THREADS {
        queue.threads += 1;
        drop(queue);
        let thread = std::thread::Builder::new().name("closer".into()).stack_size(STACK);
        if thread.spawn(run).is_err() {
            self::queue().threads -= 1;
        }
    }
}

fn run() {
    let timer = Interrupter::new();
    let mut queue = queue();
    loop {
        if let Some(fd) = queue.waiting.pop_front() {
            drop(queue);
            dispose(fd, timer.as_ref());
            queue = self::queue();
            continue;
        }
        queue.idle += 1;
        let (again, waited) =
            MORE.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
        queue = again;
        queue.idle -= 1;
        if waited.timed_out() && queue.waiting.is_empty() {
            queue.threads -= 1;
            return;
        }
    }
}

/// Drops what a socket's queue holds, and closes it. Anything else is only closed.
fn dispose(fd: OwnedFd, timer: Option<&Interrupter>) {
    if let Some(timer) = timer {
        timer.start();
    }
    // Nothing can be queued after that; what isn't a connected socket says so.
    let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
    // Each call ends at bytes with passed descriptors, and drops them before it returns. The peer
    // can't add to the queue, so it becomes empty; a peer then sees no reset.
    while let Ok(1..) = recv(fd.as_raw_fd(), &mut [0; 4096], MsgFlags::MSG_DONTWAIT) {}
    drop(fd);
    if let Some(timer) = timer {
        timer.stop();
    }
}

/// A timer that interrupts the system calls of the thread that made it.
struct Interrupter(libc::timer_t);

impl Interrupter {
    /// Makes the timer for the calling thread, which takes no other signals from now on.
    fn new() -> Option<Self> {
        let mut others = SigSet::all();
        others.remove(INTERRUPT);
        // The mask and the disposition are valid, so the calls can't fail.
        let _ = nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&others), None);
        let nothing =
            SigAction::new(SigHandler::Handler(ignore), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler does nothing, so it may interrupt any code.
        let _ = unsafe { sigaction(INTERRUPT, &nothing) };
        // SAFETY: all zeros is a valid sigevent, which the next lines fill in.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = INTERRUPT as c_int;
        event.sigev_notify_thread_id = nix::unistd::gettid().as_raw();
        let mut timer: libc::timer_t = std::ptr::null_mut();
        let clock = libc::CLOCK_MONOTONIC;
        // SAFETY: both pointers are to live values of the right types.
        let made = unsafe { libc::timer_create(clock, &raw mut event, &raw mut timer) };
        (made == 0).then_some(Self(timer))
    }

    /// Interrupts every [`PATIENCE`] from now on.
    fn start(&self) {
        self.set(PATIENCE);
    }

    fn stop(&self) {
        self.set(0);
    }

    fn set(&self, nanoseconds: libc::c_long) {
        let time = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
        let times = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer lives as long as `self`, and `times` is a live value.
        unsafe { libc::timer_settime(self.0, 0, &raw const times, std::ptr::null_mut()) };
    }
}

impl Drop for Interrupter {
    fn drop(&mut self) {
        // SAFETY: the timer was created by `new`, and nobody uses it any more.
        unsafe { libc::timer_delete(self.0) };
    }
}

extern "C" fn ignore(_: c_int) {}

/// A descriptor that is closed at once when it is dropped, or left to the closer.
#[derive(Debug)]
pub struct GuardedFd {
    fd: ManuallyDrop<OwnedFd>,
    late: bool,
}

impl From<OwnedFd> for GuardedFd {
    fn from(fd: OwnedFd) -> Self {
        Self { fd: ManuallyDrop::new(fd), late: false }
    }
}

impl AsFd for GuardedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl GuardedFd {
    /// Has the closer close the descriptor when it is dropped.
    pub fn leave_to_closer(&mut self) {
        self.late = true;
    }

    /// Returns the descriptor, which is nobody else's any more.
    pub fn into_inner(self) -> OwnedFd {
        let mut guarded = ManuallyDrop::new(self);
        // SAFETY: the value is never dropped nor used again, so the descriptor has one owner.
        unsafe { ManuallyDrop::take(&mut guarded.fd) }
    }
}

impl Drop for GuardedFd {
    fn drop(&mut self) {
        // SAFETY: a value is dropped once, and nothing uses its field afterwards.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        if self.late {
            give(fd);
        }
    }
}
