//! Real peers: Postfix's qmqp-source in front of qrelay and qmqp-sink behind it, over every kind of
//! socket that both programs know; and Postfix' own server, qmqpd, behind qrelay: the tests look at
//! what arrives in its queue.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use nix::unistd::User;

use crate::harness::processes::signal;
use crate::harness::{Daemon, Mail, Sink, Site, Target, eventually, submit};

const SOURCE: &str = "/usr/sbin/qmqp-source";
const SINK: &str = "/usr/sbin/qmqp-sink";
const DAEMONS: &str = "/usr/lib/postfix/sbin";

/// A running qmqp-sink.
struct QmqpSink(Child);

impl QmqpSink {
    /// Starts qmqp-sink and waits until it listens. The attempts to connect are connections without
    /// a mail, which qmqp-sink accepts.
    fn start(address: &str, target: &Target) -> Self {
        let child = Command::new(SINK)
            .args([address, "100"])
            .stdout(Stdio::null())
            .spawn()
            .expect("Postfix's qmqp-sink is installed");
        let sink = Self(child);
        eventually("qmqp-sink listens", || target.is_alive().then_some(()));
        sink
    }
}

impl Drop for QmqpSink {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs qmqp-source, which fails if any mail isn't accepted.
#[track_caller]
fn source(options: &[&str], address: &str) {
    let output = Command::new(SOURCE)
        .args(["-f", "s@example.com", "-t", "r@example.org"])
        .args(options)
        .arg(address)
        .output()
        .expect("Postfix's qmqp-source is installed");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{:?} {complaints}", output.status);
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// The services of a Postfix that takes mail by QMQP, and keeps it in its queue.
const SERVICES: &str = "\
qmqp    unix n - n - - qmqpd
cleanup unix n - n - 0 cleanup
rewrite unix - - n - - trivial-rewrite
";

/// A running Postfix with a queue of its own. Without a queue manager nothing leaves the queue.
struct Postfix {
    site: Site,
    master: Child,
}

impl Postfix {
    /// Starts Postfix and waits until its qmqpd listens.
    fn start() -> Self {
        let site = Site::new();
        let user = User::from_name("postfix").expect("users").expect("Postfix is installed");
        let root = site.path("");
        fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).expect("mode");
        for name in ["data", "queue/active", "queue/incoming", "queue/private", "queue/public"] {
            fs::create_dir_all(site.path(name)).expect("directory");
            chown(site.path(name), Some(user.uid.as_raw()), None).expect("owner");
        }
        fs::create_dir(site.path("queue/pid")).expect("directory");
        let root = root.display();
        let main = format!(
            "compatibility_level = 3.6
             queue_directory = {root}/queue
             data_directory = {root}/data
             command_directory = /usr/sbin
             daemon_directory = {DAEMONS}
             myhostname = mx.example.com
             inet_interfaces = loopback-only
             qmqpd_authorized_clients = 127.0.0.0/8
             trigger_timeout = 1s"
        );
        let main: Vec<_> = main.lines().map(str::trim).collect();
        fs::write(site.path("main.cf"), main.join("\n") + "\n").expect("main.cf");
        fs::write(site.path("master.cf"), SERVICES).expect("master.cf");
        let master = Command::new(format!("{DAEMONS}/master"))
            .args(["-d", "-c"])
            .arg(site.path(""))
            .stdin(Stdio::null())
            .spawn()
            .expect("Postfix is installed");
        let postfix = Self { site, master };
        let target = Target::from(postfix.path());
        eventually("qmqpd listens", || target.is_alive().then_some(()));
        postfix
    }

    /// The path of qmqpd's socket.
    fn path(&self) -> std::path::PathBuf {
        self.site.path("queue/public/qmqp")
    }

    /// Relays a mail through a fresh qrelay with this handler's code, and returns the envelope
    /// records and the message that are in the queue then. The message is without what Postfix
    /// adds.
    #[track_caller]
    fn relayed(&self, code: &str, mail: &Mail) -> (String, String) {
        let daemon = Daemon::start(&format!(
            "qmqp_listen('$DIR/in', function(m) {code} return m:connect('{}') end)",
            self.path().display()
        ));
        let answer = submit(daemon.path("in"), mail).to_string();
        let id = answer.strip_prefix("KOk: queued as ").expect(&answer);
        let output = Command::new("/usr/sbin/postcat")
            .arg("-c")
            .arg(self.site.path(""))
            .args(["-q", id])
            .output()
            .expect("postcat");
        let text = String::from_utf8(output.stdout).expect("text");
        let (envelope, message) = text.split_once("*** MESSAGE CONTENTS").expect(&text);
        let (_, message) = message.split_once("***\n").expect(&text);
        let (message, _) = message.split_once("*** HEADER EXTRACTED").expect(&text);
        // Its own Received field comes first, and three fields that the message lacks come last.
        let lines = message.split_inclusive('\n').enumerate();
        let added = ["Message-Id: ", "Date: ", "From: "];
        let ours = lines.filter(|(at, line)| *at > 2 && !added.iter().any(|a| line.starts_with(a)));
        (envelope.to_owned(), ours.map(|(_, line)| line).collect())
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        signal(self.master.id() as i32, Signal::SIGTERM);
        let _ = self.master.wait();
    }
}

fn relay_to(next_hop: &str) -> (Daemon, std::net::SocketAddr) {
    let port = Target::free_port();
    let daemon = Daemon::start(&format!(
        "settings{{workers=2}}
         local function relay(m) return m:connect('{next_hop}') end
         qmqp_listen('$DIR/in', relay)
         qmqp_listen('{port}', relay)"
    ));
    (daemon, port)
}

#[test]
fn qmqp_source_before_qrelay() {
    let (daemon, port) = relay_to("$DIR/out");
    let sink = Sink::answering(daemon.path("out"), "Kok");
    for address in [unix(&daemon.path("in")), format!("inet:{port}")] {
        source(&["-m", "60", "-s", "6", "-l", "2000"], &address);
        source(&["-m", "10", "-s", "2", "-l", "300000", "-r", "50"], &address);
    }
    let mails = sink.mails();
    assert_eq!(mails.len(), 140);
    for mail in &mails {
        assert_eq!(mail.sender, b"s@example.com");
        assert!(mail.message.starts_with(b"Received: from "));
        let many = mail.recipients.len() == 50;
        assert_eq!(mail.message.len() > 300_000, many, "length and recipients belong together");
        assert!(many || mail.recipients == [b"r@example.org".to_vec()]);
    }
}

#[test]
fn qmqp_sink_behind_qrelay() {
    let site = Site::new();
    let port = Target::free_port();
    let path = site.path("out");
    let hops =
        [(unix(&path), Target::from(path.clone())), (format!("inet:{port}"), Target::from(port))];
    for (address, target) in hops {
        let _sink = QmqpSink::start(&address, &target);
        let (daemon, _) = relay_to(&target.to_string());
        for size in [0, 1, 2000, 1 << 20] {
            let answer = submit(daemon.path("in"), &Mail::of_size(size));
            assert_eq!(answer.status(), 'K', "{size} bytes to {address}: {answer}");
        }
    }
}

#[test]
fn qrelay_between_qmqp_source_and_qmqp_sink() {
    let site = Site::new();
    let next = Target::from(site.path("out"));
    let _sink = QmqpSink::start(&unix(&site.path("out")), &next);
    let (daemon, port) = relay_to(&next.to_string());
    for address in [unix(&daemon.path("in")), format!("inet:{port}")] {
        source(&["-m", "200", "-s", "20", "-l", "2000"], &address);
    }
    // The log line of a mail may be written after its answer.
    eventually("400 log lines", || (daemon.count_log("status=K") == 400).then_some(()));
}

#[test]
fn the_queue_of_qmqpd_has_the_message_as_it_was_meant() {
    let postfix = Postfix::start();
    let received = format!("Received: from PID={} UID=0 with QMQP", std::process::id());
    for (message, arrived) in [
        // Every line ends alike: a CR in the queue is a space at the end of a line.
        ("A: b\n\nbody\n", format!("X: 1\n{received}\nA: b\n\nbody\n")),
        // A mailbox file's line is what Postfix makes of it at the beginning of a message.
        (
            "From a@b Mon\n>From c\nA: b\n\nbody\n",
            format!(
                "X-Mailbox-Line: From a@b Mon\nX-Mailbox-Line: >From c\n\
                 X: 1\n{received}\nA: b\n\nbody\n"
            ),
        ),
        // The text isn't a part of our line.
        (" a: b\n\nbody\n", format!("X: 1\n{received}\n\n a: b\n\nbody\n")),
        ("\nbody\n", format!("X: 1\n{received}\n\nbody\n")),
        // A bare CR is a space for Postfix, and the fields behind it are removed nonetheless.
        ("A: b\rY: 1\nY: 2\n\nbody\n", format!("X: 1\n{received}\nA: b \n\nbody\n")),
        ("A: b\nB: c\r\r\nY: 2\n\nbody\n", format!("X: 1\n{received}\nA: b\nB: c  \n\nbody\n")),
    ] {
        let mut mail = Mail::new("");
        mail.message = message.into();
        let code = "m:remove_header('Y') m:insert_header('X', 1)";
        assert_eq!(postfix.relayed(code, &mail).1, arrived, "{message:?}");
    }
}

#[test]
fn the_queue_of_qmqpd_has_the_senders_of_mailing_lists_and_bounces() {
    let postfix = Postfix::start();
    let long = format!("{}@example.com", "l".repeat(200));
    for (sender, record) in [
        ("", "\nsender: \n"),
        ("#@[]", "\nsender: #@[]\n"),
        ("list-@example.com-@[]", "\nsender: list@example.com\nverp_delimiters: -=\n"),
        (&long, &format!("\nsender: {long}\n")),
    ] {
        let (envelope, _) = postfix.relayed("", &Mail::new("x").from(sender));
        assert!(envelope.contains(record), "{sender}: {envelope}");
    }
}
