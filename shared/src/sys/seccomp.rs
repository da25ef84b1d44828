//! A filter of system calls (seccomp(2)) that keeps a process from changing the limits, priorities
//! and processors of other processes. Landlock doesn't restrict these calls, and the kernel allows
//! them between processes of one user.
//!
//! # Failure
//! Every error is the errno of the failed call. `ENOSYS` on architectures whose numbers this file
//! doesn't have.

use nix::errno::Errno;

/// Numbers of the filtered calls in one architecture.
struct Numbers {
    /// `AUDIT_ARCH_*` of include/uapi/linux/audit.h.
    architecture: u32,
    prlimit64: u32,
    setpriority: u32,
    ioprio_set: u32,
    sched_setparam: u32,
    sched_setscheduler: u32,
    sched_setaffinity: u32,
    sched_setattr: u32,
}

/// The architectures of which a program may be. Calls of any other architecture fail with `ENOSYS`.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[Numbers] = &[
    Numbers {
        architecture: 0xc000_003e,
        prlimit64: 302,
        setpriority: 141,
        ioprio_set: 251,
        sched_setparam: 142,
        sched_setscheduler: 144,
        sched_setaffinity: 203,
        sched_setattr: 314,
    },
    // Programs of 32 bits.
    Numbers {
        architecture: 0x4000_0003,
        prlimit64: 340,
        setpriority: 97,
        ioprio_set: 289,
        sched_setparam: 154,
        sched_setscheduler: 156,
        sched_setaffinity: 241,
        sched_setattr: 351,
    },
];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[Numbers] = &[Numbers {
    architecture: 0xc000_00b7,
    prlimit64: 261,
    setpriority: 140,
    ioprio_set: 30,
    sched_setparam: 118,
    sched_setscheduler: 119,
    sched_setaffinity: 122,
    sched_setattr: 274,
}];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURES: &[Numbers] = &[];

/// From this number on, x86_64 has the calls of its x32 ABI, which nothing uses.
const X32: u32 = 0x4000_0000;
/// Offset of the number in `struct seccomp_data`.
const NUMBER: u32 = 0;
/// Offset of the architecture in `struct seccomp_data`.
const ARCHITECTURE: u32 = 4;
/// `IOPRIO_WHO_PROCESS` of include/uapi/linux/ioprio.h.
const IOPRIO_WHO_PROCESS: u32 = 1;

/// Forbids the calling thread, its later threads, and every program that it starts, to change
/// limits, priorities and processors of any process but the calling one (pid 0). Such a call fails
/// with `EPERM`. The thread must have `no_new_privs`.
///
/// # Errors
/// As seccomp(2); `EINVAL` if the kernel has no filters.
pub fn spare_other_processes() -> Result<(), Errno> {
    if ARCHITECTURES.is_empty() {
        return Err(Errno::ENOSYS);
    }
    let mut filter = filter();
    let length = u16::try_from(filter.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
    // Without this flag, kernels before Linux 5.16 make a filtered process slower, against attacks
    // that this filter is not about.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: `program` has the filter's address and length; both outlive the call, and the kernel
    // copies the filter.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    Errno::result(result).map(drop)
}

/// Returns the program. The kernel finds out that it allows every other call whatever the
/// arguments, and doesn't run the program for these (Linux 5.11).
fn filter() -> Vec<libc::sock_filter> {
    let mut filter = vec![load(ARCHITECTURE)];
    for numbers in ARCHITECTURES {
        let block = block(numbers);
        // The block ends with a decision, so what follows is only for other architectures.
        let length = u8::try_from(block.len()).unwrap_or(u8::MAX);
        filter.push(unless_equal(numbers.architecture, length));
        filter.extend(block);
    }
    filter.push(fail(Errno::ENOSYS));
    filter
}

fn block(numbers: &Numbers) -> Vec<libc::sock_filter> {
    let mut block = vec![load(NUMBER)];
    if cfg!(target_arch = "x86_64") {
        let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
        block.push(statement(at_least, X32, [0, 1]));
        block.push(fail(Errno::ENOSYS));
    }
    let denied = fail(Errno::EPERM);
    let own = |which, argument| {
        vec![
            load(low(0)),
            unless_equal(which, 3),
            load(low(argument)),
            unless_equal(0, 1),
            allow(),
            denied,
        ]
    };
    let process = || vec![load(low(0)), unless_equal(0, 1), allow(), denied];
    let rules = [
        // Reading a limit (without a new one) does no harm.
        (
            numbers.prlimit64,
            vec![
                load(low(0)),
                statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, [4, 0]),
                load(low(2)),
                unless_equal(0, 3),
                load(low(2) + 4),
                unless_equal(0, 1),
                allow(),
                denied,
            ],
        ),
        (numbers.setpriority, own(libc::PRIO_PROCESS, 1)),
        (numbers.ioprio_set, own(IOPRIO_WHO_PROCESS, 1)),
        (numbers.sched_setparam, process()),
        (numbers.sched_setscheduler, process()),
        (numbers.sched_setaffinity, process()),
        (numbers.sched_setattr, process()),
    ];
    for (number, check) in rules {
        // Each check has fewer than ten instructions.
        block.push(unless_equal(number, check.len() as u8));
        block.extend(check);
    }
    block.push(allow());
    block
}

