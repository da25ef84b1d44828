//! Clients that pass descriptors (SCM_RIGHTS) which nobody asked for, and whose last close waits:
//! TCP sockets with unsent data and SO_LINGER. Whoever closes such a descriptor last sleeps for as
//! long as its owner likes, so no thread that serves others may do that.
//!
//! Every case runs with SO_PASSRIGHTS, by which the kernel refuses such descriptors, and without,
//! as on a kernel before Linux 6.16. The clients are a process of their own, because a program that
//! another test starts meanwhile would inherit the descriptors for a moment, and wait.

use std::io::{BufRead, BufReader, IoSlice, Lines, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

use crate::harness::daemon::send_as_nobody;
use crate::harness::{Daemon, Mail, PATIENCE, Sink, Site};

/// Environment variable by which the daemon doesn't use SO_PASSRIGHTS.
const SWITCH: &str = "QRELAY_TEST_PASSRIGHTS";

/// Environment variable that tells the attacker what to do.
const ATTACK: &str = "QRELAY_E2E_ATTACK";

/// User and group of the attacker.
const ATTACKER: u32 = 65533;

/// Longest time that another user's mail may take.
const PROMPT: Duration = Duration::from_secs(1);

/// Time limit of the daemon's end, in seconds. A mail that is under way may take all of it.
const DRAIN: u64 = 3;

/// Whether the kernel refuses passed descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Refuses,
    Delivers,
}

/// The moment in a connection's life at which its client passes a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The client has sent nothing, and the supervisor has the connection.
    Pending,
    /// The same; the descriptor comes with urgent data.
    Urgent,
    /// A worker waits for the rest of the request.
    Reading,
    /// The same; the descriptor comes with urgent data.
    ReadingUrgent,
    /// The handler sleeps.
    Handler,
    /// The next hop hasn't answered.
    NextHop,
    /// A worker has answered, and drops what still comes.
    Answered,
    /// The supervisor has answered, and drops what still comes.
    Lingering,
}

const MOMENTS: [Moment; 8] = [
    Moment::Pending,
    Moment::Urgent,
    Moment::Reading,
    Moment::ReadingUrgent,
    Moment::Handler,
    Moment::NextHop,
    Moment::Answered,
    Moment::Lingering,
];

/// A descriptor whose last close waits, and the reason: a peer that never reads.
struct Stuck {
    descriptor: TcpStream,
    peer: TcpStream,
}

impl Stuck {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut descriptor =
            TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (peer, _) = listener.accept().expect("accept");
        descriptor.set_nonblocking(true).expect("option");
        while descriptor.write(&[b'x'; 65_536]).is_ok() {}
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
        setsockopt(&descriptor, sockopt::Linger, &linger).expect("SO_LINGER");
        Self { descriptor, peer }
    }

    /// Passes the descriptor, and closes this process's copy at once, so that the receiver's close
    /// is the last one. Returns the peer, which must live as long as the attack.
    fn pass(self, to: &UnixStream, flags: MsgFlags) -> (TcpStream, Result<(), Errno>) {
        let Self { descriptor, peer } = self;
        let socket = to.try_clone().expect("a descriptor");
        let (told, result) = std::sync::mpsc::channel();
        // This process may close last all the same: then this thread is the one that waits.
        std::thread::spawn(move || {
            let fds = [descriptor.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            let flags = flags | MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let slice = [IoSlice::new(b"9")];
            let sent = sendmsg::<()>(socket.as_raw_fd(), &slice, &rights, flags, None);
            told.send(sent.map(drop)).expect("a reader");
            drop(descriptor);
        });
        (peer, result.recv().expect("a result"))
    }
}

/// The clients' process, as the test sees it.
struct Attacker {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Attacker {
    /// Starts `count` clients and brings them to their moment.
    fn start(moment: Moment, count: usize, to: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "passed_descriptors::attacker", "--nocapture"])
            .env(ATTACK, format!("{moment:?} {count} {}", to.display()))
            .uid(ATTACKER)
            .gid(ATTACKER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("runs as another user");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut attacker = Self { child, lines };
        attacker.wait_for("prepared");
        attacker
    }

    /// Waits for a line, and returns what follows its first word.
    #[track_caller]
    fn wait_for(&mut self, word: &str) -> String {
        let said =
            |line: std::io::Result<String>| Some(line.ok()?.split_once(word)?.1.trim().to_owned());
        match self.lines.find_map(said) {
            Some(rest) => rest,
            None => panic!("the attacker didn't say {word:?}"),
        }
    }

