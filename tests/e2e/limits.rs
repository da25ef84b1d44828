//! Running out of descriptors, of credits (the number of jobs that a worker may have), and of
//! memory. A shortage delays the clients that cause it, but not the service, and ends with its
//! cause.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::daemon::{NOBODY, send_as_nobody};
use crate::harness::processes::{cpu_ticks, signal};
use crate::harness::record::within;
use crate::harness::sink::answer;
use crate::harness::{Client, Daemon, Gate, Mail, Reply, Sink, Site, eventually, full, submit};

/// Few descriptors, and a client that takes all it can get: the others are served at once, because
/// the client's own connections give way.
#[test]
fn out_of_descriptors() {
    let site = Site::with(
        "settings{workers=2, client_timeout=60}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let _sink = Sink::answering(site.path("out"), "Kok");
    let daemon = site.launch().through(&["prlimit", "--nofile=128:128"]).ready();
    daemon.wait_for_log("too few descriptors for worker_connections");
    let fds = daemon.idle_fd_count(2);
    let silent: Vec<_> = (0..300).map(|_| Client::connect(daemon.path("in"))).collect();
    daemon.wait_for_log("too many connections wait");
    for _ in 0..20 {
        let sent = send_as_nobody(&daemon.path("in"), "other@x");
        assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    }
    // Descriptors for the successors of workers are kept.
    let workers = daemon.workers();
    for &worker in &workers {
        signal(worker, Signal::SIGKILL);
    }
    daemon.wait_for_workers(2, &workers);
    let sent = send_as_nobody(&daemon.path("in"), "other@x");
    assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    assert!(daemon.fd_count() < 128, "{} descriptors", daemon.fd_count());
    assert!(daemon.reload());

    drop(silent);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    eventually("as before", || (daemon.fd_count() == fds).then_some(()));
}

/// The same with many listeners, each of which has descriptors of its own.
#[test]
fn many_listeners_leave_descriptors_for_successors() {
    let site = Site::with(
        "settings{workers=2, client_timeout=60}
         for n = 1, 60 do
           qmqp_listen('$DIR/' .. n, function(m) return m:discard() end)
         end",
    );
    let daemon = site.launch().through(&["prlimit", "--nofile=256:256"]).ready();
    let silent: Vec<_> = (0..300).map(|_| Client::connect(daemon.path("1"))).collect();
    daemon.wait_for_log("too many connections wait");
    let workers = daemon.workers();
    for &worker in &workers {
        signal(worker, Signal::SIGKILL);
    }
    daemon.wait_for_workers(2, &workers);
    assert_eq!(daemon.count_log("not accepting for a moment"), 0, "{}", daemon.text());
    assert!(daemon.fd_count() < 256, "{} descriptors", daemon.fd_count());
    assert!(daemon.reload());
    let sent = send_as_nobody(&daemon.path("60"), "other@x");
    assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    drop(silent);
}

/// The same with so few descriptors that there is hardly a place: nobody waits for a timeout, and
/// the supervisor neither spins nor floods the log.
#[test]
fn hardly_any_descriptors() {
    let site = Site::with(
        "settings{workers=1, client_timeout=60}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let _sink = Sink::answering(site.path("out"), "Kok");
    let daemon = site.launch().through(&["prlimit", "--nofile=48:48"]).ready();
    let fds = daemon.idle_fd_count(1);
    let silent: Vec<_> = (0..100).map(|_| Client::connect(daemon.path("in"))).collect();
    let (ticks, started) = (cpu_ticks(daemon.pid()), Instant::now());
    let lines = daemon.text().lines().count();
    for _ in 0..10 {
        let sent = send_as_nobody(&daemon.path("in"), "other@x");
        assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    }
    let busy = cpu_ticks(daemon.pid()) - ticks;
    let seconds = started.elapsed().as_secs_f64();
    let said = daemon.text().lines().count() - lines;
    assert!((busy as f64) < 0.25 * 100.0 * seconds.max(0.5), "{busy} ticks in {seconds} s");
    // One line for each mail, and one a second about what gives way.
    assert!((said as f64) <= 12.0 + 2.0 * seconds, "{said} lines in {seconds} s");

    drop(silent);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
    eventually("as before", || (daemon.fd_count() == fds).then_some(()));
    assert_eq!(daemon.workers().len(), 1);
}

#[test]
fn a_stop_without_descriptors_loses_nobody_in_the_backlog() {
    let site = Site::with(
        "settings{workers=1, client_timeout=60}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let mut daemon = site.launch().through(&["prlimit", "--nofile=128:128"]).ready();
    let silent: Vec<_> = (0..100).map(|_| Client::connect(daemon.path("in"))).collect();
    daemon.wait_for_log("too many connections wait");
    let mut late: Vec<_> = (0..20).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut late {
        client.send(&Mail::new("x").request());
    }
    daemon.signal(Signal::SIGTERM);
    daemon.wait_for_log("stopping");
    for client in &mut late {
        assert_eq!(client.outcome(), "Kdiscarded");
    }
    drop(silent);
    assert!(daemon.wait_exit().success());
}

#[test]
fn more_mails_than_credits() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=4, client_share=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut clients: Vec<_> = (0..40).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("x").request());
    }
    sink.record().wait_for_count(4);
    gate.open();
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kok");
    }
    assert_eq!(sink.mails().len(), 40);
}

