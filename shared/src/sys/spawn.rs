//! Starting programs.
//!
//! Contract: the program starts in `/`, leads a process group of its own, has every signal at its
//! default and none blocked, and has descriptors 0, 1 and 2 and no others. When [`spawn`] returns,
//! all of that holds, and the program has been executed. No code of qrelay runs between fork and
//! exec, because the child shares the memory of a process with many threads until exec.
//! posix_spawn(3) of glibc 2.34 or newer has an action for each of these steps (`closefrom` was
//! added last).
//!
//! # Failure
//! Every error is the errno of the failed step, including exec; there is no process then.

use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;
use nix::unistd::Pid;

/// The first descriptor that a program doesn't get.
const FIRST_CLOSED: i32 = 3;

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

/// Starts a program. The caller has to wait for its end.
///
/// # Errors
/// `EINVAL` without a path, or when a descriptor of `stdio` is a standard descriptor itself, which
/// setting up another one would overwrite; otherwise as fork(2) and execve(2).
pub fn spawn(program: &Program<'_>) -> Result<Pid, Errno> {
    let path = program.arguments.first().ok_or(Errno::EINVAL)?;
    if program.stdio.iter().any(|fd| fd.as_raw_fd() < FIRST_CLOSED) {
        return Err(Errno::EINVAL);
    }
    let attributes = Attributes::new()?;
    let actions = Actions::new(&program.stdio)?;
    let arguments = pointers(program.arguments);
    let environment = pointers(program.environment);
    let mut pid: libc::pid_t = -1;
    // SAFETY: attributes and actions are initialised; both lists end in NULL and their strings in
    // NUL, and `program` keeps the strings alive. posix_spawn only reads them.
    let error = unsafe {
        libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            &raw const actions.0,
            &raw const attributes.0,
            arguments.as_ptr(),
            environment.as_ptr(),
        )
    };
    check(error)?;
    Ok(Pid::from_raw(pid))
}

/// Converts the result of posix_spawn and related functions, which return the error instead of
/// setting `errno`.
fn check(error: libc::c_int) -> Result<(), Errno> {
    if error == 0 { Ok(()) } else { Err(Errno::from_raw(error)) }
}

/// Returns pointers to the strings, followed by NULL, as C expects a list of strings.
fn pointers(strings: &[CString]) -> Vec<*mut c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr().cast_mut());
    pointers.chain([ptr::null_mut()]).collect()
}

/// The attributes of a new process: signals and process group.
struct Attributes(libc::posix_spawnattr_t);

impl Attributes {
    fn new() -> Result<Self, Errno> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: posix_spawnattr_init writes the attributes to the memory that it is given.
        check(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: the attributes have just been initialised.
        let mut this = Self(unsafe { attributes.assume_init() });
        let flags = libc::POSIX_SPAWN_SETSIGDEF
            | libc::POSIX_SPAWN_SETSIGMASK
            | libc::POSIX_SPAWN_SETPGROUP;
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: every pattern of bits is a set of signals. sigfillset would leave out the two
        // that glibc uses itself, and the program would find them ignored.
        unsafe { all.as_mut_ptr().write_bytes(0xff, 1) };
        // SAFETY: sigemptyset initialises its set, both sets are only read after that, and the
        // attributes are initialised. Process group 0 means: the child's own.
        unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            check(libc::posix_spawnattr_setsigdefault(&raw mut this.0, all.as_ptr()))?;
            check(libc::posix_spawnattr_setsigmask(&raw mut this.0, none.as_ptr()))?;
            check(libc::posix_spawnattr_setpgroup(&raw mut this.0, 0))?;
            check(libc::posix_spawnattr_setflags(&raw mut this.0, flags as libc::c_short))?;
        }
        Ok(this)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: the attributes were initialised in `new`, and are not used any more.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

/// The file actions of a new process: descriptors and working directory.
struct Actions(libc::posix_spawn_file_actions_t);

impl Actions {
    fn new(stdio: &[BorrowedFd<'_>; 3]) -> Result<Self, Errno> {
        const ROOT: &CStr = c"/";
        let mut actions = MaybeUninit::uninit();
        // SAFETY: posix_spawn_file_actions_init writes the actions to the memory that it is given.
        check(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        // SAFETY: the actions have just been initialised.
        let mut this = Self(unsafe { actions.assume_init() });
        for (target, fd) in (0..).zip(stdio) {
            let original = fd.as_raw_fd();
            // SAFETY: the actions are initialised; the numbers are only stored.
            check(unsafe {
                libc::posix_spawn_file_actions_adddup2(&raw mut this.0, original, target)
            })?;
        }
        // SAFETY: the actions are initialised, and the path is copied.
        unsafe {
            check(libc::posix_spawn_file_actions_addclosefrom_np(&raw mut this.0, FIRST_CLOSED))?;
            check(libc::posix_spawn_file_actions_addchdir_np(&raw mut this.0, ROOT.as_ptr()))?;
        }
        Ok(this)
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: the actions were initialised in `new`, and are not used any more.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let pid = spawn(&Program {
            arguments: &strings(arguments),
            environment: &strings(environment),
            stdio: [null.as_fd(), write.as_fd(), write.as_fd()],
        })?;
        drop(write);
        let mut text = String::new();
        { read }.read_to_string(&mut text).expect("read");
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
