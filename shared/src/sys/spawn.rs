//! Starting programs.
//!
//! Contract: the program starts in `/`, leads a process group of its own, has every signal at its
//! default and none blocked, has descriptors 0, 1 and 2 and no others, and has the limits that
//! qrelay was started with. When [`spawn`] returns, all of that holds, and the program has been
//! executed.
//!
//! The new process shares the memory of this one until exec, as in posix_spawn(3), so that a large
//! worker starts a program as fast as a small one. posix_spawn itself can't set limits. The thread
//! that calls [`spawn`] stands still until exec; the other threads go on. So the code between fork
//! and exec ([`become_program`]) makes system calls only: it allocates nothing, takes no lock and
//! can't panic.
//!
//! # Failure
//! Every error is the errno of the failed step, including exec; there is no process then.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::sys::limits::Limits;
use crate::sys::{process, signals};

/// The first descriptor that a program doesn't get.
const FIRST_CLOSED: i32 = 3;

/// Memory for the stack of the code between fork and exec, in bytes.
const STACK: usize = 64 << 10;

/// Alignment of a stack, in bytes, on every architecture.
const STACK_ALIGNMENT: usize = 16;

/// The working directory of programs.
const ROOT: &CStr = c"/";

/// Exit status of a process that didn't become a program. Nobody sees the status.
const NO_PROGRAM: c_int = 127;

/// A program to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// Path of the program, followed by its arguments.
    pub arguments: &'a [CString],
    /// The whole environment of the program, as `NAME=value`.
    pub environment: &'a [CString],
    /// The descriptors that become 0, 1 and 2 of the program. Their own numbers must be larger.
    pub stdio: [BorrowedFd<'a>; 3],
}

/// A program that has been started.
#[derive(Debug)]
pub struct Started {
    /// Process id of the program, and of its process group.
    pub pid: Pid,
    /// A close-on-exec descriptor of the process, which becomes readable when the process ends.
    pub process: OwnedFd,
}