/// The deadline counts from the last byte of the request, wherever the mail waits.
#[test]
fn a_mail_whose_time_went_by_in_the_queue_is_never_begun() {
    let daemon = Daemon::start(
        "settings{workers=1, relay_timeout=1, client_share=1}
         qmqp_listen('$DIR/in', function(m)
           local f = io.open('$DIR/begun', 'a') f:write('x') f:close()
           local till = os.clock() + 0.7
           repeat until os.clock() > till
           return m:discard()
         end)",
    );
    let mut clients: Vec<_> = (0..6).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("x").request());
    }
    let answers: Vec<_> = clients.iter_mut().map(|client| client.outcome().to_string()).collect();
    let late = answers.iter().filter(|answer| *answer == "Ztry again later").count();
    assert!(late > 0, "{answers:?}");
    let begun = std::fs::read(daemon.path("begun")).expect("file").len();
    assert!(begun + late <= clients.len(), "{begun} of {answers:?}");
    daemon.wait_for_log("no worker was free in time");
    let line = daemon.wait_for_log("reply=\"try again later\"");
    let queue = line.split(' ').find_map(|word| word.strip_prefix("queue=")).expect("a time");
    let lua = line.split(' ').find_map(|word| word.strip_prefix("lua=")).expect("a time");
    let waited: f64 = [queue, lua].iter().map(|time| time.parse::<f64>().expect("a number")).sum();
    assert!(waited >= 990.0, "{line}");
}

#[test]
fn silent_clients_cost_no_credit() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=2, client_timeout=60}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let _silent: Vec<_> = (0..500).map(|_| Client::connect(daemon.path("in"))).collect();
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
}

#[test]
fn connections_per_uid() {
    let daemon = Daemon::start(
        "settings{workers=1, max_connections_per_uid=3}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("x").request());
    }
    sink.record().wait_for_count(3);
    assert_eq!(submit(daemon.path("in"), &Mail::new("one too many")), "Ztry again later");
    gate.open();
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kok");
    }
    // A client is told before the supervisor is.
    eventually("a place is free", || {
        (submit(daemon.path("in"), &Mail::new("x")) == "Kok").then_some(())
    });
}