    /// Has the clients do something, and returns what they say about it.
    #[track_caller]
    fn order(&mut self, order: &str) -> String {
        let stdin = self.child.stdin.as_mut().expect("piped");
        writeln!(stdin, "{order}").expect("the attacker lives");
        self.wait_for(&format!("{order}:"))
    }

    /// Has the clients close their connections.
    fn leave(&mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("wait").success(), "the attacker failed");
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// No test of its own: the clients' process.
#[test]
fn attacker() {
    let Some(attack) = std::env::var_os(ATTACK) else { return };
    let attack = attack.into_string().expect("UTF-8");
    let mut words = attack.splitn(3, ' ');
    let mut word = || words.next().expect("three words");
    let name = word();
    let count: usize = word().parse().expect("a number");
    let path = word();
    let moment = MOMENTS.into_iter().find(|moment| format!("{moment:?}") == name);
    let moment = moment.expect("a moment");
    let mut stuck: Vec<Stuck> = (0..count).map(|_| Stuck::new()).collect();
    let clients: Vec<UnixStream> = (0..count)
        .map(|_| {
            let client = UnixStream::connect(path).expect("connect");
            client.set_read_timeout(Some(PATIENCE)).expect("option");
            client
        })
        .collect();
    prepare(moment, &clients);
    println!("\nprepared");
    let flags = match moment {
        Moment::Urgent | Moment::ReadingUrgent => MsgFlags::MSG_OOB,
        _ => MsgFlags::empty(),
    };
    let mut peers = Vec::new();
    for order in std::io::stdin().lines() {
        let order = order.expect("an order");
        let told: Vec<String> = match order.as_str() {
            "pass" => {
                let passed = stuck.drain(..).zip(&clients);
                let passed = passed.map(|(stuck, client)| stuck.pass(client, flags));
                let (kept, results): (Vec<_>, Vec<_>) = passed.unzip();
                peers.extend(kept);
                results.iter().map(|result| format!("{result:?}")).collect()
            }
            "replies" => clients.iter().map(reply).collect(),
            other => panic!("{other}"),
        };
        println!("\n{order}: {}", told.join(" | "));
    }
    // The end of the process closes everything without waiting.
    std::process::exit(0);
}

/// Reads a reply, as far as it comes in one piece.
fn reply(mut stream: &UnixStream) -> String {
    let mut bytes = [0; 300];
    match stream.read(&mut bytes) {
        Ok(length) => String::from_utf8_lossy(&bytes[..length]).into_owned(),
        Err(error) => error.to_string(),
    }
}

/// Brings the connections to their moment.
fn prepare(moment: Moment, clients: &[UnixStream]) {
    let say = |bytes: &[u8]| {
        for mut client in clients {
            client.write_all(bytes).expect("sent");
        }
    };
    match moment {
        Moment::Pending | Moment::Urgent => {}
        Moment::Reading | Moment::ReadingUrgent => say(b"1000:900:"),
        Moment::Handler => say(&Mail::new("x").from("sleep@x").request()),
        Moment::NextHop => say(&Mail::new("x").from("relay@x").request()),
        Moment::Answered => {
            say(b"GET / HTTP/1.0\r\n");
            clients.iter().for_each(|client| assert_eq!(reply(client), "16:Dmalformed input,"));
        }
        Moment::Lingering => {
            clients.iter().for_each(|client| assert_eq!(reply(client), "18:Zrequest timed out,"));
        }
    }
}

fn start(kernel: Kernel) -> Daemon {
    let site = Site::with(&format!(
        "settings{{workers=2, client_timeout=0.5, drain_timeout={DRAIN}, hang_timeout=60}}
         qmqp_listen('$DIR/in', function(m)
           if m.sender == 'sleep@x' then sleep(0.5) end
           if m.sender == 'relay@x' then return m:connect('$DIR/out') end
           return m:discard()
         end)"
    ));
    match kernel {
        Kernel::Refuses => site.start(),
        Kernel::Delivers => site.launch().env(SWITCH, "off").ready(),
    }
}

/// Sends some mails as another user, each of which must be answered in time.
#[track_caller]
fn assert_prompt(daemon: &Daemon, mails: usize, case: &str) {
    for number in 0..mails {
        let started = Instant::now();
        let sent = send_as_nobody(&daemon.path("in"), "nobody@example.com");
        assert_eq!(sent.status.code(), Some(0), "{case}: {sent:?}");
        let took = started.elapsed();
        assert!(took < PROMPT, "{case}: mail {number} of another user took {took:?}");
    }
}

/// Has the clients pass their descriptors.
#[track_caller]
fn pass(attacker: &mut Attacker, kernel: Kernel, case: &str) {
    for result in attacker.order("pass").split(" | ") {
        // A client that is late finds the connection closed.
        let late = ["Err(EPIPE)", "Err(ECONNRESET)"].contains(&result);
        let expected = match kernel {
            Kernel::Refuses => "Err(EPERM)",
            Kernel::Delivers => "Ok(())",
        };
        assert!(late || result == expected, "{case}: {result}");
    }
}

/// Checks that the daemon obeys a SIGTERM in time, and that it has killed no worker.
#[track_caller]
fn assert_ends(daemon: &mut Daemon, case: &str) {
    let status = daemon.exit_within(Duration::from_secs(DRAIN + 2));
    assert_eq!(status.and_then(|s| s.code()), Some(0), "{case}: SIGTERM; {}", daemon.text());
    daemon.assert_nothing_left();
    for part in ["killing", "died"] {
        assert_eq!(daemon.count_log(part), 0, "{case}: {}", daemon.text());
    }
}

/// Has `count` clients pass a descriptor at a moment of their connections' lives.
#[track_caller]
fn attack(moment: Moment, count: usize, kernel: Kernel) {
    let case = format!("{moment:?}, {count} connections, the kernel {kernel:?}");
    let mut daemon = start(kernel);
    let (sink, gate) = Sink::gated(daemon.path("out"));
    let mut attacker = Attacker::start(moment, count, &daemon.path("in"));
    match moment {
        // When a later client has its answer, the earlier ones have been accepted.
        Moment::Pending | Moment::Urgent => assert_prompt(&daemon, 1, "before"),
        Moment::NextHop => sink.record().wait_for_count(1),
        _ => {}
    }
    pass(&mut attacker, kernel, &case);
    assert_prompt(&daemon, 6, &case);
    gate.open();
    assert_prompt(&daemon, 6, &case);
    if kernel == Kernel::Delivers && moment == Moment::Reading {
        for reply in attacker.order("replies").split(" | ") {
            assert_eq!(reply, "16:Dmalformed input,", "{case}");
        }
        daemon.wait_for_log("passed descriptors");
    }
    attacker.leave();
    assert_prompt(&daemon, 6, &case);
    daemon.signal(Signal::SIGTERM);
    assert_ends(&mut daemon, &case);
}

#[track_caller]
fn attack_with_all(moment: Moment) {
    for kernel in [Kernel::Delivers, Kernel::Refuses] {
        for count in [1, 8, 64] {
            attack(moment, count, kernel);
        }
    }
}

#[test]
fn passed_before_the_first_byte() {
    attack_with_all(Moment::Pending);
}

#[test]
fn passed_with_urgent_data() {
    attack_with_all(Moment::Urgent);
}

#[test]
fn passed_within_the_request() {
    attack_with_all(Moment::Reading);
}

#[test]
fn passed_with_urgent_data_within_the_request() {
    attack_with_all(Moment::ReadingUrgent);
}

#[test]
fn passed_while_the_handler_sleeps() {
    attack_with_all(Moment::Handler);
}

#[test]
fn passed_while_the_next_hop_is_slow() {
    attack_with_all(Moment::NextHop);
}

#[test]
fn passed_after_the_workers_answer() {
    attack_with_all(Moment::Answered);
}

#[test]
fn passed_after_the_supervisors_answer() {
    attack_with_all(Moment::Lingering);
}

#[test]
fn passed_before_the_connection_is_accepted() {
    for kernel in [Kernel::Delivers, Kernel::Refuses] {
        for count in [1, 8, 64] {
            for serve in [true, false] {
                let case = format!("backlog, {count} connections, {kernel:?}, serve: {serve}");
                let mut daemon = start(kernel);
                daemon.signal(Signal::SIGSTOP);
                let mut attacker = Attacker::start(Moment::Pending, count, &daemon.path("in"));
                pass(&mut attacker, kernel, &case);
                attacker.leave();
                if serve {
                    daemon.signal(Signal::SIGCONT);
                    assert_prompt(&daemon, 6, &case);
                    daemon.signal(Signal::SIGTERM);
                } else {
                    daemon.signal(Signal::SIGTERM);
                    daemon.signal(Signal::SIGCONT);
                }
                assert_ends(&mut daemon, &case);
            }
        }
    }
}