/// Starts a program. The caller has to wait for its end.
///
/// # Errors
/// `EINVAL` without a path, or when a descriptor of `stdio` is a standard descriptor itself, which
/// setting up another one would overwrite; `ENOSYS` before Linux 5.2; otherwise as clone(2) and
/// execve(2).
pub fn spawn(program: &Program<'_>) -> Result<Started, Errno> {
    let path = program.arguments.first().ok_or(Errno::EINVAL)?;
    if program.stdio.iter().any(|fd| fd.as_raw_fd() < FIRST_CLOSED) {
        return Err(Errno::EINVAL);
    }
    let arguments = pointers(program.arguments);
    let environment = pointers(program.environment);
    let plan = Plan {
        path: path.as_ptr(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        stdio: program.stdio.map(|fd| fd.as_raw_fd()),
        limits: Limits::of_programs(),
        failure: AtomicI32::new(0),
    };
    let (pid, process) = fork_into(&plan)?;
    let errno = match (plan.failure.load(Ordering::Relaxed), process) {
        (0, Some(process)) => return Ok(Started { pid, process }),
        (0, None) => {
            // The process isn't reaped yet, so the number is still its own.
            let _ = kill(pid, Signal::SIGKILL);
            Errno::ENOSYS
        }
        // The process ends by itself.
        (errno, _) => Errno::from_raw(errno),
    };
    // The status says nothing.
    let _ = process::reap(pid);
    Err(errno)
}

/// Returns pointers to the strings, followed by NULL, as C expects a list of strings.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Everything that the new process needs. The pointers are valid until exec.
struct Plan {
    path: *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    stdio: [RawFd; 3],
    limits: Option<Limits>,
    /// The errno of the step that failed; 0 if the program has been executed.
    failure: AtomicI32,
}

/// Starts the new process. Returns when the process has become the program or has failed. The
/// descriptor of the process comes from clone(2) itself: filters of system calls that forbid
/// pidfd_open(2) allow that. There is none before Linux 5.2.
fn fork_into(plan: &Plan) -> Result<(Pid, Option<OwnedFd>), Errno> {
    let mut stack = Vec::<u8>::with_capacity(STACK);
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end.cast::<u8>();
    let top = top.wrapping_sub(top.addr() % STACK_ALIGNMENT);
    // A signal's handler would run in the new process, too, on this process's memory.
    let before = signals::set_mask(&signals::EVERY);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut process: c_int = -1;
    let plan = ptr::from_ref(plan).cast_mut().cast::<c_void>();
    // SAFETY: with CLONE_VFORK this thread stands still until the new process has executed a
    // program or ended, so the stack and the plan outlive their use. `become_program` only reads
    // the plan, except for its atomic field. `process` has room for the integer that the kernel
    // writes, and outlives the call.
    let pid = unsafe { libc::clone(become_program, top.cast(), flags, plan, &raw mut process) };
    // Setting the mask again must not change errno.
    let result = Errno::result(pid);
    signals::set_mask(&before);
    let pid = Pid::from_raw(result?);
    // SAFETY: the kernel has just installed this descriptor for this process.
    let process = (process >= 0).then(|| unsafe { OwnedFd::from_raw_fd(process) });
    Ok((pid, process))
}

/// Runs in the new process until exec; see the head of this file for what it may do.
extern "C" fn become_program(plan: *mut c_void) -> c_int {
    // SAFETY: the pointer is the one that `fork_into` passed, and the plan lives until exec.
    let plan = unsafe { &*plan.cast::<Plan>() };
    let Err(errno) = prepare(plan).and_then(|()| {
        // SAFETY: both lists end in NULL, and all strings in NUL.
        Errno::result(unsafe { libc::execve(plan.path, plan.arguments, plan.environment) })
    }) else {
        return NO_PROGRAM;
    };
    plan.failure.store(errno as i32, Ordering::Relaxed);
    NO_PROGRAM
}

/// Sets up the new process, all but the program.
fn prepare(plan: &Plan) -> Result<(), Errno> {
    signals::ALL.for_each(signals::reset);
    // SAFETY: none of these calls touches memory of this process but the path, which is a constant.
    unsafe {
        Errno::result(libc::setpgid(0, 0))?;
        for (target, fd) in (0..).zip(plan.stdio) {
            Errno::result(libc::dup2(fd, target))?;
        }
        Errno::result(libc::chdir(ROOT.as_ptr()))?;
    }
    close_others();
    if let Some(limits) = plan.limits {
        set_limit(Resource::RLIMIT_NOFILE, limits.descriptors)?;
        set_limit(Resource::RLIMIT_CORE, limits.core)?;
    }
    signals::set_mask(&signals::NONE);
    Ok(())
}

/// Closes every descriptor but 0, 1 and 2. The new process has a table of descriptors of its own.
fn close_others() {
    // SAFETY: the descriptors of the new process are copies that nothing refers to.
    let result = unsafe { libc::syscall(libc::SYS_close_range, FIRST_CLOSED, c_int::MAX, 0) };
    if result == 0 {
        return;
    }
    // The kernel is older than Linux 5.9, or forbids the call.
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((0, 0));
    let limit = c_int::try_from(limit).unwrap_or(c_int::MAX);
    for fd in FIRST_CLOSED..limit {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    }
}

/// Sets a soft limit, as far as the hard limit allows.
fn set_limit(resource: Resource, soft: libc::rlim_t) -> Result<(), Errno> {
    let (now, hard) = getrlimit(resource)?;
    let soft = soft.min(hard);
    if soft == now { Ok(()) } else { setrlimit(resource, soft, hard) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::wait::{WaitStatus, waitpid};
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    fn strings(texts: &[&str]) -> Vec<CString> {
        texts.iter().map(|text| CString::new(*text).expect("no NUL")).collect()
    }

    fn run(arguments: &[&str], environment: &[&str]) -> Result<(String, WaitStatus), Errno> {
        let null = File::open("/dev/null").expect("/dev/null");
        let (read, write) = std::io::pipe().expect("pipe");
        let Started { pid, process } = spawn(&Program {
            arguments: &strings(arguments),
            environment: &strings(environment),
            stdio: [null.as_fd(), write.as_fd(), write.as_fd()],
        })?;
        drop(write);
        let mut text = String::new();
        { read }.read_to_string(&mut text).expect("read");
        let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ended, PollTimeout::from(10_000_u16)), Ok(1), "the process ends");
        Ok((text, waitpid(pid, None).expect("wait")))
    }

    /// Returns the value of a field of /proc/PID/status.
    fn field<'t>(status: &'t str, name: &str) -> &'t str {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.strip_prefix(":\t")).expect("field")
    }

    #[test]
    fn signals_are_at_their_defaults() {
        let status = run(&["/bin/cat", "/proc/self/status"], &[]).expect("spawn").0;
        for set in ["SigBlk", "SigIgn", "SigCgt"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
    }

    #[test]
    fn a_program_leads_its_group() {
        let stat = run(&["/bin/cat", "/proc/self/stat"], &[]).expect("spawn").0;
        let fields: Vec<_> = stat.split(' ').collect();
        // pid and pgrp of proc_pid_stat(5).
        assert_eq!(fields[0], fields[4]);
    }

    #[test]
    fn a_program_has_only_its_descriptors_and_environment() {
        let (text, _) = run(&["/bin/ls", "/proc/self/fd", "/proc/self/cwd/"], &[]).expect("spawn");
        let (root, fds) = text.split_once("\n\n").expect("two directories");
        assert!(root.contains("\nproc\n"), "{root}");
        // The last descriptor is the directory that ls reads.
        assert_eq!(fds, "/proc/self/fd:\n0\n1\n2\n3\n");
        let (text, _) =
            run(&["/bin/cat", "/proc/self/environ", "/proc/self/cmdline"], &["A=b c", "D="])
                .expect("spawn");
        assert_eq!(text, "A=b c\0D=\0/bin/cat\0/proc/self/environ\0/proc/self/cmdline\0");
    }

    #[test]
    fn a_program_gets_the_limits_that_were_noted() {
        let mut limits = Limits::now().expect("limits");
        limits.descriptors = limits.descriptors.min(200) - 1;
        limits.core = 0;
        limits.remember();
        let text = run(&["/bin/sh", "-c", "ulimit -Sn; ulimit -Sc"], &[]).expect("spawn").0;
        assert_eq!(text, format!("{}\n0\n", limits.descriptors));
        let own = Limits::now().expect("limits");
        assert!(own.descriptors > limits.descriptors, "{own:?}");
    }

    #[test]
    fn a_failure_leaves_no_process_and_no_blocked_signal() {
        let before = signals::set_mask(&signals::NONE);
        let children = || std::fs::read_to_string("/proc/thread-self/children").expect("children");
        assert_eq!(run(&["/nowhere"], &[]).err(), Some(Errno::ENOENT));
        assert_eq!(children(), "");
        assert_eq!(signals::set_mask(&before), signals::NONE);
    }

    #[test]
    fn many_threads_start_programs_at_once() {
        let start = |n: i32| {
            move || {
                (0..25).all(|_| {
                    let script = format!("exit {n}");
                    let (_, status) = run(&["/bin/sh", "-c", &script], &[]).expect("spawn");
                    matches!(status, WaitStatus::Exited(_, code) if code == n)
                })
            }
        };
        let threads: Vec<_> = (0..8).map(|n| std::thread::spawn(start(n))).collect();
        assert!(threads.into_iter().all(|thread| thread.join().expect("a thread")));
    }

    #[test]
    fn the_status_is_the_programs() {
        let status = run(&["/bin/sh", "-c", "exit 7"], &[]).expect("spawn").1;
        assert!(matches!(status, WaitStatus::Exited(_, 7)));
    }

    #[test]
    fn what_cannot_start() {
        assert_eq!(run(&["/nowhere"], &[]).err(), Some(Errno::ENOENT));
        assert_eq!(run(&["/proc"], &[]).err(), Some(Errno::EACCES));
        assert_eq!(run(&[], &[]).err(), Some(Errno::EINVAL));
        let stdin = std::io::stdin();
        let stdio = [stdin.as_fd(), stdin.as_fd(), stdin.as_fd()];
        let program = Program { arguments: &strings(&["/bin/true"]), environment: &[], stdio };
        assert_eq!(spawn(&program).err(), Some(Errno::EINVAL));
    }
}