#[test]
fn messages_in_memory_are_bounded() {
    let daemon = Daemon::start(
        "max_size = 2000000
         settings{workers=1, mail_memory=5000000, relay_timeout=20, client_share=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mail = Mail::of_size(2_000_000);
    std::thread::scope(|scope| {
        let clients: Vec<_> =
            (0..6).map(|_| scope.spawn(|| submit(daemon.path("in"), &mail))).collect();
        sink.record().wait_for_count(2);
        gate.open();
        for client in clients {
            let answer = client.join().expect("client");
            assert!(matches!(answer.status(), 'K' | 'Z'), "{answer}");
        }
    });
    assert_eq!(submit(daemon.path("in"), &mail), "Kok");
}

#[test]
fn one_client_never_gets_every_credit() {
    // There are four credits. A client gets three quarters of them at most.
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=4}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let gate = std::sync::Arc::new(Gate::default());
    let held = gate.clone();
    let sink = Sink::start(
        daemon.path("out"),
        answer(move |mail| {
            if mail.sender == b"held@x" {
                held.pass();
            }
            Reply::text("Kok")
        }),
    );
    let mut clients: Vec<_> = (0..8).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("x").from("held@x").request());
    }
    sink.record().wait_for_count(3);
    for _ in 0..3 {
        let output = send_as_nobody(&daemon.path("in"), "other@x");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    let held = sink.mails().iter().filter(|mail| mail.sender == b"held@x").count();
    assert_eq!(held, 3, "the fourth credit is for others");
    gate.open();
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kok");
    }
}

#[test]
fn a_full_stderr_costs_log_lines_and_not_time() {
    let site = Site::with(
        "settings{workers=2}
         qmqp_listen('$DIR/in', function(m) print(('x'):rep(500)) return m:discard() end)",
    );
    let mut daemon = site.launch().unread_stderr().ready();
    // The output is far more than the 64 KiB that a pipe holds.
    for _ in 0..600 {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    }
    assert!(daemon.reload());
    daemon.stop();
}

/// Environment variable of the helper process: the address to connect to.
const DRIP: &str = "QRELAY_DRIP";
/// Number of clients of the helper process.
const DRIPS: usize = 600;

/// Runs in a process of its own, as another user: clients that send a byte a second, for ever. In
/// an ordinary test run the variable isn't set, and the function does nothing.
#[test]
fn drip_helper() {
    let Some(path) = std::env::var_os(DRIP) else { return };
    let connect = || UnixStream::connect(&path).expect("connect");
    let mut clients: Vec<_> = (0..DRIPS).map(|_| connect()).collect();
    println!("dripping");
    std::io::stdout().flush().expect("stdout");
    loop {
        for client in &mut clients {
            client.set_nonblocking(true).expect("non-blocking");
            // The bytes are first the digits of a long length, then a part of a long message.
            if client.write(b"1").is_err() {
                *client = connect();
            }
        }
        // The pause is the behaviour of these clients: a byte a second.
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// A helper process, which ends with the test.
struct Helper(Child);

impl Helper {
    fn drip(to: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "limits::drip_helper", "--nocapture"])
            .env(DRIP, to)
            .uid(NOBODY)
            .gid(NOBODY)
            .stdout(Stdio::piped())
            .spawn()
            .expect("runs as another user");
        let stdout = child.stdout.take().expect("piped");
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stdout));
        let ready = lines.any(|line| line.is_ok_and(|line| line.contains("dripping")));
        assert!(ready, "the helper failed");
        Self(child)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs eight clients of this user, each of which sends one mail after the other. Returns the
/// sorted times to the answer.
fn normal_clients(to: &Path, mails: usize) -> Vec<Duration> {
    let mut times: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let one = |_| {
                        let started = Instant::now();
                        assert_eq!(submit(to, &Mail::new("normal")), "Kok");
                        started.elapsed()
                    };
                    (0..mails).map(one).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("client")).collect()
    });
    times.sort();
    times
}

