//! Programs that get a mail from `exec` and `exec_raw`: their input, the meaning of their answers,
//! and that each mail gets the answer of its own program.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;

use crate::harness::processes::{self, signal};
use crate::harness::{Client, Daemon, Mail, Outcome, Site, eventually, submit};

/// Starts a daemon whose handler runs a shell script with the action `exec` or `exec_raw`. The
/// script's `$1` is the sender, `$2` the daemon's directory.
pub fn shell(settings: &str, action: &str, script: &str, options: &str) -> Daemon {
    Daemon::start(&configuration(settings, action, script, options))
}

fn configuration(settings: &str, action: &str, script: &str, options: &str) -> String {
    let options = if options.is_empty() { String::new() } else { format!(", {{{options}}}") };
    format!(
        "settings{{{settings}}}
         qmqp_listen('$DIR/in', function(m)
           return m:{action}('/bin/sh', '-c', [==[{script}]==], 'sh', m.sender, '$DIR'{options})
         end)"
    )
}

pub fn mail() -> Mail {
    Mail::new("hello")
}

/// Waits until a program has written its pid to this file, and returns the pid.
#[track_caller]
pub fn pid_in(path: &PathBuf) -> i32 {
    eventually("a pid", || fs::read_to_string(path).ok()?.trim().parse().ok())
}

pub fn is_gone(pid: i32) -> bool {
    processes::look(pid).is_none_or(|process| process.state == 'Z')
}

/// Sends a mail, and waits until its program has written its pid to the file `pid`.
#[track_caller]
pub fn submit_and_wait(daemon: &Daemon) -> (Client, i32) {
    let mut client = Client::connect(daemon.path("in"));
    client.send(&mail().request());
    let pid = pid_in(&daemon.path("pid"));
    (client, pid)
}

#[test]
fn exec_speaks_qmqp() {
    let daemon = shell("", "exec", "cat >$2/got; printf 10:Kpassed\\ on,", "");
    assert_eq!(submit(daemon.path("in"), &mail()), "Kpassed on");
    let got = fs::read(daemon.path("got")).expect("input");
    assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(&mail().relayed().request()));
    let line = daemon.wait_for_log("passed on");
    assert!(line.contains("exec") && line.contains("/bin/sh"), "{line}");
}

#[test]
fn exec_raw_gets_the_bare_message() {
    let daemon = Daemon::start(
        "qmqp_listen('$DIR/in', function(m)
           m:insert_header('X-A', 1)
           m:remove_header('Subject')
           return m:exec_raw('/bin/dd', 'of=$DIR/got', 'status=none')
         end)",
    );
    assert_eq!(submit(daemon.path("in"), &mail()), "K");
    let got = fs::read(daemon.path("got")).expect("input");
    let expected =
        format!("X-A: 1\nReceived: from PID={} UID=0 with QMQP\n\nhello\n", std::process::id());
    assert_eq!(String::from_utf8_lossy(&got), expected);
}

#[test]
fn the_exit_status_is_the_answer() {
    let daemon = shell("", "exec_raw", "echo text; exit ${1%@*}", "");
    for status in [0, 1, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 99, 100]
        .into_iter()
        .chain([101, 111, 126, 127, 128, 255])
    {
        let letter = match status {
            0 => 'K',
            64 | 65 | 67 | 68 | 72 | 77 | 78 | 100 => 'D',
            _ => 'Z',
        };
        let told = submit(daemon.path("in"), &mail().from(&format!("{status}@x")));
        assert_eq!(told.to_string(), format!("{letter}text"), "{status}");
    }
}

#[test]
fn the_output_is_the_text() {
    let table = [
        ("", "K"),
        ("printf 'one\\n\\n  two\\r\\n'; echo three >&2", "Kone two three"),
        ("printf 'a\\033[1mb'", "Ka?[1mb"),
        ("exit 75", "Zinternal server error"),
        ("exit 77", "Dinternal server error"),
        ("echo half; kill -9 $$", "Zinternal server error"),
        ("echo half; kill -40 $$", "Zhalf"),
        ("exec /nowhere 2>&-", "Zinternal server error"),
    ];
    for (script, text) in table {
        let daemon = shell("workers=1", "exec_raw", script, "");
        assert_eq!(submit(daemon.path("in"), &mail()), text, "{script}");
    }
}

#[test]
fn much_output_is_read_and_cut() {
    let script = "head -c 10000000 /dev/zero | tr '\\0' x";
    let daemon = shell("workers=1", "exec_raw", script, "");
    assert_eq!(submit(daemon.path("in"), &mail()).to_string(), format!("K{}", "x".repeat(255)));
}

