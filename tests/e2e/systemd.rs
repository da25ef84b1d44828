//! The daemon under systemd: passed sockets, notifications and the watchdog, with a notification
//! socket of the test, and with the real `systemd-socket-activate`.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::daemon::{Launch, command, is_socket};
use crate::harness::processes::TAG;
use crate::harness::{Client, Daemon, Mail, PATIENCE, Sink, Site, Target, eventually, submit};

/// Passes up to two sockets to the daemon as systemd would, named `names` (separated by colons).
///
/// A shell moves the sockets from stdin and stdout to descriptors 3 and 4, and sets LISTEN_PID.
/// Neither is possible before the process exists, because the shell's pid becomes the daemon's.
fn activate(launch: Launch, names: &str, sockets: Vec<OwnedFd>) -> Launch {
    let count = sockets.len();
    let script = "exec 3<&0 4<&1 0</dev/null 1>&2
        test $LISTEN_FDS = 2 || exec 4<&-
        LISTEN_PID=$$ exec \"$@\"";
    let mut launch = launch
        .through(&["sh", "-c", script, "sh"])
        .env("LISTEN_FDS", &count.to_string())
        .env("LISTEN_FDNAMES", names);
    let mut sockets = sockets.into_iter();
    let command = launch.command();
    command.stdin(sockets.next().map_or(Stdio::null(), Stdio::from));
    command.stdout(sockets.next().map_or(Stdio::null(), Stdio::from));
    launch
}

fn listening(path: &Path) -> OwnedFd {
    UnixListener::bind(path).expect("bind").into()
}

#[test]
fn one_passed_socket() {
    let site = Site::with("qmqp_listen(systemd, function(m) return m:discard(m.listener) end)");
    let socket = listening(&site.path("passed"));
    let inode = site.path("passed").metadata().expect("socket").ino();
    let mut daemon = activate(site.launch(), "", vec![socket]).ready();
    assert_eq!(submit(daemon.path("passed"), &Mail::new("x")).status(), 'K');
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    let found = daemon.path("passed").metadata().expect("the socket belongs to systemd");
    assert_eq!(found.ino(), inode);
}

#[test]
fn sockets_by_name() {
    let site = Site::with(
        "qmqp_listen(systemd['special'], function(m) return m:discard('special') end)
         qmqp_listen(systemd, function(m) return m:discard('the rest') end)
         qmqp_listen('$DIR/own', function(m) return m:discard('own') end)",
    );
    let sockets = vec![listening(&site.path("a")), listening(&site.path("b"))];
    let daemon = activate(site.launch(), "plain:special", sockets).ready();
    for (name, told) in [("a", "Kthe rest"), ("b", "Kspecial"), ("own", "Kown")] {
        assert_eq!(submit(daemon.path(name), &Mail::new("x")), told, "{name}");
    }
}

#[test]
fn a_passed_tcp_socket_serves_everybody() {
    let site = Site::with("qmqp_listen(systemd, function(m) return m:discard(m.peer) end)");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    let _daemon = activate(site.launch(), "", vec![listener.into()]).ready();
    assert_eq!(submit(address, &Mail::new("x")).status(), 'K');
}

#[test]
fn an_unknown_name_is_an_error() {
    let site = Site::with("qmqp_listen(systemd['other'], function(m) return m:discard() end)");
    let socket = listening(&site.path("a"));
    let mut daemon = activate(site.launch(), "name", vec![socket]).spawn();
    assert_eq!(daemon.wait_exit().code(), Some(78));
    assert!(daemon.complete_text().contains("other"), "{}", daemon.text());
}

