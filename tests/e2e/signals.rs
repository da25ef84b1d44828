//! Signals that anybody may send: to the supervisor, a zygote, a worker.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::harness::{Client, Daemon, Mail, eventually, submit};

const CONFIG: &str = "
    settings{workers=2}
    qmqp_listen('$DIR/in', function(m)
      if m.sender == 'no@example.com' then return m:reject('no') end
      if m.sender == 'later@example.com' then return m:defer('later') end
      return m:discard()
    end)";

/// Sends a process every signal that by default ends a process, although nobody wants that:
/// SIGUSR1, SIGUSR2, SIGALRM, SIGSTKFLT, SIGXCPU, SIGXFSZ, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, and
/// all real-time signals, also those that the C library keeps for itself.
fn send_all(pid: i32) {
    let code = "import os, sys
for s in [10, 12, 14, 16, 24, 25, 26, 27, 29, 30, *range(32, 65)]: os.kill(int(sys.argv[1]), s)";
    let mut python = Command::new("python3");
    assert!(python.args(["-c", code, &pid.to_string()]).status().expect("python").success());
}

/// Returns whether a process lives and has no signal to act on.
fn is_settled(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line("ShdPnd:").trim() == "0000000000000000" && !line("State:").contains('Z')
}

#[test]
fn stray_signals_end_nothing() {
    let mut daemon = Daemon::start(CONFIG);
    let workers = daemon.wait_for_workers(2, &[]);
    let zygotes = eventually("a standby", || Some(daemon.zygotes()).filter(|all| all.len() == 2));
    for &pid in [daemon.pid()].iter().chain(&zygotes).chain(&workers) {
        send_all(pid);
        eventually("a process without signals to act on", || is_settled(pid).then_some(()));
    }
    // Every process still works.
    for _ in 0..4 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    }
    assert_eq!((daemon.workers(), daemon.zygotes()), (workers.clone(), zygotes));
    daemon.wait_for_log("status of a worker");
    crate::harness::processes::signal(workers[0], Signal::SIGKILL);
    daemon.wait_for_workers(2, &workers[..1]);
    assert!(daemon.reload());
    daemon.stop();
}

#[test]
fn a_status_on_demand() {
    let mut daemon = Daemon::start(CONFIG);
    let workers = daemon.wait_for_workers(2, &[]);
    for (sender, times, answer) in
        [("a@example.com", 3, 'K'), ("later@example.com", 2, 'Z'), ("no@example.com", 1, 'D')]
    {
        for _ in 0..times {
            assert_eq!(submit(daemon.path("in"), &Mail::new("x").from(sender)).status(), answer);
        }
    }
    let _silent = Client::connect(daemon.path("in"));
    let counts = " generations=1 held=1 in_flight=0 K=3 Z=2 D=1 unanswered=0";
    // A worker reports a mail after it has answered the client.
    eventually("a status with the silent client and all mails", || {
        let before = daemon.count_log("status of a worker");
        daemon.signal(Signal::SIGUSR1);
        eventually("a line per worker", || {
            (daemon.count_log("status of a worker") >= before + 2).then_some(())
        });
        let text = daemon.text();
        let status = text.lines().rfind(|line| line.contains(": status state=serving "));
        status.is_some_and(|line| line.ends_with(counts)).then_some(())
    });
    let text = daemon.text();
    let mut mails = 0;
    for pid in workers {
        let about = format!(" pid={pid} generation=1 state=ready in_flight=0 mails=");
        let line = text.lines().rfind(|line| line.contains(&about)).expect(&about);
        mails += line.rsplit('=').next().and_then(|n| n.parse::<u32>().ok()).expect("a number");
    }
    assert_eq!(mails, 6, "{text}");
    daemon.stop();
}