#[test]
fn only_a_complete_answer_and_a_good_end_count() {
    let table = [
        ("printf 3:Kok,", "Kok"),
        ("printf 003:Dno,3:Kok,", "Dno"),
        ("printf 3:Zno,; exec head -c 1000000 /dev/zero", "Zno"),
        ("printf 3:Kok,; exec sleep 0.2", "Kok"),
        ("exec <&-; printf 3:Kok,", "Kok"),
        ("true", "Zrelay failed"),
        ("printf 3:Ko", "Zrelay failed"),
        ("echo ok", "Zmalformed relay response"),
        ("printf 3:Kok,; exit 1", "Zinternal server error"),
        ("printf 3:Kok,; exit 100", "Dinternal server error"),
        ("printf 3:Kok,; kill -9 $$", "Zinternal server error"),
        ("exit 75", "Zinternal server error"),
    ];
    for (script, answer) in table {
        let daemon = shell("workers=1", "exec", script, "");
        // The input is more than any pipe holds, and most of these programs don't read it.
        assert_eq!(submit(daemon.path("in"), &Mail::of_size(1 << 20)), answer, "{script}");
    }
}

#[test]
fn errors_of_exec_go_to_the_log() {
    let daemon = shell("workers=1", "exec", "echo what went wrong >&2; printf 3:Kok,", "");
    assert_eq!(submit(daemon.path("in"), &mail()), "Kok");
    daemon.wait_for_log("what went wrong");
}

#[test]
fn a_program_that_is_not_there() {
    let daemon = Daemon::start(
        "qmqp_listen('$DIR/in', function(m) return m:exec_raw('/no/such/program') end)",
    );
    assert_eq!(submit(daemon.path("in"), &mail()), "Zinternal server error");
    let line = daemon.wait_for_log("can't be started");
    assert!(line.contains("/no/such/program") && line.contains("No such file"), "{line}");
}

#[test]
fn the_environment_is_clean() {
    let script = "cd /proc/self; pwd -P; tr '\\0' ' ' <environ; ls fd; readlink fd/0";
    let daemon = shell("workers=1", "exec_raw", script, "env={A='b c', LANG='C'}");
    let told = submit(daemon.path("in"), &mail()).to_string();
    let place = told.strip_prefix("K/proc/").expect("a directory");
    let (pid, rest) = place.split_once(' ').expect("a pid");
    assert!(pid.parse::<u32>().is_ok(), "{told}");
    assert!(rest.starts_with("A=b c LANG=C 0 1 2 /memfd:qrelay-mail-"), "{told}");
}

#[test]
fn numbers_are_texts_and_mistakes_raise() {
    let daemon = Daemon::start(
        "qmqp_listen('$DIR/in', function(m)
           local function raises(part, ...)
             local ok, message = pcall(m.exec_raw, m, ...)
             assert(not ok and message:find(part, 1, true), message)
           end
           raises('#1', nil)
           raises(\"with a '/'\", 'sendmail')
           raises('NUL', '/bin/true', 'a\\0b')
           raises('#2', '/bin/true', true)
           raises('env', '/bin/true', {env = 'x'})
           raises('env', '/bin/true', {env = {['A=B'] = 'c'}})
           raises('env', '/bin/true', {env = {['1A'] = 'c'}})
           raises('env', '/bin/true', {env = {A = true}})
           raises('timeout', '/bin/true', {timeout = 0})
           raises('timeout', '/bin/true', {timeout = 3601})
           raises('timeout', '/bin/true', {timout = 1})
           raises('2048', '/bin/true', table.unpack({}, 1, 0), table.unpack(
             setmetatable({}, {__index = function() return 'x' end}), 1, 2048))
           raises('1048576', '/bin/true', ('x'):rep(1 << 20))
           return m:exec_raw('/bin/echo', 1, 2.0, 2.5, '', {timeout = '5', env = {N = 7}})
         end)",
    );
    assert_eq!(submit(daemon.path("in"), &mail()), "K1 2 2.5");
}

/// Runs `count` jobs, numbered from 0, on 16 threads.
fn from_16_clients(count: usize, job: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    job(number);
                }
            });
        }
    });
}

#[test]
fn each_mail_gets_its_own_programs_end() {
    let daemon = shell("workers=2", "exec_raw", "echo $1; exit ${1%@*}", "");
    from_16_clients(1000, |number| {
        let status = number % 256;
        let sender = format!("{status}@mail{number}");
        let letter = match status {
            0 => 'K',
            64 | 65 | 67 | 68 | 72 | 77 | 78 | 100 => 'D',
            _ => 'Z',
        };
        let told = submit(daemon.path("in"), &mail().from(&sender)).to_string();
        assert_eq!(told, format!("{letter}{sender}"));
    });
    for worker in daemon.workers() {
        assert_eq!(processes::children(worker), [], "zombies");
        let links = processes::descriptors(worker);
        let left = links.iter().filter(|(_, link)| {
            let link = link.to_string_lossy();
            link.contains("memfd") || link.contains("pidfd")
        });
        assert_eq!(left.count(), 0, "{links:?}");
    }
}