#[test]
fn no_socket_passed_is_a_warning() {
    let daemon = Daemon::start(
        "qmqp_listen(systemd, function(m) return m:discard() end)
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    daemon.wait_for_log("systemd");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
}

#[test]
fn only_sockets_of_systemd_and_none_passed_is_an_error() {
    let alone = "qmqp_listen(systemd, function(m) return m:discard() end)";
    let mut daemon = Site::with(alone).launch().spawn();
    assert_eq!(daemon.wait_exit().code(), Some(71));
    let text = daemon.complete_text();
    assert_eq!(daemon.count_log("cannot start"), 1, "{text}");
    let line = daemon.wait_for_log("cannot start");
    assert!(line.contains("systemd has passed no socket: start cm4all-qrelay.socket"), "{line}");
    daemon.assert_nothing_left();

    let mut daemon = plain().start();
    daemon.site().configure(alone);
    let status = daemon.reload_status();
    assert!(status.contains("start cm4all-qrelay.socket"), "{status}");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    daemon.stop();
}

#[test]
fn passed_sockets_survive_reloads() {
    let script = |name: &str| {
        format!("qmqp_listen(systemd['{name}'], function(m) return m:discard('{name}') end)")
    };
    let site = Site::with(&script("one"));
    let sockets = vec![listening(&site.path("a")), listening(&site.path("b"))];
    let daemon = activate(site.launch(), "one:two", sockets).ready();
    assert_eq!(submit(daemon.path("a"), &Mail::new("x")), "Kone");
    // No listener uses the first socket now: it stays open, and its clients wait.
    daemon.site().configure(&script("two"));
    assert!(daemon.reload());
    assert_eq!(submit(daemon.path("b"), &Mail::new("x")), "Ktwo");
    let mut waiting = Client::connect(daemon.path("a"));
    waiting.send(&Mail::new("x").request());
    daemon.site().configure(&script("one"));
    assert!(daemon.reload());
    assert_eq!(waiting.outcome(), "Kone");
}

#[test]
fn systemd_socket_activate() {
    let site =
        Site::with("qmqp_listen(systemd['mail'], function(m) return m:connect('$DIR/out') end)");
    let sink = Sink::answering(site.path("out"), "Kok");
    let at = site.path("activated");
    let wrapper = ["systemd-socket-activate", "-l", at.to_str().expect("UTF-8"), "--fdname=mail"];
    let variables = ["-E", "NOTIFY_SOCKET", "-E", TAG];
    let mut daemon = site.launch().through(&[&wrapper[..], &variables].concat()).spawn();
    // systemd-socket-activate starts the daemon for the first connection, so the test must not
    // connect before systemd-socket-activate listens.
    eventually("the socket", || is_listening(&at).then_some(()));
    let mail = Mail::new("wake up");
    assert_eq!(submit(at.clone(), &mail), "Kok");
    assert_eq!(sink.only(), mail.relayed());
    daemon.wait_ready();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

/// Returns whether a process listens at a path. The table of the kernel is read, because an attempt
/// to connect would start the daemon.
fn is_listening(path: &Path) -> bool {
    // The columns are Num RefCount Protocol Flags Type St Inode Path; the flag of a listener is
    // __SO_ACCEPTCON.
    let table = fs::read_to_string("/proc/net/unix").expect("table of local sockets");
    table.lines().map(str::split_whitespace).any(|mut line| {
        line.nth(3) == Some("00010000") && line.nth(3).is_some_and(|at| Path::new(at) == path)
    })
}

fn plain() -> Site {
    Site::with("settings{workers=1} qmqp_listen('$DIR/in', function(m) return m:discard() end)")
}

#[test]
fn notifications_from_start_to_stop() {
    let mut daemon = plain().start();
    daemon.notify().after(0, "a status", |line| line.starts_with("STATUS="));
    assert!(daemon.reload());
    daemon
        .notify()
        .after(0, "the time, as Type=notify-reload needs it", |l| l.starts_with("MONOTONIC_USEC="));
    daemon.stop();
    let lines = daemon.notify().all();
    let states: Vec<_> = lines
        .iter()
        .map(String::as_str)
        .filter(|line| matches!(*line, "READY=1" | "RELOADING=1" | "STOPPING=1"))
        .collect();
    assert_eq!(states, ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]);
    assert!(lines.iter().all(|line| line != "WATCHDOG=1"), "nobody asked for a watchdog");
}

#[test]
fn the_watchdog_is_fed_by_the_loop() {
    let interval = Duration::from_millis(500);
    let usec = interval.as_micros().to_string();
    let daemon = plain().launch().env("WATCHDOG_USEC", &usec).ready();
    let fed = |count: usize, after: usize| {
        daemon.notify().record().wait_for(PATIENCE, |notices| {
            let fed = notices[after..].iter().filter(|n| n.text == "WATCHDOG=1");
            let times: Vec<_> = fed.map(|notice| notice.at).collect();
            (times.len() >= count).then_some(times)
        })
    };
    let times = fed(6, 0).expect("fed");
    let mut gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort();
    // The median counts, because a busy machine may be late once.
    assert!(gaps[gaps.len() / 2] < interval, "{gaps:?}");
    // A stopped supervisor doesn't feed the watchdog, and neither does any other process.
    crate::harness::processes::stop(daemon.pid());
    let mark = daemon.notify().mark();
    let fed_while_stopped =
        daemon.notify().try_after(mark, 3 * interval, |line| line == "WATCHDOG=1");
    assert!(fed_while_stopped.is_none());
    daemon.signal(Signal::SIGCONT);
    assert!(fed(2, mark).is_some());
}

#[test]
fn the_environment_of_the_service_manager_stays_in_the_supervisor() {
    let site = Site::with("qmqp_listen(systemd, function(m) return m:discard() end)");
    let socket = listening(&site.path("a"));
    let launch = site.launch().env("WATCHDOG_USEC", "30000000");
    let daemon = activate(launch, "name", vec![socket]).ready();
    for pid in daemon.zygotes().into_iter().chain(daemon.workers()) {
        let environment = fs::read(format!("/proc/{pid}/environ")).expect("there");
        let environment = String::from_utf8_lossy(&environment);
        for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            let found = environment.split('\0').find(|entry| entry.starts_with(name));
            assert_eq!(found, None, "of {pid}");
        }
    }
}

