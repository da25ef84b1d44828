//! Forking without exec, for the zygote; reaping; and process-wide settings of the C library.

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::sys::memfd;

/// The side of a fork on which the caller is.
#[derive(Debug)]
pub enum Forked {
    /// The caller itself. The value is the pid of the new process, which is a child of the nearest
    /// subreaper.
    Parent(Pid),
    /// The new process, which must never return into the caller's loop.
    Child,
}

/// The reason why there is no new process.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The process has several threads. A fork would leave locks held by threads that don't exist
    /// in the child.
    #[error("{0} threads are running; a fork needs a single one")]
    Threads(usize),
    /// The list of threads can't be read, so there may be several.
    #[error("the threads can't be counted, and a fork needs a single one; {TASKS}: {0}")]
    Uncounted(io::Error),
    /// A system call such as fork(2) or pipe(2) failed.
    #[error("{0}: {1}")]
    Os(&'static str, Errno),
    /// The intermediate process ended before it had told the pid of the new one.
    #[error("the intermediate process ended early")]
    Lost,
}

/// The list of this process's threads.
const TASKS: &str = "/proc/self/task";

/// Returns success if the list has exactly one thread.
fn single_thread(tasks: &str) -> Result<(), ForkError> {
    let mut count = 0;
    for entry in std::fs::read_dir(tasks).map_err(ForkError::Uncounted)? {
        entry.map_err(ForkError::Uncounted)?;
        count += 1;
    }
    if count == 1 { Ok(()) } else { Err(ForkError::Threads(count)) }
}

/// Forks twice, so that the new process becomes a child of the subreaper.
///
/// # Errors
/// See [`ForkError`]; no process is left behind then.
pub fn fork_orphan() -> Result<Forked, ForkError> {
    single_thread(TASKS)?;
    flush_stdio();
    let (read, write) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| ForkError::Os("pipe", e))?;
    // SAFETY: the process has one thread, so the child finds every lock free and may go on as an
    // ordinary process.
    match unsafe { fork() }.map_err(|e| ForkError::Os("fork", e))? {
        ForkResult::Child => intermediate(std::fs::File::from(write)),
        ForkResult::Parent { child } => {
            drop(write);
            let mut bytes = [0; 4];
            let told = std::fs::File::from(read).read_exact(&mut bytes);
            while waitpid(child, None) == Err(Errno::EINTR) {}
            told.map_err(|_| ForkError::Lost)?;
            match i32::from_ne_bytes(bytes) {
                pid if pid > 0 => Ok(Forked::Parent(Pid::from_raw(pid))),
                error => Err(ForkError::Os("fork", Errno::from_raw(-error))),
            }
        }
    }
}

/// Forks the process that stays, writes its pid (or the negative errno) to the pipe, and ends this
/// process.
fn intermediate(mut pipe: std::fs::File) -> Result<Forked, ForkError> {
    // SAFETY: as in `fork_orphan`, the process still has a single thread.
    let answer = match unsafe { fork() } {
        Ok(ForkResult::Child) => return Ok(Forked::Child),
        Ok(ForkResult::Parent { child }) => child.as_raw(),
        Err(error) => -(error as i32),
    };
    let told = pipe.write_all(&answer.to_ne_bytes());
    exit_now(i32::from(told.is_err()))
}