/// Returns the offset of the low half of an argument, on a little-endian machine.
fn low(argument: u32) -> u32 {
    16 + 8 * argument
}

fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, [0, 0])
}

/// Skips instructions unless the loaded value is this one.
fn unless_equal(value: u32, skipped: u8) -> libc::sock_filter {
    statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, [0, skipped])
}

fn allow() -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, [0, 0])
}

fn fail(error: Errno) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | error as u32, [0, 0])
}

fn statement(code: u32, k: u32, [jt, jf]: [u8; 2]) -> libc::sock_filter {
    // All codes of classic BPF have 16 bits.
    libc::sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::prctl;
    use std::process::Command;

    /// Runs the commands in a thread with the filter, and returns which of them succeeded.
    fn filtered(commands: &[&str]) -> Vec<bool> {
        let run = || {
            prctl::set_no_new_privs().expect("no_new_privs");
            spare_other_processes().expect("seccomp");
            let run = |script| Command::new("/bin/sh").args(["-c", script]).status();
            commands.iter().map(|script| run(script).expect("sh").success()).collect()
        };
        std::thread::scope(|scope| scope.spawn(run).join().expect("no panic"))
    }

    #[test]
    fn a_process_may_change_itself_only() {
        // The parent of the shell is this process.
        let done = filtered(&[
            "ulimit -n 20",
            "prlimit --nofile=20:20 true",
            "nice -n 1 true",
            "prlimit --nofile --pid $PPID >/dev/null",
            "taskset -c 0 true",
            "prlimit --nofile=4096 --pid $PPID 2>/dev/null",
            "renice 1 $PPID 2>/dev/null",
            "renice 1 -u 4294967290 2>&1 | grep -q 'No such process'",
            "taskset -pc 0 $PPID >/dev/null 2>&1",
            "ionice -c 3 -p $PPID 2>/dev/null",
            "chrt -i -p 0 $PPID 2>/dev/null",
        ]);
        assert_eq!(done, [vec![true; 5], vec![false; 6]].concat());
    }

    #[test]
    fn the_numbers_are_the_kernels() {
        let Some(own) = ARCHITECTURES.first() else { return };
        for (number, expected) in [
            (own.prlimit64, libc::SYS_prlimit64),
            (own.setpriority, libc::SYS_setpriority),
            (own.ioprio_set, libc::SYS_ioprio_set),
            (own.sched_setparam, libc::SYS_sched_setparam),
            (own.sched_setscheduler, libc::SYS_sched_setscheduler),
            (own.sched_setaffinity, libc::SYS_sched_setaffinity),
            (own.sched_setattr, libc::SYS_sched_setattr),
        ] {
            assert_eq!(i64::from(number), expected);
        }
    }
}
