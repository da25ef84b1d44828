//! Clients that take all they can get, of everything that clients share: the others are served all
//! the same.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::harness::daemon::{NOBODY, send_message_as_nobody};
use crate::harness::sink::answer;
use crate::harness::{Client, Daemon, Gate, Mail, Outcome, Reply, Sink, eventually, submit};

/// Clients of another user, in a process that ends with the test.
struct Neighbour(Child);

impl Neighbour {
    /// Runs Python as another user. Returns the process, and the lines that it prints.
    fn run(uid: u32, code: &str, to: &Path, count: usize, begin: &str) -> (Self, impl BufRead) {
        let mut child = Command::new("python3")
            .args(["-c", code])
            .arg(to)
            .args([&count.to_string(), begin])
            .uid(uid)
            .gid(uid)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs as another user");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        (Self(child), lines)
    }

    /// Connects `count` clients that send `begin`, and then a byte twice a second. Returns when all
    /// have begun.
    fn drips(uid: u32, to: &Path, count: usize, begin: &str) -> Self {
        let code = "
import socket, sys, time
to, count, begin = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
clients = []
for _ in range(count):
    client = socket.socket(socket.AF_UNIX)
    client.connect(to)
    client.sendall(begin)
    client.setblocking(False)
    clients.append(client)
print('dripping', flush=True)
while True:
    time.sleep(0.5)
    for client in clients:
        try: client.send(b'x')
        except OSError: pass";
        let (neighbour, mut lines) = Self::run(uid, code, to, count, begin);
        let mut line = String::new();
        lines.read_line(&mut line).expect("a line");
        assert_eq!(line, "dripping\n");
        neighbour
    }

    /// Begins `count` requests again and again, each round before the last one is a second old.
    /// Returns what says that a round is over, too.
    fn begins_anew(uid: u32, to: &Path, count: usize, begin: &str) -> (Self, impl BufRead) {
        let code = "
import socket, sys, time
to, count, begin = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
while True:
    clients = []
    for _ in range(count):
        client = socket.socket(socket.AF_UNIX)
        client.connect(to)
        client.sendall(begin)
        clients.append(client)
    time.sleep(0.2)
    for client in clients: client.close()
    print('round', flush=True)";
        Self::run(uid, code, to, count, begin)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Each of the two users alone may hold three quarters of all credits.
#[test]
fn requests_of_two_users_that_never_end_leave_credits_for_a_third() {
    let daemon = Daemon::start(
        "settings{workers=2, client_timeout=600, request_min_rate=0}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let path = daemon.path("in");
    let _neighbours =
        [NOBODY, NOBODY - 1].map(|uid| Neighbour::drips(uid, &path, 384, "9000000:8999000:"));
    for _ in 0..50 {
        assert_eq!(submit(&*path, &Mail::new("x")), "Kdiscarded");
    }
}

#[test]
fn a_request_below_the_minimum_rate_times_out() {
    let daemon = Daemon::start(
        "settings{workers=1, client_timeout=0.5, request_min_rate=100000}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let mut slow = Client::connect(daemon.path("in"));
    slow.send(b"900000:899000:");
    // The bytes come far more often than client_timeout asks for, until there is an answer.
    let outcome = loop {
        match slow.send(b"x").outcome_within(Duration::from_millis(20)) {
            Outcome::Timeout => {}
            outcome => break outcome,
        }
    };
    assert_eq!(outcome, "Zrequest timed out");
    let mail = Mail::of_size(800_000);
    assert_eq!(submit(daemon.path("in"), &mail), "Kdiscarded");
}

/// A worker has four credits, so two requests may be on their way.
#[test]
fn the_slowest_request_gives_way() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=4, client_share=1, client_timeout=600,
                  request_min_rate=0}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let request = Mail::of_size(60_000).request();
    let begin = |size: usize| {
        let mut client = Client::connect(daemon.path("in"));
        client.send(&request[..size]);
        (client, size)
    };
    let (mut slow, mut fast) = (begin(50), begin(50_000));
    // Each request that begins lets another one give way as soon as that is old enough.
    eventually("the slow one is told", || {
        let mut another = begin(100);
        let limit = Duration::from_millis(1);
        let told = slow.0.outcome_within(limit) == "Ztry again later";
        another.0.half_close().outcome();
        told.then_some(())
    });
    let (client, size) = &mut fast;
    assert_eq!(client.send(&request[*size..]).outcome(), "Kdiscarded");
}

#[test]
fn no_request_gives_way_to_a_client_that_begins_again_and_again() {
    let daemon = Daemon::start(
        "settings{workers=1, worker_connections=8, request_min_rate=0}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let path = daemon.path("in");
    let request = Mail::of_size(60_000).request();
    let mut client = Client::connect(&*path);
    let (_neighbour, rounds) = Neighbour::begins_anew(NOBODY, &path, 5, "9000000:8999000:");
    // All rounds together last longer than a request that gives way.
    let mut lines = rounds.lines();
    for piece in request.chunks(request.len() / 10) {
        assert_eq!(lines.next().expect("a line").expect("a line"), "round");
        assert!(client.try_send(piece).is_ok(), "{}", client.outcome());
    }
    assert_eq!(client.outcome(), "Kdiscarded");
}

#[test]
fn announced_bytes_cost_nobody_memory() {
    let daemon = Daemon::start(
        "settings{workers=2, client_timeout=600, request_min_rate=0}
         qmqp_listen('$DIR/in', function(m) return m:discard() end)",
    );
    let path = daemon.path("in");
    let begin = format!("16700000:16699000:{}", "x".repeat(66_000));
    let _neighbour = Neighbour::drips(NOBODY, &path, 64, &begin);
    for _ in 0..10 {
        assert_eq!(submit(&*path, &Mail::of_size(100_000)), "Kdiscarded");
    }
}

/// One user's mails fill its part of the memory while the next hop doesn't answer.
#[test]
fn one_user_leaves_memory_for_others() {
    let daemon = Daemon::start(
        "max_size = 2000000
         settings{workers=1, mail_memory=8000000, relay_timeout=600}
         qmqp_listen('$DIR/in', function(m) return m:connect('$DIR/out') end)",
    );
    let gate = std::sync::Arc::new(Gate::default());
    let held = gate.clone();
    let sink = Sink::start(
        daemon.path("out"),
        answer(move |mail| {
            if mail.message.len() > 1_000_000 {
                held.pass();
            }
            Reply::text("Kok")
        }),
    );
    let large = Mail::of_size(1_900_000);
    std::thread::scope(|scope| {
        let path = daemon.path("in");
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let (path, large) = (path.clone(), &large);
                scope.spawn(move || submit(&*path, large))
            })
            .collect();
        sink.record().wait_for_count(3);
        // The user has its part now, and another one has not.
        let message = daemon.path("message");
        fs::write(&message, "x".repeat(400_000)).expect("write");
        let file = fs::File::open(&message).expect("open");
        let sent = send_message_as_nobody(&path, "other@x", file);
        assert_eq!(sent.status.code(), Some(0), "{sent:?}");
        gate.open();
        for client in clients {
            assert_eq!(client.join().expect("client"), "Kok");
        }
    });
}
