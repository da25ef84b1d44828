//! The end of programs that get a mail: by time limits, by clients that leave, by a drain, and with
//! their worker.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::exec::{is_gone, mail, pid_in, shell, submit_and_wait};
use crate::harness::processes::{self, signal};
use crate::harness::{Client, Site, eventually, submit};

#[test]
fn an_actions_timeout_ends_the_whole_group() {
    let script = "sleep 1000 & echo $! >$2/background; echo $$ >$2/pid; wait";
    let daemon = shell("workers=1", "exec_raw", script, "timeout=0.3");
    let start = Instant::now();
    let (mut client, pid) = submit_and_wait(&daemon);
    assert_eq!(client.outcome(), "Ztimeout");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(is_gone(pid) && is_gone(pid_in(&daemon.path("background"))));
}

#[test]
fn the_mails_deadline_ends_the_program_too() {
    let daemon =
        shell("workers=1, relay_timeout=0.3", "exec", "echo $$ >$2/pid; exec sleep 1000", "");
    let (mut client, pid) = submit_and_wait(&daemon);
    assert_eq!(client.outcome(), "Zrelay failed");
    assert!(is_gone(pid));
}

#[test]
fn a_program_that_ignores_sigterm_is_killed_ten_seconds_later() {
    let script = "trap '' TERM; echo $$ >$2/pid; while :; do sleep 0.05; done";
    let daemon = shell("workers=1", "exec_raw", script, "timeout=0.1");
    let start = Instant::now();
    let (mut client, pid) = submit_and_wait(&daemon);
    assert_eq!(client.outcome(), "Ztimeout");
    let took = start.elapsed();
    assert!(took > Duration::from_secs(10) && took < Duration::from_secs(15), "{took:?}");
    assert!(is_gone(pid));
}

/// A program whose leader ends at once on SIGTERM, while another member of its process group takes
/// two seconds to clean up and then leaves the file `clean`. The output goes to /dev/null, because
/// a shell would report dead children to a pipe that is no longer read.
const SLOW_TO_CLEAN_UP: &str = "
    exec >/dev/null 2>&1
    (trap 'sleep 2; echo >$2/clean; exit' TERM; echo >$2/ready; while :; do sleep 0.02; done) &
    trap exit TERM
    until test -e $2/ready; do sleep 0.02; done
    echo $$ >$2/pid
    wait";

#[test]
fn the_whole_group_has_its_time_after_sigterm() {
    let daemon = shell("workers=1", "exec_raw", SLOW_TO_CLEAN_UP, "timeout=0.7");
    let (mut client, pid) = submit_and_wait(&daemon);
    eventually("the leader's end", || is_gone(pid).then_some(()));
    let since = Instant::now();
    assert_eq!(client.outcome(), "Ztimeout");
    assert!(daemon.path("clean").exists(), "answered after {:?}", since.elapsed());
    // The answer doesn't wait longer than the group.
    assert!(since.elapsed() < Duration::from_secs(6), "{:?}", since.elapsed());
    assert_eq!(processes::children(daemon.workers()[0]), [], "zombies");
}

#[test]
fn a_client_that_is_gone_leaves_the_group_its_time() {
    let daemon = shell("workers=1", "exec_raw", SLOW_TO_CLEAN_UP, "");
    let (client, pid) = submit_and_wait(&daemon);
    client.stream.reset();
    daemon.wait_for_log("canceled");
    assert!(daemon.path("clean").exists() && is_gone(pid));
}

#[test]
fn a_dead_workers_programs_have_their_time() {
    let daemon = shell("workers=1", "exec_raw", SLOW_TO_CLEAN_UP, "");
    let (mut client, _) = submit_and_wait(&daemon);
    let workers = daemon.workers();
    signal(workers[0], Signal::SIGKILL);
    // The wait for the programs holds up nothing else: neither the start of the next worker nor the
    // handling of its death.
    daemon.wait_for_workers(1, &workers);
    let next = daemon.workers();
    signal(next[0], Signal::SIGKILL);
    daemon.wait_for_workers(1, &[workers, next].concat());
    assert!(!daemon.path("clean").exists(), "new workers came first");
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(daemon.path("clean").exists());
}