#[test]
fn one_users_drip_does_not_shut_out_the_others() {
    let daemon = Daemon::start(
        "settings{workers=2, worker_connections=64}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let _sink = Sink::answering(daemon.path("out"), "Kok");
    let path = daemon.path("in");
    let alone = normal_clients(&path, 100);
    let helper = Helper::drip(&path);
    let beside = normal_clients(&path, 250);
    drop(helper);
    let p99 = |times: &[Duration]| times[times.len() * 99 / 100];
    println!("p99 alone {:?}, beside {DRIPS} dripping clients {:?}", p99(&alone), p99(&beside));
    // The requirement is 100 ms on a quiet machine. Without `QRELAY_FULL` other tests run at the
    // same time.
    let limit = if full() { 100 } else { 1000 };
    assert!(p99(&beside) < Duration::from_millis(limit), "{:?}", p99(&beside));
}

#[test]
fn urgent_data_does_not_keep_the_supervisor_busy() {
    let daemon = Daemon::start(
        "settings{workers=1, client_timeout=30}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let client = UnixStream::connect(daemon.path("in")).expect("connect");
    let flags = nix::sys::socket::MsgFlags::MSG_OOB;
    nix::sys::socket::send(client.as_raw_fd(), b"x", flags).expect("urgent data");
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
    // A rate is measured here, so the measurement takes a fixed time.
    let (ticks, started) = (cpu_ticks(daemon.pid()), Instant::now());
    while started.elapsed() < Duration::from_millis(500) {
        assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kdiscarded");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let busy = cpu_ticks(daemon.pid()) - ticks;
    assert!(busy < 20, "{busy} ticks of 10 ms in half a second");
}

#[test]
fn a_silent_crowd_shuts_nobody_out() {
    a_crowd_shuts_nobody_out(b"", 0);
}

/// A crowd that waits for credits, and whose mails never end.
#[test]
fn a_waiting_crowd_shuts_nobody_out() {
    // The first ones that wait keep their places, so the first one to be told is a later one.
    a_crowd_shuts_nobody_out(b"9000:8000:x", 4200);
}

fn a_crowd_shuts_nobody_out(begin: &[u8], told: usize) {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=8, client_timeout=60}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    // There are more clients than the supervisor (4096) and its backlog can hold.
    let crowd: Vec<_> = (0..4300)
        .map(|_| {
            let mut client = Client::connect(daemon.path("in"));
            client.send(begin);
            client
        })
        .collect();
    let sent = send_as_nobody(&daemon.path("in"), "a@example.com");
    assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    daemon.wait_for_log("too many connections wait");
    let mut first = crowd.into_iter().nth(told).expect("a crowd");
    assert_eq!(first.outcome(), "Ztry again later");
}

/// Returns the number of threads of a process.
fn threads(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// A thread of a worker ends after 30 s without work, except for the thread that waits for jobs.
#[test]
fn idle_threads_end() {
    let daemon = Daemon::start(
        "settings{workers=1}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let worker = daemon.workers()[0];
    let before = threads(worker);
    let mut clients: Vec<_> = (0..60).map(|_| Client::connect(daemon.path("in"))).collect();
    for client in &mut clients {
        client.send(&Mail::new("slow").request());
    }
    // Each mail needs a thread, because the sink holds all mails at the same time.
    sink.record().wait_for_count(60);
    let busy = threads(worker);
    assert!(busy >= 60, "{busy} threads for 60 mails; {before} before");
    gate.open();
    let released = Instant::now();
    for client in &mut clients {
        assert_eq!(client.outcome(), "Kok");
    }
    let few = within(Duration::from_secs(60), || (threads(worker) <= before).then_some(()));
    assert!(few.is_some(), "{} threads a minute later; {before} before", threads(worker));
    assert!(
        released.elapsed() >= Duration::from_secs(29),
        "idle threads are kept for the next burst"
    );
    assert_eq!(daemon.workers(), [worker]);
    assert_eq!(submit(daemon.path("in"), &Mail::new("x")), "Kok");
}
