//! The end of a daemon. Mails under way are finished, no new clients are let in, and nothing is
//! left behind.

use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::harness::daemon::is_socket;
use crate::harness::{
    Client, Daemon, Gate, Mail, Sink, Site, Target, eventually, processes, submit,
};

fn relay(settings: &str) -> Daemon {
    Daemon::start(&format!(
        "settings{{workers=2, {settings}}}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)"
    ))
}

/// Starts a next hop that waits, and a client whose mail waits in the next hop.
fn in_flight(daemon: &Daemon) -> (Client, Sink, std::sync::Arc<Gate>) {
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut client = Client::connect(daemon.path("in"));
    client.send(&Mail::new("in flight").request());
    sink.record().wait_for_count(1);
    (client, sink, gate)
}

#[track_caller]
fn wait_for_stopping(daemon: &Daemon) {
    daemon.notify().after(0, "STOPPING=1", |line| line == "STOPPING=1");
    eventually("the socket is unlinked", || (!is_socket(&daemon.path("in"))).then_some(()));
}

#[test]
fn an_idle_daemon_ends_at_once() {
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = relay("");
        let started = Instant::now();
        daemon.signal(end);
        assert_eq!(daemon.wait_exit().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        daemon.assert_nothing_left();
    }
}

#[test]
fn mails_under_way_are_finished() {
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = relay("");
        let (mut client, _sink, gate) = in_flight(&daemon);
        daemon.signal(end);
        wait_for_stopping(&daemon);
        assert!(!Target::from(daemon.path("in")).is_alive());
        assert!(daemon.exited().is_none(), "a mail is on its way");
        gate.open();
        assert_eq!(client.outcome(), "Kok");
        assert_eq!(daemon.wait_exit().code(), Some(0));
        daemon.assert_nothing_left();
    }
}

#[test]
fn a_request_that_has_begun_is_finished() {
    let mut daemon = relay("");
    let sink = Sink::answering(daemon.path("out"), "Kok");
    let mail = Mail::new("half");
    let request = mail.request();
    let mut client = Client::connect(daemon.path("in"));
    client.send(&request[..10]);
    daemon.signal(Signal::SIGTERM);
    wait_for_stopping(&daemon);
    client.send(&request[10..]);
    assert_eq!(client.outcome(), "Kok");
    assert_eq!(sink.only(), mail.relayed());
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

/// A reload has asked for workers that its zygote hasn't forked, and a backlog waits that can't be
/// accepted yet. To give the reload up must not end the workers that serve before the backlog is
/// accepted.
#[test]
fn a_backlog_is_served_although_a_reload_is_given_up() {
    let mut daemon = Daemon::start(
        "settings{workers=2, drain_timeout=60}
         local gate = io.open('$DIR/gate')
         if gate then gate:read('a') end
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let zygote = freeze_before_it_forks(&daemon);
    set_descriptor_limit(&daemon, 8);
    let mail = Mail::new("in the backlog").request();
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&mail);
    }
    let started = Instant::now();
    daemon.signal(Signal::SIGTERM);
    eventually("the socket is unlinked", || (!is_socket(&daemon.path("in"))).then_some(()));
    eventually("the reload is given up", || {
        processes::look(zygote).is_none_or(|process| process.state == 'Z').then_some(())
    });
    set_descriptor_limit(&daemon, 1024);
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kdiscarded");
    }
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

/// Reloads the configuration, whose script waits at a gate, and stops the new zygote when it has
/// declared itself and been asked for a standby and two workers.
fn freeze_before_it_forks(daemon: &Daemon) -> i32 {
    let gate = daemon.path("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().expect("mkfifo").success());
    let old = eventually("zygote and standby", || Some(daemon.zygotes()).filter(|z| z.len() == 2));
    daemon.signal(Signal::SIGHUP);
    let zygote =
        eventually("a new zygote", || daemon.zygotes().into_iter().find(|pid| !old.contains(pid)));
    // It waits at the gate, so the supervisor has nothing more to do for it.
    let writer = std::fs::OpenOptions::new().write(true).open(&gate).expect("the script reads");
    processes::stop(daemon.pid());
    drop(writer);
    let receiving = format!("{} ", nix::libc::SYS_recvmsg);
    eventually("the zygote waits for orders", || {
        let call = std::fs::read_to_string(format!("/proc/{zygote}/syscall")).ok()?;
        call.starts_with(&receiving).then_some(())
    });
    processes::stop(zygote);
    std::fs::remove_file(&gate).expect("the gate");
    let before = processes::descriptors(daemon.pid()).len();
    processes::signal(daemon.pid(), Signal::SIGCONT);
    // A standby has one channel, and each worker two.
    eventually("the zygote has its orders", || {
        (processes::descriptors(daemon.pid()).len() >= before + 5).then_some(())
    });
    zygote
}

/// Sets how many descriptors the supervisor may have.
fn set_descriptor_limit(daemon: &Daemon, limit: u32) {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &daemon.pid().to_string(), &format!("--nofile={limit}:")]);
    assert!(prlimit.status().expect("prlimit").success());
}