#[test]
fn ten_thousand_mails() {
    let daemon = Daemon::start(
        "qmqp_listen('$DIR/true', function(m) return m:exec_raw('/bin/true') end)
         qmqp_listen('$DIR/cat', function(m)
           return m:exec_raw('/bin/sh', '-c', 'exec cat >/dev/null')
         end)",
    );
    let (small, large) = (Mail::of_size(2048).request(), Mail::of_size(1 << 20).request());
    from_16_clients(10_000, |number| {
        let socket = if number % 2 == 0 { "true" } else { "cat" };
        let request = if number % 10 < 8 { &small } else { &large };
        assert_eq!(Client::connect(daemon.path(socket)).send(request).outcome(), "K");
    });
    for worker in daemon.workers() {
        assert_eq!(processes::children(worker), [], "zombies");
    }
}

/// Returns the names of the mails that programs have delivered: one file per mail, named after its
/// sender.
fn delivered(daemon: &Daemon) -> HashSet<String> {
    let entries = fs::read_dir(daemon.path("box")).expect("box");
    entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn killed_workers_never_make_a_program_deliver_a_part() {
    const MAILS: usize = 300;
    let site = Site::new();
    fs::create_dir(site.path("box")).expect("box");
    // Like every program that delivers mail, the script delivers only after it has read its input
    // to the end.
    let script = "cat >$2/tmp.$$ && mv $2/tmp.$$ $2/box/$1";
    site.configure(&configuration("workers=2", "exec_raw", script, ""));
    let daemon = site.start();
    let message = Mail::of_size(200_000);
    let whole = message.relayed().message;
    let answered = AtomicUsize::new(0);
    let told: Vec<std::sync::Mutex<Option<Outcome>>> =
        (0..MAILS).map(|_| Default::default()).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            from_16_clients(MAILS, |number| {
                let sender = format!("{number}@x");
                let outcome = submit(daemon.path("in"), &message.clone().from(&sender));
                *told[number].lock().expect("lock") = Some(outcome);
                answered.fetch_add(1, Ordering::Relaxed);
            });
        });
        for kill in 1..=20 {
            eventually("progress", || {
                (answered.load(Ordering::Relaxed) >= kill * MAILS / 25).then_some(())
            });
            if let Some(&worker) = daemon.workers().get(kill % 2) {
                signal(worker, Signal::SIGKILL);
            }
        }
    });
    let delivered = delivered(&daemon);
    for name in &delivered {
        let got = fs::read(daemon.path("box").join(name)).expect("delivered");
        assert!(got == whole, "{name} has {} of {} bytes", got.len(), whole.len());
    }
    let mut accepted = 0;
    for (number, outcome) in told.iter().enumerate() {
        let outcome = outcome.lock().expect("lock").take().expect("answered");
        assert!(outcome == "K" || outcome == "Ztry again later", "{number}: {outcome}");
        if outcome == "K" {
            accepted += 1;
            assert!(delivered.contains(&format!("{number}@x")), "{number} is lost");
        }
    }
    assert!(accepted > MAILS / 2, "{accepted}");
}

/// Forbids pidfd_open(2), by the error of its first argument, and becomes the rest.
const FILTER: &str = "
import ctypes, os, struct, sys
load, equal, end = 0x20, 0x15, 0x06
PIDFD_OPEN, ERRNO, ALLOW = 434, 0x50000, 0x7fff0000
steps = [(load, 0, 0, 0), (equal, 0, 1, PIDFD_OPEN), (end, 0, 0, ERRNO | int(sys.argv[1])),
         (end, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.c_void_p)]
program = Program(len(steps), ctypes.addressof(code))
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
assert ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) == 0
os.execvp(sys.argv[2], sys.argv[2:])";

/// Container managers that are older than the system call refuse it with EPERM, or with ENOSYS.
#[test]
fn a_filter_of_system_calls_that_forbids_pidfd_open() {
    let script = "case $1 in slow@x) exec sleep 1000;; esac; cat >/dev/null; echo 3:Kok,";
    for errno in [nix::libc::EPERM, nix::libc::ENOSYS] {
        let config = configuration("workers=1", "exec_raw", script, "timeout=1");
        let launch = Site::with(&config).launch();
        let daemon = launch.through(&["python3", "-c", FILTER, &errno.to_string()]).ready();
        let told = submit(daemon.path("in"), &mail());
        assert_eq!(told.status(), 'K', "{told}; {}", daemon.text());
        assert_eq!(submit(daemon.path("in"), &mail().from("slow@x")), "Ztimeout");
    }
}