/// Returns a child that has ended and isn't reaped yet: the child `of` if that is given, else any
/// child.
pub fn ended_child(of: Option<Pid>) -> Option<Pid> {
    let (kind, id) = match of {
        Some(pid) => (libc::P_PID, pid.as_raw().cast_unsigned()),
        None => (libc::P_ALL, 0),
    };
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` has room for what the kernel writes, and outlives the call.
    let result = unsafe { libc::waitid(kind, id, info.as_mut_ptr(), flags) };
    if result != 0 {
        return None;
    }
    // SAFETY: all zeroes are a valid siginfo_t, and waitid sets the fields of a child.
    let pid = unsafe { info.assume_init().si_pid() };
    (pid > 0).then(|| Pid::from_raw(pid))
}

/// Waits for the end of a child and reaps it. A child that was ended by a real-time signal, for
/// which nix has no name, counts as exited with 128 + the number of the signal, as in a shell.
///
/// # Errors
/// `ECHILD`: the process is no child of this process, or is reaped already.
pub fn reap(pid: Pid) -> Result<WaitStatus, Errno> {
    let mut status = 0;
    // SAFETY: `status` has room for the integer that the kernel writes, and outlives the call.
    while unsafe { libc::waitpid(pid.as_raw(), &raw mut status, 0) } == -1 {
        match Errno::last() {
            Errno::EINTR => {}
            error => return Err(error),
        }
    }
    WaitStatus::from_raw(pid, status)
        .or_else(|_| Ok(WaitStatus::Exited(pid, 128 + libc::WTERMSIG(status))))
}

/// Has a function run before the process ends by exit(3), which also `main`'s return and Lua's
/// `os.exit` call. If there is no memory to note the function, it doesn't run.
pub(crate) fn at_exit(function: extern "C" fn()) {
    // SAFETY: the function is there as long as the process.
    unsafe { libc::atexit(function) };
}

/// Ends this process without running the functions that are registered for its end.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Writes out the buffers of C's stdio, so that a fork doesn't double their content.
pub fn flush_stdio() {
    // SAFETY: NULL means every open output stream.
    unsafe { libc::fflush(std::ptr::null_mut()) };
}

/// Limits the number of glibc's arenas and keeps large buffers out of them, so that memory stays
/// flat however many threads come and go.
pub fn tame_malloc() {
    // SAFETY: mallopt only sets parameters; called before threads exist.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 * 1024);
    }
}

/// Moves standard input to a new close-on-exec descriptor, and puts /dev/null in its place, or an
/// empty file where there is no /dev/null. Returns the new descriptor.
///
/// # Errors
/// As fcntl(2), open(2), memfd_create(2), dup2(2).
pub fn take_stdin() -> Result<OwnedFd, Errno> {
    let taken = nix::fcntl::fcntl(io::stdin(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3))?;
    let nothing = match std::fs::File::open("/dev/null") {
        Ok(null) => null.into(),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            // A root directory without devices, or one whose devices don't work (nodev).
            Some(Errno::ENOENT | Errno::EACCES | Errno::ENXIO) => memfd::empty("qrelay-nothing")?,
            other => return Err(other.unwrap_or(Errno::EIO)),
        },
    };
    nix::unistd::dup2_stdin(nothing)?;
    // SAFETY: F_DUPFD_CLOEXEC has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(taken) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::spawn::{Program, spawn};
    use std::os::fd::AsFd;

    fn child(script: &str) -> Pid {
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        let arguments = ["/bin/sh", "-c", script].map(|text| text.to_owned());
        let arguments = arguments.map(|text| std::ffi::CString::new(text).expect("no NUL"));
        let stdio = [null.as_fd(), null.as_fd(), null.as_fd()];
        spawn(&Program { arguments: &arguments, environment: &[], stdio }).expect("spawn").pid
    }

    #[test]
    fn no_fork_without_a_count_of_threads() {
        let error = single_thread("/proc/self/no-tasks").expect_err("nothing to count");
        let text = error.to_string();
        assert!(text.starts_with("the threads can't be counted, and a fork needs"), "{text}");
        assert!(matches!(single_thread("/proc/self/ns"), Err(ForkError::Threads(2..))));
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv().is_err());
        assert!(matches!(fork_orphan(), Err(ForkError::Threads(2..))));
        drop(release);
        assert!(other.join().expect("a thread"));
    }

    #[test]
    fn every_way_to_end_is_seen() {
        for (script, expected) in
            [("exit 7", "Exited"), ("kill -9 $$", "Signaled"), ("kill -40 $$", "Exited")]
        {
            let pid = child(script);
            while ended_child(Some(pid)).is_none() {
                std::thread::yield_now();
            }
            let status = format!("{:?}", reap(pid));
            assert!(status.contains(expected), "{script}: {status}");
            assert_eq!(reap(pid), Err(Errno::ECHILD));
        }
    }
}