#[test]
fn a_signal_to_the_whole_group_does_not_spoil_the_drain() {
    for end in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let mut daemon = relay("");
        let (mut client, _sink, gate) = in_flight(&daemon);
        if end == Signal::SIGQUIT {
            // The supervisor doesn't handle SIGQUIT, so only its children get the signal.
            let others = daemon.workers().into_iter().chain(daemon.zygotes());
            others.for_each(|pid| processes::signal(pid, end));
            daemon.signal(Signal::SIGTERM);
        } else {
            killpg(Pid::from_raw(daemon.pid()), end).expect("its process group");
        }
        wait_for_stopping(&daemon);
        gate.open();
        assert_eq!(client.outcome(), "Kok", "{end}");
        assert_eq!(daemon.wait_exit().code(), Some(0));
    }
}

#[test]
fn a_second_signal_ends_the_daemon_at_once() {
    let mut daemon = relay("");
    let (mut client, _sink, _gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    wait_for_stopping(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.outcome(), "Ztry again later");
    daemon.wait_exit();
    daemon.assert_nothing_left();
}

#[test]
fn the_drain_time_is_the_limit() {
    let mut daemon = relay("drain_timeout=0.5");
    let (mut client, _sink, _gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.outcome(), "Ztry again later");
    daemon.wait_exit();
    daemon.assert_nothing_left();
}

#[test]
fn service_managers_are_asked_for_time() {
    let mut daemon = relay("");
    let (mut client, _sink, gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    daemon.notify().after(0, "EXTEND_TIMEOUT_USEC", |l| l.starts_with("EXTEND_TIMEOUT_USEC="));
    gate.open();
    assert_eq!(client.outcome(), "Kok");
    daemon.wait_exit();
}

#[test]
fn silent_clients_hold_up_nothing() {
    let mut daemon = relay("client_timeout=1");
    let mut silent: Vec<_> = (0..20).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in silent.iter_mut().take(10) {
        client.send(b"5");
    }
    daemon.signal(Signal::SIGTERM);
    let ended = daemon.exit_within(Duration::from_secs(10));
    assert_eq!(ended.expect("ended").code(), Some(0));
    daemon.assert_nothing_left();
}

#[test]
fn connections_in_the_backlog_are_served() {
    // The clients connect before the stop, and are accepted after it.
    let mut daemon = relay("");
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    processes::stop(daemon.pid());
    let mut clients: Vec<_> = (0..50).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("early bird").request());
    }
    daemon.signal(Signal::SIGTERM);
    daemon.signal(Signal::SIGCONT);
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kok");
    }
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn a_socket_of_somebody_else_is_left_alone() {
    let mut daemon = relay("");
    std::fs::remove_file(daemon.path("in")).expect("socket");
    let _other = UnixListener::bind(daemon.path("in")).expect("bind");
    let inode = daemon.path("in").metadata().expect("socket").ino();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert_eq!(daemon.path("in").metadata().expect("still there").ino(), inode);
}

#[test]
fn a_stop_while_the_script_loads() {
    let script = "local f = io.open('$DIR/loading', 'w') f:close() while true do end";
    let mut daemon = Site::with(script).launch().spawn();
    eventually("the script runs", || daemon.path("loading").exists().then_some(()));
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    daemon.assert_nothing_left();
}