#[test]
fn a_failed_reload_shows_in_the_status() {
    let daemon = plain().start();
    daemon.site().configure("error('my own words')");
    let mark = daemon.notify().mark();
    daemon.reload();
    let found = daemon.notify().after(mark, "the reason", |line| line.contains("my own words"));
    assert!(found.text.starts_with("STATUS="));
    // Every line of a notification is an assignment, whatever the text of the script's error is.
    let known = ["STATUS=", "READY=", "RELOADING=", "MONOTONIC_USEC="];
    let lines = daemon.notify().all();
    assert!(lines.iter().all(|line| known.iter().any(|key| line.starts_with(key))), "{lines:?}");
}

/// Receives a datagram of the daemon.
#[track_caller]
fn receive(socket: &UnixDatagram) -> String {
    let mut datagram = vec![0; 1 << 20];
    let length = socket.recv(&mut datagram).expect("a datagram");
    assert!(length <= 4096, "systemd takes no datagram of {length} bytes");
    String::from_utf8(datagram[..length].to_vec()).expect("UTF-8")
}

#[test]
fn no_text_spoils_a_notification() {
    let site = plain();
    let at = site.path("out.notify");
    let socket = UnixDatagram::bind(&at).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let variable = format!("NOTIFY_SOCKET={}", at.display());
    let mut daemon = site.launch().through(&["env", &variable]).spawn();
    assert_eq!(
        receive(&socket),
        "STATUS=Generation 1 serves with 1 workers: 0.0 mails/s, 0 in flight"
    );
    assert_eq!(receive(&socket), "READY=1");
    for text in [
        "'no such table\\nSTOPPING=1\\r\\nWATCHDOG=trigger\\0'",
        "('x'):rep(5000)",
        "('\u{e9}'):rep(5000)",
        "('x'):rep(200000)",
    ] {
        daemon.site().configure(&format!("error({text})"));
        daemon.signal(Signal::SIGHUP);
        let reloading = receive(&socket);
        let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").map(str::parse::<u64>);
        assert!(matches!(time, Some(Ok(_))), "{reloading}");
        let status = receive(&socket);
        let serves = "STATUS=Generation 1 serves with 1 workers: 0.0 mails/s, 0 in flight";
        let told = status.strip_prefix(serves).and_then(|s| s.strip_prefix("; reload failed: "));
        assert!(told.is_some_and(|told| told.contains("config.lua:1:")), "{status}");
        assert!(!status.contains(char::is_control), "{status}");
        assert!(status.len() <= "STATUS=".len() + 1024, "{}", status.len());
        assert_eq!(receive(&socket), "READY=1");
    }
    daemon.stop();
}