#[test]
fn many_programs_of_a_dead_worker_hold_up_nobody() {
    const MAILS: usize = 150;
    let settings = "workers=1, client_share=1";
    let daemon = shell(settings, "exec_raw", "echo >$2/$1; exec sleep 1000", "");
    let mut clients: Vec<_> = (0..MAILS).map(|_| Client::connect(daemon.path("in"))).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(&mail().from(&format!("{number}@x")).request());
    }
    let runs = |number: usize| daemon.path(&format!("{number}@x")).exists();
    eventually("the programs", || (0..MAILS).all(runs).then_some(()));
    let workers = daemon.workers();
    let since = Instant::now();
    signal(workers[0], Signal::SIGKILL);
    for client in &mut clients {
        assert_eq!(client.outcome(), "Ztry again later");
    }
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    daemon.wait_for_workers(1, &workers);
    eventually("no more zombies", || {
        let children = processes::children(daemon.pid());
        children.iter().all(|child| child.state != 'Z').then_some(())
    });
}

#[test]
fn the_end_of_a_drain_leaves_programs_their_time() {
    let settings = "workers=1, drain_timeout=0.3";
    let mut daemon = shell(settings, "exec_raw", SLOW_TO_CLEAN_UP, "");
    let (mut client, _) = submit_and_wait(&daemon);
    assert!(daemon.reload());
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(daemon.path("clean").exists());
    for file in ["pid", "ready", "clean"] {
        fs::remove_file(daemon.path(file)).expect("remove");
    }
    let (mut client, _) = submit_and_wait(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(daemon.path("clean").exists());
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.assert_nothing_left();
}

/// A program whose leader ends at once on SIGTERM, while another member of its process group
/// ignores the signal.
const NEVER_ENDS: &str = "
    exec >/dev/null 2>&1
    (trap '' TERM; echo >$2/ready; while :; do sleep 0.05; done) & echo $! >$2/other
    trap exit TERM
    until test -e $2/ready; do sleep 0.02; done
    echo $$ >$2/pid
    wait";

#[test]
fn a_group_member_that_ignores_sigterm_is_killed_though_the_leader_obeys() {
    let daemon = shell("workers=1", "exec_raw", NEVER_ENDS, "timeout=0.7");
    let (mut client, pid) = submit_and_wait(&daemon);
    eventually("the leader's end", || is_gone(pid).then_some(()));
    let since = Instant::now();
    assert_eq!(client.outcome(), "Ztimeout");
    let took = since.elapsed();
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(15), "{took:?}");
    assert!(is_gone(pid_in(&daemon.path("other"))));
    assert_eq!(processes::children(daemon.workers()[0]), [], "zombies");
}

/// When a worker dies, the kernel may make the supervisor the parent of its programs before the
/// supervisor can see the death. The leaders of these programs have ended already, while other
/// members of their groups live.
#[test]
fn programs_whose_leader_had_ended_are_ended_when_their_worker_dies() {
    const MAILS: usize = 16;
    let script = "
        exec >/dev/null 2>&1
        (trap '' TERM; echo >$2/$1.ready; while :; do sleep 0.1; done) &
        trap exit TERM
        until test -e $2/$1.ready; do sleep 0.02; done
        echo $$ >$2/$1.pid
        wait";
    let settings = "workers=8, client_share=1";
    let mut daemon = shell(settings, "exec_raw", script, "timeout=2");
    let workers = daemon.wait_for_workers(8, &[]);
    let mut clients: Vec<_> = (0..MAILS).map(|_| Client::connect(daemon.path("in"))).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(&mail().from(&format!("{number}@x")).request());
    }
    let pid = |number: usize| pid_in(&daemon.path(&format!("{number}@x.pid")));
    let leaders: Vec<i32> = (0..MAILS).map(pid).collect();
    eventually("the leaders' end", || leaders.iter().all(|&pid| is_gone(pid)).then_some(()));
    let since = Instant::now();
    workers.iter().for_each(|&worker| signal(worker, Signal::SIGKILL));
    for client in &mut clients {
        assert_eq!(client.outcome_within(Duration::from_secs(20)), "Ztry again later");
    }
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    daemon.stop();
}