#[test]
fn hangups_are_ignored_while_stopping() {
    let mut daemon = relay("");
    let (mut client, _sink, gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    wait_for_stopping(&daemon);
    daemon.signal(Signal::SIGHUP);
    gate.open();
    assert_eq!(client.outcome(), "Kok");
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(!daemon.notify().all().iter().any(|line| line == "RELOADING=1"));
}

#[test]
fn a_stop_during_a_reload() {
    let mut daemon = relay("");
    daemon.site().configure("local f = io.open('$DIR/loading', 'w') f:close() while true do end");
    daemon.signal(Signal::SIGHUP);
    eventually("the script runs", || daemon.path("loading").exists().then_some(()));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.assert_nothing_left();
}

#[test]
fn as_the_first_process_of_a_container() {
    let site = Site::with(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:discard(tostring(m.pid)) end)",
    );
    let wrapper = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut daemon = site.launch().through(&wrapper).ready();
    // This process has no pid in the daemon's pid namespace.
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Knil");
    let inside = processes::children_named(daemon.pid(), "qrelay");
    assert_eq!(inside.len(), 1);
    processes::signal(inside[0], Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0), "{}", daemon.text());
    daemon.assert_nothing_left();
}

#[test]
fn restart_on_the_same_path() {
    let mut first = relay("");
    let sink = Sink::answering(first.path("out"), "Kok");
    let path = first.path("in").display().to_string();
    let out = first.path("out").display().to_string();
    first.stop();
    let second =
        Daemon::start(&format!("qmqp_listen('{path}', function(m) return m:connect('{out}') end)"));
    assert_eq!(submit(first.path("in"), &Mail::new("x")), "Kok");
    assert_eq!(sink.mails().len(), 1);
    drop(second);
}

#[test]
fn a_killed_supervisor_leaves_no_orphans() {
    let mut daemon = relay("");
    let (mut client, _sink, gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    // The worker finishes its mail without a supervisor.
    gate.open();
    assert_eq!(client.outcome(), "Kok");
    eventually("the orphans' end", || daemon.processes().is_empty().then_some(()));
}

#[test]
fn orphans_do_not_wait_for_ever() {
    let mut daemon = relay("drain_timeout=0.5");
    let (mut client, _sink, _gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    eventually("the orphans' end", || daemon.processes().is_empty().then_some(()));
    assert_ne!(client.outcome().status(), 'K');
}

#[test]
fn a_socket_left_by_a_killed_daemon_is_replaced() {
    let mut first = relay("");
    first.signal(Signal::SIGKILL);
    first.wait_exit();
    eventually("the orphans' end", || first.processes().is_empty().then_some(()));
    assert!(is_socket(&first.path("in")), "SIGKILL leaves the file");
    let path = first.path("in").display().to_string();
    let _second =
        Daemon::start(&format!("qmqp_listen('{path}', function(m) return m:discard() end)"));
    assert_eq!(submit(first.path("in"), &Mail::new("x")), "Kdiscarded");
}

#[test]
fn an_actions_own_timeout_outlasts_the_drain() {
    let mut daemon = Daemon::start(
        "settings{workers=1, drain_timeout=0.2}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out', {timeout=20}) end)",
    );
    let (mut client, _sink, gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    wait_for_stopping(&daemon);
    assert!(daemon.exit_within(Duration::from_secs(1)).is_none(), "the mail may take 20 s");
    gate.open();
    assert_eq!(client.outcome(), "Kok");
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn silent_clients_do_not_hold_up_a_second_signal() {
    let mut daemon = relay("client_timeout=50");
    let mut silent = Client::connect(daemon.path("in"));
    let (mut client, _sink, _gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    wait_for_stopping(&daemon);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(silent.outcome(), "Ztry again later");
    assert_eq!(client.outcome(), "Ztry again later");
    drop((silent, client));
    let status = daemon.exit_within(Duration::from_secs(10)).expect("the daemon ends");
    assert_eq!(status.code(), Some(0));
    assert_eq!(daemon.count_log("worker died"), 0, "no worker was replaced and killed again");
    daemon.assert_nothing_left();
}

#[test]
fn a_port_is_given_up_at_once() {
    let port = Target::free_port();
    let mut daemon = Daemon::start(&format!(
        "qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)
         qmqp_listen('{port}', function(m) return m:discard() end)"
    ));
    assert!(TcpStream::connect(port).is_ok());
    let (mut client, _sink, gate) = in_flight(&daemon);
    daemon.signal(Signal::SIGTERM);
    wait_for_stopping(&daemon);
    eventually("connections to the port are refused", || {
        TcpStream::connect(port).is_err().then_some(())
    });
    gate.open();
    assert_eq!(client.outcome(), "Kok");
    assert_eq!(daemon.wait_exit().code(), Some(0));
}
