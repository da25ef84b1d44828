//! Workers that die before they are ready. Five such deaths end a start or a reload.
//!
//! A worker needs memory for its first thread, and a zygote doesn't. With an address space that is
//! just large enough for a zygote, every worker fails to start.

use std::process::Command;

use crate::harness::processes::memory;
use crate::harness::{Daemon, Mail, Site, eventually, submit};

const SCRIPT: &str = "
    settings{workers=1}
    qmqp_listen('$DIR/in', function(m) return m:discard() end)";

/// Returns a number of bytes of address space that is enough for a zygote but not for a worker.
fn too_little(daemon: &Daemon) -> String {
    let peaks = daemon.zygotes().into_iter().map(|pid| memory(pid, "status", "VmPeak"));
    // A worker's first thread needs a stack of 4 MiB.
    (peaks.max().expect("a zygote") + (1 << 20)).to_string()
}

/// Returns the number of lines of the log that contain `part`.
fn count(log: &str, part: &str) -> usize {
    log.lines().filter(|line| line.contains(part)).count()
}

#[test]
fn five_deaths_before_the_first_worker_is_ready_end_the_start() {
    let mut usual = Daemon::start(SCRIPT);
    let limit = format!("--as={}", too_little(&usual));
    usual.stop();

    let mut daemon = Site::with(SCRIPT).launch().through(&["prlimit", &limit]).spawn();
    let status = daemon.wait_exit();
    let log = daemon.complete_text();
    assert_eq!(status.code(), Some(71), "{log}");
    assert_eq!(count(&log, "worker can't start"), 5, "{log}");
    assert_eq!(count(&log, "worker died: exit status 71"), 5, "{log}");
    let last = log.lines().last().unwrap_or_default();
    assert!(last.contains("cannot start: its workers died before they were ready"), "{log}");
    assert_eq!(count(&log, "cannot start"), 1, "{log}");
    assert!(!daemon.notify().all().iter().any(|line| line == "READY=1"));
    daemon.assert_nothing_left();
}

#[test]
fn five_deaths_end_a_reload_and_the_old_workers_serve_on() {
    let mut daemon = Daemon::start(SCRIPT);
    let (workers, zygotes) = (daemon.workers(), daemon.zygotes());
    let pid = daemon.pid().to_string();
    let limit = |bytes: &str| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &pid, &format!("--as={bytes}:unlimited")]);
        assert!(prlimit.status().expect("prlimit").success());
    };
    limit(&too_little(&daemon));
    let status = daemon.reload_status();
    assert!(status.contains("reload failed: its workers died before they were ready"), "{status}");
    daemon.wait_for_log("reload failed");
    assert_eq!(daemon.count_log("worker died: exit status 71"), 5, "{}", daemon.text());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    // The zygote that was given up may take a moment to end.
    eventually("the processes as before", || {
        let now = (daemon.workers(), daemon.zygotes());
        (now.0 == workers && now.1 == zygotes).then_some(())
    });

    limit("unlimited");
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.wait_for_workers(1, &workers);
    daemon.stop();
}