#[test]
fn a_watchdog_that_makes_no_sense() {
    for odd in ["0", "-1", "5s", "", "18446744073709551615", "99999999999999999999"] {
        let mut daemon = plain().launch().env("WATCHDOG_USEC", odd).ready();
        let line = daemon.wait_for_log("no watchdog is fed");
        assert!(line.contains(" WATCHDOG_USEC="), "{line}");
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
        daemon.stop();
        assert!(!daemon.notify().all().contains(&"WATCHDOG=1".to_owned()), "{odd}");
    }
}

#[test]
fn a_watchdog_with_a_short_or_a_long_interval_is_fed() {
    for usec in ["1", "999", "18446744073709551614"] {
        let mut daemon = plain().launch().env("WATCHDOG_USEC", usec).ready();
        daemon.notify().after(0, "food for the watchdog", |line| line == "WATCHDOG=1");
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
        daemon.stop();
    }
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let variables = ["env", "WATCHDOG_USEC=20000", "WATCHDOG_PID=1"];
    let mut daemon = plain().launch().through(&variables).ready();
    assert!(daemon.reload());
    daemon.stop();
    assert!(!daemon.notify().all().contains(&"WATCHDOG=1".to_owned()));
    assert_eq!(daemon.count_log("watchdog"), 0, "{}", daemon.text());
}

#[test]
fn a_number_of_sockets_that_makes_no_sense() {
    for (count, complaint) in [
        ("-1", "LISTEN_FDS is '-1', which is no number of descriptors"),
        ("x", "LISTEN_FDS is 'x', which is no number of descriptors"),
        ("99999999999", "LISTEN_FDS is '99999999999', which is no number of descriptors"),
        ("18446744073709551615", "is '18446744073709551615', which is no number of descriptors"),
        ("2000000000", "LISTEN_FDS is 2000000000, but descriptor 2000000002 is not open"),
        ("1", "LISTEN_FDS is 1, but descriptor 3 is not open"),
    ] {
        let script = format!("exec 3<&-; LISTEN_PID=$$ LISTEN_FDS={count} exec \"$@\"");
        let mut daemon = plain().launch().through(&["sh", "-c", &script, "sh"]).spawn();
        assert_eq!(daemon.wait_exit().code(), Some(71), "{count}");
        let text = daemon.complete_text();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("cannot start: ") && text.contains(complaint), "{text}");
    }
}

#[test]
fn without_a_service_manager() {
    // The daemon has no NOTIFY_SOCKET, and stdin and stderr are closed.
    let site = plain();
    let config = site.path("config.lua");
    let mut child = command("sh")
        .args(["-c", "exec \"$@\" 0<&- 2>&-", "sh", crate::harness::daemon::QRELAY, "--config"])
        .arg(config)
        .stdout(File::create("/dev/null").expect("null"))
        .spawn()
        .expect("runs");
    eventually("the daemon serves", || {
        (is_socket(&site.path("in")) && Target::from(site.path("in")).is_alive()).then_some(())
    });
    assert_eq!(submit(site.path("in"), &Mail::new("x")), "Kdiscarded");
    crate::harness::processes::signal(child.id().cast_signed(), Signal::SIGTERM);
    assert_eq!(child.wait().expect("ends").code(), Some(0));
}
