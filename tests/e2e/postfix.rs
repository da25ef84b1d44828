//! Real peers: Postfix's qmqp-source in front of qrelay and qmqp-sink behind it, over every kind of
//! socket that both programs know.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::harness::{Daemon, Mail, Sink, Site, Target, eventually, submit};

const SOURCE: &str = "/usr/sbin/qmqp-source";
const SINK: &str = "/usr/sbin/qmqp-sink";

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
