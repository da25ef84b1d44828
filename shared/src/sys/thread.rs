//! Threads other than the main thread.
//!
//! Contract: a thread that is started here takes no signals but SIGCHLD, because a signal would
//! only interrupt its system calls; the main thread takes them.

use std::io;
use std::marker::PhantomData;
use std::thread::Builder;

use nix::sys::signal::{SigSet, Signal};

/// Virtual memory of a thread that runs Lua, in bytes. Lua's C recursion crashes on 1 MiB and
/// reports a clean error on 2 MiB (measured with a `gsub` callback that recurses).
pub const LUA_STACK: usize = 4 << 20;

/// Starts a thread that nobody joins. `stack` is its virtual memory in bytes.
///
/// # Errors
/// As pthread_create(3): usually the limit of processes or of memory. `run` is dropped then.
pub fn spawn(name: &str, stack: usize, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = Builder::new().name(name.to_owned()).stack_size(stack);
    thread.spawn(move || {
        block_signals();
        run();
    })?;
    Ok(())
}

/// Blocks every signal but those that a fault of the thread itself causes, and SIGCHLD. Where
/// SIGCHLD has no effect, the kernel drops it at once, unless the thread whose child has ended
/// blocks it: then the end of each program would wake the main thread.
fn block_signals() {
    let mut blocked = SigSet::all();
    for open in [
        Signal::SIGABRT,
        Signal::SIGBUS,
        Signal::SIGCHLD,
        Signal::SIGFPE,
        Signal::SIGILL,
        Signal::SIGSEGV,
        Signal::SIGSYS,
        Signal::SIGTRAP,
    ] {
        blocked.remove(open);
    }
    // Blocking fails only for an invalid argument.
    let _ = blocked.thread_block();
}

/// As long as this value lives, the thread that made it blocks no signal. A process that the thread
/// starts meanwhile inherits the empty mask.
#[derive(Debug)]
pub struct SignalsUnblocked {
    before: SigSet,
    /// The mask is the thread's, so the value stays in its thread.
    _here: PhantomData<*const ()>,
}

impl SignalsUnblocked {
    /// Blocks no signal from now on.
    #[expect(clippy::new_without_default, reason = "the constructor has an effect")]
    pub fn new() -> Self {
        // Reading and setting the mask fail only for invalid arguments.
        let before = SigSet::thread_get_mask().unwrap_or_else(|_| SigSet::empty());
        let _ = SigSet::empty().thread_set_mask();
        Self { before, _here: PhantomData }
    }
}

impl Drop for SignalsUnblocked {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_comes_back() {
        let blocked = || SigSet::thread_get_mask().expect("a mask").contains(Signal::SIGTERM);
        let (send, receive) = std::sync::mpsc::channel();
        spawn("masked", LUA_STACK, move || {
            let before = blocked();
            let open = SignalsUnblocked::new();
            let meanwhile = blocked();
            drop(open);
            send.send([before, meanwhile, blocked()]).expect("somebody listens");
        })
        .expect("a thread");
        assert_eq!(receive.recv(), Ok([true, false, true]));
    }
}
