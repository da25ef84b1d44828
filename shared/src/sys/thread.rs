//! Threads other than the main thread.
//!
//! Contract: a thread that is started here takes no signals, because a signal would only interrupt
//! its system calls; the main thread takes them.

use std::io;
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

fn block_signals() {
    let mut blocked = SigSet::empty();
    for signal in
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGCHLD]
    {
        blocked.add(signal);
    }
    // Blocking fails only for an invalid argument.
    let _ = blocked.thread_block();
}