#[test]
fn a_second_sigterm_leaves_no_time() {
    let mut daemon = shell("workers=1, drain_timeout=0.3", "exec_raw", NEVER_ENDS, "");
    let (mut client, pid) = submit_and_wait(&daemon);
    let other = pid_in(&daemon.path("other"));
    daemon.signal(Signal::SIGTERM);
    eventually("the leader's end", || is_gone(pid).then_some(()));
    daemon.signal(Signal::SIGTERM);
    let since = Instant::now();
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert!(is_gone(other));
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn a_background_process_holds_up_nobody() {
    let script = "sleep 1000 & echo $! >$2/pid; echo queued";
    let mut daemon = shell("workers=1", "exec_raw", script, "");
    let start = Instant::now();
    assert_eq!(submit(daemon.path("in"), &mail()), "Kqueued");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let pid = pid_in(&daemon.path("pid"));
    let workers = daemon.workers();
    signal(workers[0], Signal::SIGKILL);
    daemon.wait_for_workers(1, &workers);
    assert!(!is_gone(pid), "the daemon must not kill a background process");
    daemon.stop();
    assert!(!is_gone(pid), "the daemon must not kill a background process");
    signal(pid, Signal::SIGKILL);
}

#[test]
fn a_client_that_is_gone_ends_the_program() {
    for over_tcp in [false, true] {
        let site = Site::new();
        let port = crate::harness::Target::free_port();
        site.configure(&format!(
            "settings{{workers=1}}
             local function handler(m)
               return m:exec_raw('/bin/sh', '-c', 'echo $$ >$DIR/pid; exec sleep 1000')
             end
             qmqp_listen('$DIR/in', handler)
             qmqp_listen('{port}', handler)"
        ));
        let daemon = site.start();
        let mut client = match over_tcp {
            true => Client::connect(port),
            false => Client::connect(daemon.path("in")),
        };
        client.send(&mail().request());
        let pid = pid_in(&daemon.path("pid"));
        client.stream.reset();
        eventually("the program's end", || is_gone(pid).then_some(()));
        daemon.wait_for_log("canceled");
    }
}

#[test]
fn a_half_closed_client_does_not_end_the_program() {
    let daemon = shell("workers=1", "exec_raw", "sleep 0.3; echo done", "");
    let mut client = Client::connect(daemon.path("in"));
    client.send(&mail().request()).half_close();
    assert_eq!(client.outcome(), "Kdone");
}

#[test]
fn a_killed_worker_takes_its_programs_along() {
    let script = "sleep 1000 & echo $! >$2/background; echo $$ >$2/pid; wait";
    let daemon = shell("workers=1", "exec_raw", script, "");
    let (mut client, pid) = submit_and_wait(&daemon);
    signal(daemon.workers()[0], Signal::SIGKILL);
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(is_gone(pid) && is_gone(pid_in(&daemon.path("background"))));
}

#[test]
fn nobody_is_answered_while_a_dead_workers_program_runs() {
    // The program takes half a second to obey SIGTERM, and then leaves the file `obeyed`. The
    // output goes to /dev/null, because a shell would report dead children.
    let script = "exec >/dev/null 2>&1; trap 'sleep 0.5; echo >$2/obeyed; exit' TERM; \
                  echo $$ >$2/pid; while :; do sleep 0.02; done";
    let daemon = shell("workers=1", "exec_raw", script, "");
    let (mut client, pid) = submit_and_wait(&daemon);
    signal(daemon.workers()[0], Signal::SIGKILL);
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(daemon.path("obeyed").exists() && is_gone(pid));
}

#[test]
fn the_end_of_a_drain_ends_programs() {
    let script = "echo $$ >$2/pid; exec sleep 1000";
    let mut daemon = shell("workers=1, drain_timeout=0.3", "exec_raw", script, "");
    let (mut client, pid) = submit_and_wait(&daemon);
    assert!(daemon.reload());
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(is_gone(pid));
    fs::remove_file(daemon.path("pid")).expect("remove");
    let (mut client, pid) = submit_and_wait(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.outcome(), "Ztry again later");
    assert!(is_gone(pid));
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.assert_nothing_left();
}

#[test]
fn a_drain_waits_for_an_explicit_timeout() {
    let script = "echo $$ >$2/pid; sleep 1; echo done";
    let daemon = shell("workers=1, drain_timeout=0.2", "exec_raw", script, "timeout=30");
    let (mut client, _) = submit_and_wait(&daemon);
    assert!(daemon.reload());
    assert_eq!(client.outcome(), "Kdone");
}

#[test]
fn without_a_supervisor_programs_end_with_their_worker() {
    let script = "echo $$ >$2/pid; exec sleep 1000";
    let mut daemon = shell("workers=1, drain_timeout=0.3", "exec_raw", script, "");
    let (mut client, pid) = submit_and_wait(&daemon);
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    let told = client.outcome();
    assert!(told == "<silence>" || told == "<reset>", "{told}");
    eventually("the program's end", || is_gone(pid).then_some(()));
}
